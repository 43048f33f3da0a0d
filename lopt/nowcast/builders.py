"""Graphs of parameter trees that name their layers as flax Linen, NNX, haiku or lopt's tasks do.

A tree says names and shapes and not how layers are called. What is inferred from these is stated at each function;
where they leave a doubt the layer is left out or an error says so, and `Graph` describes what cannot be recognised.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from lopt.nowcast.graph import Graph, Nodes, floating

KERNELS, BIASES, TABLES = ("kernel", "w", "weight"), ("bias", "b", "offset", "beta"), ("embedding", "embeddings")
SCALES = ("scale", "gamma", "weight")
QUERY, KEY = ("query", "q", "q_proj", "wq", "to_q"), ("key", "k", "k_proj", "wk", "to_k")
VALUE, FUSED = ("value", "v", "v_proj", "wv", "to_v"), ("c_attn", "qkv", "qkv_proj", "in_proj", "attn_qkv")
OUT = ("merge", "out", "o_proj", "out_proj", "wo", "to_out", "c_proj", "proj", "linear", "o")
GATE, DOWN = (
    ("gate", "gate_proj", "w1", "wi_0", "c_gate"),
    ("down", "down_proj", "c_proj", "fc2", "w2", "dense_1", "linear_1"),
)
SHORTCUT = re.compile(r"proj|skip|shortcut|downsample")


class Leaf(NamedTuple):
    path: str
    shape: tuple[int, ...]


class Module(NamedTuple):
    """The leaves of one layer."""

    path: str
    kernel: Leaf | None
    bias: Leaf | None
    scale: Leaf | None

    @property
    def name(self) -> str:
        return self.path.split("/")[-1].lower()

    @property
    def parent(self) -> str:
        return self.path.rpartition("/")[0]

    @property
    def b(self) -> str | None:
        return self.bias.path if self.bias else None

    def size(self) -> int:
        """Of a norm."""
        some = self.scale or self.bias
        return math.prod(some.shape) if some else 0

    @property
    def norm(self) -> tuple[str | None, str | None]:
        return (self.scale.path if self.scale else None, self.b)


def recognise(params: Any, *, heads: int | None = None) -> Graph:
    """The graph of an MLP, CNN, residual or recurrent network or transformer, from the names and shapes of its leaves.

    Layers stand in the natural order of their names (Dense_2 before Dense_10), or in the one order in which each takes
    what the one before gives. Leaves whose place is in doubt are left out: `Graph.validate` names them.

    Args:
      params: a tree of flax Linen, NNX (`nnx.state(model, nnx.Param)`), haiku, or lopt's tasks.
      heads: of attention, where shapes do not say.

    Raises:
      ValueError: if the layers form no such network.

    >>> import jax.numpy as jnp
    >>> from lopt import nowcast
    >>> params = {"Dense_0": {"kernel": jnp.zeros((4, 8))}, "Dense_1": {"kernel": jnp.zeros((8, 2))}}
    >>> nowcast.recognise(params).validate(params)  # no leaf is left out
    []
    """
    modules = parse(params)
    if not modules:
        raise ValueError("lopt.nowcast.recognise: params have no leaves of floats; valid: a pytree with some.")
    if any(m.kernel and _is(m, (*QUERY, *FUSED)) for m in modules):
        return transformer(modules, heads=heads)
    return chain(modules)


def parse(params: Any) -> list[Module]:
    """Layers in the natural order of their names."""
    found: dict[str, dict[str, Leaf]] = {}
    for path, shape in floating(params):
        parts = path.split("/")
        if (
            parts[-1] in ("value", "raw_value")
            and len(parts) > 1
            and parts[-2] in (*KERNELS, *BIASES, *SCALES, *TABLES)
        ):
            parts = parts[:-1]  # a variable of NNX
        role, place = parts[-1], "/".join(p for p in parts[:-1] if p not in ("~",))
        leaf, wide = Leaf(path, shape), max(shape, default=1) != math.prod(shape)
        if role in SCALES and not (role == "weight" and wide):
            kind = "scale"
        elif role in BIASES:
            kind = "bias"
        elif role in KERNELS or role in TABLES:
            kind = "kernel"
        else:  # an array that has the name of its layer
            place, kind = f"{place}/{role}" if place else role, "kernel" if len(shape) > 1 else "bias"
        found.setdefault(place, {})[kind] = leaf
    modules = [Module(path, some.get("kernel"), some.get("bias"), some.get("scale")) for path, some in found.items()]
    return sorted(modules, key=lambda m: natural(m.path))


def natural(path: str) -> list[Any]:
    return [[(0, int(x), "") if x.isdigit() else (1, 0, x) for x in re.findall(r"\d+|\D+", p)] for p in path.split("/")]


def _is(m: Module, names: Iterable[str]) -> bool:
    return m.name in names


def _find(modules: Iterable[Module], names: Iterable[str]) -> Module | None:
    """The first by the order of names."""
    by_name = {m.name: m for m in reversed(list(modules)) if m.kernel}
    return next((by_name[name] for name in names if name in by_name), None)


def _error(message: str) -> ValueError:
    return ValueError(f"lopt.nowcast.recognise: {message}; describe the network with lopt.nowcast.Graph.")


# Chains: layers one after the other, with residual blocks and recurrent cells as layers.


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
        raise _error("no leaf is a matrix or a kernel")
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
    raise _error(f"the layers {names} form {'several chains' if found else 'no chain'}")


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


# Transformers.


class Attention(NamedTuple):
    path: str
    query: Module
    key: Module
    value: Module
    out: Module
    fused: bool


def transformer(modules: Sequence[Module], *, heads: int | None = None) -> Graph:
    """GPT-2 style, Llama style and vision transformers: self-attention and an MLP a block, on one residual stream.

    Each block's first norm acts on the stream that attention reads and its second on the one that the MLP reads, as the
    reference wires GPT-2. A leaf named pos… or wpe is the table of positions, other tables are of tokens; vectors of
    the stream's size outside blocks (a class token) are added to it. A norm of another size (of queries and keys) is
    left out.
    """
    found = _attentions(modules)
    inside = {id(m) for a in found for m in (a.query, a.key, a.value, a.out)}
    rest = [m for m in modules if id(m) not in inside]
    first = found[0].query.kernel.shape  # type: ignore[union-attr]
    # The JAX port of GPT-2 keeps its blocks' matrices [out, in].
    turned = found[0].fused and len(first) == 2 and first[0] == 3 * first[1]
    width = first[1] if turned else first[0]
    blocks, top = _blocks(found, rest, width)
    g = Graph()
    x = _stem(g, top, width)
    for number, (attention, mlp, norms) in enumerate(blocks):
        if norms:
            g.norm(*norms[0].norm, x)
        middle, after = g.stream(f"block{number}:middle", width), g.stream(f"block{number}:out", width)
        _attend(g, attention, x, middle, heads, turned)
        g.residual(x, middle)
        if len(norms) > 1:
            g.norm(*norms[1].norm, middle)
        _mlp(g, mlp, middle, after, f"block{number}:hidden", turned)
        g.residual(middle, after)
        x = after
    finals = [m for m in top if m.kernel is None and m.scale is not None and m.size() == width]
    if finals:
        g.norm(*finals[-1].norm, x)
    for m in top:
        if (
            m.kernel
            and len(m.kernel.shape) == 2
            and m.kernel.shape[0] == width
            and not _table(m)
            and not _first(m, width)
        ):
            x = g.dense(m.kernel.path, x, m.kernel.shape[1], bias=m.b, name=m.path)
            break
    return g


def _attentions(modules: Sequence[Module]) -> list[Attention]:
    out = []
    for parent in dict.fromkeys(m.parent for m in modules):
        some = [m for m in modules if m.parent == parent]
        fused = _find(some, FUSED)
        q, k, v = (fused, fused, fused) if fused else (_find(some, QUERY), _find(some, KEY), _find(some, VALUE))
        if not (q and k and v):
            continue
        o = _find(some, OUT)
        if o is None:
            raise _error(f"attention {parent!r} has no output matrix named one of {', '.join(OUT)}")
        out.append(Attention(parent, q, k, v, o, fused is not None))
    if not out:
        raise _error("queries without keys and values")
    return out


def _table(m: Module) -> bool:
    assert m.kernel is not None
    name = m.path.lower()
    named = bool(re.search(r"wte|wpe|pos|embed|tok", name))
    return m.kernel.path.split("/")[-1] in TABLES or (named and not _patches(m))


def _patches(m: Module) -> bool:
    assert m.kernel is not None
    return (len(m.kernel.shape) > 2 and m.kernel.path.split("/")[-1] in KERNELS) or "patch" in m.name


def _first(m: Module, width: int) -> bool:
    """Whether a matrix leads from the input to the stream."""
    assert m.kernel is not None
    return _patches(m) and m.kernel.shape[-1] == width


Block = tuple[Attention, list[Module], list[Module]]


def _blocks(found: list[Attention], rest: list[Module], width: int) -> tuple[list[Block], list[Module]]:
    """Of each attention its MLP's matrices and its norms; and what is outside of blocks."""
    homes = [a.path if any(m.parent == a.path for m in rest) else a.path.rpartition("/")[0] for a in found]
    if (
        len(set(homes)) == len(homes)
        and all(homes)
        and all(any(m.path.startswith(h + "/") for m in rest) for h in homes)
    ):
        out = []
        inside: set[int] = set()
        for a, home in zip(found, homes, strict=True):
            mine = [m for m in rest if m.path.startswith(home + "/")]
            inside |= {id(m) for m in mine}
            norms = [m for m in mine if m.kernel is None and m.scale is not None and m.size() == width]
            out.append((a, [m for m in mine if m.kernel], norms))
        return out, [m for m in rest if id(m) not in inside]
    # Names count layers over all blocks (haiku): so many each, in their order.
    matrices = [m for m in rest if m.kernel and len(m.kernel.shape) == 2 and not _table(m) and not _patches(m)]
    downs = [m for m in matrices if m.kernel.shape[1] == width and m.kernel.shape[0] != width]  # type: ignore[union-attr]
    hidden = {m.kernel.shape[0] for m in downs}  # type: ignore[union-attr]
    mlps = [m for m in matrices if m in downs or (m.kernel.shape[0] == width and m.kernel.shape[1] in hidden)]  # type: ignore[union-attr]
    norms = [m for m in rest if m.kernel is None and m.scale is not None and m.size() == width]
    n = len(found)
    if len(mlps) % n or len(norms) not in (0, 2 * n, 2 * n + 1):
        raise _error(f"{n} attentions, {len(mlps)} matrices of MLPs and {len(norms)} norms do not make {n} blocks")
    per, norms = len(mlps) // n, norms
    used = {id(m) for m in [*mlps, *norms[: 2 * n]]}
    split = [(a, mlps[i * per : (i + 1) * per], norms[2 * i : 2 * i + 2]) for i, a in enumerate(found)]
    return split, [m for m in rest if id(m) not in used]


