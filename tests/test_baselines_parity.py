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
    "shampoo": [dict(graft=True), dict(every=2), dict(block=2)],
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
