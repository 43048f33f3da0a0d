"""Networks from a pixel's place to its colour, with sines. Source: Sitzmann et al. (2020), SIREN, arXiv:2006.09661."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tasks.base import Split, Task
from tasks.data import images
from tasks.space import INIT, Choice, LogInt, Widths
from tasks.supervised import (
    channelled,
    dense,
    init_scales,
    mlp_forward,
    require_init_scale,
    require_positive,
    split_index,
)

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int, PRNGKeyArray

    from tasks.supervised import Params

SPACE = {
    ("data", "size"): Choice((("digits", 8), ("mnist5k", 14), ("mnist5k", 28))),
    "hidden": Widths(1, 4, 16, 64),
    "omega": Choice(((3.0, 10.0), (10.0, 30.0), (30.0, 60.0))),
    "batch_size": LogInt(32, 256),
    "log10_init_scale": INIT,
    "loss": Choice(("squared", "absolute")),
}
LOSSES = {"squared": jnp.square, "absolute": jnp.abs}
SHARES = (0.0, 0.7, 0.85, 1.0)  # of the pixels: train, validation, test


class Phi(NamedTuple):
    """Task parameters."""

    image: Int[Array, ""]  # row of the data
    omega: Float[Array, ""]  # multiplies what goes into a sine
    scale: Float[Array, " L"]  # multiplies weight matrix l at init


class Pixels(NamedTuple):
    """Some pixels of one image."""

    place: Float[Array, "B 2"]  # row and column in [-1, 1]
    colour: Float[Array, "B C"]  # in [-1, 1]


def coordinate_mlp(
    *,
    data: str = "mnist5k",
    size: int = 14,
    hidden: Sequence[int] = (32, 32),
    omega: tuple[float, float] = (5.0, 15.0),
    batch_size: int = 64,
    log10_init_scale: float = 0.0,
    loss: str = "squared",
    mup_base: Sequence[int] | None = None,
) -> Task:
    """Mean error of one image's pixels; validation and test are pixels that training never sees.

    Args:
      data: an image set in `tasks.data`; phi draws one image of its training split.
      size: images are size × size.
      hidden: widths, 1 or more.
      omega: range of the sines' frequency; phi draws from it log-uniformly.
      batch_size: B pixels, drawn with replacement.
      log10_init_scale: each weight matrix is multiplied at init by 10**u, u uniform in ± this.
      loss: squared or absolute error. The activation is the sine: with others it is no SIREN.
      mup_base: widths of the base network of the maximal-update parametrisation; None: the standard one.

    Raises ValueError for an unknown data set or an invalid setting, naming the valid ones.
    """
    require_positive("coordinate_mlp", "hidden", hidden, least=1)
    require_positive("coordinate_mlp", "batch_size", [batch_size])
    if len(omega) != 2 or not 0.0 < omega[0] <= omega[1] <= 1e3:
        raise ValueError(f"coordinate_mlp: omega, got {omega}; valid: a range (low, high) above 0, to 1000.")
    require_init_scale("coordinate_mlp", log10_init_scale)
    if loss not in LOSSES:
        raise ValueError(f"coordinate_mlp: loss, got {loss!r}; valid: {', '.join(LOSSES)}.")
    measure = LOSSES[loss]
    forward, output_fan_in = mlp_forward("coordinate_mlp", hidden, mup_base)
    dataset = channelled(images(data, size))
    first, last = dataset.splits["train"]
    channels = dataset.x.shape[-1]
    shapes = list(itertools.pairwise((2, *hidden, channels)))
    # What does not shrink as a network grows: all biases, and the weights of the output.
    base = (2, *(mup_base or hidden))
    stops = [round(share * size * size) for share in SHARES]
    # A fixed order that scatters each split over the image.
    stride = next(s for s in range(round(0.618 * size * size), size * size) if math.gcd(s, size * size) == 1)

    def sample(key: PRNGKeyArray) -> Phi:
        image_key, omega_key = jax.random.split(key)
        exponent = jax.random.uniform(omega_key, minval=math.log(omega[0]), maxval=math.log(omega[1]))
        image = jax.random.randint(image_key, (), 0, last - first)
        return Phi(image, jnp.exp(exponent), init_scales(key, len(shapes), log10_init_scale))

    def init(key: PRNGKeyArray, phi: Phi) -> Params:
        unit = jax.random.uniform(key, (sum((i + 1) * o for i, o in shapes),), minval=-1.0, maxval=1.0)
        draws = jnp.split(unit, np.cumsum([(i + 1) * o for i, o in shapes])[:-1])
        params = {}
        for index, ((i, o), draw) in enumerate(zip(shapes, draws, strict=True)):
            fan_in = output_fan_in if output_fan_in and index == len(hidden) else i
            bound = math.sqrt(6 / fan_in) / phi.omega if index else 1 / i
            w, b = draw[: i * o].reshape(i, o), draw[i * o :]
            params[f"layer{index}"] = {"w": bound * phi.scale[index] * w, "b": b / math.sqrt(base[index])}
        return params

    def pixels(phi: Phi, held: Array, number: Int[Array, " B"]) -> Pixels:
        number = number * stride % (size * size)
        row, column = number // size, number % size
        place = 2 * (jnp.stack([row, column], axis=-1) + 0.5) / size - 1
        return Pixels(place, 2 * held[phi.image, row, column] - 1)

    def batch(key: PRNGKeyArray, phi: Phi, held: Array, split: Split) -> Pixels:
        index = split_index(split)
        number = jax.random.randint(key, (batch_size,), stops[index], stops[index + 1])
        return pixels(phi, held, number)

    def eval_batches(phi: Phi, held: Array, split: Split) -> Pixels:
        index = split_index(split)
        found = pixels(phi, held, jnp.arange(stops[index], stops[index + 1]))
        return jax.tree.map(lambda x: x[None], found)

    def errors(params: Params, phi: Phi, batch: Pixels) -> Float[Array, "B C"]:
        x = batch.place
        for index in range(len(hidden)):
            x = jnp.sin(phi.omega * dense(params[f"layer{index}"], x))
        return dense(params[f"layer{len(hidden)}"], forward * x) - batch.colour

    def metrics(params: Params, key: PRNGKeyArray, phi: Phi, batch: Pixels) -> dict[str, Any]:
        """Peak signal-to-noise ratio in dB; the signal's range is 2."""
        return {"psnr": 10 * jnp.log10(4 / jnp.maximum(jnp.mean(errors(params, phi, batch) ** 2), 1e-12))}

    spread = f", init 10^±{log10_init_scale:g}" if log10_init_scale else ""
    return Task(
        data=jnp.asarray(dataset.x[first:last]),
        sample=sample,
        init=init,
        batch=batch,
        loss=lambda params, key, phi, batch: jnp.mean(measure(errors(params, phi, batch))),
        metrics=metrics,
        eval_batches=eval_batches,
        name=f"coordinate_mlp({dataset.source.id}, {size}x{size}, {'-'.join(map(str, hidden))}, omega {omega[0]:g} to "
        f"{omega[1]:g}, {'' if loss == 'squared' else f'{loss} loss, '}batch {batch_size}{spread})",
        provenance=dataset.provenance,
    )
