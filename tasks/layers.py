"""What the deeper networks share: normalisation, attention, and one initialiser for all. Not a family itself.

Layers without biases where a bias would have no gradient: before a normalisation, and in attention's keys.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from tasks.supervised import OUTPUT_GAIN

if TYPE_CHECKING:
    from jaxtyping import Array, Float, PRNGKeyArray

EPSILON = 1e-5
ONES = ("scale", "gain")


def initialise(
    key: PRNGKeyArray,
    shapes: Any,
    *,
    scale: Any = 1.0,
    gain: float = 1.0,
    output: str = "output",
    output_gain: float = OUTPUT_GAIN,
    output_fan_in: int | None = None,
    zero: str = "",
) -> Any:
    """Params of given shapes: normal weights of variance gain / fan_in, zero biases, unit normalisation scales.

    Flax's and haiku's own initialisers draw tensor by tensor, which takes many times as long to compile as one draw.

    Args:
      key: consumed.
      shapes: pytree of `jax.ShapeDtypeStruct`; leaves of rank below 2 are biases, or scales if so named.
      scale: () multiplies all weights.
      gain: variance gain; a leaf with "embed" in its name has variance 1, its rows being inputs of their own.
      output: leaves with this in their name have `output_gain` instead.
      output_gain: variance gain of the output layer.
      output_fan_in: of the output layer, if not its own (muP: that of the base width).
      zero: name of leaves that are 0 (muP: attention's queries, see `attention_scale`); others are drawn as without it.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(shapes)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    sizes = [math.prod(leaf.shape) if leaf.ndim > 1 else 0 for _, leaf in leaves]
    draws = jnp.split(jax.random.normal(key, (sum(sizes),)), np.cumsum(sizes)[:-1])

    def one(name: str, shape: tuple[int, ...], draw: Array) -> Array:
        if len(shape) < 2:
            return jnp.full(shape, float(name.split("/")[-1] in ONES), jnp.float32)
        if name.split("/")[-1] == zero:
            return jnp.zeros(shape, jnp.float32)
        variance = 1.0 if "embed" in name else gain / math.prod(shape[:-1])
        if output in name:
            variance = output_gain / (output_fan_in or math.prod(shape[:-1]))
        return draw.reshape(shape) * (scale * math.sqrt(variance))

    return treedef.unflatten(
        [one(name, leaf.shape, draw) for name, (_, leaf), draw in zip(names, leaves, draws, strict=True)]
    )


def shape(*dims: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, jnp.float32)


def broadcast(x: Float[Array, " D"], like: Array) -> Array:
    """A vector along the last axis of `like`."""
    return x.reshape(*[1] * (like.ndim - 1), -1)


def standardise(x: Array, axes: tuple[int, ...]) -> Array:
    """Zero mean and unit variance over the axes."""
    mean = jnp.mean(x, axis=axes, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(jnp.var(x, axis=axes, keepdims=True) + EPSILON)


def layer_norm(params: dict[str, Array], x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Source: Ba et al. (2016), arXiv:1607.06450."""
    return standardise(x, (-1,)) * broadcast(params["scale"], x) + broadcast(params["bias"], x)


def group_norm(params: dict[str, Array], x: Float[Array, "B H W C"], groups: int) -> Float[Array, "B H W C"]:
    """Each image's channels in `groups` groups. Source: Wu & He (2018), arXiv:1803.08494."""
    grouped = standardise(x.reshape(*x.shape[:-1], groups, -1), (1, 2, 4)).reshape(x.shape)
    return grouped * broadcast(params["scale"], x) + broadcast(params["bias"], x)


def product(x: Float[Array, "... I"], w: Float[Array, "I O"]) -> Float[Array, "... O"]:
    """As one product of two matrices, which under vmap over weights is the faster form."""
    return (x.reshape(-1, x.shape[-1]) @ w).reshape(*x.shape[:-1], w.shape[-1])


def transformer_shapes(depth: int, width: int, hidden: int) -> dict[str, Any]:
    """Shapes of `transformer`'s params: block0, block1, … and the last normalisation."""
    norm = {"scale": shape(width), "bias": shape(width)}
    block = {
        "norm1": norm,
        "query": shape(width, width),
        "key": shape(width, width),
        "value": shape(width, width),
        "merge": shape(width, width),
        "norm2": norm,
        "up": {"w": shape(width, hidden), "b": shape(hidden)},
        "down": {"w": shape(hidden, width), "b": shape(width)},
    }
    return {f"block{i}": block for i in range(depth)} | {"norm": norm}


def transformer(
    params: dict[str, Any],
    x: Float[Array, "B L D"],
    *,
    heads: int,
    causal: bool,
    activate: Any,
    logit_scale: float,
) -> Float[Array, "B L D"]:
    """Pre-normalised blocks of attention and MLP. Source: Vaswani et al. (2017), arXiv:1706.03762; Xiong et al. (2020).

    Args:
      logit_scale: multiplies attention's logits: 1/sqrt(d_head), under muP sqrt(base d_head)/d_head.
    """
    for index in itertools.takewhile(lambda i: f"block{i}" in params, itertools.count()):
        block = params[f"block{index}"]
        x = x + attention(block, layer_norm(block["norm1"], x), heads=heads, causal=causal, logit_scale=logit_scale)
        y = product(layer_norm(block["norm2"], x), block["up"]["w"])
        y = activate(y + broadcast(block["up"]["b"], y))
        x = x + product(y, block["down"]["w"]) + broadcast(block["down"]["b"], x)
    return layer_norm(params["norm"], x)


def attention(
    block: dict[str, Any], x: Float[Array, "B L D"], *, heads: int, causal: bool, logit_scale: float
) -> Float[Array, "B L D"]:
    """Multi-head self-attention; `causal`: to itself and what came before."""
    query, key, value = (product(x, block[name]).reshape(*x.shape[:2], heads, -1) for name in ("query", "key", "value"))
    logits = jnp.einsum("bqhd,bkhd->bhqk", logit_scale * query, key)
    if causal:
        length = x.shape[1]
        allowed = jnp.arange(length)[:, None] >= jnp.arange(length)[None, :]
        logits = jnp.where(allowed[None, None], logits, jnp.finfo(logits.dtype).min)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits, axis=-1), value)
    return product(mixed.reshape(x.shape), block["merge"])


def attention_scale(family: str, width: int, heads: int, mup_base: int | None) -> tuple[float, float, dict[str, Any]]:
    """`logit_scale` of `transformer`, what multiplies the output layer's product, and keywords of `initialise`.

    Under muP queries begin at 0, as the source's appendix D.2 advises: what queries and keys have in common by chance
    at a random init makes the second block's logits change less the wider they are.

    Args:
      mup_base: width of the base network of the maximal-update parametrisation, with as many heads; None: standard.

    Raises ValueError for a width that heads do not divide.

    Source: Yang et al. (2022), arXiv:2203.03466, definition 4.1 (1/d attention).
    """
    for name, value in (("width", width), ("mup_base", mup_base)):
        if value is not None and (value < heads or value % heads):
            raise ValueError(f"{family}: {name}, got {value} with heads={heads}; valid: multiples of heads.")
    if mup_base is None:
        return math.sqrt(heads / width), 1.0, {}
    return math.sqrt(mup_base * heads) / width, mup_base / width, {"output_fan_in": mup_base, "zero": "query"}
