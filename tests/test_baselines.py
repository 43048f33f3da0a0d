"""The contract of a baseline, over every registered one: it can be tuned, vmapped, scanned and composed."""

from __future__ import annotations

import functools
import importlib
import pkgutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lopt import baselines
from lopt.baselines import base

NAMES = baselines.names()
OURS = [name for name in NAMES if baselines.REGISTRY[name] != "lopt.baselines.of_optax"]
STEPS = 150
NO_RATE = {"cocob", "lbfgs"}
# Compiling is what these tests do.
jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
)


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


def rates(baseline, count):
    """Hyper-parameters of `count` points, [count] each: defaults, learning rates over their space."""
    hyper = {key: jnp.full(count, s.default, jnp.float32) for key, s in baseline.space.items()}
    if "lr" in hyper:
        lr = baseline.space["lr"]
        hyper["lr"] = jnp.asarray(np.geomspace(lr.low, lr.high, count), jnp.float32)
    return hyper


def given(loss, params):
    """What an update is given, and all that any may need."""
    value, grads = jax.value_and_grad(loss)(params)
    return grads, dict(value=value, value_fn=loss, grad_fn=jax.grad(loss), key=jax.random.key(0))


def train(tx, loss, params, steps):
    """(params, state) after the last step."""

    def step(carry, _):
        params, state = carry
        grads, extra = given(loss, params)
        updates, state = tx.update(grads, state, params, **extra)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), length=steps)[0]


# Leaves of all kinds


def mixed():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return {
        "w": draw(4, 3),
        "rank5": draw(1, 2, 1, 3, 1),
        "low": draw(3).astype(jnp.bfloat16),
        "scalar": draw(),
        "empty": draw(0, 3),
        "none": None,
    }


def bowl(params):
    """A quadratic with its minimum, 0, at 1/2."""
    curvature = {"w": 1.0, "rank5": 2.0, "low": 0.5, "scalar": 1.0, "empty": 1.0}
    parts = [c * jnp.sum((params[k].astype(jnp.float32) - 0.5) ** 2) for k, c in curvature.items()]
    return 0.5 * sum(parts)


def test_descends_on_leaves_of_all_kinds_at_traced_rates(name):
    """In one program: vmapped hyper-parameters, a traced horizon, scan, a schedule; and types stay what they were."""
    baseline, start = baselines.get(name), mixed()

    def run(hyper, num_steps):
        tx = baseline.make(num_steps=num_steps, schedule=lambda count: jnp.minimum((count + 1) / 5, 1.0), **hyper)
        params, state = train(tx, bowl, start, STEPS)
        return params, baseline.eval_params(state, params) if baseline.eval_params else params

    params, chosen = jit(jax.vmap(run, in_axes=(0, None), axis_size=4))(rates(baseline, 4), jnp.int32(STEPS))
    for tree in (params, chosen):
        assert jax.tree.map(lambda x: (x.shape[1:], x.dtype), tree) == jax.tree.map(lambda x: (x.shape, x.dtype), start)
    losses = np.asarray(jax.vmap(bowl)(chosen))
    assert np.nanmin(losses) < 0.3 * bowl(start)
    if "lr" in baseline.space:
        assert len(set(losses[np.isfinite(losses)].tolist())) > 1  # the learning rate is not ignored


# What a baseline is


def test_every_module_is_registered_and_has_what_the_registry_says():
    modules = {f"lopt.baselines.{m.name}" for m in pkgutil.iter_modules(baselines.__path__)} - {"lopt.baselines.base"}
    assert modules == set(baselines.REGISTRY.values())
    for module in modules:
        held = [b.name for b in importlib.import_module(module).BASELINES]
        assert sorted(held) == sorted(n for n, path in baselines.REGISTRY.items() if path == module)


def test_the_registry_needs_no_jax():
    code = "import lopt.baselines as b, sys; print(len(b.names()), 'jax' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == [str(len(NAMES)), "False"]


def test_fields_make_sense(name):
    b = baselines.get(name)
    assert b.name == name
    assert b.source
    assert b.needs <= base.NEEDS
    assert b.schedules
    assert set(b.schedules) <= {"constant", "cosine"}
    assert ("lr" in b.space) == (name not in NO_RATE)
    for key, s in b.space.items():
        assert s.low <= s.default <= s.high, key
        assert s.low < s.high, key
        assert s.low > 0 or not s.log, key
        assert s.choices is None or {s.low, s.high, s.default} <= set(s.choices), key
    grids = {key: s.choices for key, s in b.space.items() if s.choices}
    assert grids == ({"weight_decay": (0.0, 0.01, 0.1)} if name in ("adamw", "averaged_adamw", "nadamw", "sgd") else {})


def test_defaults_are_the_factories():
    """What `make` fills in from the space is what the factory does by itself, where it is ours."""
    import inspect

    for name in OURS:
        b = baselines.get(name)
        factory = getattr(importlib.import_module(baselines.REGISTRY[name]), name)
        signature = inspect.signature(factory).parameters
        for key, s in b.space.items():
            if key != "lr":
                assert signature[key].default == s.default, (name, key)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"lopt.baselines.get: unknown baseline 'adamV'. Did you mean 'adam"):
        baselines.get("adamV")
    with pytest.raises(ValueError, match=r"lopt.baselines: adamw: unknown hyper-parameter 'weightdecay'. Did you mean"):
        baselines.get("adamw").make(weightdecay=0.1)
    with pytest.raises(ValueError, match="hand_celo2: num_steps, got None"):
        baselines.get("hand_celo2").make(lr=0.1)
    with pytest.raises(ValueError, match=r"soap: every, got 0; valid: > 0"):
        importlib.import_module("lopt.baselines.soap").soap(0.1, every=0)


