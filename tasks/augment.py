"""Wrappers that make another task of any task, as VeLO's augmentations do; `tasks.make(…, augment=…)` applies them.

What was drawn is in phi, what has state is in `grad_transform`. Changes of the gradient (noise, normalisation) act in
the order of the wrappers, and delays and sparsity after them all. Provenance and family stay those of the task.

Source: Metz et al. (2022), "VeLO: training versatile learned optimizers by scaling up", arXiv:2211.09760, appendix C.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tasks.base import Split, Task
from tasks.space import near

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int, PRNGKeyArray

LEVELS = ("global", "tensor", "parameter")


class Phi(NamedTuple):
    """Task parameters: those of the wrapped task, and what the wrapper drew."""

    task: Any
    drawn: Any


class Delayed(NamedTuple):
    """Gradients that wait."""

    waiting: optax.Updates  # [D, ...] a leaf
    t: Int[Array, ""]  # which of them is next


def reparametrise(task: Task, *, level: str = "tensor", decades: float = 1.0) -> Task:
    """The same function of other params: the task's are `scale * params`, where init divides by the scale.

    Args:
      level: one scale for all ("global"), one a "tensor" or one a "parameter".
      decades: scales are log-uniform in 10^±decades.
    """
    _choose("reparametrise", "level", level, LEVELS)
    _between("reparametrise", "decades", decades, 0.0, 10.0)

    def draw(key: PRNGKeyArray, phi: Any) -> Any:
        leaves, treedef = jax.tree.flatten(jax.eval_shape(task.init, key, phi))
        if level == "global":
            return treedef.unflatten([_log_uniform(key, (), decades)] * len(leaves))
        shapes = [leaf.shape if level == "parameter" else () for leaf in leaves]
        sizes = [math.prod(shape) for shape in shapes]
        # One draw for all tensors, which is quicker to compile.
        parts = jnp.split(_log_uniform(key, (sum(sizes),), decades), np.cumsum(sizes)[:-1])
        return treedef.unflatten([part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)])

    def true(params: Any, phi: Phi) -> Any:
        return jax.tree.map(jnp.multiply, phi.drawn, params)

    inner, gradient, metrics = drawing(task, draw), _gradient(task), task.metrics

    def value_and_grad(params: Any, key: PRNGKeyArray, phi: Phi, batch: Any) -> tuple[Array, Any]:
        value, grads = gradient(true(params, phi), key, phi.task, batch)
        return value, true(grads, phi)  # the chain rule

    return changed(
        inner,
        init=lambda key, phi: jax.tree.map(jnp.divide, task.init(key, phi.task), phi.drawn),
        loss=lambda params, key, phi, batch: task.loss(true(params, phi), key, phi.task, batch),
        metrics=metrics and (lambda params, key, phi, batch: metrics(true(params, phi), key, phi.task, batch)),
        value_and_grad=task.value_and_grad and value_and_grad,
        name=f"{task.name} | reparametrised ({level}, 10^±{decades:g})",
    )


def scale_loss(task: Task, *, decades: float = 1.0) -> Task:
    """Loss and gradient times a number that phi draws log-uniformly in 10^±decades."""
    _between("scale_loss", "decades", decades, 0.0, 10.0)
    inner, gradient = drawing(task, lambda key, phi: _log_uniform(key, (), decades)), _gradient(task)

    def value_and_grad(params: Any, key: PRNGKeyArray, phi: Phi, batch: Any) -> tuple[Array, Any]:
        return jax.tree.map(lambda x: phi.drawn * x, gradient(params, key, phi.task, batch))

    return changed(
        inner,
        loss=lambda params, key, phi, batch: phi.drawn * task.loss(params, key, phi.task, batch),
        value_and_grad=task.value_and_grad and value_and_grad,
        name=f"{task.name} | loss times 10^±{decades:g}",
        init_loss=None,
    )


def noise_gradient(task: Task, *, ratio: float = 0.1) -> Task:
    """Normal noise on the gradient, whose standard deviation is `ratio` of each tensor's root mean square."""
    _between("noise_gradient", "ratio", ratio, 0.0, 1e6)
    gradient = _gradient(task)

    def value_and_grad(params: Any, key: PRNGKeyArray, phi: Any, batch: Any) -> tuple[Array, Any]:
        loss_key, noise_key = jax.random.split(key)
        value, grads = gradient(params, loss_key, phi, batch)
        leaves, treedef = jax.tree.flatten(grads)
        keys = jax.random.split(noise_key, len(leaves))
        noisy = [
            g + ratio * jnp.sqrt(jnp.mean(g**2)) * jax.random.normal(k, g.shape, g.dtype)
            for g, k in zip(leaves, keys, strict=True)
        ]
        return value, treedef.unflatten(noisy)

    return changed(task, value_and_grad=value_and_grad, name=f"{task.name} | gradient noise {ratio:g}")


