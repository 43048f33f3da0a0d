"""Meta-validation: on tasks outside the mixture, without a trace in meta-training, and the best theta is kept."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from safetensors.numpy import load_file

from meta_train import launch, loop, validation
from meta_train.checkpoint import digest
from meta_train.config import Estimator, Group, Horizon, MetaOptimizer, Run, Validation
from meta_train.inner import Inner

OUTSIDE = Group("image_mlp", {"data": "digits", "hidden": [2], "batch_size": 8})
RUN = Run(
    name="x",
    rule="nn_adam",
    groups=(Group("tabular_mlp", {"hidden": [], "batch_size": 8}),),
    estimator=Estimator(pairs=2, truncation=4),
    horizon=Horizon(4, 12),
    meta_loss="train",
    meta_optimizer=MetaOptimizer(lr=0.5, warmup=0),  # so long that the last theta is not the best
    validation=Validation((OUTSIDE,), every=2, inner_steps=6, seeds=3),
    meta_steps=7,
    log_every=1,
    checkpoint_every=3,
)


def descent(horizon: int) -> Inner:
    """x ← x - theta x from x = 1 + seed-dependent noise, meta-loss x²."""

    def reset(key):
        return {"x": 1 + 0.1 * jax.random.normal(key), "t": jnp.zeros((), jnp.int32)}

    def step(theta, particle, key):
        x, t = (1 - theta) * particle["x"], particle["t"] + 1
        return {"x": x, "t": t}, x**2, t >= horizon, ~jnp.isfinite(x)

    return Inner(reset, step, {"x": 0, "t": None}, horizon, horizon)


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_the_score_is_the_weighted_mean_over_tasks_and_seeds(devices):
    """Whatever the devices; runs that only fill them up do not count."""
    mesh = jax.make_mesh((devices,), ("a",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    theta, key = jnp.float32(0.3), jax.random.key(5)
    judge = validation.make(
        lambda i, data: descent(int(3 + i)), ((), ()), weights=(0.25, 0.75), seeds=5, key=key, mesh=mesh
    )
    best, scores = judge(theta, validation.nothing_yet(theta), jnp.int32(7))

    def expected(task: int) -> float:
        keys = [jax.random.fold_in(jax.random.fold_in(key, task), seed) for seed in range(5)]
        starts = np.array([1 + 0.1 * jax.random.normal(jax.random.split(k, 2)[0]) for k in keys])
        return float(np.mean([(0.7 ** (2 * t)) * starts**2 for t in range(1, 4 + task)]))

    np.testing.assert_allclose([scores["validation/0"], scores["validation/1"]], [expected(0), expected(1)], rtol=1e-5)
    np.testing.assert_allclose(scores["validation"], 0.25 * expected(0) + 0.75 * expected(1), rtol=1e-5)
    assert (float(best.theta), int(best.step)) == (float(theta), 7)
    worse, _ = judge(jnp.float32(0.1), best, jnp.int32(9))
    assert (float(worse.theta), int(worse.step), float(worse.score)) == (float(theta), 7, float(best.score))
    better, _ = judge(jnp.float32(0.6), best, jnp.int32(9))
    assert (float(better.theta), int(better.step)) == (float(jnp.float32(0.6)), 9)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder, State) of RUN, and the State of the same without meta-validation."""
    out = []
    for name, run in (("with", RUN), ("without", dataclasses.replace(RUN, validation=Validation()))):
        folder = tmp_path_factory.mktemp(name) / "run"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(run.to_json()))
        state, came = loop.train(run, loop.build(run), folder, print)
        assert not came
        out.append((folder, state))
    return out


