"""A nowcast run: record trajectories, train networks on them, keep the best by real runs, export.

A run directory holds config.json, trajectories/ (array_record and their manifest), metrics.jsonl, tensorboard/,
checkpoints/, a folder of weights a network and a picture. All of it is a function of the config: which trajectories,
windows and strides a meta-step sees follows from its number, so that a run that is resumed goes on bit for bit.
"""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import lopt
from lopt import nowcast
from lopt.console import progress, span
from meta_train import nowcast_training as training
from meta_train import trajectories
from meta_train.checkpoint import Checkpoints
from meta_train.loop import Meter, stop_requests, too_many
from meta_train.meta_optimizer import shorter_warmup
from meta_train.nowcast_config import Nowcasting
from meta_train.nowcast_validation import validator
from meta_train.record import Log, read_metrics

FOLDER = "trajectories"
JUDGED = 16  # held-out batches that the loss of validation is a mean of

CARD = """# {name}

The {what} of nowcasts (NiNo, arXiv:2409.04434), {parameters} weights, meta-trained with lopt {version}.

```python
from lopt import nowcast
network = nowcast.read("path/of/this/folder")
tx = nowcast.{function}(optax.adam(1e-3), network=network, {graph}max_steps=3000, period=250, loss_fn=held_out_loss)
```

- recorded: {recorded}
- Adam and AdamW (decays {decays}) at {lrs}, {seeds} seeds each, a state every {interval} steps
- masked L1 over {horizons} horizons, {trajectories} trajectories × {windows} windows a meta-step, strides {strides}
- {steps} meta-steps, seed {seed}; {chosen}
- reproduce: `lopt-train {command}` on JAX {jax}, {machine}
- licence: Apache-2.0

The resolved config is under `provenance` in config.json.
"""


