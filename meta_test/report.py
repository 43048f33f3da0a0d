"""What a comparison leaves behind: a record (JSON), a table (text and Markdown) and its definitions."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from lopt.console import write_whole
from meta_test import compare as cmp
from meta_test import metrics
from meta_test.cells import plain
from meta_test.entrants import WARMUP
from meta_test.runs import CURVES, EVALS

FORMAT = 1


class Table(NamedTuple):
    """Cells of one task."""

    title: str
    header: list[str]
    rows: list[list[str]]  # the last is the verdict
    notes: list[str]


def machine() -> dict[str, Any]:
    """Where the numbers come from."""
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": cpu,
        "cores": cores,
        "devices": [str(device) for device in jax.devices()],
        "platform": platform.platform(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "optax": optax.__version__,
        "lopt": importlib.metadata.version("lopt"),
        "commit": commit(),
    }


def commit() -> str | None:
    """Of the checkout this runs from, with "+" where files differ from it; None outside of one."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + "+" * bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):  # no git here, or not ours to read
        return None


def record(results: Sequence[cmp.Result], about: Mapping[str, Any]) -> dict[str, Any]:
    """Everything, as plain JSON values; numbers that are not finite are null."""
    problems = []
    for result in results:
        scores = cmp.scores(result.rows)
        problems.append(
            {
                "task": result.task.name,
                "problem": result.problem._asdict(),
                "task_version": result.task.version,
                "provenance": [source._asdict() for source in result.task.provenance],
                "seconds": round(result.seconds, 2),
                "rows": [row._asdict() | {"score": s._asdict()} for row, s in zip(result.rows, scores, strict=True)],
                "verdicts": {name: v._asdict() for name, v in cmp.verdicts(scores[0], scores[1]).items()},
                "sweeps": [sweep._asdict() for sweep in result.sweeps],
            }
        )
    protocol = {
        "evaluations": EVALS,
        "window": metrics.WINDOW,
        "schedules": cmp.SCHEDULES,
        "weight_decay": cmp.WEIGHT_DECAY,
        "warmup": WARMUP,
    }
    return plain({"format": FORMAT, **about, "protocol": protocol, "machine": machine(), "problems": problems})


def number_text(values: np.ndarray, *, percent: bool = False) -> str:
    """Mean ± standard deviation over seeds."""
    bad = int((~np.isfinite(values)).sum())
    if bad:
        return f"diverged ({bad} of {len(values)})"
    if percent:
        values = 100 * values
    mean, deviation = ".1f" if percent else ".4f", ".1f" if percent else ".4f"
    if not percent and values.mean() < 0.001:
        mean, deviation = ".1e", ".0e"
    spread = f" ± {values.std(ddof=1):{deviation}}" if len(values) > 1 else ""
    return f"{values.mean():{mean}}{spread}{' %' if percent else ''}"


def hit_text(hit: int | None, speed: float) -> str:
    if math.isnan(speed):
        return "no target"
    return "never (0×)" if hit is None else f"{hit} ({speed:.2f}×)"


def table(result: cmp.Result) -> Table:
    """The comparison on one task."""
    rows, scores = result.rows, cmp.scores(result.rows)
    verdicts, columns = cmp.verdicts(scores[0], scores[1]), {}
    for split in CURVES:
        columns[f"{split} loss"] = _marked([score.final[split] for score in scores], percent=False)
    for name in ("loss", "accuracy"):
        if name in rows[0].test:
            columns[f"test {name}"] = _marked([score.test[name] for score in scores], percent=name == "accuracy")
    for split in CURVES:
        columns[f"{split} speed-up"] = [hit_text(score.hit[split], score.speed_up[split]) + " " for score in scores]
    judged = [verdicts[name].outcome.upper() + (" " if verdicts[name].unanimous else "~") for name in columns]
    lines = [list(line) for line in zip([row.name for row in rows], *columns.values(), strict=True)]
    header = ["", *(name.replace("speed-up", "target (×)") + " " for name in columns)]
    title = f"{result.task.name}, T={result.problem.num_steps}: {result.problem.note}"
    return Table(title, header, [*lines, [f"{rows[0].name}, verdict", *judged]], _choices(rows))


def _marked(values: Sequence[np.ndarray], *, percent: bool) -> list[str]:
    """Cells of a column, the best marked; percentages are better when higher."""
    best = metrics.choose(np.stack(values) * (-1 if percent else 1))
    texts = [number_text(v, percent=percent) for v in values]
    return [text + ("*" if i == best and np.isfinite(values[i]).all() else " ") for i, text in enumerate(texts)]


