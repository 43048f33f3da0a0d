"""The meta-step: independent of the layout of devices, averaged over groups, safe from one bad gradient."""

from __future__ import annotations

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import lopt
import tasks
from lopt import rules
from meta_train import launch, loop
from meta_train import program as program_module
from meta_train.config import Estimator, Group, Horizon, MetaOptimizer, Run, Stage
from meta_train.estimators import REGISTRY

SMALL = Run(
    name="small",
    rule_settings={"hidden": 2},  # compiles in a fraction of the time
    groups=(Group("tabular_mlp", {"hidden": [4], "batch_size": 8}),),
    estimator=Estimator(pairs=4, truncation=4),
    horizon=Horizon(4, 12),
    meta_optimizer=MetaOptimizer(warmup=0),
    meta_steps=20,
)


QUICK = dataclasses.replace(
    SMALL,
    rule="nn_adam",
    rule_settings={},
    groups=(Group("tabular_mlp", {"hidden": [], "batch_size": 8}),),
)


def steps(run: Run, count: int) -> tuple[loop.State, list[dict]]:
    program = loop.build(run)
    state, metrics = program.init(), []
    for _ in range(count):
        state, found = program.meta_step(program.data, state)
        metrics.append(jax.device_get(found))
    return state, metrics


def test_the_gradient_on_eight_devices_is_that_of_one(monkeypatch):
    """Particles draw what they would draw on one device."""
    assert len(jax.devices()) == 8
    run = dataclasses.replace(QUICK, estimator=Estimator(pairs=8, truncation=4), meta_optimizer=MOMENTUM)
    found = {}
    for devices in (8, 1):
        monkeypatch.setattr(program_module, "usable_devices", lambda pairs, available, devices=devices: devices)
        state, _ = steps(run, 1)
        assert len(state.estimators[0].xi.sharding.device_set) == devices
        found[devices] = meta_gradient(state), state
    (wide, after), (narrow, before) = found[8], found[1]
    # Differences of float32 losses over 2 std² K: a part in ten million of a loss is some 1e-4 of a gradient.
    np.testing.assert_allclose(wide, narrow, rtol=1e-3, atol=1e-3 * np.abs(narrow).max())
    assert np.abs(wide).min() < 0.1 * np.abs(wide).max()  # no constant that would always agree
    np.testing.assert_array_equal(after.estimators[0].xi, before.estimators[0].xi)


MOMENTUM = MetaOptimizer("sgd", {"momentum": 0.9}, lr=0.1, warmup=0, clip=0.0)


def meta_gradient(state: loop.State) -> np.ndarray:
    """Of a first meta-step with MOMENTUM, whose first state it is."""
    (trace,) = (x for x in jax.tree.leaves(state.opt, is_leaf=is_trace) if is_trace(x))
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(trace.trace)])


def is_trace(x) -> bool:
    return isinstance(x, optax.TraceState)


def test_the_meta_optimizer_is_told_the_meta_loss(monkeypatch):
    """The mean over groups by weight; some of optax's optimizers set their step by it."""

    def by_value(learning_rate):
        def update(updates, state, params=None, *, value, **extra):
            return jax.tree.map(lambda u: value * jnp.ones_like(u), updates), state

        return optax.GradientTransformationExtraArgs(lambda params: (), update)

    monkeypatch.setattr(program_module.meta_optimizer, "optimizers", lambda: {"by_value": by_value})
    groups = (QUICK.groups[0], dataclasses.replace(QUICK.groups[0], weight=3.0))
    program = loop.build(dataclasses.replace(QUICK, groups=groups, meta_optimizer=MetaOptimizer("by_value", clip=0.0)))
    before = [np.array(x) for x in jax.tree.leaves(program.init().theta)]
    state, found = program.meta_step(program.data, program.init())
    assert found["meta_loss"] == pytest.approx(0.25 * found["meta_loss/0"] + 0.75 * found["meta_loss/1"])
    assert found["meta_loss/0"] != found["meta_loss/1"]
    for old, new in zip(before, jax.tree.leaves(state.theta), strict=True):
        np.testing.assert_allclose(new - old, found["meta_loss"], rtol=1e-4)


