"""What a network says of all parameters, in pieces: memory is bounded by a tile of edges, not by the edges.

A vector of an edge takes 512 bytes. So none is kept: each of the passes (one a message-passing layer, one for the head)
computes them anew, tile by tile, from the states and the neurons' vectors. Large matrices are tiles [rows, columns]
whose ends are broadcast and summed; what is small is packed into one list of edges.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lopt.nowcast import network as N
from lopt.nowcast.graph import Block, Graph, View
from lopt.nowcast.modules import floating

TILE = 2048  # edges; vectors of a tile are 1 MB each at width 128
SMALL = 2**16  # edges of a block that is still packed with others


class Packed(NamedTuple):
    """Small blocks of the same number of taps, as one list of edges."""

    source: np.ndarray  # [E]
    target: np.ndarray  # [E]
    kind: np.ndarray  # [E]
    place: np.ndarray  # [E, K] in the concatenated small leaves; -1: none
    constant: np.ndarray  # [E] feature 0 of edges without weight


class Plan(NamedTuple):
    """How the leaves are walked; numpy only, made once."""

    count: int  # neurons
    degree: np.ndarray  # [V] edges that end there, the self-loop too
    grids: list[tuple[int, Block]]  # large blocks and the number of their leaf
    packed: list[Packed]
    small: list[int]  # numbers of the leaves that packed edges hold
    placed: list[bool]  # by leaf: whether edges hold it


def plan(graph: Graph, params: Any, paths: Sequence[str], *, taps: int, small: int | None = None) -> Plan:
    """Sort a graph's blocks by size. `paths`: the leaves of floats, in order."""
    small = SMALL if small is None else small
    blocks, missing = graph.fitted(params)
    number = {path: i for i, path in enumerate(paths)}
    degree = np.ones(graph.count)
    for block in blocks:
        _add_degree(degree, block)
    grids, rest = [], []
    for block in blocks:
        if block.view is not None and "k" in block.view.roles:
            k = block.view.sizes[block.view.roles.index("k")]
            if k > taps:
                raise ValueError(f"lopt.nowcast: {block.leaf!r} has edges of {k} taps; this network: at most {taps}.")
        large = block.leaf is not None and block.grid and block.table is None and block.edges >= small
        if large:
            grids.append((number[block.leaf], block))  # type: ignore[index]
        else:
            rest.append(block)
    loops = np.arange(graph.count)
    rest.append(Block(N.SELF, loops, loops, None, None, False))
    sizes = {path: math.prod(shape) for path, shape in floating(params)}
    held = [number[block.leaf] for block in rest if block.leaf is not None]
    leaves = sorted(set(held))
    offset = dict(zip(leaves, np.cumsum([0, *(sizes[paths[i]] for i in leaves)]), strict=False))
    packed: dict[int, list[tuple[Block, np.ndarray]]] = {}
    for block in rest:
        index = block.places()
        if block.leaf is not None:
            index = np.where(index >= 0, index + offset[number[block.leaf]], -1)
        packed.setdefault(index.shape[1], []).append((block, index))
    placed = [path not in missing for path in paths]
    return Plan(graph.count, degree, grids, [_pack(some) for _, some in sorted(packed.items())], leaves, placed)


def _add_degree(degree: np.ndarray, block: Block) -> None:
    np.add.at(degree, block.target, len(block.source) if block.grid else 1)


def _pack(some: list[tuple[Block, np.ndarray]]) -> Packed:
    ends = [block.ends() for block, _ in some]
    return Packed(
        np.concatenate([s for s, _ in ends]).astype(np.int32),
        np.concatenate([t for _, t in ends]).astype(np.int32),
        np.concatenate([np.full(b.edges, b.kind, np.int32) for b, _ in some]),
        np.concatenate([index for _, index in some]).astype(np.int32),
        np.concatenate(
            [np.full(b.edges, N.CONSTANT.get(b.kind, 0.0) if b.leaf is None else 0.0, np.float32) for b, _ in some]
        ),
    )


class Tile(NamedTuple):
    """Some edges: what they hold, and how they meet the neurons."""

    features: jax.Array  # [..., K·T] scaled
    kind: Any  # type, or [...] types
    at_source: Callable[[jax.Array], jax.Array]  # [V, H] -> broadcastable to [..., H]
    at_target: Callable[[jax.Array], jax.Array]
    collect: Callable[[jax.Array, jax.Array], jax.Array]  # ([V, H], messages [..., H]) -> [V, H]
    write: Callable[[Any, jax.Array], Any]  # (outputs, changes [..., K, heads]) -> outputs


