"""A learned rule, untuned, against AdamW tuned for each task, on the same seeds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import optax

import tasks
from lopt.base import LearnedOptimizer
from meta_test import metrics
from meta_test.entrants import SCHEDULES, unit_schedule
from meta_test.runs import CURVES, Contender, Curves, Program, eval_steps, prepare, run, step_bytes
from meta_test.suites import Problem
from tasks.base import Split, Task

if TYPE_CHECKING:
    from jaxtyping import Float, Int

LRS = tuple(float(lr) for lr in np.logspace(-4.0, -0.5, 12))
WEIGHT_DECAY, UNTUNED_LR = 1e-4, 1e-3
TUNED, HALF, UNTUNED = "AdamW, tuned", "AdamW, tuned for T/2", f"AdamW({UNTUNED_LR:g}), untuned"
# For the ETA: compiling a program takes as long as updates with this many bytes of intermediates.
COMPILE_BYTES = 1e11

Tick = Callable[..., None]  # (updates, compiled=programs)


class Point(NamedTuple):
    """Hyper-parameters of AdamW."""

    lr: float
    schedule: str  # of SCHEDULES; cosine: to 0, after a linear warm-up over the first WARMUP of the horizon
    edge: bool = False  # lr was chosen and is the end of its grid


class Row(NamedTuple):
    """An optimizer on a task."""

    name: str
    steps: Int[np.ndarray, " E"]  # of the evaluations
    losses: dict[Split, Float[np.ndarray, "S E"]]  # each split's at the point chosen for it
    test: dict[str, Float[np.ndarray, " S"]]  # "loss" and metrics, at the end, at the point chosen for validation
    chosen: dict[Split, Point]  # empty for a learned rule


class Sweep(NamedTuple):
    """AdamW's grid at one horizon."""

    horizon: int
    points: list[Point]  # P
    finals: dict[Split, Float[np.ndarray, "P S"]]


class Result(NamedTuple):
    """What one problem gave."""

    problem: Problem
    task: Task
    rows: list[Row]  # the learned rule, TUNED, HALF, UNTUNED
    sweeps: list[Sweep]  # at T and T/2
    seconds: float


class Score(NamedTuple):
    """A row measured against the tuned AdamW."""

    final: dict[Split, Float[np.ndarray, " S"]]
    hit: dict[Split, int | None]  # first step at or below the tuned AdamW's best
    speed_up: dict[Split, float]
    test: dict[str, Float[np.ndarray, " S"]]


def adamw(shared: Any, *, lr: Any, horizon: Any, cosine: Any) -> optax.GradientTransformation:
    """AdamW at a traced learning rate, horizon and choice of schedule."""
    unit = unit_schedule(horizon, cosine)
    return optax.adamw(lambda count: lr * unit(count), weight_decay=WEIGHT_DECAY)


def compare(
    label: str,
    rule: LearnedOptimizer,
    theta: Any,
    problems: Sequence[Problem],
    *,
    seeds: int = 3,
    lrs: Sequence[float] = LRS,
    report: Callable[[float, str], None] = lambda fraction, note: None,
) -> list[Result]:
    """Run the rule, and AdamW over its grid, on every problem.

    Args:
      label: name of the rule in tables.
      rule: the learned optimizer; it runs with its own defaults and num_steps = T.
      theta: its meta-parameters.
      problems: tasks and horizons.
      seeds: number of seeds, 0 … seeds - 1.
      lrs: AdamW's learning rates.
      report: told the fraction done and what is being done.

    Raises:
      ValueError: if a task cannot be made, or there are no seeds or fewer than 3 learning rates.
    """
    if seeds < 1:
        raise ValueError(f"meta_test.compare: seeds, got {seeds}; valid: an integer >= 1.")
    if len(lrs) < 3:
        raise ValueError(f"meta_test.compare: lrs, got {list(lrs)}; valid: 3 or more, since the ends are flagged.")
    made = [tasks.make(problem.family, **problem.settings) for problem in problems]
    costs = [step_bytes(task) for task in made]
    work = [cost * _updates(p.num_steps, seeds, len(lrs)) for p, cost in zip(problems, costs, strict=True)]
    total = sum(work) + 2 * COMPILE_BYTES * len(work)
    learned = Contender(label, lambda theta, num_steps: rule.bind(theta, num_steps=num_steps), theta)
    results, done = [], 0.0
    for problem, task, cost in zip(problems, made, costs, strict=True):

        def tick(updates: int, compiled: int = 0, cost: int = cost, name: str = task.name) -> None:
            nonlocal done
            done += updates * cost + compiled * COMPILE_BYTES
            report(done / total, name)

        results.append(_compare_on(problem, task, learned, seeds, lrs, tick))
    report(1.0, "")
    return results


