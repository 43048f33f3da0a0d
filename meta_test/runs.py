"""Run an optimizer on a task: seeds and hyper-parameters in one compiled call, spread over the devices.

The comparison is paired: data set, initial weights and the minibatch of every step depend on the seed (and the step)
alone, never on the optimizer, its hyper-parameters, the chunk or the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lopt.console import compiler_options
from tasks.base import Split, Task

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

    Hyper = Mapping[str, np.ndarray]  # name -> [R]

AXIS = "runs"
CURVES: tuple[Split, ...] = ("train", "validation")
EVALS = 50  # of each curve, besides the one at step 0
STREAM_BATCHES = 8  # that make the evaluation set of a task without a fixed one
# On a CPU runs share a core's caches: the small CNN takes 1.6 times as long a step in a batch of 38 as in one of 4.
CPU_BYTES = 32 * 2**20


class Contender(NamedTuple):
    """An optimizer to be run.

    Fields:
      name: for tables.
      make: `(shared, **hyper) -> optax transform`; hyper are traced scalars.
      shared: pytree that all runs share (theta), an argument of the compiled call: other weights do not recompile.
      needs: of "value_fn", "grad_fn", "hessian_diag": its update is then called with `value_fn(params) -> loss` and
        `grad_fn(params) -> gradients` on the same batch, and with a key; `value` all get.
      eval_params: `(optimizer's state, params) -> params` to evaluate, where these are others (averages).
    """

    name: str
    make: Callable[..., optax.GradientTransformation]
    shared: Any = ()
    needs: frozenset[str] = frozenset()
    eval_params: Callable[[Any, Any], Any] | None = None


class Curves(NamedTuple):
    """What R runs gave. Losses that are not finite are results like others."""

    steps: Int[np.ndarray, " E"]  # updates before each evaluation
    losses: dict[Split, Float[np.ndarray, "R E"]]  # on the fixed evaluation sets
    test: dict[str, Float[np.ndarray, "R X"]]  # "loss" and the task's metrics on the test set, at the exams


class Particle(NamedTuple):
    """One run."""

    phi: Any  # task parameters
    params: Any
    opt_state: Any
    grad_state: Any  # of the task's grad_transform, () without one


class Program(NamedTuple):
    """An optimizer on a task, compiled on first use.

    Fields:
      start: `(shared, hyper, seeds) -> particles`.
      advance: `(data, shared, t, stop, hyper, seeds, particles) -> (particles, losses by split)`; donates.
      examine: `(data, particles) -> loss and metrics` on the test set.
      data: of the task, on every device.
      shared: of the contender, on every device.
      place: puts a tree of arrays [C, …] on the devices.
      chunk: C, runs in a call.
    """

    start: Callable[..., Any]
    advance: Callable[..., Any]
    examine: Callable[..., Any]
    data: Any
    shared: Any
    place: Callable[[Any], Any]
    chunk: int


def eval_steps(num_steps: int) -> Int[np.ndarray, " E"]:
    """Steps 0 … T at which a run of `num_steps` is evaluated, half time among them."""
    half = num_steps // 2
    parts = (np.linspace(0, half, EVALS // 2 + 1), np.linspace(half, num_steps, EVALS // 2 + 1))
    return np.unique(np.rint(np.concatenate(parts)).astype(int))


def begin(task: Task, make: Callable[..., Any], shared: Any, hyper: Any, seed: Array) -> Particle:
    """A run at step 0."""
    key = jax.random.key(seed)
    phi = task.sample(jax.random.fold_in(key, 0))
    params = task.init(jax.random.fold_in(key, 1), phi)
    grad_state = task.grad_transform.init(params) if task.grad_transform else ()
    return Particle(phi, params, make(shared, **hyper).init(params), grad_state)


def step(
    task: Task, contender: Contender, data: Any, shared: Any, hyper: Any, seed: Array, t: Array, run: Particle
) -> Particle:
    """Update number t."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 2), t)
    batch_key, loss_key = jax.random.split(key)
    batch = task.batch(batch_key, run.phi, data, "train")
    value_and_grad = task.value_and_grad or jax.value_and_grad(task.loss)
    value, grads = value_and_grad(run.params, loss_key, run.phi, batch)
    grad_state = run.grad_state
    if task.grad_transform:
        grads, grad_state = task.grad_transform.update(grads, grad_state, run.params)
    extra: dict[str, Any] = {"value": value}
    if contender.needs - {"value"}:
        extra["value_fn"] = lambda params: task.loss(params, loss_key, run.phi, batch)
        extra["grad_fn"] = lambda params: value_and_grad(params, loss_key, run.phi, batch)[1]
        extra["key"] = jax.random.fold_in(key, 2)  # 0 is the key that drew the batch
    tx = optax.with_extra_args_support(contender.make(shared, **hyper))
    updates, opt_state = tx.update(grads, run.opt_state, run.params, **extra)
    return Particle(run.phi, optax.apply_updates(run.params, updates), opt_state, grad_state)


def evaluate(task: Task, data: Any, split: Split, run: Particle, *, metrics: bool) -> dict[str, Float[Array, ""]]:
    """Mean loss, and the task's metrics if asked for, on the split's evaluation set, the same for all runs."""
    keys = jax.random.split(jax.random.key(0), STREAM_BATCHES)
    if task.eval_batches is not None:
        batches = task.eval_batches(run.phi, data, split)
    else:
        batches = jax.lax.map(lambda key: task.batch(key, run.phi, data, split), keys)

    def one(batch: Any) -> dict[str, Array]:
        found = {"loss": task.loss(run.params, keys[0], run.phi, batch)}
        if metrics and task.metrics is not None:
            found |= task.metrics(run.params, keys[0], run.phi, batch)
        return found

    return jax.tree.map(lambda x: jnp.mean(x, axis=0), jax.lax.map(one, batches))


