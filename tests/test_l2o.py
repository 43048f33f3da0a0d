"""The rules of L2O in lopt and in meta-training: what they refuse, what they are given, which metric they take."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from composite import PENALTIES

import lopt
import tasks
from lopt import prox, proximal, rules
from lopt.rules import l2o_pa
from meta_train.inner import Horizon, make_inner
from tasks import augment


def test_bad_input_is_refused(committed):
    for settings, message in (({"form": "PX"}, "unknown form 'PX'"), ({"activation": "relu"}, "unknown activation")):
        with pytest.raises(ValueError, match=message):
            rules.make("l2o_pa", **settings)
    rule = rules.make("l2o_pa", form="PBA")
    theta = rule.init_theta(jax.random.key(0))
    with pytest.raises(ValueError, match="valid: a penalty"):
        rule.bind(theta, prox=lambda v, step: v)
    with pytest.raises(ValueError, match=r"lipschitz, got 0"):
        rule.bind(theta, lipschitz=0)
    tx = rule.bind(theta)
    with pytest.raises(ValueError, match="forms with b need"):
        tx.update(jnp.ones(3), tx.init(jnp.ones(3)), jnp.ones(3))
    for method, settings, message in (
        (proximal.fista, {"lipschitz": 1.0, "restart": "often"}, "unknown restart"),
        (proximal.momentum, {"lipschitz": 1.0, "a": 1.0}, r"valid: \[0, 1\)"),
        (proximal.ista, {"lipschitz": -1.0}, "lipschitz, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            method(**settings)


def test_an_artifact_is_loaded_with_its_penalty(tmp_path):
    rule = rules.make("l2o_pa", hidden=4)
    theta = rule.init_theta(jax.random.key(0))
    lopt.save(tmp_path / "a", rule, theta, provenance={}, card="x")
    y, g = jnp.array([0.5, -1.0, 2.0]), jnp.array([0.3, 0.1, -0.2])
    told = {"prox": prox.l1(0.3), "lipschitz": 2.0}
    both = lopt.load(tmp_path / "a", **told), rule.bind(theta, **told)
    ours, theirs = (tx.update(g, tx.init(y), y)[0] for tx in both)
    np.testing.assert_array_equal(ours, theirs)
    assert not np.allclose(ours, rule.bind(theta).update(g, rule.bind(theta).init(y), y)[0])
    with pytest.raises(ValueError, match="prox for tiny; valid: none"):
        lopt.load("quickstart", num_steps=9, prox=prox.l1(0.3))


@pytest.mark.parametrize("penalty", ["group_l1", "nuclear"])
def test_a_learned_metric_is_pooled_where_elements_belong_together(penalty):
    rule = rules.make("l2o_pa", hidden=4)
    theta = rule.init_theta(jax.random.key(1))
    y = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)
    tx = rule.bind(theta, prox=PENALTIES[penalty], lipschitz=2.0)
    g = 0.1 * y**2
    updates, state = jax.jit(tx.update)(g, tx.init(y), y)
    assert jnp.isfinite(updates).all()
    plain = rule.bind(theta, lipschitz=2.0)
    free = l2o_pa.solution(jax.jit(plain.update)(g, plain.init(y), y)[1])  # v = y - s p g
    metric = PENALTIES[penalty].pooled((y - free) / g)
    np.testing.assert_allclose(l2o_pa.solution(state), PENALTIES[penalty].apply(y - metric * g, metric), atol=1e-5)
    # Of elements' own metrics in the gradient step a minimum would be no fixed point.
    assert not np.allclose(l2o_pa.solution(state), PENALTIES[penalty].apply(free, metric), atol=1e-4)


def test_a_wrapped_task_has_no_structure():
    """Or a rule with a proximal operator would be given a gradient past the wrapper."""
    assert tasks.make("lasso", augment=[("scale_loss", {"decades": 1})]).composite is None
    assert augment.scale_loss(tasks.make("lasso")).composite is None
    assert tasks.make("lasso").composite


@pytest.mark.parametrize("name", ["l2o_pa", "l2o_dm"])
def test_an_inner_step_gives_each_rule_its_gradient(name):
    """With a proximal operator that of the smooth part; without a subgradient of the whole."""
    task, rule = tasks.make("lasso"), rules.make(name, **({"form": "PBA", "hidden": 4} if name == "l2o_pa" else {}))
    theta = rule.init_theta(jax.random.key(0))
    inner = make_inner(rule, task, horizon=Horizon(9, 9), meta_loss="fresh", loss_limit=1e6)
    particle = inner.reset(jax.random.key(1))
    phi, y = particle.phi, particle.params
    more = dict(prox=prox.l1(phi.strength), lipschitz=phi.lipschitz) if name == "l2o_pa" else {}
    tx = rule.bind(theta, **more)
    state = tx.init(y)
    step = jax.jit(inner.step)
    for t in range(3):
        particle, value, *_ = step(theta, particle, jax.random.key(t))
        gradient = jax.grad(lambda y: task.composite.smooth(y, None, phi, 0 * y))
        g = gradient(y) if name == "l2o_pa" else jax.grad(task.loss)(y, None, phi, 0 * y)
        updates, state = tx.update(g, state, y, grad_fn=gradient)
        y = optax.apply_updates(y, updates)
        np.testing.assert_allclose(particle.params, y, rtol=1e-4, atol=1e-6)
        assert float(value) == pytest.approx(float(task.loss(y, None, phi, 0 * y)), rel=1e-4)