def test_what_would_be_exported_is_judged_on_validation_batches():
    """The average of theta where there is one, whatever batches the run's own meta-loss is on."""
    averaged = dataclasses.replace(RUN, meta_optimizer=dataclasses.replace(RUN.meta_optimizer, ema=0.5))
    scores = []
    for run in (averaged, dataclasses.replace(averaged, meta_loss="validation")):
        program = loop.build(run)
        other = jax.tree.map(lambda x: x + 0.3, program.init().theta)
        for change in ({}, {"theta": other}, {"ema": other}):
            scores.append(float(program.validate(program.init()._replace(**change))[1]["validation"]))
    as_it_was, theta_moved, ema_moved = scores[:3]
    assert as_it_was == theta_moved != ema_moved
    assert scores[3:] == scores[:3]


def test_it_does_not_change_meta_training(trained):
    (_, with_it), (_, without) = trained
    assert digest(with_it._replace(best=())) == digest(without)


def test_it_is_recorded_and_the_best_theta_kept(trained):
    (folder, state), (plain, _) = trained
    lines = loop.read_metrics(folder)
    assert [line["step"] for line in lines] == list(range(8))
    seen = {line["step"]: line["validation"] for line in lines if "validation" in line}
    assert list(seen) == [0, 2, 4, 6, 7]
    best = min(seen, key=lambda step: seen[step])
    assert (int(state.best.step), float(state.best.score)) == (best, seen[best])
    assert lines[-1]["best_step"] == best
    assert best < 7, "the last theta is the best; the test shows nothing"
    assert not any("validation" in line for line in loop.read_metrics(plain))


def test_export_writes_the_best_or_the_last(trained, tmp_path, capsys):
    (folder, state), _ = trained
    for arguments, theta, says in (
        ([], state.best.theta, f"theta of meta-step {int(state.best.step)} of 7, the best in meta-validation: "),
        (["--last"], state.theta, "theta of meta-step 7, the last"),
    ):
        target = tmp_path / f"weights{len(arguments)}"
        assert launch.main(["export", str(folder), "--to", str(target), *arguments]) == 0
        assert says in capsys.readouterr().out
        card = (target / "README.md").read_text()
        assert says in card
        assert "meta-validation of 6 inner steps on: image_mlp" in card
        saved = sorted(x.tobytes() for x in load_file(target / "model.safetensors").values())
        assert saved == sorted(np.asarray(x).tobytes() for x in jax.tree.leaves(theta))


def test_the_best_theta_comes_back_bit_for_bit(trained, tmp_path):
    """From a checkpoint after which no meta-validation has yet been."""
    (whole, state), _ = trained
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(RUN.to_json()))
    program = loop.build(RUN)

    def step(state):
        moved, metrics = program.meta_step(program.data, state._replace(best=()))
        if int(metrics["inner_steps"]) and int(moved.step) == 3:  # the run is killed in its third meta-step
            raise KeyboardInterrupt
        return moved, metrics

    stages = tuple(stage._replace(meta_step=lambda data, state: step(state)) for stage in program.stages)
    with pytest.raises(KeyboardInterrupt):
        loop.train(dataclasses.replace(RUN, checkpoint_every=1), program._replace(stages=stages), folder, print)
    resumed, _ = loop.train(RUN, program, folder, print)
    assert digest(resumed) == digest(state)
    lines = [
        [{k: v for k, v in line.items() if k != "inner_steps_per_second"} for line in loop.read_metrics(f)]
        for f in (whole, folder)
    ]
    assert lines[0] == lines[1]


