"""L2O-PA: proximal gradient with a preconditioner and a momentum that an LSTM finds for each coordinate.

Source: Liu et al. (2023), "Towards Constituting Mathematical Structures for Learning to Optimize", ICML,
arXiv:2305.18577, equations 11 to 14.

For F = f + r with f of Lipschitz-continuous gradient: parameters are the extrapolated point y, the state has the last
output x of r's proximal operator. With s = .9999 / L and what the network says of a coordinate, p, a, b, b1, b2:

    v = b (y - s p ∇f(y)) + (1 - b) (x - s p ∇f(x)) + b1
    x⁺ = prox of r in the metric s p, at v
    y⁺ = x⁺ + a (x⁺ - x) + b2

The form PA, which the paper recommends, has b = 1, b1 = b2 = 0. Forms are named by what they have.

Differs from the paper: x starts at the parameters rather than at 0, and so does y.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lopt import prox as penalties
from lopt.base import LearnedOptimizer, positive, unknown
from lopt.features import Layer, init_mlp
from lopt.proximal import SAFE
from lopt.transform import Arithmetic, State, define

if TYPE_CHECKING:
    from jaxtyping import Array, Float

PARTS = {
    "A": ("a",),
    "P": ("p",),
    "PA": ("p", "a"),
    "PBA": ("p", "a", "b"),
    "PBA1": ("p", "a", "b", "b1"),
    "PBA2": ("p", "a", "b", "b2"),
    "PBA12": ("p", "a", "b", "b1", "b2"),
}
OFF = {"p": 1.0, "a": 0.0, "b": 1.0, "b1": 0.0, "b2": 0.0}
ACTIVATIONS = {"sigmoid": jax.nn.sigmoid, "softplus": jax.nn.softplus}
LAYERS = 2


class Recurrent(NamedTuple):
    """A layer of an LSTM of H units, gates i, f, g, o."""

    inputs: jax.Array  # [I, 4H]
    state: jax.Array  # [H, 4H]
    b: jax.Array  # [4H]


class Theta(NamedTuple):
    lstm: tuple[Recurrent, ...]
    trunk: Layer  # [H, H]
    heads: Layer  # [H, K] one output a part, in the order of PARTS


class Iterate(NamedTuple):
    """State of a tensor."""

    x: jax.Array  # like the tensor; the last output of the proximal operator
    memory: jax.Array  # [2 · 2H, …] hidden and cell of each layer
    gradient: Any  # like the tensor, ∇f(x); () in forms with b = 1


def init_lstm(key: Array, inputs: int, hidden: int) -> tuple[Recurrent, ...]:
    """Two layers, uniform in ± 1/sqrt(H) as the original's."""

    def uniform(key: Array, *shape: int) -> Array:
        return jax.random.uniform(key, shape, jnp.float32, -1.0, 1.0) / jnp.sqrt(hidden)

    keys = jax.random.split(key, 2 * LAYERS)
    widths = (inputs, *[hidden] * (LAYERS - 1))
    return tuple(
        Recurrent(uniform(a, n, 4 * hidden), uniform(b, hidden, 4 * hidden), jnp.zeros(4 * hidden, jnp.float32))
        for n, a, b in zip(widths, keys[::2], keys[1::2], strict=True)
    )


def dense(w: Float[Array, "n m"], b: Float[Array, " m"], x: Float[Array, "n *shape"]) -> Float[Array, "m *shape"]:
    """A layer applied to every coordinate, features in front."""
    # A bias is the weight of a 1: its gradient is then part of the weights', and no sum of its own.
    return jnp.tensordot(jnp.concatenate([w, b[None]]).T, jnp.concatenate([x, jnp.ones_like(x[:1])]), 1)


def lstm(layers: Sequence[Recurrent], x: Float[Array, "I *shape"], memory: Any) -> tuple[Array, Any]:
    """One step of every coordinate's LSTM.

    Args:
      layers: weights.
      x: inputs.
      memory: [2 · 2H, …], or as many arrays (see `blocks.Cut`).

    Returns:
      [H, …] outputs of the last layer, and the new memory in the form of the old.
    """
    parts = jnp.split(jnp.stack(memory) if isinstance(memory, tuple) else memory, 2 * len(layers))
    new = []
    for layer, hidden, cell in zip(layers, parts[::2], parts[1::2], strict=True):
        gates = dense(jnp.concatenate([layer.inputs, layer.state]), layer.b, jnp.concatenate([x, hidden]))
        i, f, g, o = jnp.split(gates, 4)
        cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
        x = jax.nn.sigmoid(o) * jnp.tanh(cell)
        new += [x, cell]
    whole = jnp.concatenate(new)
    return x, tuple(whole) if isinstance(memory, tuple) else whole


