"""Runs of an optimizer on a task with its validation loss beside, and how many steps they take to a loss.

The one file of nowcasts where networks meet tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import tasks
from lopt import nowcast
from lopt.console import compiler_options
from meta_train.nowcast_config import Nowcasting

if TYPE_CHECKING:
    from jaxtyping import Float

SMOOTH = 5  # evaluations, of whose losses the median counts
NEVER, FARTHEST = 1.5, 10.0  # for `over`, so that of two networks that ruin a run the better one is told
ROWS = 2048  # of a fixed evaluation set, at most

# (params, loss_fn, theta) -> transform; loss_fn: params -> loss on one validation batch, for guards
Make = Callable[[Any, Callable[[Any], Any], Any], optax.GradientTransformation]


class Run(NamedTuple):
    """What was seen of an inner run."""

    losses: Any  # [evaluations] of the evaluated split
    counts: Any  # of the guard, or ()


def evaluation(task: tasks.Task, key: Any, phi: Any, data: Any, split: tasks.Split, rows: int = ROWS) -> Any:
    """Batches with a leading axis that a run is judged on: the task's fixed ones where it has them, or 16 drawn."""
    if task.eval_batches is not None and (fixed := task.eval_batches(phi, data, split)) is not None:
        count, size = jax.tree.leaves(fixed)[0].shape[:2]
        return jax.tree.map(lambda x: x[: max(1, min(count, rows // max(size, 1)))], fixed)
    return jax.vmap(lambda k: task.batch(k, phi, data, split))(jax.random.split(key, 16))


def runner(
    task: tasks.Task,
    make: Make,
    *,
    steps: int,
    every: int,
    splits: Sequence[tasks.Split] = ("validation",),
    rows: int = ROWS,
) -> Callable[..., Any]:
    """`run(data, theta, seed) -> Run` of losses [splits, steps // every], jitted; a seed says init and batches.

    The guard's batch is one of 256 validation rows or fewer that the seed draws, apart from what is evaluated where
    the evaluation is on another split.
    """

    @partial(jax.jit, compiler_options=compiler_options())
    def run(data: Any, theta: Any, seed: Any) -> Run:
        keys = jax.random.split(jax.random.key(seed), 5)
        phi = task.sample(keys[0])
        params = task.init(keys[1], phi)
        some = jax.vmap(lambda key: task.batch(key, phi, data, "validation"))(jax.random.split(keys[2], 4))
        final = [evaluation(task, keys[3], phi, data, split, rows) for split in splits]

        def mean(batches: Any, params: Any) -> Any:
            return jnp.mean(jax.lax.map(lambda batch: task.loss(params, keys[4], phi, batch), batches))

        tx = optax.with_extra_args_support(make(params, partial(mean, some), theta))

        def step(carry: Any, t: Any) -> Any:
            params, state = carry
            batch_key, loss_key = jax.random.split(jax.random.fold_in(keys[4], t))
            batch = task.batch(batch_key, phi, data, "train")
            value, grads = jax.value_and_grad(task.loss)(params, loss_key, phi, batch)
            updates, state = tx.update(grads, state, params, value=value)
            return (optax.apply_updates(params, updates), state), None

        def piece(carry: Any, start: Any) -> Any:
            carry, _ = jax.lax.scan(step, carry, start + jnp.arange(every))
            return carry, jnp.stack([mean(batches, carry[0]) for batches in final])

        (_, state), losses = jax.lax.scan(piece, (params, tx.init(params)), jnp.arange(0, steps, every))
        return Run(losses.T, getattr(state, "counts", ()))

    return run


def smoothed(losses: Float[np.ndarray, "E"]) -> np.ndarray:
    """[E] median of the last SMOOTH values up to each; of fewer at the beginning.

    >>> smoothed(np.array([3.0, 1.0, 2.0])).tolist()
    [3.0, 2.0, 2.0]
    """
    x = np.nan_to_num(np.asarray(losses, np.float64), nan=np.inf, posinf=np.inf)
    return np.array([np.median(x[max(0, i + 1 - SMOOTH) : i + 1]) for i in range(len(x))])


def steps_to(losses: Float[np.ndarray, "E"], target: float, every: int) -> float:
    """Inner steps until the smoothed loss is at most the target; inf if it never is.

    >>> steps_to(np.array([3.0, 1.0, 1.0, 1.0]), 1.5, 10), steps_to(np.array([3.0]), 1.5, 10)
    (30.0, inf)
    """
    hit = np.flatnonzero(smoothed(losses) <= target)
    return float(every * (hit[0] + 1)) if hit.size else float("inf")


def over(losses: Float[np.ndarray, "E"], target: float, steps: float, every: int) -> float:
    """Steps to a target over another run's; of one that never gets there NEVER of its length times how far above it is.

    >>> over(np.array([3.0, 1.0, 1.0]), 2.0, 40.0, 20), over(np.array([3.0, 3.0]), 2.0, 40.0, 20)
    (1.0, 2.25)
    """
    got = steps_to(losses, target, every)
    if np.isfinite(got):
        return got / steps
    above = smoothed(losses)[-1] / target if target > 0 else 1.0
    return NEVER * every * len(losses) / steps * float(np.clip(above, 1.0, FARTHEST))


def validator(run: Nowcasting) -> Callable[[str, Any], float] | None:
    """`score(network, theta)`: mean over tasks and seeds of steps with nowcasts over Adam's, to Adam's last loss.

    None if the run has no tasks of validation. Adam's own runs are made at the first call.
    """
    on = run.validation
    if not on.tasks:
        return None
    from meta_train import nowcast_training

    made = nowcast_training.networks(run)
    problems = [(tasks.make(p.family, **p.settings), p.lr, p.heads or None) for p in on.tasks]
    runs: dict[tuple[int, str], Any] = {}
    base: dict[tuple[int, int], tuple[float, float]] = {}

    def transform(name: str, lr: float, heads: int | None, params: Any, loss_fn: Any, theta: Any) -> Any:
        adam = optax.adam(lr)
        if not name:
            return adam
        how: dict[str, Any] = dict(
            max_steps=on.inner_steps, period=on.period, context=run.context, guard=on.guard, loss_fn=loss_fn
        )
        how |= dict(network=made[name]._replace(theta=theta))
        if name == "wnn":
            return nowcast.wnn(adam, **how)
        return nowcast.nino(adam, graph=lambda p: nowcast.recognise(p, heads=heads), **how)

    def losses(i: int, name: str, theta: Any, seed: int) -> np.ndarray:
        task, lr, heads = problems[i]
        if (i, name) not in runs:
            make = partial(transform, name, lr, heads)
            runs[i, name] = runner(task, make, steps=on.inner_steps, every=on.evaluate)
        return np.asarray(runs[i, name](task.data, theta, 1000 + seed).losses[0])

    def score(name: str, theta: Any) -> float:
        ratios = []
        for i in range(len(problems)):
            for seed in range(on.seeds):
                if (i, seed) not in base:
                    alone = losses(i, "", (), seed)
                    target = float(smoothed(alone)[-1])
                    base[i, seed] = target, steps_to(alone, target, on.evaluate)
                target, steps = base[i, seed]
                ratios.append(over(losses(i, name, theta, seed), target, steps, on.evaluate))
        return float(np.mean(ratios))

    return score