def test_each_meta_step_and_each_group_draws_anew():
    """With the noise of one meta-step in all, or of one group in all, an average of gradients is worth no more."""
    run = dataclasses.replace(QUICK, groups=QUICK.groups * 2, horizon=Horizon(12, 12, stagger=False))
    program = loop.build(run)
    summed, state = [np.zeros(())], program.init()
    for _ in range(2):
        state, _ = program.meta_step(program.data, state)
        first, second = (np.array(one.xi) for one in state.estimators)
        assert np.abs(first - second).min() > 0
        summed.append(first)
    assert np.abs((summed[2] - summed[1]) - summed[1]).min() > 0


@pytest.mark.parametrize("name", ["pes", "nres", "truncated_es", "truncated_backprop"])
def test_particles_start_staggered(name):
    """Also with log-uniform horizons, unless a run says otherwise."""
    shape = dataclasses.replace(QUICK, estimator=Estimator(name, pairs=64, truncation=4))
    assert shape.horizon.low < shape.horizon.high
    assert len(set(np.asarray(loop.build(shape).init().estimators[0].particles.t).tolist())) > 4
    together = dataclasses.replace(shape, horizon=Horizon(4, 12, stagger=False))
    assert not np.asarray(loop.build(together).init().estimators[0].particles.t).any()


@pytest.mark.parametrize(("pairs", "available", "expected"), [(8, 2, 2), (3, 2, 1), (6, 4, 3), (1, 8, 1), (8, 8, 8)])
def test_pairs_divide_over_devices(pairs, available, expected):
    assert program_module.usable_devices(pairs, available) == expected


def test_groups_are_averaged_by_weight():
    """Programs of their own do to a group what the one program does that it has alone."""
    run = dataclasses.replace(QUICK, meta_optimizer=MOMENTUM)
    other = Group("image_mlp", {"data": ["digits"], "hidden": [], "batch_size": 8}, weight=3.0)
    (alone, (first,)), (both, (metrics,)) = (
        steps(dataclasses.replace(run, groups=groups), 1) for groups in (run.groups, (*run.groups, other))
    )
    for name in ("meta_loss/0", "grad_norm/0"):
        np.testing.assert_allclose(metrics[name], first[name], rtol=1e-5)
    expected = (metrics["meta_loss/0"] + 3 * metrics["meta_loss/1"]) / 4
    np.testing.assert_allclose(metrics["meta_loss"], expected, rtol=1e-5)
    assert abs(metrics["meta_loss/0"] - metrics["meta_loss/1"]) > 0.1
    rest = (4 * meta_gradient(both) - meta_gradient(alone)) / 3
    np.testing.assert_allclose(np.linalg.norm(rest), metrics["grad_norm/1"], rtol=1e-4)
    assert both.estimators[0].xi.sharding == alone.estimators[0].xi.sharding


@pytest.mark.filterwarnings("ignore:Some donated buffers")  # of shapes alone, which lie on no device
def test_what_differs_in_phi_alone_is_one_program():
    def loops(*groups: Group) -> int:
        program = loop.build(dataclasses.replace(SMALL, groups=groups))
        return program.meta_step.lower(program.data, program.shapes).as_text().count("stablehlo.while")

    def images(*data: str, width: int = 4) -> Group:
        return Group("image_mlp", {"data": list(data), "hidden": [width], "batch_size": 8})

    one = loops(images("digits"))
    assert loops(images("digits", "mnist5k")) == one  # data sets of one shape: phi says which
    assert loops(images("digits"), images("digits", width=5)) == 2 * one
    # Groups of other arrays of one shape have weights and curves of their own.
    own = [Group("test_loop:levels", {"level": 0.5 * i}, weight=i + 1.0) for i in range(3)]
    assert loops(*own) == loops(own[0])
    _, (metrics,) = steps(dataclasses.replace(QUICK, groups=tuple(own)), 1)
    np.testing.assert_allclose([metrics[f"meta_loss/{i}"] for i in range(3)], [0.0, 0.5, 1.0], atol=0.1)


