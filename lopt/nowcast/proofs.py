"""Proofs about a graph: each weight has one edge, and a network stays what it is with its neurons in another order."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from lopt.base import unknown
from lopt.nowcast import network as N
from lopt.nowcast.modules import by_path, floating

if TYPE_CHECKING:
    from lopt.nowcast.graph import Block, Graph, Nodes


def missing(graph: Graph, params: Any) -> list[str]:
    """Leaves that no edge holds, where each weight of the others has exactly one; see `Graph.validate`."""
    shapes = dict(floating(params))
    covered: dict[str, np.ndarray] = {}
    for block in graph.blocks:
        if block.leaf is None:
            continue
        if block.leaf not in shapes:
            raise unknown("Graph.validate", "leaf", block.leaf, shapes)
        size = math.prod(shapes[block.leaf])
        _check(block, size, shapes[block.leaf], graph.count)
        seen = covered.setdefault(block.leaf, np.zeros(size, np.int16))
        if block.view is not None:
            v = block.view
            seen.reshape(v.shape)[tuple(slice(a, a + n) for a, n in zip(v.starts, v.sizes, strict=True))] += 1
        else:
            index = block.places()
            np.add.at(seen, index[index >= 0], 1)
    for path, seen in covered.items():
        wrong = np.flatnonzero(seen != 1)
        if wrong.size:
            at = tuple(int(i) for i in np.unravel_index(wrong[0], shapes[path] or (1,)))
            raise ValueError(
                f"Graph.validate: {path!r}: element {at} has {seen[wrong[0]]} edges, and {wrong.size} of "
                f"{seen.size} do not have one; valid: exactly one each."
            )
    return [path for path in shapes if path not in covered]


def prove(
    graph: Graph, apply: Callable[[Any], Any], params: Any, *, skip: Sequence[str] = (), rtol: float = 1e-3
) -> list[str]:
    """See `Graph.prove`."""
    before, proven = np.asarray(apply(params)), []
    for some in _tied(graph):
        if any(group.name in skip for group, _ in some):
            continue
        order = {
            group.name: np.concatenate([start + np.roll(np.arange(n), 1) for start in range(0, len(group), n)])
            for group, n in some
        }
        names = ", ".join(order)
        after = np.asarray(apply(permuted(graph, params, order)))
        if not np.abs(after - before).max() <= rtol * np.abs(before).max():
            raise ValueError(
                f"Graph.prove: the network is another one with the neurons of {names} in turn; valid: a graph "
                "whose edges end at neurons of matching index, or skip= for groups whose neurons are told apart."
            )
        proven += order
    if not proven:
        raise ValueError(
            f"Graph.prove: no group to rotate among {', '.join(group.name for group in graph.groups)}; valid: a "
            "graph with hidden groups of two neurons and more that skip= does not name."
        )
    return proven


def _tied(graph: Graph) -> list[list[tuple[Nodes, int]]]:
    """Hidden groups by what ties them, each with the number of neurons that stand in turn: a head's, or all."""
    of = np.zeros(graph.count, int)
    for i, group in enumerate(graph.groups):
        of[group.ids] = i
    label, size = list(range(len(graph.groups))), [len(group) for group in graph.groups]
    inner, outer = set(), set()
    for block in graph.blocks:
        a, b = {int(i) for i in of[block.source]}, {int(i) for i in of[block.target]}
        outer |= a
        inner |= b if len(graph.groups[min(a)]) > 1 else set()
        if block.kind == N.RESIDUAL:
            for old in {label[i] for i in a | b}:
                label = [label[min(a)] if x == old else x for x in label]
        if block.kind == N.HEAD:
            for i in b:
                size[i] = len(block.target)
        if block.kind == N.KEY:  # queries and keys are met backwards
            inner |= a
    found: dict[int, list[int]] = {}
    for i in sorted(range(len(graph.groups))):
        if len(graph.groups[i]) > 1:
            found.setdefault(label[i], []).append(i)
    out = []
    for some in found.values():
        n = min(size[i] for i in some)
        if all(i in inner and i in outer for i in some) and n > 1:
            out.append([(graph.groups[i], n) for i in some])
    return out


def permuted(graph: Graph, params: Any, order: Mapping[str, Any]) -> Any:
    """See `Graph.permuted`."""
    to = np.arange(graph.count)
    names = {group.name for group in graph.groups}
    for name, places in order.items():
        if name not in names:
            raise unknown("Graph.permuted", "group", name, names)
        for group in graph.groups:
            if group.name == name:
                to[group.ids] = group.ids[np.asarray(places)]
    missing(graph, params)
    flat = {path: np.asarray(leaf).reshape(-1) for path, leaf in by_path(params)}
    new = {path: leaf.copy() for path, leaf in flat.items()}
    for block in graph.blocks:
        if block.leaf is None:
            continue
        source, target = block.ends()
        here, there = _ranked(source, target), _ranked(to[source], to[target])
        at, goes = np.lexsort(here.T), np.lexsort(there.T)
        if not np.array_equal(here[at], there[goes]):
            raise ValueError(
                f"Graph.permuted: {block.leaf!r} has no edges where the order would put some of its own; valid: an "
                "order within groups that this leaf connects alike."
            )
        index = block.places()
        new[block.leaf][index[at]] = flat[block.leaf][index[goes]]
    paths = [path for path, _ in by_path(params)]
    leaves, treedef = jax.tree.flatten(params)
    return treedef.unflatten([new[path].reshape(np.shape(x)) for path, x in zip(paths, leaves, strict=True)])


def _ranked(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """[E, 3] rank among the edges of the same ends, source, target."""
    pair = source.astype(np.int64) * (int(target.max()) + 1) + target
    order = np.argsort(pair, kind="stable")
    first = np.r_[True, pair[order][1:] != pair[order][:-1]]
    start = np.maximum.accumulate(np.where(first, np.arange(len(pair)), 0))
    rank = np.empty(len(pair), np.int64)
    rank[order] = np.arange(len(pair)) - start
    return np.stack([rank, source, target], 1)


def _check(block: Block, size: int, shape: tuple[int, ...], count: int) -> None:
    where = f"Graph.validate: {block.leaf!r}"
    for ids in (block.source, block.target):
        if ids.size and not (ids.min() >= 0 and ids.max() < count):
            raise ValueError(f"{where}: a neuron that does not exist; valid: 0 … {count - 1}.")
    if block.table is not None:
        if len(block.table) != len(block.source) or block.table.max() >= size:
            raise ValueError(
                f"{where}: its table has {len(block.table)} places; valid: {len(block.source)}, all below {size}."
            )
        return
    assert block.view is not None
    if math.prod(block.view.shape) != size:
        raise ValueError(f"{where}: shape, got {shape}; valid: {size} elements as {block.view.shape} from the graph.")
    sizes = dict(zip(block.view.roles, block.view.sizes, strict=True))
    lengths = {"s": len(block.source), "d": len(block.target)} if block.grid else {"e": len(block.source)}
    for role, n in lengths.items():
        if sizes.get(role, 1) != n:
            raise ValueError(f"{where}: {n} neurons for an axis of {sizes.get(role, 1)}; valid: as many.")
