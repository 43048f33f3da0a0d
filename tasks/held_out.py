"""What shipped optimizers never met: data sets and families, recognised by provenance and by content.

Names alone would be blind: TFDS serves Fashion-MNIST's test file under another name, a wrapper builds a new Task, a
user's factory loads arrays of its own. So a task is asked four things: the ids and sha256 in its provenance; its
family, and the families and data sources that its own functions reach through closures, objects and modules; and
whether the rows or passages of its `data`, and of arrays that it reaches so, are those of a held-out set. The last
survives another scale, offset or vocabulary, order and subsets; it does not survive augmentation, other resizing, or
normalising pixel by pixel.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import math
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from tasks import data
from tasks.base import Source, Task


class Reserved(NamedTuple):
    """Data sets and families that are kept for one use."""

    data: tuple[str, ...]  # of tasks.data
    families: tuple[str, ...]  # of tasks.REGISTRY


# For judging finished candidates only.
HELD_OUT = Reserved(
    ("fashion10k", "python_source", "rgb_patches"), ("coordinate_mlp", "diffusion", "graph_network", "vit")
)
# For choosing recipes: neither meta-trained on nor judged on.
DEV = Reserved(("breast_cancer", "diabetes"), ("tabular_mlp",))
# Names of sets elsewhere that contain one of ours, in any version.
ALIASES = {"fashion_mnist": "fashion10k", "mnist": "mnist5k"}

SHARE = 0.01  # of rows or windows that must be found before a set is said to be inside another
LEVELS, OFFSET = 255.0, 0.3719  # a grid that no round number lies on an edge of, so that rounding noise does not matter
LEAST_VALUES = 8  # different ones in a row: plain ones could be anybody's
WINDOW, SAMPLED = 64, 16  # tokens; of the windows one in so many is looked at
MOST_ROWS, MOST_TOKENS = 20_000, 2**23  # that are looked at, spread over what there is
LEAST_TOKENS = 24  # different ones in a text: fewer are labels
# Whose functions are not followed: what they hold is theirs.
LIBRARIES = {"jax", "jaxlib", "numpy", "optax", "flax", "haiku", "builtins", "functools", "orbax", "grain", "scipy"}
LIBRARIES |= {"matplotlib", "pandas", "PIL", "sklearn", "tensorflow", "tensorflow_datasets", "torch"}
LIBRARIES |= {"_pytest"}  # an assert that it rewrote names it, and it has hold of every test
STANDARD = LIBRARIES | sys.stdlib_module_names - {"__main__"}  # whose objects hold no task of a user's


def fingerprints(rows: np.ndarray) -> np.ndarray:
    """Hashes [m] of rows [n, d], m <= n, that do not change with the unit or the zero of their numbers.

    Rows that are not finite or have fewer than LEAST_VALUES different values are left out.
    """
    rows = np.asarray(rows, np.float64)
    low, high = rows.min(1, keepdims=True), rows.max(1, keepdims=True)
    with np.errstate(all="ignore"):
        grid = (rows - low) / (high - low) * LEVELS + OFFSET
    kept = np.isfinite(grid).all(1)
    grid = grid[kept].astype(np.uint8)
    ordered = np.sort(grid, 1)
    grid = grid[(np.diff(ordered, axis=1) > 0).sum(1) + 1 >= LEAST_VALUES]
    return grid.astype(np.uint64) @ _odd(grid.shape[1])


@functools.cache
def _odd(count: int) -> np.ndarray:
    """Random odd numbers [count]: their sum over equal bytes, modulo 2^64, is equal."""
    return np.random.RandomState(0).randint(0, 2**63, count, np.uint64) * np.uint64(2) + np.uint64(1)


def passages(tokens: np.ndarray) -> np.ndarray:
    """Hashes of one in SAMPLED of the windows of tokens [n], such that the vocabulary does not matter.

    A token counts as its distance from the last one that was the same, 0 where that is too far. Windows most of whose
    tokens repeat the one before (blanks, margins of images) are left out. Which are sampled their hash decides, so that
    equal texts are sampled alike.
    """
    order = np.argsort(tokens, kind="stable")
    apart = np.diff(order)
    same = np.diff(tokens[order].astype(np.int64)) == 0
    distance = np.zeros(len(tokens), np.uint64)
    distance[order[1:]] = np.where(same & (apart < WINDOW // 2), apart, 0)
    # The first half of a window only says what the second half refers to.
    runs = np.cumsum(np.append(0, distance == 1))
    hashes, factor, span = distance + np.uint64(1), np.uint64(0x9E3779B97F4A7C15), 1
    with np.errstate(over="ignore"):
        while span < WINDOW // 2:
            hashes = hashes[:-span] * factor + hashes[span:]
            factor, span = factor * factor, 2 * span
    varied = runs[WINDOW // 2 :] - runs[: -WINDOW // 2] < WINDOW // 4
    hashes = hashes[varied[: len(hashes)]][WINDOW // 2 :]
    return hashes[hashes >> np.uint64(32) & np.uint64(SAMPLED - 1) == 0]


@functools.cache
def _known_rows(length: int, dtype: Any = None) -> dict[str, np.ndarray]:
    """Held-out image set -> hashes of its rows at the size at which they have `length` numbers.

    Args:
      dtype: a type of 16 bits, whose rounding depends on the unit: hashes are those of pixels in [0, 1], in ± 1 and as
        bytes. None: of any other.

    Height and width may be swapped, and channels may come first.
    """
    known = {}
    for name in set(HELD_OUT.data) & set(data.POOLING):
        channels = data.channels(name)
        for size in data.POOLING[name]:
            if size * size * channels == length:
                x = data.images(name, size).x.reshape(-1, size, size, channels)
                units = (x,) if dtype is None else [unit.astype(dtype) for unit in (x, 2 * x - 1, 255 * x)]
                orders = [(0, 1, 2, 3), (0, 2, 1, 3), *([(0, 3, 1, 2), (0, 3, 2, 1)] if channels > 1 else [])]
                rows = [unit.transpose(order).reshape(-1, length) for unit in units for order in orders]
                known[name] = np.concatenate([fingerprints(one) for one in rows])
    return known


@functools.cache
def _known_passages() -> dict[str, np.ndarray]:
    texts = [name for name in HELD_OUT.data if name in data.names("text")]
    return {name: passages(data.text(name).tokens) for name in texts}


def inside(tree: Any) -> tuple[str, ...]:
    """Names of the held-out data sets whose content is in a pytree of arrays."""
    import jax

    found = set()
    for leaf in jax.tree.leaves(tree):
        if not hasattr(leaf, "shape") or jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended):
            continue
        short = leaf.dtype.itemsize == 2 and jax.dtypes.issubdtype(leaf.dtype, np.floating)
        for axis in range(len(leaf.shape)):
            known = _known_rows(math.prod(leaf.shape[axis:]), leaf.dtype if short else None)
            if known and leaf.size:
                rows = np.asarray(leaf).reshape(-1, math.prod(leaf.shape[axis:]))
                hashes = fingerprints(rows[:: -(-len(rows) // MOST_ROWS)])
                found |= {name for name, theirs in known.items() if _share(hashes, theirs) >= SHARE}
        if np.issubdtype(leaf.dtype, np.integer) and leaf.size >= 4 * WINDOW:
            tokens = np.asarray(leaf).reshape(-1)
            if len(tokens) > MOST_TOKENS:  # some pages of each part
                pages = tokens[: len(tokens) // 4096 * 4096].reshape(-1, 4096)
                tokens = pages[:: -(-len(tokens) // MOST_TOKENS)].reshape(-1)
            if len(np.unique(tokens)) >= LEAST_TOKENS:
                hashes = passages(tokens)
                found |= {name for name, theirs in _known_passages().items() if _share(hashes, theirs) >= SHARE}
    return tuple(sorted(found))


def _share(hashes: np.ndarray, known: np.ndarray) -> float:
    return float(np.isin(hashes, known).mean()) if len(hashes) else 0.0


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
    return Trace(tuple(sorted(found | set(inside(list(different.values()))))), tuple(sorted(families - {""})))


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
    where = trace(task)
    return [f"data {name}" for name in where.data if name in reserved.data] + [
        f"family {name}" for name in where.families if name in reserved.families
    ]


def touched_by(sources: Iterable[Source], families: Iterable[str], reserved: Reserved = HELD_OUT) -> list[str]:
    """The same for a recording, which has kept no more than its provenance."""
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
