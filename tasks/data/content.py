"""Which embedded sets are inside other arrays, whatever those are called: their rows and passages are recognised."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection
from typing import Any

import numpy as np

from tasks import data
from tasks.data import likeness

SHARE = 0.01  # of rows or windows that must be found before a set is said to be inside another
LEVELS, OFFSET = 255.0, 0.3719  # a grid that no round number lies on an edge of, so that rounding noise does not matter
LEAST_VALUES = 8  # different ones in a row: plain ones could be anybody's
WINDOW, SAMPLED = 64, 16  # tokens; of the windows one in so many is looked at
MOST_ROWS, MOST_TOKENS = 20_000, 2**23  # that are looked at, spread over what there is
SPANS = {16: 0.6, 24: 0.1}  # tokens of a short row -> share that must be found; of another text 0.1 and 0.0001 are
LEAST_LINES = 4  # different ones that must be found: rows of images have one or two that are like a text's
LEAST_TOKENS = 24  # different ones in a text: fewer are labels


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
    return _sampled(hashes[varied[: len(hashes)]][WINDOW // 2 :])


def lines(rows: np.ndarray, span: int) -> np.ndarray:
    """Hashes [m] of the first `span` tokens of rows [n, >= span], m <= n, such that the vocabulary does not matter.

    A token counts as its distance from the last one in its row that was the same, 0 if there is none. Rows with few
    repetitions, which say little, and those most of whose tokens repeat the one before are left out.
    """
    return _lines(rows, np.arange(len(rows)) * rows.shape[1], span)


def _lines(tokens: np.ndarray, starts: np.ndarray, span: int) -> np.ndarray:
    """The same of the lines that begin at `starts` of one sequence."""
    tokens = np.ascontiguousarray(tokens).reshape(-1)
    order = np.argsort(tokens, kind="stable")
    apart, same = np.diff(order), np.diff(tokens[order].astype(np.int64)) == 0
    distance = np.zeros(len(tokens), np.uint8)
    distance[order[1:]] = np.where(same & (apart < span), apart, 0)
    factors = _odd(span)
    hashes, again, runs = (np.zeros(len(starts), kind) for kind in (np.uint64, np.uint8, np.uint8))
    for place in range(1, span):
        back = distance[starts + place]
        back *= back <= place  # what came before the row is not known
        hashes += (back.astype(np.uint64) + np.uint64(7)) ** 2 * factors[place]
        again += back > 0
        runs += back == 1
    return _sampled(hashes[(again >= span // 4) & (runs < span // 4)])


def _sampled(hashes: np.ndarray) -> np.ndarray:
    """One in SAMPLED of different hashes: which they are themselves decide."""
    return hashes[hashes >> np.uint64(32) & np.uint64(SAMPLED - 1) == 0]


@functools.cache
def _known_rows(names: Collection[str], length: int, dtype: Any = None) -> dict[str, np.ndarray]:
    """Image set -> hashes of its rows at the size at which they have `length` numbers.

    Args:
      dtype: a type of 16 bits, whose rounding depends on the unit: hashes are those of pixels in [0, 1], in ± 1 and as
        bytes. None: of any other.

    Height and width may be swapped, and channels may come first.
    """
    known = {}
    for name in set(names) & set(data.POOLING):
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
def _known_passages(names: Collection[str]) -> dict[str, np.ndarray]:
    return {name: passages(data.text(name).tokens) for name in names if name in data.names("text")}


@functools.cache
def _known_lines(names: Collection[str], span: int) -> dict[str, np.ndarray]:
    texts = {name: data.text(name).tokens for name in names if name in data.names("text")}
    return {name: np.unique(_lines(x, np.arange(len(x) - span), span)) for name, x in texts.items()}


def inside(tree: Any, names: Collection[str]) -> tuple[str, ...]:
    """Those of the embedded sets `names` (a tuple) whose content is in a pytree of arrays."""
    import jax

    found = set()

    def compare(hashes: np.ndarray, known: dict[str, np.ndarray], share: float, least: int = 1) -> None:
        for name, theirs in known.items() if len(hashes) else ():
            same = np.isin(hashes, theirs)
            if same.mean() >= share and len(np.unique(hashes[same])) >= least:
                found.add(name)

    for leaf in jax.tree.leaves(tree):
        if not hasattr(leaf, "shape") or jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended) or not leaf.size:
            continue
        short = leaf.dtype.itemsize == 2 and jax.dtypes.issubdtype(leaf.dtype, np.floating)
        for axis in range(len(leaf.shape)):
            known = _known_rows(names, math.prod(leaf.shape[axis:]), leaf.dtype if short else None)
            if known:
                rows = np.asarray(leaf).reshape(-1, math.prod(leaf.shape[axis:]))
                compare(fingerprints(rows[:: -(-len(rows) // MOST_ROWS)]), known, SHARE)
        if jax.dtypes.issubdtype(leaf.dtype, np.integer) or jax.dtypes.issubdtype(leaf.dtype, np.floating):
            found |= likeness.copies(np.asarray(leaf), names)
        if np.issubdtype(leaf.dtype, np.integer) and leaf.size >= 4 * WINDOW:
            tokens = np.asarray(leaf).reshape(-1)
            if len(tokens) > MOST_TOKENS:  # some pages of each part
                pages = tokens[: len(tokens) // 4096 * 4096].reshape(-1, 4096)
                tokens = pages[:: -(-len(tokens) // MOST_TOKENS)].reshape(-1)
            if len(np.unique(tokens)) >= LEAST_TOKENS:
                # Each once: one licence atop of every file is no share of a text.
                compare(np.unique(passages(tokens)), _known_passages(names), SHARE)
                for axis in (0, -1) if leaf.ndim > 1 else ():  # time may come first
                    rows = np.moveaxis(np.asarray(leaf), axis, -1).reshape(-1, leaf.shape[axis])
                    span = max((span for span in SPANS if span <= rows.shape[1] < 2 * WINDOW), default=0)
                    if span:
                        rows = rows[:: -(-len(rows) // MOST_ROWS)]
                        compare(lines(rows, span), _known_lines(names, span), SPANS[span], LEAST_LINES)
    return tuple(sorted(found))
