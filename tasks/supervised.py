"""What the families on rows of examples share: layers, losses, minibatches and evaluation sets.

Several data sets of one shape make ONE compiled task: their rows are concatenated in `data`, and phi says which rows
are whose. Not a family itself.
"""

from __future__ import annotations

import importlib
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
# Of one prediction.
ERRORS: dict[str, Callable[[Any], Any]] = {
    "squared": lambda error: 0.5 * error**2,
    "absolute": jnp.abs,
    "huber": lambda error: jnp.where(jnp.abs(error) < 1, 0.5 * error**2, jnp.abs(error) - 0.5),
}
# The logits' variance at init is at most about OUTPUT_GAIN, which adds under 10 % to a loss of log(classes).
OUTPUT_GAIN = 0.25
MAX_EVAL_ROWS, MAX_EVAL_BATCH = 750, 250
SCALES, STREAMS, NUMBERS = 0x5CA1E, 0x57EA0, 0x0B0E5  # folded into keys that are split too, into fewer parts than these


class Examples(NamedTuple):
    """Labelled rows: the whole data [n, ...], a minibatch [B, ...] or evaluation batches [num_batches, b, ...]."""

    x: Float[Array, "n ..."]
    y: Int[Array, " n"]


class Phi(NamedTuple):
    """Task parameters: the data set that was drawn, as row ranges in `data` in the order of SPLITS, and init scales."""

    start: Int[Array, " 3"]
    size: Int[Array, " 3"]
    scale: Float[Array, " L"]  # multiplies weight matrix l at init
    drawn: Any = ()  # what else a family draws


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


def channelled(dataset: Dataset) -> Dataset:
    """Images [n, H, W, C]: grey ones get their channel axis."""
    return dataset._replace(x=dataset.x[..., None]) if dataset.x.ndim == 3 else dataset


def flattened(dataset: Dataset) -> Dataset:
    """Rows [n, features]."""
    return dataset._replace(x=dataset.x.reshape(len(dataset.x), -1))


def library(family: str, module: str) -> Any:
    """The module of an extra. Raises ImportError that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{family}: needs {module}; run: pip install 'lopt[models]'.") from error


def require_positive(family: str, argument: str, values: Sequence[int], *, least: int = 0) -> None:
    """Raise ValueError unless `values` are positive ints, at least `least` of them."""
    if len(values) < least or any(not isinstance(v, int) or isinstance(v, bool) or v < 1 for v in values):
        count = f"{least} or more " if least else ""
        raise ValueError(f"{family}: {argument}, got {values}; valid: {count}positive integers.")


def require_within(family: str, name: str, got: float, least: float, most: float) -> None:
    """Refuse a number that is not in [least, most]."""
    if not least <= got <= most:
        raise ValueError(f"{family}: {name}, got {got}; valid: {least:g} to {most:g}.")


def require_ends(family: str, name: str, got: Sequence[float], least: float, most: float) -> None:
    """Refuse what is no range (low, high) in [least, most]."""
    if len(got) != 2 or not least <= got[0] <= got[1] <= most:
        raise ValueError(f"{family}: {name}, got {tuple(got)}; valid: a range (low, high) in [{least:g}, {most:g}].")


def cross_entropy(logits: Float[Array, "B C"], y: Int[Array, " B"]) -> Float[Array, ""]:
    """Mean softmax cross-entropy in nats."""
    # A one-hot sum: under vmap on a CPU take_along_axis, whose gradient is a scatter, costs half a step more.
    picked = jnp.sum(logits * jax.nn.one_hot(y, logits.shape[-1], dtype=logits.dtype), axis=-1)
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked)


def squared(logits: Float[Array, "B C"], y: Int[Array, " B"]) -> Float[Array, ""]:
    """Mean squared distance of the logits from the one-hot labels."""
    return jnp.mean(jnp.sum((logits - jax.nn.one_hot(y, logits.shape[-1], dtype=logits.dtype)) ** 2, axis=-1))


CLASSIFICATION_LOSSES = {"cross_entropy": cross_entropy, "squared": squared}


def activation_named(family: str, name: str) -> tuple[Callable[[Array], Array], float]:
    """The activation and its gain. Raises ValueError for an unknown one."""
    if name not in ACTIVATIONS:
        raise ValueError(f"{family}: activation, got {name!r}; valid: {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[name]


def dense(layer: dict[str, Array], x: Float[Array, "B I"]) -> Float[Array, "B O"]:
    return x @ layer["w"] + layer["b"][None, :]


def mlp(
    params: Params, x: Float[Array, "B D"], activate: Callable[[Array], Array], *, forward: float = 1.0
) -> Float[Array, "B C"]:
    """Logits; `params` are layer0, layer1, … in order; `forward` multiplies the output layer's product (muP)."""
    for index in range(len(params) - 1):
        x = activate(dense(params[f"layer{index}"], x))
    return dense(params[f"layer{len(params) - 1}"], forward * x)


