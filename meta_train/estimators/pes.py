"""Persistent evolution strategies: unbiased meta-gradients from truncated unrolls.

Source: Vicol, Metz and Sohl-Dickstein (2021), "Unbiased gradient estimation in unrolled computation graphs with
persistent evolution strategies", arXiv:2112.13835, algorithm 2.

Differs from the paper: trajectories may end inside a window. A loss before the reset is weighted by the noise summed
since the previous reset, this window's included; a loss after it by this window's noise alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from meta_train.estimators import unroll
from meta_train.estimators.base import Estimate, Estimator
from meta_train.inner import Inner

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float


class State(NamedTuple):
    particles: Any  # [N, 2, ...] where theta has an influence, [N, ...] elsewhere
    xi: jax.Array  # [N, P] noise summed since the pair's last reset
    index: jax.Array  # [N] int32, global number of the pair


def gradient(
    before: Float[Array, " N"], after: Float[Array, " N"], xi: Float[Array, "N P"], eps: Float[Array, "N P"], std: Any
) -> Float[Array, " P"]:
    """Mean over pairs of the antithetic estimate.

    Args:
      before: L(+) - L(-) summed over the window's steps up to the first reset, that step included.
      after: the same over the steps after it.
      xi: noise summed over the earlier windows of the trajectory.
      eps: this window's noise.
      std: of the noise, () or [P].
    """
    weighted = before[:, None] * (xi + eps) + after[:, None] * eps
    return unroll.mean_of_pairs(weighted, std)


def next_noise(
    xi: Float[Array, "N P"], eps: Float[Array, "N P"], was_reset: Bool[Array, " N"], at_end: Bool[Array, " N"]
) -> Float[Array, "N P"]:
    """Noise that perturbs the trajectories that go on: since their last reset, none if that was the last step's."""
    summed = jnp.where(was_reset[:, None], eps, xi + eps)
    return jnp.where(at_end[:, None], 0.0, summed)


def pes(inner: Inner, *, pairs: int = 8, std: Any = 0.01, truncation: int = 50, sign: float = 0.0) -> Estimator:
    """Build the estimator.

    Args:
      inner: see `Inner`.
      pairs: N antithetic pairs of particles.
      std: of the perturbation of theta: a number, or a tree like theta of numbers.
      truncation: K inner steps a window.
      sign: where it is not 0, a pair's mean difference before a reset, and that after one, count as ± this much. Robust
        and no longer unbiased.

    Raises:
      ValueError: on an argument out of range.
    """
    unroll.require("pes", pairs=(pairs, pairs >= 1, ">= 1"), sign=(sign, sign >= 0, ">= 0"))
    unroll.positive("pes", "std", std)
    unroll.fits("pes", inner, truncation)

    def init(key: jax.Array, theta: Any) -> State:
        index = jnp.arange(pairs, dtype=jnp.int32)
        xi = jnp.zeros((pairs, ravel_pytree(theta)[0].size), jnp.float32)
        return State(unroll.reset(inner, unroll.fold(key, index), 2, first=True), xi, index)

    def estimate(key: jax.Array, theta: Any, state: State) -> tuple[Estimate, State]:
        scale = unroll.flat_std(std, theta)
        eps_keys, reset_keys, step_keys = unroll.split(unroll.fold(key, state.index), 3)
        eps = unroll.noise(eps_keys, scale, theta)
        thetas, fresh = unroll.antithetic(theta, eps), unroll.reset(inner, reset_keys, 2)
        seen = unroll.window(
            inner, thetas, state.particles, fresh, step_keys, steps=truncation, score=unroll.difference
        )
        before, after = (unroll.signed(part, sign * truncation) for part in (seen.before, seen.after))
        grad = gradient(before, after, state.xi, eps, scale) / truncation
        xi = next_noise(state.xi, eps, seen.was_reset, seen.at_end)
        return unroll.estimate(theta, grad, seen), State(seen.particles, xi, state.index)

    return Estimator(init, estimate, 2 * pairs * truncation)
