"""Backpropagation through whole episodes: exact for the episodes drawn, in memory and time of the longest horizon.

Source: Maclaurin, Duvenaud and Adams (2015), "Gradient-based hyperparameter optimization through reversible learning",
arXiv:1502.03492, whose reversal is not done here: each step's particles are stored and its inside is recomputed.

Each episode counts the same, as in full_es. Exact gradients of long chaotic runs explode; see docs/estimators.md.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from meta_train.estimators import unroll
from meta_train.estimators.base import Estimate, Estimator
from meta_train.inner import Inner


class State(NamedTuple):
    index: jax.Array  # [N] int32, global number of the particle


def full_backprop(inner: Inner, *, particles: int = 8) -> Estimator:
    """Build the estimator.

    Args:
      inner: see `Inner`.
      particles: N, fresh in each estimate.

    Raises:
      ValueError: on an argument out of range.
    """
    unroll.require("full_backprop", particles=(particles, particles >= 1, ">= 1"))

    def init(key: jax.Array, theta: Any) -> State:
        return State(jnp.arange(particles, dtype=jnp.int32))

    def estimate(key: jax.Array, theta: Any, state: State) -> tuple[Estimate, State]:
        reset_keys, step_keys = unroll.split(unroll.fold(key, state.index), 2)
        fresh = unroll.reset(inner, reset_keys, 1)

        def loss(thetas):
            seen = unroll.episode(inner, thetas, fresh, step_keys, score=lambda loss: loss[:, 0], length=inner.longest)
            return seen.score.sum(), seen

        grads, seen = jax.grad(loss, has_aux=True)(unroll.unperturbed(theta, len(state.index)))
        grad, lost = unroll.finite_mean(grads, seen.diverged)
        ended = jnp.full((), len(state.index), jnp.int32)
        diverged = jnp.maximum(seen.diverged.sum(), lost)
        return Estimate(grad, seen.loss, diverged, ended, seen.updates, lost), state

    return Estimator(init, estimate, particles * inner.longest)
