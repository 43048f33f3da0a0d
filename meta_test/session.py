"""Fill the cells of a suite: find what is kept, compute what is not, one file a cell, so that a stop costs one cell."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import tasks
from lopt.console import compiler_options
from meta_test import cells, tuning
from meta_test.cells import Cell
from meta_test.entrants import Entrant
from meta_test.runs import Particle, begin, step
from meta_test.suites import RELATIVE_MS, Problem
from tasks.base import Task

REFERENCE = "adamw"  # targets are its best losses; also tuned for shorter horizons
PARTS = (1, 2, 3)
ONCE = ("adamw", "hand_celo2")  # also tuned once over all problems: what one setting for everything reaches
SEEDS = 5
TIMED_SECONDS, TIMINGS = 0.1, 5
PERIOD = 20  # steps; whole cycles of what is done every 2, 4, 5, 10 or 20 steps, as SOAP's bases are

Tell = Callable[[float, str], None]


class Job(NamedTuple):
    """A cell to be filled."""

    cell: Cell
    entrant: Entrant
    updates: int


class Store(NamedTuple):
    """Where records are found and written."""

    own: Path | None  # of what is not tuned, of what crashed, and copies of all that were used; None to fill a cache
    cache: Path  # of tuned cells that are computed; of all without `own`
    folders: tuple[Path, ...]  # that are searched


def jobs(
    problems: Sequence[Problem],
    entrants: Sequence[Entrant],
    seeds: int = SEEDS,
    trials: int | None = None,
    *,
    whole: bool = True,
) -> list[Job]:
    """What a run consists of, problem by problem, but for "once", which needs all of a `whole` suite, at the end."""
    out = []

    def add(problem: Problem, entrant: Entrant, search: str, part: int = 1) -> None:
        cell = Cell(problem, entrant.name, search, part)
        out.append(Job(cell, entrant, tuning.updates(cell, entrant, seeds)))

    for problem in problems:
        for entrant in entrants:
            if not entrant.tuned:
                add(problem, entrant, "untuned")
            elif trials:
                add(problem, entrant, f"random-{trials}")
            else:
                for part in PARTS if entrant.name == REFERENCE else PARTS[:1]:
                    add(problem, entrant, "grid", part)
    for problem in problems if whole and not trials else ():
        for entrant in entrants:
            if entrant.name in ONCE and entrant.tuned:
                add(problem, entrant, "once")
    return out


def fill(
    todo: Sequence[Job],
    store: Store,
    seeds: int,
    tell: Tell,
    say: Callable[[str], None],
    used: list[str] | None = None,
) -> dict[str, int]:
    """Fill every cell. Returns how many were kept, computed and failed.

    Args:
      todo: from `jobs`.
      store: see `Store`.
      seeds: of the report, 0 … seeds - 1.
      tell: told the seconds of work done, and of what.
      say: told what went wrong.
      used: gets the name of every record.
    """
    counts = {"kept": 0, "computed": 0, "failed": 0}
    benches: dict[tuple[str, str], tuning.Bench] = {}
    made: dict[str, Task] = {}
    for job, cost in zip(todo, costs(todo), strict=True):
        name = job.cell.problem.name
        if name not in made:
            benches.clear()  # compiled programs of other problems are not needed again, but for "once"
            jax.clear_caches()
            made = {name: tasks.make(job.cell.problem.family, **job.cell.problem.settings)}
        # Tuned cells always have SEEDS seeds, so that those that ship serve who asks for fewer, who is shown fewer.
        kept = max(seeds, SEEDS) if job.entrant.tuned else seeds
        point = once(job, todo, store, kept) if job.cell.search == "once" else None
        inputs = tuning.inputs(job.cell, job.entrant, made[name], kept, point)
        key = cells.key_of(inputs)
        path = _found(store, job.cell, key, say)
        if path:
            counts["kept"] += 1
            if not job.entrant.known:  # a key sees the file that is named, not what that imports
                say(f"{name}, {job.cell.label}: found in {path}; to run it again remove it")
        else:
            pair = name, job.entrant.name
            if pair not in benches:
                benches[pair] = tuning.Bench(job.entrant, made[name], partial(_tick, job, tell))
            benches[pair].tick = partial(_tick, job, tell)
            record = _compute(benches[pair], job, inputs, kept, point)
            counts["computed"] += 1
            if record["status"] != "done":
                counts["failed"] += 1
                say(f"{name}, {job.cell.label}: {record['status']}: {record.get('error', '')}")
            # A crash is told in the report of this run, and belongs into no cache.
            folder = store.own
            if record["status"] == "done" and (job.entrant.tuned or store.own is None):
                folder = store.cache
            if folder is not None:
                path = cells.write(folder, cells.file_of(job.cell, key), record)
        if path and used is not None:
            used.append(path.name)
        if path and store.own is not None and path.parent != store.own:
            cells.copy(path, store.own)
        tell(cost, f"{name}, {job.cell.label}")
    return counts


def _found(store: Store, cell: Cell, key: str, say: Callable[[str], None]) -> Path | None:
    """The record of a key. A run's own that cannot be read is passed over; one of a cache raises ValueError."""
    own = (store.own,) if store.own is not None else ()
    try:
        if path := cells.find(own, cell, key):
            return path
    except ValueError as error:
        say(f"{error} It is passed over and written anew.")
    return cells.find([folder for folder in store.folders if folder not in own], cell, key)


