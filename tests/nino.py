"""NiNo's recordings: graphs compared up to the numbering of neurons, predictions, and the 30-call loop."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lopt import nowcast
from lopt.nowcast import network as N
from lopt.nowcast import predict

FIXTURE = Path(__file__).parent / "fixtures/nino.npz"
CASES = ("mlp_digits", "cnn_digits", "gpt2_tiny", "llama_gqa_tiny", "nanogpt_tiny")
WEIGHTS = ("nino_no_posw", "nino_mlp", "nino_mlp_h32")
TOLERANCE = 5e-6


def fixture() -> dict[str, np.ndarray]:
    with np.load(FIXTURE) as z:
        return {k: z[k] for k in z.files}


def leaves(z) -> list[tuple[str, tuple[int, ...]]]:
    return [(str(n), tuple(json.loads(str(s)))) for n, s in zip(z["param_names"], z["param_shapes"], strict=True)]


def predictions(network, z, horizons, *, positions=None, small=None, tile=500) -> np.ndarray:
    """[K, P] predicted parameters, in the order of the recording's flat vector."""
    named = leaves(z)
    bounds = np.cumsum([0, *(int(np.prod(s)) for _, s in named)])
    paths = [f"{i:03d}" for i in range(len(named))]
    shapes = [s for _, s in named]
    history = [
        jnp.asarray(z["states"][a:b].T.reshape(5, *s)) for a, b, s in zip(bounds[:-1], bounds[1:], shapes, strict=True)
    ]
    index, types = z["edge_param_index"], z["edge_type"]

    @jax.jit
    def run(history, at):
        scales = [N.statistics(h) for h in history]
        if network.name == "gnn":
            given = list(zip(paths, shapes, strict=True))
            graph = nowcast.Graph.from_arrays(z["edge_index"], types, index, int(z["num_nodes"]), given)
            layout = predict.plan(graph, {p: np.zeros(s) for p, s in given}, paths, taps=9, small=small)
            changes = predict.gnn_changes(network, layout, history, scales, at, positions, tile=tile)
        else:
            kind = np.zeros(bounds[-1], np.int8)
            for tap in index.T:
                kind[tap[tap >= 0]] = types[tap >= 0]
            kinds = [kind[a:b].reshape(s) for a, b, s in zip(bounds[:-1], bounds[1:], shapes, strict=True)]
            changes = predict.wnn_changes(network, kinds, history, scales, at, tile=tile)
        moved = [h[-1:] + N.moved(h[-1], c, *s) for h, c, s in zip(history, changes, scales, strict=True)]
        return jnp.concatenate([x.reshape(len(horizons), -1) for x in moved], 1)

    return np.asarray(run(history, jnp.asarray(horizons)))


def horizons(z, weights: str) -> list[int]:
    return sorted(int(k.rsplit("_k", 1)[1]) for k in z if k.startswith(f"pred_{weights}_k"))