def as_one(f: Callable[..., Any]) -> Callable[..., Any]:
    """`f(theta, *arrays)`, features in front, for `vmap`: tensors that share theta are seen as one long one.

    Products with a network's weights are then few and large, where there would be as many small ones as tensors, or
    transposed arrays between them. JAX differentiates it in reverse where it is mapped, and nowhere else.
    """
    mapped = jax.custom_batching.custom_vmap(f)

    @mapped.def_vmap
    def over(size: int, batched: Any, theta: Any, *xs: Any) -> Any:
        if any(jax.tree.leaves(batched[0])) or not all(jax.tree.leaves(batched[1:])):
            axes = jax.tree.map(lambda on: 0 if on else None, batched)
            out = jax.vmap(f, in_axes=tuple(axes), axis_size=size)(theta, *xs)
        else:
            shape = jax.tree.leaves(xs)[0].shape[2:]
            flat = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1), xs)
            out = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, size, *shape), 1, 0), f(theta, *flat))
        return out, jax.tree.map(lambda _: True, out)

    return mapped


def l2o_pa(
    *,
    form: str = "PA",
    hidden: int = 20,
    activation: str = "sigmoid",
    p_gain: float = 2.0,
    a_gain: float = 2.0,
    shift_gain: float = 0.01,
) -> LearnedOptimizer:
    """Build the rule.

    `bind(theta, prox=, lipschitz=)` takes besides what every rule takes

      prox: r, a `lopt.prox.Penalty`; None for 0: then this is an ordinary optimizer.
      lipschitz: L, the Lipschitz constant of ∇f (of ½‖Wx - b‖² that is ‖W‖²), a number or traced; 1 by default.
      mapped: for meta-training. Under `vmap`, tensors that share theta go through the network as one, see `as_one`.

    and gradients are those of f alone, at the parameters. The forms with b also need them at x:
    `update(grads, state, params, grad_fn=)`, where grad_fn gives the gradient of f at any params. `solution(state)` is
    x.

    Args:
      form: which of p, a, b, b1, b2 are learned: A, P, PA, PBA, PBA1, PBA2, PBA12.
      hidden: width of the LSTM and the layer behind it (20: 5,582 meta-parameters with the form PA).
      activation: of p and a, sigmoid (the paper's for LASSO) or softplus (for logistic regression).
      p_gain: p is this times its activation.
      a_gain: a is this times its activation.
      shift_gain: b1 and b2 are this times twice a sigmoid, as in the original, where b is twice a sigmoid.

    Raises:
      ValueError: on an argument out of range.
    """
    if form not in PARTS:
        raise unknown("l2o_pa", "form", form, PARTS)
    if activation not in ACTIVATIONS:
        raise unknown("l2o_pa", "activation", activation, ACTIVATIONS)
    positive("l2o_pa", hidden=hidden, p_gain=p_gain, a_gain=a_gain, shift_gain=shift_gain)
    parts, squash = PARTS[form], ACTIVATIONS[activation]

    def twice(t: Array) -> Array:
        return 2 * jax.nn.sigmoid(t)

    ranges = {
        "p": lambda t: p_gain * squash(t),
        "a": lambda t: a_gain * squash(t),
        "b": twice,
        "b1": lambda t: shift_gain * twice(t),
        "b2": lambda t: shift_gain * twice(t),
    }

    def init_theta(key: jax.Array) -> Theta:
        lstm_key, trunk_key, heads_key = jax.random.split(key, 3)
        (trunk,), (heads,) = init_mlp(trunk_key, (hidden, hidden)), init_mlp(heads_key, (hidden, len(parts)))
        return Theta(init_lstm(lstm_key, 2, hidden), trunk, heads)

    def init_leaf(r, leaf, p):
        r.check(leaf.shape, f"lopt.rules.l2o_pa: {leaf.path or 'params'}")
        memory = jnp.zeros((2 * LAYERS * hidden, *p.shape), p.dtype)
        return Iterate(p, memory, jnp.zeros_like(p) if "b" in parts else ())

    def network(theta: Theta, x: Array, memory: Any) -> tuple[Array, Any]:
        """[K, …] of each coordinate, and its memory; inputs are not differentiated, as in the original."""
        out, memory = lstm(theta.lstm, jax.lax.stop_gradient(x), memory)
        return dense(theta.heads.w, theta.heads.b, jax.nn.relu(dense(theta.trunk.w, theta.trunk.b, out))), memory

    def said(network: Any, theta: Theta, g: Array, y: Array, memory: Any) -> tuple[dict[str, Any], Any]:
        """What the network says of each coordinate."""
        out, memory = network(theta, jnp.stack([g, y]), memory)
        return OFF | {part: ranges[part](t) for part, t in zip(parts, out, strict=True)}, memory

    def update(network, tensor, common, own):
        (theta, lipschitz, r), _ = common
        if not r.separable:
            if any(tensor.leaf.axes):
                raise ValueError(
                    f"lopt.rules.l2o_pa: prox of {tensor.leaf.path}, got {r.kind} on a sharded tensor; valid: a "
                    "separable penalty (l1, elastic_net, box), or no mesh."
                )
            tensor = tensor._replace(cut=None)

        def direction(g, y, state, _):
            step = jnp.asarray(SAFE / lipschitz, y.dtype)
            use, memory = said(network, theta, g, y, state.memory)
            # One metric for the gradient and the operator, or a fixed point would be no minimum.
            metric = r.pooled(step * use["p"] * jnp.ones_like(y))
            v = y - metric * g
            if "b" in parts:
                v = use["b"] * v + (1 - use["b"]) * (state.x - metric * state.gradient) + use["b1"]
            x = r.apply(v, metric)
            moved = x + use["a"] * (x - state.x) + use["b2"]
            return y - moved, Iterate(x, memory, state.gradient)

        return tensor.move(direction, tensor.state)

    def bind(
        theta: Any,
        *,
        prox: penalties.Penalty | None = None,
        lipschitz: Any = 1.0,
        mapped: bool = False,
        **options: Any,
    ) -> optax.GradientTransformationExtraArgs:
        r = penalties.none() if prox is None else prox
        if not isinstance(r, penalties.Penalty):
            raise ValueError(f"lopt.rules.l2o_pa: prox, got {prox!r}; valid: a penalty of lopt.prox, or None.")
        if not isinstance(lipschitz, jax.Array):
            positive("lopt.rules.l2o_pa", lipschitz=lipschitz)
        step = functools.partial(update, as_one(network) if mapped else network)
        bound = define(
            "l2o_pa",
            settings,
            init_theta,
            # No stacks: ∇f(x) is put into the state of every tensor.
            lambda theta: Arithmetic(functools.partial(init_leaf, theta[2]), step, theta, stacked=False),
        ).bind((theta, lipschitz, r), **options)
        return bound if "b" not in parts else _told_gradients_at_x(bound)

    settings = {
        "form": form,
        "hidden": hidden,
        "activation": activation,
        "p_gain": p_gain,
        "a_gain": a_gain,
        "shift_gain": shift_gain,
    }
    needs = frozenset({"grad_fn"} if "b" in parts else ())
    return LearnedOptimizer("l2o_pa", settings, needs, init_theta, bind)


