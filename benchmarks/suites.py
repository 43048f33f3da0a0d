"""What a step of each problem of the suites costs: the `ms` in meta_test/suites.py.

    python benchmarks/suites.py mini heldout dev smoke    # prints name, ms and FLOPs of a run; minutes of one core
    python benchmarks/suites.py --optimizers              # prints RELATIVE_MS: each default baseline over AdamW

A step is a training batch, its gradient and AdamW's update, in a batch of as many runs as lopt-eval puts on a core, per
run. The least of three timings. Run it on an idle machine.
"""

from __future__ import annotations

import os
import sys
import time

if __name__ == "__main__" and hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # before JAX counts the cores

import jax
import numpy as np

import tasks
from meta_test import compare, entrants, runs, tuning
from meta_test.cost import run_flops
from meta_test.suites import DEFAULT_BASELINES, PROBES, SUITES, Problem

DEAR = ("shampoo",)  # besides the default ones
RUNS, REPEATS, LEAST = 24, 3, 0.15  # runs asked for, timings, seconds of a timing


def milliseconds(task: tasks.Task) -> float:
    """A step of one run of AdamW among as many as a core takes at a time."""
    hyper = {"lr": np.float32(1e-3), "horizon": np.int32(1000), "cosine": np.bool_(True)}
    return timed(runs.prepare(runs.Contender("adamw", compare.adamw), task, RUNS), hyper)


def timed(program: runs.Program, one: dict) -> float:
    """Milliseconds a step of a run in a full chunk, all at the same hyper-parameters."""
    hyper = {name: np.full(program.chunk, value) for name, value in one.items()}
    hyper, seeds = program.place((hyper, np.arange(program.chunk)))
    state, at = program.start(program.shared, hyper, seeds), 0

    def seconds(count: int) -> float:
        nonlocal state, at
        began = time.perf_counter()
        state, losses = program.advance(program.data, program.shared, at, at + count, hyper, seeds, state)
        jax.block_until_ready(losses)
        at += count
        return time.perf_counter() - began

    seconds(1)  # compiles
    evaluation = min(seconds(0) for _ in range(REPEATS))
    count = max(2, int(LEAST / max(seconds(8) - evaluation, 1e-4) * 8))
    return 1e3 * (min(seconds(count) for _ in range(REPEATS)) - evaluation) / count / program.chunk


def relative() -> dict[str, float]:
    """Optimizer -> its step over AdamW's, by tuning's own programs at default hyper-parameters."""
    found: dict[str, list[float]] = {name: [] for name in (*DEFAULT_BASELINES, *DEAR)}
    for problem in SUITES["mini"]:
        if problem.name not in PROBES:
            continue
        task = tasks.make(problem.family, **problem.settings)
        for name, held in found.items():
            entrant = entrants.resolve(name)
            hyper = {key: np.float32(space.default) for key, space in entrant.space.items()}
            hyper |= {"num_steps": np.int32(1000), "cosine": np.bool_(False)}
            held.append(timed(runs.prepare(entrant.contender, task, tuning.RUNS), hyper))
            print(problem.name, name, f"{held[-1]:.3g} ms", file=sys.stderr, flush=True)
        jax.clear_caches()
    logs = {name: np.log(ms) for name, ms in found.items()}
    return {name: float(f"{np.exp((log - logs['adamw']).mean()):.2g}") for name, log in logs.items()}


def main() -> None:
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", ".cache/jax")
    if "--optimizers" in sys.argv:
        print(relative())
        return
    done: list[Problem] = []
    for suite in sys.argv[1:] or ["mini", "heldout", "dev", "smoke"]:
        for problem in SUITES[suite]:
            if problem in done:
                continue
            done.append(problem)
            task = tasks.make(problem.family, **problem.settings)
            ms, flops = milliseconds(task), run_flops(task, problem.num_steps)
            print(f"{suite} {problem.name} {ms:.3g} {flops:.3g} {ms * problem.num_steps / 1e3:.2f}", flush=True)


if __name__ == "__main__":
    main()
