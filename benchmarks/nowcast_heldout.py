"""Nowcasts on tasks that were held out: `python benchmarks/nowcast.py heldout --shared DIR`.

Adam's rate and the line's factor are tuned on validation losses of a seed that is not reported. What is done is kept as
JSON, a file a task and method, so that the command goes on where it was stopped.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import tasks
from lopt import nowcast
from meta_train.configs.nowcast_small import RUN
from meta_train.nowcast_validation import runner, smoothed, steps_to

STEPS, PERIOD, EVERY, SEEDS, TUNING = 3000, 250, 50, 3, 100
FACTORS = (0.05, 0.1, 0.25, 0.5, 1.0)
PROBE, SLACK = 5, 0.0  # of the guard
ROWS = 256  # of validation and of test, or windows of text, that losses are of; at most
SPLITS: Any = ("validation", "test")
_TEXT = {"data": "python_source", "length": 16, "batch_size": 16}
TASKS: dict[str, tuple[str, dict[str, Any], int | None]] = {
    "coordinate MLP 32-32, fashion10k": ("coordinate_mlp", {"data": "fashion10k", "hidden": (32, 32)}, None),
    "MLP 64-64, fashion10k": ("image_mlp", {"data": "fashion10k", "size": 8, "hidden": (64, 64)}, None),
    "CNN 8-16, fashion10k": ("cnn", {"data": "fashion10k", "size": 8, "channels": (8, 16), "batch_size": 32}, None),
    "GRU 32, python_source": ("rnn_lm", {**_TEXT, "width": 32, "embedding": 16}, None),
    "transformer 32, python_source": ("transformer_lm", {**_TEXT, "depth": 1, "width": 32, "heads": 2}, 2),
    "ViT 32, fashion10k": (
        "vit",
        {"data": "fashion10k", "size": 8, "patch": 4, "depth": 1, "width": 32, "batch_size": 32},
        2,
    ),
}

# Those of the config's validation: what the wrapper is told is chosen here and never on the tasks above.
CHOOSING: dict[str, tuple[str, dict[str, Any], int | None]] = {
    f"{p.family}, validation": (p.family, p.settings, p.heads or None) for p in RUN.validation.tasks
}
SCALES = (1.0, 0.5, 0.25, 0.1)


def methods(shared: Path | None, gnn: str, wnn: str) -> dict[str, tuple[str, Any, dict[str, Any]]]:
    """By name: kind, network, settings of the wrapper."""
    free, guarded = {"guard": False}, {"guard": True, "probe": PROBE, "slack": SLACK}
    found: dict[str, tuple[str, Any, dict[str, Any]]] = {
        "Adam, tuned": ("adam", None, {}),
        "Linefit, factor tuned": ("linefit", None, free),
    }
    if shared is not None:
        found["NiNo, released"] = ("nino", nowcast.read(shared / "weights/nino/nino_no_posw.npz"), free)
    return found | {
        "WNN, ours": ("wnn", nowcast.read(wnn), free),
        "NiNo, ours": ("nino", nowcast.read(gnn), free),
        "NiNo, ours, guard": ("nino", nowcast.read(gnn), guarded),
    }


def transform(
    kind: str, network: Any, how: dict[str, Any], heads: int | None, params: Any, loss_fn: Any, given: Any
) -> optax.GradientTransformation:
    """given: lr, factor, scale and theta, arguments of the compiled run, so that others need no other program."""
    adam = optax.adam(given["lr"])
    if kind == "adam":
        return adam
    every: dict[str, Any] = dict(max_steps=STEPS, period=PERIOD, loss_fn=loss_fn) | how
    if kind == "linefit":
        return nowcast.linefit(adam, factor=given["factor"], **every)
    every |= dict(network=network._replace(theta=given["theta"]), upd_scale=given["scale"])
    if kind == "wnn":
        return nowcast.wnn(adam, **every)
    return nowcast.nino(adam, graph=lambda p: nowcast.recognise(p, heads=heads), **every)


class Cells:
    """Runs of a task, kept on disk."""

    def __init__(self, folder: Path, name: str):
        family, settings, self.heads = (TASKS | CHOOSING)[name]
        self.name, self.task = name, tasks.make(family, **settings)
        self.folder = folder / "".join(c if c.isalnum() else "-" for c in name)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.compiled: dict[Any, Callable[..., Any]] = {}

    def run(
        self,
        kind: str,
        network: Any,
        how: dict[str, Any],
        seed: int,
        *,
        lr: float,
        factor: float = 0.0,
        scale: float = 1.0,
        missing: bool = True,
    ) -> Any:
        """Losses [splits, evaluations] and counts, from disk where they are there; missing: else they are run."""
        theta = () if network is None else network.theta
        weights = hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(theta))).hexdigest()[:12]
        asked = dict(kind=kind, how=how, seed=seed, lr=lr, factor=factor, scale=scale, weights=weights)
        asked |= dict(steps=STEPS, period=PERIOD, every=EVERY, task=self.task.name, version=self.task.version)
        path = self.folder / f"{hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]}.json"
        if not path.exists() and not missing:
            return None
        if not path.exists():
            key = (kind, "" if network is None else str(network.settings), json.dumps(how))
            if key not in self.compiled:
                make = partial(transform, kind, network, how, self.heads)
                self.compiled[key] = runner(self.task, make, steps=STEPS, every=EVERY, splits=SPLITS, rows=ROWS)
            given = {"lr": lr, "factor": factor, "scale": scale}
            given = {name: jnp.float32(x) for name, x in given.items()}
            seen = self.compiled[key](self.task.data, given | {"theta": theta}, seed)
            counts = {k: int(v) for k, v in seen.counts._asdict().items()} if seen.counts else {}
            record = asked | {"losses": np.asarray(seen.losses, np.float64).round(6).tolist(), "counts": counts}
            path.write_text(json.dumps(record))
        return json.loads(path.read_text())

    def tuned(self) -> float:
        """Adam's rate: the best last validation loss of a log grid that goes on until its best is inside of it."""
        found: dict[float, float] = {}
        rates = [1e-3, 3e-3, 1e-2]
        while True:
            for lr in rates:
                if lr not in found:
                    losses = self.run("adam", None, {}, TUNING, lr=lr)["losses"][0]
                    found[lr] = float(smoothed(np.array(losses))[-1])
            best = min(found, key=lambda lr: found[lr])
            if min(found) < best < max(found):
                return best
            exponent = round(2 * math.log10(best)) + (1 if best == max(found) else -1)
            rates = [float(f"{10 ** (exponent / 2):.1g}")]

    def factor(self, lr: float) -> float:
        """The line's, by the steps to Adam's last validation loss on the tuning seed, then by the last loss."""
        adam = np.array(self.run("adam", None, {}, TUNING, lr=lr)["losses"][0])
        target = float(smoothed(adam)[-1])

        def score(factor: float) -> tuple[float, float]:
            losses = self.run("linefit", None, {"guard": False}, TUNING, lr=lr, factor=factor)["losses"][0]
            return steps_to(np.array(losses), target, EVERY), float(smoothed(np.array(losses))[-1])

        return min(FACTORS, key=score)


