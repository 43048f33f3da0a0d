"""AdaMuon: Muon's orthogonal direction, divided elementwise by its own root second moment.

Source: Si, Zhang & Shen (2025), arXiv:2507.11005, Algorithm 1. For a matrix

    M ← β1 M + (1-β1) G;  O = NewtonSchulz(sign(M));  V ← β2 V + (1-β2) O²;  D = O / (sqrt(V) + ε);
    u = -lr · 0.2 · sqrt(rows · columns) / |D|_F · D,

so that the step's root mean square is .2 lr, as Adam's usually is. `signed=False` leaves the sign out, as the paper's
first version does. Differs from the authors' code: no Nesterov step, which the paper does not have.

Tensors of rank 0 and 1 get Adam at the same lr; those of rank above 2 are matrices [product of the other axes, last].
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lopt.baselines.base import Rate, average, decay, define, descend, per_tensor, rate

QUINTIC = (3.4445, -4.7750, 2.0315)  # Jordan et al. (2024)
STEPS = 5
RMS = 0.2


class Moments(NamedTuple):
    m: jax.Array  # like p, average of gradients
    v: jax.Array  # like p, average of squared orthogonal directions (of squared gradients in Adam's tensors)


def adamuon(
    learning_rate: Rate,
    *,
    b1: Any = 0.95,
    b2: Any = 0.95,
    adam_b1: Any = 0.9,
    adam_b2: Any = 0.999,
    eps: Any = 1e-8,
    weight_decay: Any = 0.0,
    signed: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """AdaMuon.

    Args:
      learning_rate: as Adam's.
      b1: decay of the momentum of matrices.
      b2: decay of their second moment.
      adam_b1: b1 of the other tensors.
      adam_b2: b2 of the other tensors.
      eps: added to the root of the second moment.
      weight_decay: decoupled.
      signed: orthogonalise the sign of the momentum and not the momentum.
    """

    def adam(g: Any, s: Moments, t: Any) -> tuple[Any, Moments]:
        m, v = adam_b1 * s.m + (1 - adam_b1) * g, adam_b2 * s.v + (1 - adam_b2) * g * g
        return m / (1 - adam_b1**t) / (jnp.sqrt(v / (1 - adam_b2**t)) + eps), Moments(m, v)

    def update(g: Any, s: Moments, p: Any, t: Any) -> tuple[Any, Moments]:
        if g.ndim < 2:
            return adam(g, s, t)
        m = b1 * s.m + (1 - b1) * g
        matrix = m.reshape(-1, g.shape[-1])
        o = orthogonal(jnp.sign(matrix) if signed else matrix).reshape(g.shape)
        v = b2 * s.v + (1 - b2) * o * o
        d = o / (jnp.sqrt(v / (1 - b2**t)) + eps)
        size = jnp.sqrt(jnp.sum(d * d))
        return RMS * math.sqrt(g.size) / jnp.where(size > 0, size, 1.0) * d, Moments(m, v)

    init = lambda p: Moments(jnp.zeros_like(p), jnp.zeros_like(p))  # noqa: E731
    return descend(per_tensor(init, update), learning_rate, weight_decay)


def orthogonal(x: Any) -> Any:
    """Singular values brought to about 1 by STEPS of the quintic Newton–Schulz iteration. [r, c]"""
    a, b, c = QUINTIC
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / jnp.maximum(jnp.sqrt(jnp.sum(x * x)), 1e-7)
    for _ in range(STEPS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


BASELINES = (
    define(
        "adamuon",
        adamuon,
        {"lr": rate(1e-3), "b1": average(0.95), "b2": average(0.95), "weight_decay": decay()},
        source="Si et al. (2025), arXiv:2507.11005",
        notes="matrices only; tensors of rank 0 and 1 get Adam at the same lr",
    ),
)
