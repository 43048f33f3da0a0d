"""A run: one jitted meta-step, the host loop around it, and the run directory it fills."""

from __future__ import annotations

import importlib
import inspect
import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import tasks
from lopt import rules
from lopt.base import LearnedOptimizer, unknown
from lopt.console import progress
from lopt.pretrained import named_leaves, read
from meta_train import config as cfg
from meta_train import distributed, meta_optimizer
from meta_train.checkpoint import Checkpoints
from meta_train.estimators import REGISTRY as ESTIMATORS
from meta_train.estimators.base import Estimate, Estimator
from meta_train.inner import Horizon, Inner, make_inner

AXIS = "particles"
PROFILED = (2, 6)  # meta-steps of a trace, counted from the first of this process


class State(NamedTuple):
    """What a meta-step changes and a checkpoint holds; also, with other leaves, the layout of the same."""

    step: Any  # () int32, meta-steps done
    theta: Any
    opt: Any  # of the meta-optimizer
    estimators: Any  # tuple, one a group, particles on the leading axis
    skipped: Any  # () int32, meta-steps whose gradient was not finite and was not applied
    ema: Any = ()  # moving average of theta, if the run has one: what is exported then

    @property
    def exported(self) -> Any:
        """Theta for those who use it."""
        return self.theta if self.ema == () else self.ema


class Stage(NamedTuple):
    """A part of the curriculum: one jitted function."""

    start: int  # its first meta-step
    meta_step: jax.stages.Wrapped
    inner_steps: int  # inner updates in one meta-step, both signs counted; at most, where episodes are whole


class Program(NamedTuple):
    """A run, compiled lazily.

    Fields:
      rule: that is meta-trained.
      data: pytree of the groups' data, on every device.
      init: `() -> State`.
      stages: each with its `meta_step: (data, State) -> (State, metrics)`; State is donated and of the same shapes in
        all; metrics are scalars by name.
      place: puts a State of host arrays on the devices.
    """

    rule: LearnedOptimizer
    data: tuple[Any, ...]
    init: Callable[[], State]
    stages: tuple[Stage, ...]
    place: Callable[[State], State]

    def at(self, step: int) -> Stage:
        """The stage of a meta-step, counted from 0."""
        return max((stage for stage in self.stages if stage.start <= step), key=lambda stage: stage.start)

    @property
    def meta_step(self):
        """Of the first stage."""
        return self.stages[0].meta_step

    @property
    def inner_steps(self) -> int:
        """Of the first stage."""
        return self.stages[0].inner_steps


def make_estimator(spec: cfg.Estimator, inner: Inner, template: Any, truncation: int) -> Estimator:
    """The estimator of a config, given those of the settings that it takes.

    Raises:
      ValueError: for an unknown estimator, a setting it does not have, or a value out of range.
    """
    if spec.name not in ESTIMATORS:
        raise unknown("config.estimator.name", "estimator", spec.name, ESTIMATORS)
    factory = getattr(importlib.import_module(ESTIMATORS[spec.name]), spec.name)
    takes = inspect.signature(factory).parameters
    for name, setting, got in (("sign", "sign", spec.sign), ("std_parts", "std", spec.std_parts)):
        if got and setting not in takes:
            raise ValueError(
                f"config.estimator.{name}, got {got}; valid: none, since {spec.name} does not perturb theta."
            )
    std = spec.std
    if spec.std_parts:
        std = meta_optimizer.by_part("config.estimator.std_parts", template, spec.std_parts, spec.std)
    settings = dict(pairs=spec.pairs, particles=spec.pairs, std=std, truncation=truncation, sign=spec.sign)
    return factory(inner, **{name: value for name, value in settings.items() if name in takes})


def _start(run: cfg.Run, rule: LearnedOptimizer, start: Path | None) -> Any | None:
    """Theta of `init_from`, or None. Raises ValueError if it is another rule's or of another shape."""
    if not run.init_from:
        return None
    other, theta = read(start or run.init_from)
    ours, theirs = (
        {name: x.shape for name, x in named_leaves(t).items()}
        for t in (jax.eval_shape(rule.init_theta, jax.random.key(0)), theta)
    )
    if other.name != rule.name or ours != theirs:
        raise ValueError(
            f"config.init_from: {run.init_from} is {other.name} {dict(other.settings)}; "
            f"valid: an artifact of {rule.name} with theta of the same shapes as {dict(rule.settings)}."
        )
    return theta