def normalise_gradient(task: Task, *, level: str = "global") -> Task:
    """The gradient over its norm, of all together ("global") or of each "tensor"; a zero gradient stays zero."""
    _choose("normalise_gradient", "level", level, LEVELS[:2])
    gradient = _gradient(task)

    def over(tree: Any) -> Any:
        # By the largest element first: squares of small gradients would underflow.
        largest = jnp.max(jnp.stack([jnp.max(jnp.abs(g)) for g in jax.tree.leaves(tree)]))
        largest = jnp.where(largest > 0, largest, 1.0)
        norm = jnp.sqrt(sum(jnp.sum((g / largest) ** 2) for g in jax.tree.leaves(tree)))
        return jax.tree.map(lambda g: g / largest / jnp.where(norm > 0, norm, 1.0), tree)

    def value_and_grad(params: Any, key: PRNGKeyArray, phi: Any, batch: Any) -> tuple[Array, Any]:
        value, grads = gradient(params, key, phi, batch)
        return value, over(grads) if level == "global" else jax.tree.map(over, grads)

    return changed(task, value_and_grad=value_and_grad, name=f"{task.name} | gradient normalised ({level})")


def reduce_batch(task: Task, *, rows: int = 8) -> Task:
    """Training batches of the first `rows` rows; validation and test batches stay whole.

    Raises ValueError where not all arrays of a batch have the same, larger leading axis, or where the loss does not
    take fewer: the noise of a quadratic has coordinates, not rows.
    """
    phi, params, whole = _shapes(task)
    leading = {leaf.shape[:1] for leaf in jax.tree.leaves(whole)}
    largest = next(iter(leading))[0] if len(leading) == 1 and leading != {()} else 0
    if not largest or not _takes(task, params, phi, whole, largest - 1 if largest > 2 else 1):
        raise ValueError(f"tasks.augment.reduce_batch: task, got {task.name}; valid: tasks whose batches have rows.")
    if not isinstance(rows, int) or not 1 <= rows <= largest:
        raise ValueError(f"tasks.augment.reduce_batch: rows, got {rows}; valid: 1 to {largest}, the task's batch.")

    def batch(key: PRNGKeyArray, phi: Any, data: Any, split: Split) -> Any:
        whole = task.batch(key, phi, data, split)
        return jax.tree.map(lambda leaf: leaf[:rows], whole) if split == "train" else whole

    return changed(task, batch=batch, name=f"{task.name} | batch {rows}")


def noise_labels(task: Task, *, share: float = 0.1) -> Task:
    """A `share` of the training examples have `y` drawn uniformly from the classes, the same whenever one is met.

    Which ones, and what they have, follows from what phi drew and from the example itself. The training loss of an
    evaluation is that on these labels too; validation and test are left alone.

    Labels are the field or the entry `y` of data and batches, or of pairs (x, y), as adapters make them, the second.

    Raises ValueError where there are none that are integers, or where the loss does not look at them.
    """
    _between("noise_labels", "share", share, 0.0, 1.0)
    phi, params, whole = _shapes(task)
    held = _labels(task.data)
    if held is None or not _is_integer(_labels(whole)) or not _uses_labels(task, params, phi, whole):
        raise ValueError(f"tasks.augment.noise_labels: task, got {task.name}; valid: tasks with classes y.")
    classes = int(jnp.max(held)) + 1

    def relabel(phi: Any, batch: Any) -> Any:
        def one(mark: Int[Array, ""], y: Array) -> Array:
            which_key, label_key = jax.random.split(jax.random.fold_in(jax.random.key(phi.drawn), mark))
            drawn = jax.random.randint(label_key, y.shape, 0, classes, y.dtype)
            return jnp.where(jax.random.bernoulli(which_key, share, y.shape), drawn, y)

        return _with_labels(batch, jax.vmap(one)(_marks(_with_labels(batch, ())), _labels(batch)))

    inner = drawing(task, lambda key, phi: jax.random.bits(key, (), jnp.uint32))
    evaluated: Any = inner.eval_batches

    def batch(key: PRNGKeyArray, phi: Any, data: Any, split: Split) -> Any:
        clean = inner.batch(key, phi, data, split)
        return relabel(phi, clean) if split == "train" else clean

    def eval_batches(phi: Any, data: Any, split: Split) -> Any:
        clean = evaluated(phi, data, split)
        return jax.vmap(lambda batch: relabel(phi, batch))(clean) if split == "train" else clean

    name = f"{task.name} | label noise {share:g}"
    return changed(inner, batch=batch, eval_batches=evaluated and eval_batches, name=name)


