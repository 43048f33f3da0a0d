"""The networks of NiNo: a graph network over neurons (GNN) and one that sees each weight alone (WNN).

Source: Knyazev, Moudgil, Lajoie, Belilovsky, Lacoste-Julien (2025), Accelerating Training with Neuron Interaction and
Nowcasting Networks, arXiv:2409.04434, section 4; the arithmetic is that of the released weights.

Differs from the paper: the third layer of the released weights is left out, since no edge depends on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int

# Rows of the table of edge types. Of these the released weights know the first twelve and the last.
FC, BIAS, CONV, NORM, WORD, POSITION, QUERY, KEY, VALUE, RESIDUAL, HEAD, SELF = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13)
TYPES = 15
CONSTANT = {RESIDUAL: 1.0, HEAD: 1.0, SELF: 2.0}  # feature 0 of edges that hold no weight, in all states
EPS = 1e-6

DEFAULTS: dict[str, dict[str, Any]] = {
    "gnn": dict(hidden=128, layers=2, taps=9, horizons=40, context=5, positions=8, words=0),
    "wnn": dict(hidden=128, horizons=40, context=5),
}


class Network(NamedTuple):
    """A nowcasting network with its weights.

    name: "gnn" or "wnn".
    settings: hidden (width), horizons (heads, one a capture interval), context (states it sees); of a gnn also layers,
      taps (kernel elements an edge carries), positions (size of Laplacian encodings) and words (size of the table of
      tokens, 0: none).
    theta: the weights, a pytree of float32 arrays.
    lr: learning rate of the base optimizer it was meta-trained with; None: not known.
    """

    name: str
    settings: Mapping[str, Any]
    theta: Any
    lr: float | None = None


def make(name: str, key: jax.Array, *, lr: float | None = None, **settings: Any) -> Network:
    """A network with weights N(0, .02) and zero biases; the key is consumed.

    Raises:
      ValueError: on an unknown name or setting.
    """
    from lopt.base import positive, unknown

    if name not in DEFAULTS:
        raise unknown("lopt.nowcast.make", "network", name, DEFAULTS)
    for setting, value in settings.items():
        if setting not in DEFAULTS[name]:
            raise unknown(f"lopt.nowcast.make({name!r})", "setting", setting, DEFAULTS[name])
        least = 0 if setting in ("words", "positions") else 1
        if type(value) is not int or value < least:
            raise ValueError(f"lopt.nowcast.make: {setting}, got {value!r}; valid: an integer >= {least}.")
    positive("lopt.nowcast.make", lr=lr)
    full = DEFAULTS[name] | settings
    return Network(name, full, init_theta(name, full, key), lr)


def init_theta(name: str, settings: Mapping[str, Any], key: jax.Array) -> Any:
    """Weights of a network; the key is consumed."""
    h, c, n = settings["hidden"], settings["context"], settings["horizons"]
    keys = iter(jax.random.split(key, 64 + 8 * settings.get("layers", 0)))

    def normal(*shape: int) -> jax.Array:
        return 0.02 * jax.random.normal(next(keys), shape)

    def linear(inputs: int, outputs: int) -> dict[str, jax.Array]:
        return {"w": normal(inputs, outputs), "b": jnp.zeros(outputs)}

    if name == "wnn":
        mlp = [linear(h, h), linear(h, h), linear(h, h), linear(h, n)]
        return {"types": normal(TYPES, h), "edge": linear(c, h), "mlp": mlp}
    theta = {
        "types": normal(TYPES, h),
        "edge": linear(settings["taps"] * c, h),
        "node": linear(settings["positions"], h),
        "layers": [
            {
                "gates": linear(h, 2 * h),
                "pair": linear(2 * h, h),
                "post": linear(2 * h, h),
                "node": linear(h, h),
                "edge": linear(h, h),
                "source": linear(h, h),
                "target": linear(h, h),
                "out": linear(h, h),
            }
            for _ in range(settings["layers"])
        ],
        "head": [linear(h, h), linear(h, settings["taps"] * n)],
    }
    return theta | ({"words": normal(settings["words"], h)} if settings["words"] else {})


def linear(layer: Any, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
    # In full: the products of a TPU are bfloat16 otherwise, and a nowcast is one step in a thousand.
    y = jnp.matmul(x, layer["w"], precision=jax.lax.Precision.HIGHEST)
    return y + _row(layer["b"], y)


def _row(b: jax.Array, like: jax.Array) -> jax.Array:
    return b.reshape((1,) * (like.ndim - 1) + b.shape)


def nodes(theta: Any, count: int, positions: Any = None, words: Any = None) -> Float[Array, "V H"]:
    """The neurons' first vectors: of Laplacian encodings [V, 8] or zeros, and of words [V] where there is a table."""
    inputs = theta["node"]["w"].shape[0]
    x = linear(theta["node"], jnp.zeros((count, inputs)) if positions is None else jnp.asarray(positions))
    return x + theta["words"][words] if "words" in theta and words is not None else x


