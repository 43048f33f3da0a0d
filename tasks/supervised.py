"""What the classification families share: layers, cross-entropy, minibatches and evaluation sets.

Several data sets of one shape make ONE compiled task: their rows are concatenated in `data`, and phi says which rows
are whose. Not a family itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tasks.base import SPLITS, Split, Task
from tasks.data import Dataset

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int, PRNGKeyArray

    Params = dict[str, dict[str, Array]]

# name -> (function, variance gain of the layer before it: 2 is He's, 1 is LeCun's)
ACTIVATIONS: dict[str, tuple[Callable[[Any], Any], float]] = {
    "relu": (jax.nn.relu, 2.0),
    "gelu": (jax.nn.gelu, 1.0),
    "silu": (jax.nn.silu, 1.0),
    "tanh": (jnp.tanh, 1.0),
}
# The logits' variance at init is at most about OUTPUT_GAIN, which adds under 10 % to a loss of log(classes).
OUTPUT_GAIN = 0.25
MAX_EVAL_ROWS, MAX_EVAL_BATCH = 750, 250


class Examples(NamedTuple):
    """Labelled rows: the whole data [n, ...], a minibatch [B, ...] or evaluation batches [num_batches, b, ...]."""

    x: Float[Array, "n ..."]
    y: Int[Array, " n"]


class Phi(NamedTuple):
    """Task parameters: the data set that was drawn, as row ranges in `data` in the order of SPLITS, and init scales."""

    start: Int[Array, " 3"]
    size: Int[Array, " 3"]
    scale: Float[Array, " L"]  # multiplies weight matrix l at init


def sources(family: str, names: Sequence[str] | str, load: Callable[[str], Dataset]) -> list[Dataset]:
    """Load the named data sets. Raises ValueError unless they share classes and row shape."""
    names = [names] if isinstance(names, str) else list(names)
    if not names or len(set(names)) < len(names):
        raise ValueError(f"{family}: data, got {names}; valid: one or more different names.")
    loaded = [load(name) for name in names]
    if len({(one.classes, one.x.shape[1:]) for one in loaded}) > 1:
        got = ", ".join(f"{one.source.id} {one.classes} classes of {list(one.x.shape[1:])}" for one in loaded)
        raise ValueError(f"{family}: data, got {got}; valid: sets with equal classes and row shapes.")
    return loaded


def require_positive(family: str, argument: str, values: Sequence[int], *, least: int = 0) -> None:
    """Raise ValueError unless `values` are positive ints, at least `least` of them."""
    if len(values) < least or any(not isinstance(v, int) or isinstance(v, bool) or v < 1 for v in values):
        count = f"{least} or more " if least else ""
        raise ValueError(f"{family}: {argument}, got {values}; valid: {count}positive integers.")


def cross_entropy(logits: Float[Array, "B C"], y: Int[Array, " B"]) -> Float[Array, ""]:
    """Mean softmax cross-entropy in nats."""
    # A one-hot sum: under vmap on a CPU take_along_axis, whose gradient is a scatter, costs half a step more.
    picked = jnp.sum(logits * jax.nn.one_hot(y, logits.shape[-1], dtype=logits.dtype), axis=-1)
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked)


def dense(layer: dict[str, Array], x: Float[Array, "B I"]) -> Float[Array, "B O"]:
    return x @ layer["w"] + layer["b"][None, :]


def mlp(params: Params, x: Float[Array, "B D"], activate: Callable[[Array], Array]) -> Float[Array, "B C"]:
    """Logits; `params` are layer0, layer1, … in order."""
    for index in range(len(params) - 1):
        x = activate(dense(params[f"layer{index}"], x))
    return dense(params[f"layer{len(params) - 1}"], x)


def init_layers(key: PRNGKeyArray, shapes: Sequence[tuple[int, ...]], scale: Float[Array, " L"], gain: float) -> Params:
    """{"layer0": {"w", "b"}, …}: normal weights of variance gain / fan_in times scale**2, zero biases.

    Args:
      key: consumed.
      shapes: of each weight, fan-in axes first and the outputs last: [in, out] or HWIO.
      scale: multiplies each weight.
      gain: variance gain of all but the last layer, which has OUTPUT_GAIN.
    """
    sizes = [math.prod(shape) for shape in shapes]
    # One draw: normals drawn shape by shape took the CNN ten times as long to compile.
    draws = jnp.split(jax.random.normal(key, (sum(sizes),)), np.cumsum(sizes)[:-1])
    stds = [math.sqrt(gain * shape[-1] / size) for shape, size in zip(shapes, sizes, strict=True)]
    stds[-1] *= math.sqrt(OUTPUT_GAIN / gain)
    return {
        f"layer{i}": {"w": draws[i].reshape(shape) * (scale[i] * stds[i]), "b": jnp.zeros(shape[-1])}
        for i, shape in enumerate(shapes)
    }


def classifier(
    family: str,
    datasets: Sequence[Dataset],
    *,
    label: str,
    shapes: Sequence[tuple[int, ...]],
    apply: Callable[[Params, Array, Callable[[Array], Array]], Array],
    batch_size: int,
    activation: str,
    log10_init_scale: float,
) -> Task:
    """The task of a family: softmax classification of `datasets` by `apply(params, x, activate) -> logits`.

    Args:
      label: what the network looks like, for the task's name.
      shapes: of each weight, see `init_layers`.
      log10_init_scale: every weight is multiplied at init by 10**u, u uniform in ± this.

    Raises ValueError for an invalid batch_size, activation or log10_init_scale.
    """
    require_positive(family, "batch_size", [batch_size])
    if activation not in ACTIVATIONS:
        raise ValueError(f"{family}: activation, got {activation!r}; valid: {', '.join(ACTIVATIONS)}.")
    if not 0.0 <= log10_init_scale < math.inf:
        raise ValueError(f"{family}: log10_init_scale, got {log10_init_scale}; valid: a finite number ≥ 0.")
    activate, gain = ACTIVATIONS[activation]
    offsets = np.cumsum([0, *(len(one.x) for one in datasets[:-1])])
    ranges = np.array([[one.splits[split] for split in SPLITS] for one in datasets], np.int32)  # [sources, 3, 2]
    starts, sizes = (ranges[..., 0] + offsets[:, None]).astype(np.int32), ranges[..., 1] - ranges[..., 0]

    def sample(key: PRNGKeyArray) -> Phi:
        source_key, scale_key = jax.random.split(key)
        source = jax.random.randint(source_key, (), 0, len(datasets))
        exponent = jax.random.uniform(scale_key, (len(shapes),), minval=-log10_init_scale, maxval=log10_init_scale)
        return Phi(jnp.asarray(starts)[source], jnp.asarray(sizes)[source], 10.0**exponent)

    def batch(key: PRNGKeyArray, phi: Phi, data: Examples, split: Split) -> Examples:
        index = _index(split)
        rows = phi.start[index] + jax.random.randint(key, (batch_size,), 0, phi.size[index])
        return Examples(data.x[rows], data.y[rows])

    def eval_batches(phi: Phi, data: Examples, split: Split) -> Examples:
        index = _index(split)
        # The same rows for every source, so that the shape does not depend on phi.
        rows = min(int(sizes[:, index].min()), MAX_EVAL_ROWS)
        count = math.ceil(rows / MAX_EVAL_BATCH)

        def cut(array: Array) -> Array:
            held = jax.lax.dynamic_slice_in_dim(array, phi.start[index], rows - rows % count)
            return held.reshape(count, -1, *array.shape[1:])

        return Examples(cut(data.x), cut(data.y))

    def loss(params: Params, key: PRNGKeyArray, phi: Phi, batch: Examples) -> Float[Array, ""]:
        return cross_entropy(apply(params, batch.x, activate), batch.y)

    def metrics(params: Params, key: PRNGKeyArray, phi: Phi, batch: Examples) -> dict[str, Array]:
        return {"accuracy": jnp.mean(jnp.argmax(apply(params, batch.x, activate), axis=-1) == batch.y)}

    spread = f", init 10^±{log10_init_scale:g}" if log10_init_scale else ""
    ids = "+".join(one.source.id for one in datasets)
    return Task(
        data=Examples(
            jnp.asarray(np.concatenate([one.x for one in datasets])),
            jnp.asarray(np.concatenate([one.y for one in datasets])),
        ),
        sample=sample,
        init=lambda key, phi: init_layers(key, shapes, phi.scale, gain),
        batch=batch,
        loss=loss,
        metrics=metrics,
        eval_batches=eval_batches,
        name=f"{family}({ids}, {label}, {activation}, batch {batch_size}{spread})",
        provenance=tuple(source for one in datasets for source in one.provenance),
        init_loss=None if log10_init_scale else math.log(datasets[0].classes),
        family=family,
    )


def _index(split: Split) -> int:
    if split not in SPLITS:
        raise ValueError(f"tasks: split, got {split!r}; valid: {', '.join(SPLITS)}.")
    return SPLITS.index(split)
