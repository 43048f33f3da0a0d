"""The optimizer of theta does what its config says, by hand on a theta of three numbers."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lopt import rules
from meta_train import loop, meta_optimizer
from meta_train.config import MetaOptimizer, load

THETA = {"a": jnp.asarray([1.0, -2.0]), "b": jnp.asarray(3.0)}
GRADS = [{"a": jnp.asarray([3.0, 0.5]), "b": jnp.asarray(-4.0)}, {"a": jnp.asarray([-1.0, 0.1]), "b": jnp.asarray(0.2)}]
PLAIN = dict(name="sgd", lr=0.1, warmup=0, schedule="constant", clip=0.0)


def updates(grads=GRADS[:1], freeze=(), meta_steps=10, theta=THETA, **spec):
    """The updates of each step."""
    tx = meta_optimizer.make(MetaOptimizer(**PLAIN | spec), meta_steps, theta, freeze)
    state, out = tx.init(theta), []
    for g in grads:
        u, state = tx.update(g, state, theta, value=1.0)
        theta = optax.apply_updates(theta, u)
        out.append(u)
    return out


def close(ours, a, b):
    np.testing.assert_allclose(np.asarray([*ours["a"], ours["b"]]), [*a, b], rtol=1e-5)


def test_by_name_with_settings():
    close(updates()[0], [-0.3, -0.05], 0.4)
    second = updates(GRADS, settings={"momentum": 0.5})[1]
    close(second, [-0.05, -0.035], 0.18)
    close(updates(name="lion", settings={"weight_decay": 0.0})[0], [-0.1, -0.1], 0.1)


def test_clips():
    close(updates(clip=1.0)[0], [-0.1, -0.05], 0.1)
    norm = np.sqrt(9 + 0.25 + 16)
    close(updates(clip_norm=1.0)[0], [-0.3 / norm, -0.05 / norm], 0.4 / norm)
    close(updates(clip_norm=norm / 2, clip=1.0)[0], [-0.1, -0.025], 0.1)  # the norm first
    close(updates(clip_step=0.1)[0], [-0.1, -0.05], 0.1)
    close(updates(clip_step_norm=0.1)[0], [-0.3 / norm, -0.05 / norm], 0.4 / norm)
    close(updates(clip_step_norm=norm / 20, clip_step=0.1)[0], [-0.1, -0.025], 0.1)  # here too


def test_weight_decay_is_decoupled_and_spares_what_is_frozen():
    close(updates(weight_decay=0.5)[0], [-0.3 - 0.05, -0.05 + 0.1], 0.4 - 0.15)
    still = {"a": jnp.zeros(2), "b": jnp.zeros(())}
    first, second = updates([still, still], weight_decay=0.5, schedule="linear", final_lr=0.0, meta_steps=2)
    close(first, [-0.05, 0.1], -0.15)  # and follows the schedule: half the rate, of what the first has left
    close(second, [-0.025 * 0.95, 0.05 * 0.95], -0.075 * 0.95)
    frozen = updates(GRADS, weight_decay=0.5, settings={"momentum": 0.9}, freeze=("a",))
    for u in frozen:
        assert not np.any(u["a"])
        assert u["b"] != 0


def test_accumulated_gradients_are_averaged():
    first, second = updates(GRADS, accumulate=2)
    close(first, [0, 0], 0)
    close(second, [-0.1, -0.03], 0.19)


@pytest.mark.parametrize(
    ("spec", "rates"),
    [
        (dict(schedule="constant", warmup=2), [0, 0.05, 0.1, 0.1, 0.1, 0.1]),
        (dict(schedule="linear", warmup=2, final_lr=0.02), [0, 0.05, 0.1, 0.08, 0.06, 0.04]),
        (dict(schedule="cosine", final_lr=0.0), [0.05 * (1 + np.cos(np.pi * t / 6)) for t in range(6)]),
        (dict(schedule="cosine", final_lr=0.0, accumulate=3), [0, 0, 0.1, 0, 0, 0.05]),  # it counts updates
    ],
)
def test_schedules(spec, rates):
    one = {"a": jnp.ones(2), "b": jnp.ones(())}
    got = [-float(u["b"]) for u in updates([one] * 6, meta_steps=6, **spec)]
    np.testing.assert_allclose(got, rates, atol=1e-6)


def test_the_average_follows_theta():
    ema = meta_optimizer.average({"x": jnp.asarray(1.0)}, {"x": jnp.asarray(3.0)}, (), MetaOptimizer(ema=0.75))
    assert ema["x"] == 1.5
    assert meta_optimizer.average((), THETA, (), MetaOptimizer()) == ()


def test_the_average_counts_updates_and_not_accumulated_gradients():
    spec = MetaOptimizer(**PLAIN, accumulate=3, ema=0.5)
    tx = meta_optimizer.make(spec, 12, THETA)
    theta, ema, state = THETA, THETA, tx.init(THETA)
    expected, seen = np.asarray(THETA["b"]), []
    for step in range(1, 7):
        u, state = tx.update(GRADS[0], state, theta, value=1.0)
        theta = optax.apply_updates(theta, u)
        ema = meta_optimizer.average(ema, theta, state, spec)
        expected = 0.5 * expected + 0.5 * np.asarray(theta["b"]) if step % 3 == 0 else expected
        np.testing.assert_allclose(ema["b"], expected, rtol=1e-6)
        seen.append(float(ema["b"]))
    assert len(set(seen)) == 3  # before the first update, after it, after the second
    assert seen[-1] != np.asarray(theta["b"])


@pytest.mark.parametrize("name", meta_optimizer.optimizers())
def test_every_optimizer_of_optax_takes_part(name):
    """As a meta-step calls it: with a schedule, gradients and the meta-loss."""
    theta = {"matrix": jnp.ones((2, 3)), **THETA}
    settings = {"key": 1} if name == "noisy_sgd" else {}  # it warns otherwise
    tx = meta_optimizer.make(MetaOptimizer(name=name, settings=settings, warmup=0), 10, theta)
    state = jax.eval_shape(tx.init, theta)
    found, after = jax.eval_shape(lambda *given: tx.update(*given, value=jnp.ones(())), theta, state, theta)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), found) == jax.tree.map(lambda x: (x.shape, x.dtype), theta)
    assert jax.tree.structure(after) == jax.tree.structure(state)


def test_which_optimizers_there_are():
    some = {"adam", "nadam", "nadamw", "lion", "muon", "prodigy", "ademamix", "rprop", "momo", "scale_by_adam"}
    assert some <= set(meta_optimizer.optimizers())
    close(updates(name="scale_by_sign")[0], [-0.1, -0.1], 0.1)
    close(updates(GRADS[:1] * 3, name="rprop")[2], [-0.12, -0.12], 0.12)  # longer where signs agree
    for name, factory in (("nadamw", optax.nadamw), ("ademamix", optax.contrib.ademamix)):
        tx = factory(0.1)
        expected, _ = tx.update(GRADS[0], tx.init(THETA), THETA)
        close(updates(name=name)[0], *expected.values())
    assert not set(meta_optimizer.UNFIT) & set(meta_optimizer.optimizers())
    for name in meta_optimizer.UNFIT:  # all of them exist
        assert hasattr(optax.contrib, name) or hasattr(optax, name)
    with pytest.raises(
        ValueError, match=r"meta_optimizer\.name, got lbfgs, which wants the loss at other points; valid"
    ):
        updates(name="lbfgs")


def test_what_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"config.meta_optimizer.name: unknown optimizer 'admw'. Did you mean 'adamw'"):
        updates(name="admw")
    with pytest.raises(ValueError, match=r"settings: adam: unknown setting 'beta1'. Did you mean 'b1'"):
        updates(name="adam", settings={"beta1": 0.5})
    for value in (2, "x", -0.1, True):
        with pytest.raises(ValueError, match=r"meta_optimizer\.settings: adam: b1, got .*; valid: a number in \[0, 1"):
            updates(name="adam", settings={"b1": value})
    with pytest.raises(ValueError, match=r"meta_optimizer\.settings, got {'eps': 'x'}: TypeError.*valid: what"):
        updates(name="adam", settings={"eps": "x"})
    with pytest.raises(ValueError, match=r"config.freeze: unknown part of theta 'c'"):
        updates(freeze=("c",))
    for bad in (dict(clip=-1.0), dict(ema=1.0), dict(accumulate=0), dict(schedule="cos")):
        with pytest.raises(ValueError, match=f"meta_optimizer.{next(iter(bad))}, got"):
            MetaOptimizer(**bad)
    quickstart = load("quickstart")
    with pytest.raises(ValueError, match=r"meta_optimizer.accumulate, got 3; valid: at most meta_steps = 2"):
        dataclasses.replace(quickstart, meta_steps=2, meta_optimizer=MetaOptimizer(accumulate=3))


def test_parts_of_theta_have_their_own_value():
    template = jax.eval_shape(rules.make("tiny", hidden=2).init_theta, jax.random.key(0))
    stds = meta_optimizer.by_part("here", template, {"mlp": 0.02, "mlp.1": 0.03, "log_step": 0.5}, 0.01)
    assert {(layer.w, layer.b) for layer in (stds.mlp[0], stds.mlp[2])} == {(0.02, 0.02)}
    assert (stds.mlp[1].w, stds.skip, stds.log_step) == (0.03, 0.01, 0.5)


def test_a_run_that_loses_its_gradients_is_stopped_and_the_group_named():
    from test_loop import SMALL

    line = {"skipped": 11.0, "skipped/0": 3.0}
    loop._refuse_divergence(SMALL, 200, line)  # 5.5 %
    with pytest.raises(ValueError, match=r"11 of 100 meta-gradients were not finite.*of group tabular_mlp \(0\)"):
        loop._refuse_divergence(SMALL, 100, line)
    with pytest.raises(ValueError, match=r"They did not move theta\. The newest checkpoint is of meta-step 90; valid"):
        loop._refuse_divergence(SMALL, 100, line, [70, 90])
    with pytest.raises(ValueError, match=r"1 of 500 meta-gradients .* more than skip_limit = 0 allows"):
        loop._refuse_divergence(dataclasses.replace(SMALL, skip_limit=0), 500, line | {"skipped": 1.0})
    loop._refuse_divergence(dataclasses.replace(SMALL, skip_limit=0.2), 50, line | {"skipped": 10.0})
