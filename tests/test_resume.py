"""A run that was stopped, however rudely, ends with the theta of one that was not, bit for bit."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from meta_train import loop
from meta_train.checkpoint import Checkpoints, digest
from meta_train.config import Estimator, Group, Horizon, MetaOptimizer, Run, Stage
from meta_train.estimators import REGISTRY

META_STEPS = 24
ARGUMENTS = [
    *("quickstart", "--compare", "", "--meta-steps", str(META_STEPS), "--checkpoint-every", "4", "--log-every", "1"),
    *("--estimator.pairs", "2", "--estimator.truncation", "5", "--horizon.low", "5", "--horizon.high", "20"),
    *("--rule-settings", '{"hidden": 2}', "--groups.0.settings", '{"data": ["digits"], "hidden": [4]}'),
]


def launch(*arguments: str, cwd: Path) -> subprocess.Popen:
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    return subprocess.Popen(
        [sys.executable, "-m", "meta_train.launch", *arguments],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen) -> tuple[int, str]:
    out, _ = process.communicate(timeout=240)
    return process.returncode, out


def kill_after(process: subprocess.Popen, folder: Path, steps: int, number: int) -> tuple[int, str]:
    """Send a signal once `steps` meta-steps are in the log."""
    deadline = time.monotonic() + 240
    while len(loop.read_metrics(folder)) < steps and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(number)
    return finish(process)


def theta(folder: Path) -> str:
    return hashlib.sha256((folder / "artifact/model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("whole")
    code, out = finish(launch(*ARGUMENTS, "--out", "run", cwd=folder))
    assert code == 0, out
    return theta(folder / "run")


@pytest.mark.parametrize(
    ("number", "code", "steps"),
    [(signal.SIGTERM, 143, 6), (signal.SIGINT, 130, 10), (signal.SIGKILL, -9, 9), (signal.SIGKILL, -9, 1)],
    ids=["sigterm", "ctrl-c", "kill -9", "kill -9 before a checkpoint"],
)
def test_resumes_bit_for_bit(tmp_path, uninterrupted, number, code, steps):
    folder = tmp_path / "run"
    got, out = kill_after(launch(*ARGUMENTS, "--out", "run", cwd=tmp_path), folder, steps, number)
    assert got == code, out
    before = loop.read_metrics(folder)
    assert before[-1]["step"] < META_STEPS, "the run ended before it was stopped; the test shows nothing"
    got, out = finish(launch("resume", "run", cwd=tmp_path))
    assert got == 0, out
    assert theta(folder) == uninterrupted
    assert [line["step"] for line in loop.read_metrics(folder)] == list(range(1, META_STEPS + 1))


def test_a_damaged_checkpoint_is_passed_over(tmp_path, uninterrupted):
    """A flipped byte in the newest step, which Orbax alone would restore as wrong values, and a truncated file."""
    folder = tmp_path / "run"
    got, out = kill_after(launch(*ARGUMENTS, "--out", "run", cwd=tmp_path), folder, 18, signal.SIGTERM)
    assert got == 143, out
    newest = max(
        (path for path in (folder / "checkpoints").iterdir() if path.name.isdigit()), key=lambda p: int(p.name)
    )
    arrays = max((path for path in (newest / "state").rglob("*") if path.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(arrays.read_bytes())
    content[len(content) // 2] ^= 1
    arrays.write_bytes(content)
    got, out = finish(launch("resume", "run", cwd=tmp_path))
    assert got == 0, out
    assert f"checkpoint {newest.name} is damaged" in out
    assert theta(folder) == uninterrupted


@pytest.mark.parametrize("name", [*REGISTRY, "pes in stages"])
def test_every_estimator_resumes_bit_for_bit(tmp_path, name):
    """All that it carries on is in the checkpoint, also where a stage of a curriculum begins."""
    name, _, staged = name.partition(" in ")
    run = Run(
        name="x",
        rule="nn_adam",
        groups=(Group("tabular_mlp", {"hidden": [], "batch_size": 8}),),
        estimator=Estimator(name, pairs=2, truncation=4),
        horizon=Horizon(6, 6),
        meta_optimizer=MetaOptimizer(warmup=0),
        meta_loss="train",
        stages=(Stage(3, 7, 9, 5),) if staged else (),
        meta_steps=5,
    )
    program = loop.build(run)

    def go_on(state, start, end):
        for step in range(start, end):
            state, _ = program.at(step).meta_step(program.data, state)
        return state

    whole = digest(go_on(program.init(), 0, 5))
    checkpoints = Checkpoints(tmp_path, run.identity())
    state = go_on(program.init(), 0, 3)
    checkpoints.save(3, state, 0.0)
    checkpoints.close()
    at, saved, remarks = Checkpoints(tmp_path, run.identity()).restore(program.init())
    assert (at, remarks) == (3, [])
    assert digest(go_on(program.place(saved), at, 5)) == whole
    assert [stage.meta_step._cache_size() for stage in program.stages] == [1] * (2 if staged else 1)


def test_meta_steps_move_theta():
    """The comparisons above could not tell if theta stood still."""
    run = Run(
        name="x",
        rule_settings={"hidden": 2},
        groups=(Group("image_mlp", {"data": ["digits"], "hidden": [4]}),),
        estimator=Estimator(pairs=2, truncation=5),
        horizon=Horizon(5, 20),
        meta_optimizer=MetaOptimizer(warmup=0),
        meta_steps=3,
    )
    program = loop.build(run)
    state = program.init()
    before = [np.array(x) for x in jax.tree.leaves(state.theta)]
    state, _ = program.meta_step(program.data, state)
    assert all((x != y).any() for x, y in zip(before, jax.tree.leaves(state.theta), strict=True))
