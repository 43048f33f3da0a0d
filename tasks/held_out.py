"""What shipped optimizers never met: data sets and families, recognised by provenance and by content.

Names alone would be blind: TFDS serves Fashion-MNIST's test file under another name, a wrapper builds a new Task, a
user's factory loads arrays of its own. So a task is asked four things: the ids and sha256 in its provenance; its
family, and the families and data sources that its own functions reach through closures, objects and modules; and
whether the rows or passages of its `data`, and of arrays that it reaches so, are those of a held-out set. The last
survives another scale, offset or vocabulary, order and subsets, of images other sizes, margins and channels too; it
does not survive augmentation, or normalising pixel by pixel.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from tasks import data
from tasks.base import Source, Task
from tasks.data import content


class Reserved(NamedTuple):
    """Data sets and families that are kept for one use."""

    data: tuple[str, ...]  # of tasks.data
    families: tuple[str, ...]  # of tasks.REGISTRY


# For judging finished candidates only.
HELD_OUT = Reserved(
    ("fashion10k", "python_source", "rgb_patches"), ("coordinate_mlp", "diffusion", "graph_network", "vit")
)
# For choosing recipes: neither meta-trained on nor judged on. All that the suite `dev` is made of.
DEV = Reserved(
    ("breast_cancer", "diabetes", "wine"),
    ("logistic_regression", "matrix_factorisation", "pinn", "tabular_mlp", "tabular_regression"),
)
# Names of sets elsewhere that contain one of ours, in any version.
ALIASES = {"fashion_mnist": "fashion10k", "mnist": "mnist5k"}

# Whose functions are not followed: what they hold is theirs.
LIBRARIES = {"jax", "jaxlib", "numpy", "optax", "flax", "haiku", "builtins", "functools", "orbax", "grain", "scipy"}
LIBRARIES |= {"matplotlib", "pandas", "PIL", "sklearn", "tensorflow", "tensorflow_datasets", "torch"}
LIBRARIES |= {"_pytest"}  # an assert that it rewrote names it, and it has hold of every test
STANDARD = LIBRARIES | sys.stdlib_module_names - {"__main__"}  # whose objects hold no task of a user's
JUDGED: dict[tuple[Any, ...], tuple[str, ...]] = {}  # array's shape, type and hash -> what of HELD_OUT.data it holds


def inside(tree: Any) -> tuple[str, ...]:
    """Names of the held-out data sets whose content is in a pytree of arrays."""
    return content.inside(tree, HELD_OUT.data)


def aliases(source: Source) -> tuple[str, ...]:
    """Names of embedded sets that a source is, or contains by its name or sha256.

    >>> aliases(Source("tfds:fashion_mnist:3.0.1", "")), aliases(Source("mine", ""))
    (('fashion10k',), ())
    """
    plain = source.id.removeprefix("tfds:").split(":")[0].split("/")[0]
    entries = {name: data.sha256(name) for name in data.names()}
    by_name = {ALIASES.get(plain, plain)} & set(entries)
    return tuple(sorted(by_name | {name for name, sha256 in entries.items() if sha256 == source.sha256}))


class Trace(NamedTuple):
    """Where a task comes from."""

    data: tuple[str, ...]  # names in tasks.data, and of HELD_OUT.data those found by content
    families: tuple[str, ...]


def trace(task: Task) -> Trace:
    """The embedded data and the registered families that a task is made of, however it is wrapped."""
    import jax

    families: set[str] = set()
    found: set[str] = set()
    arrays = jax.tree.leaves(task.data)
    for one in _reach(task):
        if isinstance(one, Task):
            families.add(one.family)
        elif isinstance(one, Source):
            found.update(aliases(one))
        elif isinstance(one, np.ndarray | jax.Array):
            arrays.append(one)
        elif isinstance(one, types.FunctionType) and one.__module__.startswith("tasks."):
            family = one.__module__.removeprefix("tasks.")
            if f"{one.__qualname__}.".startswith(f"{family}."):  # it is the factory, or was made in it
                families.add(family)
    # A data set that is closed over is often the task's data once more: what has equal bytes is looked at once.
    different = {_digest(array): array for array in arrays if _is_numeric(array)}
    for digest, array in different.items():
        if digest not in JUDGED:
            JUDGED[digest] = inside(array)
        found.update(JUDGED[digest])
    return Trace(tuple(sorted(found)), tuple(sorted(families - {""})))


def _is_numeric(leaf: Any) -> bool:
    import jax

    array = isinstance(leaf, np.ndarray | jax.Array) and not isinstance(leaf, jax.core.Tracer)
    return array and jax.dtypes.issubdtype(leaf.dtype, np.number)


def _digest(array: Any) -> tuple[Any, ...]:
    held = np.ascontiguousarray(array)
    return held.shape, held.dtype, hashlib.blake2b(held.reshape(-1).view(np.uint8).data).digest()


def _reach(root: Any) -> Iterator[Any]:
    """What `root`'s functions have hold of, and what that has.

    Closures, defaults, globals and parts of modules that they name, containers, attributes of objects and classes.
    """
    seen: dict[int, Any] = {}  # objects are kept, since an id is used again once its object is gone
    stack = [root]
    while stack:
        one = stack.pop()
        if id(one) not in seen:
            seen[id(one)] = one
            yield one
            stack += _held_by(one)


def _held_by(one: Any) -> list[Any]:
    """What one object has hold of itself."""
    if isinstance(one, types.FunctionType):
        return _given(one) if _package(one) in LIBRARIES else _held_by_function(one)
    if isinstance(one, functools.partial):
        return [one.func, *one.args, *one.keywords.values(), *vars(one).values()]
    if isinstance(one, types.MethodType):
        return [one.__func__, one.__self__]
    if isinstance(one, staticmethod | classmethod):
        return [one.__func__]
    if isinstance(one, property):
        return [one.fget]
    if isinstance(one, type):
        return [] if _package(one) in STANDARD else list(vars(one).values())
    held: list[Any] = []
    if isinstance(one, list | tuple | set | frozenset | collections.deque):
        held += one
    elif isinstance(one, Mapping):
        held += one.values()
    elif callable(one) and isinstance(inner := getattr(one, "__wrapped__", None), types.FunctionType):  # jitted
        held.append(inner)
    if _package(type(one)) not in STANDARD or isinstance(one, types.SimpleNamespace):
        held += [type(one), *getattr(type(one), "__mro__", ())[1:], *getattr(one, "__dict__", {}).values()]
        slots = [vars(kind).get("__slots__", ()) for kind in type(one).__mro__]
        names = [name for slot in slots for name in ([slot] if isinstance(slot, str) else slot)]
        held += [getattr(one, name) for name in names if hasattr(one, name)]
    return held


def _given(one: types.FunctionType) -> list[Any]:
    """Functions in a library function's closure: what it was called with, as haiku keeps what it transforms."""
    held = [cell.cell_contents for cell in one.__closure__ or () if _filled(cell)]
    return [x for x in held if isinstance(x, types.FunctionType | types.MethodType | functools.partial)]


