"""Every estimator on linear inner dynamics: the meta-gradient has a closed form, antithetic ES no smoothing bias."""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from meta_train.estimators import REGISTRY, WHOLE_EPISODES, nres, pes, unroll
from meta_train.inner import Inner

ROOT = Path(__file__).parents[1]
THETA = jnp.array([0.3, -0.2])
DECAY, TARGET, STD = 0.9, 1.0, 0.1
ES = ("full_es", "nres", "pes", "truncated_es")


def linear(horizon: int) -> Inner:
    """x ← .9 x + theta . (1, cos t), meta-loss ½ (x - 1)²: quadratic in theta, so its smoothed gradient is exact."""

    def reset(key):
        return {"x": jnp.zeros(()), "t": jnp.zeros((), jnp.int32)}

    def step(theta, particle, key):
        x = DECAY * particle["x"] + theta[0] + theta[1] * jnp.cos(1.0 * particle["t"])
        t = particle["t"] + 1
        return {"x": x, "t": t}, 0.5 * (x - TARGET) ** 2, t >= horizon, ~jnp.isfinite(x)

    return Inner(reset, step, {"x": 0, "t": None}, horizon, horizon)


def varied() -> Inner:
    """`linear` with horizons drawn from 6 to 12 at each reset."""
    plain = linear(12)

    def reset(key):
        return plain.reset(key) | {"T": jax.random.randint(key, (), 6, 13)}

    def step(theta, particle, key):
        moved, loss, _, diverged = plain.step(theta, particle, key)
        return moved | {"T": particle["T"]}, loss, moved["t"] >= particle["T"], diverged

    return Inner(reset, step, plain.theta_axes | {"T": None}, 6, 12)


def rescored(inner: Inner, score) -> Inner:
    """With `score(loss, particle)` for a meta-loss, the particle being that before the step."""

    def step(theta, particle, key):
        moved, loss, done, diverged = inner.step(theta, particle, key)
        return moved, score(loss, particle), done, diverged

    return inner._replace(step=step)


def closed_form(horizon: int, truncation: int | None = None) -> np.ndarray:
    """Gradient of the mean meta-loss of a step; with a truncation, without what came before each step's window."""
    truncation = truncation or horizon
    steps = int(np.lcm(horizon, truncation))
    blind = truncation < horizon or steps > horizon
    x, dx, total = 0.0, np.zeros(2), np.zeros(2)
    for k in range(steps):
        t = k % horizon
        if t == 0:
            x, dx = 0.0, np.zeros(2)
        if blind and k % truncation == 0:
            dx = np.zeros(2)
        drive = np.array([1.0, np.cos(t)])
        x, dx = DECAY * x + np.asarray(THETA) @ drive, DECAY * dx + drive
        total += (x - TARGET) * dx
    return total / steps


def make(name: str, inner: Inner, truncation: int, particles: int = 512, **settings):
    factory = getattr(importlib.import_module(REGISTRY[name]), name)
    settings |= {"pairs": particles, "std": STD, **settings} if name in ES else {"particles": particles}
    settings |= {} if name in WHOLE_EPISODES else {"truncation": truncation}
    return factory(inner, **settings)


