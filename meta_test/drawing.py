"""The report's figures as SVG, legible in black and white: dashes and markers, and greys that differ in darkness."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from meta_test import metrics
from meta_test.session import REFERENCE
from meta_test.standings import Board, Row, Score, Total

if TYPE_CHECKING:
    from tasks.base import Split

# Dark to light, each with its own dashes and marker.
STYLES: tuple[dict[str, Any], ...] = (
    {"color": "#000000", "linestyle": "-", "marker": "", "linewidth": 2.2},
    {"color": "#b2182b", "linestyle": (0, (6, 1.5)), "marker": "o", "linewidth": 1.6},
    {"color": "#2166ac", "linestyle": (0, (1, 1)), "marker": "s", "linewidth": 1.6},
    {"color": "#1b7837", "linestyle": (0, (5, 1.5, 1, 1.5)), "marker": "^", "linewidth": 1.4},
    {"color": "#7b3294", "linestyle": (0, (3, 1, 1, 1, 1, 1)), "marker": "D", "linewidth": 1.3},
    {"color": "#8c6d31", "linestyle": (0, (9, 2)), "marker": "v", "linewidth": 1.3},
    {"color": "#5f5f5f", "linestyle": "-", "marker": "x", "linewidth": 1.0},
)
MARKERS = 6  # on a curve
FLOOR = 1e-8  # losses below, which single precision rounds to 0, are drawn here
WORDS = {"train": "training", "validation": "validation"}


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # without pyplot, so that no backend or display is looked for

    return Figure(figsize=(width, height), layout="constrained")


def svg(figure: Any, title: str) -> str:
    """An SVG element that scales with the page, the same for the same figure."""
    from matplotlib import rc_context

    out = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "path.simplify": True}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    # Ids are unique in one figure only, the page has many.
    slug = re.sub(r"\W+", "-", title)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{slug}-\1"', text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{slug}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{slug}-\1)", text)
    # A hundredth of a point is enough, of places and not of what is written.
    text = re.sub(r' (d|x|y|points)="[^"]*"', lambda m: re.sub(r"(\d\.\d\d)\d+", r"\1", m.group()), text)
    text = re.sub(r'<svg ([^>]*?)height="[^"]*"([^>]*?)width="[^"]*"', r"<svg \1\2", text, count=1)
    return text.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)


def curves(board: Board, problem: str, found: Mapping[str, Score], shown: Sequence[str]) -> str:
    """Validation and training loss of a problem: means over seeds in bands from least to largest."""
    rows = board.rows[problem]
    figure = _figure(9.0, 3.7)
    axes = figure.subplots(1, 2)
    splits: tuple[Split, ...] = ("validation", "train")
    for axis, split in zip(axes, splits, strict=True):
        done = {label: row for label, row in rows.items() if row.status == "done"}
        for label, row in done.items():
            if label not in shown and row.budget in ("tuned", "untuned") and row.part == 1:
                axis.plot(row.steps, _drawable(row.losses[split]).mean(0), color="#c4c4c4", linewidth=0.7, zorder=1)
        for number, label in enumerate(one for one in shown if one in done):
            _curve(axis, done[label], split, STYLES[min(list(shown).index(label), len(STYLES) - 1)], number)
        if REFERENCE in done:
            target = float(metrics.seed_mean(done[REFERENCE].losses[split]).min())
            if np.isfinite(target):
                axis.axhline(max(target, FLOOR), color="black", linewidth=0.6, linestyle=(0, (2, 2)), zorder=2)
        _scale(axis, [row.losses[split] for label, row in done.items() if label in shown])
        axis.set_title(f"{WORDS[split]} loss", fontsize=10)
        axis.set_xlabel("step", fontsize=9)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, handlelength=3.6, frameon=False)
    return svg(figure, f"curves of {problem}")


def _curve(axis: Any, row: Row, split: Split, style: Mapping[str, Any], number: int) -> None:
    losses = _drawable(row.losses[split])
    every = max(1, len(row.steps) // MARKERS)
    axis.plot(row.steps, losses.mean(0), label=row.label, markersize=4, markevery=(number % every, every), **style)
    axis.fill_between(row.steps, losses.min(0), losses.max(0), color=style["color"], alpha=0.12, linewidth=0)


def _drawable(losses: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(losses), np.maximum(losses, FLOOR), np.nan)


def _scale(axis: Any, losses: Sequence[np.ndarray]) -> None:
    """Logarithmic, from below the least loss to above the largest at step 0: what blows up leaves the panel."""
    drawn = [_drawable(x) for x in losses]
    starts = np.concatenate([x[:, 0] for x in drawn]) if drawn else np.ones(1)
    finite = np.concatenate([x[~np.isnan(x)] for x in drawn]) if drawn else np.ones(1)
    starts = starts[~np.isnan(starts)]
    high = float(starts.max()) if starts.size else 1.0
    low = float(min(finite.min(initial=high), high))
    axis.set_yscale("log")
    axis.set_ylim(0.9 * low, 1.1 * high)
    few = high / low < 50
    axis.yaxis.set_major_formatter(lambda x, position: f"{x:g}")
    axis.yaxis.set_minor_formatter(lambda x, position: f"{x:g}" if few and f"{x:e}"[0] in "246" else "")
    axis.tick_params(which="both", labelsize=8)
    axis.grid(True, which="major", linewidth=0.4, alpha=0.5)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def bars(totals: Sequence[Total]) -> str:
    """IQM of the speed-ups with their intervals; solid and hatched are validation and training loss."""
    figure = _figure(7.2, 0.9 + 0.36 * len(totals))
    axis = figure.subplots()
    ordered = sorted(totals, key=lambda t: (np.nan_to_num(t.iqm["validation"], nan=-1.0), t.label))
    for split, shift, face, hatch in (("validation", 0.19, "#bdbdbd", ""), ("train", -0.19, "#ffffff", "////")):
        at = np.arange(len(ordered)) + shift
        values = np.nan_to_num([t.iqm[split] for t in ordered])
        low, high = np.array([t.interval[split] for t in ordered]).T  # NaN: of one seed there is none
        axis.barh(
            at, values, 0.36, color=face, edgecolor="black", linewidth=0.6, hatch=hatch, label=f"{WORDS[split]} loss"
        )
        error = np.nan_to_num(np.maximum([values - low, high - values], 0))
        axis.errorbar(values, at, xerr=error, fmt="none", ecolor="black", elinewidth=1.4, capsize=3)
    axis.axvline(1, color="black", linewidth=0.8, linestyle=(0, (4, 2)))
    axis.set_yticks(range(len(ordered)), [t.label for t in ordered], fontsize=9)
    axis.set_xlabel(f"speed-up over tuned {REFERENCE}, IQM and 95 % interval", fontsize=9)
    axis.tick_params(axis="x", labelsize=8)
    _legend(figure, axis, 2)
    return svg(figure, "speed-ups")


def _legend(figure: Any, axis: Any, columns: int) -> None:
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, fontsize=8, handlelength=3.6, frameon=False
    )


def profiles(
    labels: Sequence[str], ratios: np.ndarray, shares: np.ndarray, shown: Sequence[str], name: str = "all"
) -> str:
    """Performance profiles; those not named are grey."""
    figure = _figure(7.2, 4.2)
    axis = figure.subplots()
    for label, share in zip(labels, shares, strict=True):
        if label not in shown:
            axis.step(ratios, share, where="post", color="#c4c4c4", linewidth=0.8)
    for number, label in enumerate(shown):
        share = shares[list(labels).index(label)]
        style = STYLES[min(number, len(STYLES) - 1)]
        every = max(1, len(ratios) // MARKERS)
        axis.step(
            ratios, share, where="post", label=label, markersize=4, markevery=(7 * number % every, every), **style
        )
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda x, position: f"{x:g}")
    axis.set_ylim(-0.02, 1.02)
    axis.set_xlabel("τ: steps to the target, relative to the fastest of all", fontsize=9)
    axis.set_ylabel("share of tasks solved within τ", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(True, linewidth=0.4, alpha=0.5)
    _legend(figure, axis, 3)
    return svg(figure, f"performance profile of {name}")


def rank_plot(totals: Sequence[Total], difference: float) -> str:
    """Mean ranks with their intervals, and the critical difference as a bar."""
    figure = _figure(7.2, 1.1 + 0.26 * len(totals))
    axis = figure.subplots()
    ordered = sorted(totals, key=lambda t: (-t.rank, t.label))
    at = np.arange(len(ordered))
    ranks = np.array([t.rank for t in ordered])
    low, high = np.array([t.rank_interval for t in ordered]).T
    error = np.nan_to_num(np.maximum([ranks - low, high - ranks], 0))
    axis.errorbar(ranks, at, xerr=error, fmt="o", color="black", markersize=4, elinewidth=1.2, capsize=3)
    if np.isfinite(difference) and len(ordered):
        start = ranks.min()
        axis.plot([start, start + difference], [len(ordered) - 0.3] * 2, color="#b2182b", linewidth=3)
        axis.annotate(
            f"critical difference {difference:.1f}",
            (start, len(ordered) - 0.1),
            fontsize=8,
            va="bottom",
            color="#b2182b",
        )
    axis.set_ylim(-0.6, len(ordered) + 0.7)
    axis.set_yticks(at, [t.label for t in ordered], fontsize=9)
    axis.set_xlabel("mean rank by final validation loss (1 is best) and 95 % interval", fontsize=9)
    axis.tick_params(axis="x", labelsize=8)
    axis.grid(True, axis="x", linewidth=0.4, alpha=0.5)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    return svg(figure, "mean ranks")


def sweep_plot(axis_name: str, values: Sequence[float], finals: Mapping[str, np.ndarray]) -> str:
    """Final validation loss [values, seeds] of each optimizer against what is varied."""
    from matplotlib.ticker import NullLocator

    figure = _figure(7.2, 4.4)
    axis = figure.subplots()
    for number, (label, losses) in enumerate(finals.items()):
        drawn, style = _drawable(losses), STYLES[min(number, len(STYLES) - 1)]
        axis.plot(values, drawn.mean(1), label=label, markersize=5, **style)
        axis.fill_between(values, drawn.min(1), drawn.max(1), color=style["color"], alpha=0.12, linewidth=0)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(values, [f"{v:g}" for v in values], fontsize=8)
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(lambda x, position: f"{x:g}")
    low, high = axis.get_ylim()
    axis.yaxis.set_minor_formatter(lambda x, position: f"{x:g}" if high < 50 * low else "")
    axis.tick_params(which="both", labelsize=8)
    axis.set_xlabel(axis_name, fontsize=9)
    axis.set_ylabel("final validation loss", fontsize=9)
    axis.grid(True, linewidth=0.4, alpha=0.5)
    _legend(figure, axis, 3)
    return svg(figure, f"sweep over {axis_name}")
