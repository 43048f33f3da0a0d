"""Several processes train what one does, end together when one is lost, and go on afterwards."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from meta_train import distributed, launch, loop, placement
from meta_train import program as program_module
from meta_train.checkpoint import digest
from meta_train.config import Estimator, Group, Horizon, MetaOptimizer, Run, Validation
from meta_train.estimators.base import Estimate

ROOT = Path(__file__).parents[1]
# Three shapes, so three programs: two that one process holds alone, where it is said, and one that both do.
GROUPS = (
    Group("tabular_mlp", {"hidden": [], "batch_size": 8}),
    Group("image_mlp", {"data": "digits", "hidden": [4], "batch_size": 8}, weight=2.0),
    Group("tabular_mlp", {"hidden": [3], "batch_size": 8}),
)
APART = ((0,), (1,), ())
RUN = Run(
    name="x",
    rule="nn_adam",
    groups=GROUPS,
    estimator=Estimator(pairs=4, truncation=4),
    horizon=Horizon(4, 12),
    meta_loss="train",
    meta_optimizer=MetaOptimizer(warmup=0),
    validation=Validation((Group("image_mlp", {"data": "digits", "hidden": [2]}),), every=2, inner_steps=4, seeds=3),
    meta_steps=5,
    log_every=1,
    checkpoint_every=4,
)


def on(run: Run, processes=APART) -> Run:
    groups = (dataclasses.replace(g, processes=p) for g, p in zip(run.groups, processes, strict=True))
    return dataclasses.replace(run, groups=tuple(groups))


def prepare(folder: Path, run: Run) -> Path:
    """A run directory that nobody has worked in: `resume` begins it."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(run.to_json()))
    return folder


def begin(folder: Path, devices: int, *arguments: str) -> subprocess.Popen:
    cache = {"JAX_COMPILATION_CACHE_DIR": f"{ROOT}/.cache/jax", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    flags = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, "-m", "meta_train.launch", "resume", str(folder), *arguments],
        cwd=folder,
        env=os.environ | cache | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": flags},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def begin_two(folder: Path, other: Path | None = None) -> list[subprocess.Popen]:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    join = ["--distributed", "--coordinator", f"localhost:{port}", "--processes", "2", "--process-id"]
    return [begin(folder, 2, *join, "0"), begin(other or folder, 2, *join, "1")]


def finish(process: subprocess.Popen) -> tuple[int, str]:
    out, _ = process.communicate(timeout=240)
    return process.returncode, out


def record(folder: Path) -> list[dict]:
    """Without speeds."""
    return [{k: v for k, v in line.items() if k != "inner_steps_per_second"} for line in loop.read_metrics(folder)]


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """What one process makes of it, with as many devices as two have."""
    folder = prepare(tmp_path_factory.mktemp("one") / "run", RUN)
    code, out = finish(begin(folder, 4))
    assert code == 0, out
    return folder