def levels(level: float):
    """A small bowl that lies as high as its data say."""
    return tasks.Task(
        name=f"levels-{level}",
        data=np.full(32, level, np.float32),
        sample=lambda key: (),
        init=lambda key, phi: jax.random.normal(key, (2,)),
        batch=lambda key, phi, data, split: data[jax.random.randint(key, (8,), 0, 32)],
        loss=lambda params, key, phi, batch: 0.01 * jnp.sum(params**2) + jnp.mean(batch),
    )


def test_a_gradient_that_is_not_finite_is_skipped_and_counted():
    """Theta, its average and the optimizer's state stay."""
    averaged = dataclasses.replace(SMALL.meta_optimizer, ema=0.5)
    program = loop.build(dataclasses.replace(SMALL, meta_optimizer=averaged))
    state = program.init()
    bad = state.estimators[0]._replace(xi=state.estimators[0].xi.at[0, 0].set(jnp.inf))
    state = state._replace(estimators=(bad,))
    before = [np.array(x) for x in jax.tree.leaves((state.theta, state.opt, state.ema))]
    state, metrics = program.meta_step(program.data, program.place(state))
    assert int(metrics["skipped"]) == 1
    after = jax.tree.leaves((state.theta, state.opt, state.ema))
    for x, y in zip(before, after, strict=True):
        np.testing.assert_array_equal(x, y)


def test_theta_never_becomes_infinite():
    wild = MetaOptimizer("sgd", lr=1e30, weight_decay=1e30, warmup=0, schedule="constant")
    state, metrics = steps(dataclasses.replace(QUICK, meta_optimizer=wild), 2)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.theta))
    assert [int(m["skipped"]) for m in metrics] == [1, 2]
    assert np.isfinite(metrics[0]["grad_norm"])


def diverges():
    """Whatever theta says: the loss is finite at the initial weights alone."""

    def loss(params, key, phi, batch):
        return jnp.where((params == 1.0).all(), jnp.sum(params**2), jnp.nan)

    return tasks.Task(
        name="diverges",
        data=(),
        sample=lambda key: jnp.zeros(()),
        init=lambda key, phi: jnp.ones(2),
        batch=lambda key, phi, data, split: (),
        loss=loss,
    )


@pytest.mark.parametrize("name", REGISTRY)
def test_a_group_all_of_whose_particles_diverge_has_no_gradient(name):
    """All losses are the limit then; a difference or derivative of 0 must not pass for a gradient, nor move theta."""
    run = dataclasses.replace(
        SMALL,
        rule="nn_adam",
        rule_settings={},
        estimator=dataclasses.replace(SMALL.estimator, name=name),
        horizon=Horizon(6, 6, stagger=False),
        meta_loss="fresh",
    )
    for group, skipped in ((Group(f"{__name__}:diverges"), 1), (SMALL.groups[0], 0)):
        program = loop.build(dataclasses.replace(run, groups=(group,)))
        state = program.init()
        before = [np.array(x) for x in jax.tree.leaves(state.theta)]
        state, metrics = program.meta_step(program.data, state)
        assert int(metrics["skipped"]) == int(metrics["skipped/0"]) == skipped
        after = jax.tree.leaves(state.theta)
        moved = [not np.array_equal(x, y) for x, y in zip(before, after, strict=True)]
        assert any(moved) == (not skipped)


def without_meta_gradient(part: float = 1.0):
    """Losses and inner gradients are finite; the meta-loss has no derivative, in `part` of the particles."""
    plain = lambda params: 0.5 * jnp.sum(params**2)  # noqa: E731

    def loss(params, key, phi, batch):
        return plain(params) + jnp.sqrt(phi * params[0] ** 2)  # at phi = 0 infinity times 0 in reverse

    return tasks.Task(
        name="without_meta_gradient",
        data=(),
        sample=lambda key: 1.0 * (jax.random.uniform(key) >= part),
        init=lambda key, phi: 1 + jax.random.uniform(key, (2,)),
        batch=lambda key, phi, data, split: (),
        loss=loss,
        value_and_grad=lambda params, key, phi, batch: jax.value_and_grad(plain)(params),
    )


