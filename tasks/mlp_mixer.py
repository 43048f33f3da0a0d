"""MLP-mixers on small images, in flax Linen. Source: Tolstikhin et al. (2021), arXiv:2105.01601."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from tasks.base import Task
from tasks.data import images
from tasks.layers import initialise
from tasks.space import CLASSIFICATION, INIT, PATCHES, Choice, LogInt
from tasks.supervised import activation_named, channelled, classification, library, require_positive, sources
from tasks.vit import patches

SPACE = {
    ("data", "size", "patch"): PATCHES,
    "depth": LogInt(1, 4),
    "width": LogInt(16, 64),
    "token_hidden": LogInt(8, 64),
    "channel_hidden": LogInt(16, 128),
    "activation": Choice(("gelu", "relu", "silu")),
    "batch_size": LogInt(16, 128),
    "log10_init_scale": INIT,
    "loss": CLASSIFICATION,
}


def mlp_mixer(
    *,
    data: Sequence[str] | str = ("digits", "mnist5k"),
    size: int = 8,
    patch: int = 2,
    depth: int = 2,
    width: int = 32,
    token_hidden: int = 16,
    channel_hidden: int = 64,
    activation: str = "gelu",
    batch_size: int = 64,
    log10_init_scale: float = 0.0,
    loss: str = "cross_entropy",
    mup_base: int | None = None,
) -> Task:
    """Softmax classification of patches by MLPs over patches and over channels in turn.

    Args:
      data: image sets in `tasks.data`, one of which is drawn uniformly per phi.
      size: images are size × size.
      patch: side of a patch; divides size.
      depth: mixer blocks.
      width: channels of a patch.
      token_hidden: width of the MLPs over patches.
      channel_hidden: width of the MLPs over channels.
      activation: relu, gelu, silu or tanh.
      batch_size: B; batches are x [B, size, size, channels] in [0, 1] and y [B].
      log10_init_scale: all weights are multiplied at init by 10**u, u uniform in ± this.
      loss: cross_entropy, or squared: of logits from one-hot labels.
      mup_base: width of the base network of the maximal-update parametrisation, whose channel_hidden is smaller in the
        same proportion and whose token_hidden is this one; None: the standard one.

    Raises ValueError for an unknown data set or an invalid setting; ImportError without flax.
    """
    nn = library("mlp_mixer", "flax.linen")
    integers = dict(patch=patch, depth=depth, width=width, token_hidden=token_hidden, channel_hidden=channel_hidden)
    for name, value in integers.items():
        require_positive("mlp_mixer", name, [value])
    if size % patch:
        raise ValueError(f"mlp_mixer: patch, got {patch} with size={size}; valid: divisors of size.")
    if mup_base is not None:
        require_positive("mlp_mixer", "mup_base", [mup_base])
        if channel_hidden * mup_base % width:
            raise ValueError(
                f"mlp_mixer: channel_hidden, got {channel_hidden} with width={width}, mup_base={mup_base}; valid: "
                "multiples of width / mup_base, by which the base network's is smaller."
            )
    datasets = [channelled(one) for one in sources("mlp_mixer", data, lambda name: images(name, size))]
    activate, _ = activation_named("mlp_mixer", activation)

    forward = mup_base / width if mup_base else 1.0

    class Mixer(nn.Module):
        @nn.compact
        def __call__(self, x):  # [B, L, P] -> [B, classes]
            x = nn.Dense(width, name="patches")(x)
            for _ in range(depth):
                y = nn.LayerNorm()(x).swapaxes(1, 2)
                x = x + nn.Dense(x.shape[1])(activate(nn.Dense(token_hidden)(y))).swapaxes(1, 2)
                x = x + nn.Dense(width)(activate(nn.Dense(channel_hidden)(nn.LayerNorm()(x))))
            return nn.Dense(datasets[0].classes, name="output")(forward * nn.LayerNorm()(x).mean(1))

    model = Mixer()
    example = jax.ShapeDtypeStruct(datasets[0].x[:1].shape, jnp.float32)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), patches(x, patch)), example)["params"]
    return classification(
        "mlp_mixer",
        datasets,
        label=f"{size}x{size}/{patch}, {depth} x {width}, {token_hidden} {channel_hidden}, {activation}",
        init=lambda key, scale: initialise(key, shapes, scale=scale[0], output_fan_in=mup_base),
        apply=lambda params, x: model.apply({"params": params}, patches(x, patch)),
        batch_size=batch_size,
        log10_init_scale=log10_init_scale,
        loss=loss,
    )
