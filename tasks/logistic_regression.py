"""Regularised softmax regression: a convex problem on real data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from tasks.base import Task
from tasks.data import images, table
from tasks.space import BATCH, Choice
from tasks.supervised import Examples, classification, dense, flattened, sources

if TYPE_CHECKING:
    from jaxtyping import Array, Float, PRNGKeyArray

SPACE = {
    ("data", "size"): Choice((("wine", None), ("digits", 8), ("mnist5k", 8), ("mnist5k", 14))),
    "log10_decay": Choice(((-5.0, -3.0), (-4.0, -1.0))),
    "batch_size": BATCH,
}


class Phi(NamedTuple):
    """The drawn data set, see `supervised.Phi`, and the strength of the regulariser."""

    rows: Any
    decay: Float[Array, ""]


def logistic_regression(
    *,
    data: Sequence[str] | str = ("digits", "mnist5k"),
    size: int | None = 8,
    log10_decay: Sequence[float] = (-5.0, -3.0),
    batch_size: int = 64,
) -> Task:
    """Cross-entropy of a linear classifier that starts at zero, plus half the decay times its squared weights.

    Args:
      data: sets in `tasks.data`, one of which is drawn uniformly per phi.
      size: images are size × size; None: tables.
      log10_decay: range of the regulariser's log10; phi draws from it uniformly.
      batch_size: B; batches are x [B, features] and y [B].

    Raises ValueError for an unknown data set or an invalid setting, naming the valid ones.
    """
    if len(log10_decay) != 2 or not -20.0 <= log10_decay[0] <= log10_decay[1] <= 20.0:
        raise ValueError(f"logistic_regression: log10_decay, got {log10_decay}; valid: a range (low, high) in ± 20.")
    load = table if size is None else lambda name: images(name, size)
    datasets = [flattened(one) for one in sources("logistic_regression", data, load)]
    features, classes = datasets[0].x.shape[1], datasets[0].classes
    plain = classification(
        "logistic_regression",
        datasets,
        label=f"{features} features, decay 10^{log10_decay[0]:g} to 10^{log10_decay[1]:g}",
        init=lambda key, scale: {"w": jnp.zeros((features, classes)), "b": jnp.zeros(classes)},
        apply=dense,
        batch_size=batch_size,
    )
    metrics, eval_batches = plain.metrics, plain.eval_batches

    def sample(key: PRNGKeyArray) -> Phi:
        rows_key, decay_key = jax.random.split(key)
        decay = 10.0 ** jax.random.uniform(decay_key, minval=log10_decay[0], maxval=log10_decay[1])
        return Phi(plain.sample(rows_key), decay)

    def loss(params: dict[str, Array], key: PRNGKeyArray, phi: Phi, batch: Examples) -> Float[Array, ""]:
        return plain.loss(params, key, phi.rows, batch) + 0.5 * phi.decay * jnp.sum(params["w"] ** 2)

    return plain._replace(
        sample=sample,
        init=lambda key, phi: plain.init(key, phi.rows),
        batch=lambda key, phi, data, split: plain.batch(key, phi.rows, data, split),
        loss=loss,
        metrics=metrics and (lambda params, key, phi, batch: metrics(params, key, phi.rows, batch)),
        eval_batches=eval_batches and (lambda phi, data, split: eval_batches(phi.rows, data, split)),
    )
