"""Variational autoencoders of small images, in haiku. Source: Kingma & Welling (2014), arXiv:1312.6114."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from tasks.base import Task
from tasks.data import images
from tasks.layers import initialise
from tasks.space import ACTIVATION, BATCH, INIT, SMALL_IMAGES, Choice, LogFloat, LogInt, Widths
from tasks.supervised import (
    Examples,
    activation_named,
    flattened,
    is_range,
    library,
    log_uniform,
    minibatched,
    require_positive,
    require_range,
    sources,
    spoken,
)

if TYPE_CHECKING:
    from jaxtyping import Array, Float

SPACE = {
    ("data", "size"): SMALL_IMAGES,
    "hidden": Widths(1, 2, 16, 128),
    "latents": LogInt(2, 32),
    "beta": LogFloat(0.1, 2.0),
    "activation": ACTIVATION,
    "batch_size": BATCH,
    "log10_init_scale": INIT,
    "loss": Choice(("bernoulli", "squared", "absolute")),
}
SPREAD = 0.1  # of pixels about their mean, where they are Gaussian or Laplacian
# Minus the log-likelihood of pixels x, less what does not depend on the logits.
LIKELIHOODS = {
    "bernoulli": lambda logits, x: jax.nn.softplus(logits) - x * logits,
    "squared": lambda logits, x: 0.5 * ((jax.nn.sigmoid(logits) - x) / SPREAD) ** 2,
    "absolute": lambda logits, x: jnp.abs(jax.nn.sigmoid(logits) - x) / SPREAD,
}


def gaussian_kl(mean: Float[Array, "B Z"], log_std: Float[Array, "B Z"]) -> Float[Array, " B"]:
    """KL divergence of N(mean, std²) from N(0, 1) in nats, summed over latents. Source: the paper's appendix B."""
    return 0.5 * jnp.sum(mean**2 + jnp.exp(2 * log_std) - 2 * log_std - 1, axis=-1)


def vae(
    *,
    data: Sequence[str] | str = ("digits", "mnist5k"),
    size: int = 8,
    hidden: Sequence[int] = (32,),
    latents: int = 8,
    beta: float | Sequence[float] = 1.0,
    activation: str = "relu",
    batch_size: int = 64,
    log10_init_scale: float = 0.0,
    loss: str = "bernoulli",
) -> Task:
    """The negative evidence lower bound a pixel, of Gaussian latents.

    Args:
      data: image sets in `tasks.data`, one of which is drawn uniformly per phi.
      size: images are size × size.
      hidden: widths of the encoder, and backwards of the decoder.
      latents: Z.
      beta: weight of the KL divergence, 1e-6 to 1e6; 1 is the bound itself, see Higgins et al. (2017). Of a range (low,
        high) phi draws log-uniformly.
      activation: relu (He init), gelu, silu or tanh (LeCun init); outputs have half LeCun's standard deviation.
      batch_size: B; batches are x [B, pixels] in [0, 1], taken as probabilities.
      log10_init_scale: all weights are multiplied at init by 10**u, u uniform in ± this.
      loss: pixels are bernoulli, or about the sigmoid of the output with a spread of 0.1 Gaussian (squared) or
        Laplacian (absolute), up to a constant.

    Raises ValueError for an unknown data set or an invalid setting; ImportError without haiku.
    """
    hk = library("vae", "haiku")
    require_positive("vae", "hidden", hidden)
    require_positive("vae", "latents", [latents])
    require_range("vae", "beta", beta, 1e-6, 1e6)
    if loss not in LIKELIHOODS:
        raise ValueError(f"vae: loss, got {loss!r}; valid: {', '.join(LIKELIHOODS)}.")
    datasets = [flattened(one) for one in sources("vae", data, lambda name: images(name, size))]
    activate, gain = activation_named("vae", activation)
    pixels = datasets[0].x.shape[1]

    def bound(x: Float[Array, "B P"]) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
        """Of each image the reconstruction's loss and the KL divergence, both over the number of pixels."""
        y = x
        for width in hidden:
            y = activate(hk.Linear(width)(y))
        mean, log_std = jnp.split(hk.Linear(2 * latents, name="output_code")(y), 2, axis=-1)
        y = mean + jnp.exp(log_std) * jax.random.normal(hk.next_rng_key(), mean.shape).astype(mean.dtype)
        for width in reversed(hidden):
            y = activate(hk.Linear(width)(y))
        logits = hk.Linear(pixels, name="output")(y)
        return jnp.mean(LIKELIHOODS[loss](logits, x), axis=-1), gaussian_kl(mean, log_std) / pixels

    model = hk.transform(bound)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, pixels), jnp.float32))

    def objective(params: Any, key: Array, batch: Examples, weight: Any = beta) -> Float[Array, ""]:
        reconstruction, divergence = model.apply(params, key, batch.x)
        return jnp.mean(reconstruction + weight * divergence)

    def metrics(params: Any, key: Array, batch: Examples) -> dict[str, Array]:
        reconstruction, divergence = model.apply(params, key, batch.x)
        return {"reconstruction": jnp.mean(reconstruction), "kl": jnp.mean(divergence)}

    other = "" if loss == "bernoulli" else f", {loss} loss"
    task = minibatched(
        "vae",
        datasets,
        label=f"{size}x{size}, {'-'.join(map(str, (*hidden, latents)))}, beta {spoken(beta)}, {activation}{other}",
        init=lambda key, scale: initialise(key, shapes, scale=scale[0], gain=gain),
        loss=objective,
        metrics=metrics,
        batch_size=batch_size,
        log10_init_scale=log10_init_scale,
    )
    if not is_range(beta):
        return task
    return task._replace(
        sample=lambda key: task.sample(key)._replace(drawn=log_uniform(key, beta)),
        loss=lambda params, key, phi, batch: objective(params, key, batch, phi.drawn),
    )