def mlp_forward(family: str, hidden: Sequence[int], mup_base: Sequence[int] | None) -> tuple[float, int | None]:
    """What muP changes in an MLP relative to the one of widths `mup_base`: `forward` of `mlp`, `output_fan_in`.

    Hidden matrices need no change: their variance is 1/fan_in at every width. What the optimizer needs is in lopt.mup.

    Raises ValueError unless base and network are of one depth, at least 1.
    """
    if mup_base is None:
        return 1.0, None
    require_positive(family, "mup_base", mup_base, least=1)
    if len(mup_base) != len(hidden):
        raise ValueError(f"{family}: mup_base, got {tuple(mup_base)}; valid: as many widths as hidden={tuple(hidden)}.")
    return mup_base[-1] / hidden[-1], mup_base[-1]


def init_layers(
    key: PRNGKeyArray,
    shapes: Sequence[tuple[int, ...]],
    scale: Float[Array, " L"],
    gain: float,
    *,
    output_fan_in: int | None = None,
) -> Params:
    """{"layer0": {"w", "b"}, …}: normal weights of variance gain / fan_in times scale**2, zero biases.

    Args:
      key: consumed.
      shapes: of each weight, fan-in axes first and the outputs last: [in, out] or HWIO.
      scale: multiplies each weight.
      gain: variance gain of all but the last layer, which has OUTPUT_GAIN.
      output_fan_in: what the last layer's variance is divided by, if not its fan-in (muP: that of the base width).
    """
    sizes = [math.prod(shape) for shape in shapes]
    # One draw: normals drawn shape by shape took the CNN ten times as long to compile.
    draws = jnp.split(jax.random.normal(key, (sum(sizes),)), np.cumsum(sizes)[:-1])
    stds = [math.sqrt(gain * shape[-1] / size) for shape, size in zip(shapes, sizes, strict=True)]
    stds[-1] = math.sqrt(OUTPUT_GAIN * shapes[-1][-1] / sizes[-1])
    if output_fan_in:
        stds[-1] = math.sqrt(OUTPUT_GAIN / output_fan_in)
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
    loss: str = "cross_entropy",
    output_fan_in: int | None = None,
) -> Task:
    """Classification by a plain stack of weights: `apply(params, x, activate) -> logits`, params by `init_layers`.

    Args:
      label: what the network looks like, for the task's name.
      shapes: of each weight, see `init_layers`.
      log10_init_scale: every weight is multiplied at init by 10**u, u uniform in ± this.
      output_fan_in: as in `init_layers`.

    Raises ValueError for an invalid activation, and as `classification`.
    """
    activate, gain = activation_named(family, activation)
    return classification(
        family,
        datasets,
        label=f"{label}, {activation}",
        init=lambda key, scale: init_layers(key, shapes, scale, gain, output_fan_in=output_fan_in),
        apply=lambda params, x: apply(params, x, activate),
        scales=len(shapes),
        batch_size=batch_size,
        log10_init_scale=log10_init_scale,
        loss=loss,
    )


