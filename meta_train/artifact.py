"""What a finished run leaves for people: the weights with their card, and the picture of the meta-loss."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
- reproduce: `{command}` on JAX {jax}, {machine}
- licence: Apache-2.0

The resolved config is under `provenance` in config.json.
"""


SMOOTH = 15  # logged values, each already a mean over log_every meta-steps


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
    theta: Any,
    *,
    meta_steps: int,
    metrics: Sequence[dict[str, float]],
) -> Path:
    """Save theta as an artifact with its card.

    Args:
      meta_steps: done so far.
      metrics: of the run.
    """
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
        meta_steps=meta_steps,
        seed=run.seed,
        loss=f"{metrics[-1]['meta_loss']:.4f}" if metrics else "unknown",
        jax=jax.__version__,
        machine=f"{platform.machine()} {jax.default_backend()} × {jax.device_count()}",
    )
    provenance = dict(
        run=run.to_json(), meta_steps=meta_steps, lopt=lopt.__version__, jax=jax.__version__, devices=jax.device_count()
    )
    return lopt.save(folder, rule, theta, provenance=provenance, card=card)


def plot_meta_loss(path: Path, run: cfg.Run, metrics: Sequence[dict[str, float]]) -> None:
    """Meta-loss against meta-steps, a line a group."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    steps = [m["step"] for m in metrics]
    styles = ("-", "--", ":", "-.")
    for i, group in enumerate(run.groups):
        loss = np.array([m[f"meta_loss/{i}"] for m in metrics])
        (line,) = axis.plot(steps, loss, styles[i % 4], lw=0.6, alpha=0.5)
        if len(loss) >= 2 * SMOOTH:
            mean = np.convolve(loss, np.ones(SMOOTH) / SMOOTH, mode="valid")
            axis.plot(steps[SMOOTH - 1 :], mean, styles[i % 4], lw=2, color=line.get_color())
        line.set_label(f"{group.family} (bold: mean of {SMOOTH} logged values)")
    axis.set(xlabel="meta-step", ylabel=f"meta-loss ({run.meta_loss} batches)", title=f"{run.name}: rule {run.rule}")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)
