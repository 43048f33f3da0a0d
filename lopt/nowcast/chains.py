"""Graphs of layers one after the other, with residual blocks and recurrent cells as layers."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from lopt.nowcast.graph import Graph, Nodes
from lopt.nowcast.modules import TABLES, Module, doubt, natural

SHORTCUT = re.compile(r"proj|skip|shortcut|downsample")


class Item(NamedTuple):
    """A layer of a chain: what it takes and gives, and how it is added to a graph."""

    path: str
    inputs: int
    outputs: int
    kind: str  # table, conv, depthwise, dense, cell, block
    modules: list[Module]


def chain(modules: Sequence[Module]) -> Graph:
    """MLPs, CNNs, residual CNNs and recurrent networks, embeddings first and dense layers last.

    A norm belongs to the first layer after the last norm's that has its size, if there are as many norms of this size
    as layers (but the last) or one, else it is left out. Residual blocks are modules named block, res… or stage with
    two convolutions or more; their shortcuts are named proj, skip, shortcut or downsample.
    """
    blocks = _residual_blocks(modules)
    inside = {id(m) for some in blocks.values() for m in some}
    cells, of_cells = _cells([m for m in modules if id(m) not in inside])
    inside |= {id(m) for m in of_cells}
    items = [*cells]
    for path, some in blocks.items():
        main = [m for m in some if m.kernel and not SHORTCUT.search(m.name)]
        items.append(Item(path, main[0].kernel.shape[-2], main[-1].kernel.shape[-1], "block", some))  # type: ignore[union-attr]
    rest = [m for m in modules if id(m) not in inside]
    for m in rest:
        if m.kernel is None or len(m.kernel.shape) < 2:
            continue
        *spatial, i, o = m.kernel.shape
        if m.kernel.path.split("/")[-1] in TABLES or "embed" in m.name:
            kind = "table"
        elif spatial:
            kind = "depthwise" if i == 1 and o > 1 else "conv"
        else:
            kind = "dense"
        items.append(Item(m.path, i, o, kind, [m]))
    if not items:
        raise doubt("no leaf is a matrix or a kernel")
    ordered = _ordered(items)
    norms = _norms([m for m in rest if not m.kernel], ordered)
    pre = _pre_activated(blocks)
    last = max((i for i, item in enumerate(ordered) if item.kind == "block"), default=len(ordered))
    after = ordered[last + 1].path if "after blocks" in norms and last + 1 < len(ordered) else None
    g = Graph()
    first = ordered[0]
    x = g.stream("tokens" if first.kind == "table" else "input", first.inputs)
    for item in ordered:
        if after is not None and item.path == after:
            g.norm(*norms["after blocks"], x)
        x = _add_item(g, item, x, norms.get(item.path, (None, None)), pre)
    return g


def _add_item(g: Graph, item: Item, x: Nodes, norm: tuple[str | None, str | None], pre: bool) -> Nodes:
    if item.kind == "block":
        return _add_block(g, item, x, pre)
    if item.kind == "cell":
        return _add_cell(g, item, x)
    m = item.modules[0]
    assert m.kernel is not None
    if item.kind == "table":
        into = g.stream(item.path, item.outputs)
        g.embedding(m.kernel.path, x, into)
        return into
    if item.kind in ("conv", "depthwise"):
        groups = len(x) // item.inputs
        return g.conv(
            m.kernel.path,
            x,
            item.outputs,
            kernel=m.kernel.shape[:-2],
            bias=m.b,
            norm=norm,
            groups=groups,
            name=item.path,
        )
    return g.dense(m.kernel.path, x, item.outputs, bias=m.b, norm=norm, positions=item.inputs // len(x), name=item.path)


def _fits(item: Item, before: Item | None) -> bool:
    if before is None:
        return True
    if item.kind == "table":
        return False
    if item.kind == "dense" and before.kind in ("conv", "depthwise", "block"):
        return item.inputs % before.outputs == 0
    if item.kind == "depthwise":
        return before.kind != "dense" and (before.outputs == 1 or item.outputs % before.outputs == 0)
    if item.kind == "conv":
        # A kernel whose inputs are a part of the channels is one in groups.
        return (
            before.kind not in ("dense", "cell", "table")
            and before.outputs % item.inputs == 0
            and item.outputs % (before.outputs // item.inputs) == 0
        )
    return item.inputs == before.outputs


def _ordered(items: list[Item]) -> list[Item]:
    """The order of the names if each layer takes what the one before gives, else the only order of which it is true."""
    kinds = {"table": 0, "conv": 1, "depthwise": 1, "block": 1, "cell": 2, "dense": 3}
    named = sorted(items, key=lambda i: (_place(i), natural(i.path)))
    guesses = (named, sorted(named, key=lambda i: (_place(i), kinds[i.kind])))

    def holds(order: list[Item], fits: Callable[[Item, Item | None], bool]) -> bool:
        return all(fits(b, a) for a, b in zip([None, *order[:-1]], order, strict=True))

    for guess in guesses:
        if holds(guess, _exactly):
            return guess
    found: list[list[Item]] = []
    steps = 0

    def extend(done: list[Item], left: list[Item]) -> None:
        nonlocal steps
        steps += 1
        if not left:
            found.append(done)
        alike: set[Any] = set()  # layers of the same sizes stay in the order of their names
        for i, item in enumerate(left):
            place = _place(item)
            ends = (place == 0 and bool(done)) or (place == 2 and len(left) > 1)
            sizes = (item.kind, item.inputs, item.outputs)
            if ends or sizes in alike or len(found) > 1 or steps > 10_000:
                continue
            alike.add(sizes)
            if _exactly(item, done[-1] if done else None):
                extend([*done, item], left[:i] + left[i + 1 :])

    extend([], named)
    if len(found) == 1 and steps <= 10_000:
        return found[0]
    for guess in guesses if not found else ():
        if holds(guess, _fits):
            return guess
    names = ", ".join(f"{i.path} {i.inputs}→{i.outputs}" for i in named)
    raise doubt(f"the layers {names} form {'several chains' if found else 'no chain'}")


def _place(item: Item) -> int:
    """0 of a layer that is first by its name, 2 of one that is last."""
    name = item.path.split("/")[-1].lower()
    if re.search(r"stem|initial|init\b|_init|first", name):
        return 0
    return 2 if re.search(r"output|logits|head|classifier", name) else 1


def _exactly(item: Item, before: Item | None) -> bool:
    """Equal sizes, but for a picture that is flattened; no kernels in groups."""
    return _fits(item, before) and (
        before is None
        or item.inputs == before.outputs
        or (item.kind == "dense" and before.kind not in ("dense", "cell"))
    )


def _norms(norms: list[Module], items: list[Item]) -> dict[str, tuple[str | None, str | None]]:
    """Scale and bias by the path of the layer they follow; "after blocks": of what acts on the last block's stream."""
    out: dict[str, tuple[str | None, str | None]] = {}
    norms = [m for m in norms if m.scale is not None]
    for size in {m.size() for m in norms}:
        mine = [m for m in norms if m.size() == size]
        places = [i for i in items if i.outputs == size and i.kind in ("conv", "depthwise", "dense")]
        if places and places[-1] is items[-1] and len(places) > len(mine):
            places = places[:-1]
        if len(mine) == len(places):
            out |= {item.path: m.norm for item, m in zip(places, mine, strict=True)}
        elif len(mine) == 1 and any(i.outputs == size and i.kind == "block" for i in items):
            out |= {"after blocks": mine[0].norm}
    return out


