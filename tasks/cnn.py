"""Small convolutional classifiers, with convolutions written as matrix products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax.numpy as jnp

from tasks.base import Task
from tasks.data import images
from tasks.space import ACTIVATION, BATCH, CLASSIFICATION, IMAGES, INIT, Widths
from tasks.supervised import channelled, classifier, dense, require_positive, sources

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    from tasks.supervised import Params


SPACE = {
    ("data", "size"): IMAGES,
    "channels": Widths(1, 3, 4, 32),
    "activation": ACTIVATION,
    "batch_size": BATCH,
    "log10_init_scale": INIT,
    "loss": CLASSIFICATION,
}


def conv3x3(x: Float[Array, "B H W I"], w: Float[Array, "3 3 I O"], stride: int) -> Float[Array, "B h w O"]:
    """SAME convolution, equal to `lax.conv_general_dilated` in NHWC/HWIO, as nine shifts and one product.

    Its gradient under vmap over weights is some ten times faster than `lax.conv`'s on a CPU.
    """
    outs = [-(-n // stride) for n in x.shape[1:3]]
    totals = [max((out - 1) * stride + 3 - n, 0) for out, n in zip(outs, x.shape[1:3], strict=True)]
    x = jnp.pad(x, ((0, 0), *((total // 2, total - total // 2) for total in totals), (0, 0)))
    spans = [(out - 1) * stride + 1 for out in outs]
    # Columns before rows leaves the channels in the kernel's order (row, column, input).
    x = jnp.concatenate([x[:, :, j : j + spans[1] : stride] for j in range(3)], axis=-1)
    x = jnp.concatenate([x[:, i : i + spans[0] : stride] for i in range(3)], axis=-1)
    # A product of two matrices; with leading axes it takes nearly twice the time under vmap.
    return (x.reshape(-1, x.shape[-1]) @ w.reshape(-1, w.shape[-1])).reshape(*x.shape[:3], -1)


def _apply(params: Params, x: Float[Array, "B H W I"], activate: Callable[[Array], Array]) -> Float[Array, "B C"]:
    for index in range(len(params) - 1):
        layer = params[f"layer{index}"]
        x = activate(conv3x3(x, layer["w"], 2 if index else 1) + layer["b"][None, None, None, :])
    return dense(params[f"layer{len(params) - 1}"], x.reshape(len(x), -1))


def cnn(
    *,
    data: Sequence[str] | str = "mnist5k",
    size: int = 14,
    channels: Sequence[int] = (8, 16),
    batch_size: int = 64,
    activation: str = "relu",
    log10_init_scale: float = 0.0,
    loss: str = "cross_entropy",
) -> Task:
    """Softmax classification by 3×3 convolutions (stride 1, then 2) and a dense layer on the flattened features.

    Args:
      data: data sets in `tasks.data`, one of which is drawn uniformly per phi.
      size: images are size × size; digits has 8, mnist5k has 8, 14 and 28.
      channels: outputs of each convolution; all but the first halve the image.
      batch_size: B; batches are x [B, size, size, channels] in [0, 1] and y [B].
      activation: relu (He init), gelu, silu or tanh (LeCun init); the output layer has half LeCun's standard deviation.
      log10_init_scale: each weight is multiplied at init by 10**u, u uniform in ± this.
      loss: cross_entropy, or squared: of logits from one-hot labels.

    Raises ValueError for an unknown data set or an invalid setting, naming the valid ones.
    """
    require_positive("cnn", "channels", channels, least=1)
    datasets = [channelled(one) for one in sources("cnn", data, lambda name: images(name, size))]
    side = size
    for _ in channels[1:]:
        side = -(-side // 2)
    inputs = (datasets[0].x.shape[-1], *channels[:-1])
    kernels = [(3, 3, i, o) for i, o in zip(inputs, channels, strict=True)]
    return classifier(
        "cnn",
        datasets,
        label=f"{size}x{size}, {'-'.join(map(str, channels))}",
        shapes=[*kernels, (side * side * channels[-1], datasets[0].classes)],
        apply=_apply,
        batch_size=batch_size,
        activation=activation,
        log10_init_scale=log10_init_scale,
        loss=loss,
    )