def _choices(rows: Sequence[cmp.Row]) -> list[str]:
    def text(point: cmp.Point) -> str:
        return f"lr {point.lr:.2e} {point.schedule}{' (!)' if point.edge else ''}"

    return [
        f"{row.name}: " + "; ".join(f"for {split} loss {text(point)}" for split, point in row.chosen.items())
        for row in rows
        if row.chosen and row.name != cmp.UNTUNED
    ]


def summary(results: Sequence[cmp.Result]) -> str:
    """One line: columns won and lost."""
    found = [v.outcome for r in results for v in cmp.verdicts(*cmp.scores(r.rows)[:2]).values()]
    name = results[0].rows[0].name
    counts = f"won {found.count('won')}, lost {found.count('lost')}, tied {found.count('tie')} of {len(found)} columns"
    return f"{name} (untuned) against {cmp.TUNED} per task: {counts}."


def definitions(lrs: Sequence[float]) -> str:
    """What the columns and rows mean, in Markdown."""
    grid = f"{len(lrs)} learning rates from {min(lrs):.3g} to {max(lrs):.3g}"
    schedules = f"constant and cosine to 0 with {WARMUP:.0%} warm-up"
    return f"""\
- The last line of a table judges the learned rule against "{cmp.TUNED}", column by column, by means over the seeds;
  `~`: not every seed agrees. `*`: the best mean of the column. `diverged`: a loss was not finite.
- Curves: mean loss on a fixed part of each split, at most {EVALS + 1} times from step 0 to T.
  Smoothed: the median of the last {metrics.WINDOW} evaluations. Final: the last smoothed loss.
  Means ± standard deviations are over the seeds.
- Paired: a seed fixes data, initial weights and every minibatch, for all optimizers alike.
- {cmp.TUNED}: on this very task, {grid} (log-spaced),
  each {schedules}, on all seeds; weight decay {cmp.WEIGHT_DECAY:g}, the rest as in optax.
  Shown is the point of least mean final validation loss; in the columns of training loss the point of least mean
  final training loss, so that neither is a soft target. `(!)`: chosen at the edge of the grid, so that a better
  learning rate may lie beyond.
- {cmp.HALF}: the same grid for half the steps (its cosine ends at T/2): what a shorter schedule alone gains.
- {cmp.UNTUNED}: constant learning rate. The learned rule is not tuned either; it is told T.
- Target (×): the first step at which the smoothed loss, averaged over the seeds, is at or below the best of
  "{cmp.TUNED}"; in brackets the speed-up: the step of "{cmp.TUNED}" over this one, 0 if never.
"""


def as_text(one: Table) -> str:
    """Aligned columns."""
    grid = [one.header, *one.rows]
    widths = [max(len(line[i]) for line in grid) for i in range(len(one.header))]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in grid
    ]
    lines = [line.rstrip() for line in lines]
    rule = "-" * max(len(line) for line in lines)
    return "\n".join([one.title, rule, lines[0], rule, *lines[1:-1], rule, lines[-1], *one.notes])


def as_markdown(tables: Sequence[Table], line: str, about: Mapping[str, Any]) -> str:
    """The whole report."""
    out = [f"# {about['optimizer']} against tuned AdamW", "", line, ""]
    for one in tables:
        cells = [[c.replace("*", "\\*").replace("~", "\\~").strip() for c in line] for line in (one.header, *one.rows)]
        lines = ["| " + " | ".join(line) + " |" for line in cells]
        lines[-1] = "| " + " | ".join(f"**{c}**" for c in cells[-1]) + " |"
        align = "|:--" + "|--:" * (len(one.header) - 1) + "|"
        out += [f"## {one.title}", "", lines[0], align, *lines[1:], "", *(f"- {note}" for note in one.notes), ""]
    what = f"{about['command']}; {about['date']}; {about['wall_seconds']:.0f} s; seeds {about['seeds']}"
    where = machine()
    return "\n".join(
        [
            *out,
            "![curves](comparison.png)",
            "",
            "## Definitions",
            "",
            definitions(about["lrs"]),
            f"Made by `{what}` on {where['cpu']}, {where['cores']} cores, JAX {where['jax']}.",
            "",
        ]
    )


def as_rich(one: Table) -> Any:
    """For a terminal."""
    from rich.table import Table as RichTable

    out = RichTable(title=one.title, title_justify="left", caption="\n".join(one.notes), caption_justify="left")
    for i, name in enumerate(one.header):
        out.add_column(name, justify="left" if i == 0 else "right")
    for line in one.rows[:-1]:
        out.add_row(*line)
    out.add_section()
    out.add_row(*one.rows[-1], style="bold")
    return out


def write(folder: Path, files: Mapping[str, str | bytes]) -> None:
    """Write each file whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_whole(folder / name, content)


def dump(value: Any) -> str:
    return json.dumps(value, indent=1, allow_nan=False) + "\n"
