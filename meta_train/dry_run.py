"""What a run would be: groups, shapes, compile time, memory, speed and how long it would take; nothing is written."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator

import jax

from lopt.console import span
from meta_train import artifact
from meta_train import config as cfg
from meta_train.groups import programs
from meta_train.placement import usable_devices
from meta_train.program import Program, Stage, State

SECONDS = 5.0  # of meta-steps of a stage to measure, at least three


def report(run: cfg.Run, program: Program) -> Iterator[str]:
    """Lines, each as soon as it is known. Compiles the meta-step of each stage and runs it for some seconds."""
    yield f"{run.name}: rule {run.rule}, {artifact.count(program.rule)} meta-parameters, {program.layout}"
    pairs, available = run.estimator.pairs, jax.device_count()
    if (used := usable_devices(pairs, available)) < available:
        yield f"  {pairs} pairs use {used} of {available} devices; a multiple of {available} uses all"
    for line in programs(run):
        yield f"  {line}"
    state, total = program.init(), 0.0
    ends = [*(stage.start for stage in program.stages[1:]), run.meta_steps]
    for spec, stage, end in zip(run.schedule(), program.stages, ends, strict=True):
        meta_steps = min(end, run.meta_steps) - stage.start
        if len(program.stages) > 1:
            yield (
                f"stage from meta-step {stage.start:,}: {max(0, meta_steps):,} meta-steps, horizons {spec.low} to "
                f"{spec.high}, truncation {spec.truncation}"
            )
        if meta_steps <= 0:
            yield f"  it is never reached: the run has {run.meta_steps:,} meta-steps"
            continue
        state, each = yield from _stage(program, stage, state)
        total += meta_steps * each
        if len(program.stages) > 1:
            yield f"its {meta_steps:,} meta-steps would take {span(meta_steps * each)}"
    yield f"{run.meta_steps:,} meta-steps would take {span(total)}"
    if program.validate:
        state, scores = program.validate(state)
        jax.block_until_ready(scores)
        began = time.perf_counter()
        jax.block_until_ready(program.validate(state))
        each, times = time.perf_counter() - began, -(-run.meta_steps // run.validation.every) + 1
        yield f"a meta-validation takes {each:.1f} s, {times} of them {span(each * times)}"
        yield f"together {span(total + each * times)}"


def _stage(program: Program, stage: Stage, state: State) -> Generator[str, None, tuple[State, float]]:
    """Lines about a stage; returns the state it ends with, and the seconds of a meta-step."""
    began = time.perf_counter()
    compiled = stage.meta_step.lower(program.data, state).compile()
    yield f"compiled in {time.perf_counter() - began:.1f} s (less with what the cache holds)"
    memory = compiled.memory_analysis()
    if memory is not None:
        held, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
        yield f"memory a device: state and data {held / 2**20:.1f} MiB, temporary {temporary / 2**20:.1f} MiB"
    state, metrics = compiled(program.data, state)
    jax.block_until_ready(metrics)
    began, steps, updates = time.perf_counter(), 0, 0
    while steps < 3 or time.perf_counter() - began < SECONDS:
        state, metrics = compiled(program.data, state)
        steps, updates = steps + 1, updates + int(metrics["inner_steps"])
    took = time.perf_counter() - began
    yield f"{updates / took:,.0f} inner steps/s, {steps / took:.1f} meta-steps/s, over {steps} meta-steps"
    return state, took / steps
