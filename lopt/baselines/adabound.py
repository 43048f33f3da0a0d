"""AdaBound: Adam whose elementwise step sizes are clipped to bounds that close in on SGD's.

Source: Luo, Xiong, Liu & Sun (2019), arXiv:1902.09843, Algorithm 2 with bias correction as in the authors' code.

    η = clip( lr · sqrt(1-β2^t) / (1-β1^t) / (sqrt(v) + ε),  f (1 - 1/(γt + 1)),  f (1 + 1/(γt)) ),   u = -η m

f = final_lr times the schedule's factor, lr(t) / lr. As in the code, and unlike the analysis, there is no 1/sqrt(t).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lopt.baselines.base import Rate, Space, at, define, descend, per_tensor, rate
from lopt.baselines.of_optax import ADAM


class Moments(NamedTuple):
    m: jax.Array  # like p, average of gradients
    v: jax.Array  # like p, average of squared gradients


def adabound(
    learning_rate: Rate,
    *,
    peak_lr: Any = None,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    final_lr: Any = 0.1,
    gamma: Any = 1e-3,
) -> optax.GradientTransformationExtraArgs:
    """AdaBound.

    Args:
      learning_rate: as Adam's.
      peak_lr: the learning rate whose schedule's factor is 1; None: that of the first update.
      b1: decay of m.
      b2: decay of v.
      eps: added to the root of v.
      final_lr: of the SGD it ends as.
      gamma: speed of the bounds, per update.
    """

    def update(g: Any, s: Moments, p: Any, t: Any) -> tuple[Any, Moments]:
        m, v = b1 * s.m + (1 - b1) * g, b2 * s.v + (1 - b2) * g * g
        lr = at(learning_rate, t - 1)
        final = final_lr * lr / (at(learning_rate, 0) if peak_lr is None else peak_lr)
        step = lr * jnp.sqrt(1 - b2**t) / (1 - b1**t) / (jnp.sqrt(v) + eps)
        low, high = final * (1 - 1 / (gamma * t + 1)), final * (1 + 1 / (gamma * t))
        return jnp.clip(step, low, high) * m, Moments(m, v)

    return descend(per_tensor(lambda p: Moments(jnp.zeros_like(p), jnp.zeros_like(p)), update), 1.0)


BASELINES = (
    define(
        "adabound",
        adabound,
        {"lr": rate(1e-3), "final_lr": Space(1e-2, 1.0, True, 0.1), "gamma": Space(1e-4, 1e-2, True, 1e-3)} | ADAM,
        peak=True,
        source="Luo et al. (2019), arXiv:1902.09843",
    ),
)
