"""Accumulators and normalised features shared by the rules, and the small network that reads them.

Source: Metz et al. (2022), "Practical tradeoffs between memory, compute, and performance in learned
optimizers", arXiv:2203.11860; factored second moments: Shazeer and Stern (2018), arXiv:1804.04235.

Decays are a leading axis of length D. Factored statistics keep their reduced axis with length 1, so that
every feature broadcasts to its tensor and none is materialised before it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from jaxtyping import Array, Float

    from lopt.tensor import Moved, Scaled, Tensor

TIME_SCALES = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1e3, 3e3, 1e4, 3e4, 1e5)
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of an iteration


class Accumulators(NamedTuple):
    """Moving averages of one tensor, all starting at 0, without bias correction."""

    m: Float[Array, "D *shape"]  # EMA of the gradient, gradient units
    v: Float[Array, " *shape"]  # EMA of the squared gradient
    row: Float[Array, "D *row"]  # EMA of the mean of g² over the largest axis; rank < 2: EMA of g²
    col: Float[Array, "D *col"] | None  # the same over the second largest axis; rank < 2: None


class Decays(NamedTuple):
    """Of the moving averages: share of the old value that is kept at a step."""

    m: tuple[float, ...] | Array  # [D] of the momenta
    v: float | Array  # of the second moment
    factored: tuple[float, ...] | Array  # [D] of the factored second moments


def decays(rule: str, momenta: Sequence[float], second_moment: float, factored: Sequence[float], n: int = 3) -> Decays:
    """Settings of a rule, n momenta and factored averages. Raises ValueError if there are others or not in [0, 1)."""
    given = {"momenta": tuple(momenta), "second_moment": (second_moment,), "factored": tuple(factored)}
    for key, values in given.items():
        count = 1 if key == "second_moment" else n
        if len(values) != count or not all(0 <= x < 1 for x in values):
            raise ValueError(f"{rule}: {key}, got {list(values)}; valid: {count} in [0, 1).")
    return Decays(given["momenta"], second_moment, given["factored"])


class Factored(NamedTuple):
    """Adafactor's rsqrt preconditioners of one tensor; gradient times row times col is of order 1."""

    row: Float[Array, "D *row"] | Sequence[Float[Array, " *row"]]
    col: Float[Array, "D *col"] | Sequence[Float[Array, " *col"]] | None


def factored_axes(shape: Sequence[int]) -> tuple[int, int] | None:
    """(second largest, largest) axis by a stable sort, or None below rank 2."""
    if len(shape) < 2:
        return None
    order = np.argsort(shape, kind="stable")
    return int(order[-2]), int(order[-1])


def init_accumulators(p: Array, decays: int, axes: tuple[int, int] | None) -> Accumulators:
    """Zeros for a tensor of rank >= 1, with D = `decays` momenta and factored averages."""

    def zeros(reduced: int | None) -> Array:
        shape = [1 if i == reduced else n for i, n in enumerate(p.shape)]
        return jnp.zeros((decays, *shape), p.dtype)

    if axes is None:
        return Accumulators(zeros(None), jnp.zeros_like(p), zeros(None), None)
    second, largest = axes
    return Accumulators(zeros(None), jnp.zeros_like(p), zeros(largest), zeros(second))


def ema(old: Any, new: Array, decay: Array | Sequence[float]) -> Any:
    """decay · old + (1 - decay) · new, for D decays at once; `old` [D, …] or a tuple of D."""
    if isinstance(old, tuple):  # a block's, see `blocks.take`
        return tuple(decay[i] * x + (1 - decay[i]) * new for i, x in enumerate(old))
    d = jnp.asarray(decay).reshape((-1,) + (1,) * new.ndim).astype(new.dtype)
    return d * old + (1 - d) * new[None]


class Rows(NamedTuple):
    """The factored averages of a tensor after a step; they are needed whole before its elements are looked at."""

    row: Float[Array, "D *row"]
    col: Float[Array, "D *col"]
    mean: Float[Array, "D *mean"]  # of row over the second largest axis


def rows(tensor: Tensor, axes: tuple[int, int] | None, decays: Decays) -> Rows | None:
    """The new factored averages; None below rank 2, where they are not factored."""
    if axes is None:
        return None
    second, largest = axes

    def means(g, p, acc, _):
        floored = g * g + 1e-30
        return [jnp.mean(floored, axis=axis, keepdims=True) for axis in (largest, second)]

    row, col = tensor.means(means, axes=[(largest,), (second,)])
    row, col = ema(tensor.state.row, row, decays.factored), ema(tensor.state.col, col, decays.factored)
    return Rows(row, col, tensor.pooled(jnp.mean(row, axis=1 + second, keepdims=True), (second,)))


