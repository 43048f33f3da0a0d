"""What the records of one or more runs amount to: rows of every problem, and of every optimizer over the problems."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from meta_test import cells, metrics
from meta_test.cells import Cell
from meta_test.runs import CURVES
from meta_test.session import REFERENCE
from meta_test.suites import Problem
from meta_test.tuning import LRS, TRIALS

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from tasks.base import Split

CELLS, ABOUT, TIMING = "cells", "run.json", "timing.json"
TUNED, TEN, ONE = "tuned", "10 trials", "1 trial"  # budgets of a baseline
BUDGETS = (ONE, TEN, TUNED)


class Row(NamedTuple):
    """An optimizer on a problem."""

    label: str
    optimizer: str  # of its timing
    budget: str  # TUNED, TEN or ONE; "untuned", "once" …
    part: int  # of T that it was run for
    status: str  # done, crashed or skipped
    error: str = ""
    steps: Int[np.ndarray, " E"] = np.zeros(0, int)
    losses: Mapping[str, Float[np.ndarray, "S E"]] = {}  # NaN where not finite
    test: Mapping[str, Float[np.ndarray, " S"]] = {}
    chosen: Mapping[str, Any] = {}
    edge: Mapping[str, Sequence[str]] = {}  # split -> hyper-parameters chosen at an end of what was tried
    grid: int = 0  # points of its grid, without extensions
    sources: Sequence[str] = ()  # ids of its problem's data


class Board(NamedTuple):
    """Everything that was read."""

    problems: list[Problem]
    rows: dict[str, dict[str, Row]]  # problem -> label -> row
    timing: dict[str, dict[str, Any]]  # problem -> optimizer -> Timing's fields, all of one session
    abouts: list[dict[str, Any]]  # run.json of each folder
    scores: dict[str, dict[str, Score]]  # problem -> label -> score of rows that were run; none without a reference

    def labels(self) -> list[str]:
        """Full rows (neither T/2 nor a small budget), the reference first, learned rules next, then by name."""
        every = [r for rows in self.rows.values() for r in rows.values() if r.part == 1]
        skipped = {row.label for row in every if row.status == "skipped"}  # on one problem: it is not of all of them
        found = {row.label: row for row in every}
        main = [row for row in found.values() if row.budget not in (TEN, ONE) and row.label not in skipped]

        def order(row: Row) -> Any:
            return row.label != REFERENCE, row.budget != "untuned", row.label

        return [row.label for row in sorted(main, key=order)]

    def common(self, labels: Sequence[str]) -> list[str]:
        """Problems with a reference on which all these rows were run, or crashed."""
        return [
            problem.name
            for problem in self.problems
            if self.scores[problem.name] and all(label in self.rows[problem.name] for label in labels)
        ]


class Score(NamedTuple):
    """A row measured against the tuned reference."""

    final: dict[Split, Float[np.ndarray, " S"]]  # last smoothed loss
    best: dict[Split, Float[np.ndarray, " S"]]  # least smoothed loss
    hit: dict[Split, int | None]  # of the curves' mean over seeds
    speed_up: dict[Split, float]
    paired: dict[Split, Float[np.ndarray, " S"]]  # speed-up on each seed
    wall: dict[Split, float]  # speed-up in time, NaN without timings
    paired_wall: dict[Split, Float[np.ndarray, " S"]]  # the same on each seed
    test: Float[np.ndarray, " S"]  # loss at the end
    diverged: float  # share of seeds


class Total(NamedTuple):
    """An optimizer over the problems on which all of a table were run; intervals of 95 %."""

    label: str
    iqm: dict[Split, float]
    interval: dict[Split, tuple[float, float]]
    median: dict[Split, float]
    median_interval: dict[Split, tuple[float, float]]
    wall: float  # IQM of the speed-up in time, validation
    wall_interval: tuple[float, float]
    win: float  # share of problems and seeds with a lower final validation loss than the reference
    win_interval: tuple[float, float]
    rank: float  # among the table's by final validation loss; NaN for a second row of an optimizer (once)
    rank_interval: tuple[float, float]
    test_win: float  # as win, by the test loss at the end
    test_win_interval: tuple[float, float]
    test_rank: float
    test_rank_interval: tuple[float, float]
    diverged: float  # share of seeds with a loss that was not finite; crashes apart
    failed: int  # problems it crashed on
    missing: int  # problems of the board it was not run on
    relative_ms: float  # geometric mean over problems of its time a step over the reference's
    state_bytes: float  # a parameter, mean over problems


def load(folders: Sequence[Path], seeds: int | None = None) -> Board:
    """Read runs. Records of the same optimizer in several folders must agree, or stand side by side under two labels.

    Of runs with different numbers of seeds the seeds that all have are kept.

    Raises ValueError for a folder that is no run, and for runs of different suites.
    """
    abouts, rows, timing, problems = [], {}, {}, {}
    names = suffixes(folders)
    for folder in folders:
        if not (folder / ABOUT).is_file():
            raise ValueError(f"lopt-eval report: {folder} holds no {ABOUT}; valid: folders made by `lopt-eval run`.")
        about = json.loads((folder / ABOUT).read_text())
        abouts.append(about)
        if about["suite"] != abouts[0]["suite"]:
            raise ValueError(
                f"lopt-eval report: {folder} is of {about['suite']}, {folders[0]} of {abouts[0]['suite']}; valid: "
                "runs of one version of one suite."
            )
    kept = min([*([seeds] if seeds else []), *(about["seeds"] for about in abouts)])
    for folder, about, suffix in zip(folders, abouts, names, strict=True):
        problems |= {name: Problem(**fields) for name, fields in about["problems"].items()}
        records = [cells.read(folder / CELLS / key) for key in about["cells"] if (folder / CELLS / key).is_file()]
        about["made_with"] = sorted({f"JAX {r.get('jax', '?')}, optax {r.get('optax', '?')}" for r in records})
        new = [(record["cell"][0], row) for record in records for row in rows_of(record, problems, kept)]
        # What differs on one problem goes by another name on all of them, and so does its timing.
        other = {
            row.optimizer: f"{row.optimizer} ({suffix})"
            for problem, row in new
            if row.label in rows.get(problem, {}) and not _same(rows[problem][row.label], row)
        }
        for problem, row in new:
            if row.optimizer in other:
                row = row._replace(label=f"{row.label} ({suffix})", optimizer=other[row.optimizer])
            rows.setdefault(problem, {})[row.label] = row
        if (folder / TIMING).is_file():
            times = json.loads((folder / TIMING).read_text())
            about["timed"] = {key: times.get(key) for key in ("date", "machine")}
            for problem, found in times["timing"].items():
                # The first folder's reference stays the reference: a later session's times are scaled to it.
                held = timing.setdefault(problem, {})
                scale = held[REFERENCE]["ms"] / found[REFERENCE]["ms"] if {REFERENCE} <= {*held} & {*found} else 1.0
                for name, one in found.items():
                    held.setdefault(other.get(name, name), {**one, "ms": one["ms"] * scale})
    found = {name: scores(held, timing.get(name, {})) for name, held in rows.items()}
    return Board([p for name, p in problems.items() if name in rows], rows, timing, abouts, found)


def suffixes(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of paths that tell them apart.

    >>> suffixes([Path("/a/x/run"), Path("/a/y/run"), Path("/b/z")])
    ['x/run', 'y/run', 'b/z']
    """
    parts = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts), default=0) + 1):
        ends = ["/".join(one[-count:]) for one in parts]
        if len(set(ends)) == len(set(parts)):
            return ends
    return [str(folder) for folder in folders]


