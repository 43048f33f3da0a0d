"""A run: the host loop around its meta-step, and the run directory it fills."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lopt.console import progress
from meta_train import config as cfg
from meta_train import distributed
from meta_train.checkpoint import Checkpoints
from meta_train.program import Program, State, build
from meta_train.record import Log, read_metrics

__all__ = ["Log", "Program", "State", "build", "read_metrics", "stop_requests", "train"]
PROFILED = (2, 6)  # meta-steps of a trace, counted from the first of this process


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


# Meta-steps that are queued at most. The device is busy with two; with forty of them on a CPU's devices, the all-reduce
# of one waits for ever for threads that others hold.
AHEAD = 4


class Meter:
    """What meta-steps measured since the last line, and how fast they were."""

    def __init__(self, work: Callable[[dict[str, Any]], float]):
        """`work`: what is counted of a meta-step, e.g. its inner steps, told by what it measured."""
        self._work = work
        self._pending: list[dict[str, jax.Array]] = []
        self._compiled: dict[int, float] = {}  # which of them were compiled first, and seconds of that and them
        self._since = time.monotonic()

    def add(self, metrics: dict[str, jax.Array]) -> None:
        """Of one more meta-step; waits for the one AHEAD before it."""
        self._pending.append(metrics)
        if len(self._pending) > AHEAD:
            jax.block_until_ready(self._pending[-1 - AHEAD])

    def window(self) -> tuple[list[dict[str, Any]], float]:
        """What was measured, and work a second; waits for the device and begins anew.

        A meta-step that is compiled first says nothing about the speed, unless there is no other.
        """
        window, now = jax.device_get(self._pending), time.monotonic()
        compiled = self._compiled if len(self._compiled) < len(window) else {}
        seconds = now - self._since - sum(compiled.values())
        work = sum(self._work(m) for i, m in enumerate(window) if i not in compiled)
        self._pending, self._compiled, self._since = [], {}, now
        return window, work / max(seconds, 1e-9)

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """One meta-step is compiled, run and added."""
        jax.block_until_ready(self._pending)
        began = time.monotonic()
        yield
        jax.block_until_ready(self._pending)
        self._compiled[len(self._pending) - 1] = time.monotonic() - began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that is none of the meta-steps'."""
        jax.block_until_ready(self._pending)
        began = time.monotonic()
        yield
        self._since += time.monotonic() - began


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
    begun = (folder / "checkpoints").exists() or bool(read_metrics(folder))
    kept = {"layout": program.layout, "data": program.digest, "beside": program.batches}
    checkpoints = Checkpoints(folder / "checkpoints", run.identity(), **kept) if first else None
    state, at = _restore(run, program, checkpoints, say, begun)
    log = Log(folder, after=at) if first else None
    if log and (lost := set(range(run.log_every, at + 1, run.log_every)) - log.steps):
        say(f"metrics.jsonl: {len(lost)} lines up to meta-step {at} are missing or damaged, the first of {min(lost)}")
    validate, loss, came, notes = program.validate, float("inf"), 0, ["", ""]
    told: set[str] = set()
    report_to = progress("meta-step", run.meta_steps, start=max(at, 0)) if first else nullcontext(lambda *_: None)
    with stop_requests() as stop, report_to as report, ExitStack() as last:
        if checkpoints and log:
            last.callback(checkpoints.close)  # also where an error ends the run: what was begun to be saved counts
            last.callback(log.close)
        if at < 0 and validate:  # theta as it begins is a candidate too
            state, scores = validate(state)
            if log:
                log.write({"step": 0, **_floats(scores)})
        at = begin = max(at, 0)
        meter, stage = Meter(work=lambda m: float(m["inner_steps"])), None
        while at < run.meta_steps and not came:
            if profile and at - begin == min(PROFILED[0], run.meta_steps - begin - 1):
                jax.profiler.start_trace(str(folder / "profile"))
                last.callback(_end_trace)
            # What has no part in a meta-step is kept out of its program, whose bits it could change.
            with nullcontext() if stage is program.at(at) else meter.compiling():
                stage = program.at(at)
                moved, metrics = stage.meta_step(program.feed(at), state._replace(best=()))
                meter.add(metrics)
            if at == begin:
                report(begin, "compiled")
            state = moved._replace(best=state.best)
            at += 1
            if profile and at - begin == PROFILED[1]:
                jax.block_until_ready(state)
                _end_trace()
            line: dict[str, float] = {}
            # All processes stop at the same meta-step, whichever of them was told to.
            if not distributed.several():
                came = stop()
            elif at % run.log_every == 0:
                came = distributed.most(stop())
            save = at % run.checkpoint_every == 0 or at == run.meta_steps or came
            # A line with each checkpoint too: what was measured and not written would be lost to who resumes there.
            if at % run.log_every == 0 or save:
                window, speed = meter.window()
                line = {**_summary(window), "inner_steps_per_second": round(speed)}
                loss, notes[0] = line["meta_loss"], _progress(line)
            if validate and (at % run.validation.every == 0 or at == run.meta_steps):
                with meter.paused():
                    state, scores = validate(state)
                    scores = _floats(scores)
                line |= scores
                best = f"best {scores['best_validation']:.3f} at {scores['best_step']:.0f}"
                notes[1] = f"  validation {scores['validation']:.3f} ({best})"
            if log and line:
                log.write({"step": at, **line})
            if "meta_loss" in line:
                for text in _without_gradient(run, line) - told:
                    told.add(text)
                    say(text)
                _refuse_divergence(run, at, line, checkpoints.steps() if checkpoints else [])
            if line:
                report(at, "".join(notes))
            if save:
                whole = program.gather(state)
                if checkpoints:
                    checkpoints.save(at, whole, loss)
    return state, came if at < run.meta_steps else 0