def gnn_changes(
    network: N.Network,
    layout: Plan,
    history: Sequence[jax.Array],
    scales: Sequence[tuple[jax.Array, jax.Array]],
    at: jax.Array,
    positions: Any = None,
    *,
    tile: int | None = None,
) -> list[jax.Array | None]:
    """Scaled changes of each leaf.

    Args:
      network: a gnn.
      layout: of the graph.
      history: [T, *shape] of each leaf, oldest first.
      scales: mean and standard deviation of each.
      at: [heads] horizons, 1-based.
      positions: [V, 8] Laplacian encodings; None: zeros.

    Returns:
      [heads, *shape] float32 a leaf; None where no edge holds it.
    """
    theta, tile = network.theta, tile or TILE
    heads, states = at.shape[0], history[0].shape[0]
    flat = [jnp.zeros((states, 0), jnp.float32)]
    flat += [N.scale(history[i], *scales[i]).reshape(states, -1) for i in layout.small]
    joined = jnp.concatenate(flat, axis=1)

    def walk(f: Callable[[Any, Tile], Any], carry: Any) -> Any:
        for packed in layout.packed:
            carry = _walk_packed(f, carry, packed, joined, tile)
        for leaf, block in layout.grids:
            carry = _walk_grid(f, carry, leaf, block, history[leaf], scales[leaf], tile)
        return carry

    x = N.nodes(theta, layout.count, positions)
    degree = jnp.asarray(layout.degree, jnp.float32)[:, None]
    seen: list[N.Ends] = []

    def vectors(piece: Tile) -> jax.Array:
        e = N.encode(theta, piece.features, piece.kind)
        for layer, ends in zip(theta["layers"], seen, strict=False):
            e = N.move_edges(layer, e, piece.at_source(ends.source), piece.at_target(ends.target))
        return e

    for layer in theta["layers"]:
        ends = N.before(layer, x)

        def add(total: jax.Array, piece: Tile, layer: Any = layer, ends: N.Ends = ends) -> jax.Array:
            m = N.message(layer, vectors(piece), piece.at_source(ends.source), piece.at_target(ends.target))
            return piece.collect(total, m)

        x = N.move_nodes(layer, x, walk(add, jnp.zeros_like(x)) / degree)
        seen.append(N.after(layer, x))

    def last(outputs: Any, piece: Tile) -> Any:
        taps = piece.features.shape[-1] // states
        return piece.write(outputs, N.head(theta, vectors(piece), network.settings["horizons"], at, taps))

    large = sorted({leaf for leaf, _ in layout.grids})
    outputs = (
        jnp.zeros((heads, joined.shape[1])),
        {leaf: jnp.zeros((heads, *history[leaf].shape[1:])) for leaf in large},
    )
    small, whole = walk(last, outputs)
    changes: list[jax.Array | None] = [whole.get(i) for i in range(len(history))]
    start = 0
    for i in layout.small:
        size = history[i][0].size
        part = small[:, start : start + size].reshape(heads, *history[i].shape[1:])
        # A leaf of several blocks may be partly packed and partly not; what one of them has, the other left at 0.
        changes[i] = part if changes[i] is None else changes[i] + part  # type: ignore[operator]
        start += size
    return changes