def _stem(g: Graph, top: list[Module], width: int) -> Nodes:
    """Everything that leads to the stream before the first block."""
    tables, matrices, vectors = [], [], []
    for m in top:
        if m.kernel is None:
            if m.bias is not None and m.scale is None and m.size() == width:
                vectors.append(m.bias.path)
            continue
        size = math.prod(m.kernel.shape)
        if _first(m, width):
            matrices.append(m)
        elif size == width and m.kernel.shape[-1] == width:
            vectors.append(m.kernel.path)
        elif _table(m) and m.kernel.shape[-1] == width:
            tables.append(m)
    sources = []
    for m in tables:
        position = bool(re.search(r"wpe|pos", m.path.lower()))
        assert m.kernel is not None
        sources.append((m, position, g.stream(m.path, math.prod(m.kernel.shape) // width)))
    inputs = []
    for m in matrices:
        assert m.kernel is not None
        inputs.append((m, g.stream(f"{m.path}:input", m.kernel.shape[-2])))
    x = g.stream("stream", width)
    for m, position, source in sources:
        assert m.kernel is not None
        g.embedding(m.kernel.path, source, x, kind="position" if position else "word")
    for m, source in inputs:
        assert m.kernel is not None
        if len(m.kernel.shape) > 2:
            g.conv(m.kernel.path, source, x, kernel=m.kernel.shape[:-2], bias=m.b)
        else:
            g.dense(m.kernel.path, source, x, bias=m.b)
    for path in vectors:
        g.vector(path, x)
    return x


def _attend(g: Graph, a: Attention, x: Nodes, into: Nodes, heads: int | None, turned: bool) -> None:
    shapes = [m.kernel.shape for m in (a.query, a.key) if m.kernel]
    if a.fused:
        width = shapes[0][1] if turned else math.prod(shapes[0][1:]) // 3
        n = shapes[0][-2] if len(shapes[0]) == 4 else heads  # [in, 3, heads, size]
        groups = n
    else:
        width = math.prod(shapes[0][1:])
        n = shapes[0][1] if len(shapes[0]) == 3 else heads
        groups = None if n is None else math.prod(shapes[1][1:]) * n // width
    if n is None:
        raise ValueError(f"lopt.nowcast.recognise: heads of {a.path!r} are not in its shapes; pass heads=.")
    biases = (a.query.b, a.key.b, a.value.b, a.out.b)
    paths: Any = {
        role: m.kernel.path for role, m in zip(("query", "key", "value", "out"), a[1:5], strict=True) if m.kernel
    }
    bias = "stream" if a.query.name == "c_attn" else "keys"  # GPT-2, as the reference has it
    how: Any = {"heads": n, "groups": groups, "width": width, "fused": a.fused, "transposed": turned}
    g.attention(x, into, biases=biases, key_bias=bias, **how, **paths)


def _mlp(g: Graph, some: list[Module], x: Nodes, into: Nodes, name: str, turned: bool) -> None:
    """x → hidden → into; of three matrices one is a gate, with neurons of its own that lead to the hidden ones."""

    def ends(m: Module) -> tuple[int, ...]:
        assert m.kernel is not None
        return m.kernel.shape[::-1] if turned else m.kernel.shape

    def add(m: Module, source: Nodes, target: Nodes | int, name: str) -> Nodes:
        assert m.kernel is not None
        return g.dense(m.kernel.path, source, target, bias=m.b, name=name, transposed=turned)

    width = len(x)
    downs = [m for m in some if ends(m)[-1] == width and ends(m)[0] != width]
    if not downs:
        named = _find(some, DOWN)
        downs = [named] if named else some[-1:]
    ups = [m for m in some if m not in downs and ends(m)[0] == width]
    if len(downs) != 1 or len(ups) not in (1, 2) or len(some) != 1 + len(ups):
        raise _error(f"an MLP of {', '.join(m.path for m in some) or 'no matrices'}")
    gate = None
    if len(ups) == 2:
        gate = _find(ups, GATE) or ups[0]
        ups = [m for m in ups if m is not gate]
    hidden = add(ups[0], x, ends(ups[0])[-1], name)
    if gate is not None:
        g.residual(add(gate, x, ends(gate)[-1], f"{name}:gate"), hidden)
    add(downs[0], hidden, into, name)
