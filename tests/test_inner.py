"""Where a rule meets a task: an inner step is what a user's own loop would do."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tasks
from lopt import rules
from meta_train.inner import Horizon, make_inner

RULE = rules.make("tiny", hidden=2)
TASK = tasks.make("tabular_mlp", hidden=(4,), batch_size=8)
THETA = RULE.init_theta(jax.random.key(0))


def first_step(meta_loss: str, **settings):
    inner = make_inner(RULE, TASK, horizon=Horizon(7, 7), meta_loss=meta_loss, **settings)
    particle = inner.reset(jax.random.key(1))
    return particle, inner.step(THETA, particle, jax.random.key(2))


@pytest.mark.parametrize("meta_loss", ["train", "fresh", "validation"])
def test_a_step_is_a_users_step(meta_loss):
    particle, (moved, loss, done, diverged) = first_step(meta_loss)
    batch_key, loss_key, meta_batch_key, meta_key = jax.random.split(jax.random.key(2), 4)
    batch = TASK.batch(batch_key, particle.phi, TASK.data, "train")
    value, grads = jax.value_and_grad(TASK.loss)(particle.params, loss_key, particle.phi, batch)
    tx = RULE.bind(THETA, num_steps=7)
    updates, _ = tx.update(grads, tx.init(particle.params), particle.params, value=value)
    params = optax.apply_updates(particle.params, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), moved.params, params)
    split = "validation" if meta_loss == "validation" else "train"
    meta_batch = TASK.batch(meta_batch_key, particle.phi, TASK.data, split)
    expected = value if meta_loss == "train" else TASK.loss(params, meta_key, particle.phi, meta_batch)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert not done
    assert not diverged
    assert moved.t == 1


def test_done_at_the_horizon():
    inner = make_inner(RULE, TASK, horizon=Horizon(3, 3))
    particle = inner.reset(jax.random.key(0))
    ends = []
    for k in range(3):
        particle, _, done, _ = inner.step(THETA, particle, jax.random.key(k))
        ends.append(bool(done))
    assert ends == [False, False, True]


def test_losses_are_limited_and_divergence_is_said():
    _, (_, loss, _, diverged) = first_step("validation", loss_limit=0.1)
    np.testing.assert_allclose(loss, 0.1, rtol=1e-6)
    assert not diverged
    broken = TASK._replace(loss=lambda *_: jnp.asarray(jnp.nan))
    inner = make_inner(RULE, broken, horizon=Horizon(3, 3), loss_limit=2.0)
    _, loss, _, diverged = inner.step(THETA, inner.reset(jax.random.key(0)), jax.random.key(1))
    assert diverged
    assert loss == 2.0


def test_horizons_are_log_uniform():
    draws = np.asarray(jax.vmap(Horizon(10, 1000).sample)(jax.random.split(jax.random.key(0), 20_000)))
    assert draws.min() == 10
    assert draws.max() == 1000
    # Log-uniform: half of them below the geometric mean. A uniform draw would have 9 % there.
    assert abs(np.mean(draws < 100) - 0.5) < 0.02
    assert int(Horizon(5, 5).sample(jax.random.key(0))) == 5


def test_grad_transform_is_applied_with_its_state_in_the_particle():
    delayed = TASK._replace(grad_transform=optax.trace(0.5))
    inner = make_inner(RULE, delayed, horizon=Horizon(9, 9))
    particle = inner.reset(jax.random.key(0))
    moved, *_ = inner.step(THETA, particle, jax.random.key(1))
    leaves = jax.tree.leaves(moved.grad_state)
    assert leaves
    assert any(np.any(x) for x in leaves)


QUICK_RULE, QUICK_TASK = rules.make("nn_adam", lr0=0.1), TASK  # compiles in a second


def episode(task=QUICK_TASK, **settings):
    """Weighted meta-losses, ends and divergences of one inner run, and its first particle."""
    inner = make_inner(QUICK_RULE, task, horizon=Horizon(7, 7), **settings)
    first = particle = jax.jit(inner.reset)(jax.random.key(1))
    step, seen = jax.jit(inner.step), []
    for k in range(7):
        particle, *rest = step(QUICK_RULE.init_theta(jax.random.key(0)), particle, jax.random.key(k))
        seen.append(rest)
    return (*(np.asarray(x) for x in zip(*seen, strict=True)), first)


def test_objectives_are_means_of_weighted_losses():
    losses, ends, *_ = episode()
    assert ends.tolist() == [False] * 6 + [True]
    for objective, steps in (("final", 1), ("last", 3)):
        weighted, *_ = episode(objective=objective, last_steps=3)
        np.testing.assert_allclose(weighted.mean(), losses[-steps:].mean(), rtol=1e-5)
        assert not weighted[:-steps].any()


def test_what_diverges_before_the_loss_that_counts_is_charged_for_it():
    broken = QUICK_TASK._replace(loss=lambda params, *_: jnp.sqrt(-jnp.ones(())) * jnp.sum(params["layer0"]["w"]))
    weighted, _, diverged, _ = episode(broken, objective="final", loss_limit=2.0)
    np.testing.assert_allclose(weighted.mean(), 2.0)
    assert diverged.tolist() == [False] * 6 + [True]


def test_losses_are_normalised():
    losses, *_ = episode(loss_limit=100.0)
    over, *_ = episode(loss_limit=100.0, normalise="reference", reference_loss=0.25)
    np.testing.assert_allclose(over, losses / 0.25, rtol=1e-5)
    # Limited after normalising, and not before.
    under, *_ = episode(loss_limit=0.5 * float(losses.max()), normalise="reference", reference_loss=10.0)
    np.testing.assert_allclose(under, losses / 10.0, rtol=1e-5)
    over, _, _, first = episode(loss_limit=0.9, normalise="init")
    np.testing.assert_allclose(over, np.minimum(losses / first.scale, 0.9), rtol=1e-5)
    assert (over < 0.9).any()
    # About the loss at init; a minibatch's differs from batch to batch.
    assert 0.5 * QUICK_TASK.init_loss < float(first.scale) < 2 * QUICK_TASK.init_loss


def test_a_loss_at_init_that_is_not_positive_is_no_measure():
    """It would turn the meta-loss round, or make it as large as it likes."""
    negative = QUICK_TASK._replace(loss=lambda *args: QUICK_TASK.loss(*args) - 100.0)
    weighted, _, diverged, _ = episode(negative, normalise="init", loss_limit=2.0)
    assert diverged.all()
    np.testing.assert_allclose(weighted, 2.0)
    _, _, diverged, _ = episode(normalise="init", loss_limit=2.0)
    assert not diverged.any()


def test_first_particles_are_staggered():
    """Each first episode ends anywhere in its own horizon, whether horizons vary or not."""
    inner = make_inner(QUICK_RULE, TASK, horizon=Horizon(10, 1000), stagger=True)
    first = jax.jit(jax.vmap(inner.first))(jax.random.split(jax.random.key(0), 1000))
    passed = np.asarray(first.t / first.horizon)
    assert (passed < 1).all()
    long = np.asarray(first.horizon) > 100
    assert abs(passed[long].mean() - 0.5) < 0.06  # four standard errors
    assert abs(np.std(passed[long]) - 12**-0.5) < 0.03
    assert not inner.reset(jax.random.key(0)).t
    constant = make_inner(QUICK_RULE, TASK, horizon=Horizon(10, 10), stagger=True)
    assert set(np.asarray(jax.jit(jax.vmap(constant.first))(jax.random.split(jax.random.key(0), 300)).t)) == {
        *range(10)
    }
    assert make_inner(QUICK_RULE, TASK, horizon=Horizon(10, 10)).first is None


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="valid: fresh, train, validation"):
        make_inner(RULE, TASK, horizon=Horizon(3, 3), meta_loss="test")
    with pytest.raises(ValueError, match="loss_limit"):
        make_inner(RULE, TASK, horizon=Horizon(3, 3), loss_limit=0.0)
    for settings, says in (
        (dict(objective="median"), "unknown objective 'median'.*valid: final, last, mean"),
        (dict(objective="last", last_steps=4), "last_steps, got 4; valid: 1 to 3"),
        (dict(normalise="yes"), "unknown normalise 'yes'.*valid: init, none, reference"),
        (dict(normalise="reference"), r"reference_loss, got 0.0; valid: > 0"),
    ):
        with pytest.raises(ValueError, match=says):
            make_inner(RULE, TASK, horizon=Horizon(3, 3), **settings)
