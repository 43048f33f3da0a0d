"""Groups that some processes hold and others do not: who holds what, and how particles move between host and devices.

A process compiles and runs the programs of its own groups on its own devices. Once a meta-step all processes meet: each
brings the weighted gradients of its groups, and one all-reduce adds them up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from meta_train import config as cfg
from meta_train import distributed


class Placement(NamedTuple):
    """Who holds what."""

    holders: tuple[tuple[int, ...], ...]  # of each group, its processes
    process: int  # this one's number
    pairs: int  # of each group

    @property
    def here(self) -> tuple[int, ...]:
        """Groups that this process holds."""
        return tuple(i for i, held in enumerate(self.holders) if self.process in held)

    def alone(self, group: int) -> bool:
        """Whether one process holds all of a group."""
        return len(self.holders[group]) == 1

    def share(self, group: int) -> int:
        """Pairs of a group that each of its processes holds."""
        return self.pairs // len(self.holders[group])

    def rows(self, group: int) -> slice:
        """Of the group's particles, those that this process holds."""
        rank = self.holders[group].index(self.process)
        return slice(rank * self.share(group), (rank + 1) * self.share(group))

    def cut(self, states: Sequence[Any]) -> tuple[Any, ...]:
        """The particles held here, of whole states of all groups; () for the groups that are not."""
        held = (i in self.here for i in range(len(states)))
        return tuple(
            jax.tree.map(itemgetter(self.rows(i)), x) if h else ()
            for i, (x, h) in enumerate(zip(states, held, strict=True))
        )

    def only(self, per_group: Sequence[Any]) -> tuple[Any, ...]:
        """What belongs to the groups held here, () in the place of the others."""
        return tuple(x if i in self.here else () for i, x in enumerate(per_group))


class Share(NamedTuple):
    """What a device brings to the meeting; summed over all devices it is what the run's groups estimated."""

    grad: Any  # like theta, weighted, of the groups that one process holds alone
    apart: Any  # tuple, like theta, unweighted, of each group that several processes hold
    loss: jax.Array  # [G]
    norm: jax.Array  # [G] of the gradients of groups in `grad`
    counts: jax.Array  # [4, G] int32: diverged, resets, inner updates, particles without a gradient


def place(groups: Sequence[cfg.Group], pairs: int, processes: int, process: int, devices: int) -> Placement | None:
    """Who holds what, or None where every process holds every group.

    Args:
      groups: of the run.
      pairs: of each group.
      processes: how many there are.
      process: this one's number.
      devices: of each process.

    Raises:
      ValueError: for a process that there is not, one without a group, or pairs that do not divide over the devices.
    """
    for i, group in enumerate(groups):
        if missing := [p for p in group.processes if p >= processes]:
            raise ValueError(
                f"config.groups.{i}.processes, got {missing[0]}; valid: 0 to {processes - 1}, the processes of this "
                "run, or none for all of them. (A run goes on with other ones if its config.json is changed: where a "
                "group lives is no part of the result.)"
            )
    if processes == 1 or not any(group.processes for group in groups):
        return None
    holders = tuple(tuple(sorted(group.processes)) or tuple(range(processes)) for group in groups)
    for p in range(processes):
        if not any(p in held for held in holders):
            raise ValueError(f"config.groups: processes, got no group for process {p}; valid: one or more for each.")
    for i, held in enumerate(holders):
        if pairs % (len(held) * devices):
            raise ValueError(
                f"config.estimator.pairs, got {pairs}; valid: a multiple of {len(held) * devices}, the devices of the "
                f"processes that hold groups.{i}."
            )
    return Placement(holders, process, pairs)


def equal_devices() -> int:
    """Devices of each process. Raises ValueError if they have not all the same number."""
    each = jax.local_device_count()
    if each * jax.process_count() != jax.device_count():
        raise ValueError(
            f"config.groups: processes, got {jax.device_count()} devices of {jax.process_count()} processes, {each} of "
            "them here; valid: processes with equally many devices, where groups are given to some."
        )
    return each


