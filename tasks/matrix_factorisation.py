"""Completion of a noisy low-rank matrix from some of its entries. Source: Candès & Recht (2009), arXiv:0805.4471."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from tasks.base import Split, Task
from tasks.space import BATCH, Choice, LogFloat, LogInt
from tasks.supervised import ERRORS, is_range, log_uniform, require_positive, require_range, split_index, spoken

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int, PRNGKeyArray

    Params = dict[str, Float[Array, "_ R"]]

SPACE = {
    ("rows", "columns"): Choice(((32, 32), (64, 32), (64, 64), (128, 64))),
    "true_rank": LogInt(1, 8),
    "rank": LogInt(8, 16),
    "noise": LogFloat(0.01, 0.3),
    "init_scale": LogFloat(0.03, 1.0),
    "batch_size": BATCH,
    "loss": Choice(tuple(ERRORS)),
}
MOST = 46_340  # entries, whose square an int32 holds
SHARES = (0.0, 0.6, 0.8, 1.0)  # of the entries, in an order that jumps over the matrix: train, validation, test


class Phi(NamedTuple):
    """Task parameters: the matrix is left @ right.T plus noise."""

    left: Float[Array, "N r"]
    right: Float[Array, "M r"]
    noise: Float[Array, "N M"]
    init_scale: Any = ()  # of the product's entries at init, where it is drawn


class Entries(NamedTuple):
    """Observed entries."""

    row: Int[Array, " B"]
    column: Int[Array, " B"]
    value: Float[Array, " B"]


def matrix_factorisation(
    *,
    rows: int = 64,
    columns: int = 32,
    true_rank: int = 4,
    rank: int = 8,
    noise: float | Sequence[float] = 0.1,
    init_scale: float | Sequence[float] = 0.3,
    batch_size: int = 64,
    loss: str = "squared",
) -> Task:
    """Mean loss of the entries of U·Vᵀ against those of a random matrix; each split has its own entries.

    Args:
      rows: N.
      columns: M.
      true_rank: of the matrix, whose entries have variance 1 before the noise.
      rank: of params, U [N, rank] and V [M, rank].
      noise: standard deviation of the observations' noise.
      init_scale: standard deviation at init of an entry of U·Vᵀ. Of this and of noise phi draws log-uniformly where
        they are ranges (low, high).
      batch_size: B, drawn from the split with replacement.
      loss: squared (halved), absolute or huber.

    Raises ValueError for an invalid setting, naming the valid ones.
    """
    name = "matrix_factorisation"
    integers = dict(rows=rows, columns=columns, true_rank=true_rank, rank=rank, batch_size=batch_size)
    for argument, value in integers.items():
        require_positive(name, argument, [value])
    if not 10 <= rows * columns <= MOST:
        raise ValueError(f"{name}: rows, got {rows} with columns={columns}; valid: 10 to {MOST} entries.")
    require_range(name, "noise", noise, 1e-9, 1e9, zero=True)
    require_range(name, "init_scale", init_scale, 1e-9, 1e9)
    if loss not in ERRORS:
        raise ValueError(f"{name}: loss, got {loss!r}; valid: {', '.join(ERRORS)}.")
    closed_form = None
    if isinstance(noise, int | float) and isinstance(init_scale, int | float):
        closed_form = 0.5 * (1 + noise**2 + init_scale**2)  # entries are uncorrelated sums of products
    total = rows * columns
    # Number k of the order is entry k * stride: a bijection, as they have no common factor.
    stride = next(s for s in range(round(0.618 * total), total) if math.gcd(s, total) == 1)
    bounds = [round(share * total) for share in SHARES]

    def sample(key: PRNGKeyArray) -> Phi:
        left_key, right_key, noise_key = jax.random.split(key, 3)
        left = jax.random.normal(left_key, (rows, true_rank)) / math.sqrt(true_rank)
        right = jax.random.normal(right_key, (columns, true_rank))
        observed = log_uniform(noise_key, noise) * jax.random.normal(noise_key, (rows, columns))
        return Phi(left, right, observed, log_uniform(key, init_scale) if is_range(init_scale) else ())

    def init(key: PRNGKeyArray, phi: Phi) -> Params:
        root = math.sqrt(init_scale) if isinstance(init_scale, int | float) else jnp.sqrt(phi.init_scale)
        draw = root * rank**-0.25 * jax.random.normal(key, (rows + columns, rank))
        return {"u": draw[:rows], "v": draw[rows:]}

    def entries(phi: Phi, number: Int[Array, " B"]) -> Entries:
        place = number * stride % total
        row, column = place // columns, place % columns
        value = jnp.sum(phi.left[row] * phi.right[column], axis=-1) + phi.noise[row, column]
        return Entries(row, column, value)

    def batch(key: PRNGKeyArray, phi: Phi, data: Any, split: Split) -> Entries:
        index = split_index(split)
        return entries(phi, jax.random.randint(key, (batch_size,), bounds[index], bounds[index + 1]))

    def eval_batches(phi: Phi, data: Any, split: Split) -> Entries:
        index = split_index(split)
        held = entries(phi, jnp.arange(bounds[index], bounds[index + 1]))
        return jax.tree.map(lambda x: x[None], held)

    def objective(params: Params, key: PRNGKeyArray, phi: Phi, batch: Entries) -> Float[Array, ""]:
        product = jnp.sum(params["u"][batch.row] * params["v"][batch.column], axis=-1)
        return jnp.mean(ERRORS[loss](product - batch.value))

    return Task(
        data=(),
        sample=sample,
        init=init,
        batch=batch,
        loss=objective,
        eval_batches=eval_batches,
        name=f"{name}({rows}x{columns}, rank {true_rank} by {rank}, noise {spoken(noise)}, {loss} loss, "
        f"batch {batch_size})",
        init_loss=closed_form if loss == "squared" else None,
    )