def build(run: cfg.Run, start: Path | None = None) -> Program:
    """Resolve names and assemble the meta-step.

    Args:
      run: what to build.
      start: where the artifact of `run.init_from` is now, if not there.

    Raises:
      ValueError: for an unknown rule, task, estimator or setting, a value out of range, or pairs that do not divide
        over the devices.
    """
    rule = rules.make(run.rule, **run.rule_settings)
    group_tasks = [tasks.make(group.family, **group.settings) for group in run.groups]
    available = jax.device_count()
    devices = jax.devices()[: _devices(run.estimator.pairs, available)]
    if distributed.several() and len(devices) < available:
        raise ValueError(
            f"config.estimator.pairs, got {run.estimator.pairs}; valid: a multiple of the {available} devices of all "
            "processes."
        )
    mesh = jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)
    start_theta = _start(run, rule, start)
    template = jax.eval_shape(rule.init_theta, jax.random.key(0))
    tx = meta_optimizer.make(run.meta_optimizer, run.meta_steps, template, run.freeze)
    decay = run.meta_optimizer.ema
    weights = [group.weight / sum(g.weight for g in run.groups) for group in run.groups]
    seed = partial(jax.random.fold_in, jax.random.key(run.seed))

    def estimator(stage: cfg.Stage, group: int, data: Any) -> Estimator:
        inner = make_inner(
            rule,
            group_tasks[group]._replace(data=data),
            horizon=Horizon(stage.low, stage.high),
            meta_loss=run.meta_loss,
            loss_limit=run.loss_limit,
            objective=run.objective,
            last_steps=run.last_steps,
            normalise=run.normalise,
            reference_loss=run.groups[group].reference_loss,
            stagger=run.horizon.staggered,
        )
        return make_estimator(run.estimator, inner, template, stage.truncation)

    spread, everywhere = PartitionSpec(AXIS), PartitionSpec()
    layout = State(everywhere, everywhere, everywhere, spread, everywhere, everywhere)

    shardings = State(*(NamedSharding(mesh, part) for part in layout))
    # Copies, so that no donated buffer is shared with another one or with the host: device_put may alias both.
    place = jax.jit(lambda state: jax.tree.map(jnp.copy, state), out_shardings=shardings)

    def initial() -> State:
        theta_key, *group_keys = jax.random.split(seed(0), 1 + len(group_tasks))
        theta = rule.init_theta(theta_key) if start_theta is None else start_theta

        @jax.jit
        def particles(keys, data, theta):
            first = run.schedule()[0]
            each = enumerate(zip(data, keys, strict=True))
            return tuple(estimator(first, i, d).init(key, theta) for i, (d, key) in each)

        states = particles(group_keys, tuple(task.data for task in group_tasks), theta)
        zero = jnp.zeros((), jnp.int32)
        # Apart from theta, since a state that is donated may not share buffers with itself.
        return State(zero, theta, tx.init(theta), states, zero, jax.tree.map(jnp.copy, theta) if decay else ())

    def local_estimates(stage, data, step, theta, states) -> tuple[list[Estimate], tuple[Any, ...]]:
        """Runs on every device with its share of the particles."""
        key = jax.random.fold_in(seed(1), step)
        out = [
            estimator(stage, i, d).estimate(jax.random.fold_in(key, i), theta, state)
            for i, (d, state) in enumerate(zip(data, states, strict=True))
        ]
        return [estimate.across(AXIS) for estimate, _ in out], tuple(state for _, state in out)

    def meta_step(stage, data, state: State) -> tuple[State, dict[str, jax.Array]]:
        estimates = jax.shard_map(
            partial(local_estimates, stage),
            mesh=mesh,
            in_specs=(everywhere, everywhere, everywhere, spread),
            out_specs=(everywhere, spread),
            check_vma=False,
        )
        found, estimators = estimates(data, state.step, state.theta, state.estimators)
        grad = jax.tree.map(lambda *gs: sum(w * g for w, g in zip(weights, gs, strict=True)), *(e.grad for e in found))
        norm = optax.tree.norm(grad)
        usable = jnp.isfinite(norm)
        updates, opt = tx.update(grad, state.opt, state.theta)
        theta = optax.apply_updates(state.theta, updates)
        theta, opt, ema = jax.tree.map(
            lambda new, old: jnp.where(usable, new, old),
            (theta, opt, meta_optimizer.average(state.ema, theta, decay)),
            (state.theta, state.opt, state.ema),
        )
        skipped = state.skipped + (1 - usable.astype(jnp.int32))
        metrics: dict[str, Any] = {
            "meta_loss": sum(w * e.loss for w, e in zip(weights, found, strict=True)),
            "grad_norm": norm,
            "diverged": sum(e.diverged for e in found),
            "resets": sum(e.resets for e in found),
            "skipped": skipped,
            **{f"meta_loss/{i}": e.loss for i, e in enumerate(found)},
            **{f"grad_norm/{i}": e.norm for i, e in enumerate(found)},
            **{f"diverged/{i}": e.diverged for i, e in enumerate(found)},
            **{f"skipped/{i}": 1 - jnp.isfinite(e.norm).astype(jnp.int32) for i, e in enumerate(found)},
        }
        return State(state.step + 1, theta, opt, estimators, skipped, ema), metrics

    def compiled(stage: cfg.Stage) -> Stage:
        each = enumerate(group_tasks)
        inner_steps = sum(estimator(stage, i, task.data).inner_steps for i, task in each)
        # Said and not left to XLA, which replicates empty leaves: the next call would be compiled again.
        out = shardings, NamedSharding(mesh, everywhere)
        return Stage(stage.start, jax.jit(partial(meta_step, stage), donate_argnums=1, out_shardings=out), inner_steps)

    # By way of the host: an array of one process cannot be spread over the devices of all.
    data = jax.device_put(jax.device_get(tuple(task.data for task in group_tasks)), NamedSharding(mesh, everywhere))
    stages = tuple(compiled(stage) for stage in run.schedule())
    program = Program(rule, data, lambda: place(jax.device_get(initial())), stages, place)
    for stage in program.stages:  # errors of settings surface before anything is written
        jax.eval_shape(stage.meta_step, data, jax.eval_shape(initial))
    return program