def choose(out: Path, gnn: str, wnn: str) -> None:
    """`upd_scale` of each network on the tasks of validation, Adam's rate tuned: steps over Adam's, without a guard."""
    print("| network | upd_scale | steps over Adam's | last validation loss over Adam's |\n|---|--:|--:|--:|")
    chosen = methods(None, gnn, wnn)
    for label in ("WNN, ours", "NiNo, ours"):
        kind, network, how = chosen[label]
        for scale in SCALES:
            steps, losses = [], []
            for name in CHOOSING:
                cells = _cells(out, name)
                lr = cells.tuned()
                for seed in range(200, 202):
                    adam = np.array(cells.run("adam", None, {}, seed, lr=lr)["losses"][0])
                    end = float(smoothed(adam)[-1])
                    got = np.array(cells.run(kind, network, how, seed, lr=lr, scale=scale)["losses"][0])
                    steps.append(min(steps_to(got, end, EVERY), STEPS) / steps_to(adam, end, EVERY))
                    losses.append(float(smoothed(got)[-1]) / end)
            print(f"| {label} | {scale:g} | {np.mean(steps):.3f} | {np.mean(losses):.3f} |", flush=True)


@functools.cache
def _cells(out: Path, name: str) -> Cells:
    return Cells(out, name)


def heldout(
    shared: Path | None, out: Path, gnn: str, wnn: str, only: list[str], rows: list[str], scales: dict[str, float]
) -> None:
    """Run what is missing, and print the tables."""
    chosen = {k: x for k, x in methods(shared, gnn, wnn).items() if not rows or k in ("Adam, tuned", *rows)}
    ratios: dict[str, list[float]] = {label: [] for label in chosen}
    for name in TASKS:
        if only and not any(word in name for word in only):
            continue
        cells = Cells(out, name)
        lr = cells.tuned()
        factor = cells.factor(lr) if "Linefit, factor tuned" in chosen else math.nan
        head = "steps to Adam's last validation loss | over Adam's | last validation loss | last test loss"
        line = f", line's factor {factor:g}" if math.isfinite(factor) else ""
        print(f"\n| {name}: Adam at {lr:g}{line} | {head} | applied, restored |")
        print("|---|--:|--:|--:|--:|---|")
        targets: list[tuple[float, float]] = []
        for label, (kind, network, how) in chosen.items():
            runs = [
                cells.run(
                    kind,
                    network,
                    how,
                    seed,
                    lr=lr,
                    factor=factor if kind == "linefit" else 0.0,
                    scale=scales[kind] if "ours" in label else 1.0,
                )
                for seed in range(SEEDS)
            ]
            curves = [np.array(run["losses"][0]) for run in runs]
            if not targets:
                ends = [float(smoothed(x)[-1]) for x in curves]
                targets = [(t, steps_to(x, t, EVERY)) for x, t in zip(curves, ends, strict=True)]
            hits = [steps_to(x, t, EVERY) for x, (t, _) in zip(curves, targets, strict=True)]
            over = float(np.mean([min(h, STEPS) / base for h, (_, base) in zip(hits, targets, strict=True)]))
            ratios[label].append(over)
            steps = ", ".join("never" if math.isinf(h) else f"{h:,.0f}" for h in hits)
            last = [[float(smoothed(np.array(run["losses"][i]))[-1]) for run in runs] for i in range(2)]
            spread = " | ".join(f"{np.mean(x):.4f} ± {np.std(x):.4f}" for x in last)
            told = "; ".join(f"{c['applied']}, {c['restored']}" for run in runs if (c := run["counts"])) or "–"
            print(f"| {label} | {steps} | {over:.3f} | {spread} | {told} |", flush=True)
    print("\n| method | steps over Adam's, mean of tasks | best | worst |\n|---|--:|--:|--:|")
    for label, some in ratios.items():
        if some:
            print(f"| {label} | {np.mean(some):.3f} | {min(some):.3f} | {max(some):.3f} |")