def _residual_blocks(modules: Sequence[Module]) -> dict[str, list[Module]]:
    by_parent: dict[str, list[Module]] = {}
    for m in modules:
        by_parent.setdefault(m.parent, []).append(m)
    out = {}
    for path, some in by_parent.items():
        convs = [m for m in some if m.kernel and len(m.kernel.shape) > 2 and not SHORTCUT.search(m.name)]
        named = re.search(r"block|res|stage", path.split("/")[-1].lower())
        if len(convs) < 2 or not named:
            continue
        inputs, outputs = convs[0].kernel.shape[-2], convs[-1].kernel.shape[-1]  # type: ignore[union-attr]
        short = any(m.kernel and SHORTCUT.search(m.name) for m in some)
        if inputs == outputs or short:
            out[path] = some
    return out


def _pre_activated(blocks: dict[str, list[Module]]) -> bool:
    """Whether norms stand before convolutions: true if in one block their sizes fit only so."""
    for some in blocks.values():
        convs = [m for m in some if m.kernel and not SHORTCUT.search(m.name)]
        norms = [m for m in some if m.scale is not None and not SHORTCUT.search(m.name)]
        if len(convs) == len(norms):
            after = [m.kernel.shape[-1] for m in convs if m.kernel]
            before = [m.kernel.shape[-2] for m in convs if m.kernel]
            sizes = [m.size() for m in norms]
            if sizes == before and sizes != after:
                return True
    return False


