"""LASSO: least squares with an l1 penalty.

Source: Tibshirani (1996), doi:10.1111/j.2517-6161.1996.tb02080.x; instances as in Liu et al. (2023), arXiv:2305.18577.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from tasks import certified
from tasks.base import Task
from tasks.space import Choice, LogInt
from tasks.sparse import linear_model

SPACE = {
    "rows": LogInt(16, 64),
    "columns": LogInt(16, 128),
    "nonzeros": LogInt(2, 12),
    "shift": Choice(((0.0, 0.0), (0.0, 0.3))),
    "log10_strength": Choice(((-1.0, -1.0), (-2.0, -1.0))),
}


def lasso(
    *,
    rows: int = 20,
    columns: int = 40,
    nonzeros: int = 5,
    magnitude: Sequence[float] = (1.0, 1.0),
    shift: Sequence[float] = (0.0, 0.0),
    log10_strength: Sequence[float] = (-1.0, -1.0),
    noise: float = 0.0,
) -> Task:
    """½‖W x - b‖² + strength · Σ |x| from 0, where b = W x* for an x* with few nonzeros; an instance a phi.

    Args:
      rows: m.
      columns: n; those of W have length 1.
      nonzeros: of x*, normal times the magnitude.
      magnitude: range of it; phi draws from it uniformly.
      shift: range of u; W is (1 - u) · normal + u before its columns are scaled. Above 0 columns are correlated and the
        problem is ill-conditioned (.3 in the recorded instances).
      log10_strength: range of the strength's log10; phi draws from it uniformly.
      noise: standard deviation of the gradient's noise along each axis; validation and test have none.

    Raises ValueError for an invalid setting, naming the valid ones.
    """
    plain = shift[1] == 0 and magnitude[0] == magnitude[1]
    return linear_model(
        "lasso",
        lambda phi, x: 0.5 * jnp.sum((phi.W @ x - phi.b) ** 2),
        lambda z: z,
        1.0,
        rows=rows,
        columns=columns,
        nonzeros=nonzeros,
        magnitude=magnitude,
        shift=shift,
        log10_strength=log10_strength,
        noise=noise,
        unit_columns=True,
        init_loss=0.5 * nonzeros * magnitude[0] ** 2 if plain else None,
    )


def optimum(phi: Any) -> certified.Optimum:
    """Certified optima of instances, phi with a leading axis."""
    return certified.minimum(certified.SQUARED, phi.W, phi.b, phi.strength)