@pytest.mark.parametrize("processes", [((), (), ()), APART], ids=["all groups on both", "groups on some processes"])
def test_two_processes_train_what_one_does(tmp_path, one, processes):
    two = prepare(tmp_path / "two", on(RUN, processes))
    for code, out in map(finish, begin_two(two)):
        assert code == 0, out
    expected, found = (load_file(folder / "artifact/model.safetensors") for folder in (one, two))
    for name, x in expected.items():
        np.testing.assert_allclose(found[name], x, rtol=1e-5, atol=1e-7, err_msg=name)
    for a, b in zip(record(one), record(two), strict=True):
        assert a.keys() == b.keys()  # once, by process 0, with what all groups did
        for name in a:
            np.testing.assert_allclose(b[name], a[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_processes_with_unlike_configs_are_refused(tmp_path):
    """Each would compute with its own, and the first would write down what neither did."""
    mine, other = (prepare(tmp_path / str(seed), dataclasses.replace(on(RUN), seed=seed)) for seed in (0, 1))
    for code, out in map(finish, begin_two(mine, other)):
        assert code == 2, out
        assert "the config of process 1 is not that of process 0; valid: the same command line" in out
    assert not (mine / "metrics.jsonl").exists()


def test_the_loss_of_a_process_ends_the_others_and_the_run_goes_on(tmp_path):
    """Each group's particles come back to where they were: what is run again gives the same record."""
    folder = prepare(tmp_path / "lost", dataclasses.replace(on(RUN), meta_steps=100_000, validation=Validation()))
    first, second = begin_two(folder)
    deadline = time.monotonic() + 240
    while len(loop.read_metrics(folder)) < 7 and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    second.send_signal(signal.SIGKILL)
    killed = time.monotonic()
    finish(second)
    code, out = finish(first)
    assert time.monotonic() - killed < 20
    assert code == 75, out
    assert "another process was lost" in out.splitlines()[-1]
    assert "lopt-train resume" in out.splitlines()[-1]
    before = record(folder)
    both = begin_two(folder)
    while len(loop.read_metrics(folder)) <= len(before) + 3 and both[0].poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    both[1].send_signal(signal.SIGTERM)  # one is told to stop: both do, at the same meta-step
    for code, out in map(finish, both):
        assert code == 143, out
    after = record(folder)
    assert [line["step"] for line in after] == list(range(1, len(after) + 1))
    assert after[: len(before)] == before
    code, out = finish(begin(folder, 4))
    assert code == 2, out
    assert "config.groups.1.processes, got 1; valid: 0 to 0" in out
    assert launch.main(["export", str(folder), "--to", str(tmp_path / "weights")]) == 0  # one process can


@pytest.mark.parametrize(
    ("ends", "code", "says"),
    [
        ("os.abort()", 134, "error: this process was ended by SIGABRT"),
        ("os.write(2, b'most likely indicates that another task died'); os.abort()", 75, "another process was lost"),
        ("os._exit(75)", 75, "another process was lost"),
        ("os.write(2, b'RESOURCE_EXHAUSTED: Out of memory'); os.abort()", 134, "this process was ended by SIGABRT"),
        ("sys.exit(2)", 2, ""),
        ("os.kill(os.getpid(), 9)", 137, "this process was ended by SIGKILL"),
        ("sys.stderr.write('x' * 300_000 + 'end'); sys.exit(0)", 0, "xend"),
    ],
)
def test_an_end_of_its_own_is_not_blamed_on_others(ends, code, says):
    script = f"import os, sys\nfrom meta_train import distributed\ndistributed.supervised()\n{ends}"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert ("another process was lost" in done.stderr) == (code == 75)


@pytest.mark.parametrize(
    ("error", "others"),
    [
        ("UNKNOWN: Gloo all-reduce failed: [external/gloo/pair.cc:547] Connection closed by peer [127.0.0.1]:39", True),
        ("UNAVAILABLE: failed to connect to all addresses", True),
        ("RESOURCE_EXHAUSTED: Out of memory allocating 17179869184 bytes.", False),
        ("INTERNAL: Failed to compile", False),
        ("INVALID_ARGUMENT: Executable expected parameter 0 of size 4 but got buffer with incompatible size 8", False),
    ],
)
def test_only_the_loss_of_others_ends_with_them(monkeypatch, error, others):
    monkeypatch.setattr(distributed, "several", lambda: True)
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    goes_on = contextlib.nullcontext() if others else pytest.raises(jax.errors.JaxRuntimeError)
    with goes_on, distributed.ends_with_the_others():
        raise jax.errors.JaxRuntimeError(error)
    assert codes == ([75] if others else [])


def met(weights) -> tuple:
    """What two processes of two devices bring, added up: two groups of one process each, and one of both."""
    placed = placement.place(on(RUN).groups, 4, 2, 0, 2)
    rng = np.random.default_rng(0)
    theta, found, shares = {"a": jnp.zeros(3), "b": jnp.zeros(())}, {}, []
    for process in (0, 1):
        here = {}
        for i in placed._replace(process=process).here:
            grad = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), theta)
            loss, counts = jnp.float32(rng.normal()), jnp.asarray(rng.integers(9, size=4), jnp.int32)
            here[i] = found[i, process] = Estimate(grad, loss, *counts)
        mine = placed._replace(process=process)
        shares += [placement.bring(here, theta, weights, mine, jnp.asarray(lead)) for lead in (True, False)]
    return found, placement.meet(
        jax.tree.map(lambda *xs: jnp.concatenate(xs), *shares), weights, placed, optax.tree.norm
    )


