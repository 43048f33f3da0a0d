"""Graph convolutional networks that label nodes. Source: Kipf & Welling (2017), arXiv:1609.02907.

The karate club: Zachary (1977), "An information flow model for conflict and fission in small groups", Journal of
Anthropological Research 33; the friendships of 34 members and which of two clubs each joined.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tasks.base import Source, Split, Task
from tasks.space import CLASSIFICATION, INIT, Choice, LogInt, Widths
from tasks.supervised import CLASSIFICATION_LOSSES, activation_named, init_layers, require_positive, split_index

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int, PRNGKeyArray

    from tasks.supervised import Params

SPACE = {
    "graph": Choice(("karate_club", "block_model")),
    "hidden": Widths(1, 3, 8, 64),
    "activation": Choice(("relu", "tanh", "silu")),
    "batch_size": LogInt(8, 64),
    "log10_init_scale": INIT,
    "loss": CLASSIFICATION,
}
# Node: its friends of higher number.
KARATE = """
0: 1 2 3 4 5 6 7 8 10 11 12 13 17 19 21 31; 1: 2 3 7 13 17 19 21 30; 2: 3 7 8 9 13 27 28 32; 3: 7 12 13; 4: 6 10;
5: 6 10 16; 6: 16; 8: 30 32 33; 9: 33; 13: 33; 14: 32 33; 15: 32 33; 18: 32 33; 19: 33; 20: 32 33; 22: 32 33;
23: 25 27 29 32 33; 24: 25 27 31; 25: 31; 26: 29 33; 27: 33; 28: 31 33; 29: 32 33; 30: 32 33; 31: 32 33; 32: 33
"""
OFFICER = "0000000001000011001010111111111111"  # who joined the officer's club
BLOCKS, BLOCK, WITHIN, BETWEEN, FEATURES = 4, 40, 0.12, 0.02, 16  # of the block model


class Graph(NamedTuple):
    """A whole graph, in numpy's or JAX's arrays."""

    mix: Any  # [N, N] D^-1/2 (A + I) D^-1/2
    features: Any  # [N, F]
    label: Any  # [N] int32
    order: Any  # [N] int32, nodes, those of train, validation and test in turn


class Batch(NamedTuple):
    """The graph and the nodes the loss is taken at."""

    graph: Graph
    node: Int[Array, " B"]


class Phi(NamedTuple):
    """Task parameters."""

    scale: Float[Array, " L"]  # multiplies weight matrix l at init


@lru_cache
def load(name: str) -> tuple[Graph, int, tuple[int, ...], Source]:
    """A graph, its number of classes, where its splits begin and end in `order`, and its source.

    karate_club: 2 classes, features are who the node is. block_model: 4 communities of 40 nodes, 12 % of the pairs
    within and 2 % of those between are linked, features are uniform, of variance 1, about one of 4 unit vectors (by
    seed 0).
    """
    if name == "karate_club":
        label = np.array([int(one) for one in OFFICER])
        adjacency = np.zeros((34, 34))
        for line in KARATE.replace("\n", " ").split(";"):
            node, friends = line.split(":")
            adjacency[int(node), [int(one) for one in friends.split()]] = 1
        features, stops = np.eye(34), (0, 14, 24, 34)
    else:
        rng = np.random.default_rng(0)
        label = np.repeat(np.arange(BLOCKS), BLOCK)
        chance = np.where(label[:, None] == label[None], WITHIN, BETWEEN)
        adjacency = np.triu(rng.random(chance.shape) < chance, 1).astype(float)
        # Uniform numbers of variance 1: their stream is the same in every version of numpy.
        features = np.eye(BLOCKS, FEATURES)[label] + math.sqrt(12) * (rng.random((len(label), FEATURES)) - 0.5)
        stops = (0, 80, 120, 160)
    linked = adjacency + adjacency.T + np.eye(len(label))
    degree = linked.sum(0) ** -0.5
    # Ordered by random numbers, not by rng.permutation, for the same reason.
    order = np.argsort(np.random.default_rng(1).random(len(label)))
    mix = (degree[:, None] * linked * degree).astype(np.float32)
    rest = features.astype(np.float32), label.astype(np.int32), order.astype(np.int32)
    digest = hashlib.sha256(b"".join(x.tobytes() for x in (linked.astype(np.int8), *rest)))
    return Graph(mix, *rest), int(label.max()) + 1, stops, Source(name, digest.hexdigest())


def graph_network(
    *,
    graph: str = "block_model",
    hidden: Sequence[int] = (16,),
    activation: str = "relu",
    batch_size: int = 32,
    log10_init_scale: float = 0.0,
    loss: str = "cross_entropy",
) -> Task:
    """Classification of nodes whose labels are known for a part: the graph is whole, the splits are of nodes.

    Args:
      graph: karate_club or block_model, see `load`.
      hidden: widths of the graph convolutions before the last, 1 or more.
      activation: relu (He init), gelu, silu or tanh (LeCun init).
      batch_size: B nodes of the split, drawn with replacement.
      log10_init_scale: each weight matrix is multiplied at init by 10**u, u uniform in ± this.
      loss: cross_entropy in nats, or squared: the squared distance of logits and one-hot labels.

    Raises ValueError for an invalid setting, naming the valid ones.
    """
    if graph not in ("karate_club", "block_model"):
        raise ValueError(f"graph_network: graph, got {graph!r}; valid: karate_club, block_model.")
    require_positive("graph_network", "hidden", hidden, least=1)
    require_positive("graph_network", "batch_size", [batch_size])
    if not 0.0 <= log10_init_scale < math.inf:
        raise ValueError(f"graph_network: log10_init_scale, got {log10_init_scale}; valid: a finite number ≥ 0.")
    if loss not in CLASSIFICATION_LOSSES:
        raise ValueError(f"graph_network: loss, got {loss!r}; valid: {', '.join(CLASSIFICATION_LOSSES)}.")
    activate, gain = activation_named("graph_network", activation)
    held, classes, stops, source = load(graph)
    widths = (held.features.shape[1], *hidden, classes)
    shapes = list(itertools.pairwise(widths))

    def sample(key: PRNGKeyArray) -> Phi:
        exponent = jax.random.uniform(key, (len(shapes),), minval=-log10_init_scale, maxval=log10_init_scale)
        return Phi(10.0**exponent)

    def batch(key: PRNGKeyArray, phi: Phi, data: Graph, split: Split) -> Batch:
        index = split_index(split)
        return Batch(data, data.order[jax.random.randint(key, (batch_size,), stops[index], stops[index + 1])])

    def eval_batches(phi: Phi, data: Graph, split: Split) -> Batch:
        index = split_index(split)
        return jax.tree.map(lambda x: x[None], Batch(data, data.order[stops[index] : stops[index + 1]]))

    def logits(params: Params, batch: Batch) -> Float[Array, "B C"]:
        x = batch.graph.features
        for index in range(len(shapes)):
            layer = params[f"layer{index}"]
            x = batch.graph.mix @ (x @ layer["w"]) + layer["b"][None]
            x = activate(x) if index + 1 < len(shapes) else x
        return x[batch.node]

    def objective(params: Params, key: PRNGKeyArray, phi: Phi, batch: Batch) -> Float[Array, ""]:
        return CLASSIFICATION_LOSSES[loss](logits(params, batch), batch.graph.label[batch.node])

    def metrics(params: Params, key: PRNGKeyArray, phi: Phi, batch: Batch) -> dict[str, Array]:
        return {"accuracy": jnp.mean(jnp.argmax(logits(params, batch), axis=-1) == batch.graph.label[batch.node])}

    other = "" if loss == "cross_entropy" else f", {loss} loss"
    spread = f", init 10^±{log10_init_scale:g}" if log10_init_scale else ""
    return Task(
        data=jax.tree.map(jnp.asarray, held),
        sample=sample,
        init=lambda key, phi: init_layers(key, shapes, phi.scale, gain),
        batch=batch,
        loss=objective,
        metrics=metrics,
        eval_batches=eval_batches,
        name=f"graph_network({graph}, {'-'.join(map(str, hidden))}, {activation}, batch {batch_size}{other}{spread})",
        provenance=(source,),
        init_loss=None if log10_init_scale or loss != "cross_entropy" else math.log(classes),
    )
