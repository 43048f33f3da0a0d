"""Accumulators in bfloat16: rounded without bias, half as large, and no others than in float32 over many steps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_rules_contract import LOSS, bound, jit, tree

from lopt import blocks, precision

SHAPES = {"b": (8,), "w": (24, 16)}


def rounded(x, n, monkeypatch=None):
    """[n, …] of x, each time with other noise."""
    noise = jnp.asarray(np.random.default_rng(0).normal(size=(2, *x.shape)), jnp.float32)
    old = jnp.zeros_like(x, jnp.bfloat16)
    return jax.vmap(lambda t: precision.narrow(x, old, (*noise, t)))(jnp.arange(n))


def test_rounding_has_no_bias():
    x = jnp.asarray(np.random.default_rng(1).lognormal(0, 4, 512), jnp.float32) * jnp.where(jnp.arange(512) % 2, 1, -1)
    n = 4096
    several = rounded(x, n)
    assert (several == several.astype(jnp.bfloat16)).all()
    ulp = jnp.abs(x.astype(jnp.bfloat16).astype(jnp.float32)) * 2.0**-7
    assert (jnp.abs(several - x[None]) <= ulp[None]).all()
    # A rounding's variance is at most a quarter of the unit in the last place squared.
    assert jnp.abs((jnp.mean(several, axis=0) - x) / ulp * np.sqrt(n) * 2).max() < 5
    nearest = x.astype(jnp.bfloat16).astype(jnp.float32)
    assert jnp.abs((nearest - x) / ulp * np.sqrt(n) * 2).max() > 5


def test_roundings_of_neighbours_and_of_steps_are_independent():
    x = jnp.full(4096, 1 + 2.0**-9)  # a quarter of the way up
    up = np.asarray(rounded(x, 64) > 1.001, np.float64)
    assert up.mean() == pytest.approx(0.25, abs=0.005)
    for a, b in ((up[:-1], up[1:]), (up[:, :-1], up[:, 1:])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.01


def test_what_is_not_finite_stays_what_it_is():
    x = jnp.asarray([np.inf, -np.inf, np.nan, 0.0, np.finfo(np.float32).max])
    out = rounded(x, 8)
    np.testing.assert_array_equal(out[:, :4], np.broadcast_to(np.asarray(x[:4]), (8, 4)))


def test_a_slow_average_arrives():
    """Rounded to the nearest it stands still where a step is less than half a unit in the last place."""
    target, steps = 1.0, 8000
    noise = jnp.asarray(np.random.default_rng(0).normal(size=(2, 256)), jnp.float32)

    def run(round_):
        def step(m, t):
            return round_(0.999 * m + 0.001 * target, t), None

        return jax.lax.scan(step, jnp.zeros(256), jnp.arange(steps))[0]

    old = jnp.zeros(256, jnp.bfloat16)
    stochastic = run(lambda m, t: precision.narrow(m, old, (*noise, t)))
    nearest = run(lambda m, t: m.astype(jnp.bfloat16).astype(jnp.float32))
    assert jnp.mean(stochastic) == pytest.approx(1.0, abs=0.01)
    assert jnp.mean(nearest) < 0.9


@pytest.mark.parametrize("name", ["celo2", "mlp", "nn_adam", "small_fc"])
def test_state_is_half_as_large_and_updates_are_close(name):
    params, grads = tree(0, SHAPES), [tree(i, SHAPES) for i in range(1, 9)]

    def run(**bind):
        tx = bound(name, **bind)
        update, state = jit(lambda *args: tx.update(*args, **LOSS)), tx.init(params)
        for g in grads:
            updates, state = update(g, state, params)
        return updates, state

    expected, _ = run()
    ours, small = run(accumulators="bfloat16")
    large = [x for x in jax.tree.leaves(small.leaves["w"]) if x.shape[-2:] == SHAPES["w"]]
    assert large
    assert {x.dtype for x in large} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves(small.leaves["b"])} == {jnp.dtype(jnp.float32)}
    scale = float(jnp.sqrt(jnp.mean(expected["w"] ** 2)))
    np.testing.assert_allclose(ours["w"], expected["w"], atol=0.3 * scale)
    assert not np.array_equal(ours["w"], expected["w"])


def test_blocks_round_as_the_whole_does(monkeypatch):
    params, grads = tree(0, SHAPES), tree(1, SHAPES)

    def run():
        tx = bound("small_fc", accumulators="bfloat16")
        return jit(lambda g, p: tx.update(g, tx.init(p), p))(grads, params)[1].leaves["w"]

    expected = run()
    monkeypatch.setattr(blocks, "BLOCK", 64)
    blocks.cut.cache_clear()
    ours = run()
    blocks.cut.cache_clear()
    for x, y in ((ours.m, expected.m), (ours.v, expected.v)):
        assert x.dtype == jnp.bfloat16
        # Sums in another order may fall on the other side of a random bit.
        assert np.mean(np.asarray(x) != np.asarray(y)) < 0.01


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="unknown accumulators 'int8'"):
        bound("small_fc", accumulators="int8")
