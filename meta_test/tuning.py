"""Tune an optimizer on a problem: a grid with finalists, or random search; then run what was chosen on other seeds.

Grid: learning rates × schedules × the choices of other hyper-parameters, on one seed; if the best lies at the edge of
the learning rates the grid is extended there; the best FINALISTS on all tuning seeds. What is chosen is run on the
report's seeds, which tuning never saw, so that the best of many is not flattered by its luck.
"""

from __future__ import annotations

import itertools
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from meta_test import cells, metrics
from meta_test.cells import Cell
from meta_test.entrants import WARMUP, Entrant
from meta_test.runs import CURVES, EVALS, Curves, Program, eval_steps, prepare, run
from tasks.base import Task

LRS = 12  # learning rates of a grid
FINALISTS = 4
EXTENSION, EXTENSIONS = 3, 3  # learning rates added beyond an edge, and how often
TUNING_SEEDS = (1000, 1001, 1002)
TRIALS = 10  # points drawn from the grid for the row of ten trials
RUNS = 12  # side by side: what is chosen runs on few seeds, and a chunk is filled up

Tick = Callable[..., None]


class Point(NamedTuple):
    """Hyper-parameters; those not named are at their defaults."""

    hyper: Mapping[str, float]
    schedule: str

    def describe(self) -> str:
        return ", ".join([*(f"{name} {value:.4g}" for name, value in self.hyper.items()), self.schedule])


class Found(NamedTuple):
    """Points and their losses; those that are not finite are infinite."""

    points: list[Point]  # P
    finals: dict[str, np.ndarray]  # split -> [P, tuning seeds]; NaN where a point was not run


def first_axis(entrant: Entrant) -> tuple[str, np.ndarray]:
    """The learning rate, or the first parameter of a method without one, and the grid's [LRS] of it.

    It comes first in the hyper-parameters of every point of a grid.
    """
    name = "lr" if "lr" in entrant.space else next(iter(entrant.space))
    one = entrant.space[name]
    return name, (np.geomspace if one.log else np.linspace)(one.low, one.high, LRS)


def grid(entrant: Entrant) -> list[Point]:
    """Learning rates × schedules × choices; a method without a learning rate is searched in its first parameter."""
    first, rates = first_axis(entrant)
    axes = {name: list(one.choices) for name, one in entrant.space.items() if one.choices and name != first}
    axes = {first: rates.tolist()} | axes
    values = itertools.product(*axes.values())
    hypers: list[dict[str, float]] = [dict(zip(axes, one, strict=True)) for one in values]
    return [Point(hyper, schedule) for schedule in entrant.schedules for hyper in hypers]


def default(entrant: Entrant) -> Point:
    """What one trial is: the defaults, with the cosine schedule where there is one."""
    return Point({name: one.default for name, one in entrant.space.items()}, entrant.schedules[-1])


def trials(entrant: Entrant, count: int) -> list[Point]:
    """Random points of the whole space, the same for all problems; fewer are a head of more."""
    rng = np.random.default_rng(zlib.crc32(entrant.name.encode()))

    def draw(one: Any) -> float:
        u = float(rng.random())
        if one.choices:
            return one.choices[int(u * len(one.choices))]
        if one.log:
            return float(one.low * (one.high / one.low) ** u)
        return float(one.low + u * (one.high - one.low))

    def point() -> Point:
        schedule = entrant.schedules[int(rng.random() * len(entrant.schedules))]
        return Point({name: draw(one) for name, one in entrant.space.items()}, schedule)

    return [point() for _ in range(count)]


def inputs(cell: Cell, entrant: Entrant, task: Task, seeds: int, extra: Any = None) -> dict[str, Any]:
    """All that a cell's numbers depend on but the machine; its key is their hash."""
    return {
        "protocol": [cells.PROTOCOL, LRS, EVALS, metrics.WINDOW, WARMUP, FINALISTS, EXTENSION, EXTENSIONS, TRIALS],
        "task": [cell.problem.family, cells.plain(cell.problem.settings), task.version],
        "data": [list(source) for source in task.provenance],
        "num_steps": cell.problem.num_steps,
        "optimizer": [entrant.name, entrant.version],
        "search": [cell.search, cell.part, extra],
        "grid": {name: list(one) for name, one in entrant.space.items()} | {"schedules": list(entrant.schedules)},
        "seeds": [list(TUNING_SEEDS) if entrant.tuned else [], seeds],
    }


