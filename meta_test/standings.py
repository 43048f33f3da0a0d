"""What the records of one or more runs amount to: rows of every problem, and of every optimizer over the problems."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from meta_test import cells, metrics
from meta_test.cells import Cell
from meta_test.runs import CURVES
from meta_test.session import REFERENCE
from meta_test.suites import Problem

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from tasks.base import Split

CELLS, ABOUT, TIMING = "cells", "run.json", "timing.json"
TUNED, TEN, ONE = "tuned", "10 trials", "1 trial"  # budgets of a baseline


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
    edge: Mapping[str, bool] = {}


class Board(NamedTuple):
    """Everything that was read."""

    problems: list[Problem]
    rows: dict[str, dict[str, Row]]  # problem -> label -> row
    timing: dict[str, dict[str, Any]]  # problem -> optimizer -> Timing's fields, all of one session
    abouts: list[dict[str, Any]]  # run.json of each folder
    scores: dict[str, dict[str, Score]]  # problem -> label -> score of rows that were run; none without a reference

    def labels(self) -> list[str]:
        """Full rows (neither T/2 nor a small budget), the reference first, learned rules next, then by name."""
        found = {r.label: r for rows in self.rows.values() for r in rows.values() if r.part == 1}
        main = [row for row in found.values() if row.budget not in (TEN, ONE) and row.status != "skipped"]

        def order(row: Row) -> Any:
            return row.label != REFERENCE, row.budget != "untuned", row.label

        return [row.label for row in sorted(main, key=order)]


class Score(NamedTuple):
    """A row measured against the tuned reference."""

    final: dict[Split, Float[np.ndarray, " S"]]  # last smoothed loss
    best: dict[Split, Float[np.ndarray, " S"]]  # least smoothed loss
    hit: dict[Split, int | None]  # of the curves' mean over seeds
    speed_up: dict[Split, float]
    paired: dict[Split, Float[np.ndarray, " S"]]  # speed-up on each seed
    wall: dict[Split, float]  # speed-up in time, NaN without timings
    diverged: float  # share of seeds


class Total(NamedTuple):
    """An optimizer over all problems; intervals of 95 %."""

    label: str
    iqm: dict[Split, float]
    interval: dict[Split, tuple[float, float]]
    median: dict[Split, float]
    median_interval: dict[Split, tuple[float, float]]
    wall: float  # IQM of the speed-up in time, validation
    win: float  # share of problems and seeds with a lower final validation loss than the reference
    win_interval: tuple[float, float]
    rank: float
    rank_interval: tuple[float, float]
    diverged: float
    failed: int  # problems it crashed on or was not run on
    relative_ms: float  # geometric mean over problems of its time a step over the reference's
    state_bytes: float  # a parameter, mean over problems


def load(folders: Sequence[Path], seeds: int | None = None) -> Board:
    """Read runs. Records of the same optimizer in several folders must agree, or stand side by side under two labels.

    Of runs with different numbers of seeds the seeds that all have are kept.

    Raises ValueError for a folder that is no run, and for runs of different suites.
    """
    abouts, rows, timing, problems = [], {}, {}, {}
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
    for folder, about in zip(folders, abouts, strict=True):
        problems |= {name: Problem(**fields) for name, fields in about["problems"].items()}
        records = {key: cells.read(folder / CELLS / key) for key in about["cells"] if (folder / CELLS / key).is_file()}
        for record in records.values():
            for row in rows_of(record, problems, kept):
                held = rows.setdefault(record["cell"][0], {})
                if row.label in held and not _same(held[row.label], row):
                    row = row._replace(label=f"{row.label} ({folder.name})")
                held[row.label] = row
        if (folder / TIMING).is_file():
            for problem, found in json.loads((folder / TIMING).read_text())["timing"].items():
                # The first folder's reference stays the reference: a later session's times are scaled to it.
                held = timing.setdefault(problem, {})
                scale = held[REFERENCE]["ms"] / found[REFERENCE]["ms"] if {REFERENCE} <= {*held} & {*found} else 1.0
                for name, one in found.items():
                    held.setdefault(name, {**one, "ms": one["ms"] * scale})
    found = {name: scores(held, timing.get(name, {})) for name, held in rows.items()}
    return Board([p for name, p in problems.items() if name in rows], rows, timing, abouts, found)


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
        return [Row(label, optimizer, kind, part, record["status"], record.get("error", ""))]
    out = []
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
                edge=record.get("edge", {}) if not budget else {},
            )
        )
    return out


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
        out[row.label] = Score(
            final={split: metrics.final(row.losses[split]) for split in CURVES},
            best={split: metrics.smoothed(row.losses[split]).min(-1) for split in CURVES},
            hit=hit,
            speed_up=speed,
            paired={
                split: metrics.paired_speed_ups(row.steps, row.losses[split], reference.steps, reference.losses[split])
                for split in CURVES
            },
            wall={split: speed[split] / slower for split in CURVES},
            diverged=metrics.divergence_rate(np.stack([row.losses[split] for split in CURVES]).max(0)),
        )
    return out


def _ms(timing: Mapping[str, Any], optimizer: str) -> float:
    return timing[optimizer]["ms"] if optimizer in timing else float("nan")


def totals(board: Board, labels: Sequence[str]) -> list[Total]:
    """Over the problems. A problem on which an optimizer crashed counts as never reached and as the worst loss."""
    by_problem = board.scores
    names = [name for name, found in by_problem.items() if found]
    if not names:
        return []
    seeds = min(len(found[REFERENCE].final["validation"]) for found in by_problem.values() if found)

    def stack(label: str, get: Any, missing: float) -> np.ndarray:
        lost = np.full(seeds, missing)
        return np.stack([get(by_problem[n][label])[:seeds] if label in by_problem[n] else lost for n in names])

    finals = {label: stack(label, lambda s: s.final["validation"], np.inf) for label in labels}
    ranks = metrics.ranks(np.stack([finals[label] for label in labels]))  # [O, T, S]
    out = []
    for at, label in enumerate(labels):
        speed: dict[Split, np.ndarray] = {}
        for split in CURVES:
            speed[split] = stack(label, lambda s, split=split: s.paired[split], 0.0)
            void = np.isnan(np.stack([by_problem[n][REFERENCE].paired[split][:seeds] for n in names]))
            speed[split] = np.where(void, np.nan, speed[split])
        won = metrics.wins(finals[label], finals[REFERENCE])
        wall = np.array([[by_problem[n][label].wall["validation"] if label in by_problem[n] else 0.0] for n in names])
        optimizer = next(rows[label].optimizer for rows in board.rows.values() if label in rows)
        times = [board.timing[n] for n in names if {optimizer, REFERENCE} <= {*board.timing.get(n, {})}]
        slower = [_ms(t, optimizer) / _ms(t, REFERENCE) for t in times]
        sizes = [t[optimizer]["state_bytes"] / t[optimizer]["params_bytes"] * 4 for t in times]
        interval = metrics.stratified_bootstrap
        out.append(
            Total(
                label,
                iqm={split: float(metrics.iqm(x)) for split, x in speed.items()},
                interval={split: interval(metrics.iqm, x) for split, x in speed.items()},
                median={split: float(metrics.median_of_means(x)) for split, x in speed.items()},
                median_interval={split: interval(metrics.median_of_means, x) for split, x in speed.items()},
                wall=float(metrics.iqm(wall)) if times else float("nan"),
                win=float(metrics.mean_of(won)),
                win_interval=interval(metrics.mean_of, won),
                rank=float(metrics.mean_of(ranks[at])),
                rank_interval=interval(metrics.mean_of, ranks[at]),
                diverged=float(
                    np.mean([by_problem[n][label].diverged if label in by_problem[n] else 1 for n in names])
                ),
                failed=sum(label not in by_problem[n] for n in names),
                relative_ms=float(np.exp(np.mean(np.log(slower)))) if slower else float("nan"),
                state_bytes=float(np.mean(sizes)) if sizes else float("nan"),
            )
        )
    return out


def budgets(board: Board) -> dict[str, dict[str, float]]:
    """Optimizer -> budget -> IQM of the validation speed-up to the fully tuned reference's best."""
    wanted = {r.label: r for rows in board.rows.values() for r in rows.values() if r.part == 1}
    out: dict[str, dict[str, float]] = {}
    for row in wanted.values():
        if row.budget in (TUNED, TEN, ONE):
            speed = [found[row.label].paired["validation"] for found in board.scores.values() if row.label in found]
            if speed:
                out.setdefault(row.optimizer, {})[row.budget] = float(metrics.iqm(np.stack(speed)))
    return dict(sorted(out.items()))


def profile(board: Board, labels: Sequence[str], ratios: np.ndarray) -> Float[np.ndarray, "O R"]:
    """Dolan-Moré of the steps to the reference's best validation loss."""
    hits = np.full((len(labels), len(board.problems)), np.inf)
    for column, problem in enumerate(board.problems):
        found = board.scores[problem.name]
        for at, label in enumerate(labels):
            if label in found and found[label].hit["validation"] is not None:
                hits[at, column] = found[label].hit["validation"]
    return metrics.performance_profile(hits, ratios)