def means(estimator, windows: int, theta=THETA, runs: int = 16) -> np.ndarray:
    """[runs, P] mean gradients of independent runs over whole cycles of windows and episodes."""
    cycles = max(1, 48 // windows)

    @jax.jit
    def run(key):
        def window(state, k):
            estimate, state = estimator.estimate(jax.random.fold_in(key, k), theta, state)
            return state, jax.flatten_util.ravel_pytree(estimate.grad)[0]

        return jax.lax.scan(window, estimator.init(key, theta), jnp.arange(windows * cycles))[1]

    return np.stack([np.asarray(run(jax.random.key(seed))).mean(0) for seed in range(1000, 1000 + runs)])


def deviation(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest |mean - expected| in standard errors."""
    error = found.std(0, ddof=1) / np.sqrt(len(found))
    return float(np.max(np.abs(found.mean(0) - expected) / error))


def linear_means(name: str, horizon: int, truncation: int) -> np.ndarray:
    windows = 1 if name in WHOLE_EPISODES else int(np.lcm(horizon, truncation)) // truncation
    return means(make(name, linear(horizon), truncation), windows)


# A reset inside a window, at its end, both in turn, once a window, and no truncation at all.
CASES = [(12, 5), (12, 4), (10, 4), (7, 6), (6, 6)]


@pytest.mark.parametrize(("horizon", "truncation"), CASES)
@pytest.mark.parametrize("name", ["pes", "nres"])
def test_unbiased_across_resets(name, horizon, truncation):
    assert deviation(linear_means(name, horizon, truncation), closed_form(horizon)) < 4


def test_full_es_is_unbiased():
    assert deviation(linear_means("full_es", 12, 5), closed_form(12)) < 4


@pytest.mark.parametrize(("horizon", "truncation"), [(12, 5), (12, 4)])
def test_truncated_es_has_its_known_bias(horizon, truncation):
    found, expected = linear_means("truncated_es", horizon, truncation), closed_form(horizon, truncation)
    assert deviation(found, expected) < 4
    assert deviation(found, closed_form(horizon)) > 20
    assert np.linalg.norm(expected - closed_form(horizon)) > 0.3 * np.linalg.norm(closed_form(horizon))


@pytest.mark.parametrize(("horizon", "truncation"), [(12, 5), (12, 4), (6, 6)])
def test_truncated_backprop_has_its_known_bias(horizon, truncation):
    found, expected = linear_means("truncated_backprop", horizon, truncation), closed_form(horizon, truncation)
    np.testing.assert_allclose(found, np.broadcast_to(expected, found.shape), rtol=1e-4)
    missing = np.linalg.norm(expected - closed_form(horizon)) / np.linalg.norm(closed_form(horizon))
    assert missing > 0.3 if truncation < horizon else missing == 0


def test_full_backprop_is_exact():
    found = linear_means("full_backprop", 12, 5)
    np.testing.assert_allclose(found, np.broadcast_to(closed_form(12), found.shape), rtol=1e-4)


def _fresh_noise_before_reset(before, after, xi, eps, std):
    """The loss at an episode's end weighted by the next episode's noise."""
    return ((before + after)[:, None] * eps).mean(0) / (2 * std**2)


def _ends_ignored(before, after, xi, eps, std):
    return (before[:, None] * (xi + eps)).mean(0) / (2 * std**2)


WRONG = {
    "pes: noise of the next episode": ("pes", pes, "gradient", _fresh_noise_before_reset, 12, 5),
    "pes: truncated": ("pes", pes, "gradient", _fresh_noise_before_reset, 12, 4),
    "pes: ends ignored": ("pes", pes, "gradient", _ends_ignored, 12, 5),
    "pes: zeroed too early": (
        *("pes", pes, "next_noise"),
        lambda xi, eps, was_reset, at_end: jnp.where(was_reset[:, None], 0.0, xi + eps),
        *(12, 5),
    ),
    "pes: no memory": ("pes", pes, "next_noise", lambda xi, eps, was_reset, at_end: eps, 12, 4),
    "nres: noise of the old episode": (
        *("nres", nres, "gradient"),
        lambda before, after, eps, renewed, std: ((before + after)[:, None] * eps).mean(0) / (2 * std**2),
        *(12, 5),
    ),
    "nres: noise not renewed": ("nres", nres, "next_noise", lambda eps, renewed, was_reset: eps, 12, 5),
    "nres: renewed each window": ("nres", nres, "next_noise", lambda eps, renewed, was_reset: renewed, 12, 4),
    "full_es: one-sided": (
        *("full_es", unroll, "gradient"),
        lambda delta, eps, std: (delta[:, None] * eps).mean(0) / std**2,
        *(12, 5),
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_biased_accumulators_are_caught(monkeypatch, wrong):
    name, module, function, replacement, horizon, truncation = WRONG[wrong]
    monkeypatch.setattr(module, function, replacement)
    assert deviation(linear_means(name, horizon, truncation), closed_form(horizon)) > 6


def test_truncated_es_goes_on_under_theta_itself():
    """Not under either of the perturbed ones, which a mean over both signs does not tell."""
    inner = linear(12)
    estimator = make("truncated_es", inner, 4, particles=3)
    state = estimator.init(jax.random.key(0), THETA)
    particle = inner.reset(jax.random.key(0))
    for window in range(2):
        _, state = jax.jit(estimator.estimate)(jax.random.key(window), THETA, state)
        for _ in range(4):
            particle, *_ = inner.step(THETA, particle, jax.random.key(0))
        np.testing.assert_allclose(state.particles["x"], jnp.full(3, particle["x"]), rtol=1e-5)


def test_accumulators_by_hand():
    """What only adds variance (noise of an ended episode kept) is invisible in a mean, so it is checked as numbers."""
    xi, eps = jnp.array([[1.0, 2.0]] * 4), jnp.array([[0.1, 0.2]] * 4)
    was_reset, at_end = jnp.array([False, True, True, False]), jnp.array([False, False, True, True])
    expected = [[1.1, 2.2], [0.1, 0.2], [0.0, 0.0], [0.0, 0.0]]
    np.testing.assert_allclose(pes.next_noise(xi, eps, was_reset, at_end), expected, rtol=1e-6)
    np.testing.assert_array_equal(nres.next_noise(xi, eps, was_reset), [[1, 2], eps[1], eps[2], [1, 2]])
    before, after = jnp.array([2.0, 0.0]), jnp.array([0.0, 4.0])
    grad = pes.gradient(before, after, xi[:2], eps[:2], 0.5)
    np.testing.assert_allclose(grad, [(2 * 1.1 + 4 * 0.1) / 2 / 0.5, (2 * 2.2 + 4 * 0.2) / 2 / 0.5], rtol=1e-6)
    grad = nres.gradient(before, after, xi[:2], eps[:2], jnp.array([0.5, 1.0]))
    np.testing.assert_allclose(grad, [(2 * 1.0 + 4 * 0.1) / 2 / 0.5, (2 * 2.0 + 4 * 0.2) / 2 / 2], rtol=1e-6)


def test_one_window_an_episode_makes_them_the_same():
    """With K = T and the same draws truncated_es and PES are full ES, and truncated backprop is full backprop."""
    for names in (ES[:1] + ES[2:], ("full_backprop", "truncated_backprop")):
        grads = []
        for name in names:
            estimator = make(name, linear(6), 6, particles=4)
            state = estimator.init(jax.random.key(0), THETA)
            grads.append(jax.jit(estimator.estimate)(jax.random.key(1), THETA, state)[0].grad)
        for grad in grads[1:]:
            np.testing.assert_allclose(grad, grads[0], rtol=1e-4)


@pytest.mark.parametrize("name", REGISTRY)
def test_constant_loss_gives_exactly_zero(name):
    estimator = make(name, rescored(linear(12), lambda loss, particle: jnp.ones(())), 5, particles=8)
    estimate_ = jax.jit(estimator.estimate)
    state = estimator.init(jax.random.key(0), THETA)
    for k in range(6):
        estimate, state = estimate_(jax.random.key(k), THETA, state)
        np.testing.assert_array_equal(estimate.grad, 0.0)
        assert estimate.norm == 0
        np.testing.assert_allclose(estimate.loss, 1.0, rtol=1e-6)


@pytest.mark.parametrize("name", REGISTRY)
def test_eight_devices_estimate_what_one_does(name):
    """As a meta-step does it: each device draws for its eighth of the particles what one device would have drawn."""
    inner = linear(7)
    inner = inner._replace(reset=lambda key: {"x": jax.random.normal(key), "t": jnp.zeros((), jnp.int32)})
    estimator, mesh = make(name, inner, 5, particles=16), jax.make_mesh((8,), ("p",), axis_types=(AxisType.Auto,))
    state = estimator.init(jax.random.key(0), THETA)

    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=(P(), P(), P("p")), out_specs=(P(), P("p")), check_vma=False)
    def spread(key, theta, state):
        estimate, state = estimator.estimate(key, theta, state)
        return estimate.across("p"), state

    estimate_, moved = jax.jit(estimator.estimate), state
    assert all(leaf.shape[0] == 16 for leaf in jax.tree.leaves(state))
    for k in range(3):
        expected, state = estimate_(jax.random.key(k), THETA, state)
        found, moved = spread(jax.random.key(k), THETA, moved)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), moved, state)


@pytest.mark.parametrize("name", ["pes", "nres", "truncated_es"])
def test_parts_estimate_what_all_do_at_once(monkeypatch, name):
    """Particles that do not fit the cache together, with resets inside windows."""
    inner = varied()
    inner = inner._replace(reset=lambda key, reset=inner.reset: reset(key) | {"x": jax.random.normal(key)})
    estimator = make(name, inner, 5, particles=12)

    def three(key):
        found, state = [], estimator.init(key, THETA)
        for k in range(3):
            estimate, state = jax.jit(estimator.estimate)(jax.random.fold_in(key, k), THETA, state)
            found.append(estimate)
        return found, state

    expected = three(jax.random.key(3))
    asked = []
    monkeypatch.setattr(unroll, "CACHE", 0)
    monkeypatch.setattr(unroll, "at_once", lambda *args, of=unroll.at_once: asked.append(of(*args)) or asked[-1])
    jax.clear_caches()
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), three(jax.random.key(3)), expected
    )
    assert asked[:2] == [4, 4]  # of twelve, and of a part


def test_how_many_fit_a_cache(monkeypatch):
    particles = {"x": np.zeros((24, 2, 100), np.float32), "t": np.zeros(24, np.int32)}
    for cache, count in ((24 * 804, 24), (24 * 804 - 1, 12), (7 * 804, 6), (3 * 804, 4)):
        monkeypatch.setattr(unroll, "CACHE", cache)
        assert unroll.at_once(particles, 24) == count
    assert unroll.at_once(particles, 13) == 13  # no part of it is large enough
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert unroll.at_once(particles, 24) == 24


@pytest.mark.parametrize("name", REGISTRY)
def test_inner_steps_are_counted_as_they_are_done(name):
    """Where horizons vary: in whole episodes those until each one's horizon, and no upper bound."""
    inner = rescored(varied(), lambda loss, particle: 1.0 * particle["T"])  # so that the estimate tells what was drawn
    estimator = make(name, inner, 5, particles=8)
    estimate, _ = jax.jit(estimator.estimate)(jax.random.key(1), THETA, estimator.init(jax.random.key(0), THETA))
    if name not in WHOLE_EPISODES:
        assert int(estimate.steps) == estimator.inner_steps
        return
    copies = estimator.inner_steps // (8 * 12)
    np.testing.assert_allclose(int(estimate.steps), copies * 8 * float(estimate.loss), rtol=1e-6)
    assert int(estimate.steps) < estimator.inner_steps


def varied_form(steps: int) -> np.ndarray:
    """Gradient of the mean meta-loss of the first steps under `varied`: what a step adds depends on its age alone."""
    each = np.diff([t * closed_form(t) if t else np.zeros(2) for t in range(13)], axis=0)  # of the step of age t
    begins, total = np.zeros(steps), np.zeros(2)  # probability that an episode begins there
    begins[0] = 1.0
    for k in range(1, steps):
        begins[k] = sum(begins[k - T] for T in range(6, min(13, k + 1))) / 7
    for k in range(steps):
        for age in range(min(12, k + 1)):
            lives = (13 - max(age + 1, 6)) / 7  # horizons beyond that age
            total += begins[k - age] * lives * each[age]
    return total / steps


@pytest.mark.parametrize("name", ["pes", "nres"])
def test_unbiased_where_horizons_vary(name):
    assert deviation(means(make(name, varied(), 5), 48), varied_form(240)) < 4
    assert np.linalg.norm(varied_form(240) - closed_form(12)) > 0.05


def drawing() -> Inner:
    """`linear` whose meta-loss is 1 where a step draws other than the one before, 0 elsewhere."""
    plain = linear(12)

    def step(theta, particle, key):
        moved, loss, done, diverged = plain.step(theta, particle, key)
        drawn = jax.random.uniform(key)
        return moved | {"drawn": drawn}, 1.0 * (drawn != particle["drawn"]) + 0 * loss, done, diverged

    axes = plain.theta_axes | {"drawn": None}
    return plain._replace(reset=lambda key: plain.reset(key) | {"drawn": jnp.zeros(())}, step=step, theta_axes=axes)


@pytest.mark.parametrize("name", REGISTRY)
def test_each_step_draws_anew(name):
    estimator = make(name, drawing(), 4, particles=2)
    state = estimator.init(jax.random.key(0), THETA)
    estimate, _ = jax.jit(estimator.estimate)(jax.random.key(1), THETA, state)
    assert estimate.loss == 1.0


@pytest.mark.parametrize("name", ES)
def test_a_part_without_std_stands_still(name):
    """And has no gradient, where the others have theirs."""
    plain = linear(7)

    def step(theta, particle, key):
        moved, loss, done, diverged = plain.step(theta["moves"], particle, key)
        return moved, loss + 1e6 * jnp.abs(theta["stands"] - 0.25), done, diverged

    inner, theta = plain._replace(step=step), {"moves": THETA, "stands": jnp.float32(0.25)}
    estimator = make(name, inner, 5, particles=8, std={"moves": 0.1, "stands": 0.0})
    found, _ = jax.jit(estimator.estimate)(jax.random.key(1), theta, estimator.init(jax.random.key(0), theta))
    assert found.loss < 1e3
    assert found.grad["stands"] == 0
    alone = make(name, plain, 5, particles=8, std=0.1)
    expected, _ = jax.jit(alone.estimate)(jax.random.key(1), THETA, alone.init(jax.random.key(0), THETA))
    assert np.isfinite(found.grad["moves"]).all()
    assert np.abs(found.grad["moves"]).max() < 10 * np.abs(expected.grad).max()


@pytest.mark.parametrize("name", ES)
def test_with_signs_the_size_of_losses_does_not_matter(name):
    """Nor that of losses after a reset inside the window."""
    found = []
    for one in (linear(7), rescored(linear(7), lambda loss, particle: 1024 * loss)):
        estimator = make(name, one, 5, particles=8, sign=0.7)
        state, grads = estimator.init(jax.random.key(0), THETA), []
        for k in range(3):
            estimate, state = jax.jit(estimator.estimate)(jax.random.key(k), THETA, state)
            grads.append(estimate.grad)
        found.append(np.stack(grads))
    np.testing.assert_array_equal(*found)


def test_stds_of_parts():
    """Unbiased with another std for each part of theta, and each part has its own."""
    theta = {"a": THETA[0], "b": THETA[1:]}
    inner = linear(12)
    step = inner.step
    inner = inner._replace(step=lambda t, particle, key: step(jnp.append(t["a"], t["b"]), particle, key))
    estimator = nres.nres(inner, pairs=512, std={"a": 0.1, "b": 0.3}, truncation=5)
    assert deviation(means(estimator, 12, theta), closed_form(12)) < 4
    eps = estimator.init(jax.random.key(0), theta).eps
    np.testing.assert_allclose(eps.std(0), [0.1, 0.3], rtol=0.15)


@pytest.mark.parametrize("name", ES)
def test_signs_of_the_differences(name):
    """For a difference linear in the noise E[sign(g . eps) eps] = sqrt(2 / pi) std g / |g|, whatever |g| is."""
    found = means(make(name, linear(6), 6, sign=0.7), 1)
    g = closed_form(6)
    expected = 0.7 * np.sqrt(2 / np.pi) / (2 * STD) * g / np.linalg.norm(g)
    assert deviation(found, expected) < 4


def diverging(at: int, horizon: int = 100) -> Inner:
    """Copies whose theta is above THETA, or all where none is perturbed, diverge at a step of theirs."""
    inner = linear(horizon)

    def step(theta, particle, key):
        particle, loss, done, _ = inner.step(theta, particle, key)
        bad = (particle["t"] >= at) & (theta[0] > THETA[0])
        return particle, jnp.where(bad, 3.0, loss), done, bad

    return inner._replace(step=step)


@pytest.mark.parametrize("name", ["pes", "nres", "truncated_es"])
def test_divergence_resets_the_pair_and_is_counted(name):
    estimator = make(name, diverging(3), 3, particles=8)
    state = estimator.init(jax.random.key(0), THETA)
    estimate, state = jax.jit(estimator.estimate)(jax.random.key(1), THETA, state)
    assert int(estimate.diverged) == 8  # one of each pair, none in the middle
    assert int(estimate.resets) == 8
    np.testing.assert_array_equal(state.particles["x"], 0.0)
    np.testing.assert_array_equal(state.particles["t"], 0)
    if name == "pes":
        np.testing.assert_array_equal(state.xi, 0.0)


def test_what_diverges_in_a_whole_episode_keeps_its_limit():
    estimator = make("full_es", diverging(3, horizon=10), 0, particles=8)
    estimate, _ = jax.jit(estimator.estimate)(jax.random.key(1), THETA, estimator.init(jax.random.key(0), THETA))
    assert int(estimate.diverged) == 8
    assert int(estimate.resets) == 8
    assert estimate.loss > 0.5 * 3 * 8 / 10  # half of the copies at 3 for eight steps of ten


@pytest.mark.parametrize("features", [None, 0])  # 0: the gradient of all together, until one is not finite
@pytest.mark.parametrize("name", ["truncated_backprop", "full_backprop"])
def test_a_particle_without_a_finite_gradient_is_left_out_and_counted(name, features):
    plain = linear(6)

    def step(theta, particle, key):
        moved, loss, done, diverged = plain.step(theta, particle, key)
        # Finite in value; where the flag is 0 the root's derivative is not.
        return moved | {"flag": particle["flag"]}, loss + jnp.sqrt(particle["flag"] * theta[0] ** 2), done, diverged

    def reset(key):
        return plain.reset(key) | {"flag": 1.0 * (jax.random.uniform(key) < 0.5)}

    axes = plain.theta_axes | {"flag": None}
    inner = plain._replace(step=step, reset=reset, theta_axes=axes, features=features)
    estimator = make(name, inner, 6, particles=16)
    estimate, _ = jax.jit(estimator.estimate)(jax.random.key(1), THETA, estimator.init(jax.random.key(0), THETA))
    assert 0 < int(estimate.diverged) < 16
    assert int(estimate.lost) == int(estimate.diverged)
    assert np.isfinite(estimate.grad).all()
    share = 1 - int(estimate.diverged) / 16
    np.testing.assert_allclose(estimate.grad, share * (closed_form(6) + np.array([1.0, 0.0])), rtol=1e-4)


@pytest.mark.parametrize("name", REGISTRY)
def test_bad_settings_are_named(name):
    bad = {"pairs": 0, "std": -0.1, "sign": -1.0} if name in ES else {"particles": 0}
    bad |= {} if name in WHOLE_EPISODES else {"truncation": 13}
    factory = getattr(importlib.import_module(REGISTRY[name]), name)
    for key, value in bad.items():
        with pytest.raises(ValueError, match=rf"{name}: {key}, got {value}; valid: "):
            factory(linear(12), **({} if name in WHOLE_EPISODES else {"truncation": 4}) | {key: value})


def test_influence_balancing():
    """Short-term and long-term influence of theta have opposite signs: a truncated gradient points the wrong way."""
    spec = importlib.util.spec_from_file_location("estimators", ROOT / "benchmarks/estimators.py")
    problem = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(problem)
    inner, theta = problem.influence(200)._replace(first=None), jnp.array(0.5)
    truth, blind = problem.influence_gradient(0.5), problem.influence_gradient(0.5, truncation=10)
    assert truth > 0 > blind
    found = means(make("truncated_backprop", inner, 10, particles=2), 20, theta, runs=2)
    np.testing.assert_allclose(found, blind, rtol=1e-4)
    found = means(make("full_backprop", inner, 10, particles=2), 1, theta, runs=2)
    np.testing.assert_allclose(found, truth, rtol=1e-4)
    found = means(make("pes", inner, 10), 20, theta)
    assert deviation(found, np.array([truth])) < 4
    assert found.mean() > 0