@pytest.mark.parametrize("name", [n for n in NAMES if baselines.get(n).needs])
def test_an_update_without_what_it_needs_is_refused(name):
    tx, p = baselines.get(name).make(), jnp.ones(2)
    with pytest.raises(ValueError, match=rf"{name}: update needs .*{min(baselines.get(name).needs)}="):
        tx.update(p, tx.init(p), p)
    with pytest.raises(ValueError, match=f"{name}: params, got None"):
        tx.update(p, tx.init(p))


# What costs is done only when due


def test_when_is_computed_for_the_batch_only_if_any_member_is_due():
    def f(due, x):
        return base.when(due, lambda: jnp.sin(x), x)

    x = jnp.arange(3.0)
    for due in ([True, False, True], [False, False, False]):
        ours = jax.vmap(f)(jnp.asarray(due), x)
        np.testing.assert_allclose(ours, np.where(due, np.sin(x), x), rtol=1e-6)
    (cond,) = [e for e in jax.make_jaxpr(jax.vmap(f))(jnp.asarray([True] * 3), x).eqns if e.primitive.name == "cond"]
    assert cond.invars[0].aval.shape == ()  # else it would be a select of both
    plain = jax.make_jaxpr(jax.vmap(lambda due, x: jax.lax.cond(due, jnp.sin, jnp.cos, x)))(x > 0, x)
    assert not [e for e in plain.eqns if e.primitive.name == "cond"]
    nested = jax.vmap(jax.vmap(f))(jnp.asarray([[True], [False]]), jnp.ones((2, 1)))
    np.testing.assert_allclose(nested[:, 0], [np.sin(1.0), 1.0], rtol=1e-6)


# Composition with optax


@pytest.mark.slow
def test_composes(name):
    """Donated steps equal a scan and are traced once; chain, MultiSteps and masked change nothing."""
    b = baselines.get(name)
    make = functools.partial(b.make, num_steps=STEPS, schedule=lambda count: 1 / (1 + 0.1 * count))
    tx, start, traces = make(), mixed(), []
    close = lambda a, b: jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-3, atol=1e-5), a, b)  # noqa: E731
    types = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731

    @functools.partial(jit, donate_argnums=(0, 1))
    def step(params, state):
        traces.append(1)
        grads, extra = given(bowl, params)
        updates, state = tx.update(grads, state, params, **extra)
        assert types(updates) == types(params)
        return optax.apply_updates(params, updates), state

    params, state = mixed(), tx.init(start)
    before = types(state)
    for _ in range(3):
        params, state = step(params, state)
    assert len(traces) == 1
    assert types(state) == before
    close(params, jit(lambda p: train(tx, bowl, p, 3)[0])(start))

    @jit
    def composed(params):
        grads, extra = given(bowl, params)
        only = lambda tx: tx.update(grads, tx.init(params), params, **extra)[0]  # noqa: E731
        many = optax.MultiSteps(make(), every_k_schedule=2)
        first, state = many.update(grads, many.init(params), params, **extra)
        second = many.update(grads, state, params, **extra)[0]
        return only(tx), only(optax.chain(optax.scale(1.0), make(), optax.scale(0.5))), first, second

    alone, chained, first, second = composed(start)
    close(chained, jax.tree.map(lambda u: 0.5 * u, alone))
    assert not any(jnp.any(u) for u in jax.tree.leaves(first))
    close(second, alone)
    if not b.needs - {"value"}:  # else the given functions are of all leaves
        grads, extra = given(bowl, start)
        mask = {key: key == "w" for key in start}
        masked = optax.masked(make(), mask)
        ours = masked.update(grads, masked.init(start), start, **extra)[0]
        part = {"w": start["w"]}
        close(ours["w"], tx.update({"w": grads["w"]}, tx.init(part), part, **extra)[0]["w"])
        np.testing.assert_array_equal(ours["rank5"], grads["rank5"])


@pytest.mark.slow
def test_trains_a_small_net(name):
    b = baselines.get(name)
    x = jax.random.normal(jax.random.key(0), (64, 6))
    y = jnp.tanh(x @ jax.random.normal(jax.random.key(1), (6, 3)))
    keys = jax.random.split(jax.random.key(2))
    start = {
        "w1": 0.4 * jax.random.normal(keys[0], (6, 16)),
        "b1": jnp.zeros(16),
        "w2": 0.25 * jax.random.normal(keys[1], (16, 3)),
        "b2": jnp.zeros(3),
    }

    def loss(p):
        return jnp.mean((jax.nn.relu(x @ p["w1"] + p["b1"][None]) @ p["w2"] + p["b2"][None] - y) ** 2)

    def run(hyper):
        params, state = train(b.make(num_steps=STEPS, **hyper), loss, start, STEPS)
        return loss(b.eval_params(state, params) if b.eval_params else params)

    losses = jax.jit(jax.vmap(run, axis_size=6))(rates(b, 6))
    assert np.nanmin(losses) < 0.15 * loss(start)
