"""What a finished run leaves for people: the weights with their card, and the picture of the meta-loss."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import lopt
from lopt.base import LearnedOptimizer
from meta_train import config as cfg
from meta_train.estimators import WHOLE_EPISODES

CARD = """# {name}

A learned optimizer of the rule `{rule}`, {parameters} meta-parameters, meta-trained with lopt {version}.

```python
import lopt
tx = lopt.load("path/of/this/folder", num_steps=1000)
```

- needs: {needs}
- meta-trained on: {groups}
- {estimator}; horizons {horizons} inner steps; {meta_loss}
- {meta_steps} meta-steps, seed {seed}; last meta-loss {loss}
{chosen}- reproduce: `{command}` on JAX {jax}, {machine}
- licence: Apache-2.0

The resolved config is under `provenance` in config.json.
"""


SMOOTH = 15  # logged values, each already a mean over log_every meta-steps


class Chosen(NamedTuple):
    """A theta to export."""

    theta: Any
    step: int  # meta-steps that made it
    of: int  # meta-steps that were done
    says: str  # which one it is


def choose(state: Any, *, last: bool = False) -> Chosen:
    """The best theta of a State, where it has one, or the last."""
    at = int(state.step)
    if state.best == () or not np.isfinite(state.best.score):
        return Chosen(state.last, at, at, f"theta of meta-step {at}, the last")
    step, score = int(state.best.step), float(state.best.score)
    if last:
        return Chosen(state.last, at, at, f"theta of meta-step {at}, the last; the best in meta-validation was {step}")
    return Chosen(
        state.best.theta, step, at, f"theta of meta-step {step} of {at}, the best in meta-validation: {score:.4f}"
    )


def count(rule: LearnedOptimizer) -> int:
    """Meta-parameters of a rule."""
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(jax.eval_shape(rule.init_theta, jax.random.key(0))))


def _estimator(spec: cfg.Estimator) -> str:
    """For the card: what the estimator has of settings."""
    count = f"{spec.pairs} particles" if "backprop" in spec.name else f"{spec.pairs} antithetic pairs, std {spec.std}"
    stds = f" ({json.dumps(spec.std_parts)})" if spec.std_parts else ""
    sign = f", sign of the difference × {spec.sign}" if spec.sign else ""
    truncation = "" if spec.name in WHOLE_EPISODES else f", truncation {spec.truncation}"
    return f"{spec.name}, {count}{stds}{sign}{truncation}"


def _horizons(stage: cfg.Stage) -> str:
    later = f" (truncation {stage.truncation}, from meta-step {stage.start})" if stage.start else ""
    return f"{stage.low} to {stage.high}{later}"


def _meta_loss(run: cfg.Run) -> str:
    which = {
        "mean": "meta-loss",
        "final": "final meta-loss",
        "last": f"mean meta-loss of the last {run.last_steps} steps",
    }
    over = {"none": "", "init": ", over the loss at init", "reference": ", over the reference loss"}
    return f"{which[run.objective]} on {run.meta_loss} batches{over[run.normalise]}"


def write(
    folder: Path,
    run: cfg.Run,
    rule: LearnedOptimizer,
    chosen: Chosen,
    *,
    metrics: Sequence[dict[str, float]],
) -> Path:
    """Save a theta as an artifact with its card, which says how it was chosen; `metrics` are the run's."""
    losses = [line["meta_loss"] for line in metrics if "meta_loss" in line]
    tasks = "; ".join(f"{g.family} {json.dumps(g.settings)}" for g in run.validation.tasks)
    validated = f"- {chosen.says}; meta-validation of {run.validation.inner_steps} inner steps on: {tasks}\n"
    card = CARD.format(
        name=run.name,
        command=cfg.command(run),
        rule=rule.name,
        parameters=count(rule),
        version=lopt.__version__,
        needs=", ".join(sorted(rule.needs)) or "nothing but gradients",
        groups="; ".join(f"{g.family} {json.dumps(g.settings)}" for g in run.groups),
        estimator=_estimator(run.estimator),
        horizons=", then ".join(_horizons(stage) for stage in run.schedule()),
        meta_loss=_meta_loss(run),
        meta_steps=chosen.of,
        seed=run.seed,
        loss=f"{losses[-1]:.4f}" if losses else "unknown",
        chosen=validated if run.validation.tasks else "",
        jax=jax.__version__,
        machine=f"{platform.machine()} {jax.default_backend()} × {jax.device_count()}",
    )
    provenance = dict(
        run=run.to_json(),
        meta_steps=chosen.of,
        theta_of_meta_step=chosen.step,
        lopt=lopt.__version__,
        jax=jax.__version__,
        devices=jax.device_count(),
    )
    return lopt.save(folder, rule, chosen.theta, provenance=provenance, card=card)


def plot_meta_loss(path: Path, run: cfg.Run, metrics: Sequence[dict[str, float]]) -> None:
    """Meta-loss against meta-steps, a line a group, and the scores of meta-validation."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    validated = [(m["step"], m["validation"]) for m in metrics if "validation" in m]
    metrics = [m for m in metrics if "meta_loss" in m]
    steps = [m["step"] for m in metrics]
    styles = ("-", "--", ":", "-.")
    for i, group in enumerate(run.groups):
        loss = np.array([m.get(f"meta_loss/{i}", np.nan) for m in metrics])
        (line,) = axis.plot(steps, loss, styles[i % 4], lw=0.6, alpha=0.5)
        if len(loss) >= 2 * SMOOTH:
            mean = np.convolve(loss, np.ones(SMOOTH) / SMOOTH, mode="valid")
            axis.plot(steps[SMOOTH - 1 :], mean, styles[i % 4], lw=2, color=line.get_color())
        line.set_label(f"{group.family} (bold: mean of {SMOOTH} logged values)")
    if validated:
        best = min(validated, key=lambda point: point[1])
        axis.plot(*zip(*validated, strict=True), "k.-", lw=1, label="meta-validation, other tasks")
        axis.plot(*best, "k*", ms=12, label=f"best, meta-step {best[0]:.0f}")
    axis.set(xlabel="meta-step", ylabel=f"meta-loss ({run.meta_loss} batches)", title=f"{run.name}: rule {run.rule}")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)
