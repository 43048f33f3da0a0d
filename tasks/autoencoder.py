"""Fully connected autoencoders of small images, in haiku."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from tasks.base import Task
from tasks.data import images
from tasks.layers import initialise
from tasks.space import ACTIVATION, BATCH, INIT, SMALL_IMAGES, Choice, LogInt, Widths
from tasks.supervised import Examples, activation_named, flattened, library, minibatched, require_positive, sources

if TYPE_CHECKING:
    from jaxtyping import Array, Float

SPACE = {
    ("data", "size"): SMALL_IMAGES,
    "hidden": Widths(0, 2, 16, 128),
    "code": LogInt(2, 32),
    "activation": ACTIVATION,
    "batch_size": BATCH,
    "log10_init_scale": INIT,
    "loss": Choice(("squared", "absolute", "bernoulli")),
}
LOSSES = {
    "squared": lambda logits, x: (jax.nn.sigmoid(logits) - x) ** 2,
    "absolute": lambda logits, x: jnp.abs(jax.nn.sigmoid(logits) - x),
    # Cross-entropy of pixels taken as probabilities.
    "bernoulli": lambda logits, x: jax.nn.softplus(logits) - x * logits,
}


def autoencoder(
    *,
    data: Sequence[str] | str = ("digits", "mnist5k"),
    size: int = 8,
    hidden: Sequence[int] = (32,),
    code: int = 8,
    activation: str = "relu",
    batch_size: int = 64,
    log10_init_scale: float = 0.0,
    loss: str = "bernoulli",
) -> Task:
    """Reconstruction of flattened images through a narrow layer; the decoder mirrors the encoder.

    Args:
      data: image sets in `tasks.data`, one of which is drawn uniformly per phi.
      size: images are size × size.
      hidden: widths of the encoder between image and code, and backwards of the decoder.
      code: width of the code, which is linear.
      activation: relu (He init), gelu, silu or tanh (LeCun init); the output layer has half LeCun's standard deviation.
      batch_size: B; batches are x [B, pixels] in [0, 1].
      log10_init_scale: all weights are multiplied at init by 10**u, u uniform in ± this.
      loss: mean over pixels of squared, absolute or bernoulli (cross-entropy in nats, log 2 at init).

    Raises ValueError for an unknown data set or an invalid setting; ImportError without haiku.
    """
    hk = library("autoencoder", "haiku")
    require_positive("autoencoder", "hidden", hidden)
    require_positive("autoencoder", "code", [code])
    if loss not in LOSSES:
        raise ValueError(f"autoencoder: loss, got {loss!r}; valid: {', '.join(LOSSES)}.")
    datasets = [flattened(one) for one in sources("autoencoder", data, lambda name: images(name, size))]
    activate, gain = activation_named("autoencoder", activation)
    pixels = datasets[0].x.shape[1]

    def forward(x: Float[Array, "B P"]) -> Float[Array, "B P"]:
        for width in hidden:
            x = activate(hk.Linear(width)(x))
        x = hk.Linear(code, name="code")(x)
        for width in reversed(hidden):
            x = activate(hk.Linear(width)(x))
        return hk.Linear(pixels, name="output")(x)

    model = hk.without_apply_rng(hk.transform(forward))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, pixels), jnp.float32))

    def reconstruction(params: Any, key: Array, batch: Examples) -> Float[Array, ""]:
        return jnp.mean(LOSSES[loss](model.apply(params, batch.x), batch.x))

    return minibatched(
        "autoencoder",
        datasets,
        label=f"{size}x{size}, {'-'.join(map(str, (*hidden, code)))}, {activation}, {loss} loss",
        init=lambda key, scale: initialise(key, shapes, scale=scale[0], gain=gain),
        loss=reconstruction,
        batch_size=batch_size,
        log10_init_scale=log10_init_scale,
        init_loss=float(jnp.log(2.0)) if loss == "bernoulli" else None,
    )
