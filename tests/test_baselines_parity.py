"""Our baselines against other implementations' recordings and against steps computed by hand, in float64.

Every comparison is made once with the right hyper-parameters and once for each of them a little off: those must differ.
"""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lopt import baselines
from lopt.baselines.adabound import adabound
from lopt.baselines.adahessian import adahessian, hutchinson
from lopt.baselines.adam_atan2 import adam_atan2
from lopt.baselines.adamp import adamp
from lopt.baselines.adamuon import adamuon
from lopt.baselines.base import at
from lopt.baselines.came import came
from lopt.baselines.cautious import cautious_adamw, cautious_lion
from lopt.baselines.diffgrad import diffgrad
from lopt.baselines.exadam import exadam
from lopt.baselines.gravity import gravity
from lopt.baselines.hand_celo2 import hand_celo2
from lopt.baselines.innaprop import innaprop
from lopt.baselines.laprop import laprop
from lopt.baselines.mars import mars
from lopt.baselines.shampoo import shampoo
from lopt.baselines.soap import soap
from lopt.baselines.swats import swats

RECORDED = np.load(Path(__file__).parent / "fixtures/baselines/recorded.npz")
STEPS = 20


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


# Compiling is what these tests do.
jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
)


def of(name):
    """A registered baseline as a factory of `(lr, **hyper)`."""
    return lambda lr, **hyper: baselines.get(name).make(lr=lr, **hyper)


ADAM = dict(lr=0.01, b1=0.9, b2=0.99)
# Name of the recording -> (factory, hyper-parameters that matter, the rest)
CASES = {
    "adam": (of("adam"), ADAM, {}),
    "adamw": (of("adamw"), ADAM | dict(weight_decay=0.1), {}),
    "radam": (of("radam"), ADAM, {}),
    "momentum": (of("momentum"), dict(lr=0.01, momentum=0.9), {}),
    "nesterov": (of("nesterov"), dict(lr=0.01, momentum=0.9), {}),
    "lion": (of("lion"), ADAM | dict(weight_decay=0.1), {}),
    "cautious_adamw": (cautious_adamw, dict(lr=0.01, b1=0.9, b2=0.95, weight_decay=0.1), {}),
    "cautious_lion": (cautious_lion, ADAM, {}),
    "laprop": (laprop, ADAM, {}),
    "diffgrad": (diffgrad, ADAM | dict(weight_decay=0.1), dict(eps=0.0)),
    "adamp": (adamp, ADAM | dict(weight_decay=0.1, decay_ratio=0.1), dict(delta=0.5)),
    "adabound": (adabound, ADAM | dict(final_lr=0.1, gamma=0.01), {}),
    "came": (came, dict(lr=0.01, b1=0.9, b2=0.99, b3=0.999, clip=1.0, weight_decay=0.1), {}),
    "exadam": (exadam, ADAM | dict(weight_decay=0.1), {}),
    "gravity": (gravity, dict(lr=0.01, beta=0.9), dict(alpha=0.0)),
    "swats": (swats, ADAM, dict(eps=0.0)),
    "mars": (
        mars,
        dict(lr=0.01, b1=0.95, b2=0.99, gamma=0.025, vector_b1=0.9, vector_b2=0.95, weight_decay=0.1),
        dict(eps=1e-12),
    ),
    "soap": (soap, dict(lr=0.01, b1=0.95, b2=0.95), dict(every=4)),
    "soap_one_side": (soap, dict(lr=0.01, b1=0.95, b2=0.95), dict(every=4, max_dim=4)),
    "shampoo": (shampoo, dict(lr=0.01, b2=1.0), dict(b1=0.0, ridge=1e-12, every=1, graft=False)),
    "adahessian": (adahessian, ADAM | dict(power=0.5, weight_decay=0.1), {}),
    "adamuon": (adamuon, dict(lr=0.01, b1=0.9, b2=0.95, weight_decay=0.1), dict(signed=False)),
}
# Settings that are not numbers, and what they must not be.
OTHERWISE = {
    "adamp": [dict(delta=0.01), dict(delta=5.0)],
    "soap": [dict(every=5)],
    "soap_one_side": [dict(every=4, max_dim=5)],
    "shampoo": [dict(block=2)],
    "adamuon": [dict(signed=True)],
}


def recorded(kind, tensors):
    return {k: jnp.asarray(RECORDED[f"{kind}/{k}"]) for k in tensors}


