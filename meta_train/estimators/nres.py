"""Noise-reuse evolution strategies: one perturbation an episode, the same in each of its windows.

Source: Li, Harrison, Sohl-Dickstein, Smith and Metz (2023), "Variance-reduced gradient estimation via noise-reuse in
online evolution strategies", arXiv:2304.12180, algorithm 2. With particles in step it is ES-Single: Vicol (2023),
"Low-variance gradient estimation in unrolled computation graphs with ES-Single", arXiv:2304.11153.

Differs from the papers: trajectories may end inside a window; the next one then begins with its own perturbation at
that step, and its losses are weighted by it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from meta_train.estimators import unroll
from meta_train.estimators.base import Estimate, Estimator
from meta_train.inner import Inner

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float


class State(NamedTuple):
    particles: Any  # [N, 2, ...] where theta has an influence, [N, ...] elsewhere
    eps: jax.Array  # [N, P] noise of the pair's episode
    index: jax.Array  # [N] int32, global number of the pair


def gradient(
    before: Float[Array, " N"],
    after: Float[Array, " N"],
    eps: Float[Array, "N P"],
    renewed: Float[Array, "N P"],
    std: Any,
) -> Float[Array, " P"]:
    """Mean over pairs of the antithetic estimate.

    Args:
      before: L(+) - L(-) summed over the window's steps up to the first reset, that step included.
      after: the same over the steps after it.
      eps: noise of the episode that the window begins in.
      renewed: noise of the episodes that begin inside it.
      std: of the noise, () or [P].
    """
    weighted = before[:, None] * eps + after[:, None] * renewed
    return unroll.mean_of_pairs(weighted, std)


def next_noise(
    eps: Float[Array, "N P"], renewed: Float[Array, "N P"], was_reset: Bool[Array, " N"]
) -> Float[Array, "N P"]:
    """Noise of the episodes that go on."""
    return jnp.where(was_reset[:, None], renewed, eps)


def nres(inner: Inner, *, pairs: int = 8, std: Any = 0.01, truncation: int = 50, sign: float = 0.0) -> Estimator:
    """Build the estimator.

    Args:
      inner: see `Inner`.
      pairs: N antithetic pairs of particles.
      std: of the perturbation of theta: a number, or a tree like theta of numbers. A new one takes hold at resets.
      truncation: K inner steps a window.
      sign: where it is not 0, a pair's mean difference before a reset, and that after one, count as ± this much. Robust
        and no longer unbiased.

    Raises:
      ValueError: on an argument out of range.
    """
    unroll.require("nres", pairs=(pairs, pairs >= 1, ">= 1"), sign=(sign, sign >= 0, ">= 0"))
    unroll.positive("nres", "std", std)
    unroll.fits("nres", inner, truncation)

    def init(key: jax.Array, theta: Any) -> State:
        index = jnp.arange(pairs, dtype=jnp.int32)
        eps_keys, reset_keys = unroll.split(unroll.fold(key, index), 2)
        eps = unroll.noise(eps_keys, unroll.flat_std(std, theta), theta)
        return State(unroll.reset(inner, reset_keys, 2, first=True), eps, index)

    def estimate(key: jax.Array, theta: Any, state: State) -> tuple[Estimate, State]:
        scale = unroll.flat_std(std, theta)
        eps_keys, reset_keys, step_keys = unroll.split(unroll.fold(key, state.index), 3)
        renewed = unroll.noise(eps_keys, scale, theta)
        seen = unroll.window(
            inner,
            unroll.antithetic(theta, state.eps),
            state.particles,
            unroll.reset(inner, reset_keys, 2),
            step_keys,
            steps=truncation,
            score=unroll.difference,
            renewed=unroll.antithetic(theta, renewed),
        )
        before, after = (unroll.signed(part, sign * truncation) for part in (seen.before, seen.after))
        grad = gradient(before, after, state.eps, renewed, scale) / truncation
        eps = next_noise(state.eps, renewed, seen.was_reset)
        return unroll.estimate(theta, grad, seen), State(seen.particles, eps, state.index)

    return Estimator(init, estimate, 2 * pairs * truncation)
