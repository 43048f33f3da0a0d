"""Adam-atan2: Adam without an epsilon, its quotient bounded by an arc tangent.

Source: Everett et al. (2024), arXiv:2407.05872, on epsilon. With m, v Adam's bias-corrected averages

    u = -lr · a · atan2(m, b · sqrt(v)),

a = b = 1 as printed there. Scaling all gradients by a constant changes nothing; an element without gradients stands
still.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lopt.baselines.base import Rate, decay, define, descend, per_tensor, rate
from lopt.baselines.of_optax import ADAM


class Moments(NamedTuple):
    m: jax.Array  # like p, average of gradients
    v: jax.Array  # like p, average of squared gradients


def adam_atan2(
    learning_rate: Rate, *, b1: Any = 0.9, b2: Any = 0.999, a: Any = 1.0, b: Any = 1.0, weight_decay: Any = 0.0
) -> optax.GradientTransformationExtraArgs:
    """Adam-atan2; a and b as above, weight_decay is decoupled."""

    def update(g: Any, s: Moments, p: Any, t: Any) -> tuple[Any, Moments]:
        m, v = b1 * s.m + (1 - b1) * g, b2 * s.v + (1 - b2) * g * g
        return a * jnp.arctan2(m / (1 - b1**t), b * jnp.sqrt(v / (1 - b2**t))), Moments(m, v)

    init = lambda p: Moments(jnp.zeros_like(p), jnp.zeros_like(p))  # noqa: E731
    return descend(per_tensor(init, update), learning_rate, weight_decay)


BASELINES = (
    define(
        "adam_atan2",
        adam_atan2,
        {"lr": rate(1e-3), "weight_decay": decay()} | ADAM,
        source="Everett et al. (2024), arXiv:2407.05872",
    ),
)
