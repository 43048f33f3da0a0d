"""Keys of JAX's own Threefry-2x32, bit for bit, whose hash is one kernel on a CPU.

JAX lowers the hash to a loop of five turns on CPUs, for the sake of compile time. Each turn is two dozen kernels on a
few numbers, and an inner step draws several times: together they took a third of it. Here the twenty rounds are written
out, and XLA fuses them.

Source: Salmon et al. (2011), "Parallel random numbers: as easy as 1, 2, 3".
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.extend.random import define_prng_impl

if TYPE_CHECKING:
    from jaxtyping import Array, UInt32

ROTATIONS = (13, 15, 26, 6), (17, 29, 16, 24)
PARITY = 0x1BD11BDA


def threefry(key: UInt32[Array, " 2"], high: UInt32[Array, "*S"], low: UInt32[Array, "*S"]) -> tuple[Array, Array]:
    """The hash of the counters (high, low), two words each."""
    first, second = key[0], key[1]
    words = first, second, first ^ second ^ jnp.uint32(PARITY)
    high, low = high + words[0], low + words[1]
    for turn in range(5):
        for bits in ROTATIONS[turn % 2]:
            high = high + low
            low = high ^ (low << jnp.uint32(bits) | low >> jnp.uint32(32 - bits))
        high = high + words[(turn + 1) % 3]
        low = low + words[(turn + 2) % 3] + jnp.uint32(turn + 1)
    return high, low


def _counters(shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Numbers of the elements: high and low words."""
    if math.prod(shape) > 2**32:
        raise ValueError(f"meta_train.draws: got an array of shape {shape}; valid: at most 2**32 numbers in a draw.")
    size, low = 1, jnp.zeros(shape, jnp.uint32)
    for axis in reversed(range(len(shape))):
        low = low + jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(size)
        size = size * shape[axis] % 2**32
    return jnp.zeros(shape, jnp.uint32), low


def _seed(seed: Array) -> UInt32[Array, " 2"]:
    return jax.random.key_data(jax.random.key(seed, impl="threefry2x32"))


def _split(key: UInt32[Array, " 2"], shape: tuple[int, ...]) -> UInt32[Array, "*S 2"]:
    return jnp.stack(threefry(key, *_counters(tuple(shape))), axis=-1)


def _fold_in(key: UInt32[Array, " 2"], number: Any) -> UInt32[Array, " 2"]:
    return jnp.stack(threefry(key, jnp.uint32(0), jnp.asarray(number).astype(jnp.uint32)))


def _bits(key: UInt32[Array, " 2"], width: int, shape: tuple[int, ...]) -> Array:
    if width == 64:
        plain = jax.random.wrap_key_data(key, impl="threefry2x32")
        return jax.random.bits(plain, shape, jnp.uint64)
    high, low = threefry(key, *_counters(tuple(shape)))
    return (high ^ low).astype({8: jnp.uint8, 16: jnp.uint16, 32: jnp.uint32}[width])


@functools.cache
def _impl() -> Any:
    return define_prng_impl(
        key_shape=(2,),
        seed=_seed,
        split=_split,
        random_bits=_bits,
        fold_in=_fold_in,
        name="threefry2x32_unrolled",
        tag="tfu",
    )


def key(seed: Any) -> jax.Array:
    """Like `jax.random.key(seed)`: what is drawn with it is the same, sooner on a CPU."""
    if jax.default_backend() != "cpu":
        return jax.random.key(seed)
    return jax.random.wrap_key_data(_seed(seed), impl=_impl())
