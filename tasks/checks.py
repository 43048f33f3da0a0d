"""Says what is wrong with a task, in words, before an optimizer fails on it far away."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tasks.base import SPLITS, Task
from tasks.faults import place, said

ARGUMENTS = {
    "sample": ("key",),
    "init": ("key", "phi"),
    "batch": ("key", "phi", "data", "split"),
    "loss": ("params", "key", "phi", "batch"),
    "metrics": ("params", "key", "phi", "batch"),
    "eval_batches": ("phi", "data", "split"),
    "value_and_grad": ("params", "key", "phi", "batch"),
}
OPTIONAL = ("metrics", "eval_batches", "value_and_grad")
MAX_CONSTANTS = 2**16  # numbers in a traced program that are not its arguments
STATE = ("batch_stats", "cache", "intermediates")  # collections of flax that training changes


class WrongError(ValueError):
    """What is wrong, where nothing that comes later can be judged."""


def check(task: Task) -> None:
    """Raise ValueError that lists what is wrong with a task; return None if nothing was found.

    Everything is traced under jit and vmap, and one gradient is taken at init. To find what is not a function of its
    key, all is traced twice, jitted functions too, and run twice. Nothing is said of how well it trains, and what
    happens to be the same both times is not seen: a file that will change, a clock of days, a counter that a trace
    moves back.
    """
    wrong = problems(task)
    if wrong:
        listed = "; ".join(wrong)
        raise ValueError(f"tasks.check: {getattr(task, 'name', '') or 'the task'}: {listed}.")


def problems(task: Task) -> list[str]:
    """What is wrong with a task, a phrase each; a part that fails hides what depends on it."""
    found: list[str] = []
    if not isinstance(task, Task):
        return [f"it is a {type(task).__name__}; valid: a tasks.Task"]
    try:
        for phrase in _phrases(task):
            found.append(phrase)
    except WrongError as error:
        found.append(str(error))
    return found


def _phrases(task: Task) -> Iterator[str]:
    signatures = list(_signatures(task))
    yield from signatures
    if signatures:
        return
    for path, leaf in jax.tree.leaves_with_path(task.data):
        if not isinstance(leaf, jax.Array | np.ndarray):
            yield f"data{jax.tree_util.keystr(path)} is a {type(leaf).__name__}; valid: an array, or no data: ()"
            return
    key = jax.random.key(0)
    phi = _shapes("sample", task.sample, key)
    params = _shapes("init", task.init, key, phi)
    yield from _params(params)
    batches = {split: _shapes("batch", task.batch, key, phi, task.data, split) for split in SPLITS}
    for split in SPLITS[1:]:
        if layout(_rows(batches[split])) != layout(_rows(batches["train"])):
            wanted = layout(batches["train"])
            yield f"batch: the {split} split has {layout(batches[split])}; valid: rows of {wanted}, as train"
    loss = _shapes("loss", task.loss, params, key, phi, batches["train"])
    if not _is_scalar(loss):
        yield f"loss has {layout(loss)}; valid: a floating scalar of shape (), e.g. its mean over the batch"
        return
    yield from _optional(task, params, key, phi, batches["train"])
    # Of others there is no gradient, which JAX would say once more, in its own words.
    if all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(params)):
        yield from _values(task)


def _rows(batch: Any) -> Any:
    """Of a batch what its loss may not be without: all but how many rows there are."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((0, *leaf.shape[1:])[: leaf.ndim], leaf.dtype), batch)


def _signatures(task: Task) -> Iterator[str]:
    for name, arguments in ARGUMENTS.items():
        function = getattr(task, name)
        if function is None and name in OPTIONAL:
            continue
        if not callable(function):
            yield f"{name} is a {type(function).__name__}; valid: a function of ({', '.join(arguments)})"
            continue
        try:
            signature = inspect.signature(function)
        except (TypeError, ValueError):  # of a builtin: it will say so when it is called
            continue
        try:
            signature.bind(*arguments)
        except TypeError:
            yield f"{name} takes {signature}; valid: ({', '.join(arguments)})"
            continue
        # Arguments are given by place: one with the name of another is that other's.
        places = list(signature.parameters)[: len(arguments)]
        if any(got in arguments and got != wanted for got, wanted in zip(places, arguments, strict=False)):
            yield f"{name} takes {signature}, in another order; valid: ({', '.join(arguments)})"


def _params(params: Any) -> Iterator[str]:
    leaves = jax.tree.leaves_with_path(params)
    if not leaves:
        raise WrongError("init returns no params; valid: a pytree with at least one array")
    keys = {str(getattr(part, "key", getattr(part, "name", ""))) for path, _ in leaves for part in path}
    state = sorted(keys & set(STATE))
    if state:
        listed = ", ".join(state)
        yield f"params hold {listed}, which a model changes by itself; valid: GroupNorm or LayerNorm, no BatchNorm"
    for path, leaf in leaves:
        name = f"params{jax.tree_util.keystr(path)}"
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            yield f"{name} is {leaf.dtype}; valid: a floating type, other numbers go into phi"
        elif getattr(leaf, "weak_type", False):
            yield f"{name} has a weak type, which an update would change; valid: jnp.asarray(x, jnp.float32)"