def pinned(run: Nowcasting) -> Nowcasting:
    """The run as it is recorded in its directory: with the data that its sources serve.

    Raises ValueError for tasks that cannot be made, whose gradients are not those of a loss where they are recorded, or
    that are held out, also where they only choose the best theta.
    """
    recorded, chosen_by = run.recording.groups, run.validation.tasks
    trajectories.refuse(run, [*map(trajectories.make, recorded), *map(trajectories.task_of, chosen_by)])

    def settled(groups: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(dataclasses.replace(group, settings=trajectories.pinned(group)) for group in groups)

    return dataclasses.replace(
        run,
        recording=dataclasses.replace(run.recording, groups=settled(recorded)),
        validation=dataclasses.replace(run.validation, tasks=settled(chosen_by)),
    )


def wirings(run: Nowcasting, held: Sequence[trajectories.Held]) -> list[Any]:
    """Of each task. Raises ValueError if a structure is not recognised."""
    return [
        training.replicated(run, training.wiring(one.leaves, group.heads))
        for one, group in zip(held, run.recording.groups, strict=True)
    ]


def train(run: Nowcasting, folder: Path, say: Callable[[str], None]) -> tuple[training.State | None, int]:
    """Record, then train from the newest good checkpoint, or from the start.

    Returns:
      (State, signal): signal is 0 when all meta-steps are done, else what stopped the run (everything is saved). The
      state is None if it was stopped while tasks were recorded.
    """
    with stop_requests() as stop:
        with progress("state", trajectories.total(run)) as report:
            try:
                held = trajectories.record(run, folder / FOLDER, report, stop)
            except trajectories.StoppedError:
                return None, stop()
        size = sum((folder / FOLDER / one.file).stat().st_size for one in held)
        many = sum(len(one.trajectories) for one in held)
        short = sum(
            t["states"] < g.steps // run.recording.interval
            for one, g in zip(held, run.recording.groups, strict=True)
            for t in one.trajectories
        )
        say(f"{many} trajectories of {len(held)} tasks, {size / 1e6:.0f} MB, {short} ended early (not finite)")
        return _train(run, folder, held, say, stop)


def _train(
    run: Nowcasting, folder: Path, held: Sequence[trajectories.Held], say: Callable[[str], None], stop: Any
) -> tuple[training.State, int]:
    (step, losses), judge = training.meta_step(run), validator(run)
    wired = wirings(run, held)
    checkpoints = Checkpoints(folder / "checkpoints", run.identity(), layout=f"{jax.device_count()} devices")
    state = training.replicated(run, training.init(run))
    at, saved, remarks = checkpoints.restore(jax.eval_shape(lambda: state))
    for remark in remarks:
        say(remark)
    checkpoints.set_aside_after(at)
    if at >= 0:
        state = training.replicated(run, saved)
        say(f"resuming at meta-step {at} of {run.training.steps}")
    at, came = max(at, 0), 0
    log = Log(folder, after=at)
    kept = iter(trajectories.batches(run, folder / FOLDER, held, validation=True)) if run.recording.held else None
    judged = [next(kept) for _ in range(JUDGED)] if kept else []
    stream = trajectories.batches(run, folder / FOLDER, held, first=at)
    meter, notes = Meter(work=lambda _: 1), ["", ""]
    try:
        with progress("meta-step", run.training.steps, start=at) as report:
            while at < run.training.steps and not came:
                batch = next(stream)
                state, metrics = step(state, wired[int(batch["task"][0])], batch["states"], batch["valid"])
                meter.add(metrics)
                at, came = at + 1, stop()
                last = at == run.training.steps
                save = at % run.checkpoint_every == 0 or last or came
                line: dict[str, float] = {}
                if at % run.log_every == 0 or save:
                    line = _line(meter, state.skipped)
                    notes[0] = _progress(run, line)
                if at % run.validation.every == 0 or last:
                    with meter.paused():
                        found = _losses(losses, wired, judged, state)
                        if judge:
                            state, scores = _validate(run, judge, state, at)
                            found |= scores
                    line |= found
                    notes[1] = "".join(
                        f"  {name}: steps × {found[f'validation/{name}']:.3f}, best {float(state.score[name]):.3f}"
                        for name in run.networks
                        if f"validation/{name}" in found
                    )
                if line:
                    log.write({"step": at, **line})
                    report(at, "".join(notes))
                    _refuse_divergence(run, at, state)
                if save:
                    checkpoints.save(at, state, float(line.get(f"loss/{run.networks[0]}", np.inf)))
    finally:
        checkpoints.close()
        log.close()
    return state, came if at < run.training.steps else 0


def _line(meter: Meter, skipped: dict[str, Any]) -> dict[str, float]:
    """Means of what was measured since the last line; waits for the device."""
    window, speed = meter.window()
    names = sorted({name for one in window for name in one})
    line = {name: float(np.mean([one[name] for one in window])) for name in names}
    line |= {f"skipped/{name}": float(n) for name, n in skipped.items()}
    line["steps_per_second"] = round(speed, 2)  # a meta-step counts as one
    return line


def _progress(run: Nowcasting, line: dict[str, float]) -> str:
    each = "  ".join(f"{n} {line[f'loss/{n}']:.4f} (× {line[f'relative/{n}']:.3f} of staying)" for n in run.networks)
    return f"{each}  {line['steps_per_second']:.1f} meta-steps/s"


def _losses(losses: Any, wired: Any, judged: Any, state: training.State) -> dict[str, float]:
    """On recordings that are not trained on."""
    seen = [jax.device_get(losses(state.theta, wired[int(b["task"][0])], b["states"], b["valid"])) for b in judged]
    return {name: float(np.mean([one[name] for one in seen])) for name in (seen[0] if seen else ())}


def _validate(run: Nowcasting, judge: Any, state: training.State, at: int) -> tuple[training.State, dict[str, float]]:
    """The state with what is best by real runs now, and their scores."""
    found, best, score, when = {}, dict(state.best), dict(state.score), dict(state.at)
    for name in run.networks:
        found[f"validation/{name}"] = got = judge(name, state.theta[name])
        if got < float(score[name]):
            best[name], score[name], when[name] = state.theta[name], np.float32(got), np.int32(at)
    return training.replicated(run, state._replace(best=best, score=score, at=when)), found


def _refuse_divergence(run: Nowcasting, at: int, state: training.State) -> None:
    lost = {name: int(n) for name, n in state.skipped.items()}
    if too_many(max(lost.values()), at, run.skip_limit):
        raise ValueError(
            f"lopt-train: gradients that were not finite, of {at}: {lost}, more than skip_limit = {run.skip_limit} "
            "allows. They did not move theta; valid: a smaller training.lr, or float32, in a new run."
        )


def chosen(run: Nowcasting, state: training.State, done: int, name: str, *, last: bool = False) -> tuple[Any, int, str]:
    """Theta to export, its meta-step, and in words which it is; done: meta-steps of the state."""
    if last or not np.isfinite(float(state.score[name])):
        early = "" if done == run.training.steps else f", stopped there of {run.training.steps}"
        return state.theta[name], done, f"the last theta, of meta-step {done}{early}"
    at = int(state.at[name])
    says = f"theta of meta-step {at}, the best in validation by real runs: {float(state.score[name]):.3f} of the steps"
    return state.best[name], at, says


def export(run: Nowcasting, state: training.State, done: int, target: Path, *, last: bool = False) -> list[str]:
    """Write an artifact a network: the first at `target`, others beside it with their names; says which."""
    lines, made = [], training.networks(run)
    for i, name in enumerate(run.networks):
        theta, at, says = chosen(run, state, done, name, last=last)
        network = made[name]._replace(theta=jax.device_get(theta))
        folder = target if i == 0 else target.with_name(f"{target.name}-{name}")
        provenance = dict(run=run.to_json(), theta_of_meta_step=at, lopt=lopt.__version__, jax=jax.__version__)
        nowcast.save(folder, network, provenance=provenance, card=_card(run, network, says))
        lines.append(f"{folder}: {says}")
    return lines


def _card(run: Nowcasting, network: Any, says: str) -> str:
    on, gnn = run.recording, network.name == "gnn"
    return CARD.format(
        name=f"{run.name}: {network.name}",
        what="graph network" if gnn else "network that sees each weight alone (WNN+)",
        parameters=f"{sum(int(np.size(x)) for x in jax.tree.leaves(network.theta)):,}",
        version=lopt.__version__,
        function="nino" if gnn else "wnn",
        graph="graph=None, " if gnn else "",
        recorded="; ".join(f"{g.family} {g.settings}, {g.steps:,} steps" for g in on.groups),
        decays=", ".join(f"{x:g}" for x in on.weight_decays),
        lrs=", ".join(f"{x:g}" for x in on.lrs),
        seeds=on.seeds,
        interval=on.interval,
        horizons=run.horizons,
        trajectories=run.training.trajectories,
        windows=run.training.windows,
        strides=", ".join(map(str, run.training.strides)),
        steps=run.training.steps,
        seed=run.seed,
        chosen=says,
        command=run.name,
        jax=jax.__version__,
        machine=f"{platform.machine()} {jax.default_backend()} × {jax.device_count()}",
    )


def plot(path: Path, run: Nowcasting, metrics: Sequence[dict[str, float]]) -> None:
    """Loss relative to staying against meta-steps, on what is trained on and on what is not, and the real runs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for i, name in enumerate(run.networks):
        for key, style, alpha in (("relative", "-", 0.35), ("held_relative", "o-", 1.0)):
            points = [(m["step"], m[f"{key}/{name}"]) for m in metrics if f"{key}/{name}" in m]
            label = f"{name}, {'trained on' if key == 'relative' else 'other trajectories'}"
            if points:
                axes[0].plot(*zip(*points, strict=True), style, color=f"C{i}", alpha=alpha, ms=4, label=label)
        points = [(m["step"], m[f"validation/{name}"]) for m in metrics if f"validation/{name}" in m]
        if points:
            axes[1].plot(*zip(*points, strict=True), "o-", color=f"C{i}", ms=4, label=name)
    axes[0].set(xlabel="meta-step", ylabel="L1, over that of staying", title=run.name)
    axes[1].set(xlabel="meta-step", ylabel="steps to Adam's last loss, over Adam's", title="other tasks, real runs")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.axhline(1.0, color="k", lw=0.6)
        axis.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _say(text: str) -> None:
    print(text, flush=True)


def go(run: Nowcasting, folder: Path, say: Callable[[str], None] = _say) -> int:
    """Train in a run directory, then write what a run leaves behind; the exit code."""
    began = time.monotonic()
    say(f"{run.name}: {', '.join(run.networks)}, {run.training.steps} meta-steps, run directory {folder}")
    for line in shorter_warmup("training.warmup", run.training.warmup, run.training.steps):
        say(line)
    state, came = train(run, folder, say)
    if came or state is None:
        say(f"stopped and saved; go on with: lopt-train resume {folder}")
        return 128 + came
    say(f"done in {span(time.monotonic() - began)}")
    metrics = read_metrics(folder)
    for line in export(run, state, run.training.steps, folder / "artifact"):
        say(line)
    plot(folder / "meta_loss.png", run, metrics)
    return 0


def read_state(run: Nowcasting, folder: Path) -> tuple[training.State, int]:
    """Of the newest good checkpoint, and its meta-step. Raises ValueError if there is none."""
    checkpoints = Checkpoints(folder / "checkpoints", run.identity())
    at, state, _ = checkpoints.restore(jax.eval_shape(lambda: training.init(run)))
    checkpoints.close()
    if at < 0:
        raise ValueError(f"lopt-train export: {folder} has no checkpoint that can be read.")
    return state, at
