"""AdamP: Adam that takes the radial part out of steps of scale-invariant weights.

Source: Heo et al. (2020), arXiv:2006.08217, Algorithm 2. For a tensor of rank >= 2, first seen as one vector
per output channel and, should that fail, as one vector: if the greatest |cos(g, p)| is below δ / sqrt(vector's length),
the step loses its part along p and the decay is `decay_ratio` of what it is elsewhere.

Differs from the paper: nothing. Output channels are the last axis here, [in, out] and HWIO.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lopt.baselines.base import Rate, Space, decay, define, descend, per_tensor, rate
from lopt.baselines.of_optax import ADAM


class Moments(NamedTuple):
    m: jax.Array  # like p, average of gradients
    v: jax.Array  # like p, average of squared gradients


def adamp(
    learning_rate: Rate,
    *,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    delta: Any = 0.1,
    decay_ratio: Any = 0.1,
    weight_decay: Any = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """AdamP.

    Args:
      learning_rate: as Adam's.
      b1: decay of m.
      b2: decay of v.
      eps: added to the root of v, and to norms.
      delta: δ, how near to orthogonal a scale-invariant weight's gradient is.
      decay_ratio: weight decay of scale-invariant weights, relative.
      weight_decay: decoupled.
    """

    def update(g: Any, s: Moments, p: Any, t: Any) -> tuple[Any, Moments]:
        m, v = b1 * s.m + (1 - b1) * g, b2 * s.v + (1 - b2) * g * g
        direction, ratio = m / (1 - b1**t) / (jnp.sqrt(v / (1 - b2**t)) + eps), 1.0
        if g.ndim > 1:
            direction, ratio = projected(p, g, direction)
        return direction + weight_decay * ratio * p, Moments(m, v)

    def projected(p: Any, g: Any, direction: Any) -> tuple[Any, Any]:
        channel, layer = tuple(range(p.ndim - 1)), tuple(range(p.ndim))
        by_channel = invariant(p, g, channel)
        either = by_channel | invariant(p, g, layer)
        radial = jnp.where(by_channel, along(p, direction, channel), along(p, direction, layer))
        return direction - jnp.where(either, radial, 0.0), jnp.where(either, decay_ratio, 1.0)

    def invariant(p: Any, g: Any, axes: tuple[int, ...]) -> Any:
        dot, size = jnp.sum(p * g, axes), jnp.sqrt(jnp.sum(p * p, axes) * jnp.sum(g * g, axes))
        length = math.prod(p.shape[k] for k in axes)
        return jnp.max(jnp.abs(dot) / jnp.maximum(size, eps)) < delta / math.sqrt(length)

    def along(p: Any, direction: Any, axes: tuple[int, ...]) -> Any:
        unit = p / (jnp.sqrt(jnp.sum(p * p, axes, keepdims=True)) + eps)
        return unit * jnp.sum(unit * direction, axes, keepdims=True)

    return descend(per_tensor(lambda p: Moments(jnp.zeros_like(p), jnp.zeros_like(p)), update), learning_rate)


BASELINES = (
    define(
        "adamp",
        adamp,
        {"lr": rate(1e-3), "delta": Space(0.01, 1.0, True, 0.1), "weight_decay": decay()} | ADAM,
        source="Heo et al. (2020), arXiv:2006.08217",
    ),
)
