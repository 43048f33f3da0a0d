"""Fully connected classifiers of tables of z-scored features."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

from tasks.base import Task
from tasks.data import table
from tasks.space import ACTIVATION, CLASSIFICATION, INIT, Choice, LogInt, Widths
from tasks.supervised import classifier, mlp, mlp_forward, require_positive, sources

SPACE = {
    "data": Choice(("breast_cancer", "wine")),
    "hidden": Widths(0, 4, 8, 128),
    "activation": ACTIVATION,
    "batch_size": LogInt(8, 128),
    "log10_init_scale": INIT,
    "loss": CLASSIFICATION,
}


def tabular_mlp(
    *,
    data: Sequence[str] | str = "breast_cancer",
    hidden: Sequence[int] = (64,),
    batch_size: int = 64,
    activation: str = "relu",
    log10_init_scale: float = 0.0,
    loss: str = "cross_entropy",
    mup_base: Sequence[int] | None = None,
) -> Task:
    """Softmax classification of table rows by an MLP; phi holds the data set and the init scales.

    Args:
      data: tabular data sets in `tasks.data` with as many features and classes as each other.
      hidden: widths; () is softmax regression.
      batch_size: B; batches are x [B, features], z-scored over the training split, and y [B].
      activation: relu (He init), gelu, silu or tanh (LeCun init); the output layer has half LeCun's standard deviation.
      log10_init_scale: each weight matrix is multiplied at init by 10**u, u uniform in ± this.
      loss: cross_entropy, or squared: of logits from one-hot labels.
      mup_base: hidden widths of the base network of the maximal-update parametrisation; None: the standard one.

    Raises ValueError for an unknown data set or an invalid setting, naming the valid ones.
    """
    require_positive("tabular_mlp", "hidden", hidden)
    datasets = sources("tabular_mlp", data, table)
    if not datasets[0].classes:
        raise ValueError(f"tabular_mlp: data, got {data!r}, which has no classes; valid: breast_cancer, wine.")
    widths = (datasets[0].x.shape[1], *hidden, datasets[0].classes)
    forward, output_fan_in = mlp_forward("tabular_mlp", hidden, mup_base)
    return classifier(
        "tabular_mlp",
        datasets,
        label="-".join(map(str, hidden)) or "linear",
        shapes=list(itertools.pairwise(widths)),
        apply=functools.partial(mlp, forward=forward),
        batch_size=batch_size,
        activation=activation,
        log10_init_scale=log10_init_scale,
        loss=loss,
        output_fan_in=output_fan_in,
    )
