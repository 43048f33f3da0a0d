"""Evolution strategies on whole episodes: unbiased, and one meta-step takes as long as the longest inner run.

Source: Salimans et al. (2017), "Evolution strategies as a scalable alternative to reinforcement learning",
arXiv:1703.03864, with antithetic pairs; as VeLO was meta-trained, by the sign of the difference: Metz et al. (2022),
arXiv:2211.09760.

Each episode counts the same here; in the truncated estimators each inner step does. Where horizons vary these are two
objectives.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from meta_train.estimators import unroll
from meta_train.estimators.base import Estimate, Estimator
from meta_train.inner import Inner


class State(NamedTuple):
    index: jax.Array  # [N] int32, global number of the pair


def full_es(inner: Inner, *, pairs: int = 8, std: Any = 0.01, sign: float = 0.0) -> Estimator:
    """Build the estimator.

    Args:
      inner: see `Inner`.
      pairs: N antithetic pairs of particles, fresh in each estimate.
      std: of the perturbation of theta: a number, or a tree like theta of numbers.
      sign: where it is not 0, a pair's mean difference counts as ± this much.

    Raises:
      ValueError: on an argument out of range.
    """
    unroll.require("full_es", pairs=(pairs, pairs >= 1, ">= 1"), sign=(sign, sign >= 0, ">= 0"))
    unroll.positive("full_es", "std", std)

    def init(key: jax.Array, theta: Any) -> State:
        return State(jnp.arange(pairs, dtype=jnp.int32))

    def estimate(key: jax.Array, theta: Any, state: State) -> tuple[Estimate, State]:
        scale = unroll.flat_std(std, theta)
        eps_keys, reset_keys, step_keys = unroll.split(unroll.fold(key, state.index), 3)
        eps = unroll.noise(eps_keys, scale, theta)
        particles = unroll.reset(inner, reset_keys, 2)
        seen = unroll.episode(inner, unroll.antithetic(theta, eps), particles, step_keys, score=unroll.difference)
        grad = unroll.gradient(unroll.signed(seen.score, sign), eps, scale)
        ended = jnp.full((), len(state.index), jnp.int32)
        lost = unroll.untold(seen.diverged, seen.score).sum(dtype=jnp.int32)
        counts = seen.diverged.sum(), ended, seen.updates, lost
        return Estimate(ravel_pytree(theta)[1](grad), seen.loss, *counts), state

    return Estimator(init, estimate, 2 * pairs * inner.longest)
