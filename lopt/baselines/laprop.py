"""LaProp: Adam that normalises before it averages.

Source: Ziyin, Wang & Ueda (2020), arXiv:2002.04839, Algorithm 1.

    v ← ν v + (1-ν) g²;  m ← μ m + (1-μ) g / (sqrt(v / (1-ν^t)) + ε);  u = -lr · m / (1-μ^t)

Differs from the paper: its learning rate is inside the average, which is the same while it is constant.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lopt.baselines.base import Rate, decay, define, descend, per_tensor, rate
from lopt.baselines.of_optax import ADAM


class Moments(NamedTuple):
    m: jax.Array  # like p, average of normalised gradients
    v: jax.Array  # like p, average of squared gradients


def laprop(
    learning_rate: Rate, *, b1: Any = 0.9, b2: Any = 0.999, eps: Any = 1e-15, weight_decay: Any = 0.0
) -> optax.GradientTransformationExtraArgs:
    """LaProp; b1 is μ, b2 is ν, eps is added to the root of v, weight_decay is decoupled."""

    def update(g: Any, s: Moments, p: Any, t: Any) -> tuple[Any, Moments]:
        v = b2 * s.v + (1 - b2) * g * g
        m = b1 * s.m + (1 - b1) * g / (jnp.sqrt(v / (1 - b2**t)) + eps)
        return m / (1 - b1**t), Moments(m, v)

    init = lambda p: Moments(jnp.zeros_like(p), jnp.zeros_like(p))  # noqa: E731
    return descend(per_tensor(init, update), learning_rate, weight_decay)


BASELINES = (
    define(
        "laprop",
        laprop,
        {"lr": rate(4e-4), "weight_decay": decay()} | ADAM,
        source="Ziyin et al. (2020), arXiv:2002.04839",
        notes="lr outside the average, in the paper inside",
    ),
)
