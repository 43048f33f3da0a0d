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
        start, fresh = state.particles, jax.vmap(inner.reset)(reset_keys)
        settings = dict(steps=truncation, score=lambda loss: loss[:, 0], remat=True)

        def gradient(thetas, start, fresh, **how):
            def loss(thetas):
                seen = unroll.window(inner, thetas, start, fresh, step_keys, **settings, **how)
                return (seen.before + seen.after).sum() / truncation, seen

            return jax.grad(loss, has_aux=True)(thetas)

        def each():
            """The mean of gradients that every particle has of its own."""
            copies = (unroll.repeat(inner, particles, 1) for particles in (start, fresh))
            grads, seen = gradient(unroll.unperturbed(theta, len(state.index)), *copies)
            seen = seen._replace(particles=unroll.pick(inner, seen.particles, 0))
            return *unroll.finite_mean(grads, seen.diverged), seen

        def together():
            """The same by one product of all particles, unless a gradient that is not finite is among them."""
            total, seen = gradient(theta, start, fresh, shared=True)
            mean = jax.tree.map(lambda g: g / len(state.index), total)
            # Of the sum nobody can tell whose part is 0, unless all are.
            lost = unroll.untold(seen.diverged, jax.tree.map(lambda g: g[None], mean)).sum(dtype=jnp.int32)
            return *jax.lax.cond(unroll.finite(mean), lambda: (mean, lost), lambda: each()[:2]), seen

        grad, lost, seen = each() if inner.features is None else together()
        diverged = jnp.maximum(seen.diverged.sum(), lost)  # the lost are mostly those that diverged
        state = State(seen.particles, state.index)
        return Estimate(grad, seen.loss, diverged, seen.resets, seen.updates, lost), state

    return Estimator(init, estimate, particles * truncation)
