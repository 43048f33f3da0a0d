"""An update of sharded parameters in which nothing as large as they are crosses the network.

Each device updates its part of every tensor under `jax.shard_map`; means over a tensor are means of the parts' means,
and only they are exchanged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lopt.base import unknown


def flat_specs(where: str, mesh: Any, specs: Any, params: Any) -> list[PartitionSpec]:
    """One a leaf of the parameters.

    Args:
      where: for messages.
      mesh: `jax.sharding.Mesh`.
      specs: tree like params of `PartitionSpec`s, None for replicated.
      params: the parameters.

    Raises:
      ValueError: if the trees, the names of axes or the lengths do not go together.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    flat, given = jax.tree.flatten(specs, is_leaf=lambda x: x is None or isinstance(x, PartitionSpec))
    if given != treedef:
        raise ValueError(f"{where}: specs, got {given}; valid: a tree like the parameters, {treedef}.")
    for (path, p), spec in zip(leaves, flat, strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if len(spec or ()) > jax.numpy.ndim(p):
            raise ValueError(f"{where}: specs of {name!r}, got {spec}; valid: at most {jax.numpy.ndim(p)} axes.")
        for axis, n in zip(names(spec, jax.numpy.ndim(p)), jax.numpy.shape(p), strict=True):
            for one in set(axis) - set(mesh.axis_names):
                raise unknown(f"{where}: specs of {name!r}", "mesh axis", one, mesh.axis_names)
            parts = math.prod(mesh.shape[one] for one in axis)
            if n % parts:
                raise ValueError(f"{where}: specs of {name!r}, {n} in {parts} parts; valid: a divisor of {n}.")
    return [PartitionSpec() if spec is None else spec for spec in flat]


def names(spec: Iterable[Any] | None, rank: int) -> tuple[tuple[str, ...], ...]:
    """The mesh axes that each of `rank` axes is sharded over."""
    full = [*(spec or ()), *[None] * rank][:rank]
    return tuple(() if x is None else (x,) if isinstance(x, str) else tuple(x) for x in full)


def specs_like(specs: list[PartitionSpec], params: Any, tree: Any) -> Any:
    """Specs of a tree like params whose leaves are trees of arrays: of trailing axes as long as the parameter's."""
    p_leaves, treedef = jax.tree.flatten(params)

    def like(p: Any, spec: PartitionSpec) -> Callable[[Any], PartitionSpec]:
        shape = jax.numpy.shape(p)
        axes = names(spec, len(shape))

        def of(x: Any) -> PartitionSpec:
            extra = jax.numpy.ndim(x) - len(shape)
            if extra < 0 or not shape:
                return PartitionSpec()
            same = (axis if n == m else () for axis, n, m in zip(axes, shape, x.shape[extra:], strict=True))
            return PartitionSpec(*[None] * extra, *(axis or None for axis in same))

        return of

    parts = zip(p_leaves, specs, treedef.flatten_up_to(tree), strict=True)
    return treedef.unflatten([jax.tree.map(like(p, spec), part) for p, spec, part in parts])


def place(mesh: Mesh, specs: Any, tree: Any) -> Any:
    """The tree with these specs."""
    move = jax.sharding.reshard if AxisType.Explicit in mesh.axis_types else jax.lax.with_sharding_constraint
    return jax.tree.map(lambda x, spec: move(x, NamedSharding(mesh, spec)), tree, specs)


def replicated(tree: Any) -> Any:
    return jax.tree.map(lambda x: PartitionSpec(), tree)
