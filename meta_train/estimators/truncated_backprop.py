"""Backpropagation through truncated unrolls: no variance of its own, blind to what theta did before the window.

Source: Werbos (1990), "Backpropagation through time: what it does and how to do it"; for learned optimizers:
Andrychowicz et al. (2016), "Learning to learn by gradient descent by gradient descent", arXiv:1606.04474.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from meta_train.estimators import unroll
from meta_train.estimators.base import Estimate, Estimator
from meta_train.inner import Inner


class State(NamedTuple):
    particles: Any  # [N, ...]
    index: jax.Array  # [N] int32, global number of the particle


def truncated_backprop(inner: Inner, *, particles: int = 8, truncation: int = 50) -> Estimator:
    """Build the estimator.

    Args:
      inner: see `Inner`.
      particles: N.
      truncation: K inner steps a window; the memory of a meta-step grows with it.

    Raises:
      ValueError: on an argument out of range.
    """
    unroll.require("truncated_backprop", particles=(particles, particles >= 1, ">= 1"))
    unroll.fits("truncated_backprop", inner, truncation)

    def init(key: jax.Array, theta: Any) -> State:
        index = jnp.arange(particles, dtype=jnp.int32)
        fresh = unroll.reset(inner, unroll.fold(key, index), 1, first=True)
        return State(unroll.pick(inner, fresh, 0), index)

    def estimate(key: jax.Array, theta: Any, state: State) -> tuple[Estimate, State]:
        reset_keys, step_keys = unroll.split(unroll.fold(key, state.index), 2)
        start, fresh = unroll.repeat(inner, state.particles, 1), unroll.reset(inner, reset_keys, 1)

        def loss(thetas):
            seen = unroll.window(
                inner, thetas, start, fresh, step_keys, steps=truncation, score=lambda loss: loss[:, 0], remat=True
            )
            return (seen.before + seen.after).sum() / truncation, seen

        grads, seen = jax.grad(loss, has_aux=True)(unroll.unperturbed(theta, len(state.index)))
        grad, lost = unroll.finite_mean(grads)
        diverged = jnp.maximum(seen.diverged, lost)  # the lost are mostly those that diverged
        state = State(unroll.pick(inner, seen.particles, 0), state.index)
        return Estimate(grad, seen.loss, diverged, seen.resets, seen.updates, lost), state

    return Estimator(init, estimate, particles * truncation)
