"""EXAdam: Adam with averages that correct each other's start, and an extra gradient.

Source: Adly (2024), arXiv:2412.20302, Algorithm 1. With Adam's averages m, v

    m̃ = m/(1-β1^t) · (1 + v/(v+ε) β2^t),   g̃ = g/(1-β1^t) · (1 + v/(v+ε) β2^t),
    ṽ = v/(1-β2^t) · (1 + m²/(m²+ε) β1^t),   u = -lr (m̃ + g̃) / (sqrt(ṽ) + ε).

The logarithmic growth of the step size that the first version of the paper had is left out, as in its second.
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


def exadam(
    learning_rate: Rate, *, b1: Any = 0.9, b2: Any = 0.999, eps: Any = 1e-8, weight_decay: Any = 0.0
) -> optax.GradientTransformationExtraArgs:
    """EXAdam; b1, b2 and eps are Adam's, weight_decay is decoupled."""

    def update(g: Any, s: Moments, p: Any, t: Any) -> tuple[Any, Moments]:
        m, v = b1 * s.m + (1 - b1) * g, b2 * s.v + (1 - b2) * g * g
        early, late = 1 + v / (v + eps) * b2**t, 1 + m * m / (m * m + eps) * b1**t
        denominator = jnp.sqrt(v / (1 - b2**t) * late) + eps
        return (m + g) / (1 - b1**t) * early / denominator, Moments(m, v)

    init = lambda p: Moments(jnp.zeros_like(p), jnp.zeros_like(p))  # noqa: E731
    return descend(per_tensor(init, update), learning_rate, weight_decay)


BASELINES = (
    define(
        "exadam",
        exadam,
        {"lr": rate(1e-3), "weight_decay": decay()} | ADAM,
        source="Adly (2024), arXiv:2412.20302",
        notes="without the first version's logarithmic growth of the step size",
    ),
)
