"""Logistic regression with an l1 penalty, deterministic.

Source: Koh, Kim & Boyd (2007), JMLR 8; instances as in Liu et al. (2023), arXiv:2305.18577.
"""

from __future__ import annotations

import csv
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tasks import certified
from tasks.base import Composite, Source, Task
from tasks.data import names
from tasks.data import table as load_table
from tasks.space import Choice, LogInt
from tasks.sparse import linear_model
from tasks.supervised import require_ends

if TYPE_CHECKING:
    from jaxtyping import Array, Float, PRNGKeyArray

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
        certified.LOGISTIC,
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


def paper_lipschitz(W: Float[Array, "m n"]) -> Float[Array, ""]:
    """‖W‖, which the code of Liu et al. (2023) takes for the Lipschitz constant of the mean of m logistic losses.

    ‖W‖² / 4m is right, `composite.lipschitz`; for 1000 × 50 normal elements that is a hundred times less, so that ISTA
    and FISTA with this one are soft baselines. To compare with the published tables.
    """
    return jnp.linalg.norm(W, 2)


class Strength(NamedTuple):
    """An instance of `table`."""

    strength: Float[Array, ""]
    lipschitz: Float[Array, ""]


class Known(NamedTuple):
    """Features and labels."""

    W: Float[Array, "m n"]
    b: Float[Array, " m"]  # 0 or 1


def table(*, data: str = "breast_cancer", log10_strength: Sequence[float] = (-2.0, -1.0)) -> Task:
    """The same on rows of a table with two classes: `tasks.logistic_l1:table`. Instances differ in strength.

    Args:
      data: an embedded table, or the path of a CSV file: a header or none, numbers, the last column the class, two
        values of any kind, the one that sorts later is 1. Features are z-scored; those that are constant are left out.
      log10_strength: range of the strength's log10; phi draws from it uniformly.

    Raises ValueError for a file that is none, and for another number of classes.
    """
    require_ends("logistic_l1.table", "log10_strength", log10_strength, -8.0, 4.0)
    x, y, provenance = read(data)
    W, b = jnp.asarray(x), jnp.asarray(y)
    constant = float(np.linalg.norm(np.asarray(x, np.float64), 2) ** 2 / (4 * len(x)))

    def sample(key: PRNGKeyArray) -> Strength:
        strength = 10.0 ** jax.random.uniform(key, minval=log10_strength[0], maxval=log10_strength[1])
        return Strength(strength, jnp.full_like(strength, constant))

    def smooth(params: Array, key: PRNGKeyArray, phi: Strength, batch: Known) -> Array:
        z = batch.W @ params
        return jnp.mean(jnp.logaddexp(0.0, z) - batch.b * z)

    def loss(params: Array, key: PRNGKeyArray, phi: Strength, batch: Known) -> Array:
        return smooth(params, key, phi, batch) + phi.strength * jnp.sum(jnp.abs(params))

    return Task(
        data=Known(W, b),
        sample=sample,
        init=lambda key, phi: jnp.zeros(x.shape[1], jnp.float32),
        batch=lambda key, phi, data, split: data,
        loss=loss,
        name=f"logistic_l1.table({Path(data).name}, {x.shape[0]}x{x.shape[1]}, strength 10^{log10_strength[0]:g} to "
        f"10^{log10_strength[1]:g})",
        init_loss=math.log(2),
        provenance=provenance,
        deterministic=True,
        composite=Composite(smooth, lambda phi: (phi.strength,), lambda phi: phi.lipschitz, optimum=_table_optimum),
    )


def read(data: str) -> tuple[np.ndarray, np.ndarray, tuple[Source, ...]]:
    """Features [m, n], z-scored, labels [m] of 0 and 1, and where they come from. Raises ValueError as `table`."""
    where = "logistic_l1.table: data"
    if data in names("table"):
        held = load_table(data)
        x, labels, provenance = np.asarray(held.x, np.float64), np.asarray(held.y), held.provenance
    else:
        path = Path(data)
        if not path.is_file():
            raise ValueError(f"{where}, got {data!r}; valid: a CSV file, or {', '.join(names('table'))}.")
        content = path.read_bytes()
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as e:
            raise ValueError(f"{where}, {path} at byte {e.start} is not UTF-8; valid: a CSV file in UTF-8.") from e
        rows = [row for row in csv.reader(text.splitlines()) if row]
        rows = rows if rows and _numbers(rows[0][:-1]) else rows[1:]
        for number, row in enumerate(rows):
            if len(row) != len(rows[0]) or len(row) < 2 or not _numbers(row[:-1]):
                raise ValueError(f"{where}, {path} has {row!r} as row {number}; valid: numbers and then a class.")
        x = np.array([[float(value) for value in row[:-1]] for row in rows])
        labels = np.array([row[-1].strip() for row in rows])
        provenance = (Source(path.name, hashlib.sha256(content).hexdigest()),)
    classes = np.unique(labels)
    if len(classes) != 2:
        raise ValueError(f"{where}, {data} has {len(classes)} classes; valid: 2.")
    x = x[:, x.std(0) > 0]
    return (x - x.mean(0)) / x.std(0), (labels == classes[1]).astype(np.float64), provenance


def _numbers(row: Sequence[str]) -> bool:
    try:
        return all(math.isfinite(float(value)) for value in row)
    except ValueError:
        return False


def _table_optimum(phi: Strength, data: Known) -> certified.Optimum:
    count = len(phi.strength)
    W, b = (np.broadcast_to(np.asarray(leaf), (count, *leaf.shape)) for leaf in data)
    return certified.minimum(certified.LOGISTIC, W, b, np.asarray(phi.strength))