def _tick(job: Job, tell: Tell, updates: int) -> None:
    tell(0.0, f"{job.cell.problem.name}, {job.cell.label}")


def _compute(bench: tuning.Bench, job: Job, inputs: Any, seeds: int, point: Any) -> dict[str, Any]:
    """A record. What raises is one too."""
    cell = job.cell
    record = {
        "inputs": inputs,
        "cell": [cell.problem.name, cell.optimizer, cell.search, cell.part],
        "jax": jax.__version__,
        "optax": optax.__version__,
    }
    if lacks := job.entrant.lacks(bench.task):
        return record | {"status": "skipped", "error": f"needs {lacks}"}
    try:
        return record | tuning.tune(bench, cell, seeds, point)
    except Exception as error:  # of a user's optimizer, or of the compiler: the other cells are worth having
        return record | {"status": "crashed", "error": f"{type(error).__name__}: {error}"[:500]}


def once(job: Job, todo: Sequence[Job], store: Store, seeds: int) -> tuning.Point:
    """The point of an optimizer's grid of least mean rank over the problems, by validation loss on one seed."""
    finals, points, left = [], tuning.grid(job.entrant), []
    for other in todo:
        if (other.cell.optimizer, other.cell.search, other.cell.part) != (job.cell.optimizer, "grid", 1):
            continue
        task = tasks.make(other.cell.problem.family, **other.cell.problem.settings)
        key = cells.key_of(tuning.inputs(other.cell, other.entrant, task, seeds, None))
        if path := _found(store, other.cell, key, warn):
            finals.append(cells.array(cells.read(path)["finals"]["validation"])[: len(points), 0])
        else:
            left.append(other.cell.problem.name)
    if left and job.cell.problem == todo[0].cell.problem:  # said once
        warn(f"{job.cell.label}: chosen without {', '.join(left)}, where its grid has no record")
    return least_mean_rank(points, np.stack(finals)) if finals else points[0]


def least_mean_rank(points: Sequence[tuning.Point], finals: np.ndarray) -> tuning.Point:
    """Of points with final losses [problems, P]; what is not finite ranks last."""
    finals = np.where(np.isfinite(finals), finals, np.inf)
    ranks = (finals[:, :, None] > finals[:, None, :]).sum(2) + 0.5 * (finals[:, :, None] == finals[:, None, :]).sum(2)
    return points[int(np.argmin(ranks.mean(0)))]


# Cost.

# A compiled program of the sizes in the suites.
COMPILE_SECONDS = 8.0


def costs(todo: Sequence[Job]) -> list[float]:
    """Seconds each cell takes on one core of the reference machine, in the order in which `fill` goes through them.

    The first of an optimizer on a problem compiles; programs of other problems are not kept.
    """
    out, problem, compiled = [], "", set()
    for job in todo:
        if job.cell.problem.name != problem:
            problem, compiled = job.cell.problem.name, set()
        new = job.entrant.name not in compiled
        compiled.add(job.entrant.name)
        gradients = 1.0 + bool(job.entrant.contender.needs - {"value", "num_steps"})  # at least one more
        step = job.cell.problem.ms * RELATIVE_MS.get(job.entrant.name, gradients)
        out.append(job.updates * step * 1e-3 + COMPILE_SECONDS * new)
    return out


