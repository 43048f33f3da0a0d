"""Meta-validation: whole inner runs under one theta on tasks that are not in the mixture, in one jitted program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lopt.console import compiler_options
from meta_train.estimators import unroll
from meta_train.inner import Inner


class Best(NamedTuple):
    """The theta that did best so far."""

    theta: Any
    score: Any  # () its weighted mean meta-loss over the tasks; inf before the first meta-validation
    step: Any  # () int32, meta-steps that made it


def nothing_yet(theta: Any) -> Best:
    """Before the first meta-validation."""
    return Best(theta, jnp.full((), jnp.inf), jnp.zeros((), jnp.int32))


def make(
    inner: Callable[[int, Any], Inner],
    data: Sequence[Any],
    *,
    weights: Sequence[float],
    seeds: int,
    key: jax.Array,
    mesh: Mesh,
) -> Callable[[Any, Best, Any], tuple[Best, dict[str, jax.Array]]]:
    """Build `judge(theta, best, step) -> (best, scores by name)`.

    Runs are spread over the devices, a task's seeds rounded up to a multiple of them; those too many do not count. All
    judgements draw the same tasks, inits and batches.

    Args:
      inner: of a task's number and its data.
      data: of the tasks, on every device of the mesh.
      weights: of the tasks in the score, summing to 1.
      seeds: inner runs a task.
      key: of all draws.
      mesh: one axis.
    """
    (axis,) = mesh.axis_names
    each = -(-seeds // mesh.size)

    def runs(data, theta, index):
        """Score summed over a device's runs, and those that diverged; [tasks]."""
        counts = index < seeds
        sums = []
        for i, one in enumerate(data):
            reset_keys, step_keys = unroll.split(unroll.fold(jax.random.fold_in(key, i), index), 2)
            task = inner(i, one)
            seen = unroll.episode(
                task,
                unroll.unperturbed(theta, each),
                unroll.reset(task, reset_keys, 1),
                step_keys,
                score=lambda loss: loss[:, 0],
            )
            sums.append((jnp.where(counts, seen.score, 0.0).sum(), jnp.where(counts, seen.diverged, 0).sum()))
        loss, diverged = (jnp.stack(x) for x in zip(*sums, strict=True))
        return jax.lax.psum((loss, diverged), axis)

    @partial(
        jax.jit,
        out_shardings=NamedSharding(mesh, PartitionSpec()),
        compiler_options=compiler_options(devices=len(mesh.local_devices)),
    )
    def judge(data, theta, best: Best, step):
        everywhere = PartitionSpec()
        spread = jax.shard_map(
            runs,
            mesh=mesh,
            in_specs=(everywhere, everywhere, PartitionSpec(axis)),
            out_specs=everywhere,
            check_vma=False,
        )
        loss, diverged = spread(data, theta, jnp.arange(each * mesh.size))
        losses = loss / seeds
        score = jnp.dot(losses, jnp.asarray(weights))
        better = score < best.score
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), Best(theta, score, step), best)
        found = {
            "validation": score,
            "validation_diverged": diverged.sum(),
            "best_validation": best.score,
            "best_step": best.step,
        }
        return best, found | {f"validation/{i}": losses[i] for i in range(len(weights))}

    return partial(judge, tuple(data))