def below_zero(offset: float = 0.0):
    """Half a square, from which something is taken."""
    return without_meta_gradient()._replace(
        loss=lambda params, key, phi, batch: 0.5 * jnp.sum(params**2) - offset, value_and_grad=None
    )


def test_losses_that_are_not_positive_at_init_are_no_measure():
    own = Group("test_loop:below_zero", {"offset": 100.0})
    run = dataclasses.replace(QUICK, groups=(Group("test_loop:below_zero"), own), normalise="init")
    with pytest.raises(
        ValueError, match=r"normalise, got 'init', but 16 of 16 losses at init of groups\.1, test_loop:be"
    ):
        loop.build(run)
    assert loop.build(dataclasses.replace(run, groups=run.groups[:1]))


def test_a_group_whose_losses_are_all_above_the_limit_is_told(tmp_path):
    """They are cut to it, and differ no more."""
    above = Group("test_loop:below_zero", {"offset": -100.0})
    run = dataclasses.replace(QUICK, groups=(above, *QUICK.groups), meta_loss="fresh", meta_steps=4, log_every=2)
    loop.train(run, loop.build(run), tmp_path, (said := []).append)
    (told,) = (line for line in said if "meta-gradient" in line)
    assert "group test_loop:below_zero (0) has a meta-gradient of exactly 0" in told
    assert "loss_limit = 3 (valid: a larger one" in told


BACKWARDS = [
    *("quickstart", "--compare", "", "--rule", "nn_adam", "--estimator.name", "truncated_backprop"),
    *("--task", "test_loop:without_meta_gradient", "--groups.0.settings", '{"part": 0.0}'),
    *("--task", "test_loop:without_meta_gradient", "--estimator.pairs", "4", "--estimator.truncation", "2"),
    *("--horizon.low", "2", "--horizon.high", "4", "--log-every", "4", "--checkpoint-every", "8"),
    *("--meta-steps", "12", "--meta-loss", "fresh"),
]


def test_a_run_that_loses_every_meta_gradient_of_a_group_stops(tmp_path, monkeypatch, capsys):
    """Zeros in their place would be finite, and the run would go on for ever without that group."""
    monkeypatch.chdir(tmp_path)
    assert launch.main([*BACKWARDS, "--out", "run"]) == 2
    error = capsys.readouterr().err
    assert "4 of 4 meta-gradients were not finite, more than skip_limit = 0.1 allows; lately of group " in error
    assert "lately of group test_loop:without_meta_gradient (1). They did not move theta. " in error
    assert "No checkpoint was saved yet; " in error
    (line,) = loop.read_metrics(tmp_path / "run")
    assert (line["skipped"], line["skipped/0"], line["skipped/1"]) == (4, 0, 4)
    # Where some particles are left, their gradient counts.
    some = ["--groups.1.settings", '{"part": 0.5}']
    assert launch.main([*BACKWARDS, *some, "--out", "some"]) == 0
    lines = loop.read_metrics(tmp_path / "some")
    assert lines[-1]["skipped"] < 3
    assert all(line["diverged/1"] for line in lines)


def test_one_program_serves_all_meta_steps():
    program = loop.build(SMALL)
    state = program.init()
    for _ in range(3):
        state, _ = program.meta_step(program.data, state)
    assert program.meta_step._cache_size() == 1


@pytest.mark.parametrize("groups", [SMALL.groups, (*SMALL.groups, Group("quadratic", {}))], ids=["one", "two"])
def test_a_meta_step_is_traced_once(monkeypatch, groups):
    """Whether settings are good is found out with shapes that lie as the state will; the call traces nothing anew."""
    traced, plain = [], program_module.make_estimator

    def counted(*args):
        made = plain(*args)

        def estimate(*given):
            traced.append(made)
            return made.estimate(*given)

        return made._replace(estimate=estimate)

    monkeypatch.setattr(program_module, "make_estimator", counted)
    program = loop.build(dataclasses.replace(SMALL, groups=groups))
    program.meta_step(program.data, program.init())
    assert len(traced) == len(groups)


