"""A meta-step of nowcast networks: masked L1 over all horizons of some windows, one program a task's structure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from lopt import nowcast
from lopt.console import compiler_options
from lopt.nowcast import network as N
from lopt.nowcast import predict, wrapper
from lopt.nowcast.modules import floating
from meta_train.meta_optimizer import warmup
from meta_train.nowcast_config import Nowcasting
from meta_train.trajectories import mesh_over

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int


class State(NamedTuple):
    """Of a run; by name of a network where there are several."""

    theta: dict[str, Any]
    opt: dict[str, Any]
    best: dict[str, Any]  # theta that did best in validation
    score: dict[str, Any]  # () of it; inf before there was one
    at: dict[str, Any]  # () int32, meta-steps that made it
    skipped: dict[str, Any]  # () int32, gradients that were not finite


class Part(NamedTuple):
    """Edges of as many taps, padded with edges that hold nothing and end at a neuron that is none."""

    source: np.ndarray  # [E]
    target: np.ndarray  # [E]
    kind: np.ndarray  # [E]
    place: np.ndarray  # [E, K] in a flat state; -1: no weight
    constant: np.ndarray  # [E] feature of edges without weight


class Wiring(NamedTuple):
    """A structure of parameters as the networks see it; arrays only, so that those of equal sizes share a program."""

    parts: tuple[Part, ...]
    neurons: np.ndarray  # [V] zeros: how many there are is their shape
    tensor: np.ndarray  # [P] number of each weight's leaf
    member: np.ndarray  # [P, L] float32: 1 where a weight is of a leaf
    kinds: np.ndarray  # [P] types of the weights, for the graph-free network; 0: padding


LEAVES = 32  # that L is a multiple of


def padded(n: int, least: int = 64) -> int:
    """The next of 64, 96, 128, 192, 256, …: tasks of about the same size share a program.

    >>> [padded(n) for n in (1, 65, 97, 3000, 3100)]
    [64, 96, 128, 3072, 4096]
    """
    size = least
    while size < n:
        size = size * 3 // 2 if size & (size - 1) == 0 else size // 3 * 4
    return size


def wiring(leaves: Sequence[Sequence[Any]], heads: int) -> Wiring:
    """Of leaves by path and shape. Raises ValueError if their graph is not recognised."""
    params: dict[str, Any] = {}
    for path, shape in leaves:
        *inner, last = path.split("/")
        node = params
        for name in inner:
            node = node.setdefault(name, {})
        node[last] = jax.ShapeDtypeStruct(tuple(shape), jnp.float32)
    graph = nowcast.recognise(params, heads=heads or None)
    paths = [path for path, _ in leaves]
    found = [path for path, _ in floating(params)]
    if found != paths:
        raise ValueError(f"lopt-train: leaves {paths} are in another order than {found}; valid: the order of a tree.")
    layout = predict.plan(graph, params, paths, taps=N.DEFAULTS["gnn"]["taps"], small=2**62)
    sizes = [int(np.prod(shape, dtype=int)) for _, shape in leaves]
    stops = np.cumsum([0, *sizes])
    columns = np.concatenate([np.arange(stops[i], stops[i + 1]) for i in layout.small])
    count = padded(layout.count + 1)  # the last one is that of padding
    parts = []
    for packed in layout.packed:
        extra = padded(len(packed.source)) - len(packed.source)
        place = np.where(packed.place >= 0, columns[np.maximum(packed.place, 0)], -1)
        parts.append(
            Part(
                np.pad(packed.source, (0, extra), constant_values=count - 1),
                np.pad(packed.target, (0, extra), constant_values=count - 1),
                np.pad(packed.kind, (0, extra)),
                np.pad(place, ((0, extra), (0, 0)), constant_values=-1).astype(np.int32),
                np.pad(packed.constant, (0, extra)),
            )
        )
    width = padded(int(stops[-1]))
    tensor = np.pad(np.repeat(np.arange(len(sizes)), sizes), (0, width - stops[-1]), constant_values=len(sizes))
    member = np.eye(-(-(len(sizes) + 1) // LEAVES) * LEAVES, dtype=np.float32)[tensor]
    kinds = wrapper.types_of(graph, params)
    flat = [np.broadcast_to(np.ravel(kind), (n,)) for kind, n in zip(kinds, sizes, strict=True)]
    kinds = np.pad(np.concatenate(flat).astype(np.int32), (0, width - stops[-1]))
    return Wiring(tuple(parts), np.zeros(count, np.int8), tensor.astype(np.int32), member, kinds)


HEAD = 0.1  # of the gain: the networks begin near to predicting that nothing changes


def networks(run: Nowcasting) -> dict[str, N.Network]:
    """As they begin."""
    made = {}
    for i, name in enumerate(run.networks):
        settings = {"hidden": run.hidden, "horizons": run.horizons, "context": run.context}
        settings |= {"layers": run.layers} if name == "gnn" else {}
        network = nowcast.make(name, jax.random.fold_in(jax.random.key(run.seed), i), **settings)
        matrices = {id(layer["w"]) for layer in (network.theta["head"] if name == "gnn" else network.theta["mlp"])[-1:]}

        def larger(x: Any, last: Any = matrices) -> Any:
            fan_in = x.shape[0] if x.ndim == 2 else 1
            return x * (run.init_gain * (HEAD if id(x) in last else 1.0) / (0.02 * fan_in**0.5))

        made[name] = network._replace(theta=jax.tree.map(larger, network.theta))
    return made


def predictions(
    network: N.Network, theta: Any, wired: Wiring, states: Float[Array, "P B T"]
) -> list[tuple[Float[Array, "E B K H"], Int[Array, "E K"]]]:
    """Scaled changes at all horizons, and the weights that they are of (-1: none). states: scaled, of B windows."""
    if network.name == "wnn":
        out = N.apply_wnn(theta, states, wired.kinds[:, None])
        return [(out[:, :, None], jnp.where(wired.kinds > 0, jnp.arange(len(wired.kinds)), -1)[:, None])]
    parts = []
    for part in wired.parts:
        features = jnp.where(part.place[..., None, None] >= 0, states[part.place], 0.0)  # [E, K, B, T]
        features = features.at[:, 0].add(part.constant[:, None, None].astype(features.dtype))
        features = jnp.swapaxes(features, 1, 2)
        parts.append((features.reshape(*features.shape[:2], -1), part.kind))
    edges = jnp.stack([jnp.concatenate([getattr(p, end) for p in wired.parts]) for end in ("source", "target")])
    out = N.apply_parts(network, theta, parts, edges, len(wired.neurons))
    return [(x, jnp.asarray(part.place)) for x, part in zip(out, wired.parts, strict=True)]


def scaled(windows: Float[Array, "P B S"], context: int, wired: Wiring) -> tuple[Any, Any]:
    """States of windows and what changes after the last, by mean and unbiased deviation of each tensor's states."""
    states = windows[..., :context]
    count = context * jnp.sum(wired.member, 0)[:, None]  # [L, 1]
    sums = jnp.einsum("pbt,pl->lb", states, wired.member, precision="highest")
    mean = (sums / jnp.maximum(count, 1))[wired.tensor][..., None]
    squares = jnp.einsum("pbt,pl->lb", (states - mean) ** 2, wired.member, precision="highest")
    std = jnp.sqrt(squares / jnp.maximum(count - 1, 1))[wired.tensor][..., None]
    return (states - mean) / (std + N.EPS), (windows[..., context:] - states[..., -1:]) / (std + N.EPS)


