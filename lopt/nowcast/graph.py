"""Which neurons a weight connects: the graph that the graph network sees, described by groups of neurons.

Source: Knyazev et al. (2025), arXiv:2409.04434, section 4.1 (neural graphs); numbering and types as in the released
code, for MLPs, CNNs and GPT-2 exactly.

>>> from lopt import nowcast
>>> g = nowcast.Graph()
>>> x = g.stream("input", 64)
>>> h = g.dense("fc1/kernel", x, 32, bias="fc1/bias")
>>> y = g.dense("fc2/kernel", h, 10, bias="fc2/bias")
>>> g.count, len(g.edges()[0])  # 64 + 1 + 32 + 1 + 10 neurons; 64·32 + 32 + 32·10 + 10 weights and a self-loop each
(108, 2518)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from lopt.base import unknown
from lopt.nowcast import network as N
from lopt.nowcast import proofs


@dataclass(frozen=True, eq=False)
class Nodes:
    """A group of neurons."""

    name: str
    ids: np.ndarray  # [n] their numbers

    def __len__(self) -> int:
        return len(self.ids)


class View(NamedTuple):
    """Which elements of a leaf a block's edges hold.

    shape: what the leaf is reshaped to.
    roles: a letter an axis: s source, d target, k tap, e edge (of a list); axes without letter have size 1 in a block.
    starts, sizes: the part along each axis.
    """

    shape: tuple[int, ...]
    roles: str
    starts: tuple[int, ...]
    sizes: tuple[int, ...]

    def places(self) -> np.ndarray:
        """[S, D, K] (or [E, 1, K] of a list) places in the flattened leaf."""
        part = tuple(slice(a, a + n) for a, n in zip(self.starts, self.sizes, strict=True))
        index = np.arange(math.prod(self.shape)).reshape(self.shape)[part]
        order = [self.roles.find(role) for role in ("e" if "e" in self.roles else "s", "d", "k")]
        index = np.transpose(index, [axis for axis in order if axis >= 0])
        for place, axis in enumerate(order):
            if axis < 0:
                index = np.expand_dims(index, place)
        return index


def view(shape: Sequence[int], roles: str, **parts: tuple[int, int]) -> View:
    """A view; parts: `d=(start, size)` and so on, an axis of which only that much is meant."""
    where = [parts.get(role, (0, n)) for role, n in zip(roles, shape, strict=True)]
    return View(tuple(shape), roles, tuple(a for a, _ in where), tuple(n for _, n in where))


class Block(NamedTuple):
    """Edges of one type: each source with each target (a grid), or source i with target i (a list)."""

    kind: int  # row of the table of types
    source: np.ndarray  # [S], of a list [E]
    target: np.ndarray  # [D], of a list [E]
    leaf: str | None  # path; None: edges that hold no weight
    view: View | None  # of the leaf
    grid: bool
    table: np.ndarray | None = None  # [E, K] places in the flattened leaf in place of a view; -1: none

    def places(self) -> np.ndarray:
        """[edges, K] places in the flattened leaf; of edges without weight [edges, 1] of -1."""
        if self.table is not None:
            return self.table
        if self.view is None:
            return np.full((self.edges, 1), -1)
        index = self.view.places()
        return index.reshape(self.edges, index.shape[-1])

    @property
    def edges(self) -> int:
        return len(self.source) * len(self.target) if self.grid else len(self.source)

    def ends(self) -> tuple[np.ndarray, np.ndarray]:
        """[edges] sources and targets, in the order of `places`."""
        if not self.grid:
            return self.source, self.target
        return np.repeat(self.source, len(self.target)), np.tile(self.target, len(self.source))


class Graph:
    """Groups of neurons and the blocks of edges between them. Paths are those of the parameters, joined by "/"."""

    def __init__(self) -> None:
        self.count = 0
        self.groups: list[Nodes] = []
        self.blocks: list[Block] = []

    def stream(self, name: str, size: int) -> Nodes:
        """New neurons: an input, or where a residual stream stands."""
        if type(size) is not int or size < 1:
            raise ValueError(f"Graph.stream({name!r}): size, got {size!r}; valid: an integer >= 1.")
        group = Nodes(name, np.arange(self.count, self.count + size))
        self.count += size
        self.groups.append(group)
        return group

    def vector(
        self,
        path: str | None,
        into: Nodes,
        *,
        kind: int = N.BIAS,
        part: tuple[int, int] | None = None,
        total: int | None = None,
    ) -> None:
        """A 1-D leaf, or the `part` (start, size) of one of `total` elements: a source neuron with an edge to each."""
        if path is not None:
            self._vector(path, self.stream(path, 1), into, kind, part, total)

    def _vector(
        self,
        path: str,
        source: Nodes,
        into: Nodes,
        kind: int = N.BIAS,
        part: tuple[int, int] | None = None,
        total: int | None = None,
    ) -> None:
        start, size = part or (0, len(into))
        if size != len(into):
            raise ValueError(f"Graph: {path!r} has {size} elements; valid: {len(into)}, the neurons of {into.name!r}.")
        seen = View((total or start + size,), "d", (start,), (size,))
        self._add(Block(kind, source.ids, into.ids, path, seen, True))

    def dense(
        self,
        path: str,
        source: Nodes,
        into: Nodes | int,
        *,
        bias: str | None = None,
        norm: tuple[str | None, str | None] = (None, None),
        kind: int = N.FC,
        name: str | None = None,
        positions: int = 1,
        outermost: str = "positions",
        transposed: bool = False,
    ) -> Nodes:
        """A matrix [in, out] from each of `source` to each of `into`; returns the neurons it ends at.

        Args:
          path: of the matrix.
          source: its rows' neurons.
          into: its columns' neurons, or how many new ones.
          bias: path of a vector that is added.
          norm: paths of scale and bias of a norm of the output.
          kind: edge type.
          name: of new neurons; None: the path.
          positions: of the picture that was flattened before: rows are positions · len(source).
          outermost: "positions" (channels last, as in JAX) or "channels" (as in PyTorch).
          transposed: the leaf is [out, in].
        """
        if outermost not in ("positions", "channels"):
            raise unknown("Graph.dense", "outermost", outermost, ("positions", "channels"))
        rows = np.tile(source.ids, positions) if outermost == "positions" else np.repeat(source.ids, positions)
        into = self._after(path, into, bias, norm, name)
        shape, roles = (len(rows), len(into)), "sd"
        if transposed:
            shape, roles = shape[::-1], "ds"
        self._add(Block(kind, rows, into.ids, path, view(shape, roles), True))
        return into

    def conv(
        self,
        path: str,
        source: Nodes,
        into: Nodes | int,
        *,
        kernel: Sequence[int] = (3, 3),
        bias: str | None = None,
        norm: tuple[str | None, str | None] = (None, None),
        groups: int = 1,
        name: str | None = None,
        taps: int = 9,
    ) -> Nodes:
        """A kernel [*kernel, in / groups, out]: an edge for each pair of channels, with the kernel as its features.

        A kernel of more than `taps` elements becomes several parallel edges of at most so many, in row-major order.
        """
        into = self._after(path, into, bias, norm, name)
        size, inputs, outputs = math.prod(kernel), len(source) // groups, len(into) // groups
        if inputs * groups != len(source) or outputs * groups != len(into):
            raise ValueError(
                f"Graph.conv({path!r}): groups, got {groups}; valid: divides {len(source)} and {len(into)}."
            )
        shape = (size, inputs, groups * outputs)
        for first in range(0, size, taps):
            some = (first, min(taps, size - first))
            for g in range(groups):
                part = slice(g * inputs, (g + 1) * inputs), slice(g * outputs, (g + 1) * outputs)
                seen = view(shape, "ksd", k=some, d=(g * outputs, outputs))
                if inputs == outputs == 1:
                    continue
                self._add(Block(N.CONV, source.ids[part[0]], into.ids[part[1]], path, seen, True))
            if inputs == outputs == 1:  # depthwise: a list rather than a block a channel
                seen = View((size, groups), "ke", (some[0], 0), (some[1], groups))
                self._add(Block(N.CONV, source.ids, into.ids, path, seen, False))
        return into

    def _after(
        self, path: str, into: Nodes | int, bias: str | None, norm: Sequence[str | None], name: str | None
    ) -> Nodes:
        """Neurons after the sources of what is added to them: these are numbered first."""
        vectors = [(p, kind) for p, kind in ((bias, N.BIAS), (norm[0], N.NORM), (norm[1], N.BIAS)) if p is not None]
        sources = [self.stream(p, 1) for p, _ in vectors]
        if not isinstance(into, Nodes):
            into = self.stream(name or path, int(into))
        for (p, kind), source in zip(vectors, sources, strict=True):
            self._vector(p, source, into, kind)
        return into

    def norm(self, scale: str | None, bias: str | None, x: Nodes) -> None:
        """A norm's two vectors, which act on these neurons."""
        self.vector(scale, x, kind=N.NORM)
        self.vector(bias, x)

    def embedding(self, path: str, source: Nodes, into: Nodes, *, kind: str = "word", shape: Any = None) -> None:
        """A table [rows, width] from tokens or positions to the stream; kind: "word" or "position"."""
        kinds = {"word": N.WORD, "position": N.POSITION}
        if kind not in kinds:
            raise unknown(f"Graph.embedding({path!r})", "kind", kind, kinds)
        seen = view(shape or (len(source), len(into)), "sd")
        self._add(Block(kinds[kind], source.ids, into.ids, path, seen, True))

    def residual(self, x: Nodes, into: Nodes, kind: int = N.RESIDUAL) -> None:
        """Edges without weight from neuron i to neuron i."""
        if len(x) != len(into):
            raise ValueError(f"Graph.residual: {x.name!r} has {len(x)} neurons; valid: {len(into)}, as {into.name!r}.")
        self._add(Block(kind, x.ids, into.ids, None, None, False))

    def attention(
        self,
        x: Nodes,
        into: Nodes,
        *,
        heads: int,
        query: str,
        key: str,
        value: str,
        out: str,
        biases: tuple[str | None, str | None, str | None, str | None] = (None, None, None, None),
        groups: int | None = None,
        width: int | None = None,
        fused: bool = False,
        transposed: bool = False,
        key_bias: str = "keys",
    ) -> None:
        """Attention from the stream x to the stream `into`: x → queries/keys → x, x → values → into.

        Keys are edges from the neurons of the queries back to x, and where `groups` heads of keys and values serve
        `heads` of queries, from neurons of their own, which those of their queries lead to. Row h·dh + i of `out` comes
        from neuron i of the value head that query head h reads.

        Args:
          x: neurons that queries, keys and values read.
          into: neurons the output is added to.
          heads: of queries.
          query, key, value, out: paths, of matrices [in, out]; any reshaping of them that keeps their order will do.
          biases: paths of theirs.
          groups: heads of keys and values; None: as many as of queries.
          width: of all queries together; None: as many as neurons in x.
          fused: query, key and value are one leaf [in, 3 · width], and their biases one [3 · width].
          transposed: leaves are [out, in].
          key_bias: "keys": it ends at the keys; "stream": at x, where their matrix ends, as in the reference's GPT-2.
        """
        groups, width = groups or heads, width or len(x)
        if heads % groups or width % heads:
            raise ValueError(
                f"Graph.attention({query!r}): heads, groups and width, got {heads}, {groups}, {width}; valid: heads a "
                "multiple of groups that divides width."
            )
        if key_bias not in ("keys", "stream"):
            raise unknown(f"Graph.attention({query!r})", "key_bias", key_bias, ("keys", "stream"))
        size = width // heads
        kv = groups * size
        per_head = self.stream(f"{query}:heads", heads)
        q_bias, v_bias = (self.stream(f"{p}:{n}", 1) if p else None for p, n in ((biases[0], "q"), (biases[2], "v")))
        q_nodes = self.stream(f"{query}:q", width)
        k_nodes = q_nodes if groups == heads else self.stream(f"{key}:k", kv)
        v_nodes = self.stream(f"{value}:v", kv)

        def matrix(path: str, place: int, kind: int, nodes: Nodes, reverse: bool) -> None:
            n = 3 * width if fused else len(nodes)
            start = place * width if fused else 0
            shape, roles = (len(x), n), "ds" if reverse else "sd"
            if transposed:
                shape, roles = shape[::-1], roles[::-1]
            axis = "s" if reverse else "d"
            seen = view(shape, roles, **{axis: (start, len(nodes))})
            ends = (nodes.ids, x.ids) if reverse else (x.ids, nodes.ids)
            self._add(Block(kind, *ends, path, seen, True))

        def vector(path: str | None, place: int, source: Nodes | None, nodes: Nodes) -> None:
            if path is not None and source is not None:
                n, start = (3 * width, place * width) if fused else (len(nodes), 0)
                self._add(Block(N.BIAS, source.ids, nodes.ids, path, View((n,), "d", (start,), (len(nodes),)), True))

        matrix(query, 0, N.QUERY, q_nodes, False)
        for h in range(heads):
            self._add(Block(N.HEAD, per_head.ids[h : h + 1], q_nodes.ids[h * size : (h + 1) * size], None, None, True))
        vector(biases[0], 0, q_bias, q_nodes)
        matrix(key, 1, N.KEY, k_nodes, True)
        if biases[1] is not None:
            vector(biases[1], 1, self.stream(f"{biases[1]}:k", 1), x if key_bias == "stream" else k_nodes)
        matrix(value, 2, N.VALUE, v_nodes, False)
        reads = np.arange(heads) // (heads // groups)  # which head of values each head reads
        for h in range(heads):
            part = v_nodes.ids[reads[h] * size : (reads[h] + 1) * size]
            self._add(Block(N.HEAD, per_head.ids[h : h + 1], part, None, None, True))
        vector(biases[2], 2, v_bias, v_nodes)
        of_head = (reads[:, None] * size + np.arange(size)[None]).reshape(-1)
        if groups != heads:
            self._add(Block(N.RESIDUAL, q_nodes.ids, k_nodes.ids[of_head], None, None, False))
        if biases[3] is not None:
            self.vector(biases[3], into)
        shape, roles = (width, len(into)), "sd"
        if transposed:
            shape, roles = shape[::-1], "ds"
        self._add(Block(N.FC, v_nodes.ids[of_head], into.ids, out, view(shape, roles), True))

    def gates(self, path: str, source: Nodes, gates: Sequence[Nodes], *, bias: str | None = None) -> None:
        """A matrix [in, gates · n] whose columns are several groups, one after the other (LSTM and GRU cells)."""
        n, shape = len(gates[0]), (len(source), len(gates) * len(gates[0]))
        for i, gate in enumerate(gates):
            self._add(Block(N.FC, source.ids, gate.ids, path, view(shape, "sd", d=(i * n, n)), True))
            if bias is not None:
                node = self.stream(f"{bias}:{i}", 1)
                seen = View((len(gates) * n,), "d", (i * n,), (n,))
                self._add(Block(N.BIAS, node.ids, gate.ids, bias, seen, True))

    def _add(self, block: Block) -> None:
        self.blocks.append(block)

    @staticmethod
    def from_arrays(
        edges: Any, types: Any, index: Any, count: int, leaves: Sequence[tuple[str, Sequence[int]]]
    ) -> Graph:
        """A graph that is given as arrays.

        Args:
          edges: [2, E] sources and targets; self-loops (type 13) are left out, as every graph has them.
          types: [E].
          index: [E, K] places in the concatenation of the leaves, row-major; -1: none.
          count: neurons.
          leaves: path and shape of each leaf, in the order of the concatenation.
        """
        graph = Graph()
        graph.stream("all", int(count))
        edges, types, index = np.asarray(edges), np.asarray(types), np.asarray(index)
        sizes = [math.prod(shape) for _, shape in leaves]
        bounds = np.concatenate([[0], np.cumsum(sizes)])
        first = index[:, 0]
        for i, (path, _) in enumerate(leaves):
            mine = (first >= bounds[i]) & (first < bounds[i + 1])
            for kind in np.unique(types[mine]):
                rows = mine & (types == kind)
                taps = int((index[rows] >= 0).sum(1).max())
                table = np.where(index[rows] >= 0, index[rows] - bounds[i], -1)[:, :taps]
                graph._add(Block(int(kind), edges[0][rows], edges[1][rows], path, None, False, table))
        for kind in (N.RESIDUAL, N.HEAD):
            rows = types == kind
            if rows.any():
                graph._add(Block(kind, edges[0][rows], edges[1][rows], None, None, False))
        return graph

    def edges(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sources, targets and types of all edges [E], self-loops last."""
        ends = [block.ends() for block in self.blocks]
        loops = np.arange(self.count)
        kinds = [np.full(block.edges, block.kind) for block in self.blocks] + [np.full(self.count, N.SELF)]
        return (
            np.concatenate([*(s for s, _ in ends), loops]),
            np.concatenate([*(t for _, t in ends), loops]),
            np.concatenate(kinds),
        )

    def fitted(self, params: Any) -> tuple[list[Block], list[str]]:
        """Its blocks, and the paths of leaves that no edge holds; raises as `validate`."""
        return self.blocks, proofs.missing(self, params)

    def validate(self, params: Any) -> list[str]:
        """Prove that each weight of each leaf that is placed has exactly one edge or kernel tap; name the other leaves.

        Returns:
          Paths of leaves that no edge holds.

        Raises:
          ValueError: on a path that params do not have, a shape that does not fit, a neuron that does not exist, an
            element with no edge or two.
        """
        return proofs.missing(self, params)

    def prove(
        self, apply: Callable[[Any], Any], params: Any, *, skip: Sequence[str] = (), rtol: float = 1e-3
    ) -> list[str]:
        """Prove that ends of edges are neurons of matching index: the network computes the same with neurons in turn.

        Each group that is neither input nor output is rotated by one, together with the groups that residual edges tie
        to it and within heads; see `permuted`.

        Args:
          apply: `params -> outputs`, the network on some input.
          params: of random values: zeros and ones would prove nothing.
          skip: names of groups to leave alone, e.g. queries whose neurons are told apart by rotary encodings.
          rtol: of the largest output.

        Returns:
          The groups that were rotated.

        Raises:
          ValueError: naming the groups whose rotation changes the outputs, or where there is none to rotate.
        """
        return proofs.prove(self, apply, params, skip=skip, rtol=rtol)

    def permuted(self, params: Any, order: Mapping[str, Any]) -> Any:
        """The parameters with neurons in another order: a weight from s to t becomes the one from σ(s) to σ(t).

        A network computes the same with hidden neurons in another order. That it does with those of the graph proves
        that ends of edges are neurons of matching index, which sizes alone cannot.

        Args:
          params: of the network.
          order: by name of a group, the new place of each of its neurons.
        """
        return proofs.permuted(self, params, order)
