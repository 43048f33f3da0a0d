"""hand_celo2: the control of the learned rules, a direction of fixed size times a cosine, with nothing learned.

Source: ours; what remains of a Celo2-like rule (Moudgil et al. 2026, arXiv:2602.19142) when its network is replaced by
momentum over root second moment. With a_t = m_t / sqrt(v_t), both bias-corrected, for each tensor

    u_t = -lr · ½(1 + cos(π t/T)) · max(rms(p), floor) · a_t / rms(a_t),   T = num_steps, t from 0.

A learned rule has to beat it: much of what such rules gain comes from this harness. Its one hyper-parameter, lr, is to
be tuned once over all tasks and not for each.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lopt.baselines.base import Rate, Space, define, descend, per_tensor


class Moments(NamedTuple):
    m: jax.Array  # like p, average of gradients
    v: jax.Array  # like p, average of squared gradients


def hand_celo2(
    learning_rate: Rate, *, num_steps: Any, b1: Any = 0.9, b2: Any = 0.98, floor: Any = 0.02, eps: float = 1e-30
) -> optax.GradientTransformationExtraArgs:
    """The control.

    Args:
      learning_rate: relative step at the start: root mean square of the step over that of the tensor.
      num_steps: T, updates; integer, possibly traced. Past it the step is 0.
      b1: decay of m.
      b2: decay of v.
      floor: least root mean square a tensor is taken to have.
      eps: added to v, so that an element without gradients does not move.

    Raises:
      ValueError: if num_steps is None.
    """
    if num_steps is None:
        raise ValueError("hand_celo2: num_steps, got None; valid: the horizon in updates.")

    def update(g: Any, s: Moments, p: Any, t: Any) -> tuple[Any, Moments]:
        m, v = b1 * s.m + (1 - b1) * g, b2 * s.v + (1 - b2) * g * g
        a = m / (1 - b1**t) * jax.lax.rsqrt(v / (1 - b2**t) + eps)
        size = jnp.sqrt(jnp.mean(a * a))
        fraction = jnp.minimum((t - 1) / jnp.maximum(num_steps, 1), 1.0)
        length = jnp.maximum(jnp.sqrt(jnp.mean(p * p)), floor) * 0.5 * (1 + jnp.cos(jnp.pi * fraction))
        return length * a / jnp.where(size > 0, size, 1.0), Moments(m, v)

    return descend(per_tensor(lambda p: Moments(jnp.zeros_like(p), jnp.zeros_like(p)), update), learning_rate)


BASELINES = (
    define(
        "hand_celo2",
        hand_celo2,
        {"lr": Space(10**-3.5, 10**-0.5, True, 0.01)},
        horizon=True,
        schedules=("constant",),
        source="ours, after Moudgil et al. (2026), arXiv:2602.19142",
        notes="the control: its cosine is inside; tune lr once over all tasks",
    ),
)