def _is_pair(rows: Any) -> bool:
    return isinstance(rows, tuple | list) and len(rows) == 2 and not hasattr(rows, "_fields")


def _labels(rows: Any) -> Any:
    """`y` of rows, None if there is none."""
    found = rows.get("y") if isinstance(rows, Mapping) else rows[1] if _is_pair(rows) else getattr(rows, "y", None)
    return found if hasattr(found, "dtype") else None


def _with_labels(rows: Any, y: Any) -> Any:
    """The rows with another `y`."""
    if isinstance(rows, Mapping):
        return {**rows, "y": y}
    return type(rows)([rows[0], y]) if _is_pair(rows) else rows._replace(y=y)


def _is_integer(labels: Any) -> bool:
    return labels is not None and jnp.issubdtype(labels.dtype, jnp.integer)


def _marks(rows: Any) -> Int[Array, " B"]:
    """A number for each row of arrays [B, …] that follows from its content: equal rows have equal ones."""
    flat = [x.reshape(len(x), -1) for x in jax.tree.leaves(rows)]
    words = [
        jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
        if jnp.issubdtype(x.dtype, jnp.floating)
        else x.astype(jnp.uint32)
        for x in flat
    ]
    every = jnp.concatenate(words, axis=1)
    odd = 2 * jax.random.bits(jax.random.key(0), (every.shape[1],), jnp.uint32) + 1
    return jnp.sum((every ^ every >> 15) * odd[None], axis=1, dtype=jnp.uint32)


def lower_precision(task: Task, *, dtype: str = "bfloat16") -> Task:
    """Loss and gradient computed in "bfloat16" or "float16"; params, gradients and losses stay as they are.

    The gradient of an `es` task is computed in float32, from params that were rounded: it is made of differences of
    losses, which are zero in 8 bits.
    """
    _choose("lower_precision", "dtype", dtype, ("bfloat16", "float16"))

    def cast(tree: Any) -> Any:
        low = lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x  # noqa: E731
        return jax.tree.map(low, tree)

    def loss(params: Any, key: PRNGKeyArray, phi: Any, batch: Any) -> Float[Array, ""]:
        return task.loss(cast(params), key, cast(phi), cast(batch)).astype(jnp.float32)

    gradient = _gradient(task)

    def value_and_grad(params: Any, key: PRNGKeyArray, phi: Any, batch: Any) -> tuple[Array, Any]:
        value, grads = gradient(cast(params), key, cast(phi), cast(batch))
        return value.astype(jnp.float32), jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)

    return changed(
        task, loss=loss, value_and_grad=task.value_and_grad and value_and_grad, name=f"{task.name} | {dtype}"
    )


def delay_gradient(task: Task, *, steps: int = 1) -> Task:
    """Gradients of `steps` steps ago, zero before the first, as in asynchronous training. The state holds those."""
    if not isinstance(steps, int) or not 1 <= steps <= 1000:
        raise ValueError(f"tasks.augment.delay_gradient: steps, got {steps}; valid: 1 to 1000.")

    def init(params: Any) -> Delayed:
        waiting = jax.tree.map(lambda p: jnp.zeros((steps, *p.shape), p.dtype), params)
        return Delayed(waiting, jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Delayed]:
        out = jax.tree.map(lambda held: held[state.t], state.waiting)
        waiting = jax.tree.map(lambda held, g: held.at[state.t].set(g), state.waiting, updates)
        return out, Delayed(waiting, (state.t + 1) % steps)

    return _then(task, optax.GradientTransformation(init, update), f"gradient {steps} late")


def sparsify_gradient(task: Task, *, keep: float = 0.1) -> Task:
    """The largest elements of each tensor alone; the state adds up what was left out until it is large enough.

    Args:
      keep: share of each tensor's elements, rounded up.

    Source: Aji & Heafield (2017), "Sparse communication for distributed gradient descent", arXiv:1704.05021.
    """
    if not 0.0 < keep <= 1.0:
        raise ValueError(f"tasks.augment.sparsify_gradient: keep, got {keep}; valid: above 0, to 1.")

    def select(total: Array) -> Array:
        size = abs(total.ravel())
        least = jax.lax.top_k(size, math.ceil(keep * size.size))[0][-1]
        return jnp.where(jnp.abs(total) >= least, total, 0.0)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        total = jax.tree.map(jnp.add, state, updates)
        out = jax.tree.map(select, total)
        return out, jax.tree.map(jnp.subtract, total, out)

    transform = optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), update)
    return _then(task, transform, f"gradient's largest {keep:g}")


AUGMENTATIONS: dict[str, Callable[..., Task]] = {
    one.__name__: one
    for one in (
        reparametrise,
        scale_loss,
        noise_gradient,
        normalise_gradient,
        reduce_batch,
        noise_labels,
        lower_precision,
        delay_gradient,
        sparsify_gradient,
    )
}