def solution(state: State) -> Any:
    """x of every tensor, like params: what is sparse, in the box … where y is not quite."""
    return jax.tree.map(lambda leaf: leaf.x, state.leaves, is_leaf=lambda leaf: isinstance(leaf, Iterate))


def solution_of(state: State, params: Any) -> Any:
    """The same in the shapes of params, those of scalars too; params where the rule keeps no x, or does nothing."""
    leaves, treedef = jax.tree.flatten(params)
    held = treedef.flatten_up_to(state.leaves)  # None of a tensor that is frozen or empty
    if not all(leaf is None or isinstance(leaf, Iterate) for leaf in held):
        return params
    x = [p if leaf is None else leaf.x.reshape(jnp.shape(p)) for leaf, p in zip(held, leaves, strict=True)]
    return treedef.unflatten(x)


def _told_gradients_at_x(tx: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
    """The transform with ∇f(x) put into its state before every update."""

    def update(updates, state, params=None, *, grad_fn=None, **extra):
        if grad_fn is None:
            raise ValueError(
                "lopt.rules.l2o_pa: forms with b need ∇f at x; call tx.update(grads, state, params, grad_fn=)."
            )
        gradients, treedef = grad_fn(solution_of(state, params)), jax.tree.structure(params)
        at_x = [
            leaf if leaf is None else leaf._replace(gradient=g.astype(leaf.x.dtype).reshape(leaf.x.shape))
            for leaf, g in zip(treedef.flatten_up_to(state.leaves), treedef.flatten_up_to(gradients), strict=True)
        ]
        return tx.update(updates, state._replace(leaves=treedef.unflatten(at_x)), params, **extra)

    return optax.GradientTransformationExtraArgs(tx.init, update)