def trajectory(factory, hyper, tensors):
    """Parameters after every step of the recorded gradients. tensor -> [T, ...]"""
    tx = factory(hyper["lr"], **{k: x for k, x in hyper.items() if k != "lr"})
    start, data = recorded("start", tensors), (recorded("grads", tensors), recorded("diagonals", tensors))

    def step(carry, xs):
        params, state = carry
        updates, state = tx.update(xs[0], state, params, hessian_diag=xs[1])
        params = optax.apply_updates(params, updates)
        return (params, state), params

    return jax.lax.scan(step, (start, tx.init(start)), data)[1]


def off(key, x):
    """A hyper-parameter a little wrong; a decay by a fifth of its distance from 1."""
    return (1 - 1.2 * (1 - x) if x < 1 else 0.999) if key[-2:-1] == "b" or key in ("momentum", "beta") else 1.1 * x


def miss(ours, theirs, tensors):
    """Greatest difference over greatest movement, over steps and tensors."""
    moved = max(np.abs(theirs[k] - RECORDED[f"start/{k}"]).max() for k in tensors)
    return max(np.abs(np.asarray(ours[k]) - theirs[k]).max() for k in tensors) / moved


@pytest.mark.parametrize("name", CASES)
def test_reproduces_the_recording_and_nothing_else_does(name):
    factory, hyper, rest = CASES[name]
    tensors = [key.split("/")[1] for key in RECORDED if key.startswith(f"{name}/")]
    theirs = {k: RECORDED[f"{name}/{k}"] for k in tensors}
    variants = [hyper, *(hyper | {key: off(key, x)} for key, x in hyper.items())]
    stacked = {key: jnp.asarray([v[key] for v in variants]) for key in hyper}
    ours = jit(jax.vmap(lambda h: trajectory(functools.partial(factory, **rest), h, tensors)))(stacked)
    misses = [miss({k: x[i] for k, x in ours.items()}, theirs, tensors) for i in range(len(variants))]
    assert misses[0] < 1e-6
    assert min(misses[1:]) > 1e-4, dict(zip(hyper, misses[1:], strict=True))


@pytest.mark.parametrize(("name", "rest"), [(name, rest) for name, many in OTHERWISE.items() for rest in many])
def test_other_settings_miss_the_recording(name, rest):
    factory, hyper, kept = CASES[name]
    tensors = [key.split("/")[1] for key in RECORDED if key.startswith(f"{name}/")]
    ours = jit(lambda: trajectory(functools.partial(factory, **kept | rest), hyper, tensors))()
    assert miss(ours, {k: RECORDED[f"{name}/{k}"] for k in tensors}, tensors) > 1e-4


# Steps computed by hand. Each function below is written from the paper, in NumPy; it gives the parameters step by step.

W, G = np.asarray(RECORDED["start/w"]), np.asarray(RECORDED["grads/w"])


def rms(x):
    return np.sqrt(np.mean(x**2))


def adam_moments(t, m, v, g, b1, b2):
    """m, v, and both corrected, after gradient number t from 1."""
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
    return m, v, m / (1 - b1**t), v / (1 - b2**t)


def by_adam_atan2(p, lr, b1, b2, a, b, weight_decay):
    m = v = 0.0
    for t, g in enumerate(G, 1):
        m, v, mh, vh = adam_moments(t, m, v, g, b1, b2)
        p = p - lr * (a * np.arctan2(mh, b * np.sqrt(vh)) + weight_decay * p)
        yield p


def by_innaprop(p, lr, alpha, beta, b2, weight_decay):
    """As printed: the auxiliary variable ψ and not ours."""
    v, psi = 0.0, (1 - alpha * beta) * p
    for t, g in enumerate(G, 1):
        v = b2 * v + (1 - b2) * g**2
        p = (1 - weight_decay * lr) * p
        psi = (1 - lr / beta) * psi + lr * (1 / beta - alpha) * p
        step = lr * beta * g / np.sqrt(v / (1 - b2**t))
        p = (1 + lr * (1 - alpha * beta) / (beta - lr)) * p - lr / (beta - lr) * psi - step
        yield p


def by_hand_celo2(p, lr, b1, b2, floor, num_steps):
    m = v = 0.0
    for t, g in enumerate(G, 1):
        m, v, mh, vh = adam_moments(t, m, v, g, b1, b2)
        a = mh / np.sqrt(vh)
        p = p - lr * 0.5 * (1 + np.cos(np.pi * min((t - 1) / num_steps, 1))) * max(rms(p), floor) * a / rms(a)
        yield p


