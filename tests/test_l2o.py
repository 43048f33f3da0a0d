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
from lopt.proximal_safeguard import safeguard
from lopt.rules import l2o_pa
from meta_train.estimators.truncated_backprop import truncated_backprop
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


def test_particles_as_one_have_the_gradient_of_each():
    """In windows with resets, of instances that differ."""
    rule = rules.make("l2o_pa", form="PBA12", hidden=4)
    inner = make_inner(rule, tasks.make("lasso"), horizon=Horizon(5, 9), meta_loss="fresh", loss_limit=1e6)
    assert (inner.features.opt_state.leaves.memory, inner.features.opt_state.leaves.x) == (1, 0)
    theta, found = rule.init_theta(jax.random.key(0)), []
    for one in (inner, inner._replace(features=None)):
        estimator = truncated_backprop(one, particles=6, truncation=5)
        state, estimate_ = estimator.init(jax.random.key(1), theta), jax.jit(estimator.estimate)
        for t in range(3):
            estimate, state = estimate_(jax.random.key(t), theta, state)
        found.append((estimate, state))
    assert int(found[0][0].resets) > 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *found)
    assert optax.tree.norm(found[0][0].grad) > 1e-3


def test_the_network_sees_tensors_of_one_theta_as_one():
    """One product for all of them, in values and derivatives what it is of each; not where thetas differ."""
    theta, keys = l2o_pa.init_lstm(jax.random.key(0), 2, 3), jax.random.split(jax.random.key(1))
    x, memory = jax.random.normal(keys[0], (5, 2, 7)), jax.random.normal(keys[1], (5, 12, 7))
    seen = []

    def network(theta, x, memory):
        seen.append(x.shape)
        return l2o_pa.lstm(theta, x, memory)

    def loss(f, theta, x, memory):
        return sum(
            jnp.sum(jnp.sin(jnp.arange(y.size) + y.ravel())) for y in jax.vmap(f, (None, 0, 0))(theta, x, memory)
        )

    ours, plain = (jax.grad(loss, (1, 2, 3))(f, theta, x, memory) for f in (l2o_pa.as_one(network), l2o_pa.lstm))
    assert (2, 35) in seen
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), ours, plain)
    seen.clear()
    thetas = jax.tree.map(lambda w: jnp.stack([w, 2 * w, 3 * w, 4 * w, 5 * w]), theta)
    ours, plain = (jax.vmap(f)(thetas, x, memory) for f in (l2o_pa.as_one(network), l2o_pa.lstm))
    assert (2, 35) not in seen
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), ours, plain)


def test_forms_with_b_pass_over_what_is_frozen_or_empty():
    rule = rules.make("l2o_pa", form="PBA", hidden=4)
    theta = rule.init_theta(jax.random.key(0))
    params = {"none": None, "empty": jnp.zeros((0, 3)), "w": jnp.array([0.5, -1.0]), "frozen": jnp.ones(2)}
    labels = lambda path, leaf: "freeze" if path == "frozen" else None  # noqa: E731

    def gradient(p):
        return jax.tree.map(lambda x: 0.3 * x + 0.1, p)

    def path(params, labels=None):
        tx = rule.bind(theta, prox=prox.l1(0.1), lipschitz=2.0, labels=labels)
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update(gradient(params), state, params, grad_fn=gradient)
            params = optax.apply_updates(params, updates)
        return params, l2o_pa.solution_of(state, params)

    moved, x = path(params, labels)
    alone, x_alone = path({"w": params["w"]})
    np.testing.assert_array_equal(moved["w"], alone["w"])
    np.testing.assert_array_equal(x["w"], x_alone["w"])
    for tree in (moved, x):
        np.testing.assert_array_equal(tree["frozen"], params["frozen"])
        assert tree["none"] is None
        assert tree["empty"].shape == (0, 3)


@pytest.mark.parametrize("name", ["l2o_pa", "fista", "safeguard", "adam_hd"])
def test_a_traced_constant_leaves_low_precision_as_it_is(name):
    """A scan refuses a state that changes its type."""
    rule = rules.make("l2o_pa", hidden=4)
    theta = rule.init_theta(jax.random.key(0))

    def run(lipschitz):
        given = {"prox": prox.l1(0.1 * lipschitz), "lipschitz": lipschitz}
        tx = {
            "l2o_pa": lambda: rule.bind(theta, **given),
            "fista": lambda: proximal.fista(**given, restart="function"),
            "safeguard": lambda: safeguard(rule.bind(theta, **given), **given, steps=2),
            "adam_hd": lambda: proximal.adam_hd(lr=0.1),
        }[name]()
        y = jnp.ones(3, jnp.bfloat16)

        def step(carry, _):
            y, state = carry
            updates, state = tx.update(y - 2, state, y, value_fn=lambda x: jnp.sum((x - 2) ** 2))
            return (optax.apply_updates(y, updates), state), updates

        (y, _), updates = jax.lax.scan(step, (y, tx.init(y)), None, length=4)
        return y, updates

    y, updates = jax.jit(run)(jnp.float32(1.5))
    assert y.dtype == updates.dtype == jnp.bfloat16
    assert bool(jnp.all(y > 1.0))


def test_penalties_refuse_tensors_that_they_are_not_defined_for():
    params = {"m": jnp.ones((2, 3)), "v": jnp.ones(3)}
    rule = rules.make("l2o_pa", hidden=4)
    theta = rule.init_theta(jax.random.key(0))
    nuclear, wide = prox.nuclear(0.1), prox.group_l1(0.1, axis=1)
    for make in (
        lambda r: proximal.fista(lipschitz=1.0, prox=r),
        lambda r: rule.bind(theta, prox=r),
        lambda r: safeguard(rule.bind(theta), prox=r, lipschitz=1.0),
        lambda r: proximal.admm(prox_f=lambda v, step: v, prox=r),
    ):
        with pytest.raises(ValueError, match=r"v: nuclear of shape \(3,\); valid: a matrix"):
            make(nuclear).init(params)
        with pytest.raises(ValueError, match=r"v: group_l1 along axis 1 of shape \(3,\)"):
            make(wide).init(params)
        make(nuclear).init({"m": params["m"]})
    with pytest.raises(ValueError, match=r"simplex of shape \(2, 3\); valid: a vector"):
        prox.simplex().apply(params["m"], 1.0)


def test_a_proximal_rule_is_refused_where_nothing_is_known_of_the_loss():
    rule = rules.make("l2o_pa", hidden=4)
    for task in (tasks.make("quadratic"), tasks.make("lasso", augment=[("scale_loss", {"decades": 1})])):
        with pytest.raises(ValueError, match=r"rule l2o_pa on .+; valid: a task with `composite` \(lasso"):
            make_inner(rule, task, horizon=Horizon(9, 9))
    for family in ("lasso", "logistic_l1", "structured_regression", "matrix_completion"):  # as the message says
        assert tasks.make(family).composite is not None