def _same(one: Row, other: Row) -> bool:
    return one.status == other.status and all(
        np.array_equal(one.losses[split], other.losses[split], equal_nan=True) for split in one.losses
    )


def rows_of(record: Mapping[str, Any], problems: Mapping[str, Problem], seeds: int) -> list[Row]:
    """The rows of a record: what was chosen, and what smaller budgets chose."""
    name, optimizer, search, part = record["cell"]
    label = Cell(problems[name], optimizer, search, part).label
    kind = {"grid": TUNED}.get(search, search)
    if record["status"] != "done":
        failed = Row(label, optimizer, kind, part, record["status"], record.get("error", ""))
        small = (TEN, ONE) if search == "grid" and part == 1 else ()  # which it would have given too
        return [failed, *(failed._replace(label=f"{label}, {budget}", budget=budget) for budget in small)]
    out: list[Row] = []
    edges: dict[str, Sequence[str]] = {split: ends(record, split) for split in CURVES}
    given = record["inputs"]
    for budget, row in record["rows"].items():
        losses: dict[str, Any] = {split: cells.array(row["losses"][split])[:seeds] for split in CURVES}
        out.append(
            Row(
                f"{label}, {budget}" if budget else label,
                optimizer,
                budget or kind,
                part,
                "done",
                steps=np.array(record["steps"]),
                losses=losses,
                test={key: cells.array(values)[:seeds] for key, values in row["test"].items()},
                chosen=row["chosen"] if search != "untuned" else {},
                edge=edges if not budget else {},
                grid=grid_size(given["grid"]) if search == "grid" and "grid" in given else 0,
                sources=[source[0] for source in given.get("data", ())],
            )
        )
    return out