def test_a_suite_is_what_meta_validates(tmp_path, monkeypatch, capsys):
    """Its tasks are in the record, the best theta is kept and exported, and the run goes on without the suite."""
    monkeypatch.chdir(tmp_path)
    words = [
        *("quickstart", "--compare", "", "--rule", "nn_adam", "--task", "tabular_mlp"),
        *("--groups.0.settings", '{"hidden": [], "batch_size": 8}', "--estimator.pairs", "2"),
        *("--estimator.truncation", "4", "--horizon.low", "4", "--horizon.high", "12", "--meta-steps", "3"),
        *("--meta-optimizer.lr", "0.5", "--meta-optimizer.warmup", "0", "--validation.suite", "smoke"),
        *("--validation.every", "1", "--validation.inner-steps", "3", "--validation.seeds", "1"),
    ]
    words += ["--allow-held-out"]  # for graph_network
    assert launch.main([*words, "--out", "run"]) == 0
    run = Run.from_json(json.loads(Path("run/config.json").read_text()))
    assert [task.family for task in run.validation.tasks] == ["image_mlp", "graph_network", "quadratic"]
    assert run.validation.suite == ""
    lines = loop.read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    scores = [line["validation"] for line in lines]
    mean = np.mean([[line[f"validation/{i}"] for i in range(3)] for line in lines], axis=1)
    np.testing.assert_allclose(scores, mean, rtol=1e-5)
    best = int(np.argmin(scores))
    assert f"exported: theta of meta-step {best} of 3, the best in meta-validation" in capsys.readouterr().out


def test_the_suite_for_recipes_is_no_part_of_any_mixture(capsys):
    quick = ["--rule", "nn_adam", "--validation.suite"]
    run = launch._with_suite(launch.parse("quickstart", [*quick, "dev"]).run)
    assert len(run.validation.tasks) >= 5
    assert loop.build(run).validate
    with pytest.raises(ValueError, match=r"validation\.suite: unknown suite 'dve'; valid: .*dev"):
        launch._with_suite(launch.parse("quickstart", [*quick, "dve"]).run)
    with pytest.raises(ValueError, match=r"validation\.suite, got 'dev' when its program is built; valid: none"):
        loop.build(launch.parse("quickstart", [*quick, "dev"]).run)


@pytest.mark.parametrize(
    ("tasks", "says"),
    [
        ((RUN.groups[0],), r"validation\.tasks\.0, got tabular_mlp\(breast_cancer.*groups\.0 is tabular_mlp"),
        (
            (OUTSIDE, Group("tabular_mlp", {"hidden": [], "batch_size": 16})),
            r"validation\.tasks\.1, .* valid: another family, other shapes of params, or other data",
        ),
        ((Group("tabular_mpl"),), "Did you mean 'tabular_mlp'"),
        ((Group("image_mlp", {"hiden": [2]}),), "Did you mean 'hidden'"),
    ],
)
def test_tasks_of_the_mixture_are_refused_by_name(tasks, says):
    with pytest.raises(ValueError, match=says):
        loop.build(dataclasses.replace(RUN, validation=Validation(tasks)))


def test_tasks_of_other_shapes_are_not_refused():
    tasks = (Group("tabular_mlp", {"hidden": [3]}),)
    assert loop.build(dataclasses.replace(RUN, validation=Validation(tasks))).validate


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--validation.every", "0"], "validation.every, got 0; valid: 1 to 2^31 - 1"),
        (["--validation.seeds", "-1"], "validation.seeds, got -1"),
        (["--validation.tasks", '{"family": "cnn"}'], "a JSON list of objects"),
        (["--validation.tasks", '[{"famly": "cnn"}]'], "Did you mean 'family'"),
        (["--validation.tasks", '[{"family": "cnn", "processes": [0]}]'], "all processes hold them"),
    ],
)
def test_bad_settings_are_named(words, says):
    with pytest.raises(ValueError) as error:
        launch.parse("quickstart", words)
    assert says in str(error.value)


def test_the_command_line_names_tasks():
    from meta_train import config as cfg

    words = ["--validation.tasks", json.dumps([{"family": "cnn", "settings": {"data": "digits"}}])]
    run = launch.parse("quickstart", words).run
    assert run.validation.tasks == (Group("cnn", {"data": "digits"}),)
    assert Run.from_json(json.loads(json.dumps(run.to_json()))) == run
    again = cfg.command(run)
    import shlex

    assert launch.parse("quickstart", shlex.split(again)[2:]).run == run