def _walk_packed(f: Any, carry: Any, packed: Packed, joined: jax.Array, tile: int) -> Any:
    edges, k = packed.place.shape
    n = min(tile, edges)
    steps = -(-edges // n)
    pad = steps * n - edges
    nodes = jnp.iinfo(jnp.int32).max  # a target that does not exist: what goes there is dropped
    source = jnp.asarray(np.pad(packed.source, (0, pad)))
    target = jnp.asarray(np.pad(packed.target, (0, pad), constant_values=nodes))
    kind = jnp.asarray(np.pad(packed.kind, (0, pad)))
    place = jnp.asarray(np.pad(packed.place, ((0, pad), (0, 0)), constant_values=-1))
    constant = jnp.asarray(np.pad(packed.constant, (0, pad)))

    def step(i: Any, carry: Any) -> Any:
        def part(x: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, i * n, n)

        where, s, t = part(place), part(source), part(target)
        held = where >= 0
        if joined.shape[1]:
            features = jnp.where(held[None], joined[:, jnp.maximum(where, 0)], 0.0)  # [T, n, K]
        else:
            features = jnp.zeros((joined.shape[0], n, k))
        features = features.at[:, :, 0].add(part(constant)[None])
        features = jnp.moveaxis(features, 0, -1).reshape(n, -1)

        def write(outputs: Any, changes: jax.Array) -> Any:
            small, whole = outputs
            to = jnp.where(held, where, small.shape[1])
            return small.at[:, to].set(jnp.moveaxis(changes, -1, 0), mode="drop"), whole

        return f(
            carry,
            Tile(
                features,
                part(kind),
                lambda x: x[s],
                lambda x: x.at[t].get(mode="clip"),
                lambda total, m: total.at[t].add(m, mode="drop"),
                write,
            ),
        )

    return jax.lax.fori_loop(0, steps, step, carry)


def _walk_grid(
    f: Any, carry: Any, leaf: int, block: Block, history: jax.Array, scales: tuple[jax.Array, jax.Array], tile: int
) -> Any:
    assert block.view is not None
    seen: View = block.view
    sizes = dict(zip(seen.roles, seen.sizes, strict=True))
    sources, targets, taps = len(block.source), len(block.target), sizes.get("k", 1)
    columns = min(targets, tile)
    rows = min(sources, max(1, tile // columns))
    across, down = -(-targets // columns), -(-sources // rows)
    source, target = jnp.asarray(block.source, jnp.int32), jnp.asarray(block.target, jnp.int32)
    states = history.shape[0]
    whole = history.reshape(states, *seen.shape)
    # Axes of a slice [T, *roles] to [s, d, k, T], those that are missing at the end and then in their places.
    order = [1 + seen.roles.index(r) for r in "sdk" if r in seen.roles] + [0]
    shape = (rows if "s" in sizes else 1, columns if "d" in sizes else 1, taps, states)
    back = [int(i) for i in np.argsort(order)]
    span = {"s": rows, "d": columns, "k": taps}

    def step(i: Any, carry: Any) -> Any:
        r, c = i // across * rows, i % across * columns
        # The last tile is as large as the others and reaches back; what was counted before is masked.
        r0, c0 = jnp.minimum(r, sources - rows), jnp.minimum(c, targets - columns)
        fresh = ((r0 + jnp.arange(rows) >= r)[:, None] & (c0 + jnp.arange(columns) >= c)[None])[..., None]
        first = {"s": r0, "d": c0, "k": 0}
        start = [a + first[role] for a, role in zip(seen.starts, seen.roles, strict=True)]
        part = jax.lax.dynamic_slice(whole, [0, *start], [states, *(span[role] for role in seen.roles)])
        features = N.scale(jnp.transpose(part, order).reshape(shape), *scales).reshape(*shape[:2], -1)
        s = jax.lax.dynamic_slice_in_dim(source, r0, rows)
        t = jax.lax.dynamic_slice_in_dim(target, c0, columns)

        def collect(total: jax.Array, m: jax.Array) -> jax.Array:
            m = jnp.broadcast_to(m, (rows, columns, m.shape[-1]))
            return total.at[t].add(jnp.sum(jnp.where(fresh, m, 0.0), 0))

        def write(outputs: Any, changes: jax.Array) -> Any:
            small, large = outputs
            out = large[leaf]
            heads = out.shape[0]
            kept = [n for n, role in zip(shape[:3], "sdk", strict=True) if role in seen.roles]
            part = jnp.transpose(changes.reshape(*kept, heads), back)
            flat = jax.lax.dynamic_update_slice(out.reshape(heads, *seen.shape), part, [0, *start])
            return small, {**large, leaf: flat.reshape(out.shape)}

        return f(carry, Tile(features, block.kind, lambda x: x[s][:, None], lambda x: x[t][None], collect, write))

    return jax.lax.fori_loop(0, down * across, step, carry)


def wnn_changes(
    network: N.Network,
    kinds: Sequence[Any],
    history: Sequence[jax.Array],
    scales: Sequence[tuple[jax.Array, jax.Array]],
    at: jax.Array,
    *,
    tile: int | None = None,
) -> list[jax.Array]:
    """[heads, *shape] scaled changes of each leaf by a "wnn"; kinds: a type a leaf, or an array of them."""
    tile = tile or TILE
    out: list[Any] = [None] * len(history)
    small = [i for i, h in enumerate(history) if h[0].size < SMALL]
    for some in [small] * bool(small) + [[i] for i in range(len(history)) if i not in set(small)]:
        sizes = [history[i][0].size for i in some]
        total, states = sum(sizes), history[0].shape[0]
        n = min(tile, total)
        one = len(some) == 1 and np.ndim(kinds[some[0]]) == 0
        kind = (
            None
            if one
            else np.concatenate([np.broadcast_to(np.ravel(kinds[i]), (m,)) for i, m in zip(some, sizes, strict=True)])
        )
        if len(some) == 1:
            joined, scaled = history[some[0]].reshape(states, -1), False
        else:
            joined = jnp.concatenate([N.scale(history[i], *scales[i]).reshape(states, -1) for i in some], 1)
            scaled = True

        def step(j: Any, done: jax.Array, *, n=n, total=total, kind=kind, joined=joined, scaled=scaled, some=some):
            start = jnp.minimum(j * n, total - n)
            x = jax.lax.dynamic_slice_in_dim(joined, start, n, axis=1)
            x = (x if scaled else N.scale(x, *scales[some[0]])).T
            k = kinds[some[0]] if kind is None else jax.lax.dynamic_slice_in_dim(jnp.asarray(kind, jnp.int8), start, n)
            return jax.lax.dynamic_update_slice_in_dim(done, N.apply_wnn(network.theta, x, k, at).T, start, axis=1)

        done = jax.lax.fori_loop(0, -(-total // n), step, jnp.zeros((at.shape[0], total)))
        for i, end in zip(some, np.cumsum(sizes), strict=True):
            out[i] = done[:, end - history[i][0].size : end].reshape(at.shape[0], *history[i].shape[1:])
    return out
