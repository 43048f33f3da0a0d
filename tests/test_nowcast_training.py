"""Meta-training of nowcasts: recordings, the loss on windows of them, and runs that are interrupted."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lopt import nowcast as casts
from lopt.nowcast import network as N
from lopt.nowcast import predict
from meta_train import config as cfg
from meta_train import launch, nowcast, trajectories
from meta_train import nowcast_training as training
from meta_train.nowcast_config import Nowcasting, Problem, Recorded, Recording, Training, Validation
from meta_train.nowcast_validation import over, smoothed, steps_to

pytest.importorskip("grain")
pytest.importorskip("array_record")

MLP = {"data": "digits", "hidden": [4], "batch_size": 8}


def small(**changed):
    """Two tasks, 12 states a trajectory, networks of width 4 that look three states ahead."""
    groups = (Recorded("image_mlp", MLP, 24), Recorded("image_mlp", {**MLP, "hidden": [3]}, 20, 2.0))
    run = Nowcasting(
        "tiny",
        Recording(groups, interval=2, lrs=(1e-3, 1e-2), weight_decays=(0.0,), seeds=2),
        hidden=4,
        horizons=3,
        training=Training(steps=6, trajectories=2, windows=2, strides=(1, 2), warmup=1),
        log_every=2,
        checkpoint_every=3,
    )
    return dataclasses.replace(run, **changed)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recorded") / "trajectories"
    return folder, trajectories.record(small(), folder)


def test_configs_are_json_and_refuse_what_they_do_not_know(tmp_path):
    run = small()
    tree = json.loads(json.dumps(run.to_json()))
    assert cfg.from_json(tree) == run
    assert cfg.from_json(tree).identity() == run.identity()
    assert dataclasses.replace(run, log_every=7).identity() == run.identity()
    assert dataclasses.replace(run, hidden=5).identity() != run.identity()
    tree["training"]["widnows"] = 1
    with pytest.raises(ValueError, match=r"config.training: unknown key 'widnows'. Did you mean 'windows'"):
        cfg.from_json(tree)
    for changed, says in (
        ({"networks": ("gnn", "rnn")}, "networks, got .*valid: some of gnn, wnn"),
        ({"recording": dataclasses.replace(run.recording, groups=(Recorded("image_mlp", MLP, 8),))}, "7 intervals"),
        ({"context": 1}, "context, got 1; valid: 2 to"),
    ):
        with pytest.raises(ValueError, match=says):
            dataclasses.replace(run, **changed)
    for kind, changed, says in (
        (Training, {"strides": (0,)}, "strides"),
        (Training, {"compute": "float16"}, "valid: float32, bfloat16"),
        (Validation, {"inner_steps": 30}, "a multiple of evaluate"),
        (Problem, {"family": "cnn", "lr": 0.0}, "lr, got 0.0; valid: > 0"),
    ):
        with pytest.raises(ValueError, match=says):
            kind(**changed)
    parsed = launch.parse("nowcast_small", ["--training.steps", "9", "--hidden", "8", "--out", "x"])
    assert (parsed.run.training.steps, parsed.run.hidden, parsed.out) == (9, 8, "x")
    assert launch.main(["nowcast_small", "--training.stepz", "9"]) == 2


def test_recordings_are_states_of_adam(recorded):
    import optax

    import tasks

    folder, held = recorded
    assert [len(one.trajectories) for one in held] == [4, 4]
    assert [[t["states"] for t in one.trajectories] for one in held] == [[12] * 4, [10] * 4]
    records = trajectories._Records(folder / held[0].file, held[0], range(4), "float32")
    task, key = tasks.make("image_mlp", **MLP), jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 0), 1)
    assert held[0].trajectories[3] == {"lr": 1e-2, "weight_decay": 0.0, "seed": 1, "states": 12}
    phi = task.sample(jax.random.fold_in(key, 0))
    params, tx = task.init(jax.random.fold_in(key, 1), phi), optax.adam(1e-2)
    state = tx.init(params)
    grad = jax.jit(jax.grad(task.loss))
    for t in range(4):
        batch_key, loss_key = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, 2), t))
        grads = grad(params, loss_key, phi, task.batch(batch_key, phi, task.data, "train"))
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(records[3][1], trajectories.flat(params), atol=1e-5)
    assert np.abs(records[2][1] - trajectories.flat(params)).max() > 1e-2  # another rate


def test_recordings_are_used_again_or_refused(recorded, tmp_path):
    folder = tmp_path / "trajectories"
    shutil.copytree(recorded[0], folder)
    run = small()
    assert trajectories.record(run, folder) == recorded[1]
    other = dataclasses.replace(run, training=Training(steps=99), hidden=9)
    assert trajectories.read_manifest(other, folder)  # what changes no state
    with pytest.raises(ValueError, match=r"was recorded for another config; valid: .* delete the folder"):
        trajectories.read_manifest(dataclasses.replace(run, seed=1), folder)
    file = folder / recorded[1][1].file
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="has another sha256 than when it was recorded"):
        trajectories.read_manifest(run, folder)
    file.unlink()
    with pytest.raises(ValueError, match="is missing"):
        trajectories.read_manifest(run, folder)


def test_what_is_held_out_is_not_recorded(recorded, tmp_path):
    for family, settings, says in (
        ("image_mlp", {"data": "fashion10k"}, "data fashion10k"),
        ("vit", {"data": "mnist5k", "size": 8, "patch": 4}, "family vit"),
    ):
        recording = Recording((Recorded(family, settings, 24),), interval=2)
        run = dataclasses.replace(small(), recording=recording)
        with pytest.raises(ValueError, match=f"touches what is held out for evaluation: .*{says}"):
            trajectories.record(run, tmp_path / family)
    # Nor trained on, where somebody else recorded it.
    held = [recorded[1][0]._replace(sources=[["fashion10k", ""]])]
    with pytest.raises(ValueError, match="data fashion10k"):
        trajectories.refuse(small(), held)
    trajectories.refuse(dataclasses.replace(small(), allow_held_out=True), held)


COPIES = """
import jax, jax.numpy as jnp, tasks
from tasks.data import images
x = 0.2 + 0.5 * jnp.asarray(images("fashion10k", 8).x[299::-1])
def mine():
    return tasks.Task(x, lambda key: (), lambda key, phi: {"a": jax.random.normal(key, (64, 1)), "b": jnp.zeros(1)},
        lambda key, phi, data, split: data[jax.random.randint(key, (8,), 0, 300)],
        lambda p, key, phi, batch: jnp.mean((batch.reshape(8, 64) @ p["a"] + p["b"][None]) ** 2), name="mine")
