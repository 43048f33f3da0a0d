"""Learned proximal rules against recordings of the reference implementation: trajectories and meta-gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from composite import RHO, TOYS, lasso, logistic
from conftest import L2O

from lopt import prox, proximal, rules
from lopt.features import Layer
from lopt.rules import l2o_dm, l2o_pa, rnnprop


def weights(z, model, dtype):
    """theta of a recorded network; torch has two biases a layer and [out, in] matrices."""
    w = {name.split("/w/")[1]: z[name].astype(dtype) for name in z if name.startswith(f"{model}/w/")}
    layers = [
        l2o_pa.Recurrent(
            w[f"lstm.weight_ih_l{i}"].T, w[f"lstm.weight_hh_l{i}"].T, w[f"lstm.bias_ih_l{i}"] + w[f"lstm.bias_hh_l{i}"]
        )
        for i in range(2)
    ]

    def linear(*names):
        return Layer(
            np.concatenate([w[f"{name}.weight"] for name in names]).T,
            np.concatenate([w[f"{name}.bias"] for name in names]),
        )

    return layers, linear


def instances(z, names, dtype):
    W, b = (jnp.asarray(np.stack([z[f"{name}/{field}"] for name in names]), dtype) for field in ("W", "b"))
    return W, b


class Case(NamedTuple):
    model: str  # whose weights
    run: str  # in the recording
    smooth: Callable[..., jax.Array]
    instances: list[str]
    settings: dict[str, Any]


PA_LASSO = Case("pa_random", "pa_random_lasso", lasso, TOYS, {})
CASES = {
    "pa_random_lasso": PA_LASSO,
    "pa_trained_lasso": PA_LASSO._replace(model="pa_trained", run="pa_trained_lasso"),
    "pa_random_logistic": Case(
        "pa_random",
        "pa_random_logistic",
        logistic,
        ["logistic_small_0", "logistic_small_1"],
        {"activation": "softplus", "a_gain": 0.3},
    ),
    "pba12_random_lasso": PA_LASSO._replace(run="pba12_random_lasso", settings={"form": "PBA12"}),
}


COMMITTED = [name for name, case in CASES.items() if case.model == "pa_random"]


def start(recorded, run, count, n, dtype):
    """[N, 4H, n] the recorded memory of N instances in our order."""
    h, c = (recorded[f"{run}/{part}"].reshape(2, count, n, -1).astype(dtype) for part in ("h0", "c0"))
    return jnp.asarray(np.stack([h, c], 1).transpose(2, 0, 1, 4, 3).reshape(count, -1, n))


def theta_of(recorded, rule, model, dtype):
    layers, linear = weights(recorded, model, dtype)
    if rule.name == "l2o_dm":
        theta = l2o_dm.Theta(tuple(layers), linear("linear"))
    elif rule.name == "rnnprop":
        theta = rnnprop.Theta(linear("linear_in"), tuple(layers), linear("linear_out"))
    else:
        heads = [f"linear_{part}" for part in l2o_pa.PARTS[rule.settings["form"]]]
        theta = l2o_pa.Theta(tuple(layers), linear("linear"), linear(*heads))
    return jax.tree.map(jnp.asarray, theta)


def trajectory(z, name, steps, dtype):
    """Objectives at y and x [K + 1, N], iterates y and x [K + 1, N, n] of our rule from the recorded start."""
    model, run, smooth, names, settings = CASES[name]
    rule = rules.make("l2o_pa", **settings)
    theta = theta_of(z, rule, model, dtype)
    W, b = instances(z, names, dtype)
    n = W.shape[-1]
    memory = start(z, run, len(names), n, dtype)
    lipschitz = jnp.asarray(proximal.SAFE / z[f"{run}/step"], dtype)
    r = prox.l1(RHO)

    def one(W, b, memory, lipschitz):
        tx = rule.bind(theta, prox=r, lipschitz=lipschitz)
        gradient = jax.grad(lambda x: smooth(W, b, x))
        y = jnp.zeros(n, dtype)
        state = tx.init(y)
        state = state._replace(leaves=state.leaves._replace(memory=memory))

        def step(carry, _):
            y, state = carry
            x = l2o_pa.solution(state)
            out = (smooth(W, b, y) + r.value(y), smooth(W, b, x) + r.value(x), y, x)
            updates, state = tx.update(gradient(y), state, y, grad_fn=gradient)
            return (y + updates, state), out

        return jax.lax.scan(step, (y, state), None, length=steps + 1)[1]

    return jax.jit(jax.vmap(one, out_axes=1))(W, b, memory, lipschitz)


def full(shared):
    return {**np.load(shared / "parity/l2o/l2opa_parity.npz"), **np.load(shared / "parity/l2o/instances.npz")}


def farthest(z, name):
    """The largest difference from a recording in float64, of objectives and iterates at y and x."""
    with jax.enable_x64(True):
        run = CASES[name].run
        obj_y, obj_x, y, x = trajectory(z, name, len(z[f"{run}/obj_y"]) - 1, np.float64)
        at = z[f"{run}/iters_dumped"]
        pairs = ((obj_y, "obj_y"), (obj_x, "obj_x"), (y[at], "y"), (x[at], "x"))
        return max(float(np.max(np.abs(ours - z[f"{run}/{part}"]))) for ours, part in pairs)


@pytest.mark.parametrize("name", COMMITTED)
def test_recorded_trajectories_in_x64(name, committed):
    assert farthest(committed, name) <= 1e-12


@pytest.mark.parametrize("name", CASES)
def test_all_recorded_trajectories_in_x64(name, shared):
    z = full(shared)
    if name in COMMITTED:  # the fixture is a copy
        held = np.load(L2O)
        assert all(np.array_equal(held[key], z[key]) for key in held)
    else:
        assert farthest(z, name) <= 1e-12


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("pa_random_lasso", {"a_gain": 1.9}),
        ("pa_random_lasso", {"p_gain": 1.9}),
        ("pa_random_logistic", {"activation": "sigmoid"}),
        ("pba12_random_lasso", {"shift_gain": 0.02}),
    ],
)
def test_a_wrong_setting_is_noticed(name, wrong, committed, monkeypatch):
    monkeypatch.setitem(CASES, name, CASES[name]._replace(settings=CASES[name].settings | wrong))
    assert farthest(committed, name) > 1e-4


@pytest.mark.parametrize("name", COMMITTED)
def test_recorded_trajectories_in_float32(name, committed):
    z, run = committed, CASES[name].run
    obj_y, obj_x, *_ = trajectory(z, name, 20, np.float32)
    np.testing.assert_allclose(obj_y, z[f"{run}/obj_y"][:21], rtol=0, atol=1e-5)
    np.testing.assert_allclose(obj_x, z[f"{run}/obj_x"][:21], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("rule", "model"), [("l2o_dm", "dm_random"), ("rnnprop", "rnnprop_random")])
def test_recorded_trajectories_without_structure(rule, model, committed):
    with jax.enable_x64(True):
        z, rule = committed, rules.make(rule)
        run = f"{model}_lasso"
        theta = theta_of(z, rule, model, np.float64)
        W, b = instances(z, TOYS, np.float64)
        n = W.shape[-1]
        tx, steps = rule.bind(theta), len(z[f"{run}/obj_y"]) - 1

        def one(W, b, memory):
            y = jnp.zeros(n)
            state = tx.init(y)
            state = state._replace(leaves=state.leaves._replace(memory=memory))

            def step(carry, _):
                y, state = carry
                value = lasso(W, b, y) + RHO * jnp.sum(jnp.abs(y))
                # Of the mean over the instances, as recorded.
                g = (jax.grad(lambda y: lasso(W, b, y))(y) + RHO * jnp.sign(y)) / len(TOYS)
                updates, state = tx.update(g, state, y)
                return (y + updates, state), (value, y)

            return jax.lax.scan(step, (y, state), None, length=steps + 1)[1]

        obj, y = jax.jit(jax.vmap(one, out_axes=1))(W, b, start(z, run, len(TOYS), n, np.float64))
        np.testing.assert_allclose(obj, z[f"{run}/obj_y"], rtol=0, atol=1e-12)
        np.testing.assert_allclose(y[z[f"{run}/iters_dumped"]], z[f"{run}/y"], rtol=0, atol=1e-12)


def test_recorded_meta_gradients(committed):
    with jax.enable_x64(True):
        z, rule = committed, rules.make("l2o_pa")
        theta = theta_of(z, rule, "pa_random", np.float64)
        W, b = instances(z, TOYS, np.float64)
        n, r = W.shape[-1], prox.l1(RHO)
        lipschitz = jnp.asarray(proximal.SAFE / z["pa_random_lasso/step"])

        def segment(theta, y, leaves):
            """Mean over 20 steps and the instances of F at y; where it ends."""

            def one(W, b, lipschitz, y, leaves):
                tx = rule.bind(theta, prox=r, lipschitz=lipschitz)
                state = tx.init(y)._replace(leaves=leaves)

                def step(carry, _):
                    y, state = carry
                    updates, state = tx.update(jax.grad(lambda y: lasso(W, b, y))(y), state, y)
                    y = y + updates
                    return (y, state), lasso(W, b, y) + r.value(y)

                (y, state), values = jax.lax.scan(step, (y, state), None, length=20)
                return jnp.mean(values), (y, state.leaves)

            values, end = jax.vmap(one)(W, b, lipschitz, y, leaves)
            return jnp.mean(values), end

        y = jnp.zeros((len(TOYS), n))
        end = y, l2o_pa.Iterate(y, start(z, "pa_random_lasso", len(TOYS), n, np.float64), ())
        both = jax.jit(jax.value_and_grad(segment, has_aux=True))
        for number in (1, 2):
            (value, end), gradient = both(theta, *end)
            np.testing.assert_allclose(value, z[f"metagrad/seg{number}_loss"], rtol=0, atol=1e-12)
            theirs = {k.split(f"seg{number}/")[1]: z[k] for k in z if k.startswith(f"metagrad/seg{number}/")}
            ours = {
                "linear.weight": gradient.trunk.w.T,
                "linear.bias": gradient.trunk.b,
                "linear_p.weight": gradient.heads.w.T[:1],
                "linear_p.bias": gradient.heads.b[:1],
                "linear_a.weight": gradient.heads.w.T[1:],
                "linear_a.bias": gradient.heads.b[1:],
            }
            for i, layer in enumerate(gradient.lstm):
                ours |= {f"lstm.weight_ih_l{i}": layer.inputs.T, f"lstm.weight_hh_l{i}": layer.state.T}
                ours |= {f"lstm.bias_ih_l{i}": layer.b, f"lstm.bias_hh_l{i}": layer.b}
            assert ours.keys() == theirs.keys()
            for name, x in ours.items():
                np.testing.assert_allclose(x, theirs[name], rtol=0, atol=1e-12, err_msg=name)
