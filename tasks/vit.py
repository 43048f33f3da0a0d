"""Vision transformers on small images. Source: Dosovitskiy et al. (2021), arXiv:2010.11929."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from tasks.base import Task
from tasks.data import images
from tasks.layers import attention_scale, broadcast, initialise, product, shape, transformer, transformer_shapes
from tasks.space import CLASSIFICATION, INIT, PATCHES, Choice, LogInt
from tasks.supervised import activation_named, channelled, classification, require_positive, sources

if TYPE_CHECKING:
    from jaxtyping import Array, Float

SPACE = {
    ("data", "size", "patch"): PATCHES,
    "depth": LogInt(1, 4),
    ("width", "heads"): Choice(((16, 2), (32, 2), (32, 4), (64, 4))),
    "activation": Choice(("gelu", "relu", "silu")),
    "batch_size": LogInt(16, 128),
    "log10_init_scale": INIT,
    "loss": CLASSIFICATION,
}


def patches(x: Float[Array, "B H W C"], side: int) -> Float[Array, "B L P"]:
    """Non-overlapping squares, row by row, flattened."""
    b, h, w, c = x.shape
    return x.reshape(b, h // side, side, w // side, side, c).swapaxes(2, 3).reshape(b, -1, side * side * c)


def vit(
    *,
    data: Sequence[str] | str = ("digits", "mnist5k"),
    size: int = 8,
    patch: int = 2,
    depth: int = 2,
    width: int = 32,
    heads: int = 2,
    activation: str = "gelu",
    batch_size: int = 64,
    log10_init_scale: float = 0.0,
    loss: str = "cross_entropy",
    mup_base: int | None = None,
) -> Task:
    """Softmax classification of patches by a pre-normalised transformer and mean pooling.

    Args:
      data: image sets in `tasks.data`, one of which is drawn uniformly per phi.
      size: images are size × size.
      patch: side of a patch; divides size.
      depth: transformer blocks.
      width: of the residual stream; the MLPs have four times as much.
      heads: of attention; divides width.
      activation: relu, gelu, silu or tanh.
      batch_size: B; batches are x [B, size, size, channels] in [0, 1] and y [B].
      log10_init_scale: all weights are multiplied at init by 10**u, u uniform in ± this.
      loss: cross_entropy, or squared: of logits from one-hot labels.
      mup_base: width of the base network of the maximal-update parametrisation, in which queries begin at 0; None: the
        standard one.

    Raises ValueError for an unknown data set or an invalid setting, naming the valid ones.
    """
    for name, value in {"patch": patch, "depth": depth, "width": width, "heads": heads}.items():
        require_positive("vit", name, [value])
    if size % patch:
        raise ValueError(f"vit: patch, got {patch} with size={size}; valid: divisors of size.")
    datasets = [channelled(one) for one in sources("vit", data, lambda name: images(name, size))]
    activate, _ = activation_named("vit", activation)
    logit_scale, forward, mup = attention_scale("vit", width, heads, mup_base)
    length, inputs = (size // patch) ** 2, patch**2 * datasets[0].x.shape[-1]
    shapes = transformer_shapes(depth, width, 4 * width) | {
        "patches": {"w": shape(inputs, width), "b": shape(width)},
        "embed_position": shape(length, width),
        "output": {"w": shape(width, datasets[0].classes), "b": shape(datasets[0].classes)},
    }

    def apply(params: dict[str, Any], x: Float[Array, "B H W C"]) -> Float[Array, "B K"]:
        x = product(patches(x, patch), params["patches"]["w"])
        x = x + broadcast(params["patches"]["b"], x) + params["embed_position"][None]
        x = transformer(params, x, heads=heads, causal=False, activate=activate, logit_scale=logit_scale)
        return (forward * jnp.mean(x, axis=1)) @ params["output"]["w"] + params["output"]["b"][None]

    return classification(
        "vit",
        datasets,
        label=f"{size}x{size}/{patch}, {depth} x {width}, {heads} heads, {activation}",
        init=lambda key, scale: initialise(key, shapes, scale=scale[0], **mup),
        apply=apply,
        batch_size=batch_size,
        log10_init_scale=log10_init_scale,
        loss=loss,
    )
