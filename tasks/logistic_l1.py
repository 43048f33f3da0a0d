"""Logistic regression with an l1 penalty, deterministic.

Source: Koh, Kim & Boyd (2007), JMLR 8; instances as in Liu et al. (2023), arXiv:2305.18577.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from tasks import certified
from tasks.base import Task
from tasks.space import Choice, LogInt
from tasks.sparse import linear_model

SPACE = {
    "rows": LogInt(50, 500),
    "columns": LogInt(16, 64),
    "nonzeros": LogInt(2, 12),
    "shift": Choice(((0.0, 0.0), (0.0, 0.3))),
    "log10_strength": Choice(((-1.0, -1.0), (-2.0, -1.0))),
}


def logistic_l1(
    *,
    rows: int = 100,
    columns: int = 20,
    nonzeros: int = 8,
    shift: Sequence[float] = (0.0, 0.0),
    log10_strength: Sequence[float] = (-1.0, -1.0),
    noise: float = 0.0,
) -> Task:
    """Mean of log(1 + exp(W x)) - b · W x, plus strength · Σ |x|, from 0; an instance a phi.

    Args:
      rows: m, examples; W is (1 - u) · normal + u.
      columns: n.
      nonzeros: of the x* whose signs of W x* are the labels b.
      shift: range of u.
      log10_strength: range of the strength's log10; phi draws from both uniformly.
      noise: standard deviation of the gradient's noise along each axis; validation and test have none.

    Raises ValueError for an invalid setting, naming the valid ones.
    """

    def smooth(phi, x):
        z = phi.W @ x
        return jnp.mean(jnp.logaddexp(0.0, z) - phi.b * z)

    return linear_model(
        "logistic_l1",
        smooth,
        lambda z: (z >= 0).astype(jnp.float32),
        0.25 / max(rows, 1),
        rows=rows,
        columns=columns,
        nonzeros=nonzeros,
        magnitude=(1.0, 1.0),
        shift=shift,
        log10_strength=log10_strength,
        noise=noise,
        unit_columns=False,
        init_loss=math.log(2),
    )


def optimum(phi: Any) -> certified.Optimum:
    """Certified optima of instances, phi with a leading axis."""
    return certified.minimum(certified.LOGISTIC, phi.W, phi.b, phi.strength)