def plot(out: Path, gnn: str, wnn: str, path: Path, names: list[str], scales: dict[str, float]) -> None:
    """Validation loss around nowcasts: Adam and the same seed with ours, of what was run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    chosen = methods(None, gnn, wnn)
    figure, axes = plt.subplots(1, len(names), figsize=(4.5 * len(names), 3.6), layout="constrained")
    at = np.arange(EVERY, STEPS + 1, EVERY)
    for axis, name in zip(np.ravel(axes), names, strict=True):
        cells = Cells(out, name)
        lr = cells.tuned()
        for i, label in enumerate(("Adam, tuned", "NiNo, ours", "NiNo, ours, guard", "WNN, ours")):
            kind, network, how = chosen[label]
            seen = cells.run(kind, network, how, 0, lr=lr, scale=scales.get(kind, 1.0), missing=False)
            if seen is None:
                continue
            losses = np.array(seen["losses"][0])
            axis.plot(at, losses, color="k" if not i else f"C{i - 1}", lw=1.2, label=label)
            if not i:
                axis.axhline(smoothed(losses)[-1], color="k", lw=0.6, ls=":")
        for step in range(PERIOD, STEPS + 1, PERIOD):
            axis.axvline(step, color="0.85", lw=0.6, zorder=0)
        axis.set(title=name, xlabel="step (lines: nowcasts)", ylabel="validation loss", yscale="log")
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)