def param_shapes(run: cfg.Run) -> list[dict[str, tuple[int, ...]]]:
    """Shapes of the params of each group's tasks, by "/"-joined key path."""
    out = []
    for group in run.groups:
        task = tasks.make(group.family, **group.settings)
        params = jax.eval_shape(lambda key, task=task: task.init(key, task.sample(key)), jax.random.key(0))
        named = jax.tree.leaves_with_path(params)
        out.append({jax.tree_util.keystr(path, simple=True, separator="/"): x.shape for path, x in named})
    return out


def _devices(pairs: int, available: int) -> int:
    """The largest number of devices over which the pairs divide evenly."""
    return next(n for n in range(min(pairs, available), 0, -1) if pairs % n == 0)


class Log:
    """metrics.jsonl, the record, and TensorBoard events, a view of it."""

    def __init__(self, folder: Path, after: int):
        """Cut the record back to meta-step `after`: later ones will be run again."""
        from tensorboardX import SummaryWriter

        self._path = folder / "metrics.jsonl"
        kept = [line for line in read_metrics(folder) if line["step"] <= after]
        partial_path = folder / ".metrics.jsonl.partial"
        partial_path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        partial_path.replace(self._path)
        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=after + 1)

    def write(self, line: dict[str, float]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        for name, value in line.items():
            if name != "step":
                self._events.add_scalar(name, value, int(line["step"]))

    def close(self) -> None:
        self._events.close()


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Whole lines of a run's metrics.jsonl; one that a kill cut short is left out."""
    path = folder / "metrics.jsonl"
    lines = []
    for text in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict) and "step" in line:
            lines.append(line)
    return lines


