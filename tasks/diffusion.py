"""Denoising diffusion of small images, in flax Linen. Source: Ho et al. (2020), arXiv:2006.11239.

Time is continuous and the noise schedule is the cosine of Nichol & Dhariwal (2021), arXiv:2102.09672.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from tasks.base import Task
from tasks.data import images
from tasks.layers import initialise
from tasks.space import INIT, SMALL_IMAGES, Choice, LogInt
from tasks.supervised import (
    ERRORS,
    Examples,
    activation_named,
    flattened,
    library,
    minibatched,
    require_positive,
    sources,
)

if TYPE_CHECKING:
    from jaxtyping import Array, Float

SPACE = {
    ("data", "size"): SMALL_IMAGES,
    "depth": LogInt(1, 4),
    "width": LogInt(32, 256),
    "frequencies": LogInt(4, 16),
    "activation": Choice(("gelu", "silu", "relu")),
    "batch_size": LogInt(32, 256),
    "log10_init_scale": INIT,
    "loss": Choice(("squared", "absolute", "huber")),
}
LOSSES = {"squared": jnp.square, "absolute": jnp.abs, "huber": ERRORS["huber"]}  # of one pixel's noise


def noised(x: Float[Array, "B P"], noise: Float[Array, "B P"], time: Float[Array, " B"]) -> Float[Array, "B P"]:
    """The image at time 0, the noise at time 1, of unit variance between if both are."""
    angle = 0.5 * jnp.pi * time[:, None]
    return jnp.cos(angle).astype(x.dtype) * x + jnp.sin(angle).astype(x.dtype) * noise


def diffusion(
    *,
    data: Sequence[str] | str = ("digits", "mnist5k"),
    size: int = 8,
    depth: int = 2,
    width: int = 64,
    frequencies: int = 8,
    activation: str = "silu",
    batch_size: int = 64,
    log10_init_scale: float = 0.0,
    loss: str = "squared",
) -> Task:
    """Mean error of the noise that a residual MLP predicts from a noised image and its time; squared, 1 at init.

    Args:
      data: image sets in `tasks.data`, one of which is drawn uniformly per phi.
      size: images are size × size.
      depth: residual blocks, each told the time.
      width: of the residual stream, and of the blocks.
      frequencies: of the time's Fourier features.
      activation: relu, gelu, silu or tanh.
      batch_size: B; batches are x [B, pixels] in [0, 1], used as 2x - 1. Noise and times come from the loss's key.
      log10_init_scale: all weights are multiplied at init by 10**u, u uniform in ± this.
      loss: squared, absolute or huber (halved squares of small errors).

    Raises ValueError for an unknown data set or an invalid setting; ImportError without flax.
    """
    nn = library("diffusion", "flax.linen")
    for name, value in dict(depth=depth, width=width, frequencies=frequencies).items():
        require_positive("diffusion", name, [value])
    if loss not in LOSSES:
        raise ValueError(f"diffusion: loss, got {loss!r}; valid: {', '.join(LOSSES)}.")
    datasets = [flattened(one) for one in sources("diffusion", data, lambda name: images(name, size))]
    activate, _ = activation_named("diffusion", activation)
    pixels = datasets[0].x.shape[1]

    class Denoiser(nn.Module):
        @nn.compact
        def __call__(self, x, time):  # [B, P], [B] -> [B, P]
            angles = time[:, None] * (0.5 * jnp.pi * 2.0 ** jnp.linspace(0, 6, frequencies))[None]
            waves = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1).astype(x.dtype)
            time = activate(nn.Dense(width, name="time")(waves))
            x = nn.Dense(width, name="image")(x)
            for _ in range(depth):
                y = nn.Dense(width)(nn.LayerNorm()(x)) + nn.Dense(width, use_bias=False)(time)
                x = x + nn.Dense(width)(activate(y))
            return nn.Dense(pixels, name="output")(nn.LayerNorm()(x))

    model = Denoiser()
    example = [jax.ShapeDtypeStruct(dims, jnp.float32) for dims in ((1, pixels), (1,))]
    shapes = jax.eval_shape(model.init, jax.random.key(0), *example)["params"]

    def objective(params: Any, key: Array, batch: Examples) -> Float[Array, ""]:
        time_key, noise_key = jax.random.split(key)
        # Stratified over the batch, which takes most of the noise of the draw of times out of the loss.
        offset = jax.random.uniform(time_key)
        time = jnp.mod(offset + jnp.arange(len(batch.x)) / len(batch.x), 1.0)
        noise = jax.random.normal(noise_key, batch.x.shape).astype(batch.x.dtype)
        predicted = model.apply({"params": params}, noised(2 * batch.x - 1, noise, time), time)
        return jnp.mean(LOSSES[loss](predicted - noise))

    return minibatched(
        "diffusion",
        datasets,
        label=f"{size}x{size}, {depth} x {width}, {frequencies} frequencies, {activation}"
        + (f", {loss} loss" if loss != "squared" else ""),
        # Output variance 0.01: a guess of about 0, whose error is the noise's variance.
        init=lambda key, scale: initialise(key, shapes, scale=scale[0], output_gain=0.01),
        loss=objective,
        batch_size=batch_size,
        log10_init_scale=log10_init_scale,
        init_loss=1.0 if loss == "squared" else None,
    )
