"""Keys of meta-training draw what JAX's own draw."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meta_train import draws

SEEDS = (0, 7, -1, 2**31 - 1)


def drawn(key: jax.Array) -> list[jax.Array]:
    """Something of everything that a task or an estimator does with a key."""
    keys = jax.random.split(key, (3, 2))
    one = jax.random.fold_in(keys[1, 0], 12345)
    return [
        jax.random.key_data(keys),
        jax.random.key_data(one),
        jax.random.normal(one, (5, 7)),
        jax.random.randint(one, (64,), 0, 1000),
        jax.random.uniform(one),
        jax.random.bits(one, (9,), jnp.uint8),
        jax.random.bits(one, (9,), jnp.uint16),
        jax.random.permutation(one, 11),
    ]


@pytest.mark.parametrize("seed", SEEDS)
def test_the_same_as_plain_keys(seed):
    for plain, ours in zip(drawn(jax.random.key(seed)), drawn(draws.key(seed)), strict=True):
        np.testing.assert_array_equal(plain, ours)


def test_the_same_under_vmap_and_jit():
    step = jax.jit(jax.vmap(lambda key: jax.random.randint(jax.random.split(key)[1], (64,), 0, 1000)))
    plain, ours = (step(jax.random.split(key, 4)) for key in (jax.random.key(3), draws.key(3)))
    np.testing.assert_array_equal(plain, ours)


def test_another_rotation_is_noticed(monkeypatch):
    monkeypatch.setattr(draws, "ROTATIONS", ((13, 15, 26, 6), (17, 29, 16, 23)))
    data = jnp.array([1, 2], jnp.uint32)
    right = jax.random.bits(jax.random.wrap_key_data(data), (4,))
    assert not np.array_equal(draws._bits(data, 32, (4,)), right)


def test_the_hash_is_no_loop():
    step = jax.jit(lambda key: jax.random.normal(jax.random.fold_in(key, 1), (8,)))
    assert "while" in step.lower(jax.random.key(0)).compile().as_text()  # what it is for
    assert "while" not in step.lower(draws.key(0)).compile().as_text()


def test_draws_that_are_too_large_are_refused():
    for shape in ((2**17, 2**16), (2, 2**17, 2**16)):
        with pytest.raises(ValueError, match=r"at most 2\*\*32"):
            jax.eval_shape(lambda shape=shape: draws._counters(shape))
