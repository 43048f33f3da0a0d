"""Arithmetic in float32 on what is stored in fewer bits.

A moving average whose decay is .999 moves by less than half a unit in the last place of bfloat16, and rounded to the
nearest would stand still. It is rounded up or down at random instead, up as often as it is nearer: unbiased.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

ACCUMULATORS = ("float32", "bfloat16")


def wide(x: Any) -> jax.Array:
    """At least float32; counters stay what they are."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32)) if jnp.issubdtype(x.dtype, jnp.floating) else x


def narrow(new: Any, old: Any, noise: tuple[jax.Array, jax.Array, jax.Array]) -> Any:
    """`new` where `old` is bfloat16 rounded stochastically, still in float32.

    Args:
      new: pytree of float32 arrays.
      old: the same in the precision that `new` will be stored in.
      noise: what is hashed to random bits: two float32 arrays like those, and a () int32. No generator has to be kept,
        and neither blocks nor devices change the result.
    """
    several = lambda x: type(x) is tuple  # a block's momenta, see `blocks.Cut`  # noqa: E731
    stored, treedef = jax.tree.flatten(old, is_leaf=several)
    if jnp.bfloat16 not in [x.dtype for x in jax.tree.leaves(old)]:
        return new
    bits = _hash(*noise)

    def one(i: int, x: Any, kept: Any) -> Any:
        if isinstance(kept, tuple):
            return tuple(one(i + j, *pair) for j, pair in enumerate(zip(x, kept, strict=True)))
        if kept.dtype != jnp.bfloat16:
            return x
        salts = np.arange(i, i + (len(x) if x.ndim > bits.ndim else 1), dtype=np.uint32) * np.uint32(0x9E3779B9)
        own = _mix(bits[None] ^ salts.reshape(-1, *[1] * bits.ndim))
        return _stochastic(x, own.reshape(x.shape))

    each = zip(treedef.flatten_up_to(new), stored, strict=True)
    return treedef.unflatten([one(100 * i, x, kept) for i, (x, kept) in enumerate(each, 1)])


def _stochastic(x: jax.Array, bits: jax.Array) -> jax.Array:
    """float32 x rounded to a bfloat16 value, with random uint32 bits; its derivative is that of x."""
    whole = jax.lax.bitcast_convert_type(jax.lax.stop_gradient(x), jnp.uint32)
    rounded = jax.lax.bitcast_convert_type((whole + (bits >> 16)) & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), x + jax.lax.stop_gradient(rounded - x), x)


def _hash(a: jax.Array, b: jax.Array, count: jax.Array) -> jax.Array:
    """uint32 of two float32 arrays and a () int32."""
    a, b = (jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32) for x in jax.lax.stop_gradient((a, b)))
    return _mix(_mix(_mix(a) ^ b) ^ (count.astype(jnp.uint32) * jnp.uint32(0x85EBCA6B)))


def _mix(x: jax.Array) -> jax.Array:
    """A bijection of uint32 in which every bit depends on every other (the finaliser of MurmurHash3, Appleby 2011)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
