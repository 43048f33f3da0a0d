"""Fully connected classifiers of tables of z-scored features."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from tasks.base import Task
from tasks.data import table
from tasks.supervised import classifier, mlp, require_positive, sources


def tabular_mlp(
    *,
    data: Sequence[str] | str = "breast_cancer",
    hidden: Sequence[int] = (64,),
    batch_size: int = 64,
    activation: str = "relu",
    log10_init_scale: float = 0.0,
) -> Task:
    """Softmax classification of table rows by an MLP; phi holds the data set and the init scales.

    Args:
      data: tabular data sets in `tasks.data` with as many features and classes as each other.
      hidden: widths; () is softmax regression.
      batch_size: B; batches are x [B, features], z-scored over the training split, and y [B].
      activation: relu (He init), gelu, silu or tanh (LeCun init); the output layer has half LeCun's standard deviation.
      log10_init_scale: each weight matrix is multiplied at init by 10**u, u uniform in ± this.

    Raises ValueError for an unknown data set or an invalid setting, naming the valid ones.
    """
    require_positive("tabular_mlp", "hidden", hidden)
    datasets = sources("tabular_mlp", data, table)
    widths = (datasets[0].x.shape[1], *hidden, datasets[0].classes)
    return classifier(
        "tabular_mlp",
        datasets,
        label="-".join(map(str, hidden)) or "linear",
        shapes=list(itertools.pairwise(widths)),
        apply=mlp,
        batch_size=batch_size,
        activation=activation,
        log10_init_scale=log10_init_scale,
    )