def test_metrics_are_cut_back(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "x": 1}\n{"step": 2, "x": 2}\n{"step": 3, "x"')
    log = loop.Log(tmp_path, after=1)
    log.write({"step": 2, "x": 5.0})
    log.close()
    assert loop.read_metrics(tmp_path) == [{"step": 1, "x": 1}, {"step": 2, "x": 5.0}]


def test_lines_of_the_record_that_are_lost_are_told(tmp_path):
    """Damaged in its middle, or deleted beside good checkpoints; what is left is kept."""
    run = dataclasses.replace(QUICK, meta_steps=6, log_every=1, checkpoint_every=3)
    program, told = loop.build(run), []
    loop.train(run, program, tmp_path, told.append)
    assert not told
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines()
    lines[1:4] = ['{"step": null}', "abc", lines[3][:30]]
    path.write_text("\n".join(lines) + "\n")
    loop.train(run, program, tmp_path, told.append)
    assert told[-1] == "metrics.jsonl: 3 lines up to meta-step 6 are missing or damaged, the first of 2"
    assert [line["step"] for line in loop.read_metrics(tmp_path)] == [1, 5, 6]


def test_other_data_of_the_same_shapes_are_told(tmp_path):
    """Of a task of one's own, whose module may have changed since."""
    run = dataclasses.replace(QUICK, meta_steps=2, checkpoint_every=2)
    program, told = loop.build(run), []
    loop.train(run, program, tmp_path, told.append)
    loop.train(run, program, tmp_path, told.append)
    assert told == ["resuming at meta-step 2 of 2"]
    groups = (Group("tabular_mlp", {"hidden": [], "batch_size": 8, "data": "wine"}),)
    other = loop.build(dataclasses.replace(QUICK, groups=groups)).digest
    assert other != program.digest
    loop.train(run, program._replace(digest=other), tmp_path, told.append)
    assert told[1] == (
        f"checkpoint 2 was made on {program.digest} and goes on on {other}: no longer bit for bit the same run"
    )


def test_a_line_sums_what_is_counted_and_averages_the_rest():
    names = ("inner_steps", "diverged/0", "resets", "meta_loss", "grad_norm", "skipped")
    window = [dict(zip(names, values, strict=True)) for values in ((100, 1, 2, 0.5, 4, 3), (60, 0, 1, 1.5, 2, 5))]
    assert loop._summary(window) == dict(zip(names, (160, 1, 3, 1.0, 3.0, 5), strict=True))


def test_compiling_is_no_part_of_the_speed(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(loop, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))
    meter, metrics = loop.Meter(work=lambda m: float(m["inner_steps"])), {"inner_steps": np.float32(100)}
    with meter.compiling():
        clock[0] += 60
        meter.add(metrics)
    for _ in range(2):
        clock[0] += 2
        meter.add(metrics)
    window, speed = meter.window()
    assert (len(window), speed) == (3, 50)
    with meter.paused():
        clock[0] += 100
    meter.add(metrics)
    clock[0] += 4
    assert meter.window()[1] == 25
    with meter.compiling():  # of a line of its own: there is nothing else to tell
        clock[0] += 5
        meter.add(metrics)
    assert meter.window()[1] == 20


def test_the_meta_loss_falls():
    """Meta-training works at all: from a rule whose steps are thirty times too long."""
    run = dataclasses.replace(
        SMALL,
        rule_settings={"hidden": 2, "step_mult": 1.0},
        estimator=Estimator(pairs=32, std=0.1, truncation=8),
        horizon=Horizon(8, 24),
        meta_optimizer=MetaOptimizer(lr=0.05, warmup=0),
        meta_steps=80,
    )
    _, metrics = steps(run, 80)
    losses = [float(m["meta_loss"]) for m in metrics]
    assert np.mean(losses[-20:]) < 0.75 * np.mean(losses[:10])


def test_frozen_parts_stand_still():
    """Also under weight decay and momentum, which zeroed gradients would not stop."""
    run = dataclasses.replace(SMALL, freeze=("mlp.0", "skip"))
    start = loop.build(run).init().theta
    theta = steps(run, 2)[0].theta
    np.testing.assert_array_equal(theta.skip, start.skip)
    jax.tree.map(np.testing.assert_array_equal, theta.mlp[0], start.mlp[0])
    assert np.any(theta.mlp[1].w != start.mlp[1].w)
    with pytest.raises(ValueError, match=r"config.freeze: unknown part of theta 'mpl'.*Did you mean 'mlp"):
        loop.build(dataclasses.replace(SMALL, freeze=("mpl",)))


@pytest.mark.parametrize("name", ["pes", "nres", "truncated_backprop"])
def test_frozen_parts_are_no_noise_in_the_gradient_of_the_rest(name):
    """They are not perturbed, and the norm that is reported is that of what moves theta."""
    parts = {} if name == "truncated_backprop" else {"log": 0.5}
    estimator = Estimator(name, pairs=8, truncation=4, std_parts=parts)
    settings = {"lstm_hidden": 2}
    run = dataclasses.replace(QUICK, rule_settings=settings, freeze=("clock",), meta_optimizer=MOMENTUM)
    run = dataclasses.replace(run, estimator=estimator)
    program = loop.build(run)
    state, metrics = program.meta_step(program.data, program.init())
    gradient = meta_gradient(state)
    assert gradient.shape == state.theta.log.shape
    assert np.linalg.norm(gradient) == pytest.approx(float(metrics["grad_norm"]), rel=1e-5)
    if parts:
        noise = state.estimators[0].xi if name == "pes" else state.estimators[0].eps
        perturbed = jax.vmap(ravel_pytree(state.theta)[1])(noise)
        assert not any(np.any(x) for x in jax.tree.leaves(perturbed.clock))
        assert np.abs(perturbed.log).max() > 0.5


def test_the_average_of_theta_is_what_is_exported():
    run = dataclasses.replace(SMALL, meta_optimizer=MetaOptimizer(warmup=0, ema=0.5))
    program = loop.build(run)
    state = program.init()
    expected = jax.tree.map(np.asarray, state.theta)
    for _ in range(2):
        state, metrics = program.meta_step(program.data, state)
        expected = jax.tree.map(lambda old, new: 0.5 * old + 0.5 * np.asarray(new), expected, state.theta)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), state.exported, expected)
    assert "skipped/0" in metrics
    assert loop.build(SMALL).init().exported is not None