def seconds(todo: Sequence[Job]) -> float:
    """What cells take on one core of the reference machine."""
    return sum(costs(todo))


# Time of an update.


class Timing(NamedTuple):
    """Of one run alone on one device."""

    ms: float  # a step: batch, gradient and update
    state_bytes: int  # of the optimizer's state
    params_bytes: int


class Stopwatch:
    """One run at default hyper-parameters, compiled, that goes on from loop to loop."""

    def __init__(self, entrant: Entrant, task: Task, num_steps: int) -> None:
        hyper = {name: np.float32(one.default) for name, one in entrant.space.items()}
        hyper |= {"num_steps": np.int32(num_steps), "cosine": np.bool_(False)}
        contender = entrant.contender

        @partial(jax.jit, compiler_options=compiler_options())
        def start(shared: Any, hyper: Any) -> Particle:
            return begin(task, contender.make, shared, hyper, jax.numpy.int32(0))

        @partial(jax.jit, donate_argnums=5, compiler_options=compiler_options())  # those of the runs
        def loop(data: Any, shared: Any, hyper: Any, t: Any, stop: Any, run: Particle) -> Particle:
            one = partial(step, task, contender, data, shared, hyper, jax.numpy.int32(0))
            return jax.lax.fori_loop(t, stop, one, run)

        self._loop = partial(loop, task.data, contender.shared, hyper)
        self._run, self._at = start(contender.shared, hyper), 0
        self._took(1)  # compiles
        self._steps = timed_steps(self._took(PERIOD) / PERIOD)

    def _took(self, count: int) -> float:
        began = time.perf_counter()
        self._run = jax.block_until_ready(self._loop(self._at, self._at + count, self._run))
        self._at += count
        return time.perf_counter() - began

    def loop(self) -> float:
        """Milliseconds a step of one more loop, see `timed_steps`."""
        return 1e3 * self._took(self._steps) / self._steps

    def timing(self, loops: Sequence[float]) -> Timing:
        """By the least of some loops."""
        return Timing(min(loops), _bytes(self._run.opt_state), _bytes(self._run.params))


def in_turn(watches: Mapping[str, Stopwatch]) -> dict[str, Timing]:
    """Loop after loop of all, TIMINGS times: a slow second of the machine is nobody's alone."""
    loops: dict[str, list[float]] = {name: [] for name in watches}
    for _ in range(TIMINGS):
        for name, watch in watches.items():
            loops[name].append(watch.loop())
    return {name: watch.timing(loops[name]) for name, watch in watches.items()}


def timed_steps(seconds: float) -> int:
    """Steps in a timed loop, of so many seconds each: about TIMED_SECONDS, and whole periods.

    The least of loops that hold a dear step now and then would be of those that do not.

    >>> [timed_steps(s) for s in (1.0, 4e-3, 0.9e-3, 0.0)]
    [20, 40, 120, 10000]
    """
    periods = np.ceil(TIMED_SECONDS / max(seconds, 1e-6) / PERIOD)
    return int(np.clip(periods, 1, 10_000 // PERIOD)) * PERIOD


def _bytes(tree: Any) -> int:
    def size(x: Any) -> int:
        wide = jax.random.key_data(x) if jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        return int(wide.size * wide.dtype.itemsize)

    return sum(size(x) for x in jax.tree.leaves(tree))


def timings(problems: Sequence[Problem], entrants: Sequence[Entrant], say: Callable[[str], None]) -> dict[str, Any]:
    """Problem -> optimizer -> `Timing`, all of a problem in turn; who crashes has none."""
    out: dict[str, Any] = {}
    for problem in problems:
        jax.clear_caches()
        task = tasks.make(problem.family, **problem.settings)
        say(f"timing {problem.name}: {len(entrants)} optimizers")
        watches = {}
        for entrant in entrants:
            if entrant.lacks(task):
                continue
            try:
                watches[entrant.name] = Stopwatch(entrant, task, problem.num_steps)
            except Exception as error:  # it has failed in its cell too, where it is recorded
                say(f"timing {problem.name}, {entrant.name}: {type(error).__name__}")
        out[problem.name] = {name: timing._asdict() for name, timing in in_turn(watches).items()}
    return out


def warn(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
