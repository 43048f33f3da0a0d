"""Fully connected regression of tables of z-scored features and targets."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax.numpy as jnp

from tasks.base import Task
from tasks.data import Dataset, table
from tasks.space import ACTIVATION, INIT, Choice, LogInt, Widths
from tasks.supervised import (
    ERRORS,
    OUTPUT_GAIN,
    Examples,
    activation_named,
    init_layers,
    minibatched,
    mlp,
    mlp_forward,
    require_positive,
    sources,
)

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    from tasks.supervised import Params

SPACE = {
    "data": Choice(("diabetes", "wine")),
    "hidden": Widths(0, 4, 8, 128),
    "activation": ACTIVATION,
    "batch_size": LogInt(8, 128),
    "log10_init_scale": INIT,
    "loss": Choice(tuple(ERRORS)),
}


def regressed(name: str) -> Dataset:
    """A table whose y is a number. Raises ValueError for one without."""
    held = table(name)
    if name == "wine":
        return held._replace(x=held.x[:, 1:], y=held.x[:, 0], classes=0)
    if held.classes:
        raise ValueError(f"tabular_regression: data, got {name!r}, which has classes; valid: diabetes, wine.")
    return held


def tabular_regression(
    *,
    data: Sequence[str] | str = "diabetes",
    hidden: Sequence[int] = (32,),
    batch_size: int = 64,
    activation: str = "relu",
    log10_init_scale: float = 0.0,
    loss: str = "squared",
    mup_base: Sequence[int] | None = None,
) -> Task:
    """Regression of one number by an MLP; phi holds the data set and the init scales.

    Args:
      data: diabetes, or wine, of which the first column (alcohol) is predicted from the other twelve.
      hidden: widths; () is linear regression.
      batch_size: B; batches are x [B, features] and y [B], both z-scored over the training split.
      activation: relu (He init), gelu, silu or tanh (LeCun init); the output layer has half LeCun's standard deviation.
      log10_init_scale: each weight matrix is multiplied at init by 10**u, u uniform in ± this.
      loss: squared (halved), absolute or huber.
      mup_base: hidden widths of the base network of the maximal-update parametrisation; None: the standard one.

    Raises ValueError for an unknown data set or an invalid setting, naming the valid ones.
    """
    require_positive("tabular_regression", "hidden", hidden)
    if loss not in ERRORS:
        raise ValueError(f"tabular_regression: loss, got {loss!r}; valid: {', '.join(ERRORS)}.")
    datasets = sources("tabular_regression", data, regressed)
    activate, gain = activation_named("tabular_regression", activation)
    forward, output_fan_in = mlp_forward("tabular_regression", hidden, mup_base)
    shapes = list(itertools.pairwise((datasets[0].x.shape[1], *hidden, 1)))
    predict = functools.partial(mlp, activate=activate, forward=forward)

    def error(params: Params, key: Array, batch: Examples) -> Float[Array, ""]:
        return jnp.mean(ERRORS[loss](predict(params, batch.x)[:, 0] - batch.y))

    return minibatched(
        "tabular_regression",
        datasets,
        label=f"{'-'.join(map(str, hidden)) or 'linear'}, {activation}, {loss} loss",
        init=lambda key, scale: init_layers(key, shapes, scale, gain, output_fan_in=output_fan_in),
        loss=error,
        batch_size=batch_size,
        scales=len(shapes),
        log10_init_scale=log10_init_scale,
        # He's init keeps the second moment, which is 1 in x and in y.
        init_loss=0.5 * (1 + OUTPUT_GAIN) if loss == "squared" and activation == "relu" and mup_base is None else None,
    )
