"""CAME: Adafactor with a momentum that is trusted where it agrees with the present step.

Source: Luo, Ren, Zheng, Jiang, Jiang & You (2023), arXiv:2307.02047, Algorithm 2. For a tensor [..., n, m]

    r ← β2 r + (1-β2) mean_m(g² + ε1),  c likewise over n;   û = g / sqrt(r c / mean(r));   û ← û / max(1, rms(û)/d)
    m ← β1 m + (1-β1) û;   the same factors R, C, with β3, of (û - m)² + ε2;   u = -lr · m / sqrt(R C / mean(R)).

As in the authors' code, vectors keep a whole second moment and have no confidence. Averages start at 0 without bias
correction; the clipping at d takes care of the first steps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lopt.baselines.base import Rate, average, decay, define, descend, per_tensor, rate


class State(NamedTuple):
    m: jax.Array  # like p, average of normalised gradients
    moments: tuple[jax.Array, ...]  # ([..., n], [..., m]) averages of squared gradients; of vectors one, like p
    doubts: tuple[jax.Array, ...]  # the same of squared differences from m; of vectors none


def came(
    learning_rate: Rate,
    *,
    b1: Any = 0.9,
    b2: Any = 0.999,
    b3: Any = 0.9999,
    clip: Any = 1.0,
    eps1: Any = 1e-30,
    eps2: Any = 1e-16,
    weight_decay: Any = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """CAME.

    Args:
      learning_rate: as Adam's.
      b1: decay of m.
      b2: decay of the second moment's factors.
      b3: decay of the confidence's factors.
      clip: d, greatest root mean square of a normalised gradient.
      eps1: added to squared gradients.
      eps2: added to squared differences.
      weight_decay: decoupled.
    """

    def init(p: Any) -> State:
        factors = (jnp.zeros_like(p.sum(-1)), jnp.zeros_like(p.sum(-2))) if p.ndim > 1 else ()
        return State(jnp.zeros_like(p), factors or (jnp.zeros_like(p),), factors)

    def update(g: Any, s: State, p: Any, t: Any) -> tuple[Any, State]:
        moments = averaged(s.moments, g * g + eps1, b2)
        step = g * inverse_root(moments)
        step = step / jnp.maximum(jnp.sqrt(jnp.mean(step * step)) / clip, 1.0)
        m = b1 * s.m + (1 - b1) * step
        if g.ndim < 2:
            return m, State(m, moments, ())
        doubts = averaged(s.doubts, (step - m) ** 2 + eps2, b3)
        return m * inverse_root(doubts), State(m, moments, doubts)

    return descend(per_tensor(init, update), learning_rate, weight_decay)


def averaged(factors: tuple[Any, ...], x: Any, b: Any) -> tuple[Any, ...]:
    """Averages of x, whole or over its last axis and its last but one."""
    parts = (x,) if len(factors) == 1 else (x.mean(-1), x.mean(-2))
    return tuple(b * old + (1 - b) * new for old, new in zip(factors, parts, strict=True))


def inverse_root(factors: tuple[Any, ...]) -> Any:
    """1 / sqrt of a second moment, from its factors."""
    if len(factors) == 1:
        return jax.lax.rsqrt(factors[0])
    rows, columns = factors
    rows = jax.lax.rsqrt(rows / rows.mean(-1, keepdims=True))
    return rows[..., :, None] * jax.lax.rsqrt(columns)[..., None, :]


BASELINES = (
    define(
        "came",
        came,
        {"lr": rate(2e-4), "b1": average(0.9), "b2": average(0.999), "b3": average(0.9999), "weight_decay": decay()},
        source="Luo et al. (2023), arXiv:2307.02047",
    ),
)