def by_adamuon(p, lr, b1, b2, weight_decay):
    """As shipped: of the momentum's sign."""
    m = v = 0.0
    for t, g in enumerate(G, 1):
        m = b1 * m + (1 - b1) * g
        o = np.sign(m) / np.linalg.norm(np.sign(m))
        for _ in range(5):
            o = 3.4445 * o - 4.7750 * o @ o.T @ o + 2.0315 * o @ (o.T @ o) @ (o.T @ o)
        v = b2 * v + (1 - b2) * o * o
        d = o / np.sqrt(v / (1 - b2**t))
        p = p - lr * (0.2 * np.sqrt(d.size) / np.linalg.norm(d) * d + weight_decay * p)
        yield p


def by_shampoo(p, lr, b1, b2):
    """Blocks of at most 2, roots every 3 steps, grafted: rows in 3 blocks of 2 (the last of 1), columns in 2."""
    m, v, left, right, root = 0.0, 0.0, {}, {}, {}
    blocks = [(i, j) for i in (0, 2, 4) for j in (0, 2)]
    for t, g in enumerate(G, 1):
        d = np.zeros_like(g)
        for i, j in blocks:
            x = g[i : i + 2, j : j + 2]
            left[i, j] = b2 * left.get((i, j), 0.0) + (1 - b2) * x @ x.T
            right[i, j] = b2 * right.get((i, j), 0.0) + (1 - b2) * x.T @ x
            if t % 3 == 1:
                root[i, j] = [power(side[i, j], -0.25) for side in (left, right)]
            d[i : i + 2, j : j + 2] = root[i, j][0] @ x @ root[i, j][1]
        v = b2 * v + (1 - b2) * g**2
        graft = g / (np.sqrt(v / (1 - b2**t)) + 1e-8)
        m = b1 * m + (1 - b1) * d * np.linalg.norm(graft) / np.linalg.norm(d)
        p = p - lr * m / (1 - b1**t)
        yield p


def power(matrix, exponent):
    values, vectors = np.linalg.eigh(matrix)
    values = np.maximum(values, 0) + 1e-6 * values[-1]
    return vectors * values**exponent @ vectors.T


def by_swats(p, lr, b1, b2, tolerance):
    m = v = buffer = estimate = 0.0
    found = None
    for t, g in enumerate(G, 1):
        if found is not None:
            buffer = b1 * buffer + g
            p = p - (1 - b1) * found * buffer
            yield p
            continue
        m, v, mh, vh = adam_moments(t, m, v, g, b1, b2)
        step = -lr * mh / np.sqrt(vh)
        p = p + step
        gamma = np.sum(step * step) / -np.sum(step * g)
        estimate = b2 * estimate + (1 - b2) * gamma
        if t > 1 and abs(estimate / (1 - b2**t) - gamma) < tolerance and estimate > 0:
            found = estimate / (1 - b2**t)
        yield p
    assert found is not None  # or nothing was tested


def by_schedule_free(p, lr, b1, weight_decay, num_steps):
    """y, where gradients are taken; x averages z with weights lr²."""
    y = x = z = p
    weights = greatest = 0.0
    for t, g in enumerate(G, 1):
        rate = lr * min(t / (0.05 * num_steps), 1)
        greatest = max(greatest, rate)
        weights += greatest**2
        z = z - rate * (g + weight_decay * y)
        x = x + greatest**2 / weights * (z - x)
        y = b1 * x + (1 - b1) * z
        yield y


def by_lookahead(p, lr, slow_step_size, b1, b2):
    """The fast optimizer keeps its averages."""
    slow, m, v = p, 0.0, 0.0
    for t, g in enumerate(G, 1):
        m, v, mh, vh = adam_moments(t, m, v, g, b1, b2)
        p = p - lr * mh / (np.sqrt(vh) + 1e-8)
        if t % 5 == 0:
            p = slow = slow + slow_step_size * (p - slow)
        yield p


def by_sgd(p, lr, weight_decay):
    for g in G:
        p = p - lr * (g + weight_decay * p)
        yield p


def by_sam(p, lr, rho, momentum):
    """On ½ |p|², at whose perturbed point the gradient is that point; the recorded gradient gives the direction."""
    buffer = 0.0
    for g in G:
        buffer = momentum * buffer + p + rho * g / np.linalg.norm(g)
        p = p - lr * buffer
        yield p