def _updates(num_steps: int, seeds: int, lrs: int) -> int:
    """Updates of one problem: both sweeps, the chosen points again, the rule."""
    points = (len(SCHEDULES) * lrs + 3 + 1) * num_steps + (lrs + 2) * (num_steps // 2)
    return points * seeds


def _compare_on(problem: Problem, task: Task, rule: Contender, seeds: int, lrs: Sequence[float], tick: Tick) -> Result:
    began, horizon = time.monotonic(), problem.num_steps
    steps = eval_steps(horizon)
    early = steps[steps <= horizon // 2]
    hyper = {"num_steps": np.full(seeds, horizon, np.int32)}
    learned = run(prepare(rule, task, seeds), hyper, np.arange(seeds), steps, (horizon,), tick)
    tick(0, compiled=1)
    program = prepare(Contender("AdamW", adamw), task, len(SCHEDULES) * len(lrs) * seeds)
    run_points = partial(_run_points, program, seeds, tick)
    full, half = _sweeps(run_points, horizon, lrs)
    tick(0, compiled=1)
    best, best_half = _best(full, lrs), _best(half, lrs)
    untuned = Point(UNTUNED_LR, "constant")
    tuned = run_points([*best.values(), untuned], horizon, steps, (horizon,))
    tuned_half = run_points([*best_half.values()], horizon // 2, early, (horizon // 2,))
    own = {split: i for i, split in enumerate(CURVES)}
    rows = [
        Row(rule.name, steps, learned.losses, {name: x[:, 0] for name, x in learned.test.items()}, {}),
        _row(TUNED, best, own, tuned),
        _row(HALF, best_half, own, tuned_half),
        _row(UNTUNED, dict.fromkeys(CURVES, untuned), dict.fromkeys(CURVES, len(CURVES)), tuned),
    ]
    return Result(problem, task, rows, [full, half], time.monotonic() - began)


def _sweeps(run_points: Callable[..., Curves], horizon: int, lrs: Sequence[float]) -> tuple[Sweep, Sweep]:
    """AdamW's grid at T and at T/2, evaluated only where the final losses are taken."""
    steps = eval_steps(horizon)
    early = steps[steps <= horizon // 2][-metrics.WINDOW :]
    late = steps[-metrics.WINDOW :]
    constant, cosine = ([Point(float(lr), schedule) for lr in lrs] for schedule in SCHEDULES)
    both = run_points(constant + cosine, horizon, np.union1d(early, late), ())
    short = run_points(cosine, horizon // 2, early, ())

    def finals(curves: Curves, at: Any) -> dict[Split, Any]:
        keep = np.isin(curves.steps, at)
        return {split: metrics.final(losses[..., keep]) for split, losses in curves.losses.items()}

    # Until T/2, a constant learning rate at T is one at T/2.
    head, tail = finals(both, early), finals(short, early)
    halves = {split: np.concatenate([head[split][: len(constant)], tail[split]]) for split in CURVES}
    return (
        Sweep(horizon, constant + cosine, finals(both, late)),
        Sweep(horizon // 2, constant + cosine, halves),
    )


def _run_points(
    program: Program, seeds: int, tick: Tick, points: Sequence[Point], horizon: int, steps: Any, exams: Sequence[int]
) -> Curves:
    """Run every point on every seed: losses are [P, S, E], test results [P, S, exams]."""
    hyper = {
        "lr": np.repeat(np.array([p.lr for p in points], np.float32), seeds),
        "horizon": np.full(len(points) * seeds, horizon, np.int32),
        "cosine": np.repeat(np.array([p.schedule == "cosine" for p in points]), seeds),
    }
    curves = run(program, hyper, np.tile(np.arange(seeds), len(points)), steps, exams, tick)

    def by_point(found: dict[Any, Any]) -> dict[Any, Any]:
        return {name: x.reshape(len(points), seeds, -1) for name, x in found.items()}

    return Curves(curves.steps, by_point(curves.losses), by_point(curves.test))


def _best(sweep: Sweep, lrs: Sequence[float]) -> dict[Split, Point]:
    """The point of least mean final loss, for each split its own."""
    best = {split: sweep.points[metrics.choose(sweep.finals[split])] for split in CURVES}
    return {split: p._replace(edge=metrics.at_edge(p.lr, np.asarray(lrs))) for split, p in best.items()}


def _row(name: str, chosen: dict[Split, Point], at: dict[Split, int], curves: Curves) -> Row:
    """The row of the points chosen for each split, which are number `at` in curves [P, S, ...]."""
    losses = {split: curves.losses[split][at[split]] for split in CURVES}
    test = {metric: x[at["validation"], :, 0] for metric, x in curves.test.items()}
    return Row(name, curves.steps, losses, test, chosen)


def scores(rows: Sequence[Row]) -> list[Score]:
    """Measure every row against the one called TUNED."""
    reference = next(row for row in rows if row.name == TUNED)
    targets = {split: float(metrics.seed_mean(reference.losses[split]).min()) for split in CURVES}

    def hit(row: Row, split: Split) -> int | None:
        return metrics.first_hit(row.steps, metrics.seed_mean(row.losses[split]), targets[split])

    def score(row: Row) -> Score:
        hits = {split: hit(row, split) for split in CURVES}
        speed = {split: metrics.speed_up(hit(reference, split), hits[split]) for split in CURVES}
        return Score({split: metrics.final(row.losses[split]) for split in CURVES}, hits, speed, row.test)

    return [score(row) for row in rows]


def verdicts(rule: Score, reference: Score) -> dict[str, metrics.Verdict]:
    """The rule against the tuned AdamW, column by column."""
    out = {f"{split} loss": metrics.verdict(rule.final[split], reference.final[split]) for split in CURVES}
    for name in rule.test:
        better = name == "accuracy"
        out[f"test {name}"] = metrics.verdict(rule.test[name], reference.test[name], higher_is_better=better)
    return out | {f"{split} speed-up": metrics.speed_verdict(rule.speed_up[split]) for split in CURVES}