def classification(
    family: str,
    datasets: Sequence[Dataset],
    *,
    label: str,
    init: Callable[[PRNGKeyArray, Float[Array, " L"]], Any],
    apply: Callable[[Any, Array], Array],
    batch_size: int,
    log10_init_scale: float = 0.0,
    scales: int = 1,
    loss: str = "cross_entropy",
) -> Task:
    """The task of classifying `datasets` by `apply(params, x) -> logits`.

    Args:
      init: `(key, scale) -> params`.
      scales: L, how many init scales phi holds; each is 10**u, u uniform in ± log10_init_scale.
      loss: "cross_entropy" in nats, or "squared": the squared distance of logits and one-hot labels.

    Raises ValueError for an invalid loss, and as `minibatched`.
    """
    if loss not in CLASSIFICATION_LOSSES:
        raise ValueError(f"{family}: loss, got {loss!r}; valid: {', '.join(CLASSIFICATION_LOSSES)}.")
    measure = CLASSIFICATION_LOSSES[loss]

    def metrics(params: Any, key: PRNGKeyArray, batch: Examples) -> dict[str, Array]:
        return {"accuracy": jnp.mean(jnp.argmax(apply(params, batch.x), axis=-1) == batch.y)}

    return minibatched(
        family,
        datasets,
        label=label if loss == "cross_entropy" else f"{label}, {loss} loss",
        init=init,
        loss=lambda params, key, batch: measure(apply(params, batch.x), batch.y),
        metrics=metrics,
        scales=scales,
        batch_size=batch_size,
        log10_init_scale=log10_init_scale,
        init_loss=math.log(datasets[0].classes) if loss == "cross_entropy" else None,
    )


def minibatched(
    family: str,
    datasets: Sequence[Dataset],
    *,
    label: str,
    init: Callable[[PRNGKeyArray, Float[Array, " L"]], Any],
    loss: Callable[[Any, PRNGKeyArray, Examples], Float[Array, ""]],
    metrics: Callable[[Any, PRNGKeyArray, Examples], dict[str, Array]] | None = None,
    batch_size: int,
    log10_init_scale: float = 0.0,
    scales: int = 1,
    init_loss: float | None = None,
) -> Task:
    """A task on minibatches of rows of `datasets`.

    Args:
      init: `(key, scale) -> params`, scale [L] multiplies weights.
      loss: `(params, key, batch) -> scalar`.
      metrics: `(params, key, batch) -> dict of scalars`.
      scales: L; each is 10**u, u uniform in ± log10_init_scale.
      init_loss: see Task; left out where init scales vary.

    Raises ValueError for an invalid batch_size or log10_init_scale.
    """
    require_positive(family, "batch_size", [batch_size])
    require_init_scale(family, log10_init_scale)
    offsets = np.cumsum([0, *(len(one.x) for one in datasets[:-1])])
    ranges = np.array([[one.splits[split] for split in SPLITS] for one in datasets], np.int32)  # [sources, 3, 2]
    starts, sizes = (ranges[..., 0] + offsets[:, None]).astype(np.int32), ranges[..., 1] - ranges[..., 0]

    def sample(key: PRNGKeyArray) -> Phi:
        source_key, scale_key = jax.random.split(key)
        source = jax.random.randint(source_key, (), 0, len(datasets))
        exponent = jax.random.uniform(scale_key, (scales,), minval=-log10_init_scale, maxval=log10_init_scale)
        return Phi(jnp.asarray(starts)[source], jnp.asarray(sizes)[source], 10.0**exponent)

    def batch(key: PRNGKeyArray, phi: Phi, data: Examples, split: Split) -> Examples:
        index = split_index(split)
        rows = phi.start[index] + jax.random.randint(key, (batch_size,), 0, phi.size[index])
        return Examples(data.x[rows], data.y[rows])

    def eval_batches(phi: Phi, data: Examples, split: Split) -> Examples:
        index = split_index(split)
        # The same rows for every source, so that the shape does not depend on phi.
        rows = min(int(sizes[:, index].min()), MAX_EVAL_ROWS)
        count = math.ceil(rows / MAX_EVAL_BATCH)

        def cut(array: Array) -> Array:
            held = jax.lax.dynamic_slice_in_dim(array, phi.start[index], rows - rows % count)
            return held.reshape(count, -1, *array.shape[1:])

        return Examples(cut(data.x), cut(data.y))

    spread = f", init 10^±{log10_init_scale:g}" if log10_init_scale else ""
    ids = "+".join(one.source.id for one in datasets)
    return Task(
        data=Examples(
            jnp.asarray(np.concatenate([one.x for one in datasets])),
            jnp.asarray(np.concatenate([one.y for one in datasets])),
        ),
        sample=sample,
        init=lambda key, phi: init(key, phi.scale),
        batch=batch,
        loss=lambda params, key, phi, batch: loss(params, key, batch),
        metrics=None if metrics is None else lambda params, key, phi, batch: metrics(params, key, batch),
        eval_batches=eval_batches,
        name=f"{family}({ids}, {label}, batch {batch_size}{spread})",
        provenance=tuple(source for one in datasets for source in one.provenance),
        init_loss=None if log10_init_scale else init_loss,
        family=family,
    )


