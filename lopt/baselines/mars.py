"""MARS-AdamW: Adam of a gradient whose variance is reduced by the one before.

Source: Yuan, Liu, Wu, Zhou & Gu (2024), arXiv:2411.10438, Algorithm 2 in its approximate form (the last gradient, on
the last batch, takes the place of one on this batch). For a tensor of rank >= 2

    c = g + γ β1/(1-β1) (g - g_last);  c ← c / max(|c|, 1);  m, v: Adam's averages of c and c².

As in the authors' code: tensors of rank 0 and 1 get AdamW with decays (.9, .95); g_last is 0 before the first update.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lopt.baselines.base import Rate, Space, average, decay, define, descend, per_tensor, rate


class State(NamedTuple):
    m: jax.Array  # like p, average of corrected gradients
    v: jax.Array  # like p, average of their squares
    last: jax.Array  # like p, the gradient before


def mars(
    learning_rate: Rate,
    *,
    b1: Any = 0.95,
    b2: Any = 0.99,
    gamma: Any = 0.025,
    vector_b1: Any = 0.9,
    vector_b2: Any = 0.95,
    eps: Any = 1e-8,
    weight_decay: Any = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """MARS-AdamW.

    Args:
      learning_rate: as AdamW's.
      b1: decay of m.
      b2: decay of v.
      gamma: share of the correction.
      vector_b1: b1 of tensors of rank 0 and 1.
      vector_b2: b2 of tensors of rank 0 and 1.
      eps: added to the root of v.
      weight_decay: decoupled.
    """

    def update(g: Any, s: State, p: Any, t: Any) -> tuple[Any, State]:
        c, d1, d2 = g, vector_b1, vector_b2
        if g.ndim > 1:
            d1, d2 = b1, b2
            c = g + gamma * b1 / (1 - b1) * (g - s.last)
            c = c / jnp.maximum(jnp.sqrt(jnp.sum(c * c)), 1.0)
        m, v = d1 * s.m + (1 - d1) * c, d2 * s.v + (1 - d2) * c * c
        return m / (1 - d1**t) / (jnp.sqrt(v / (1 - d2**t)) + eps), State(m, v, g)

    return descend(per_tensor(lambda p: State(*[jnp.zeros_like(p)] * 3), update), learning_rate, weight_decay)


BASELINES = (
    define(
        "mars",
        mars,
        {
            "lr": rate(3e-3),
            "b1": average(0.95),
            "b2": average(0.99),
            "gamma": Space(0.005, 0.1, True, 0.025),
            "weight_decay": decay(),
        },
        source="Yuan et al. (2024), arXiv:2411.10438",
        notes="the approximate form; tensors of rank 0 and 1 get AdamW",
    ),
)