def _optional(task: Task, params: Any, key: Any, phi: Any, batch: Any) -> Iterator[str]:
    if task.metrics is not None:
        found = _shapes("metrics", task.metrics, params, key, phi, batch)
        if not isinstance(found, dict) or not all(getattr(leaf, "shape", None) == () for leaf in found.values()):
            yield f"metrics has {layout(found)}; valid: a dict of scalars"
    if task.eval_batches is not None:
        for split in SPLITS:
            held = _shapes("eval_batches", task.eval_batches, phi, task.data, split)
            counts = {leaf.shape[:1] for leaf in jax.tree.leaves(held)}
            if len(counts) > 1 or () in counts:
                yield f"eval_batches: {split} has {layout(held)}; valid: a leading axis of batches on each leaf"
                return
            one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), held)
            loss = _shapes(f"loss of eval_batches ({split})", task.loss, params, key, phi, one)
            if not _is_scalar(loss):
                yield f"loss of eval_batches ({split}) has {layout(loss)}; valid: a scalar of shape ()"
    if task.value_and_grad is not None:
        found = _shapes("value_and_grad", task.value_and_grad, params, key, phi, batch)
        if not isinstance(found, tuple) or len(found) != 2 or not _is_scalar(found[0]):
            yield f"value_and_grad has {layout(found)}; valid: (scalar, gradient like params)"
        elif layout(found[1]) != layout(params):
            yield f"value_and_grad's gradient has {layout(found[1])}; valid: that of params, {layout(params)}"


def _values(task: Task) -> Iterator[str]:
    """What only numbers show: constants, NaN, impurity."""

    def step(key: Any, data: Any) -> Any:
        phi_key, init_key, batch_key, loss_key = jax.random.split(key, 4)
        phi = task.sample(phi_key)
        params = task.init(init_key, phi)
        batch = task.batch(batch_key, phi, data, "train")
        return params, *(task.value_and_grad or jax.value_and_grad(task.loss))(params, loss_key, phi, batch)

    keys = jax.random.split(jax.random.key(0), 2)
    # Jitted functions are traced once a setting of JAX's; these are two names of one.
    with jax.default_matmul_precision("float32"):
        traced = guard("its step", jax.make_jaxpr(step), keys[0], task.data)
    with jax.default_matmul_precision("highest"):
        again = jax.make_jaxpr(lambda *given: step(*given))(keys[0], task.data)  # a new function is traced anew
    baked = sum(math.prod(np.shape(constant)) for constant in _constants(traced))
    if baked > MAX_CONSTANTS:
        yield (
            f"{baked:,} numbers are closed over and would be copied into every compiled program; valid: pass them in "
            "`data`, which the functions receive as an argument"
        )
    constants = zip(_constants(traced), _constants(again), strict=False)
    same = _text(traced) == _text(again) and all(np.array_equal(a, b, equal_nan=True) for a, b in constants)
    if not same:
        yield "the same key gives another result when traced again; valid: randomness from the key alone, no NumPy's"
    together = jax.jit(jax.vmap(step, in_axes=(0, None)))
    first, second = (jax.device_get(guard("its step under vmap", together, keys, task.data)) for _ in range(2))
    close = jax.tree.map(lambda a, b: np.allclose(a, b, rtol=1e-3, atol=1e-6, equal_nan=True), first, second)
    if not jax.tree.all(close):
        yield "the same key gives another result when run again; valid: randomness from the key alone, no callback's"
    params, loss, grad = first
    for name, tree in (("params", params), ("loss", loss), ("the gradient", grad)):
        for path, leaf in jax.tree.leaves_with_path(tree):
            if not np.isfinite(leaf).all():
                yield f"{name}{jax.tree_util.keystr(path)} is not finite at init; valid: finite numbers"
    if all(not np.any(leaf) for leaf in jax.tree.leaves(grad)):
        yield "the gradient at init is zero everywhere; valid: a loss that depends on params"


def _text(traced: Any) -> str:
    """A trace in words, without the addresses of functions."""
    return re.sub(r"0x[0-9a-f]+", "", str(traced))


def _constants(traced: Any) -> Iterator[Any]:
    """What a trace has closed over, its jitted functions too."""
    yield from traced.consts
    for equation in traced.jaxpr.eqns:
        parts = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, "jaxpr"))
        for part in parts:
            if hasattr(part, "jaxpr") and hasattr(part, "consts"):
                yield from _constants(part)


def _shapes(where: str, function: Callable[..., Any], *arguments: Any) -> Any:
    static = [isinstance(argument, str) for argument in arguments]
    arrays = [argument for argument, fixed in zip(arguments, static, strict=True) if not fixed]

    def call(*given: Any) -> Any:
        rest = iter(given)
        full = [a if fixed else next(rest) for a, fixed in zip(arguments, static, strict=True)]
        return function(*full)

    return guard(where, lambda *given: jax.eval_shape(call, *given), *arrays)


def guard(where: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function returns. Raises WrongError in one line that says in which line of the user's it went wrong."""
    try:
        return function(*arguments)
    except jax.errors.TracerArrayConversionError as error:
        raise WrongError(f"{where} uses NumPy on what jit traces{place(error)}; valid: jax.numpy") from error
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerBoolConversionError) as error:
        line = str(error).split("\n")[0][:160]
        raise WrongError(
            f"{where} needs a number that jit does not know yet{place(error)} ({line}); valid: jnp.where, lax.cond"
        ) from error
    except Exception as error:  # whatever a user's function raises
        raise WrongError(f"{where} raised {said(error)}") from error


def _is_scalar(tree: Any) -> bool:
    return getattr(tree, "shape", None) == () and jnp.issubdtype(tree.dtype, jnp.floating)


def layout(tree: Any) -> str:
    """Shapes and dtypes, for messages and comparisons."""
    leaves = jax.tree.leaves_with_path(tree)
    words = []
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path)
        words.append(f"{name} {leaf.dtype}{list(leaf.shape)}".strip() if hasattr(leaf, "shape") else f"{name} {leaf!r}")
    return "{" + ", ".join(words) + "}" if len(words) != 1 or words[0].startswith(("[", ".")) else f"shape {words[0]}"