class Bench:
    """An optimizer on a task, compiled on first use, for all cells of the pair."""

    def __init__(self, entrant: Entrant, task: Task, tick: Tick) -> None:
        self.entrant, self.task, self.tick = entrant, task, tick
        self.program: Program | None = None

    def run(self, points: Sequence[Point], seeds: Sequence[int], horizon: int, steps: Any, exams: Any) -> Curves:
        """Every point on every seed: losses are [P, S, E], test results [P, S, exams]."""
        if self.program is None:
            self.program = prepare(self.entrant.contender, self.task, RUNS)
        defaults = {name: one.default for name, one in self.entrant.space.items()}
        repeat = partial(np.repeat, repeats=len(seeds))
        hyper = {
            name: repeat(np.array([point.hyper.get(name, value) for point in points], np.float32))
            for name, value in defaults.items()
        }
        hyper["num_steps"] = np.full(len(points) * len(seeds), horizon, np.int32)
        hyper["cosine"] = repeat(np.array([point.schedule == "cosine" for point in points]))
        curves = run(self.program, hyper, np.tile(np.array(seeds), len(points)), steps, exams, self.tick)

        def by_point(found: Mapping[Any, Any]) -> dict[Any, Any]:
            return {name: x.reshape(len(points), len(seeds), -1) for name, x in found.items()}

        return Curves(curves.steps, by_point(curves.losses), by_point(curves.test))


def search(bench: Bench, cell: Cell) -> Found:
    """The points of a cell's search and what they gave on the tuning seeds."""
    steps = eval_steps(cell.horizon)[-metrics.WINDOW :]

    def finals(points: Sequence[Point], seeds: Sequence[int]) -> dict[str, np.ndarray]:
        curves = bench.run(points, seeds, cell.horizon, steps, ())
        return {split: metrics.final(curves.losses[split]) for split in CURVES}

    def extended(found: Found, best: Sequence[int], seeds: Sequence[int]) -> Found | None:
        more = beyond(found.points, best, bench.entrant) if cell.search == "grid" else []
        if not more:
            return None
        extra = finals(more, seeds)
        return Found(
            found.points + more,
            {split: np.concatenate([found.finals[split], _padded(extra[split])]) for split in CURVES},
        )

    points = grid(bench.entrant) if cell.search == "grid" else trials(bench.entrant, int(cell.search.split("-")[1]))
    found = Found(points, {split: _padded(x) for split, x in finals(points, TUNING_SEEDS[:1]).items()})
    for _ in range(EXTENSIONS):  # where the best of one seed is at the edge
        best = [int(_order(found.finals[split][:, 0])[0]) for split in CURVES]
        if (wider := extended(found, best, TUNING_SEEDS[:1])) is None:
            break
        found = wider
    best = sorted({int(i) for split in CURVES for i in _order(found.finals[split][:, 0])[:FINALISTS]})
    again = finals([found.points[i] for i in best], TUNING_SEEDS[1:])
    for split in CURVES:
        found.finals[split][best, 1:] = again[split]
    for _ in range(EXTENSIONS):  # where that of all seeds is, which may be another
        if (wider := extended(found, [choose(found, split) for split in CURVES], TUNING_SEEDS)) is None:
            break
        found = wider
    return found


def _padded(finals: np.ndarray) -> np.ndarray:
    """[P, some] as [P, tuning seeds], NaN where not run."""
    return np.pad(finals, ((0, 0), (0, len(TUNING_SEEDS) - finals.shape[1])), constant_values=np.nan)


def _order(finals: np.ndarray) -> np.ndarray:
    return np.argsort(np.where(np.isfinite(finals), finals, np.inf), kind="stable")


def beyond(points: Sequence[Point], best: Sequence[int], entrant: Entrant) -> list[Point]:
    """EXTENSION more learning rates next to each best point that is at the edge of those tried with its other settings.

    By the grid's ratio; outwards, so that a best point in the middle adds nothing. A method without a learning rate:
    more values of its first parameter, if that is searched in its logarithm; others may have bounds.
    """
    name, rates = first_axis(entrant)
    if not entrant.space[name].log:
        return []
    more: list[Point] = []
    for at in best:
        if side := edge(points, at):
            steps = (rates[1] / rates[0]) ** (side * np.arange(1, EXTENSION + 1))
            more += [
                Point({**points[at].hyper, name: float(points[at].hyper[name] * x)}, points[at].schedule) for x in steps
            ]
    return [point for i, point in enumerate(more) if point not in more[:i]]


