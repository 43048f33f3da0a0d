"""Wrappers of tasks: what they change, and that the rest stays."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tasks
import tasks.es
from lopt import rules
from meta_train.inner import Horizon, make_inner
from tasks.augment import AUGMENTATIONS, wrap
from tasks.base import Task

FAST: Any = {"xla_backend_optimization_level": 0}  # compiling is most of the time
KEYS = jax.random.split(jax.random.key(0), 4)
CLOSE = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)


@functools.cache
def base():
    return tasks.make("tabular_mlp", hidden=(8,), batch_size=32)


@functools.cache
def by_es():
    return tasks.make("es", task="tabular_mlp", settings=None, pairs=4)


def gradient(task, params, phi, batch, key=KEYS[2]):
    return (task.value_and_grad or jax.value_and_grad(task.loss))(params, key, phi, batch)


def start(task):
    @functools.partial(jax.jit, compiler_options=FAST)
    def drawn(held):
        phi = task.sample(KEYS[0])
        return phi, task.init(KEYS[1], phi), task.batch(KEYS[3], phi, held, "train")

    return drawn(task.data)


@pytest.mark.parametrize(
    ("level", "decades", "task"),
    [
        *[(level, decades, base) for level in ("global", "tensor", "parameter") for decades in (1.0, 2.0, 3.0)],
        *[(level, 2.0, by_es) for level in ("global", "tensor", "parameter")],
    ],
)
def test_reparametrisation_leaves_the_function_unchanged(level, decades, task):
    plain, wrapped = task(), wrap(task(), [("reparametrise", {"level": level, "decades": decades})])

    @functools.partial(jax.jit, compiler_options=FAST)
    def both(held):
        phi = wrapped.sample(KEYS[0])
        params, batch = wrapped.init(KEYS[1], phi), wrapped.batch(KEYS[3], phi, held, "train")
        same = jax.tree.map(jnp.multiply, phi.drawn, params)
        value, grads = gradient(wrapped, params, phi, batch)
        expected, true = gradient(plain, same, phi.task, batch)
        pairs = [
            (same, plain.init(KEYS[1], phi.task)),
            (wrapped.loss(params, KEYS[2], phi, batch), plain.loss(same, KEYS[2], phi.task, batch)),
            (wrapped.metrics(params, KEYS[2], phi, batch), plain.metrics(same, KEYS[2], phi.task, batch)),
            (value, expected),
            (grads, jax.tree.map(jnp.multiply, phi.drawn, true)),  # and not what the scale is divided by
        ]
        drawn = jax.vmap(wrapped.sample)(jax.random.split(KEYS[0], 100)).drawn
        return phi, pairs, jnp.log10(jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(drawn)]))

    phi, pairs, logs = both(base().data)
    for one, other in pairs:
        jax.tree.map(CLOSE, one, other)
    # The scales cover the range, and are as many as the level says, but for a few that are equal by chance.
    assert -decades <= logs.min() < -0.9 * decades
    assert 0.9 * decades < logs.max() <= decades
    sizes = [leaf.size for leaf in jax.tree.leaves(pairs[0][0])]
    several = {"global": 1, "tensor": len(sizes), "parameter": sum(sizes)}[level]
    scales = {float(x) for leaf in jax.tree.leaves(phi.drawn) for x in np.ravel(leaf)}
    assert several - 3 * (level == "parameter") <= len(scales) <= several


def test_loss_scaling_scales_loss_and_gradient():
    wrapped = wrap(base(), [("scale_loss", {"decades": 2.0})])
    phi, params, batch = start(wrapped)
    assert 0.01 < phi.drawn < 100
    value, grads = gradient(wrapped, params, phi, batch)
    expected, true = gradient(base(), params, phi.task, batch)
    CLOSE(value, phi.drawn * expected)
    jax.tree.map(lambda a, b: CLOSE(a, phi.drawn * b), grads, true)
    assert wrapped.init_loss is None
    assert equal(wrapped.eval_batches(phi, base().data, "test"), base().eval_batches(phi.task, base().data, "test"))


def equal(one, other):
    return all(jax.tree.leaves(jax.tree.map(jnp.array_equal, one, other)))


def test_gradient_noise_is_of_its_size_and_by_key():
    wrapped = wrap(base(), [("noise_gradient", {"ratio": 0.5})])
    phi, params, batch = start(wrapped)
    _, true = gradient(base(), params, phi, batch)
    noisy = jax.vmap(lambda key: gradient(wrapped, params, phi, batch, key)[1])(jax.random.split(KEYS[0], 400))

    def judge(noisy, true):
        error = (noisy - true[None]) / (jnp.sqrt(jnp.mean(true**2)) + 1e-12)
        assert jnp.sqrt(jnp.mean(error**2)) == pytest.approx(0.5, rel=0.1)
        assert abs(jnp.mean(error)) < 4 * 0.5 / error.size**0.5

    jax.tree.map(judge, noisy, true)
    assert equal(gradient(wrapped, params, phi, batch), gradient(wrapped, params, phi, batch))


def test_normalised_gradients_have_unit_norm():
    phi, params, batch = start(base())
    _, true = gradient(base(), params, phi, batch)
    for level in ("global", "tensor"):
        wrapped = wrap(base(), [("normalise_gradient", {"level": level})])
        _, grads = gradient(wrapped, params, phi, batch)
        flat = [leaf.ravel() for leaf in jax.tree.leaves(grads)]
        parts = [jnp.concatenate(flat)] if level == "global" else flat
        assert all(jnp.linalg.norm(part) == pytest.approx(1, rel=1e-5) for part in parts)
        ratio = jax.tree.map(lambda a, b: jnp.sum(a * b) / (jnp.linalg.norm(a) * jnp.linalg.norm(b)), grads, true)
        assert all(one == pytest.approx(1, rel=1e-5) for one in jax.tree.leaves(ratio))
    flat = Task((), lambda key: (), None, None, lambda params, key, phi, batch: 1e-30 * jnp.sum(params))
    one = wrap(flat, [("normalise_gradient", {})]).value_and_grad(jnp.ones(4), KEYS[0], (), ())[1]
    np.testing.assert_allclose(one, 0.5)  # whose squares underflow
    still = flat._replace(loss=lambda params, key, phi, batch: 0.0 * jnp.sum(params))
    assert not wrap(still, [("normalise_gradient", {})]).value_and_grad(jnp.ones(4), KEYS[0], (), ())[1].any()


def test_reduced_batches_are_the_first_rows():
    wrapped = wrap(base(), [("reduce_batch", {"rows": 5})])
    phi, _, batch = start(wrapped)
    whole = base().batch(KEYS[3], phi, base().data, "train")
    assert equal(batch, jax.tree.map(lambda leaf: leaf[:5], whole))
    assert len(wrapped.batch(KEYS[3], phi, base().data, "validation").y) == 32
    with pytest.raises(ValueError, match="rows, got 33; valid: 1 to 32"):
        wrap(base(), [("reduce_batch", {"rows": 33})])
    with pytest.raises(ValueError, match="valid: tasks whose batches have rows"):
        wrap(tasks.make("graph_network"), [("reduce_batch", {})])


def test_label_noise_is_in_training_alone_and_stays_with_its_examples():
    wrapped = wrap(base(), [("noise_labels", {"share": 0.4})])
    phi, *_ = start(wrapped)
    keys, held = jax.random.split(KEYS[3], 60), base().data
    draw = lambda task, phi, split: jax.vmap(lambda key: task.batch(key, phi, held, split))(keys)  # noqa: E731
    noisy, clean = draw(wrapped, phi, "train"), draw(base(), phi.task, "train")
    assert equal(noisy.x, clean.x)
    assert set(np.ravel(noisy.y).tolist()) == {0, 1}
    met: dict[bytes, set[int]] = {}
    for x, y in zip(np.asarray(noisy.x).reshape(-1, noisy.x.shape[-1]), np.ravel(noisy.y), strict=True):
        met.setdefault(x.tobytes(), set()).add(int(y))
    assert len(met) < noisy.y.size / 3  # each was met several times
    assert all(len(labels) == 1 for labels in met.values())
    other = draw(wrapped, phi._replace(drawn=phi.drawn + 1), "train")
    assert jnp.mean(other.y != noisy.y) > 0.1
    rows, was = wrapped.eval_batches(phi, held, "train"), base().eval_batches(phi.task, held, "train")
    assert jnp.mean(rows.y != was.y) == pytest.approx(0.4 / 2, abs=0.07)  # half of what is drawn is right by chance
    for split in ("validation", "test"):
        assert equal(draw(wrapped, phi, split), draw(base(), phi.task, split))
        assert equal(wrapped.eval_batches(phi, held, split), base().eval_batches(phi.task, held, split))
    for family in ("quadratic", "tabular_regression", "pinn"):
        with pytest.raises(ValueError, match="valid: tasks with classes y"):
            wrap(tasks.make(family), [("noise_labels", {})])


@pytest.mark.parametrize("task", [base, by_es])
def test_lower_precision_is_lower_but_near(task):
    plain, wrapped = task(), wrap(task(), [("lower_precision", {})])
    phi, params, batch = start(wrapped)
    value, grads = gradient(wrapped, params, phi, batch)
    expected, true = gradient(plain, params, phi, batch)
    assert value.dtype == jnp.float32
    assert value != expected
    assert value == pytest.approx(float(expected), rel=0.02)
    for one, other in zip(jax.tree.leaves(grads), jax.tree.leaves(true), strict=True):
        assert one.dtype == jnp.float32
        if task is base:
            assert jnp.linalg.norm(one - other) < 0.05 * jnp.linalg.norm(other)
    jaxpr = str(jax.make_jaxpr(wrapped.loss)(params, KEYS[2], phi, batch))
    assert "dot_general" in jaxpr
    assert "f32[32,8]" not in jaxpr.replace("bf16", "")  # the hidden layer is nowhere in full precision


@pytest.mark.parametrize(("dtype", "wrapped"), [("bfloat16", False), ("bfloat16", True), ("float16", True)])
def test_evolution_strategies_see_small_perturbations_in_low_precision(dtype, wrapped):
    """At the smallest std of its SPACE, where a loss of 8 bits is the same for each perturbation."""
    task = tasks.make("es", task="tabular_mlp", settings={"hidden": (8,)}, pairs=64, std=tasks.es.SPACE["std"].low)
    phi, params, batch = start(task)
    low = lambda tree: jax.tree.map(lambda x: x.astype(dtype) if x.dtype == jnp.float32 else x, tree)  # noqa: E731
    _, true = gradient(task, params, phi, batch)
    if wrapped:
        value, grads = gradient(wrap(task, [("lower_precision", {"dtype": dtype})]), params, phi, batch)
    else:
        value, grads = gradient(task, low(params), phi, low(batch))
        assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype(dtype)}
    assert value.dtype == jnp.float32
    one, other = (jnp.concatenate([x.ravel().astype(jnp.float32) for x in jax.tree.leaves(g)]) for g in (grads, true))
    assert one @ other > 0.95 * jnp.linalg.norm(one) * jnp.linalg.norm(other)
    assert jnp.linalg.norm(one) == pytest.approx(float(jnp.linalg.norm(other)), rel=0.1)


def test_delayed_gradients_come_late():
    wrapped = wrap(base(), [("delay_gradient", {"steps": 3})])
    transform, params = wrapped.grad_transform, {"w": jnp.ones(2)}
    state, seen = transform.init(params), []
    for t in range(1, 8):
        out, state = transform.update({"w": jnp.full(2, float(t))}, state, params)
        seen.append(float(out["w"][0]))
    assert seen == [0, 0, 0, 1, 2, 3, 4]


def test_sparse_gradients_lose_nothing():
    wrapped = wrap(base(), [("sparsify_gradient", {"keep": 0.2})])
    transform, rng = wrapped.grad_transform, np.random.default_rng(0)
    params = {"b": jnp.zeros(3), "w": jnp.zeros((5, 4))}
    state, total, sent = transform.init(params), params, params
    for _ in range(20):
        grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params)
        out, state = transform.update(grads, state, params)
        assert [int(jnp.sum(leaf != 0)) for leaf in (out["b"], out["w"])] == [1, 4]
        assert jnp.abs(out["w"][out["w"] != 0]).min() >= jnp.abs(state["w"]).max()
        total, sent = (jax.tree.map(jnp.add, a, b) for a, b in ((total, grads), (sent, out)))
    jax.tree.map(CLOSE, jax.tree.map(jnp.add, sent, state), total)
    assert all(leaf.any() for leaf in jax.tree.leaves(state))


def test_wrappers_compose_and_keep_provenance():
    settings = [
        ("reparametrise", {"level": "parameter"}),
        ["scale_loss", {}],
        ("noise_labels", {}),
        ("noise_gradient", {}),
        ("reduce_batch", {"rows": 4}),
        ("lower_precision", {}),
        ("normalise_gradient", {}),
        ("delay_gradient", {"steps": 2}),
        ("sparsify_gradient", {}),
    ]
    assert {name for name, _ in settings} == set(AUGMENTATIONS)
    task = tasks.make("tabular_mlp", hidden=(8,), batch_size=32, augment=settings)
    assert (task.family, task.provenance) == ("tabular_mlp", base().provenance)
    assert task.name.startswith(base().name + " | reparametrised (parameter, 10^±1) | loss times 10^±1 | label noise")

    def one(key):
        phi = task.sample(key)
        params = task.init(key, phi)
        value, grads = gradient(task, params, phi, task.batch(key, phi, task.data, "train"), key)
        state = task.grad_transform.init(params)
        for _ in range(3):
            out, state = task.grad_transform.update(grads, state, params)
        return value, out, task.loss(params, key, phi, task.batch(key, phi, task.data, "validation"))

    value, out, judged = jax.jit(jax.vmap(one), compiler_options=FAST)(KEYS)
    assert jnp.isfinite(value).all()
    assert jnp.isfinite(judged).all()
    assert all(leaf.any() for leaf in jax.tree.leaves(out))


@pytest.mark.parametrize(
    ("wrapper", "message"),
    [
        (("reparametrize", {}), "unknown wrapper 'reparametrize'. Did you mean 'reparametrise'"),
        (("scale_loss", {"decade": 1}), "scale_loss has no setting 'decade'. Did you mean 'decades'"),
        ("scale_loss", r"wrapper, got 'scale_loss'; valid: \(name, settings\)"),
        (("reparametrise", {"level": "row"}), "level, got 'row'; valid: global, tensor, parameter"),
        (("reparametrise", {"decades": 11}), "decades, got 11; valid: 0 to 10"),
        (("noise_labels", {"share": 1.5}), "share, got 1.5; valid: 0 to 1"),
        (("delay_gradient", {"steps": 0}), "steps, got 0; valid: 1 to 1000"),
        (("sparsify_gradient", {"keep": 0}), "keep, got 0; valid: above 0, to 1"),
        (("lower_precision", {"dtype": "int8"}), "dtype, got 'int8'; valid: bfloat16, float16"),
        (("normalise_gradient", {"level": "parameter"}), "level, got 'parameter'; valid: global, tensor"),
    ],
)
def test_settings_are_validated(wrapper, message):
    with pytest.raises(ValueError, match=message):
        wrap(base(), [wrapper])


def test_a_particle_holds_the_gradients_on_their_way():
    """In meta-training: the first two of gradients that come two steps late are zero, and move nothing."""
    rule = rules.make("tiny", hidden=2)
    task = tasks.make("quadratic", dim=2, augment=[("delay_gradient", {"steps": 2})])
    inner = make_inner(rule, task, horizon=Horizon(9, 9))
    theta, step = rule.init_theta(KEYS[0]), jax.jit(inner.step, compiler_options=FAST)
    particles = [jax.jit(inner.reset, compiler_options=FAST)(KEYS[1])]
    for key in KEYS[:3]:
        particles.append(step(theta, particles[-1], key)[0])
    assert [equal(one.params, particles[0].params) for one in particles] == [True, True, True, False]
    assert [int(one.grad_state.t) for one in particles] == [0, 1, 0, 1]
