"""Loss curves of a comparison, legible in black and white."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from meta_test import compare as cmp
from meta_test import metrics

if TYPE_CHECKING:
    from tasks.base import Split

# One a row of the table: dark to light, and each its own dashes.
STYLES = (
    {"color": "#a50f15", "linestyle": "-", "linewidth": 2.0},
    {"color": "#08306b", "linestyle": (0, (6, 1.5)), "linewidth": 1.6},
    {"color": "#2171b5", "linestyle": (0, (1, 1)), "linewidth": 1.6},
    {"color": "#7f7f7f", "linestyle": (0, (5, 1.5, 1, 1.5)), "linewidth": 1.3},
)
ROWS: tuple[Split, ...] = ("validation", "train")


FLOOR = 1e-8  # losses below, which single precision rounds to 0, are drawn here


def draw(results: Sequence[cmp.Result]) -> bytes:
    """A PNG with one column a task and one row a split: means over seeds in bands from least to largest."""
    from matplotlib.figure import Figure  # without pyplot, so that no backend or display is looked for

    figure = Figure(figsize=(5.6 * len(results) + 0.4, 7.8), layout="constrained")
    rule, seeds = results[0].rows[0].name, len(results[0].rows[0].losses["train"])
    figure.suptitle(f"{rule}, untuned, against AdamW: mean and range of {seeds} seed{'s' * (seeds > 1)}", fontsize=11)
    axes = figure.subplots(len(ROWS), len(results), squeeze=False, sharex="col")
    for column, result in enumerate(results):
        title = f"{result.task.name}\n{result.problem.note}"
        axes[0, column].set_title(title, fontsize=9)
        for line, split in enumerate(ROWS):
            _panel(axes[line, column], result, split)
        axes[-1, column].set_xlabel("step")
    for line, split in enumerate(ROWS):
        axes[line, 0].set_ylabel(f"{'training' if split == 'train' else split} loss")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9, handlelength=3.2, frameon=False
    )
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=130)
    return out.getvalue()


def _panel(axis: Any, result: cmp.Result, split: Split) -> None:
    for row, style in zip(result.rows, STYLES, strict=True):
        losses = _drawable(row.losses[split])
        axis.plot(row.steps, losses.mean(axis=0), label=row.name, marker="o", markersize=4, markevery=[-1], **style)
        band = losses.min(axis=0), losses.max(axis=0)
        axis.fill_between(row.steps, *band, color=style["color"], alpha=0.13, linewidth=0)
    reference = next(row for row in result.rows if row.name == cmp.TUNED)
    target = float(metrics.seed_mean(reference.losses[split]).min())
    if np.isfinite(target):
        axis.axhline(max(target, FLOOR), color="black", linewidth=0.6, label="target: tuned AdamW's best")
    axis.set_yscale("log")
    axis.set_xlim(0, 1.01 * result.problem.num_steps)
    axis.set_ylim(*_limits(result, split))
    low, high = axis.get_ylim()
    few = high / low < 50
    axis.yaxis.set_major_formatter(lambda x, position: f"{x:g}")
    axis.yaxis.set_minor_formatter(lambda x, position: f"{x:g}" if few and f"{x:e}"[0] in "246" else "")
    axis.tick_params(which="both", labelsize=8)
    axis.grid(True, which="major", linewidth=0.4, alpha=0.5)


def _drawable(losses: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(losses), np.maximum(losses, FLOOR), np.nan)


def _limits(result: cmp.Result, split: Split) -> tuple[float, float]:
    """From below the least loss to above the largest at step 0: what blows up leaves the panel."""
    curves = [_drawable(row.losses[split]) for row in result.rows]
    finite = np.concatenate([curve[~np.isnan(curve)] for curve in curves])
    starts = np.concatenate([curve[:, 0] for curve in curves])
    starts = starts[~np.isnan(starts)]
    high = float(starts.max()) if starts.size else 1.0
    return 0.8 * float(min(finite.min(initial=high), high)), 1.5 * high
