"""Fully connected classifiers of small images."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

from tasks.base import Task
from tasks.data import images
from tasks.space import ACTIVATION, BATCH, CLASSIFICATION, IMAGES, INIT, Widths
from tasks.supervised import classifier, flattened, mlp, mlp_forward, require_positive, sources

SPACE = {
    ("data", "size"): IMAGES,
    "hidden": Widths(0, 4, 8, 128),
    "activation": ACTIVATION,
    "batch_size": BATCH,
    "log10_init_scale": INIT,
    "loss": CLASSIFICATION,
}


def image_mlp(
    *,
    data: Sequence[str] | str = ("digits", "mnist5k"),
    size: int = 8,
    hidden: Sequence[int] = (32,),
    activation: str = "relu",
    batch_size: int = 64,
    log10_init_scale: float = 0.0,
    loss: str = "cross_entropy",
    mup_base: Sequence[int] | None = None,
) -> Task:
    """Softmax classification of flattened images by an MLP; phi holds the data set and the init scales.

    Args:
      data: data sets in `tasks.data`, one of which is drawn uniformly per phi.
      size: images are size × size; digits has 8, mnist5k has 8, 14 and 28.
      hidden: widths; () is softmax regression.
      activation: relu (He init), gelu, silu or tanh (LeCun init); the output layer has half LeCun's standard deviation.
      batch_size: B; batches are x [B, pixels] in [0, 1] and y [B].
      log10_init_scale: each weight matrix is multiplied at init by 10**u, u uniform in ± this.
      loss: cross_entropy, or squared: of logits from one-hot labels.
      mup_base: hidden widths of the base network of the maximal-update parametrisation; None: the standard one.

    Raises ValueError for an unknown data set or an invalid setting, naming the valid ones.
    """
    require_positive("image_mlp", "hidden", hidden)
    datasets = [flattened(one) for one in sources("image_mlp", data, lambda name: images(name, size))]
    widths = (datasets[0].x.shape[1], *hidden, datasets[0].classes)
    forward, output_fan_in = mlp_forward("image_mlp", hidden, mup_base)
    return classifier(
        "image_mlp",
        datasets,
        label=f"{size}x{size}, {'-'.join(map(str, hidden)) or 'linear'}",
        shapes=list(itertools.pairwise(widths)),
        apply=functools.partial(mlp, forward=forward),
        batch_size=batch_size,
        activation=activation,
        log10_init_scale=log10_init_scale,
        loss=loss,
        output_fan_in=output_fan_in,
    )