def accumulate(acc: Accumulators, g: Array, rows: Rows | None, decays: Decays) -> Accumulators:
    """One step of every moving average.

    Args:
      acc: the averages so far.
      g: gradient of the tensor, rank >= 1.
      rows: the new factored averages, or None below rank 2.
      decays: of the averages.
    """
    m, v, factored = decays
    square = g * g
    second_moment = v * acc.v + (1 - v) * square
    if rows is None:
        return Accumulators(ema(acc.m, g, m), second_moment, ema(acc.row, square + 1e-30, factored), None)
    return Accumulators(ema(acc.m, g, m), second_moment, rows.row, rows.col)


def move(
    tensor: Tensor,
    f: Callable[..., tuple[Array, Accumulators]],
    rows: Rows | None,
    scaled: Scaled | None = None,
    extra: Any = None,
) -> tuple[Moved, Accumulators]:
    """`Tensor.move` for a state of accumulators, f: `(g, p, acc, extra) -> (direction, acc)`; extra is rows if None."""
    extra = rows if extra is None else extra
    if rows is None:
        return tensor.move(f, tensor.state, extra, scaled)
    acc = tensor.state
    factored: dict[str, Any] = {"row": None, "col": None}

    def block(g, p, large, extra):
        direction, new = f(g, p, large, extra)
        return direction, new._replace(**factored)

    moved, large = tensor.move(block, acc._replace(**factored), extra, scaled)
    return moved, large._replace(row=tensor.keep(rows.row, acc.row), col=tensor.keep(rows.col, acc.col))


def safe_rsqrt(x: Array) -> Array:
    return jax.lax.rsqrt(jnp.maximum(x, 1e-9))


def safe_sqrt(x: Array) -> Array:
    """The root, with derivative 0 instead of infinity at 0: a gradient of exactly 0 must not make that of theta NaN."""
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1.0)), 0.0)


