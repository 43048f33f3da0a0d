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
from lopt.transform import Arithmetic, define

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
        def update(tensor, common, own):
            theta, told = common

            def features(g, p, momenta, _):
                momenta = F.ema(momenta, g, decays)
                return [g, p, *momenta], momenta

            def direction(g, p, momenta, _):
                xs, momenta = features(g, p, momenta, _)
                direction, magnitude = F.mlp(theta.mlp, xs, scales, g.shape, F.time_features(told.count))
                return direction * jnp.exp(magnitude * exp_mult) * step_mult, momenta

            scales = F.rms_scales(tensor, lambda *block: features(*block)[0], None, 1e-5)
            return tensor.move(direction, tensor.state)

        return Arithmetic(init_leaf, update, theta)

    settings = {"hidden": hidden, "step_mult": step_mult, "exp_mult": exp_mult, "momenta": decays}
    return define("mlp", settings, init_theta, arithmetic)