"""


def test_a_users_copies_are_seen_where_they_are_recorded_read_and_chosen_by(tmp_path, monkeypatch):
    (tmp_path / "users_recorded.py").write_text(COPIES)
    monkeypatch.syspath_prepend(tmp_path)
    recording = Recording((Recorded("users_recorded:mine", {}, 24),), interval=2, lrs=(1e-3,), weight_decays=(0.0,))
    run = small(recording=recording, allow_held_out=True)
    (held,) = trajectories.record(run, tmp_path / "recorded")
    assert [name for name, _ in held.sources] == ["fashion10k"]
    for folder in ("recorded", "anew"):  # what somebody recorded with permission, and what is to be
        with pytest.raises(ValueError, match="data fashion10k"):
            trajectories.record(dataclasses.replace(run, allow_held_out=False), tmp_path / folder)
    for family, settings, says in (
        ("users_recorded:mine", {}, "mine touches .*data fashion10k"),
        ("coordinate_mlp", {}, "family coordinate_mlp"),
    ):
        chosen_by = small(validation=Validation((Problem(family, settings),)))
        with pytest.raises(ValueError, match=says):
            nowcast.pinned(chosen_by)
        assert nowcast.pinned(dataclasses.replace(chosen_by, allow_held_out=True)).validation.tasks[0].family == family


def test_batches_follow_from_their_number(recorded):
    folder, held = recorded
    run = small()
    stream = trajectories.batches(run, folder, held)
    first = [next(stream) for _ in range(6)]
    later = next(trajectories.batches(run, folder, held, first=4))
    jax.tree.map(np.testing.assert_array_equal, later, first[4])
    assert {int(b["task"][0]) for b in first} == {0, 1}
    for batch in first:
        assert batch["states"].shape[:2] == (2, 5 + 1 + 3)
        one = held[int(batch["task"][0])]
        records = trajectories._Records(folder / one.file, one, range(4), "float32")
        for states, valid in zip(batch["states"], batch["valid"], strict=True):
            assert not states[valid:].any()
            rows = [
                (n, [int(np.flatnonzero((records[n] == x).all(1))[0]) for x in states[:valid]])
                for n in range(4)
                if (records[n] == states[0]).all(1).any()
            ]
            ((number, at),) = rows
            assert number < 2  # the second seed is kept for validation
            assert set(np.diff(at)) in ({1}, {2})
    kept = next(trajectories.batches(run, folder, held, validation=True))
    same = [b for b in first if b["task"][0] == kept["task"][0]]
    assert not any((kept["states"][0, 0] == b["states"][:, 0]).all(1).any() for b in same)


LEAVES = [["conv/b", [3]], ["conv/w", [3, 3, 2, 3]], ["fc/b", [4]], ["fc/w", [12, 4]]]


def test_training_sees_what_nowcasts_do():
    """Padded edges of several windows at once give what the tiles of a nowcast give, scaled as it scales."""
    run = small(networks=("gnn",), layers=1)
    network = training.networks(run)["gnn"]
    network = network._replace(theta=jax.tree.map(lambda x: 3 * x, network.theta))
    wired = training.wiring(LEAVES, 0)
    fc = {"b": jnp.zeros(4), "w": jnp.zeros((12, 4))}
    params = {"conv": {"b": jnp.zeros(3), "w": jnp.zeros((3, 3, 2, 3))}, "fc": fc}
    sizes = [x.size for x in jax.tree.leaves(params)]
    spans = np.random.default_rng(0).normal(size=(1, 9, sum(sizes))).astype(np.float32)
    layout = predict.plan(casts.recognise(params), params, [path for path, _ in LEAVES], taps=9)

    @jax.jit
    def changes(states):
        parts = jnp.split(states, np.cumsum(sizes)[:-1], axis=1)
        history = [x.reshape(5, *p.shape) for x, p in zip(parts, jax.tree.leaves(params), strict=True)]
        scales = [N.statistics(h) for h in history]
        out = predict.gnn_changes(network, layout, history, scales, jnp.arange(1, 4))
        stds = [jnp.full(n, std) for (_, std), n in zip(scales, sizes, strict=True)]
        return jnp.concatenate([x.reshape(3, -1) for x in out], 1), jnp.concatenate(stds)

    losses = []
    for start, valid in ((0, 8), (1, 7)):  # the last state is not there
        out, stds = map(np.asarray, changes(spans[0, start : start + 5]))
        target = (spans[0, start + 5 : start + 8] - spans[0, start + 4]) / (stds + N.EPS)
        losses.append(np.abs(out - target)[: valid - 5])
    wanted = np.concatenate(losses).mean()

    @jax.jit
    def loss(theta, spans):
        valid = jnp.array([8])
        return jax.value_and_grad(lambda t: training.loss(network, run, wired, t, spans, valid), has_aux=True)(theta)

    (got, stay), grads = loss(network.theta, spans)
    np.testing.assert_allclose(got, wanted, rtol=1e-5)
    assert abs(float(stay) / wanted - 1) > 1e-2
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))  # padding has no part in them
    assert not np.isclose(loss(network.theta, spans[:, ::-1])[0][0], wanted, rtol=1e-4)
    moved = spans.copy()
    moved[:, 8] = np.nan  # what is not valid
    np.testing.assert_allclose(loss(network.theta, moved)[0][0], wanted, rtol=1e-5)


def test_steps_to_a_loss():
    losses = np.array([3.0, 1.0, 3.0, 3.0, 3.0, 2.0, 2.0, 2.0])
    assert smoothed(losses).tolist() == [3.0, 2.0, 3.0, 3.0, 3.0, 3.0, 3.0, 2.0]
    assert steps_to(losses, 2.0, 25) == 50
    assert steps_to(losses[2:], 2.0, 25) == 150
    assert steps_to(np.array([np.nan, 1.0]), 0.5, 25) == np.inf
    assert over(losses, 2.0, 25, 25) == 2
    assert over(np.array([3.0, 3.0]), 1.0, 50, 25) == 1.5 * 3.0  # the worse of two that never get there is worse
    assert over(np.array([3.0, np.nan]), 1.0, 50, 25) == 1.5 * 10.0


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


# The graph network takes a while to compile, and the run is built twice.
@pytest.mark.parametrize("networks", [("wnn",), pytest.param(("gnn", "wnn"), marks=pytest.mark.slow)])
def test_a_run_that_is_resumed_is_the_same(recorded, tmp_path, networks):
    """Bit for bit, from a checkpoint in its middle; then exported."""
    run, whole, again = small(networks=networks), tmp_path / "whole", tmp_path / "again"
    whole.mkdir()
    shutil.copytree(recorded[0], whole / nowcast.FOLDER)
    state, came = nowcast.train(run, whole, lambda text: None)
    assert came == 0
    assert state is not None
    assert int(state.skipped["wnn"]) == 0
    shutil.copytree(whole, again)
    shutil.rmtree(again / "checkpoints/6")
    other, _ = nowcast.train(run, again, lambda text: None)
    equal(state, other)
    start = training.init(run)
    assert not np.array_equal(start.theta["wnn"]["types"], state.theta["wnn"]["types"])
    lines = nowcast.read_metrics(again)
    assert [line["step"] for line in lines] == [2, 3, 4, 6]
    assert 0 < lines[-1]["held_relative/wnn"] < 10
    for line in nowcast.export(run, *nowcast.read_state(run, again), again / "artifact"):
        assert "the last theta, of meta-step 6" in line
    for name, folder in zip(networks, ("artifact", "artifact-wnn"), strict=False):
        network = casts.read(again / folder)
        assert network.name == name
        equal(network.theta, state.theta[name])
    with pytest.raises(ValueError, match="belongs to another config"):
        nowcast.read_state(dataclasses.replace(run, seed=1), again)


def test_a_recording_can_be_stopped(tmp_path):
    asked = []

    def stop():
        asked.append(1)
        return 15 if len(asked) > 13 else 0

    with pytest.raises(trajectories.StoppedError):
        trajectories.record(small(), tmp_path / "t", stop=stop)
    assert len(trajectories.read_manifest(small(), tmp_path / "t")) == 1  # the first was done
