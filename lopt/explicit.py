"""Parameters on a mesh with explicit axes, which is what `jax.make_mesh` gives unless it is told otherwise.

There every operation must say how its result is sharded. A rule does not: it runs with automatic axes, and what comes
out is sharded as the parameters are, state included.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding

from lopt import sharded


def mesh_of(tree: Any) -> Any | None:
    """The abstract mesh of the first array with explicit axes, or None."""
    for x in jax.tree.leaves(tree):
        mesh = getattr(getattr(jax.typeof(x), "sharding", None), "mesh", None)
        if mesh is not None and not mesh.empty and AxisType.Explicit in mesh.axis_types:
            return mesh
    return None


def shardings(mesh: Any, params: Any, tree: Any) -> Any:
    """Of a tree like params whose leaves are trees of arrays, by `sharded.specs_like` and the parameters' own specs."""
    specs = [jax.typeof(p).sharding.spec for p in jax.tree.leaves(params)]
    return _named(mesh, sharded.specs_like(specs, params, tree))


def spec_of(x: Any) -> Any:
    """Its `PartitionSpec`, or None where no axis is explicit."""
    return None if mesh_of(x) is None else jax.typeof(x).sharding.spec


def replicated(mesh: Any, tree: Any) -> Any:
    return _named(mesh, sharded.replicated(tree))


def _named(mesh: Any, specs: Any) -> Any:
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def without_sharding(tree: Any) -> Any:
    """Shapes and types alone."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(jax.numpy.shape(x), jax.numpy.result_type(x)), tree)