def init_scales(key: PRNGKeyArray, count: int, log10_init_scale: float) -> Float[Array, " L"]:
    """Of a phi with other parts, which its key draws too: 10**u, u uniform in ± log10_init_scale."""
    exponent = jax.random.uniform(
        jax.random.fold_in(key, SCALES), (count,), minval=-log10_init_scale, maxval=log10_init_scale
    )
    return 10.0**exponent


def require_range(family: str, argument: str, value: Any, low: float, high: float, *, zero: bool = False) -> None:
    """Raise ValueError unless `value` is a number from low to high, or 0 where allowed, or a pair of such in order."""
    ends = [value] if isinstance(value, int | float) else list(value)
    number = lambda x: isinstance(x, int | float) and low <= x <= high  # noqa: E731
    if not (zero and value == 0) and (not 1 <= len(ends) <= 2 or not all(map(number, ends)) or ends != sorted(ends)):
        also = "0, or " if zero else ""
        raise ValueError(
            f"{family}: {argument}, got {value}; valid: {also}{low:g} to {high:g}, or a range (low, high) within that."
        )


def is_range(value: Any) -> bool:
    """Whether a setting is a range (low, high), from which phi draws."""
    return not isinstance(value, int | float)


def log_uniform(key: PRNGKeyArray, value: Any) -> Any:
    """Of a range a number drawn by a part of the key, which others may use as well; a number as it is."""
    if not is_range(value):
        return value
    low, high = (math.log(end) for end in (value[0], value[-1]))
    return jnp.exp(jax.random.uniform(jax.random.fold_in(key, NUMBERS), minval=low, maxval=high))


def spoken(value: Any) -> str:
    """A number or a range, for the task's name."""
    return f"{value[0]:g} to {value[-1]:g}" if is_range(value) else f"{value:g}"


def require_init_scale(family: str, log10_init_scale: float) -> None:
    if not 0.0 <= log10_init_scale < math.inf:
        raise ValueError(f"{family}: log10_init_scale, got {log10_init_scale}; valid: a finite number ≥ 0.")


def split_key(key: PRNGKeyArray, split: Split) -> PRNGKeyArray:
    """The key of a split, where batches are drawn afresh: one key gives each split another batch."""
    index = split_index(split)
    return jax.random.fold_in(key, STREAMS + index) if index else key


def split_index(split: Split) -> int:
    if split not in SPLITS:
        raise ValueError(f"tasks: split, got {split!r}; valid: {', '.join(SPLITS)}.")
    return SPLITS.index(split)