def mismatch(graph: nowcast.Graph, params, places, z) -> str | None:
    """What a graph has otherwise than the recording, up to the numbering of neurons.

    Args:
      graph: ours.
      params: our leaves.
      places: like params, the place of each element in the recording's flat vector.
    """
    blocks, missing = graph.fitted(params)
    if missing:
        return f"no edges of {missing}"
    flat = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(x).reshape(-1)
        for path, x in jax.tree_util.tree_leaves_with_path(places)
    }
    ours = []  # (type, place of the first tap or -1, source, target)
    for block in blocks:
        index = block.places()
        first = flat[block.leaf][index[:, 0]] if block.leaf else np.full(block.edges, -1)
        taps = (index >= 0).sum(1)
        ours.append(np.stack([np.full(block.edges, block.kind), first, taps, *block.ends()], 1))
    ours = np.concatenate(ours)
    keep = z["edge_type"] != N.SELF
    theirs = np.stack(
        [z["edge_type"], z["edge_param_index"][:, 0], (z["edge_param_index"] >= 0).sum(1), *z["edge_index"]], 1
    )[keep].astype(int)
    if len(ours) != len(theirs) or graph.count != int(z["num_nodes"]):
        return f"{len(ours)} edges, {graph.count} neurons; recorded {len(theirs)}, {int(z['num_nodes'])}"
    mine, held = ours[ours[:, 1] >= 0], theirs[theirs[:, 1] >= 0]
    mine, held = mine[np.argsort(mine[:, 1])], held[np.argsort(held[:, 1])]
    if not np.array_equal(mine[:, :3], held[:, :3]):
        return "another type or other taps of a weight"
    to = np.full(graph.count, -1)  # our number -> theirs
    for column in (3, 4):
        to[mine[:, column]] = held[:, column]
    if any((to[mine[:, column]] != held[:, column]).any() for column in (3, 4)):
        return "two weights meet in a neuron of ours, and not in one of theirs"
    if len(set(to[to >= 0])) != (to >= 0).sum():
        return "two neurons of ours are one of theirs"
    rest, other = ours[ours[:, 1] < 0], theirs[theirs[:, 1] < 0]
    # Neurons of heads meet no weight: they are told apart by where they lead.
    named = np.where(to < 0, -1, to)
    a = sorted((k, named[s], named[t]) for k, _, _, s, t in rest)
    known = set(to[to >= 0].tolist())
    b = sorted((k, s if s in known else -1, t) for k, _, _, s, t in other.tolist())
    if a != b:
        return "other edges without weight"

    def leads(rows, name):
        out: dict[int, list[int]] = {}
        for _, _, _, s, t in rows:
            if name(s) < 0:
                out.setdefault(s, []).append(name(t))
        return sorted(sorted(x) for x in out.values())

    same = leads(rest, lambda i: named[i]) == leads(other.tolist(), lambda i: i if i in known else -1)
    return None if same else "other neurons of heads"


def loop(shared: Path, weights: str, **changed) -> tuple[np.ndarray, np.ndarray]:
    """Our parameters after the recorded calls, and the recorded ones."""
    with np.load(shared / "parity/nino/loop_mlp.npz") as z:
        z = dict(z)
    network = nowcast.read(shared / f"weights/nino/{weights}.npz")
    graph, sizes, x = nowcast.Graph(), (64, 12, 8, 10), None
    x = graph.stream("input", 64)
    for i, n in enumerate(sizes[1:]):
        x = graph.dense(f"w{i}", x, n, bias=f"b{i}")
    settings = {"network": network, "max_steps": 30, "period": 10, "guard": False} | changed
    base = optax.adamw(3e-3, weight_decay=1e-2)
    if network.name == "gnn":
        tx = nowcast.nino(base, graph=graph, positions=z["pos"], **settings)
    else:
        tx = nowcast.wnn(base, **settings)
    params, start = {}, 0
    for i, (a, b) in enumerate(itertools.pairwise(sizes)):
        params[f"w{i}"] = jnp.asarray(z["init"][start : start + a * b].reshape(b, a).T)
        params[f"b{i}"] = jnp.asarray(z["init"][start + a * b : start + a * b + b])
        start += a * b + b

    def loss(params, x, y):
        for i in range(3):
            x = x @ params[f"w{i}"] + params[f"b{i}"][None]
            x = jax.nn.relu(x) if i < 2 else x
        return optax.softmax_cross_entropy_with_integer_labels(x, y).mean()

    def step(carry, rows):
        params, state = carry
        grads = jax.grad(loss)(params, jnp.asarray(z["X"])[rows], jnp.asarray(z["Y"])[rows])
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), jnp.concatenate(
            [x for i in range(3) for x in (params[f"w{i}"].T.ravel(), params[f"b{i}"])]
        )

    _, ours = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), jnp.asarray(z["batch_idx"])))(params)
    return np.asarray(ours)[z["traj_steps"]], z[f"traj_{weights}"]