def meet(share: Share, weights: Sequence[float], placement: Placement, norm: Callable[[Any], jax.Array]) -> Any:
    """(gradient like theta, losses [G], norms [G], counts [4, G]) of the shares of all devices, on a leading axis."""
    whole = jax.tree.map(lambda x: x.sum(0), share)  # the only thing that crosses the network
    grad, norms = whole.grad, whole.norm
    spread = [i for i in range(len(placement.holders)) if not placement.alone(i)]
    for i, part in zip(spread, whole.apart, strict=True):
        grad = jax.tree.map(jnp.add, grad, jax.tree.map(partial(_scaled, weights[i]), part))
        norms = norms.at[i].set(norm(part))
    return grad, whole.loss, norms, whole.counts


def bring(
    estimates: dict[int, Any], theta: Any, weights: Sequence[float], placement: Placement, lead: jax.Array
) -> Share:
    """A device's share of what this process's groups estimated, with a leading axis of 1.

    Args:
      estimates: by group, the mean over the process's own devices.
      theta: whose shapes the gradients have.
      weights: of the groups.
      placement: who holds what.
      lead: () bool, whether this device speaks for its process; the others bring zeros.
    """
    zeros, count = jax.tree.map(jnp.zeros_like, theta), len(placement.holders)
    grad, apart = zeros, []
    loss, norm, counts = jnp.zeros(count), jnp.zeros(count), jnp.zeros((4, count), jnp.int32)
    for i, held in enumerate(placement.holders):
        found = estimates.get(i)
        if found is not None:
            loss = loss.at[i].set(found.loss / len(held))
            counts = counts.at[:, i].set(jnp.stack([found.diverged, found.resets, found.steps, found.lost]))
        if not placement.alone(i):
            # A group's mean is that of its processes' means: all of them hold as many particles.
            apart.append(zeros if found is None else jax.tree.map(partial(_scaled, 1 / len(held)), found.grad))
        elif found is not None:
            grad = jax.tree.map(jnp.add, grad, jax.tree.map(partial(_scaled, weights[i]), found.grad))
            norm = norm.at[i].set(found.norm)
    share = Share(grad, tuple(apart), loss, norm, counts)
    return jax.tree.map(lambda x: jnp.where(lead, x, jnp.zeros_like(x))[None], share)


def _scaled(factor: float, x: jax.Array) -> jax.Array:
    return factor * x


def of_all(tree: Any, mesh: Mesh, axis: str) -> Any:
    """Arrays [local devices, ...] of each process as arrays [all devices, ...] of all, without a copy."""
    sharding = NamedSharding(mesh, PartitionSpec(axis))

    def join(x: jax.Array) -> jax.Array:
        shards = [shard.data for shard in x.addressable_shards]
        return jax.make_array_from_single_device_arrays((mesh.size, *x.shape[1:]), sharding, shards)

    return jax.tree.map(join, tree)


def of_this(tree: Any, mesh: Mesh) -> Any:
    """Arrays that every device has as arrays that every device of this process has, without a copy."""
    sharding = NamedSharding(mesh, PartitionSpec())

    def cut(x: jax.Array) -> jax.Array:
        shards = [shard.data for shard in x.addressable_shards]
        return jax.make_array_from_single_device_arrays(x.shape, sharding, shards)

    return jax.tree.map(cut, tree)


def gather(states: Sequence[Any], shapes: Sequence[Any], placement: Placement) -> tuple[Any, ...]:
    """All groups' particles as numpy in the first process, None in the others; all processes must ask.

    Args:
      states: of the groups, those held here in their rows.
      shapes: of the groups' whole states.
      placement: who holds what.
    """
    whole = []
    for i, held in enumerate(placement.holders):
        size = placement.share(i)
        mine = jax.tree.map(lambda x, size=size: np.zeros((size, *x.shape[1:]), x.dtype), shapes[i])
        if i in placement.here:
            mine = jax.tree.map(np.asarray, jax.device_get(states[i]))

        def together(x: np.ndarray, held=held) -> np.ndarray | None:
            every = distributed.each(x)
            return np.concatenate([every[p] for p in held]) if distributed.first() else None

        whole.append(jax.tree.map(together, mine))
    return tuple(whole)


def usable_devices(pairs: int, available: int) -> int:
    """The largest number of devices over which the pairs divide evenly."""
    return next(n for n in range(min(pairs, available), 0, -1) if pairs % n == 0)
