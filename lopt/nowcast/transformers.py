"""Graphs of transformers: attention, MLPs and norms on one residual stream."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from lopt.nowcast.graph import Graph, Nodes
from lopt.nowcast.modules import KERNELS, TABLES, Module, doubt, first_named

QUERY, KEY = ("query", "q", "q_proj", "wq", "to_q"), ("key", "k", "k_proj", "wk", "to_k")
VALUE, FUSED = ("value", "v", "v_proj", "wv", "to_v"), ("c_attn", "qkv", "qkv_proj", "in_proj", "attn_qkv")
OUT = ("merge", "out", "o_proj", "out_proj", "wo", "to_out", "c_proj", "proj", "linear", "o")
GATE, DOWN = (
    ("gate", "gate_proj", "w1", "wi_0", "c_gate"),
    ("down", "down_proj", "c_proj", "fc2", "w2", "dense_1", "linear_1"),
)


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
        fused = first_named(some, FUSED)
        q, k, v = (
            (fused, fused, fused)
            if fused
            else (first_named(some, QUERY), first_named(some, KEY), first_named(some, VALUE))
        )
        if not (q and k and v):
            continue
        o = first_named(some, OUT)
        if o is None:
            raise doubt(f"attention {parent!r} has no output matrix named one of {', '.join(OUT)}")
        out.append(Attention(parent, q, k, v, o, fused is not None))
    if not out:
        raise doubt("queries without keys and values")
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
        raise doubt(f"{n} attentions, {len(mlps)} matrices of MLPs and {len(norms)} norms do not make {n} blocks")
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
        named = first_named(some, DOWN)
        downs = [named] if named else some[-1:]
    ups = [m for m in some if m not in downs and ends(m)[0] == width]
    if len(downs) != 1 or len(ups) not in (1, 2) or len(some) != 1 + len(ups):
        raise doubt(f"an MLP of {', '.join(m.path for m in some) or 'no matrices'}")
    gate = None
    if len(ups) == 2:
        gate = first_named(ups, GATE) or ups[0]
        ups = [m for m in ups if m is not gate]
    hidden = add(ups[0], x, ends(ups[0])[-1], name)
    if gate is not None:
        g.residual(add(gate, x, ends(gate)[-1], f"{name}:gate"), hidden)
    add(downs[0], hidden, into, name)