def loss(
    network: N.Network, run: Nowcasting, wired: Wiring, theta: Any, spans: Float[Array, "N S Q"], valid: Int[Array, "N"]
) -> tuple[Any, Any]:
    """() masked L1 over weights, horizons and windows of some trajectories, and that of staying where they are.

    Args:
      network: its settings.
      run: windows a trajectory, horizons, dtype of the products.
      wired: of the parameters.
      theta: weights.
      spans: states a stride apart; Q weights, without padding.
      valid: how many of these there are.
    """
    size, starts = run.context + run.horizons, jnp.arange(run.training.windows)
    spans = jnp.pad(spans, ((0, 0), (0, 0), (0, len(wired.tensor) - spans.shape[2])))
    windows = spans[:, starts[:, None] + jnp.arange(size)[None]]  # [N, W, S, P]
    windows = jnp.moveaxis(windows.reshape(-1, size, spans.shape[2]), 2, 0)  # [P, B, S]
    ends = (valid[:, None] - starts[None]).reshape(-1)  # [B]
    states, wanted = scaled(windows, run.context, wired)
    seen = jnp.arange(run.horizons)[None] < ends[:, None] - run.context  # [B, H]
    dtype = jnp.dtype(run.training.compute)
    theta, states = jax.tree.map(lambda x: x.astype(dtype), (theta, states))
    error, stay, count = jnp.zeros(()), jnp.zeros(()), jnp.zeros(())
    for out, place in predictions(network, theta, wired, states):
        mask = (place >= 0)[:, None, :, None] & seen[None, :, None]  # [E, B, K, H]
        target = jnp.where(mask, jnp.swapaxes(wanted[place], 1, 2), 0.0)
        error += jnp.sum(jnp.where(mask, jnp.abs(out.astype(jnp.float32) - target), 0.0))
        stay += jnp.sum(jnp.abs(target))
        count += jnp.sum(mask)
    return error / jnp.maximum(count, 1), stay / jnp.maximum(count, 1)


