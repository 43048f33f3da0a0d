"""Parameters on a mesh with explicit axes, which is what `jax.make_mesh` gives unless it is told otherwise.

There every operation must say how its result is sharded. A rule does not: it runs with automatic axes, and what comes
out is sharded as the parameters are, state included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def mesh_of(tree: Any) -> Any | None:
    """The abstract mesh of the first array with explicit axes, or None."""
    for x in jax.tree.leaves(tree):
        mesh = getattr(getattr(jax.typeof(x), "sharding", None), "mesh", None)
        if mesh is not None and not mesh.empty and AxisType.Explicit in mesh.axis_types:
            return mesh
    return None


def shardings(mesh: Any, params: Any, tree: Any) -> Any:
    """Of a tree like `tree` whose tensors are like the parameters where their names are, replicated elsewhere.

    Args:
      mesh: of the parameters.
      params: as they came.
      tree: a tree like params whose leaves are trees of arrays: a trailing axis as long as the parameter's is sharded
        as that is, any other is not.
    """
    p_leaves, treedef = jax.tree.flatten(params)

    def like(p: Any) -> Callable[[Any], NamedSharding]:
        shape, spec = jax.numpy.shape(p), tuple(jax.typeof(p).sharding.spec)

        def of(x: Any) -> NamedSharding:
            extra = jax.numpy.ndim(x) - len(shape)
            if extra < 0 or not shape:
                return NamedSharding(mesh, PartitionSpec())
            same = (axis if n == m else None for axis, n, m in zip(spec, shape, x.shape[extra:], strict=True))
            return NamedSharding(mesh, PartitionSpec(*(None,) * extra, *same))

        return of

    parts = [jax.tree.map(like(p), part) for p, part in zip(p_leaves, treedef.flatten_up_to(tree), strict=True)]
    return treedef.unflatten(parts)


def replicated(mesh: Any, tree: Any) -> Any:
    return jax.tree.map(lambda x: NamedSharding(mesh, PartitionSpec()), tree)


def without_sharding(tree: Any) -> Any:
    """Shapes and types alone."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(jax.numpy.shape(x), jax.numpy.result_type(x)), tree)
