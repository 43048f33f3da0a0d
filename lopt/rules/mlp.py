"""mlp: the plainest learned optimizer, an MLP on gradient, parameter, six momenta and the time.

Source: Metz et al. (2022), "Practical tradeoffs between memory, compute, and performance in learned optimizers",
arXiv:2203.11860 (the MLP baseline of the family).

Differs from the paper: `weight_decay` is decoupled and multiplied by `lr`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lopt import features as F
from lopt.base import LearnedOptimizer, positive
from lopt.transform import Arithmetic, define, per_leaf

MOMENTA = 6
INPUTS = 2 + MOMENTA  # per element; 11 time features are added


class Theta(NamedTuple):
    mlp: tuple[F.Layer, ...]


def mlp(
    *,
    hidden: int = 32,
    step_mult: float = 1e-3,
    exp_mult: float = 1e-3,
    momenta: tuple[float, ...] = (0.1, 0.5, 0.9, 0.99, 0.999, 0.9999),
) -> LearnedOptimizer:
    """Build the rule.

    Args:
      hidden: width of both hidden layers (32: 1,762 meta-parameters).
      step_mult: size of a step of direction 1.
      exp_mult: scale of the magnitude output inside its exponential.
      momenta: decays of the six momenta.

    Raises:
      ValueError: on an argument out of range.
    """
    positive("mlp", hidden=hidden, step_mult=step_mult)
    decays = F.decays("mlp", momenta, 0.0, momenta, MOMENTA).m

    def init_theta(key: jax.Array) -> Theta:
        return Theta(F.init_mlp(key, (INPUTS + len(F.TIME_SCALES), hidden, hidden, 2)))

    def init_leaf(leaf, p):
        return jnp.zeros((MOMENTA, *p.shape), p.dtype)

    def arithmetic(theta: Theta) -> Arithmetic:
        def update_leaf(leaf, g, averages, p, told):
            averages = F.ema(averages, g, decays)
            xs = [g, p, *averages]
            xs = [x * s for x, s in zip(xs, F.rms_scales(xs, 1e-5), strict=True)]
            direction, magnitude = F.mlp(theta.mlp, xs, g.shape, F.time_features(told.count))
            return direction * jnp.exp(magnitude * exp_mult) * step_mult, averages

        return Arithmetic(init_leaf, per_leaf(update_leaf))

    settings = {"hidden": hidden, "step_mult": step_mult, "exp_mult": exp_mult, "momenta": decays}
    return define("mlp", settings, init_theta, arithmetic)
