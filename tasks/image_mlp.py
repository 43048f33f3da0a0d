"""Fully connected classifiers of small images."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from tasks.base import Task
from tasks.data import images
from tasks.supervised import classifier, mlp, require_positive, sources


def image_mlp(
    *,
    data: Sequence[str] | str = ("digits", "mnist5k"),
    size: int = 8,
    hidden: Sequence[int] = (32,),
    activation: str = "relu",
    batch_size: int = 64,
    log10_init_scale: float = 0.0,
) -> Task:
    """Softmax classification of flattened images by an MLP; phi holds the data set and the init scales.

    Args:
      data: data sets in `tasks.data`, one of which is drawn uniformly per phi.
      size: images are size × size; digits has 8, mnist5k has 8, 14 and 28.
      hidden: widths; () is softmax regression.
      activation: relu (He init), gelu, silu or tanh (LeCun init); the output layer has half LeCun's standard deviation.
      batch_size: B; batches are x [B, size * size] in [0, 1] and y [B].
      log10_init_scale: each weight matrix is multiplied at init by 10**u, u uniform in ± this.

    Raises ValueError for an unknown data set or an invalid setting, naming the valid ones.
    """
    require_positive("image_mlp", "hidden", hidden)
    loaded = sources("image_mlp", data, lambda name: images(name, size))
    datasets = [one._replace(x=one.x.reshape(len(one.x), -1)) for one in loaded]
    widths = (size * size, *hidden, datasets[0].classes)
    return classifier(
        "image_mlp",
        datasets,
        label=f"{size}x{size}, {'-'.join(map(str, hidden)) or 'linear'}",
        shapes=list(itertools.pairwise(widths)),
        apply=mlp,
        batch_size=batch_size,
        activation=activation,
        log10_init_scale=log10_init_scale,
    )
