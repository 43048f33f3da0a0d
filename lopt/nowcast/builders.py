"""Graphs of parameter trees that name their layers as flax Linen, NNX, haiku or lopt's tasks do.

A tree says names and shapes and not how layers are called. What is inferred from these is stated at each function;
where they leave a doubt the layer is left out or an error says so, and `Graph` describes what cannot be recognised.
"""

from __future__ import annotations

from typing import Any

from lopt.nowcast.chains import chain
from lopt.nowcast.graph import Graph
from lopt.nowcast.modules import is_named, parse
from lopt.nowcast.transformers import FUSED, QUERY, transformer


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
    if any(m.kernel and is_named(m, (*QUERY, *FUSED)) for m in modules):
        return transformer(modules, heads=heads)
    return chain(modules)
