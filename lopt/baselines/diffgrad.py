"""diffGrad: Adam slowed down where the gradient hardly changes.

Source: Dubey, Chakraborty, Roy, Mukherjee, Singh & Chaudhuri (2019), arXiv:1909.11015. With Adam's m̂ and v̂

    ξ = 1 / (1 + exp(-|g_last - g|)),   u = -lr · ξ · m̂ / (sqrt(v̂) + ε),   g_last = 0 before the first update.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lopt.baselines.base import Rate, decay, define, descend, per_tensor, rate
from lopt.baselines.of_optax import ADAM


class State(NamedTuple):
    m: jax.Array  # like p, average of gradients
    v: jax.Array  # like p, average of squared gradients
    last: jax.Array  # like p, the gradient before


def diffgrad(
    learning_rate: Rate, *, b1: Any = 0.9, b2: Any = 0.999, eps: Any = 1e-8, weight_decay: Any = 0.0
) -> optax.GradientTransformationExtraArgs:
    """diffGrad; b1, b2 and eps are Adam's, weight_decay is decoupled."""

    def update(g: Any, s: State, p: Any, t: Any) -> tuple[Any, State]:
        m, v = b1 * s.m + (1 - b1) * g, b2 * s.v + (1 - b2) * g * g
        friction = jax.nn.sigmoid(jnp.abs(s.last - g))
        return friction * m / (1 - b1**t) / (jnp.sqrt(v / (1 - b2**t)) + eps), State(m, v, g)

    return descend(per_tensor(lambda p: State(*[jnp.zeros_like(p)] * 3), update), learning_rate, weight_decay)


BASELINES = (
    define(
        "diffgrad",
        diffgrad,
        {"lr": rate(1e-3), "weight_decay": decay()} | ADAM,
        source="Dubey et al. (2019), arXiv:1909.11015",
    ),
)