def by_sophia(p, lr, b1, b2, gamma, weight_decay):
    """On ½ |p|², whose Hessian any random signs give exactly: 1. Refreshed at updates 1 and 11, after the step."""
    m = h = 0.0
    for t, g in enumerate(G, 1):
        m = b1 * m + (1 - b1) * g
        step = np.clip(m / (1 - b1**t) / np.maximum(gamma * h, 1e-8), -1, 1)
        p = p - lr * (step + weight_decay * p)
        h = b2 * h + (1 - b2) if t % 10 == 1 else h
        yield p


def by_ademamix(p, lr, b1, b2, memory, alpha, weight_decay, num_steps):
    """With the paper's schedulers: eq. for f(β3), and α t/T; β3 by the length of the slow average, memory · T."""
    b3 = min(max(1 - 1 / max(memory * num_steps, 1), b1), 0.9999)
    m = v = slow = 0.0
    for t, g in enumerate(G):
        f = min(t / num_steps, 1)
        b3_t = min(np.exp(np.log(b1) * np.log(b3) / ((1 - f) * np.log(b3) + f * np.log(b1))), b3)
        m, v, mh, vh = adam_moments(t + 1, m, v, g, b1, b2)
        slow = b3_t * slow + (1 - b3_t) * g
        p = p - lr * ((mh + alpha * f * slow) / (np.sqrt(vh) + 1e-8) + weight_decay * p)
        yield p


HAND = {
    "ademamix": (
        of("ademamix"),
        by_ademamix,
        ADAM | dict(memory=2.0, alpha=5.0, weight_decay=0.1, num_steps=16),
        {},
    ),
    "adam_atan2": (adam_atan2, by_adam_atan2, ADAM | dict(a=1.27, b=0.8, weight_decay=0.1), {}),
    "innaprop": (
        functools.partial(innaprop, eps=0.0),
        by_innaprop,
        dict(lr=0.01, alpha=0.3, beta=0.9, b2=0.99, weight_decay=0.1),
        {},
    ),
    "adamuon": (
        functools.partial(adamuon, eps=0.0),
        by_adamuon,
        dict(lr=0.01, b1=0.9, b2=0.8, weight_decay=0.1),
        {},
    ),
    "hand_celo2": (hand_celo2, by_hand_celo2, dict(lr=0.01, b1=0.9, b2=0.98, floor=1.5, num_steps=16), {}),
    "shampoo": (functools.partial(shampoo, block=2, every=3), by_shampoo, dict(lr=0.01, b1=0.9, b2=0.95), {}),
    "swats": (functools.partial(swats, eps=0.0), by_swats, ADAM | dict(tolerance=1e-3), {"tolerance"}),
    "schedule_free_sgd": (
        of("schedule_free_sgd"),
        by_schedule_free,
        dict(lr=0.01, b1=0.9, weight_decay=0.1, num_steps=200),
        {},
    ),
    "lookahead": (of("lookahead"), by_lookahead, ADAM | dict(slow_step_size=0.5), {}),
    "sgd": (of("sgd"), by_sgd, dict(lr=0.01, weight_decay=0.1), {}),
    "sam": (of("sam"), by_sam, dict(lr=0.01, rho=0.3, momentum=0.9), {}),
    "sophia": (of("sophia"), by_sophia, ADAM | dict(gamma=20.0, weight_decay=0.1), {}),
}


@pytest.mark.parametrize("memories", [(0.05, 0.1), (700.0, 1000.0)])
def test_ademamixs_memory_is_neither_below_b1_nor_beyond_the_papers(memories):
    """Beyond either bound of b3 another memory changes nothing."""
    hyper = ADAM | dict(alpha=5.0, weight_decay=0.1, num_steps=16)
    one, other = (np.stack([*by_ademamix(W, memory=memory, **hyper)]) for memory in memories)
    np.testing.assert_array_equal(one, other)

    def step(carry, g):
        updates, state = tx.update(g, carry[1], carry[0])
        return (params := optax.apply_updates(carry[0], updates), state), params

    tx = of("ademamix")(memory=memories[1], **hyper)
    rows = jit(lambda w: jax.lax.scan(step, (w, tx.init(w)), jnp.asarray(G))[1])(jnp.asarray(W))
    assert np.abs(rows - one).max() < 1e-6 * np.abs(one - W).max()


