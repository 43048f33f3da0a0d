"""Several processes train what one does, end together when one is lost, and go on afterwards."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from meta_train import launch, loop

ROOT = Path(__file__).parents[1]
ARGUMENTS = [
    *("quickstart", "--compare", "", "--checkpoint-every", "2", "--log-every", "1", "--meta-optimizer.warmup", "0"),
    *("--estimator.pairs", "4", "--estimator.truncation", "5", "--horizon.low", "5", "--horizon.high", "20"),
    *("--rule-settings", '{"hidden": 2}', "--groups.0.settings", '{"data": ["digits"], "hidden": [4]}'),
]


def begin(folder: Path, devices: int, *arguments: str) -> subprocess.Popen:
    flags = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, "-m", "meta_train.launch", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": flags},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def begin_two(folder: Path, *arguments: str) -> list[subprocess.Popen]:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    join = ["--distributed", "--coordinator", f"localhost:{port}", "--processes", "2", "--process-id"]
    return [begin(folder, 2, *arguments, *join, str(i)) for i in range(2)]


def finish(process: subprocess.Popen) -> tuple[int, str]:
    out, _ = process.communicate(timeout=240)
    return process.returncode, out


def theta(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "artifact/model.safetensors")


def test_two_processes_train_what_one_does_and_survive_a_loss(tmp_path):
    arguments = [*ARGUMENTS, "--meta-steps", "5"]
    for code, out in map(finish, begin_two(tmp_path, *arguments, "--out", "two")):
        assert code == 0, out
    code, out = finish(begin(tmp_path, 4, *arguments, "--out", "one"))
    assert code == 0, out
    one, two = theta(tmp_path / "one"), theta(tmp_path / "two")
    for name, x in one.items():
        np.testing.assert_allclose(two[name], x, rtol=1e-5, atol=1e-7, err_msg=name)
    losses = [[line["meta_loss"] for line in loop.read_metrics(tmp_path / name)] for name in ("one", "two")]
    np.testing.assert_allclose(*losses, rtol=1e-5)

    # One is killed: the other ends soon, with a line that says what to do, and both go on from the last checkpoint.
    long = [*ARGUMENTS, "--meta-steps", "100000", "--out", "lost"]
    first, second = begin_two(tmp_path, *long)
    deadline = time.monotonic() + 240
    while len(loop.read_metrics(tmp_path / "lost")) < 5 and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    second.send_signal(signal.SIGKILL)
    killed = time.monotonic()
    finish(second)
    code, out = finish(first)
    assert time.monotonic() - killed < 20
    assert code == 75, out
    assert "another process was lost" in out.splitlines()[-1]
    assert "lopt-train resume" in out.splitlines()[-1]
    both = begin_two(tmp_path, "resume", "lost")
    while loop.read_metrics(tmp_path / "lost")[-1]["step"] < 8 and time.monotonic() < deadline + 240:
        time.sleep(0.05)
    both[1].send_signal(signal.SIGTERM)  # one is told to stop: both do, at the same meta-step
    for code, out in map(finish, both):
        assert code == 143, out
    steps = [line["step"] for line in loop.read_metrics(tmp_path / "lost")]
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--distributed"], "no --out"),
        (["--coordinator", "localhost:1"], "--coordinator means nothing without --distributed"),
        (["--distributed", "--out", "x", "--processes", "2"], "valid: all three, or none"),
        (
            ["--distributed", "--out", "x", "--coordinator", "h:1", "--processes", "2", "--process-id", "2"],
            "--process-id, got 2; valid: 0 to 1",
        ),
    ],
)
def test_what_cannot_be_joined_is_said(capsys, arguments, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert launch.main([*ARGUMENTS, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert says in error
    assert not list(tmp_path.iterdir())