def edge(points: Sequence[Point], at: int) -> int:
    """-1 or 1 if a point's learning rate, its first value, is the least or greatest with its other settings, else 0.

    >>> points = [Point({"lr": lr}, s) for s in ("constant", "cosine") for lr in (0.1, 0.2, 0.3)]
    >>> [edge(points, at) for at in range(6)]
    [-1, 0, 1, -1, 0, 1]
    """

    first = next(iter(points[at].hyper))

    def rest(point: Point) -> Any:
        return point.schedule, {name: value for name, value in point.hyper.items() if name != first}

    rates = [point.hyper[first] for point in points if rest(point) == rest(points[at])]
    rate = points[at].hyper[first]
    return int(rate >= max(rates)) - int(rate <= min(rates))


def choose(found: Found, split: str) -> int:
    """The finalist of least mean over the tuning seeds; of points run on one seed only, none unless all are."""
    ran = ~np.isnan(found.finals[split][:, 1:]).any(1) if len(TUNING_SEEDS) > 1 else np.ones(len(found.points), bool)
    at = np.flatnonzero(ran)
    return int(at[metrics.choose(found.finals[split][at])])


def ten_trials(points: Sequence[Point], finals: np.ndarray, draw: int) -> int:
    """The best on one seed of TRIALS points drawn without replacement: what a small budget finds."""
    some = np.sort(np.random.default_rng(draw).permutation(len(points))[:TRIALS])
    return int(some[_order(finals[some, 0])[0]])


def tune(bench: Bench, cell: Cell, seeds: int, point: Point | None = None) -> dict[str, Any]:
    """The record of a cell, without its inputs: what was tried, what was chosen, its curves on seeds 0 … seeds - 1.

    `point` is what is run for "once"; untuned entrants have none.
    """
    began, out = time.monotonic(), {}
    splits = dict.fromkeys(CURVES, 0)
    if cell.search in ("untuned", "once"):
        points, rows = [point or Point({}, "constant")], {"": splits}
    else:
        found = search(bench, cell)
        best = {split: choose(found, split) for split in CURVES}
        points, rows = found.points, {"": best}
        out["points"] = [cells.plain(p) for p in points]
        out["finals"] = {split: cells.rounded(found.finals[split]) for split in CURVES}
        out["edge"] = {split: bool(edge(points, at)) for split, at in best.items()}
        if cell.search == "grid" and cell.part == 1:
            tried = len(grid(bench.entrant))
            ten = ten_trials(points[:tried], found.finals["validation"][:tried], zlib.crc32(cell.problem.name.encode()))
            points = [*points, default(bench.entrant)]
            rows |= {"10 trials": dict.fromkeys(CURVES, ten), "1 trial": dict.fromkeys(CURVES, len(points) - 1)}
    wanted = sorted({at for row in rows.values() for at in row.values()})
    steps = eval_steps(cell.horizon)
    curves = bench.run([points[i] for i in wanted], range(seeds), cell.horizon, steps, (cell.horizon,))
    out["steps"] = steps
    out["rows"] = {
        name: {
            "chosen": {split: cells.plain(points[at]) for split, at in row.items()},
            "losses": {split: cells.rounded(curves.losses[split][wanted.index(row[split])]) for split in CURVES},
            "test": {k: cells.rounded(x[wanted.index(row["validation"]), :, 0]) for k, x in curves.test.items()},
        }
        for name, row in rows.items()
    }
    return out | {"status": "done", "seconds": round(time.monotonic() - began, 1)}


def updates(cell: Cell, entrant: Entrant, seeds: int) -> int:
    """Updates that a cell takes without extensions, chunks that are filled up included."""
    if cell.search in ("untuned", "once"):
        counts = [seeds]
    else:
        points = len(grid(entrant)) if cell.search == "grid" else int(cell.search.split("-")[1])
        extra = 2 if cell.search == "grid" and cell.part == 1 else 0
        counts = [points, min(points, FINALISTS + 2) * (len(TUNING_SEEDS) - 1), (2 + extra) * seeds]
    return sum(-(-count // RUNS) * RUNS for count in counts) * cell.horizon