@pytest.mark.parametrize("name", HAND)
def test_steps_by_hand(name):
    factory, by_hand, hyper, thresholds = HAND[name]
    theirs = np.stack([*by_hand(W, **hyper)])
    given = dict(grad_fn=lambda p: p, value_fn=lambda p: 0.5 * jnp.sum(p * p))

    def run(hyper):
        tx = factory(hyper["lr"], **{k: x for k, x in hyper.items() if k != "lr"})

        def step(carry, g):
            params, state = carry
            updates, state = tx.update(g, state, params, **given)
            params = optax.apply_updates(params, updates)
            return (params, state), params

        return jax.lax.scan(step, (jnp.asarray(W), tx.init(jnp.asarray(W))), jnp.asarray(G))[1]

    variants = [hyper, *(hyper | {key: off(key, x)} for key, x in hyper.items() if key not in thresholds)]
    ours = jit(jax.vmap(run))({key: jnp.asarray([v[key] for v in variants]) for key in hyper})
    misses = [np.abs(np.asarray(x) - theirs).max() / np.abs(theirs - W).max() for x in ours]
    assert misses[0] < 1e-9
    assert min(misses[1:]) > 1e-5, (hyper, misses)


# What trajectories do not show


def test_adamuon_is_adam_on_vectors():
    ours, adam = adamuon(0.01, adam_b1=0.8, adam_b2=0.97), optax.adam(0.01, b1=0.8, b2=0.97)
    params = jnp.asarray(W[0])
    states = [tx.init(params) for tx in (ours, adam)]
    for g in G[:4]:
        found = [tx.update(jnp.asarray(g[0]), state, params) for tx, state in zip((ours, adam), states, strict=True)]
        (a, b), states = zip(*found, strict=True)
        np.testing.assert_allclose(a, b, rtol=1e-5)
    assert np.abs(np.diff(np.asarray(a))).min() > 1e-5


def test_hutchinson_is_unbiased_and_exact_on_a_diagonal():
    x = {"a": jnp.arange(3.0), "none": None}
    scale = jnp.asarray([1.0, -2.0, 3.0])
    exact = hutchinson(lambda p: {"a": scale * p["a"], "none": None}, x, jax.random.key(0))
    np.testing.assert_allclose(exact["a"], scale)
    matrix = jnp.asarray([[1.0, 2.0, -1.0], [2.0, -2.0, 0.5], [-1.0, 0.5, 3.0]])
    draw = jit(jax.vmap(lambda key: hutchinson(lambda p: matrix @ p, jnp.ones(3), key)))
    draws = np.asarray(draw(jax.random.split(jax.random.key(1), 4096)))
    error = draws.std(0) / 64
    assert np.abs((draws.mean(0) - np.diag(matrix)) / error).max() < 4
    assert np.abs((draws.mean(0) - np.asarray(matrix).sum(0)) / error).max() > 4  # the rows' sums, from z = 1


def test_adahessian_estimates_by_itself_every_few_steps():
    tx = adahessian(0.1, every=2, b2=0.5, eps=0.0)
    params = jnp.ones((2, 2, 1, 1))
    scale = jnp.asarray([1.0, 2.0, 3.0, 4.0]).reshape(params.shape)

    update = jit(lambda state: tx.update(jnp.ones_like(params), state, params, grad_fn=lambda p: scale * p))
    state = tx.init(params)
    for _ in range(3):
        updates, state = update(state)
        np.testing.assert_allclose(updates, -0.1 / 2.5)  # one number a window: the mean of the diagonal
    assert int(state[0].seen) == 2
    with pytest.raises(ValueError, match="adahessian: update needs hessian_diag= or grad_fn="):
        tx.update(params, state, params)


def test_gravity_starts_with_steps_of_alpha_whatever_the_schedule():
    tx = baselines.get("gravity").make(lr=0.5, alpha=0.02, schedule=lambda count: (count + 1) / 100)
    start = np.asarray(jax.tree.leaves(tx.init(jnp.zeros(4096)))[1])
    assert abs(start.std() / (0.02 / 0.5) - 1) < 4 / np.sqrt(2 * 4096)
    assert abs(start.mean()) < 4 * 0.04 / 64


def test_adabound_ends_as_sgd_at_the_scheduled_final_rate():
    tx = baselines.get("adabound").make(lr=0.01, final_lr=0.3, gamma=1e9, b1=0.0, schedule=lambda count: 0.5)
    updates, _ = tx.update(jnp.asarray([2.0, -3.0]), tx.init(jnp.zeros(2)), jnp.zeros(2))
    np.testing.assert_allclose(updates, [-0.3, 0.45], rtol=1e-6)


def test_learning_rates_may_be_schedules():
    assert at(0.5, 3) == 0.5
    assert at(lambda count: 0.5 * count, 3) == 1.5
