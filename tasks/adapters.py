"""A model, a loss and data become a `Task`: `from_linen`, `from_nnx`, `from_haiku`, and `from_functions` for the rest.

The data are a `tasks.data.Dataset`, or a dict of splits: {"train": rows, "validation": rows, "test": rows}, where rows
are a pytree of arrays with one leading axis, for the model adapters a pair (x, y). A minibatch is such a pytree too.
Models whose state changes while they train (BatchNorm, caches) are refused: a task is a pure function of its params.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from tasks import checks, held_out
from tasks.base import SPLITS, Source, Split, Task
from tasks.data import Dataset, sha256
from tasks.supervised import MAX_EVAL_BATCH, MAX_EVAL_ROWS, require_positive

if TYPE_CHECKING:
    from jaxtyping import Array, Float, PRNGKeyArray

    Rows = Any  # pytree of arrays [n, ...]
    Data = Dataset | Mapping[str, Rows]
    Loss = Callable[[Any, Any], Float[Array, ""]]  # (outputs [B, ...], y [B, ...]) -> scalar
    Metrics = Callable[[Any, Any], dict[str, Any]]  # (outputs, y) -> dict of scalars

STATEFUL = "a task is a pure function of its params, so use GroupNorm or LayerNorm"


def from_functions(
    init: Callable[[PRNGKeyArray], Any],
    loss: Callable[[Any, PRNGKeyArray, Rows], Float[Array, ""]],
    data: Data,
    *,
    batch_size: int = 64,
    metrics: Callable[[Any, PRNGKeyArray, Rows], dict[str, Any]] | None = None,
    name: str = "from_functions",
) -> Task:
    """A task of two pure functions and data.

    Args:
      init: `key -> params`, the key is consumed.
      loss: `(params, key, batch) -> scalar`; the batch is rows as in `data`, of a Dataset the pair (x, y).
      data: see above.
      batch_size: rows of a minibatch, drawn with replacement from a split.
      metrics: `(params, key, batch) -> dict of scalars`.
      name: for tables and messages.

    Raises ValueError for a missing split, rows of different numbers or layouts, and functions that cannot be called so.
    `tasks.check` judges what they compute.
    """
    require_positive(name, "batch_size", [batch_size])
    rows, splits, provenance = _rows(name, data)
    if not isinstance(data, Dataset):  # a recording is judged by its provenance alone
        provenance += tuple(Source(one, sha256(one)) for one in held_out.inside(rows))

    def batch(key: PRNGKeyArray, phi: Any, held: Rows, split: Split) -> Rows:
        start, stop = splits[_named(name, split)]
        index = jax.random.randint(key, (batch_size,), start, stop)
        return jax.tree.map(lambda x: x[index], held)

    def eval_batches(phi: Any, held: Rows, split: Split) -> Rows:
        start, stop = splits[_named(name, split)]
        count = math.ceil(min(stop - start, MAX_EVAL_ROWS) / MAX_EVAL_BATCH)
        size = min(stop - start, MAX_EVAL_ROWS) // count
        return jax.tree.map(lambda x: x[start : start + count * size].reshape(count, size, *x.shape[1:]), held)

    arrays = jax.tree.map(jnp.asarray, rows)
    params = _traced(name, "init", init, jax.random.key(0))
    drawn = jax.eval_shape(lambda held: batch(jax.random.key(0), (), held, "train"), arrays)
    value = _traced(name, "loss", loss, params, jax.random.key(0), drawn)
    if getattr(value, "shape", None) != ():
        got = checks.layout(value)
        raise ValueError(f"tasks: the loss of {name} has {got}; valid: one scalar, e.g. the mean, others in metrics.")
    if metrics is not None:
        _traced(name, "metrics", metrics, params, jax.random.key(0), drawn)
    return Task(
        data=arrays,
        sample=lambda key: (),
        init=lambda key, phi: init(key),
        batch=batch,
        loss=lambda params, key, phi, batch: loss(params, key, batch),
        metrics=None if metrics is None else lambda params, key, phi, batch: metrics(params, key, batch),
        eval_batches=eval_batches,
        name=name,
        provenance=provenance,
    )


def from_linen(
    module: Any,
    loss: Loss,
    data: Data,
    *,
    batch_size: int = 64,
    metrics: Metrics | None = None,
    name: str = "",
    **call: Any,
) -> Task:
    """A flax Linen module: `loss(module(x), y)` on minibatches (x, y).

    Args:
      module: is called with x and `call`; a dropout in it gets a key, and so does whatever else draws.
      loss: `(outputs, y) -> scalar`.
      data: rows (x, y), see above.
      batch_size: rows of a minibatch.
      metrics: `(outputs, y) -> dict of scalars`.
      name: default: the module's class.
      call: keywords of the module's call, e.g. train=True.

    Raises ValueError for a module with state besides its params, and as `from_functions`.
    """
    name = name or type(module).__name__
    example = _example(name, data)

    def variables(key: PRNGKeyArray) -> Any:
        params_key, dropout_key = jax.random.split(key)
        return module.init({"params": params_key, "dropout": dropout_key}, example, **call)

    state = sorted(set(_traced(name, "init", variables, jax.random.key(0))) - {"params"})
    _refuse_state("from_linen", name, state)

    def apply(params: Any, key: PRNGKeyArray, x: Any) -> Any:
        # Streams of other names draw from that of the params.
        return module.apply({"params": params}, x, rngs={"dropout": key, "params": jax.random.fold_in(key, 0)}, **call)

    return _supervised(lambda key: variables(key)["params"], apply, loss, data, batch_size, metrics, name)


def from_nnx(
    make: Callable[[Any], Any],
    loss: Loss,
    data: Data,
    *,
    batch_size: int = 64,
    metrics: Metrics | None = None,
    name: str = "",
    **call: Any,
) -> Task:
    """A flax NNX module: `loss(make(rngs)(x), y)` on minibatches (x, y).

    Args:
      make: `nnx.Rngs -> module`, e.g. `lambda rngs: MLP(784, 10, rngs=rngs)`; its streams serve dropout too. Arrays
        that are attributes of the module (a table of positions) are constants, those of one call for all inits.
      loss, data, batch_size, metrics, call: as in `from_linen`.
      name: default: the module's class.

    Params are nested dicts of its `nnx.Param`s. Raises ValueError for a module with other variables, and as
    `from_functions`.
    """
    from flax import nnx

    if isinstance(make, nnx.Module):
        got = type(make).__name__
        raise ValueError(f"tasks.from_nnx: make, got a {got}; valid: a function of nnx.Rngs that returns one.")
    _example(name or "from_nnx", data)  # the rows are pairs
    build = lambda: make(nnx.Rngs(0))  # noqa: E731
    model = checks.guard(f"tasks: the init of {name or 'from_nnx'}", nnx.eval_shape, build)
    if any(isinstance(x, jax.core.Tracer | jax.ShapeDtypeStruct) for _, x in nnx.iter_graph(model)):
        model = build()  # it has arrays of its own, of which a trace does not have the values
    name = name or type(model).__name__
    graph, params, streams, rest = nnx.split(model, nnx.Param, nnx.RngState, ...)
    held = jax.tree.leaves(rest, is_leaf=lambda x: isinstance(x, nnx.Variable))
    kinds = sorted({type(one).__name__ for one in held if isinstance(one, nnx.Variable)})
    _refuse_state("from_nnx", name, kinds)
    treedef = jax.tree.structure(params)

    def init(key: PRNGKeyArray) -> Any:
        return nnx.to_pure_dict(nnx.state(make(nnx.Rngs(key)), nnx.Param))

    def apply(params: Any, key: PRNGKeyArray, x: Any) -> Any:
        # Both are sorted by name. To call `make` again would compile its initialisers into every step.
        weights = jax.tree.unflatten(treedef, jax.tree.leaves(params))
        numbers = iter(range(len(jax.tree.leaves(streams))))

        def fresh(leaf: Any) -> Any:
            number = next(numbers)
            if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                return jax.random.fold_in(key, number)
            return jnp.zeros(leaf.shape, leaf.dtype)  # draws so far

        return nnx.merge(graph, weights, jax.tree.map(fresh, streams), rest)(x, **call)

    return _supervised(init, apply, loss, data, batch_size, metrics, name)


def from_haiku(
    forward: Callable[..., Any],
    loss: Loss,
    data: Data,
    *,
    batch_size: int = 64,
    metrics: Metrics | None = None,
    name: str = "",
    **call: Any,
) -> Task:
    """A function that uses haiku modules: `loss(forward(x), y)` on minibatches (x, y).

    Args:
      forward: `x -> outputs`, not yet transformed; may draw keys by `hk.next_rng_key`.
      loss, data, batch_size, metrics, call: as in `from_linen`.
      name: default: the function's name.

    Raises ValueError for a function with haiku state, and as `from_functions`.
    """
    import haiku as hk

    name = name or getattr(forward, "__name__", "from_haiku")
    if not callable(forward):  # two functions by now
        got = type(forward).__name__
        raise ValueError(f"tasks.from_haiku: forward, got a {got}; valid: the function that hk.transform would take.")
    example, model = _example(name, data), hk.transform_with_state(forward)

    def both(key: PRNGKeyArray) -> Any:
        return model.init(key, example, **call)

    _, state = _traced(name, "init", both, jax.random.key(0))
    _refuse_state("from_haiku", name, sorted(state))

    def apply(params: Any, key: PRNGKeyArray, x: Any) -> Any:
        outputs, _ = model.apply(params, {}, key, x, **call)
        return outputs

    return _supervised(lambda key: both(key)[0], apply, loss, data, batch_size, metrics, name)


def _supervised(
    init: Callable[[PRNGKeyArray], Any],
    apply: Callable[[Any, PRNGKeyArray, Any], Any],
    loss: Loss,
    data: Data,
    batch_size: int,
    metrics: Metrics | None,
    name: str,
) -> Task:
    def measured(measure: Callable[[Any, Any], Any]) -> Callable[[Any, PRNGKeyArray, Rows], Any]:
        def function(params: Any, key: PRNGKeyArray, batch: Rows) -> Any:
            x, y = batch
            return measure(apply(params, key, x), y)

        return function

    own = None if metrics is None else measured(metrics)
    return from_functions(init, measured(loss), data, batch_size=batch_size, metrics=own, name=name)


def _refuse_state(where: str, name: str, kinds: list[str]) -> None:
    if kinds:
        listed = ", ".join(kinds)
        raise ValueError(f"tasks.{where}: {name} has state besides its params: {listed}; valid: none, {STATEFUL}.")


def _traced(name: str, what: str, function: Callable[..., Any], *given: Any) -> Any:
    """The shapes of what a function returns. Raises ValueError in one line for whatever it raises."""
    return checks.guard(f"tasks: the {what} of {name}", jax.eval_shape, function, *given)


def _example(name: str, data: Data) -> Any:
    """x of one row of the data, [1, ...]."""
    rows = (data.x, data.y) if isinstance(data, Dataset) else _parts(name, data)[0]
    if not isinstance(rows, tuple | list) or len(rows) != 2:
        got = type(rows).__name__
        raise ValueError(f"tasks: {name}: data, got rows of a {got}; valid: pairs (x, y), or a Dataset.")
    return jax.tree.map(lambda x: jnp.asarray(x[:1]), rows[0])


def _rows(name: str, data: Data) -> tuple[Rows, dict[Split, tuple[int, int]], tuple[Source, ...]]:
    """All rows, the range of each split, and where they come from."""
    if isinstance(data, Dataset):
        return (data.x, data.y), data.splits, data.provenance
    parts = _parts(name, data)
    rows = jax.tree.map(lambda *xs: np.concatenate(xs), *parts)
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(rows):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    stops = np.cumsum([0, *(len(jax.tree.leaves(part)[0]) for part in parts)]).tolist()
    splits = {split: (stops[i], stops[i + 1]) for i, split in enumerate(SPLITS)}
    return rows, splits, (Source(name, digest.hexdigest()),)


def _parts(name: str, data: Any) -> list[Rows]:
    """The rows of each split of a dict, in the order of SPLITS. Raises ValueError for what is not as it has to be."""
    if not isinstance(data, Mapping) or set(data) != set(SPLITS):
        got = sorted(data) if isinstance(data, Mapping) else type(data).__name__
        raise ValueError(f"tasks: {name}: data, got {got}; valid: a Dataset, or a dict of {', '.join(SPLITS)}.")
    parts = [jax.tree.map(np.asarray, data[split]) for split in SPLITS]
    for split, part in zip(SPLITS, parts, strict=True):
        lengths = {leaf.shape[:1] for leaf in jax.tree.leaves(part)}
        if len(lengths) != 1 or not all(lengths) or 0 in next(iter(lengths)):
            got = sorted(lengths)
            raise ValueError(f"tasks: {name}: data, got {split} rows of {got}; valid: one number, at least 1.")
    kinds = {str(leaf.dtype) for part in parts for leaf in jax.tree.leaves(part) if leaf.dtype.kind not in "biufcV"}
    if kinds:
        raise ValueError(f"tasks: {name}: data, got arrays of {', '.join(sorted(kinds))}; valid: numbers.")
    layouts = [jax.tree.map(lambda x: (x.shape[1:], x.dtype), part) for part in parts]
    if any(layout != layouts[0] for layout in layouts):
        raise ValueError(f"tasks: {name}: data, got splits of different layouts {layouts}; valid: equal ones.")
    return parts


def _named(name: str, split: Split) -> Split:
    if split not in SPLITS:
        raise ValueError(f"{name}: split, got {split!r}; valid: {', '.join(SPLITS)}.")
    return split
