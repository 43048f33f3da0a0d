"""PES on linear inner dynamics: the meta-gradient has a closed form, the antithetic estimate no smoothing bias."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meta_train.estimators import pes as module
from meta_train.estimators.pes import pes
from meta_train.inner import Inner

THETA = jnp.array([0.3, -0.2])
DECAY, TARGET, PAIRS = 0.9, 1.0, 2048


def linear(horizon: int) -> Inner:
    """x ← .9 x + theta . (1, cos t), meta-loss ½ (x - 1)²: quadratic in theta, so its smoothed gradient is exact."""

    def reset(key):
        return {"x": jnp.zeros(()), "t": jnp.zeros((), jnp.int32)}

    def step(theta, particle, key):
        x = DECAY * particle["x"] + theta[0] + theta[1] * jnp.cos(1.0 * particle["t"])
        t = particle["t"] + 1
        return {"x": x, "t": t}, 0.5 * (x - TARGET) ** 2, t >= horizon, ~jnp.isfinite(x)

    return Inner(reset, step, {"x": 0, "t": None}, horizon)


def truth(horizon: int) -> np.ndarray:
    """Gradient of the mean meta-loss over an episode, by its recursion."""
    x, dx, total = 0.0, np.zeros(2), np.zeros(2)
    for t in range(horizon):
        drive = np.array([1.0, np.cos(t)])
        x, dx = DECAY * x + np.asarray(THETA) @ drive, DECAY * dx + drive
        total += (x - TARGET) * dx
    return total / horizon


def deviation(horizon: int, truncation: int) -> float:
    """Largest |mean estimate - truth| in standard errors, over whole cycles of windows and episodes."""
    estimator = pes(linear(horizon), pairs=PAIRS, std=0.1, truncation=truncation)
    windows = np.lcm(horizon, truncation) // truncation
    cycles = max(1, 48 // windows)

    @jax.jit
    def run(key):
        def window(state, k):
            estimate, state = estimator.estimate(jax.random.fold_in(key, k), THETA, state)
            return state, estimate.grad

        return jax.lax.scan(window, estimator.init(key, THETA), jnp.arange(windows * cycles))[1]

    def episodes(seed):  # independent runs: means over cycles
        return np.asarray(run(jax.random.key(seed))).mean(0)

    means = np.array([episodes(seed) for seed in range(1000, 1016)])
    error = means.std(0, ddof=1) / np.sqrt(len(means))
    return float(np.max(np.abs(means.mean(0) - truth(horizon)) / error))


# A reset inside a window, at its end, both in turn, once a window, and no truncation at all.
CASES = [(12, 5), (12, 4), (10, 4), (7, 6), (6, 6)]


@pytest.mark.parametrize(("horizon", "truncation"), CASES)
def test_unbiased_across_resets(horizon, truncation):
    assert deviation(horizon, truncation) < 4


def _fresh_noise_before_reset(before, after, xi, eps, std):
    """The loss at an episode's end weighted by the next episode's noise."""
    return ((before + after)[:, None] * eps).mean(0) / (2 * std**2)


def _ends_ignored(before, after, xi, eps, std):
    return (before[:, None] * (xi + eps)).mean(0) / (2 * std**2)


@pytest.mark.parametrize(
    ("name", "wrong", "horizon", "truncation"),
    [
        ("gradient", _fresh_noise_before_reset, 12, 5),
        ("gradient", _fresh_noise_before_reset, 12, 4),
        ("gradient", _ends_ignored, 12, 5),
        ("next_noise", lambda xi, eps, was_reset, at_end: jnp.where(was_reset[:, None], 0.0, xi + eps), 12, 5),
        ("next_noise", lambda xi, eps, was_reset, at_end: eps, 12, 4),
    ],
    ids=["noise-of-next-episode", "truncated-es", "ends-ignored", "zeroed-too-early", "no-memory"],
)
def test_biased_accumulators_are_caught(monkeypatch, name, wrong, horizon, truncation):
    monkeypatch.setattr(module, name, wrong)
    assert deviation(horizon, truncation) > 6


def test_accumulators_by_hand():
    """What only adds variance (noise of an ended episode kept) is invisible in a mean, so it is checked as numbers."""
    xi, eps = jnp.array([[1.0, 2.0]] * 4), jnp.array([[0.1, 0.2]] * 4)
    was_reset, at_end = jnp.array([False, True, True, False]), jnp.array([False, False, True, True])
    expected = [[1.1, 2.2], [0.1, 0.2], [0.0, 0.0], [0.0, 0.0]]
    np.testing.assert_allclose(module.next_noise(xi, eps, was_reset, at_end), expected, rtol=1e-6)
    grad = module.gradient(jnp.array([2.0, 0.0]), jnp.array([0.0, 4.0]), xi[:2], eps[:2], 0.5)
    np.testing.assert_allclose(grad, [(2 * 1.1 + 4 * 0.1) / 2 / 0.5, (2 * 2.2 + 4 * 0.2) / 2 / 0.5], rtol=1e-6)


def test_constant_loss_gives_exactly_zero():
    inner = linear(12)

    def step(theta, particle, key):
        particle, _, done, diverged = inner.step(theta, particle, key)
        return particle, jnp.ones(()), done, diverged

    estimator = pes(inner._replace(step=step), pairs=8, truncation=5)
    state = estimator.init(jax.random.key(0), THETA)
    for k in range(6):
        estimate, state = estimator.estimate(jax.random.key(k), THETA, state)
        np.testing.assert_array_equal(estimate.grad, 0.0)


def test_divergence_resets_the_pair_and_is_counted():
    inner = linear(100)

    def step(theta, particle, key):
        particle, loss, done, _ = inner.step(theta, particle, key)
        bad = (particle["t"] == 3) & (theta[0] > THETA[0])  # of one sign only
        return particle, jnp.where(bad, 3.0, loss), done, bad

    estimator = pes(inner._replace(step=step), pairs=8, truncation=3)
    state = estimator.init(jax.random.key(0), THETA)
    estimate, state = estimator.estimate(jax.random.key(1), THETA, state)
    assert int(estimate.diverged) == 8
    assert int(estimate.resets) == 8
    np.testing.assert_array_equal(state.xi, 0.0)
    np.testing.assert_array_equal(state.particles["x"], 0.0)
    np.testing.assert_array_equal(state.particles["t"], 0)


@pytest.mark.parametrize(
    ("settings", "message"), [({"pairs": 0}, "pairs"), ({"std": -0.1}, "std"), ({"truncation": 13}, "1 to 12")]
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        pes(linear(12), **{"pairs": 2, "std": 0.1, "truncation": 4, **settings})