def _add_block(g: Graph, item: Item, x: Nodes, pre: bool) -> Nodes:
    some = item.modules
    convs = [m for m in some if m.kernel and not SHORTCUT.search(m.name)]
    norms = [m for m in some if m.scale is not None and not SHORTCUT.search(m.name)]
    fits = len(norms) == len(convs)
    y = x
    for i, m in enumerate(convs):
        assert m.kernel is not None
        last = i == len(convs) - 1
        norm = norms[i].norm if fits else (None, None)
        if pre:
            g.norm(*norm, y)
            norm = (None, None)
        groups = len(y) // m.kernel.shape[-2]
        into = g.stream(item.path, m.kernel.shape[-1]) if last else m.kernel.shape[-1]
        y = g.conv(m.kernel.path, y, into, kernel=m.kernel.shape[:-2], bias=m.b, norm=norm, groups=groups, name=m.path)
    short = [m for m in some if m.kernel and SHORTCUT.search(m.name)]
    if not short:
        g.residual(x, y)
        return y
    m, norm = short[0], [n.norm for n in some if n.scale is not None and SHORTCUT.search(n.name)]
    assert m.kernel is not None
    g.conv(m.kernel.path, x, y, kernel=m.kernel.shape[:-2], bias=m.b, norm=norm[0] if norm else (None, None))
    return y


def _cells(modules: Sequence[Module]) -> tuple[list[Item], list[Module]]:
    """Recurrent cells: matrices from inputs and from the state to one gate or several."""
    by_parent: dict[str, dict[str, Module]] = {}
    for m in modules:
        by_parent.setdefault(m.parent, {})[m.name] = m
        if m.kernel is not None and m.kernel.path.split("/")[-1] in ("w", "kernel"):
            by_parent.setdefault(m.path, {})[""] = m
    items, used = [], []
    for path, some in by_parent.items():
        names = set(some) - {""}
        # NNX says if_ for Linen's if, a word of Python's.
        for gates in (("ii", "if", "ig", "io"), ("ii", "if_", "ig", "io"), ("ir", "iz", "in"), ("i",)):
            of_state = ["h" + g[1:].rstrip("_") for g in gates]
            if {*gates, *of_state} <= names:
                mine = [some[n] for pair in zip(gates, of_state, strict=True) for n in pair]
                i, o = mine[0].kernel.shape  # type: ignore[union-attr]
                items.append(Item(path, i, o, "cell", mine))
                used += mine
        pairs = (("dense_i", "dense_h"), ("w_i", "w_h"), ("", "recurrent"), ("linear", "linear_1"))
        for a, b in pairs:
            if a in some and b in some and not (a == "linear" and "rnn" not in path.lower()):
                one, two = some[a], some[b]
                if one.kernel is None or two.kernel is None or two.kernel.shape[1] % two.kernel.shape[0]:
                    continue
                items.append(Item(path, one.kernel.shape[0], two.kernel.shape[0], "cell", [one, two]))
                used += [one, two] + [m for m in modules if m.path == path and m.kernel is None]
                items[-1].modules.extend(m for m in modules if m.path == path and m.kernel is None)
        fused = some.get("linear")
        if "lstm" in path.lower() and fused is not None and fused.kernel is not None and fused.kernel.shape[1] % 4 == 0:
            h = fused.kernel.shape[1] // 4
            items.append(Item(path, fused.kernel.shape[0] - h, h, "cell", [fused]))
            used.append(fused)
    return items, used


def _add_cell(g: Graph, item: Item, x: Nodes) -> Nodes:
    """Gates are neurons of their own, each with an edge without weight to its neuron of the state."""
    h, some = item.outputs, item.modules

    def groups(n: int, names: Sequence[str] = ()) -> tuple[list[Nodes], Nodes]:
        if n == 1:
            state = g.stream(item.path, h)
            return [state], state
        gates = [g.stream(f"{item.path}:{names[i] if names else i}", h) for i in range(n)]
        state = g.stream(item.path, h)
        for gate in gates:
            g.residual(gate, state)
        return gates, state

    if some[0].name in ("ii", "ir", "i") and len(some) in (2, 6, 8):
        pairs = [(some[i], some[i + 1]) for i in range(0, len(some), 2)]
        gates, state = groups(len(pairs), [a.name[1:] for a, _ in pairs])
        for (a, b), gate in zip(pairs, gates, strict=True):
            for m, source in ((a, x), (b, state)):
                g.dense(m.kernel.path, source, gate, bias=m.b)  # type: ignore[union-attr]
        return state
    kernel = some[0].kernel
    assert kernel is not None
    gates, state = groups(kernel.shape[1] // h)
    if len(some) == 1:  # one matrix for the inputs and the state
        both = Nodes(item.path, _joined(x, state))
        g.gates(kernel.path, both, gates, bias=some[0].b)
        return state
    g.gates(kernel.path, x, gates, bias=some[0].b)
    recurrent = some[1].kernel
    assert recurrent is not None
    g.gates(recurrent.path, state, gates, bias=some[1].b)
    for m in some[2:]:
        for i, gate in enumerate(gates):
            assert m.bias is not None
            g.vector(m.bias.path, gate, part=(i * h, h), total=len(gates) * h)
    return state


def _joined(x: Nodes, y: Nodes) -> Any:
    import numpy as np

    return np.concatenate([x.ids, y.ids])