def test_what_all_bring_is_the_weighted_mean():
    weights = (0.2, 0.3, 0.5)
    found, (grad, loss, norm, counts) = met(weights)
    halves = found[2, 0], found[2, 1]
    means = [found[0, 0].grad, found[1, 1].grad]
    means.append(jax.tree.map(lambda x, y: (x + y) / 2, *(half.grad for half in halves)))
    expected = jax.tree.map(lambda *gs: sum(w * g for w, g in zip(weights, gs, strict=True)), *means)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), grad, expected)
    np.testing.assert_allclose(norm, [optax.tree.norm(g) for g in means], rtol=1e-5)
    both = (halves[0].loss + halves[1].loss) / 2
    np.testing.assert_allclose(loss, [found[0, 0].loss, found[1, 1].loss, both], rtol=1e-5)
    steps = [found[0, 0].steps, found[1, 1].steps, halves[0].steps + halves[1].steps]
    np.testing.assert_array_equal(counts[2], steps)
    # Wrong weights would be seen.
    assert abs(float(met((0.2, 0.5, 0.3))[1][0]["b"]) - float(expected["b"])) > 1e-3


@pytest.mark.slow  # the programs of two processes are compared with those of one above
def test_groups_of_their_own_programs_are_averaged_as_in_one(monkeypatch):
    """The programs of a placement, all in this process, against the one program of no placement."""
    estimator = Estimator(pairs=8, truncation=4)
    run = dataclasses.replace(RUN, groups=(GROUPS[0], GROUPS[2]), estimator=estimator, validation=Validation())
    together = loop.build(run)
    mesh, _ = program_module._devices_of(run)
    placed = placement.Placement(((0,),) * 2, 0, 8)
    monkeypatch.setattr(program_module, "_devices_of", lambda run: (mesh, placed))
    apart = loop.build(run)
    states = [together.init(), apart.init()]
    for _ in range(3):
        found = [
            program.meta_step(program.data, state) for program, state in zip((together, apart), states, strict=True)
        ]
        states, metrics = ([x[i] for x in found] for i in range(2))
        states[1] = apart.place(apart.gather(states[1]))
        for name, x in metrics[0].items():
            np.testing.assert_allclose(metrics[1][name], x, rtol=1e-4, atol=1e-6, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), *(s.theta for s in states))
    whole = apart.gather(states[1])
    assert digest(apart.gather(apart.place(whole))) == digest(whole)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), whole) == jax.tree.map(
        lambda x: (x.shape, x.dtype), together.gather(states[0])
    )  # what one layout saves, another one can go on from


@pytest.mark.parametrize(
    ("processes", "pairs", "says"),
    [
        (((0,), (2,), ()), 4, r"config\.groups\.1\.processes, got 2; valid: 0 to 1"),
        (((0,), (0,), (0,)), 4, "got no group for process 1; valid: one or more for each"),
        (((0,), (1,), ()), 6, r"config\.estimator\.pairs, got 6; valid: a multiple of 4, .* hold groups\.2"),
        (((0,), (1,), (1,)), 3, r"config\.estimator\.pairs, got 3; valid: a multiple of 2, .* hold groups\.0"),
    ],
)
def test_a_placement_that_cannot_be_is_named(processes, pairs, says):
    with pytest.raises(ValueError, match=says):
        placement.place(on(RUN, processes).groups, pairs, 2, 0, 2)


def test_who_holds_what():
    placed = placement.place(on(RUN).groups, 4, 2, 1, 2)
    assert placed is not None
    assert placed.holders == ((0,), (1,), (0, 1))
    assert placed.here == (1, 2)
    assert [placed.rows(i) for i in placed.here] == [slice(0, 4), slice(2, 4)]
    assert placement.place(RUN.groups, 4, 2, 1, 2) is None
    assert placement.place(on(RUN, ((0,), (0,), ())).groups, 4, 1, 0, 2) is None  # one process holds all anyway
    with pytest.raises(ValueError, match=r"group x: processes, got \[1, 1\]; valid: different numbers"):
        Group("x", processes=(1, 1))


def test_where_groups_live_is_no_part_of_the_result():
    assert on(RUN).identity() == RUN.identity()
    assert Run.from_json(json.loads(json.dumps(on(RUN).to_json()))) == on(RUN)


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
    assert launch.main(["quickstart", "--compare", "", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert says in error
    assert not list(tmp_path.iterdir())