def optimizer(run: Nowcasting) -> optax.GradientTransformation:
    """AdamW under a cosine, of a gradient whose norm is clipped."""
    on = run.training
    rate = optax.warmup_cosine_decay_schedule(0.0, on.lr, warmup(on.warmup, on.steps), on.steps, on.final_lr)
    return optax.chain(optax.clip_by_global_norm(on.clip), optax.adamw(rate, weight_decay=on.weight_decay))


def init(run: Nowcasting) -> State:
    """Where a run begins."""
    theta = {name: network.theta for name, network in networks(run).items()}
    opt = {name: optimizer(run).init(x) for name, x in theta.items()}
    zero = {name: jnp.zeros((), jnp.int32) for name in theta}
    never = {name: jnp.full((), jnp.inf, jnp.float32) for name in theta}
    return State(theta, opt, jax.tree.map(jnp.copy, theta), never, zero, dict(zero))


def replicated(run: Nowcasting, tree: Any) -> Any:
    """On all devices of a run."""
    return jax.device_put(tree, NamedSharding(mesh_over(run.training.trajectories), PartitionSpec()))


def meta_step(run: Nowcasting) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`step(state, wired, spans, valid) -> (state, metrics)` and `judge(theta, wired, spans, valid) -> metrics`.

    Compiled once for each size of parameters. The trajectories are shared out among the devices.
    """
    made, mesh, tx = networks(run), mesh_over(run.training.trajectories), optimizer(run)
    over, everywhere = PartitionSpec(mesh.axis_names[0]), PartitionSpec()
    jit = partial(
        jax.jit,
        compiler_options=compiler_options(devices=len(mesh.local_devices)),
        out_shardings=NamedSharding(mesh, everywhere),
    )

    def spread(f: Callable[..., Any]) -> Callable[..., Any]:
        def mean(theta: Any, wired: Wiring, spans: Any, valid: Any) -> Any:
            return jax.lax.pmean(f(wired, theta, spans, valid), mesh.axis_names[0])

        specs = (everywhere, everywhere, over, over)
        return jax.shard_map(mean, mesh=mesh, in_specs=specs, out_specs=everywhere, check_vma=False)

    @jit
    def step(state: State, wired: Wiring, spans: Any, valid: Any) -> tuple[State, dict[str, Any]]:
        theta, opt, skipped, metrics = {}, {}, {}, {}
        for name, network in made.items():
            gradient = jax.value_and_grad(partial(loss, network, run), argnums=1, has_aux=True)
            (got, stay), grads = spread(gradient)(state.theta[name], wired, spans, valid)
            fine = jnp.isfinite(got) & jnp.isfinite(sum(jnp.sum(g * g) for g in jax.tree.leaves(grads)))
            updates, moved = tx.update(grads, state.opt[name], state.theta[name])
            new = optax.apply_updates(state.theta[name], updates)
            theta[name] = jax.tree.map(partial(jnp.where, fine), new, state.theta[name])
            opt[name] = jax.tree.map(partial(jnp.where, fine), moved, state.opt[name])
            skipped[name] = state.skipped[name] + ~fine
            metrics |= {f"loss/{name}": got, f"relative/{name}": got / jnp.maximum(stay, 1e-12)}
        return state._replace(theta=theta, opt=opt, skipped=skipped), metrics

    @jit
    def judge(theta: dict[str, Any], wired: Wiring, spans: Any, valid: Any) -> dict[str, Any]:
        out = {}
        for name, network in made.items():
            got, stay = spread(partial(loss, network, run))(theta[name], wired, spans, valid)
            out |= {f"held_loss/{name}": got, f"held_relative/{name}": got / jnp.maximum(stay, 1e-12)}
        return out

    return step, judge