def _end_trace() -> None:
    with suppress(RuntimeError):  # it has ended
        jax.profiler.stop_trace()


def _restore(
    run: cfg.Run, program: Program, checkpoints: Checkpoints | None, say: Callable[[str], None], begun: bool
) -> tuple[State, int]:
    """The state to go on from, and its meta-step, -1 at the start; read by the first process for all.

    Args:
      run: of the directory.
      program: of the run.
      checkpoints: of the directory, in the first process.
      say: to people.
      begun: whether somebody has worked in the directory before.
    """
    at, error = -1, None
    saved = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), program.shapes)
    if checkpoints:
        try:
            at, saved, remarks = checkpoints.restore(saved)
        except ValueError as e:
            error = e
        else:
            for line in remarks:
                say(line)
            if begun and at < 0:
                say("there is no checkpoint yet: starting again at meta-step 0")
            checkpoints.set_aside_after(at)
    distributed.refuse_together(error)
    at, saved = distributed.agree((np.int32(at), saved))
    if at < 0:
        return program.init(), -1
    say(f"resuming at meta-step {at} of {run.meta_steps}")
    return program.place(saved), int(at)


def too_many(skipped: float, at: int, limit: float) -> bool:
    """Whether so many lost meta-gradients of `at` are more than their limit, a share."""
    # A few at the start are no share yet, unless they are all there were, or none is allowed.
    patience = min(10, at - 1) if limit else 0
    return skipped > max(patience, limit * at)


def _refuse_divergence(run: cfg.Run, at: int, line: dict[str, float], saved: Sequence[int] = ()) -> None:
    """Stop a run too many of whose meta-gradients are lost. Raises ValueError naming the groups.

    Args:
      run: whose `skip_limit` it is.
      at: meta-steps done.
      line: of the record; `skipped` is their count so far.
      saved: meta-steps of the checkpoints.
    """
    if not too_many(line["skipped"], at, run.skip_limit):
        return
    lost = [f"{g.family} ({i})" for i, g in enumerate(run.groups) if line[f"skipped/{i}"]]
    raise ValueError(
        f"lopt-train: {line['skipped']:.0f} of {at} meta-gradients were not finite, more than skip_limit = "
        f"{run.skip_limit} allows; lately of group {', '.join(lost) or 'none alone (theta was to become infinite)'}. "
        "They did not move theta. "
        + (f"The newest checkpoint is of meta-step {saved[-1]}; " if saved else "No checkpoint was saved yet; ")
        + "valid: a smaller meta_optimizer.lr or truncation, or other tasks, in a new run (init_from= starts at an "
        "artifact's theta)."
    )


def _without_gradient(run: cfg.Run, line: dict[str, float]) -> set[str]:
    """Lines on groups whose meta-gradient was 0 at all meta-steps of a line of the record, though they have a loss.

    Under objectives of an episode's end there are such meta-steps, and no loss then.
    """
    groups = [i for i in range(len(run.groups)) if line[f"grad_norm/{i}"] == 0 < line[f"meta_loss/{i}"]]
    return {
        f"group {run.groups[i].family} ({i}) has a meta-gradient of exactly 0 and teaches theta nothing: are all its "
        f"meta-losses above loss_limit = {run.loss_limit:g} (valid: a larger one, or a normalise), or does theta "
        "change nothing there?"
        for i in groups
    }


def _summary(window: list[dict[str, Any]]) -> dict[str, float]:
    """Counts are summed over the window, `skipped` is a running total, the rest are means."""
    line = {name: sum(float(m[name]) for m in window) / len(window) for name in window[0]}
    for name in line:
        if name.split("/")[0] in ("diverged", "resets", "skipped", "inner_steps"):
            line[name] *= len(window)
    line["skipped"] = float(window[-1]["skipped"])
    return line


def _floats(scores: dict[str, Any]) -> dict[str, float]:
    return {name: float(x) for name, x in jax.device_get(scores).items()}


def _progress(line: dict[str, float]) -> str:
    """For people: the meta-loss, in brackets those of the groups if there are several, the speed, divergences."""
    groups = [f"{x:.3f}" for name, x in line.items() if name.startswith("meta_loss/")]
    each = f" ({', '.join(groups)})" if len(groups) > 1 else ""
    speed = f"{line['inner_steps_per_second']:,} inner steps/s"
    return f"meta-loss {line['meta_loss']:.3f}{each}  {speed}  diverged {line['diverged']:.0f}"