def encode(theta: Any, features: Float[Array, "... D"], types: Any) -> Float[Array, "... H"]:
    """The edges' first vectors of their first D ≤ taps·context features, column = tap · context + state."""
    layer = {"w": theta["edge"]["w"][: features.shape[-1]], "b": theta["edge"]["b"]}
    e = linear(layer, features)
    kind = theta["types"][types]
    return e + (_row(kind, e) if kind.ndim == 1 else kind)


class Ends(NamedTuple):
    """What a layer's edges are told of their ends, by neuron; the pair's linear maps are applied before they meet."""

    source: Float[Array, "V H"]
    target: Float[Array, "V H"]


def before(layer: Any, x: Float[Array, "V H"]) -> Ends:
    """For `message`: Linear([x_target, x_source]) in two parts."""
    w, h = layer["pair"]["w"], x.shape[-1]
    return Ends(
        linear({"w": w[h:], "b": jnp.zeros_like(layer["pair"]["b"])}, x), linear(layer["pair"] | {"w": w[:h]}, x)
    )


def message(layer: Any, e: jax.Array, source: jax.Array, target: jax.Array) -> jax.Array:
    """a ⊙ Linear([x_target, x_source]) + b with [a, b] = Linear(e)."""
    a, b = jnp.split(linear(layer["gates"], e), 2, axis=-1)
    return a * (target + source) + b


def move_nodes(layer: Any, x: Float[Array, "V H"], mean: Float[Array, "V H"]) -> Float[Array, "V H"]:
    return jax.nn.silu(linear(layer["node"], linear(layer["post"], jnp.concatenate([x, mean], -1))))


def after(layer: Any, x: Float[Array, "V H"]) -> Ends:
    """For `move_edges`, of the moved neurons."""
    return Ends(linear(layer["source"], x), linear(layer["target"], x))


def move_edges(layer: Any, e: jax.Array, source: jax.Array, target: jax.Array) -> jax.Array:
    return linear(layer["out"], jax.nn.silu(linear(layer["edge"], e) + source + target))


def head(theta: Any, e: jax.Array, horizons: int, at: Int[Array, "K"] | None, taps: int) -> jax.Array:
    """[..., taps, K] scaled changes at horizons `at` (1-based; None: all), of the first `taps` kernel elements."""
    last = theta["head"][1]
    w = last["w"].reshape(e.shape[-1], -1, horizons)[:, :taps]
    b = last["b"].reshape(-1, horizons)[:taps]
    if at is not None:
        w, b = jnp.take(w, at - 1, axis=2), jnp.take(b, at - 1, axis=1)
    y = linear({"w": w.reshape(e.shape[-1], -1), "b": b.reshape(-1)}, jax.nn.silu(linear(theta["head"][0], e)))
    return y.reshape(*e.shape[:-1], taps, -1)


def apply_gnn(
    network: Network,
    theta: Any,
    features: Float[Array, "E D"],
    types: Int[Array, "E"],
    edges: Int[Array, "2 E"],
    count: int,
    *,
    positions: Any = None,
    words: Any = None,
) -> Float[Array, "E taps horizons"]:
    """Changes at all horizons of all edges at once: for meta-training, differentiable in theta.

    Args:
      network: its name and settings (its own theta is not used).
      theta: weights.
      features: scaled states, column = tap · context + state.
      types: of edges.
      edges: source and target neurons.
      count: neurons, all of which have a self-loop among the edges.
      positions: [V, 8] Laplacian encodings, None: zeros.
      words: [V] 0, or 1 + token.
    """
    parts = [(features, types)]
    (out,) = apply_parts(network, theta, parts, edges, count, positions=positions, words=words, full=True)
    return out


