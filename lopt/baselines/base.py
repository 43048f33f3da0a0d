"""The one noun of this package, `Baseline`, and what its files share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lopt.base import unknown

Rate = Any  # a learning rate: number, traced scalar, or `count -> number`
NEEDS = frozenset({"value", "value_fn", "grad_fn", "hessian_diag"})
BOTH = ("constant", "cosine")


class Space(NamedTuple):
    """Where a hyper-parameter is searched.

    Fields:
      low: least value.
      high: greatest value.
      log: search in its logarithm.
      default: the source's own.
      choices: the values of a grid, or None.
    """

    low: float
    high: float
    log: bool
    default: float
    choices: tuple[float, ...] | None = None


class Baseline(NamedTuple):
    """A hand-designed optimizer and how to tune it.

    An update is called as `update(grads, state, params, *, value=, grad_fn=, value_fn=, hessian_diag=, key=)`; what is
    not in `needs` may be left out, and what is given without need is ignored:
      grads: gradients at params, on the batch of this step.
      value: () their loss.
      grad_fn: `params -> gradients`, on the same batch; pure, so that it may be called elsewhere and differentiated.
      value_fn: `params -> () loss`, on the same batch; pure.
      hessian_diag: tree like params, an estimate of the Hessian's diagonal on the same batch (Hutchinson's z · Hz);
        where it is needed, `grad_fn` will do instead and the method makes the estimate.
      key: of random draws; without one they follow from the number of the update.

    Parameters and gradients of bfloat16 or float16 are computed in float32, where the state is too; updates have the
    parameters' types. Gradients that are not finite are not caught: divergence is a result.

    Fields:
      name: key of `lopt.baselines.REGISTRY`.
      make: `(*, num_steps=None, schedule=None, **hyper) -> optax transform`. num_steps is the horizon in updates, an
        integer, possibly traced, and may be None unless the method's range depends on it; schedule is None or
        `count -> factor of the learning rate`, count () int32 from 0; hyper are numbers or traced scalars, names as in
        `space`, each the default where absent. ValueError for a name that is not there.
      space: name -> Space. "lr" is there unless the method has no learning rate.
      needs: what an update must be given, of {"value", "value_fn", "grad_fn", "hessian_diag"}.
      eval_params: `(state, params) -> params` to evaluate and to keep, None where they are params themselves.
      schedules: which of "constant", "cosine" make sense.
      version: bumped whenever the numbers a baseline produces change; caches are keyed by it.
      notes: what to know before believing its result.
      source: paper.
      deterministic_only: the method makes sense only where all steps see the same batch.
    """

    name: str
    make: Callable[..., optax.GradientTransformationExtraArgs]
    space: Mapping[str, Space]
    needs: frozenset[str] = frozenset()
    eval_params: Callable[[Any, Any], Any] | None = None
    schedules: tuple[str, ...] = BOTH
    version: int = 1
    notes: str = ""
    source: str = ""
    deterministic_only: bool = False


def rate(default: float, low: float = 1e-4, high: float = 10**-0.5) -> Space:
    """The space of a learning rate."""
    return Space(low, high, True, default)


def decay(default: float = 0.0, high: float = 0.1) -> Space:
    """The space of a weight decay that random search alone looks at."""
    return Space(0.0, high, False, default)


def average(default: float) -> Space:
    """The space of an average's decay: its distance from 1 a tenth of the default's to five times that."""
    distance = 1.0 - default
    return Space(1.0 - 5 * distance, 1.0 - distance / 10, False, default)


def define(
    name: str,
    factory: Callable[..., optax.GradientTransformation],
    space: Mapping[str, Space],
    *,
    horizon: bool = False,
    peak: bool = False,
    needs: frozenset[str] = frozenset(),
    eval_params: Callable[[Any, Any], Any] | None = None,
    **fields: Any,
) -> Baseline:
    """The `Baseline` of a factory.

    Args:
      name: of the baseline.
      factory: `(learning_rate, **hyper) -> optax transform`.
      space: see `Baseline`.
      horizon: the factory takes `num_steps=`.
      peak: the factory takes `peak_lr=`, the learning rate without its schedule.
      needs: see `Baseline`.
      eval_params: see `Baseline`; given parameters in float32 where they are of lower precision.
      fields: the others of `Baseline`.
    """

    def make(*, num_steps: Any = None, schedule: Any = None, **hyper: Any) -> optax.GradientTransformationExtraArgs:
        for key in hyper:
            if key not in space:
                raise unknown(f"lopt.baselines: {name}", "hyper-parameter", key, space)
        values = {key: s.default for key, s in space.items()} | hyper
        lr = values.pop("lr", 1.0)
        if peak:
            values["peak_lr"] = lr
        if horizon:
            values["num_steps"] = num_steps
        return demanding(name, needs, in_float32(factory(scheduled(lr, schedule), **values)))

    def evaluated(state: Any, params: Any) -> Any:
        assert eval_params is not None
        return _like(eval_params(state, _wide(params)), params)

    return Baseline(name, make, MappingProxyType(dict(space)), needs, evaluated if eval_params else None, **fields)


def scheduled(lr: Any, schedule: Callable[[Any], Any] | None) -> Rate:
    """lr times a unit schedule; optax's own schedules refuse a traced peak."""
    return lr if schedule is None else lambda count: lr * schedule(count)


def at(learning_rate: Rate, count: Any) -> Any:
    """The learning rate of update number `count`, from 0."""
    return learning_rate(count) if callable(learning_rate) else learning_rate