@contextmanager
def stop_requests() -> Iterator[Callable[[], int]]:
    """Turn SIGINT and SIGTERM into a question: the number of the signal that came, or 0. A second ctrl-C interrupts."""
    came = 0

    def note(number, frame):
        nonlocal came
        if came == signal.SIGINT == number:
            raise KeyboardInterrupt
        came = number

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(
    run: cfg.Run, program: Program, folder: Path, say: Callable[[str], None], *, profile: bool = False
) -> tuple[State, int]:
    """Meta-train in a run directory from its newest good checkpoint, or from the start.

    With several processes every one calls this; the first alone touches the directory. `profile` writes a JAX trace of
    the meta-steps PROFILED (counted from where it begins) into it.

    Returns:
      (State, signal): signal is 0 when all meta-steps are done, else what stopped the run (everything is saved).
    """
    first = distributed.first()
    checkpoints = Checkpoints(folder / "checkpoints", run.identity()) if first else None
    state, at = _restore(run, program, checkpoints, say)
    log = Log(folder, after=at) if first else None
    pending: list[dict[str, jax.Array]] = []
    loss, since, unrolled, came = float("inf"), time.monotonic(), 0, 0
    report_to = progress("meta-step", run.meta_steps, start=at) if first else nullcontext(lambda *_: None)
    with stop_requests() as stop, report_to as report, ExitStack() as last:
        if checkpoints and log:
            last.callback(checkpoints.close)  # also where an error ends the run: what was begun to be saved counts
            last.callback(log.close)
        begin = at
        while at < run.meta_steps and not came:
            if profile and at - begin == PROFILED[0]:
                jax.profiler.start_trace(str(folder / "profile"))
            stage = program.at(at)
            state, metrics = stage.meta_step(program.data, state)
            pending.append(metrics)
            at, unrolled = at + 1, unrolled + stage.inner_steps
            if profile and at - begin == PROFILED[1]:
                jax.block_until_ready(state)
                jax.profiler.stop_trace()
            # Waiting for the device only here keeps it busy in between.
            if at % run.log_every == 0 or at == run.meta_steps:
                line = _summary(jax.device_get(pending))
                now = time.monotonic()
                speed = unrolled / (now - since)
                pending, since, unrolled, loss = [], now, 0, line["meta_loss"]
                if log:
                    log.write({"step": at, **line, "inner_steps_per_second": round(speed)})
                _refuse_divergence(run, at, line)
                report(at, f"meta-loss {loss:.3f}  {speed:,.0f} inner steps/s  diverged {line['diverged']:.0f}")
            # All processes stop at the same meta-step, whichever of them was told to.
            if not distributed.several():
                came = stop()
            elif at % run.log_every == 0:
                came = distributed.most(stop())
            if at % run.checkpoint_every == 0 or at == run.meta_steps or came:
                whole = distributed.gather(state)
                if checkpoints:
                    checkpoints.save(at, whole, loss)
    return state, came if at < run.meta_steps else 0


def _restore(
    run: cfg.Run, program: Program, checkpoints: Checkpoints | None, say: Callable[[str], None]
) -> tuple[State, int]:
    """The state to go on from, and its meta-step; read by the first process for all."""
    state = program.init()
    at, saved, error = -1, distributed.gather(state), None
    if checkpoints:
        try:
            at, saved, remarks = checkpoints.restore(saved)
        except ValueError as e:
            error = e
        else:
            for line in remarks:
                say(line)
            if remarks and at < 0:
                say("no checkpoint is left that can be read: starting again")
            checkpoints.drop_after(at)
    distributed.refuse_together(error)
    at, saved = distributed.agree((np.int32(at), saved))
    if at < 0:
        return state, 0
    say(f"resuming at meta-step {at} of {run.meta_steps}")
    return program.place(saved), int(at)


def _refuse_divergence(run: cfg.Run, at: int, line: dict[str, float]) -> None:
    """Stop a run most of whose meta-gradients are lost. Raises ValueError naming the groups."""
    if line["skipped"] <= max(10, run.skip_limit * at):
        return
    lost = [f"{g.family} ({i})" for i, g in enumerate(run.groups) if line[f"skipped/{i}"]]
    raise ValueError(
        f"lopt-train: {line['skipped']:.0f} of {at} meta-gradients were not finite, more than skip_limit = "
        f"{run.skip_limit} allows; lately of group {', '.join(lost) or 'none alone'}. The last checkpoint is good; "
        "valid: a smaller meta_optimizer.lr or truncation, or other tasks."
    )


def _summary(window: list[dict[str, Any]]) -> dict[str, float]:
    """Counts are summed over the window, `skipped` is a running total, the rest are means."""
    line = {name: sum(float(m[name]) for m in window) / len(window) for name in window[0]}
    for name in line:
        if name.split("/")[0] in ("diverged", "resets", "skipped"):
            line[name] *= len(window)
    line["skipped"] = float(window[-1]["skipped"])
    return line
