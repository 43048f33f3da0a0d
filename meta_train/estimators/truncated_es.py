"""Evolution strategies on truncated unrolls: little variance, blind to what theta did before the window.

Source: Vicol, Metz and Sohl-Dickstein (2021), arXiv:2112.13835, algorithm 1; meta-training by it: Metz et al. (2019),
"Understanding and correcting pathologies in the training of learned optimizers", arXiv:1810.10180.

Both signs start each window from one state, which goes on under the unperturbed theta: a third copy.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from meta_train.estimators import unroll
from meta_train.estimators.base import Estimate, Estimator
from meta_train.inner import Inner


class State(NamedTuple):
    particles: Any  # [N, ...] under the unperturbed theta
    index: jax.Array  # [N] int32, global number of the pair


def truncated_es(
    inner: Inner, *, pairs: int = 8, std: Any = 0.01, truncation: int = 50, sign: float = 0.0
) -> Estimator:
    """Build the estimator.

    Args:
      inner: see `Inner`.
      pairs: N antithetic pairs, each around a particle of its own.
      std: of the perturbation of theta: a number, or a tree like theta of numbers.
      truncation: K inner steps a window.
      sign: where it is not 0, a pair's mean difference over the window counts as ± this much.

    Raises:
      ValueError: on an argument out of range.
    """
    unroll.require("truncated_es", pairs=(pairs, pairs >= 1, ">= 1"), sign=(sign, sign >= 0, ">= 0"))
    unroll.positive("truncated_es", "std", std)
    unroll.fits("truncated_es", inner, truncation)

    def init(key: jax.Array, theta: Any) -> State:
        index = jnp.arange(pairs, dtype=jnp.int32)
        particles = unroll.reset(inner, unroll.fold(key, index), 1, first=True)
        return State(unroll.pick(inner, particles, 0), index)

    def estimate(key: jax.Array, theta: Any, state: State) -> tuple[Estimate, State]:
        scale = unroll.flat_std(std, theta)
        eps_keys, reset_keys, step_keys = unroll.split(unroll.fold(key, state.index), 3)
        eps = unroll.noise(eps_keys, scale, theta)
        seen = unroll.window(
            inner,
            unroll.antithetic(theta, eps, centre=True),
            unroll.repeat(inner, state.particles, 3),
            unroll.reset(inner, reset_keys, 3),
            step_keys,
            steps=truncation,
            score=unroll.difference,
        )
        delta = unroll.signed((seen.before + seen.after) / truncation, sign)
        grad = unroll.gradient(delta, eps, scale)
        return unroll.estimate(theta, grad, seen), State(unroll.pick(inner, seen.particles, 2), state.index)

    return Estimator(init, estimate, 3 * pairs * truncation)
