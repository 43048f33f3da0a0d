"""A picture of a graph: columns of neurons, edges coloured by their type."""

from __future__ import annotations

import os
from html import escape
from pathlib import Path

import numpy as np

from lopt.nowcast import network as N
from lopt.nowcast.graph import Graph

NAMES = {
    N.FC: ("matrix", "#4878a8"),
    N.BIAS: ("bias", "#b0b0b0"),
    N.CONV: ("kernel", "#7a5195"),
    N.NORM: ("scale of a norm", "#8c8c40"),
    N.WORD: ("tokens", "#d1495b"),
    N.POSITION: ("positions", "#e59560"),
    N.QUERY: ("query", "#2a9d8f"),
    N.KEY: ("key", "#00798c"),
    N.VALUE: ("value", "#55a630"),
    N.RESIDUAL: ("residual", "#222222"),
    N.HEAD: ("head", "#999999"),
}
MOST = 5000  # edges; more are no picture


def draw(graph: Graph, path: str | os.PathLike[str]) -> Path:
    """Draw a graph of a small network; self-loops are left out.

    A group stands right of the groups that lead to it, keys and residuals that go back aside.

    Args:
      graph: at most 5,000 edges.
      path: ends in .svg (written without any package) or .png (needs matplotlib, extra `train`).

    Raises:
      ValueError: on another ending, or too many edges.
    """
    path = Path(path)
    source, target, kind = graph.edges()
    keep = kind != N.SELF
    source, target, kind = source[keep], target[keep], kind[keep]
    if len(source) > MOST:
        raise ValueError(f"lopt.nowcast.draw: the graph has {len(source):,} edges; valid: at most {MOST:,}.")
    if path.suffix not in (".svg", ".png"):
        raise ValueError(f"lopt.nowcast.draw: path, got {str(path)!r}; valid: ends in .svg or .png.")
    x, y = _places(graph, source, target, kind)
    labels = [(group.name, x[group.ids[0]], y[group.ids].min() - 0.6) for group in graph.groups if len(group) > 1]
    used = [k for k in NAMES if (kind == k).any()]
    if path.suffix == ".svg":
        path.write_text(_svg(x, y, source, target, kind, labels, used))
    else:
        _png(path, x, y, source, target, kind, labels, used)
    return path


def _places(graph: Graph, source: np.ndarray, target: np.ndarray, kind: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Column and row of each neuron: the longest way to its group, groups of one column below each other."""
    of = np.zeros(graph.count, int)
    for i, group in enumerate(graph.groups):
        of[group.ids] = i
    ways = {(int(a), int(b)) for a, b, k in zip(of[source], of[target], kind, strict=True) if k != N.KEY and a != b}
    column = np.zeros(len(graph.groups), int)
    for _ in graph.groups:  # a cell's state leads back to its gates: bounded, not a fixed point
        for a, b in sorted(ways):
            if (b, a) not in ways:
                column[b] = max(column[b], column[a] + 1)
    column = np.minimum(column, len(graph.groups))
    first = {i: min((column[b] for a, b in ways if a == i), default=column[i] + 1) - 1 for i in range(len(column))}
    for i, group in enumerate(graph.groups):
        if len(group) == 1:
            column[i] = first[i]  # a vector's neuron beside what it leads to
    x, y, filled = np.zeros(graph.count), np.zeros(graph.count), {}
    for i in np.argsort([len(group) == 1 for group in graph.groups], kind="stable"):
        group, c = graph.groups[i], column[i]
        start = filled.get(c, 0.0)
        x[group.ids], y[group.ids] = c, start + np.arange(len(group))
        filled[c] = start + len(group) + 1.5
    return x, y


def _svg(x, y, source, target, kind, labels, used) -> str:
    right, down, edge = 130.0, 14.0, 40.0
    x, y = edge + right * x, edge + down * (y - y.min())
    width, height = x.max() + 160, max(y.max() + edge, 40 + 18 * len(used))
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" font-family="sans-serif" '
        'font-size="10">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for a, b, k in zip(source, target, kind, strict=True):
        ends = f'x1="{x[a]:.1f}" y1="{y[a]:.1f}" x2="{x[b]:.1f}" y2="{y[b]:.1f}"'
        out.append(f'<line {ends} stroke="{NAMES.get(int(k), ("", "#000"))[1]}" stroke-opacity="0.45"/>')
    out += [
        f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3.5" fill="#f4f4f4" stroke="#333"/>' for a, b in zip(x, y, strict=True)
    ]
    for name, a, b in labels:
        out.append(f'<text x="{edge + right * a - 20:.1f}" y="{edge + down * b:.1f}">{escape(name)}</text>')
    for i, k in enumerate(used):
        at = 24 + 18 * i
        out.append(f'<rect x="{width - 130:.0f}" y="{at - 8}" width="18" height="4" fill="{NAMES[k][1]}"/>')
        out.append(f'<text x="{width - 106:.0f}" y="{at}">{NAMES[k][0]}</text>')
    return "\n".join([*out, "</svg>\n"])


def _png(path, x, y, source, target, kind, labels, used) -> None:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.collections import LineCollection
        from matplotlib.figure import Figure
    except ModuleNotFoundError as e:
        raise ValueError("lopt.nowcast.draw: .png needs matplotlib: pip install 'lopt[train]'; valid: .svg.") from e
    figure = Figure(figsize=(2 + 1.6 * (x.max() + 1), 1 + 0.16 * (np.ptp(y) + 2)))
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    ends = np.stack([np.stack([x[source], -y[source]], 1), np.stack([x[target], -y[target]], 1)], 1)
    for k in used:
        name, colour = NAMES[k]
        axes.add_collection(LineCollection(ends[kind == k], colors=colour, linewidths=0.6, alpha=0.5, label=name))
    axes.plot(x, -y, "o", ms=3.5, mfc="#f4f4f4", mec="#333")
    for name, a, b in labels:
        axes.text(a - 0.2, -b, name, fontsize=6)
    axes.legend(fontsize=6, loc="upper left", bbox_to_anchor=(1, 1))
    axes.set_axis_off()
    figure.savefig(path, dpi=120, bbox_inches="tight")