def ends(record: Mapping[str, Any], split: str) -> list[str]:
    """Hyper-parameters of what was chosen that lie at an end of what was tried, so that better ones may lie beyond.

    Learning rates, or a method's first parameter, as the record says. Of the others both ends but 0, which is natural
    (no weight decay).
    """
    hyper = record["rows"][""]["chosen"][split]["hyper"]
    first = next(iter(hyper), "")
    out = [first] if record.get("edge", {}).get(split) else []
    if record["cell"][2] != "grid":
        return out
    for name, value in hyper.items():
        tried = {point["hyper"][name] for point in record.get("points", ())}
        if name != first and len(tried) > 1 and (value == max(tried) or value == min(tried) != 0):
            out.append(name)
    return out


def grid_size(grid: Mapping[str, Any]) -> int:
    """Points of a grid by a record's inputs: rates × schedules × choices.

    >>> lr, decay = [1e-4, 0.1, True, 1e-3, None], [0, 0.1, False, 0, [0, 0.01, 0.1]]
    >>> grid_size({"lr": lr, "weight_decay": decay, "schedules": ["constant", "cosine"]})
    72
    """
    choices = [one[4] for name, one in grid.items() if name not in ("lr", "schedules") and one[4]]
    return LRS * len(grid["schedules"]) * math.prod(map(len, choices))


def scores(rows: Mapping[str, Row], timing: Mapping[str, Any]) -> dict[str, Score]:
    """Every row of a problem that was run; without a tuned reference there are none."""
    reference = rows.get(REFERENCE)
    if reference is None or reference.status != "done":
        return {}
    means = {split: metrics.seed_mean(reference.losses[split]) for split in CURVES}
    targets = {split: float(means[split].min()) for split in CURVES}
    first = {split: metrics.first_hit(reference.steps, means[split], targets[split]) for split in CURVES}
    out = {}
    for row in rows.values():
        if row.status != "done":
            continue
        hit = {
            split: metrics.first_hit(row.steps, metrics.seed_mean(row.losses[split]), targets[split])
            for split in CURVES
        }
        speed = {split: metrics.speed_up(first[split], hit[split]) for split in CURVES}
        slower = _ms(timing, row.optimizer) / _ms(timing, REFERENCE)
        paired = {
            split: metrics.paired_speed_ups(row.steps, row.losses[split], reference.steps, reference.losses[split])
            for split in CURVES
        }
        out[row.label] = Score(
            final={split: metrics.final(row.losses[split]) for split in CURVES},
            best={split: metrics.smoothed(row.losses[split]).min(-1) for split in CURVES},
            hit=hit,
            speed_up=speed,
            paired=paired,
            wall={split: speed[split] / slower for split in CURVES},
            paired_wall={split: paired[split] / slower for split in CURVES},
            test=row.test["loss"],
            diverged=metrics.divergence_rate(np.stack([row.losses[split] for split in CURVES]).max(0)),
        )
    return out


def _ms(timing: Mapping[str, Any], optimizer: str) -> float:
    return timing[optimizer]["ms"] if optimizer in timing else float("nan")


def totals(board: Board, labels: Sequence[str], names: Sequence[str] | None = None) -> list[Total]:
    """Over the problems `names`: those on which all of `labels` were run, if not given.

    A problem on which an optimizer crashed counts as never reached and as the worst loss. None without such a problem.
    """
    names = board.common(labels) if names is None else names
    if not names or not labels:
        return []
    seeds = min(len(board.scores[n][REFERENCE].final["validation"]) for n in names)

    def stack(label: str, get: Callable[[Score], Any], crashed: float) -> Float[np.ndarray, "T S"]:
        found = (board.scores[n].get(label) for n in names)
        return np.stack([np.full(seeds, crashed) if one is None else get(one)[:seeds] for one in found])

    def compared(get: Callable[[Score], Any]) -> dict[str, Any]:
        """Wins over the reference, and ranks among those that are ranked."""
        finals = {label: stack(label, get, np.inf) for label in labels}
        among = ranked(board, labels)
        ranks = metrics.ranks(np.stack([finals[label] for label in among])) if among else []
        reference, void = stack(REFERENCE, get, np.inf), np.full((len(names), seeds), np.nan)
        at = dict(zip(among, ranks, strict=True))
        return {label: (metrics.wins(finals[label], reference), at.get(label, void)) for label in labels}

    final, test = compared(lambda s: s.final["validation"]), compared(lambda s: s.test)
    return [_total(board, label, names, stack, final[label], test[label]) for label in labels]


def ranked(board: Board, labels: Sequence[str]) -> list[str]:
    """Labels without second rows of an optimizer, which would count its rank twice: once, T/2.

    Where there are random searches, of tuned rows only those of the most trials: the others had other budgets.
    """
    held = {row.label: row for rows in board.rows.values() for row in rows.values()}
    random = sorted({int(held[x].budget.split("-")[1]) for x in labels if held[x].budget.startswith("random-")})
    budget = f"random-{random[-1]}" if random else TUNED

    def first(row: Row) -> bool:
        tuned = row.budget == TUNED or row.budget.startswith("random-")
        return row.budget != "once" and row.part == 1 and (row.budget == budget or not tuned)

    return [label for label in labels if first(held[label])]