def test_a_run_changes_its_stage_at_the_meta_step_it_says(tmp_path):
    run = dataclasses.replace(QUICK, stages=(Stage(2, 8, 12, 8),), meta_steps=4, log_every=1)
    loop.train(run, loop.build(run), tmp_path, print)
    assert [line["inner_steps"] for line in loop.read_metrics(tmp_path)] == [32, 32, 64, 64]


def test_stages_follow_each_other():
    stages = (program_module.Stage(0, "a", 1), program_module.Stage(5, "b", 1), program_module.Stage(9, "c", 1))
    program = program_module.Program(None, (), None, stages, None, None, None, "", None)
    assert [program.at(step).meta_step for step in (0, 4, 5, 8, 9, 99)] == ["a", "a", "b", "b", "c", "c"]
    assert program._replace(stages=stages[::-1]).at(6).meta_step == "b"


def test_meta_training_starts_where_it_is_told(tmp_path):
    rule = rules.make("tiny", hidden=2)
    theta = jax.tree.map(lambda x: x + 0.5, rule.init_theta(jax.random.key(9)))
    lopt.save(tmp_path / "start", rule, theta, provenance={}, card="")
    state = loop.build(dataclasses.replace(SMALL, init_from=str(tmp_path / "start"))).init()
    jax.tree.map(np.testing.assert_array_equal, state.theta, theta)
    with pytest.raises(ValueError, match=r"config.init_from.*valid: an artifact of tiny"):
        loop.build(dataclasses.replace(SMALL, rule_settings={"hidden": 3}, init_from=str(tmp_path / "start")))
    with pytest.raises(ValueError, match="no such folder"):
        loop.build(dataclasses.replace(SMALL, init_from="nowhere"))