def prepare(contender: Contender, task: Task, most: int) -> Program:
    """A program that compiles once for all hyper-parameters, seeds and horizons.

    Args:
      contender: the optimizer.
      task: the inner problem.
      most: the largest number of runs it will be asked for; chunks are no larger than that, and than memory allows.
    """
    devices = jax.devices()[: min(jax.device_count(), most)]
    mesh = jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)
    chunk = chunk_size(most, len(devices), device_bytes() // max(step_bytes(task), 1))
    spread, everywhere = PartitionSpec(AXIS), PartitionSpec()

    def over_runs(function: Callable[..., Any], *in_specs: PartitionSpec, **kwargs: Any) -> Any:
        """Jit a function of one run for chunks of runs; the arguments that have the runs' leading axis are `spread`."""
        each = jax.vmap(function, in_axes=tuple(0 if spec == spread else None for spec in in_specs))
        mapped = jax.shard_map(each, mesh=mesh, in_specs=in_specs, out_specs=spread, check_vma=False)
        return jax.jit(mapped, compiler_options=compiler_options(devices=len(devices)), **kwargs)

    def advance(data: Any, shared: Any, t: Array, stop: Array, hyper: Any, seed: Array, run: Particle):
        one = partial(step, task, contender, data, shared, hyper, seed)
        run = jax.lax.fori_loop(t, stop, one, run)
        shown = judged(run)
        return run, {split: evaluate(task, data, split, shown, metrics=False)["loss"] for split in CURVES}

    def judged(run: Particle) -> Particle:
        if contender.eval_params is None:
            return run
        return run._replace(params=contender.eval_params(run.opt_state, run.params))

    def examine(data: Any, run: Particle):
        return evaluate(task, data, "test", judged(run), metrics=True)

    return Program(
        start=over_runs(partial(begin, task, contender.make), everywhere, spread, spread),
        advance=over_runs(advance, *[everywhere] * 4, *[spread] * 3, donate_argnums=6),
        examine=over_runs(examine, everywhere, spread),
        data=jax.device_put(task.data, NamedSharding(mesh, everywhere)),
        shared=jax.device_put(contender.shared, NamedSharding(mesh, everywhere)),
        place=lambda tree: jax.device_put(tree, NamedSharding(mesh, spread)),
        chunk=chunk,
    )


def run(
    program: Program,
    hyper: Hyper,
    seeds: Int[np.ndarray, " R"],
    steps: Int[np.ndarray, " E"],
    exams: Sequence[int],
    tick: Callable[[int], None],
) -> Curves:
    """Train R runs, chunk by chunk.

    Args:
      program: of the optimizer and the task.
      hyper: name -> [R].
      seeds: one a run.
      steps: at which train and validation loss are evaluated; runs end at the last.
      exams: those of `steps` at which the test set is evaluated.
      tick: called with the number of updates done since the last call, over all runs.
    """
    chunks = []
    for first in range(0, len(seeds), program.chunk):
        # The last chunk is filled up with copies, so that all have one shape.
        rows = np.minimum(np.arange(first, first + program.chunk), len(seeds) - 1)
        real = min(program.chunk, len(seeds) - first)
        chunk = {name: x[rows] for name, x in hyper.items()}
        chunks.append(
            _run_chunk(program, chunk, seeds[rows], steps, exams, lambda updates, real=real: tick(updates * real))
        )
    losses, test = jax.tree.map(lambda *xs: np.concatenate(xs)[: len(seeds)], *chunks)
    return Curves(steps, losses, test)


def _run_chunk(program: Program, hyper: Any, seeds: Any, steps: Any, exams: Sequence[int], tick: Callable[[int], None]):
    """(losses by split [C, E], test results by name [C, exams])."""
    hyper, seeds = program.place((hyper, seeds))
    state, at, losses, tests = program.start(program.shared, hyper, seeds), 0, [], []
    for stop in steps.tolist():
        state, found = program.advance(program.data, program.shared, at, stop, hyper, seeds, state)
        losses.append(jax.device_get(found))
        if stop in exams:
            tests.append(jax.device_get(program.examine(program.data, state)))
        tick(stop - at)
        at = stop

    def stack(records: list[Any]) -> Any:
        return jax.tree.map(lambda *xs: np.stack(xs, axis=-1), *records) if records else {}

    return stack(losses), stack(tests)


def chunk_size(most: int, devices: int, fit: int) -> int:
    """Runs in a chunk: a multiple of `devices`, at most `fit` a device (but one), as even as can be.

    >>> chunk_size(75, 2, 8), chunk_size(3, 2, 8), chunk_size(5, 2, 0)
    (16, 4, 2)
    """
    per_device = -(-most // devices)
    chunks = -(-per_device // max(fit, 1))
    return devices * -(-per_device // chunks)


def step_bytes(task: Task) -> int:
    """Bytes of all intermediate values of one gradient: what a run adds to the working set, and how dear a step is."""

    def gradient(key: Array, data: Any) -> Any:
        phi = task.sample(key)
        value_and_grad = task.value_and_grad or jax.value_and_grad(task.loss)
        return value_and_grad(task.init(key, phi), key, phi, task.batch(key, phi, data, "train"))

    jaxpr = jax.make_jaxpr(gradient)(jax.random.key(0), task.data)
    sizes = [v.aval for eqn in jaxpr.eqns for v in eqn.outvars]
    return sum(a.size * a.dtype.itemsize for a in sizes if hasattr(a, "size"))


def device_bytes() -> int:
    """The working set a device is given."""
    stats = None if jax.default_backend() == "cpu" else jax.devices()[0].memory_stats()
    return stats["bytes_limit"] // 4 if stats else CPU_BYTES
