"""What every estimator returns, and how estimates of different devices become one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax


class Estimate(NamedTuple):
    grad: Any  # like theta, of the mean meta-loss of an inner step
    loss: jax.Array  # () mean meta-loss over particles and inner steps
    diverged: jax.Array  # () int32, trajectories that diverged in this window
    resets: jax.Array  # () int32, particles (pairs) that were reset in this window, divergence included
    steps: jax.Array  # () int32, inner updates that count: of all copies, of an episode those until its horizon
    # () int32, particles that backprop has no finite gradient of, or that diverged before theta made a difference. They
    # count as 0 in the mean: where all are lost it is 0 and means nothing.
    lost: jax.Array | np.int32 = np.int32(0)

    @property
    def norm(self) -> jax.Array:
        """() Euclidean norm of the gradient."""
        return optax.tree.norm(self.grad)

    def across(self, axis: str) -> Estimate:
        """The estimate over all devices of a mapped axis, each holding the same number of particles."""
        mean, total = (lambda x: jax.lax.pmean(x, axis)), (lambda x: jax.lax.psum(x, axis))
        counts = total((self.diverged, self.resets, self.steps, self.lost))
        return Estimate(jax.tree.map(mean, self.grad), mean(self.loss), *counts)


class Estimator(NamedTuple):
    """`init(key, theta) -> state` and `estimate(key, theta, state) -> (Estimate, state)`.

    Every array of the state has the particles as its leading axis, so that it can be sharded; a particle's
    randomness comes from its global index in the state and from the key, not from where it lives.
    """

    init: Callable[[jax.Array, Any], Any]
    estimate: Callable[[jax.Array, Any, Any], tuple[Estimate, Any]]
    inner_steps: int  # the most inner updates of one estimate, all copies of all particles