def demanding(
    name: str, needs: frozenset[str], tx: optax.GradientTransformationExtraArgs
) -> optax.GradientTransformationExtraArgs:
    """Refuse an update that is not given what the method needs."""

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        if params is None:
            raise ValueError(f"{name}: params, got None; valid: the parameters, update(updates, state, params).")
        given = {key for key, x in extra.items() if x is not None}
        given |= {"hessian_diag"} & needs if "grad_fn" in given else set()
        if missing := sorted(needs - given):
            raise ValueError(f"{name}: update needs {', '.join(f'{key}=' for key in missing)}, got {sorted(given)}.")
        return tx.update(updates, state, params, **extra)

    return transform(tx.init, update)


def in_float32(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Compute low-precision parameters, and keep the state, in float32; give updates the parameters' types.

    No part of the initial state shares a buffer with the parameters, so that a step may donate both.
    """
    tx = optax.with_extra_args_support(tx)

    def init(params: Any) -> Any:
        return jax.tree.map(_copy, tx.init(_wide(params)))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        if params is None:
            return tx.update(updates, state, params, **extra)
        for name in ("value_fn", "grad_fn"):
            if extra.get(name) is not None:
                extra[name] = _widened(extra[name], params)
        for name in ("value", "hessian_diag"):
            if extra.get(name) is not None:
                extra[name] = _wide(extra[name])
        updates, after = tx.update(_wide(updates), state, _wide(params), **extra)
        # Traced hyper-parameters are not weakly typed, so arithmetic with them may change types.
        return _like(updates, params), _like(after, state)

    return transform(init, update)


def _wide(tree: Any) -> Any:
    def widen(x: Any) -> Any:
        kind = jnp.result_type(x)
        low = jnp.issubdtype(kind, jnp.floating) and jnp.finfo(kind).bits < 32
        return jnp.asarray(x, jnp.float32 if low else kind)

    return jax.tree.map(widen, tree)


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key)


def _copy(x: Any) -> Any:
    """Of a type that is not weak, which after an update no part of the state has."""
    return x if _is_key(x) else jnp.array(x, jnp.result_type(x), copy=True)


def _like(tree: Any, model: Any) -> Any:
    return jax.tree.map(lambda x, p: x if _is_key(p) else jnp.asarray(x, jnp.result_type(p)), tree, model)


def _widened(function: Callable[[Any], Any], params: Any) -> Callable[[Any], Any]:
    return lambda wide: _wide(function(_like(wide, params)))


def transform(init: Callable[..., Any], update: Callable[..., Any]) -> optax.GradientTransformationExtraArgs:
    """An optax transform whose update takes extra arguments, `update(updates, state, params, **extra)`."""
    return optax.GradientTransformationExtraArgs(init, update)


class PerTensor(NamedTuple):
    """State of a method that looks at one tensor at a time."""

    count: jax.Array  # () int32, updates so far
    leaves: Any  # like params: the method's state of each tensor


def per_tensor(
    init: Callable[[Any], Any], update: Callable[..., tuple[Any, Any]]
) -> optax.GradientTransformationExtraArgs:
    """An optax transform from the arithmetic of a tensor.

    Args:
      init: `p -> state` of a tensor; a tree of arrays.
      update: `(g, state, p, t) -> (direction, state)`, t () int32 from 1, as papers count. Never called on a tensor
        without elements.
    """

    def init_all(params: Any) -> PerTensor:
        return PerTensor(jnp.zeros((), jnp.int32), jax.tree.map(init, params))

    def update_all(updates: Any, state: PerTensor, params: Any = None, **extra: Any) -> tuple[Any, PerTensor]:
        if params is None:
            raise ValueError("lopt.baselines: params, got None; valid: the parameters, update(updates, state, params).")
        count: Any = optax.safe_increment(state.count)
        g, tree = jax.tree.flatten(updates)
        leaves = zip(g, tree.flatten_up_to(state.leaves), tree.flatten_up_to(params), strict=True)
        moved = [update(*leaf, count) if leaf[0].size else leaf[:2] for leaf in leaves]
        updates, states = ([x[i] for x in moved] for i in range(2))
        return tree.unflatten(updates), PerTensor(count, tree.unflatten(states))

    return transform(init_all, update_all)


@jax.custom_batching.custom_vmap
def _any(due: jax.Array) -> jax.Array:
    return due


@_any.def_vmap
def _any_of_batch(size: int, batched: list[bool], due: jax.Array) -> tuple[jax.Array, bool]:
    return jnp.any(due), False


def when(due: Any, refresh: Callable[[], Any], old: Any) -> Any:
    """`refresh()` if due, else old; computed only then, under vmap too.

    A `cond` on a batched number of updates becomes a select that computes both sides, so that a decomposition made
    every k steps is made every step. Runs that are vmapped are mostly due together: ask whether any is.
    """

    def fresh() -> Any:
        return jax.tree.map(lambda new, was: jnp.where(due, new, was), refresh(), old)

    return jax.lax.cond(_any(due), fresh, lambda: old)


def descend(
    direction: optax.GradientTransformation, learning_rate: Rate, weight_decay: Any = 0.0
) -> optax.GradientTransformationExtraArgs:
    """u = -lr · (direction + weight_decay · p), the decay decoupled."""
    decayed = optax.add_decayed_weights(weight_decay)
    return in_float32(optax.chain(direction, decayed, optax.scale_by_learning_rate(learning_rate)))


@jax.custom_batching.sequential_vmap
def eigh(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues, ascending, and eigenvectors as columns, one matrix at a time also under vmap.

    jaxlib's LAPACK spreads a batch over the threads that run programs. Where several devices share them, as on a CPU,
    each waits for the threads of the other.
    """
    values, vectors = jnp.linalg.eigh(matrix)
    return values, vectors


@jax.custom_batching.sequential_vmap
def orthogonal(matrix: jax.Array) -> jax.Array:
    """Q of a matrix' QR decomposition; one at a time, see `eigh`."""
    return jnp.linalg.qr(matrix)[0]
