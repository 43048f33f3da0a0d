"""A run that was stopped, however rudely, ends with the theta of one that was not, bit for bit."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from lopt.pretrained import named_leaves
from meta_train import loop
from meta_train import program as program_module
from meta_train.checkpoint import Checkpoints, digest
from meta_train.config import Estimator, Group, Horizon, MetaOptimizer, Run, Stage
from meta_train.estimators import REGISTRY

ROOT = Path(__file__).parents[1]
META_STEPS = 120  # enough to be stopped in between even by a test that is itself held up
ARGUMENTS = [
    *("quickstart", "--compare", "", "--meta-steps", str(META_STEPS), "--checkpoint-every", "10", "--log-every", "1"),
    *("--estimator.pairs", "2", "--estimator.truncation", "5", "--horizon.low", "5", "--horizon.high", "20"),
    *(
        "--rule",
        "nn_adam",
        "--groups.0.family",
        "tabular_mlp",
        "--groups.0.settings",
        '{"hidden": [], "batch_size": 8}',
    ),
]


def launch(*arguments: str, cwd: Path) -> subprocess.Popen:
    environment = {
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_COMPILATION_CACHE_DIR": f"{ROOT}/.cache/jax",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "meta_train.launch", *arguments],
        cwd=cwd,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen) -> tuple[int, str]:
    out, _ = process.communicate(timeout=240)
    return process.returncode, out


def stop(process: subprocess.Popen, folder: Path, steps: int, checkpoints: int, number: int) -> tuple[int, str]:
    """Send a signal once so many more meta-steps are in the log, and there are so many checkpoints."""
    deadline, until = time.monotonic() + 240, len(loop.read_metrics(folder)) + steps

    def early() -> bool:
        return len(loop.read_metrics(folder)) < until or len(saved(folder)) < checkpoints

    while early() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(number)
    return finish(process)


def met_all(stops, folder: Path, *arguments: str) -> bool:
    """Begin a run, and stop and resume it time after time; False if it came to its end before."""
    for i, (number, code, *when) in enumerate(stops):
        command = ("resume", str(folder)) if i else (*arguments, "--out", str(folder))
        got, out = stop(launch(*command, cwd=folder.parent), folder, *when, number)
        if got == 0:
            return False
        assert got == code, out
        assert loop.read_metrics(folder)[-1]["step"] < META_STEPS
    return True


def saved(folder: Path) -> list[Path]:
    """Checkpoints that count, the newest last."""
    steps = [path for path in folder.glob("checkpoints/*") if path.name.isdigit()]
    return sorted(steps, key=lambda path: int(path.name))


def result(folder: Path) -> tuple[str, list[dict]]:
    """What must not differ: weights, and the record without speeds."""
    weights = hashlib.sha256((folder / "artifact/model.safetensors").read_bytes()).hexdigest()
    return weights, [
        {k: v for k, v in line.items() if k != "inner_steps_per_second"} for line in loop.read_metrics(folder)
    ]


def harm_newest(folder: Path, how: str) -> str:
    """Flip a byte of, or truncate, the arrays of the newest checkpoint; returns its step.

    A flipped byte Orbax alone would restore as wrong values. It keeps a copy that it never reads: both are harmed.
    """
    newest = saved(folder)[-1]
    files = [path for path in (newest / "state").rglob("d/*") if path.is_file()]
    size = max(path.stat().st_size for path in files)
    for path in files:
        if path.stat().st_size < size:
            continue
        content = bytearray(path.read_bytes())
        middle = len(content) // 2
        content[middle] ^= 1
        path.write_bytes(content[:middle] if how == "truncated" else content)
    return newest.name


# Signal, exit code, and when: after so many more meta-steps, with so many checkpoints. The newest of two is damaged.
EARLY, KILL = (signal.SIGKILL, -9, 1, 0), (signal.SIGKILL, -9, 12, 2)
TERM, INTERRUPT = (signal.SIGTERM, 143, 6, 1), (signal.SIGINT, 130, 6, 1)
# One run meets its stops one after the other: what any of them leaves behind would show at the end. EARLY is before the
# first checkpoint. Each estimator meets all three signals, pes in `make test` and the others in `make test-all`.
ALL = (EARLY, INTERRUPT, TERM, KILL)
STOPS = [
    ("pes", ALL, "flipped"),
    ("nres", (KILL,), "truncated"),
    *(
        pytest.param(name, ALL, "flipped" if i % 2 else "truncated", marks=pytest.mark.slow)
        for i, name in enumerate(sorted(set(REGISTRY) - {"pes"}))
    ),
]


@pytest.mark.parametrize(("name", "stops", "harm"), STOPS)
def test_a_run_that_is_stopped_and_damaged_ends_in_the_same_bits(tmp_path, name, stops, harm):
    arguments = [*ARGUMENTS, "--estimator.name", name]
    got, out = finish(launch(*arguments, "--out", "whole", cwd=tmp_path))
    assert got == 0, out
    # On a machine so busy that this process sleeps while the run goes on, the run can end before it is stopped.
    tries = (tmp_path / f"run{i}" for i in range(3))
    folder = next((folder for folder in tries if met_all(stops, folder, *arguments)), None)
    assert folder, "the run always ended before it was stopped; the test shows nothing"
    newest = harm_newest(folder, harm)
    got, out = finish(launch("resume", str(folder), cwd=tmp_path))
    assert got == 0, out
    assert f"checkpoint {newest} is damaged" in out
    assert result(folder) == result(tmp_path / "whole")
    # The comparison could not tell if theta stood still.
    start = loop.build(Run.from_json(json.loads((folder / "config.json").read_text()))).init().theta
    end = load_file(folder / "artifact/model.safetensors")
    assert all((np.asarray(x) != end[name]).any() for name, x in named_leaves(start).items())


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


def test_a_run_goes_on_with_another_number_of_devices_and_says_so(tmp_path, monkeypatch):
    """To rounding with the same result, and no longer bit for bit."""
    run = Run(
        name="x",
        rule="nn_adam",
        groups=(Group("tabular_mlp", {"hidden": [], "batch_size": 8}),),
        estimator=Estimator(pairs=4, truncation=4),
        horizon=Horizon(6, 6),
        meta_optimizer=MetaOptimizer(warmup=0),
        meta_steps=4,
        checkpoint_every=2,
    )
    ended, other = {}, {4: 1, 1: 4}
    programs = {}
    for devices in other:
        monkeypatch.setattr(program_module, "usable_devices", lambda pairs, available, devices=devices: devices)
        programs[devices] = loop.build(run)
        folder = tmp_path / str(devices)
        folder.mkdir()
        ended[devices], _ = loop.train(run, programs[devices], folder, print)
    for devices, others in other.items():
        folder, said = tmp_path / str(devices), []
        shutil.rmtree(folder / "checkpoints/4")
        state, _ = loop.train(run, programs[others], folder, said.append)
        assert said == [
            f"checkpoint 2 was made on {devices} devices and goes on on {others} devices: no longer bit for bit the "
            "same run",
            "resuming at meta-step 2 of 4",
        ]
        assert len(state.estimators[0].xi.sharding.device_set) == others
        for whole in ended.values():
            jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), state.theta, whole.theta)
        np.testing.assert_array_equal(state.estimators[0].particles.t, ended[devices].estimators[0].particles.t)
    # On the devices that it was made on nothing is said.
    shutil.rmtree(tmp_path / "4/checkpoints/4")
    loop.train(run, programs[4], tmp_path / "4", (again := []).append)
    assert again == ["resuming at meta-step 2 of 4"]
    # Nor is a beginning from nothing silent where there once was something.
    shutil.rmtree(tmp_path / "4/checkpoints")
    state, _ = loop.train(run, programs[4], tmp_path / "4", (anew := []).append)
    assert anew == ["there is no checkpoint yet: starting again at meta-step 0"]
    assert digest(state) == digest(ended[4])


def test_a_long_silence_ends_and_every_meta_step_is_in_the_record(tmp_path):
    """Forty meta-steps in the queue of two devices once waited for each other for ever."""
    arguments = [*ARGUMENTS, "--out", "run", "--log-every", "100", "--checkpoint-every", "70"]
    code, out = finish(launch(*arguments, cwd=tmp_path))
    assert code == 0, out
    lines = loop.read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [70, 100, META_STEPS]
    assert sum(line["inner_steps"] for line in lines) == META_STEPS * 2 * 2 * 5  # pairs, signs, truncation