def orthogonalize(x: Array, iterations: int = 5) -> Array:
    """Newton–Schulz on the last two axes: singular values are driven towards 1. Jordan et al. (2024), Muon."""
    transpose = x.shape[-2] > x.shape[-1]
    x = jnp.swapaxes(x, -1, -2) if transpose else x
    x = x / (safe_sqrt(jnp.sum(x * x, axis=(-2, -1), keepdims=True)) + 1e-8)
    a, b, c = NEWTON_SCHULZ
    for _ in range(iterations):
        gram = x @ jnp.swapaxes(x, -1, -2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return jnp.swapaxes(x, -1, -2) if transpose else x


def factors(acc: Accumulators, mean: Array | None) -> Factored:
    """rsqrt(row / mean row) and rsqrt(col); rank < 2 (mean is None): rsqrt of the full average."""
    if acc.col is None or mean is None:
        return Factored([safe_rsqrt(row + 1e-9) for row in acc.row], None)
    row = each(lambda x, of_all: safe_rsqrt(x / (of_all + 1e-9)), acc.row, mean)
    return Factored(row, each(safe_rsqrt, acc.col))


def each(f: Callable[..., Array], *xs: Any) -> Any:
    """f of D arrays: of a tuple, which averages as long as a tensor in blocks are, one by one, else in one kernel."""
    return [f(*x) for x in zip(*xs, strict=True)] if isinstance(xs[0], tuple) else f(*xs)


def factored_gradient(g: Array, f: Factored) -> list[Array]:
    """The gradient preconditioned with each of the D factored averages."""
    return [g * f.row[i] if f.col is None else g * f.row[i] * f.col[i] for i in range(len(f.row))]


def factored_momenta(acc: Accumulators, f: Factored, eps: float) -> list[Array]:
    """The D momenta preconditioned with their factored average; rank < 2: m · rsqrt(average + eps)."""
    if f.col is None:
        # Below the floor the momentum is 0 too; without it the derivative of rsqrt overflows.
        return [m * jax.lax.rsqrt(jnp.maximum(row + eps, 1e-24)) for m, row in zip(acc.m, acc.row, strict=True)]
    return [m * r * c for m, r, c in zip(acc.m, f.row, f.col, strict=True)]


def rsqrt_all(xs: Array | tuple[Array, ...], eps: float) -> list[Array]:
    return list(each(lambda x: jax.lax.rsqrt(x + eps), xs))


def time_features(count: Array) -> Float[Array, " 11"]:
    """tanh(t/tau - 1), t the number of updates before this one."""
    return jnp.tanh(count.astype(jnp.float32) / jnp.asarray(TIME_SCALES, jnp.float32) - 1)


def rms_scales(
    tensor: Tensor,
    f: Callable[..., Sequence[Array]],
    rows: Rows | None,
    eps: float,
    axes: tuple[int, ...] | None = None,
) -> Float[Array, "F *kept"]:
    """1/sqrt(mean x² + eps) of each feature over `axes` (None: the whole tensor), kept as length-1 axes.

    Args:
      tensor: whose features they are.
      f: `(g, p, acc, rows) -> features`, of blocks.
      rows: see `Rows`.
      eps: added to the mean.
      axes: reduced ones.
    """
    axes = tuple(range(len(tensor.leaf.shape))) if axes is None else axes
    return jax.lax.rsqrt(tensor.mean_squares(f, rows, axes) + eps)


class Layer(NamedTuple):
    w: Float[Array, "fan_in fan_out"]
    b: Float[Array, " fan_out"]


def init_mlp(key: Array, sizes: Sequence[int]) -> tuple[Layer, ...]:
    """Truncated-normal weights of std 1/sqrt(fan_in), zero biases; the key is consumed."""
    keys = jax.random.split(key, len(sizes) - 1)
    init = jax.nn.initializers.truncated_normal

    def layer(k, n, m):
        # jax truncates at ±2 without restoring the variance, which the published std is meant before
        return Layer(init(1 / np.sqrt(n))(k, (n, m), jnp.float32), jnp.zeros((m,), jnp.float32))

    return tuple(layer(k, n, m) for k, n, m in zip(keys, sizes[:-1], sizes[1:], strict=True))


def linear(w: Array, features: Sequence[Array], shape: tuple[int, ...], constant: Array) -> Array:
    """Sum of w [F + C] times F features, each broadcastable to `shape`, and C constants; an array of `shape`."""
    n = len(features)
    return _weighted_sum(w[:n], features, shape) + w[n:] @ constant


def _weighted_sum(w: Array, features: Sequence[Array], shape: tuple[int, ...]) -> Array:
    """Features of equal shape are summed first, so factored ones cost what their few elements cost."""
    by_shape: dict[tuple[int, ...], Array] = {}
    for i, x in enumerate(features):
        term = w[i] * x
        by_shape[x.shape] = by_shape[x.shape] + term if x.shape in by_shape else term
    return sum(jnp.broadcast_to(x, shape) for x in by_shape.values())  # pyrefly: ignore


SCALAR_WIDTH = 8  # hidden widths up to here are computed as scalars × tensors, wider ones as matrix products


def mlp(
    layers: Sequence[Layer],
    features: Sequence[Array],
    scales: Float[Array, "F *kept"] | None,
    shape: tuple[int, ...],
    constant: Array | None,
) -> list[Array]:
    """Apply a ReLU network to every element of a tensor.

    Args:
      layers: the network; the first rows of its first weight matrix belong to `features`, the others to
        `constant`.
      features: F arrays, each broadcastable to `shape`.
      scales: of each feature, see `rms_scales`, or None for 1.
      shape: of the tensor.
      constant: [C] inputs that are the same for every element, or None.

    Returns:
      One array of `shape` an output unit.
    """
    first, *rest = layers
    n = len(features)
    bias = first.b if constant is None else first.b + constant @ first.w[n:]
    w = first.w[:n]
    if scales is not None and scales.size == n:
        # Into the weights, in one array: a loop that reads a hundred scalars from as many places is not vectorised.
        w = w * scales.reshape(n, 1)
    elif scales is not None:
        features = [x * s for x, s in zip(features, scales, strict=True)]
    if bias.shape[0] <= SCALAR_WIDTH:
        return _scalar_mlp(w, bias, rest, features, shape)
    features = [*features, jnp.ones((1,) * len(shape), features[0].dtype)]
    h = jnp.stack([jnp.broadcast_to(x, shape).reshape(-1) for x in features])  # [F + 1, elements]
    for i, layer in enumerate([Layer(w, bias), *rest]):
        h = _with_unit(layer, last=i == len(rest)).T @ (jax.nn.relu(h) if i else h)
    return [x.reshape(shape) for x in h]


def _with_unit(layer: Layer, last: bool) -> Array:
    """[fan_in + 1, fan_out + 1] a layer whose bias belongs to an input that is 1 and is handed on, but by the last.

    XLA takes a bias that is broadcast inside a loop out of it, and keeps [fan_out, elements] for each.
    """
    w = jnp.concatenate([layer.w, layer.b[None]])
    if last:
        return w
    one = jnp.zeros((w.shape[0], 1), w.dtype).at[-1].set(1.0)
    return jnp.concatenate([w, one], axis=1)


def _scalar_mlp(w, bias, rest, features, shape) -> list[Array]:
    """Scalars × tensors, which XLA fuses into a few elementwise loops: no feature stack, no tiny matrix products."""
    units = [bias[j] + _weighted_sum(w[:, j], features, shape) for j in range(bias.shape[0])]
    for layer in rest:
        units = [jax.nn.relu(x) for x in units]
        units = [sum(x * layer.w[i, j] for i, x in enumerate(units)) + layer.b[j] for j in range(layer.b.shape[0])]
    return units


def lstm_cell(gates: Float[Array, "*n 4H"], cell: Float[Array, "*n H"]) -> tuple[Array, Array]:
    """Next (cell, hidden) of an LSTM whose gates are in the order i g f o, the forget gate's bias raised by 1."""
    i, g, f, o = jnp.split(gates, 4, axis=-1)
    cell = jax.nn.sigmoid(f + 1) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
    return cell, jax.nn.sigmoid(o) * jnp.tanh(cell)
