"""Backpropagation through a real rule on a real task against finite differences in double precision."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import tasks
from lopt import rules
from meta_train.estimators.full_backprop import full_backprop
from meta_train.estimators.truncated_backprop import truncated_backprop
from meta_train.inner import Horizon, make_inner

TINY = ("tiny", {"hidden": 16})  # narrower ones take minutes to differentiate, see features.SCALAR_WIDTH
# Learned too, by an LSTM whose state all tensors share, and compiled in seconds; tiny's whole episodes take minutes.
CLOCK = ("nn_adam", {"lstm_hidden": 4})


@pytest.mark.parametrize(
    ("name", "of"),
    [
        ("truncated_backprop", CLOCK),
        ("full_backprop", CLOCK),
        pytest.param("truncated_backprop", TINY, marks=pytest.mark.slow),
        pytest.param("full_backprop", TINY, marks=pytest.mark.slow),
    ],
    ids=lambda x: x if isinstance(x, str) else x[0],
)
def test_equals_finite_differences(name, of):
    """Over a window in which episodes end, and over whole episodes."""
    with jax.enable_x64(True):
        rule = rules.make(of[0], **of[1])
        task = tasks.make("tabular_mlp", hidden=(), batch_size=8)
        data = jax.tree.map(_double, task.data)
        inner = make_inner(rule, task._replace(data=data), horizon=Horizon(4, 6), meta_loss="train")
        drawn = inner.reset
        inner = inner._replace(reset=lambda key: jax.tree.map(_double, drawn(key)))
        theta = jax.tree.map(_double, rule.init_theta(jax.random.key(0)))
        flat, unravel = ravel_pytree(theta)
        flat = flat + 0.1 * jax.random.normal(jax.random.key(3), flat.shape)
        truncated = name == "truncated_backprop"
        settings = {"truncation": 4} if truncated else {}
        estimator = (truncated_backprop if truncated else full_backprop)(inner, particles=2, **settings)
        state = jax.jit(estimator.init)(jax.random.key(0), theta)
        if truncated:  # both particles are reset at the window's second step
            state = state._replace(particles=state.particles._replace(t=state.particles.horizon - 2))

        @jax.jit
        def run(flat):
            estimate, _ = estimator.estimate(jax.random.key(1), unravel(flat), state)
            return estimate.loss, ravel_pytree(estimate.grad)[0], estimate.resets

        _, grad, resets = run(flat)
        assert grad.dtype == jnp.float64
        assert int(resets) == 2
        directions = jax.random.normal(jax.random.key(4), (12, flat.size))
        h = 1e-8  # so small that no rectified unit changes side
        slopes = [(run(flat + h * d)[0] - run(flat - h * d)[0]) / (2 * h) for d in directions]
        np.testing.assert_allclose(slopes, directions @ grad, rtol=1e-6, atol=1e-6)


def _double(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x
