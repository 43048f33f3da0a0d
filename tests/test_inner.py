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


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="valid: fresh, train, validation"):
        make_inner(RULE, TASK, horizon=Horizon(3, 3), meta_loss="test")
    with pytest.raises(ValueError, match="loss_limit"):
        make_inner(RULE, TASK, horizon=Horizon(3, 3), loss_limit=0.0)
