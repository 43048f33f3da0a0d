"""Residual CNNs with group normalisation.

Source: He et al. (2016), arXiv:1603.05027; Wu & He (2018), arXiv:1803.08494.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from tasks.base import Task
from tasks.cnn import conv3x3
from tasks.data import images
from tasks.layers import group_norm, initialise, shape
from tasks.space import ACTIVATION, CLASSIFICATION, INIT, SMALL_IMAGES, Choice, LogInt
from tasks.supervised import activation_named, channelled, classification, require_positive, sources

if TYPE_CHECKING:
    from jaxtyping import Array, Float

SPACE = {
    ("data", "size"): SMALL_IMAGES,
    ("channels", "groups"): Choice((((8,), 2), ((8, 16), 2), ((16, 32), 4), ((8, 16, 32), 4))),
    "blocks": LogInt(1, 3),
    "activation": ACTIVATION,
    "batch_size": LogInt(16, 128),
    "log10_init_scale": INIT,
    "loss": CLASSIFICATION,
}


def resnet(
    *,
    data: Sequence[str] | str = ("digits", "mnist5k"),
    size: int = 8,
    channels: Sequence[int] = (8, 16),
    blocks: int = 1,
    groups: int = 2,
    activation: str = "relu",
    batch_size: int = 64,
    log10_init_scale: float = 0.0,
    loss: str = "cross_entropy",
) -> Task:
    """Softmax classification by stages of pre-activated residual blocks and mean pooling.

    Args:
      data: image sets in `tasks.data`, one of which is drawn uniformly per phi.
      size: images are size × size.
      channels: of each stage; all but the first halve the image.
      blocks: residual blocks a stage, of two 3×3 convolutions each.
      groups: of the group normalisations; divides channels.
      activation: relu (He init), gelu, silu or tanh (LeCun init); the output layer has half LeCun's standard deviation.
      batch_size: B; batches are x [B, size, size, channels] in [0, 1] and y [B].
      log10_init_scale: all weights are multiplied at init by 10**u, u uniform in ± this.
      loss: cross_entropy, or squared: of logits from one-hot labels.

    Raises ValueError for an unknown data set or an invalid setting, naming the valid ones.
    """
    require_positive("resnet", "channels", channels, least=1)
    require_positive("resnet", "blocks", [blocks])
    require_positive("resnet", "groups", [groups])
    if any(width % groups for width in channels):
        raise ValueError(f"resnet: groups, got {groups} with channels={tuple(channels)}; valid: divisors of channels.")
    datasets = [channelled(one) for one in sources("resnet", data, lambda name: images(name, size))]
    activate, gain = activation_named("resnet", activation)
    classes, widths = datasets[0].classes, [channels[0], *channels]
    norm = {width: {"scale": shape(width), "bias": shape(width)} for width in channels}
    shapes: dict[str, Any] = {"stem": shape(3, 3, datasets[0].x.shape[-1], channels[0])}
    for stage, width in enumerate(channels):
        for index in range(blocks):
            fan_in = width if index else widths[stage]
            block = {"norm1": norm[fan_in], "conv1": shape(3, 3, fan_in, width)}
            block |= {"norm2": norm[width], "conv2": shape(3, 3, width, width)}
            shapes[f"stage{stage}_{index}"] = block | ({"skip": shape(1, 1, fan_in, width)} if fan_in != width else {})
    shapes |= {"norm": norm[channels[-1]], "output": {"w": shape(channels[-1], classes), "b": shape(classes)}}

    def residual(params: dict[str, Any], x: Float[Array, "B H W I"], stride: int) -> Float[Array, "B h w O"]:
        y = activate(group_norm(params["norm1"], x, groups))
        skip = y[:, ::stride, ::stride] @ params["skip"][0, 0] if "skip" in params else x[:, ::stride, ::stride]
        y = conv3x3(y, params["conv1"], stride)
        return skip + conv3x3(activate(group_norm(params["norm2"], y, groups)), params["conv2"], 1)

    def apply(params: dict[str, Any], x: Float[Array, "B H W I"]) -> Float[Array, "B K"]:
        x = conv3x3(x, params["stem"], 1)
        for stage in range(len(channels)):
            for index in range(blocks):
                x = residual(params[f"stage{stage}_{index}"], x, 2 if stage and not index else 1)
        x = jnp.mean(activate(group_norm(params["norm"], x, groups)), axis=(1, 2))
        return x @ params["output"]["w"] + params["output"]["b"][None]

    return classification(
        "resnet",
        datasets,
        label=f"{size}x{size}, {'-'.join(map(str, channels))} x {blocks}, {activation}",
        init=lambda key, scale: initialise(key, shapes, scale=scale[0], gain=gain),
        apply=apply,
        batch_size=batch_size,
        log10_init_scale=log10_init_scale,
        loss=loss,
    )