def apply_parts(
    network: Network,
    theta: Any,
    parts: Sequence[tuple[Any, Any]],
    edges: Int[Array, "2 E"],
    count: int,
    *,
    positions: Any = None,
    words: Any = None,
    full: bool = False,
) -> list[jax.Array]:
    """The same of edges in parts, one after the other, of different numbers of taps: [E_i, ..., taps_i, horizons] each.

    Args:
      network, theta, edges, count, positions, words: see `apply_gnn`.
      parts: features [E_i, ..., D_i] and types [E_i] of each; axes between are of windows, which share the edges. They
        come last in memory, so that a sum over edges moves them together.
      full: all taps of the network for each part, whatever its features.
    """
    source, target = edges
    between = (1,) * (parts[0][0].ndim - 2)
    degree = jnp.maximum(jax.ops.segment_sum(jnp.ones(len(target)), target, count), 1).reshape(-1, *between, 1)
    x = nodes(theta, count, positions, words)
    x = x.reshape(count, *between, x.shape[-1])
    e = jnp.concatenate([encode(theta, f, jnp.asarray(kinds).reshape(-1, *between)) for f, kinds in parts])
    for layer in theta["layers"]:
        ends = before(layer, x)
        m = message(layer, e, ends.source[source], ends.target[target])
        x = jnp.broadcast_to(x, (count, *e.shape[1:]))
        x = move_nodes(layer, x, jax.ops.segment_sum(m, target, count) / degree)
        ends = after(layer, x)
        e = move_edges(layer, e, ends.source[source], ends.target[target])
    out, start = [], 0
    for features, _ in parts:
        stop = start + len(features)
        taps = network.settings["taps"] if full else features.shape[-1] // network.settings["context"]
        out.append(head(theta, e[start:stop], network.settings["horizons"], None, taps))
        start = stop
    return out


def apply_wnn(theta: Any, states: Float[Array, "... T"], types: Any, at: Int[Array, "K"] | None = None) -> jax.Array:
    """[..., K] scaled changes at horizons `at` (1-based; None: all) of weights with these scaled states."""
    e = encode(theta, states, types)
    for layer in theta["mlp"][:-1]:
        e = jax.nn.silu(linear(layer, e))
    last = theta["mlp"][-1]
    if at is not None:
        last = {"w": jnp.take(last["w"], at - 1, axis=1), "b": jnp.take(last["b"], at - 1, axis=0)}
    return linear(last, e)


def masked_l1(out: Float[Array, "..."], target: Float[Array, "..."], mask: Bool[Array, "..."]) -> jax.Array:
    """() mean of |out - target| where the mask is true, of nothing 0. Masked targets may be anything, even NaN."""
    error = jnp.where(mask, jnp.abs(out - jnp.where(mask, target, 0.0)), 0.0)
    return jnp.sum(error) / jnp.maximum(jnp.sum(mask), 1)


def statistics(history: Float[Array, "T ..."]) -> tuple[jax.Array, jax.Array]:
    """Mean and unbiased standard deviation of a tensor over all its elements and states."""
    x = history.astype(jnp.float32)
    mean = jnp.mean(x)
    return mean, jnp.sqrt(jnp.sum((x - mean) ** 2) / max(x.size - 1, 1))


def scale(x: jax.Array, mean: jax.Array, std: jax.Array) -> jax.Array:
    return (x.astype(jnp.float32) - mean) / (std + EPS)


def moved(last: Float[Array, "..."], change: Float[Array, "K ..."], mean: jax.Array, std: jax.Array) -> jax.Array:
    """[K, ...] the differences scaled changes make, as the reference undoes its scaling: with std, not std + EPS."""
    return change * std - ((last.astype(jnp.float32) - mean) * (EPS / (std + EPS)))[None]
