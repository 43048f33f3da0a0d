"""What a run would be: groups, shapes, compile time, memory, speed and how long it would take; nothing is written."""

from __future__ import annotations

import time
from collections.abc import Iterator

import jax
import numpy as np

from lopt.console import span
from meta_train import artifact
from meta_train import config as cfg
from meta_train.program import Program, param_shapes, usable_devices

SECONDS = 5.0  # of meta-steps to measure, at least three


def report(run: cfg.Run, program: Program) -> Iterator[str]:
    """Lines, each as soon as it is known. Compiles the meta-step and runs it for some seconds."""
    yield f"{run.name}: rule {run.rule}, {artifact.count(program.rule)} meta-parameters, {program.layout}"
    pairs, available = run.estimator.pairs, jax.device_count()
    if (used := usable_devices(pairs, available)) < available:
        yield f"  {pairs} pairs use {used} of {available} devices; a multiple of {available} uses all"
    for group, shapes in zip(run.groups, param_shapes(run), strict=True):
        size = sum(int(np.prod(shape)) for shape in shapes.values())
        listed = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        yield f"  group {group.family}: {size:,} params ({listed})"
    began = time.perf_counter()
    state = program.init()
    compiled = program.stages[0].meta_step.lower(program.data, state).compile()
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
    each = took / steps
    yield f"{updates / took:,.0f} inner steps/s, {1 / each:.1f} meta-steps/s, over {steps} meta-steps"
    yield f"{run.meta_steps:,} meta-steps would take {span(run.meta_steps * each)}"
    if program.validate:
        state, scores = program.validate(state)
        jax.block_until_ready(scores)
        began = time.perf_counter()
        jax.block_until_ready(program.validate(state))
        each, times = time.perf_counter() - began, run.meta_steps // run.validation.every + 1
        yield f"a meta-validation takes {each:.1f} s, {times} of them {span(each * times)}"