def _total(
    board: Board,
    label: str,
    names: Sequence[str],
    stack: Callable[..., Float[np.ndarray, "T S"]],
    final: Any,
    test: Any,
) -> Total:
    """One line of `totals`; final and test are (wins, ranks) [T, S]."""
    optimizer = next(rows[label].optimizer for rows in board.rows.values() if label in rows)
    timed = [n for n in names if {optimizer, REFERENCE} <= {*board.timing.get(n, {})}]
    times = [board.timing[n] for n in timed]
    slower = [_ms(t, optimizer) / _ms(t, REFERENCE) for t in times]
    sizes = [t[optimizer]["state_bytes"] / t[optimizer]["params_bytes"] * 4 for t in times]

    speed = {split: stack(label, lambda s, split=split: s.paired[split], 0.0) for split in CURVES}
    for split in CURVES:
        void = np.isnan(stack(REFERENCE, lambda s, split=split: s.paired[split], 0.0))
        speed[split] = np.where(void, np.nan, speed[split])
    wall = stack(label, lambda s: s.paired_wall["validation"], 0.0)
    wall = np.where(np.isnan(speed["validation"]) | ~_timed(board, names), np.nan, wall)
    interval = metrics.stratified_bootstrap
    found = [board.scores[n][label].diverged for n in names if label in board.scores[n]]
    return Total(
        label,
        iqm={split: float(metrics.iqm(x)) for split, x in speed.items()},
        interval={split: interval(metrics.iqm, x) for split, x in speed.items()},
        median={split: float(metrics.median_of_means(x)) for split, x in speed.items()},
        median_interval={split: interval(metrics.median_of_means, x) for split, x in speed.items()},
        wall=float(metrics.iqm(wall)),
        wall_interval=interval(metrics.iqm, wall),
        win=float(metrics.mean_of(final[0])),
        win_interval=interval(metrics.mean_of, final[0]),
        rank=float(metrics.mean_of(final[1])),
        rank_interval=interval(metrics.mean_of, final[1]),
        test_win=float(metrics.mean_of(test[0])),
        test_win_interval=interval(metrics.mean_of, test[0]),
        test_rank=float(metrics.mean_of(test[1])),
        test_rank_interval=interval(metrics.mean_of, test[1]),
        diverged=float(np.mean(found)) if found else float("nan"),
        failed=sum(label not in board.scores[n] for n in names),
        missing=sum(label not in board.rows[p.name] for p in board.problems),
        relative_ms=float(np.exp(np.mean(np.log(slower)))) if slower else float("nan"),
        state_bytes=float(np.mean(sizes)) if sizes else float("nan"),
    )


def _timed(board: Board, names: Sequence[str]) -> Any:
    """[T, 1] whether a problem was timed at all: only there a crash is a speed-up of 0 in time."""
    return np.array([[REFERENCE in board.timing.get(n, {})] for n in names])


class Budget(NamedTuple):
    """A baseline with a budget of tuning."""

    optimizer: str
    budget: str  # ONE, TEN or TUNED
    points: str  # runs that chose it, in words
    total: Total  # ranks are among those of the same budget


def budgets(board: Board) -> list[Budget]:
    """Every baseline tuned by a grid at 1 trial, 10 trials and in full, over the problems where all were run."""
    held = {r.label: r for rows in board.rows.values() for r in rows.values() if r.part == 1 and r.budget in BUDGETS}
    names, out = board.common(list(held)), []
    for budget in BUDGETS:
        labels = sorted(label for label, row in held.items() if row.budget == budget)
        for total in totals(board, labels, names):
            sizes = {rows[total.label].grid for rows in board.rows.values() if total.label in rows} - {0}
            size = min(sizes, default=0)
            points = {ONE: "1", TEN: f"{min(TRIALS, size)} of {size}", TUNED: f"all of {size}"}[budget]
            out.append(Budget(held[total.label].optimizer, budget, points if size else "–", total))
    return sorted(out, key=lambda one: (one.optimizer, BUDGETS.index(one.budget)))


def profile(board: Board, labels: Sequence[str], ratios: np.ndarray) -> Float[np.ndarray, "O R"]:
    """Dolan-Moré of the steps to the reference's best validation loss."""
    names = board.common(labels)
    hits = np.full((len(labels), len(names)), np.inf)
    for column, name in enumerate(names):
        found = board.scores[name]
        for at, label in enumerate(labels):
            if label in found and found[label].hit["validation"] is not None:
                hits[at, column] = found[label].hit["validation"]
    return metrics.performance_profile(hits, ratios)
