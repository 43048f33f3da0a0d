"""The polynomial-decay average beside a transform, and who reads it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lopt
import tasks
from lopt import rules
from lopt.averaging import Averaged
from meta_test import entrants
from meta_train.inner import Horizon, make_inner


def run(tx, params, steps=6):
    """Parameters after each step and the last state; gradients are the parameters, moved a little every step."""
    state, seen = tx.init(params), []
    for i in range(steps):
        grads = jax.tree.map(lambda p, i=i: p + jnp.asarray(0.1 * i, p.dtype), params)
        updates, state = jax.jit(tx.update)(grads, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(params)
    return seen, state


@pytest.mark.parametrize("power", [0, 1, 8, 2.5])
def test_weights_of_iterates(power):
    """x_T = sum of w_s p_s with w_s = c_s prod_{r > s} (1 - c_r), c_t = (power + 1) / (t + power)."""
    start = jnp.array([1.0, -2.0, 0.5])
    seen, state = run(lopt.averaged(optax.sgd(0.3), power), start)
    plain, _ = run(optax.sgd(0.3), start)
    np.testing.assert_array_equal(seen, plain)

    def expected(power):
        c = np.array([(power + 1) / (t + power) for t in range(1, len(seen) + 1)])
        weights = [c[s] * np.prod(1 - c[s + 1 :]) for s in range(len(seen))]
        np.testing.assert_allclose(sum(weights), 1)
        return np.tensordot(weights, np.asarray(seen, np.float64), 1)

    found = lopt.eval_params(state, seen[-1])
    np.testing.assert_allclose(found, expected(power), rtol=1e-5)
    assert np.abs(found - expected(power + 0.5)).max() > 1e-3  # another power would be seen


def test_any_leaf():
    """None, scalars, integers, bfloat16; the average of bfloat16 parameters is finer than they are."""
    params = {
        "none": None,
        "scalar": jnp.float32(2.0),
        "low": jnp.full((3,), 1.0, jnp.bfloat16),
        "step": jnp.arange(2),
        "deep": jnp.ones((1, 2, 1, 2, 1)),
    }
    tx = lopt.averaged(optax.sgd(0.01), 0)
    state = tx.init(params)
    for _ in range(3):
        grads = jax.tree.map(lambda p: jnp.ones_like(p) if jnp.issubdtype(p.dtype, jnp.floating) else p * 0, params)
        updates, state = tx.update(grads, state, params)
        updates["step"] = params["step"] * 0
        params = optax.apply_updates(params, updates)
    found = lopt.eval_params(state, params)
    assert jax.tree.map(lambda x: x.dtype, found) == jax.tree.map(lambda x: x.dtype, params)
    assert state.average["low"].dtype == jnp.float32
    assert found["none"] is None
    np.testing.assert_array_equal(found["step"], [0, 1])
    np.testing.assert_allclose(found["scalar"], 2 - 0.02, rtol=1e-6)


def test_found_wherever_it_is():
    params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    inside = lopt.averaged(optax.sgd(0.1), 0)
    chained = optax.chain(optax.clip(1.0), inside)
    parts = optax.multi_transform({"x": inside, "y": optax.sgd(0.1)}, {"a": "x", "b": "y"})
    for tx, average in ((chained, ("a", "b")), (parts, ("a",)), (optax.sgd(0.1), ())):
        seen, state = run(tx, params)
        found = lopt.eval_params(state, seen[-1])
        for name in params:
            mean = np.mean([one[name] for one in seen], axis=0)
            np.testing.assert_allclose(found[name], mean if name in average else seen[-1][name], rtol=1e-6)
        assert not np.allclose(np.mean([one["a"] for one in seen], axis=0), seen[-1]["a"], rtol=1e-3)


def test_parameters_and_state_may_be_donated():
    tx = lopt.averaged(optax.adam(0.1))
    params = {"w": jnp.ones((4, 4))}
    state = tx.init(params)

    def step(params, state):
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    params, state = jax.jit(step, donate_argnums=(0, 1))(params, state)
    assert np.isfinite(lopt.eval_params(state, params)["w"]).all()


def test_bad_arguments():
    for power in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="power"):
            lopt.averaged(optax.sgd(0.1), power)
    with pytest.raises(ValueError, match="average"):
        rules.make("tiny", average=-1.0)
    tx = lopt.averaged(optax.sgd(0.1))
    with pytest.raises(ValueError, match="params"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))


def test_rules_have_one_or_not():
    """The rule's own, or as it is bound; the updates are the same."""
    params = {"w": jnp.ones((3, 2))}
    states = {}
    for own, said in ((0.0, None), (8.0, None), (8.0, 0), (0.0, 2.0)):
        rule = rules.make("tiny", average=own)
        tx = rule.bind(rule.init_theta(jax.random.key(0)), num_steps=10, average=said)
        seen, state = run(tx, params)
        states[own, said] = seen, state
        assert isinstance(state, Averaged) == bool(own if said is None else said)
        np.testing.assert_array_equal(seen[-1]["w"], states[0.0, None][0][-1]["w"])
    assert rule.settings["average"] == 0.0
    assert rules.make("tiny", average=8.0).settings["average"] == 8.0


@pytest.mark.parametrize("judged", [False, True])
def test_meta_loss_is_at_what_is_judged(judged):
    task = tasks.make("quadratic", dim=3, log10_noise=None)
    rule = rules.make("tiny", average=3.0)
    theta = rule.init_theta(jax.random.key(1))
    inner = make_inner(rule, task, horizon=Horizon(9, 9), meta_loss="validation", judge_average=judged)
    particle, seen = inner.reset(jax.random.key(2)), []
    for i in range(4):
        particle, value, *_ = inner.step(theta, particle, jax.random.key(i))
        seen.append(particle.params)
    average = seen[0]
    for t, p in enumerate(seen[1:], 2):
        average = average + 4 / (t + 3) * (p - average)
    batch = task.batch(jax.random.key(5), particle.phi, task.data, "validation")
    at_average, at_params = (
        float(task.loss(x, jax.random.key(6), particle.phi, batch)) for x in (average, particle.params)
    )
    np.testing.assert_allclose(value, at_average if judged else at_params, rtol=1e-5)
    assert abs(at_average - at_params) > 1e-3 * at_params
    assert isinstance(particle.opt_state, Averaged) == judged  # else it costs nothing


def test_an_average_that_is_judged_has_to_be_kept():
    task = tasks.make("quadratic", dim=3)
    for average, meta_loss in ((0.0, "validation"), (8.0, "train")):
        rule = rules.make("tiny", average=average)
        with pytest.raises(ValueError, match="judge_average"):
            make_inner(rule, task, horizon=Horizon(9, 9), meta_loss=meta_loss, judge_average=True)
    rule = rules.make("nn_adam")
    with pytest.raises(ValueError, match="judge_average"):
        make_inner(rule, task, horizon=Horizon(9, 9), judge_average=True)


def test_the_suite_judges_by_the_average():
    learned = entrants.resolve("lopt:lopt-base").contender
    own = entrants.resolve("tests.test_averaging:averaged_sgd").contender
    for contender in (learned, own):
        assert contender.eval_params is lopt.eval_params
    assert entrants.resolve("averaged_adamw").contender.eval_params is not None


def averaged_sgd():
    return lopt.averaged(optax.sgd(0.1))