def wrap(task: Task, wrappers: Sequence[tuple[str, Mapping[str, Any]]]) -> Task:
    """The task in wrappers, the first innermost: `[("reparametrise", {"decades": 2}), …]`.

    Raises ValueError for an unknown wrapper, naming the nearest, and for an invalid setting.
    """
    for entry in wrappers:
        if isinstance(entry, str) or len(entry) != 2 or not isinstance(entry[1], Mapping):
            raise ValueError(f"tasks.augment: wrapper, got {entry!r}; valid: (name, settings).")
        name, settings = entry
        if name not in AUGMENTATIONS:
            raise ValueError(f"tasks.augment: unknown wrapper {name!r}.{near(name, AUGMENTATIONS)}")
        valid = list((AUGMENTATIONS[name].__kwdefaults__ or {}).keys())
        for setting in settings:
            if setting not in valid:
                raise ValueError(f"tasks.augment: {name} has no setting {setting!r}.{near(setting, valid)}")
        task = AUGMENTATIONS[name](task, **settings)
    return task


def drawing(task: Task, draw: Callable[[PRNGKeyArray, Any], Any]) -> Task:
    """The task with a `Phi` that holds what `(key, phi) -> drawn` gave besides its own."""
    metrics, eval_batches, value_and_grad = task.metrics, task.eval_batches, task.value_and_grad

    def sample(key: PRNGKeyArray) -> Phi:
        task_key, draw_key = jax.random.split(key)
        phi = task.sample(task_key)
        return Phi(phi, draw(draw_key, phi))

    return task._replace(
        sample=sample,
        init=lambda key, phi: task.init(key, phi.task),
        batch=lambda key, phi, data, split: task.batch(key, phi.task, data, split),
        loss=lambda params, key, phi, batch: task.loss(params, key, phi.task, batch),
        metrics=metrics and (lambda params, key, phi, batch: metrics(params, key, phi.task, batch)),
        eval_batches=eval_batches and (lambda phi, data, split: eval_batches(phi.task, data, split)),
        value_and_grad=value_and_grad
        and (lambda params, key, phi, batch: value_and_grad(params, key, phi.task, batch)),
    )


def changed(task: Task, **fields: Any) -> Task:
    """The task with other fields: no longer a smooth part plus a penalty, and what changed it may draw."""
    return task._replace(composite=None, deterministic=False, **fields)


def _then(task: Task, transform: optax.GradientTransformation, what: str) -> Task:
    chained = optax.chain(task.grad_transform, transform) if task.grad_transform else transform
    return changed(task, grad_transform=chained, name=f"{task.name} | {what}")


def _gradient(task: Task) -> Callable[..., tuple[Array, Any]]:
    return task.value_and_grad or jax.value_and_grad(task.loss)


def _shapes(task: Task) -> tuple[Any, Any, Any]:
    """Of phi, params and a training batch."""

    def one(key: PRNGKeyArray, data: Any) -> tuple[Any, Any, Any]:
        phi = task.sample(key)
        return phi, task.init(key, phi), task.batch(key, phi, data, "train")

    return jax.eval_shape(one, jax.random.key(0), task.data)


def _takes(task: Task, params: Any, phi: Any, batch: Any, rows: int) -> bool:
    """Whether the loss of another number of rows is a scalar too."""
    fewer = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), leaf.dtype), batch)
    try:
        return jax.eval_shape(task.loss, params, jax.random.key(0), phi, fewer).shape == ()
    except (TypeError, ValueError):  # of shapes that do not fit
        return False


def _uses_labels(task: Task, params: Any, phi: Any, batch: Any) -> bool:
    """Whether an operation of the loss has `y` as its operand."""

    def loss(y: Any, params: Any, phi: Any, batch: Any) -> Any:
        return task.loss(params, jax.random.key(0), phi, _with_labels(batch, y))

    traced = jax.make_jaxpr(loss)(_labels(batch), params, phi, batch).jaxpr
    return any(operand is traced.invars[0] for equation in traced.eqns for operand in equation.invars)


def _log_uniform(key: PRNGKeyArray, shape: tuple[int, ...], decades: float) -> Array:
    return 10.0 ** jax.random.uniform(key, shape, minval=-decades, maxval=decades)


def _choose(wrapper: str, setting: str, got: str, valid: Sequence[str]) -> None:
    if got not in valid:
        raise ValueError(f"tasks.augment.{wrapper}: {setting}, got {got!r}; valid: {', '.join(valid)}.")


def _between(wrapper: str, setting: str, got: float, low: float, high: float) -> None:
    if not low <= got <= high:
        raise ValueError(f"tasks.augment.{wrapper}: {setting}, got {got}; valid: {low:g} to {high:g}.")