def _held_by_function(one: types.FunctionType) -> list[Any]:
    """Closure, defaults, and the globals that it names; of a module the parts that it names."""
    held = [cell.cell_contents for cell in one.__closure__ or () if _filled(cell)]
    held += [*(one.__defaults__ or ()), *(one.__kwdefaults__ or {}).values()]
    names = set(_names(one.__code__))
    held += [one.__globals__[name] for name in names if name in one.__globals__]
    modules = [part for part in held if isinstance(part, types.ModuleType)]
    seen: set[str] = set()
    while modules:  # of a dotted name each part may be one
        module = modules.pop()
        if module.__name__ not in seen and module.__name__.split(".")[0] not in STANDARD:
            seen.add(module.__name__)
            parts = [vars(module)[name] for name in names if name in vars(module)]
            held += parts
            modules += [part for part in parts if isinstance(part, types.ModuleType)]
    return held


def _package(one: Any) -> str:
    return str(getattr(one, "__module__", None) or "").split(".")[0]


def _filled(cell: types.CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def _names(code: types.CodeType) -> Iterator[str]:
    """Global names in a function and in the functions that it makes."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def touched(task: Task, reserved: Reserved = HELD_OUT) -> list[str]:
    """What of `reserved` a task touches, in words; empty if nothing."""
    return touched_by(*origins(task), reserved)


def origins(task: Task) -> tuple[list[Source], list[str]]:
    """What a recording of a task's runs has to keep, to be judged by `touched_by` once the task is gone.

    Its sources, those that were found by content or in its functions among them, and its families.
    """
    where = trace(task)
    found = [Source(name, data.sha256(name)) for name in where.data]
    return [*dict.fromkeys([*task.provenance, *found])], sorted({*where.families, task.family} - {""})


def touched_by(sources: Iterable[Source], families: Iterable[str], reserved: Reserved = HELD_OUT) -> list[str]:
    """What of `reserved` sources and families touch, in words: those of a task, or of a recording by its `origins`.

    >>> touched_by([Source("tfds:fashion_mnist:3.0.1", "")], ["image_mlp", "vit"])
    ['data fashion10k', 'family vit']
    """
    names = {name for source in sources for name in aliases(source)}
    return [f"data {name}" for name in sorted(names & set(reserved.data))] + [
        f"family {name}" for name in sorted(set(families) & set(reserved.families))
    ]


def refuse(where: str, tasks: Iterable[Task]) -> None:
    """Raise ValueError if a task touches what is held out."""
    for task in tasks:
        if words := touched(task):
            raise ValueError(
                f"{where}: {task.name or 'a task'} touches what is held out for evaluation: {', '.join(words)}; valid: "
                "other tasks, or --allow-held-out, after which no score on the held-out suite means anything."
            )
