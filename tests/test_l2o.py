"""Learned and classical proximal methods against recorded trajectories, hand-computed steps and certified optima."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lopt
import tasks
from lopt import prox, proximal, rules
from lopt.features import Layer
from lopt.proximal_safeguard import safeguard
from lopt.rules import l2o_dm, l2o_pa, rnnprop
from meta_test import cli, l2o_methods, l2o_problems
from meta_test import l2o as judge
from meta_train.inner import Horizon, make_inner
from tasks import augment, certified


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


def lasso(W, b, x):
    return 0.5 * jnp.sum((W @ x - b) ** 2)


def logistic(W, b, x):
    t = W @ x
    return jnp.mean(jnp.logaddexp(0.0, t) - b * t)


RHO = 0.1
TOYS = [f"lasso_toy_{i}" for i in range(4)]


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


FIXTURE = Path(__file__).parent / "fixtures/l2o.npz"


@pytest.fixture(scope="module")
def committed():
    return dict(np.load(FIXTURE))


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
        held = np.load(FIXTURE)
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


# Classical methods


def classical(tx, W, b, r, steps, smooth=lasso, objective_at=lambda y, state: state.x):
    """Objectives [K + 1] and iterates at x from 0."""

    def value(x):
        return smooth(W, b, x) + r.value(x)

    def step(carry, _):
        y, state = carry
        x = objective_at(y, state)
        updates, state = tx.update(jax.grad(lambda y: smooth(W, b, y))(y), state, y, value_fn=value)
        return (y + updates, state), (value(x), x)

    y = jnp.zeros(W.shape[1], W.dtype)
    return jax.jit(lambda y: jax.lax.scan(step, (y, tx.init(y)), None, length=steps + 1)[1])(y)


@pytest.mark.parametrize("name", ["lasso_toy_0", "lasso_oodcond_0", "logistic_small_0"])
@pytest.mark.parametrize("method", ["ista", "fista"])
def test_recorded_classical_iterates(method, name, committed):
    with jax.enable_x64(True):
        z = {key.split("/")[1]: x for key, x in committed.items() if key.startswith(f"{name}/")}
        W, b = z["W"].astype(float), z["b"].astype(float)
        smooth, ending = (logistic, "_trueL") if name.startswith("logistic") else (lasso, "")
        r, lipschitz = prox.l1(float(z["rho"])), proximal.SAFE / float(z[f"step{ending}"])
        objective, x = classical(getattr(proximal, method)(lipschitz=lipschitz, prox=r), W, b, r, 200, smooth)
        np.testing.assert_allclose(objective, z[f"{method}{ending}_obj"], rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(x[np.array([1, 2, 10, 200])], z[f"{method}{ending}_x"], rtol=0, atol=1e-11)


def test_true_constants_are_what_the_recordings_used(committed):
    for name in ("lasso_toy_0", "logistic_small_0"):
        W = committed[f"{name}/W"].astype(float)
        norm = np.linalg.norm(W, 2)
        true, key = (norm**2, "step") if name.startswith("lasso") else (norm**2 / (4 * len(W)), "step_trueL")
        assert proximal.SAFE / true == pytest.approx(float(committed[f"{name}/{key}"]), rel=1e-6)


@pytest.mark.parametrize("restart", ["gradient", "function"])
def test_restarts_converge_where_plain_fista_has_not(restart, committed):
    with jax.enable_x64(True):
        W, b = (committed[f"lasso_toy_0/{key}"].astype(float) for key in ("W", "b"))
        r, best = prox.l1(RHO), float(committed["lasso_toy_0/f_star"])
        settings = dict(lipschitz=float(np.linalg.norm(W, 2) ** 2), prox=r)
        plain = classical(proximal.fista(**settings), W, b, r, 300)[0]
        ours = classical(proximal.fista(**settings, restart=restart), W, b, r, 300)[0]
        assert ours[-1] - best < 1e-13 < 1e-9 < plain[-1] - best
        # Until the first restart they are the same.
        np.testing.assert_allclose(ours[:5], plain[:5], rtol=1e-12)


def test_a_restart_is_where_the_momentum_points_against_the_step():
    tx = proximal.fista(lipschitz=proximal.SAFE, restart="gradient")  # the step is 1
    state = tx.init(jnp.zeros(2))._replace(x=jnp.array([1.0, 0.0]), t=jnp.asarray(3.0))
    y = jnp.array([2.0, 0.0])
    _, went_on = tx.update(jnp.array([-1.0, 0.0]), state, y)  # x⁺ = 3
    _, again = tx.update(jnp.array([4.0, 0.0]), state, y)  # x⁺ = -2: y - x⁺ = 4, x⁺ - x = -3
    updates, back = tx.update(jnp.array([0.5, 0.0]), state, y)  # x⁺ = 1.5: 0.5 · 0.5 > 0
    following = (1 + np.sqrt(37)) / 2
    np.testing.assert_allclose([went_on.t, again.t, back.t], [following, following, (1 + 5**0.5) / 2], rtol=1e-6)
    np.testing.assert_allclose(y + updates, [1.5, 0.0], rtol=1e-6)  # no momentum


def away(how):
    """An optimizer that leads astray: ever farther, or to what is no number."""
    rates = {"diverges": lambda t: 3.0**t, "is not finite": lambda t: jnp.where(t < 4, 0.01, jnp.nan)}
    return optax.chain(optax.scale(-1.0), optax.scale_by_schedule(rates[how]))


@pytest.mark.parametrize("how", ["diverges", "is not finite"])
def test_a_safeguard_converges_whatever_it_is_given(how, committed):
    with jax.enable_x64(True):
        W, b = (jnp.asarray(committed[f"lasso_toy_0/{key}"], float) for key in ("W", "b"))
        r, best = prox.l1(RHO), float(committed["lasso_toy_0/f_star"])
        given = dict(lipschitz=float(np.linalg.norm(W, 2) ** 2), prox=r)
        tx = safeguard(away(how), **given)
        guarded = classical(tx, W, b, r, 400)[0]
        assert guarded[-1] - best < 1e-13
        alone = classical(optax.with_extra_args_support(away(how)), W, b, r, 400, objective_at=lambda y, state: y)[0]
        assert not alone[-1] - best < 1.0
        # In a pytree the residual is that of all tensors.
        y = {"a": jnp.zeros(3), "b": jnp.ones((2, 2))}
        _, state = jax.jit(tx.update)(jax.tree.map(jnp.ones_like, y), tx.init(y), y)
        step = proximal.SAFE / given["lipschitz"]
        plain = jax.tree.map(lambda y: y - r.apply(y - step, step), y)
        assert float(state.least) == pytest.approx(float(optax.tree.norm(plain)))


def test_a_safeguard_is_the_learned_one_and_then_fista(committed):
    with jax.enable_x64(True):
        W, b = (jnp.asarray(committed[f"lasso_toy_2/{key}"], float) for key in ("W", "b"))
        r = prox.l1(RHO)
        given = dict(lipschitz=float(np.linalg.norm(W, 2) ** 2), prox=r)
        learned, step = proximal.momentum(**given, a=0.5), proximal.SAFE / given["lipschitz"]
        tx = safeguard(learned, **given, steps=6)

        def at(y, state):
            return y

        ours, y = classical(tx, W, b, r, 30, objective_at=at)
        theirs, _ = classical(learned, W, b, r, 30, objective_at=at)
        np.testing.assert_allclose(ours[:6], theirs[:6], rtol=1e-14)
        begin = r.apply(y[5] - step * W.T @ (W @ y[5] - b), step)
        np.testing.assert_allclose(y[6], begin, atol=1e-14)
        tail, x, fista = proximal.fista(**given, restart="gradient"), y[6], []
        state = tail.init(x)
        for _ in range(10):
            updates, state = tail.update(W.T @ (W @ x - b), state, x)
            x = x + updates
            fista.append(x)
        np.testing.assert_allclose(y[7:17], jnp.stack(fista), atol=1e-13)
    for settings, message in (({"steps": 0}, "steps, got 0"), ({"patience": 1.5}, "patience, got 1.5")):
        with pytest.raises(ValueError, match=message):
            safeguard(learned, lipschitz=1.0, **settings)
    with pytest.raises(ValueError, match="params=None"):
        safeguard(optax.sgd(0.1), lipschitz=1.0).update(jnp.ones(2), state)


def test_admm_solves_a_lasso(committed):
    with jax.enable_x64(True):
        W, b = (jnp.asarray(committed[f"lasso_toy_1/{key}"], float) for key in ("W", "b"))
        inverse = jnp.linalg.inv(W.T @ W + jnp.eye(W.shape[1]) / 0.5)
        r = prox.l1(RHO)
        tx = proximal.admm(prox_f=lambda v, step: inverse @ (W.T @ b + v / step), prox=r, step=0.5)
        objective, _ = classical(tx, W, b, r, 1500)
        assert -1e-14 < float(objective[-1] - committed["lasso_toy_1/f_star"]) < 1e-10


def test_adam_hd_by_hand():
    tx, y = proximal.adam_hd(lr=0.1, beta=0.01), jnp.array([1.0])
    state = tx.init(y)
    updates, state = tx.update(jnp.array([2.0]), state, y)
    np.testing.assert_allclose(updates, [-0.1], rtol=1e-5)  # Adam's first direction is 1
    updates, state = tx.update(jnp.array([3.0]), state, y)
    m, v = (0.9 * 0.2 + 0.1 * 3) / (1 - 0.81), (0.999 * 0.004 + 0.001 * 9) / (1 - 0.999**2)
    np.testing.assert_allclose(updates, [-(0.1 + 0.01 * 3 * 1) * m / np.sqrt(v)], rtol=1e-4)


# Penalties


PENALTIES = {
    "l1": prox.l1(0.3),
    "elastic_net": prox.elastic_net(0.3, 0.7),
    "box": prox.box(-0.2, 0.5),
    "nonnegative": prox.nonnegative(),
    "group_l1": prox.group_l1(0.5),
    "nuclear": prox.nuclear(0.4),
    "simplex": prox.simplex(2.0),
}


def inside(name, x):
    """A point of the penalty's set near x."""
    if name in ("box", "nonnegative"):
        return PENALTIES[name].apply(x, 1.0)
    return PENALTIES[name].apply(x, 1.0) if name == "simplex" else x


@pytest.mark.parametrize("name", PENALTIES)
def test_no_point_is_better_than_the_proximal_one(name):
    r, rng = PENALTIES[name], np.random.default_rng(0)
    v = jnp.asarray(rng.normal(size=(6,) if name == "simplex" else (4, 3)), jnp.float32)
    step = 0.6
    x = r.apply(v, step)

    def cost(x):
        return r.value(x) + jnp.sum((x - v) ** 2) / (2 * step)

    sizes = np.repeat([0.3, 0.03, 0.003], 50).reshape(-1, *[1] * v.ndim)
    noise = jnp.asarray(sizes * rng.normal(size=(150, *v.shape)), jnp.float32)
    others = jax.jit(jax.vmap(lambda noise: cost(inside(name, x + noise))))(noise)
    assert (cost(x) <= others + 1e-6).all()
    np.testing.assert_allclose(inside(name, x), x, atol=1e-6)
    # In a metric: the same where it is constant; where a penalty is not separable its mean counts.
    np.testing.assert_allclose(r.apply(v, jnp.full(v.shape, step)), x, atol=1e-6)
    metric = jnp.asarray(rng.uniform(0.2, 1.0, v.shape), jnp.float32)
    if not r.separable:
        pooled = jnp.broadcast_to(prox.KINDS[r.kind].pool(metric, r.axis), v.shape)
        np.testing.assert_allclose(r.apply(v, metric), r.apply(v, pooled), atol=1e-6)


def test_penalties_by_hand():
    v = jnp.array([1.0, -0.2, 0.0])
    np.testing.assert_allclose(prox.l1(0.5).apply(v, jnp.array([1.0, 1.0, 2.0])), [0.5, 0.0, 0.0])
    np.testing.assert_allclose(prox.elastic_net(0.5, 1.0).apply(v, 1.0), [0.25, 0.0, 0.0])
    np.testing.assert_allclose(prox.group_l1(1.0).apply(jnp.array([[3.0, 4.0], [0.3, 0.4]]), 1.0), [[2.4, 3.2], [0, 0]])
    np.testing.assert_allclose(
        prox.nuclear(1.0).apply(jnp.diag(jnp.array([3.0, 0.5])), 1.0), [[2, 0], [0, 0]], atol=1e-6
    )
    np.testing.assert_allclose(prox.simplex().apply(jnp.array([0.9, 0.5, -3.0]), 1.0), [0.7, 0.3, 0.0], atol=1e-6)
    assert float(prox.group_l1(2.0, axis=0).value(jnp.array([[3.0], [4.0]]))) == 10.0
    for make in (prox.l1, prox.group_l1, prox.nuclear):
        with pytest.raises(ValueError, match=r"got -1; valid: >= 0"):
            make(-1)
    with pytest.raises(ValueError, match=r"simplex: scale, got 0; valid: > 0"):
        prox.simplex(0)
    with pytest.raises(ValueError, match="low <= high"):
        prox.box(1.0, 0.0)


# What the rule refuses


def test_bad_input_is_refused(committed):
    for settings, message in (({"form": "PX"}, "unknown form 'PX'"), ({"activation": "relu"}, "unknown activation")):
        with pytest.raises(ValueError, match=message):
            rules.make("l2o_pa", **settings)
    rule = rules.make("l2o_pa", form="PBA")
    theta = rule.init_theta(jax.random.key(0))
    with pytest.raises(ValueError, match="valid: a penalty"):
        rule.bind(theta, prox=lambda v, step: v)
    with pytest.raises(ValueError, match=r"lipschitz, got 0"):
        rule.bind(theta, lipschitz=0)
    tx = rule.bind(theta)
    with pytest.raises(ValueError, match="forms with b need"):
        tx.update(jnp.ones(3), tx.init(jnp.ones(3)), jnp.ones(3))
    for method, settings, message in (
        (proximal.fista, {"lipschitz": 1.0, "restart": "often"}, "unknown restart"),
        (proximal.momentum, {"lipschitz": 1.0, "a": 1.0}, r"valid: \[0, 1\)"),
        (proximal.ista, {"lipschitz": -1.0}, "lipschitz, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            method(**settings)


def test_an_artifact_is_loaded_with_its_penalty(tmp_path):
    rule = rules.make("l2o_pa", hidden=4)
    theta = rule.init_theta(jax.random.key(0))
    lopt.save(tmp_path / "a", rule, theta, provenance={}, card="x")
    y, g = jnp.array([0.5, -1.0, 2.0]), jnp.array([0.3, 0.1, -0.2])
    told = {"prox": prox.l1(0.3), "lipschitz": 2.0}
    both = lopt.load(tmp_path / "a", **told), rule.bind(theta, **told)
    ours, theirs = (tx.update(g, tx.init(y), y)[0] for tx in both)
    np.testing.assert_array_equal(ours, theirs)
    assert not np.allclose(ours, rule.bind(theta).update(g, rule.bind(theta).init(y), y)[0])
    with pytest.raises(ValueError, match="prox for tiny; valid: none"):
        lopt.load("quickstart", num_steps=9, prox=prox.l1(0.3))


@pytest.mark.parametrize("penalty", ["group_l1", "nuclear"])
def test_a_learned_metric_is_pooled_where_elements_belong_together(penalty):
    rule = rules.make("l2o_pa", hidden=4)
    theta = rule.init_theta(jax.random.key(1))
    y = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)
    tx = rule.bind(theta, prox=PENALTIES[penalty], lipschitz=2.0)
    g = 0.1 * y**2
    updates, state = jax.jit(tx.update)(g, tx.init(y), y)
    assert jnp.isfinite(updates).all()
    plain = rule.bind(theta, lipschitz=2.0)
    free = l2o_pa.solution(jax.jit(plain.update)(g, plain.init(y), y)[1])  # v = y - s p g
    metric = PENALTIES[penalty].pooled((y - free) / g)
    np.testing.assert_allclose(l2o_pa.solution(state), PENALTIES[penalty].apply(y - metric * g, metric), atol=1e-5)
    # Of elements' own metrics in the gradient step a minimum would be no fixed point.
    assert not np.allclose(l2o_pa.solution(state), PENALTIES[penalty].apply(free, metric), atol=1e-4)


# Certified optima


def problem(z, names):
    W, b = (np.stack([z[f"{name}/{field}"] for name in names]).astype(float) for field in ("W", "b"))
    return W, b, np.array([z[f"{name}/f_star"] for name in names])


@pytest.mark.parametrize(
    ("smooth", "rho", "names"),
    [
        (certified.SQUARED, RHO, TOYS),
        (certified.SQUARED, 0.01, ["lasso_oodcond_0"]),
        (certified.LOGISTIC, RHO, ["logistic_small_0", "logistic_small_1"]),
    ],
    ids=["lasso", "ill-conditioned", "logistic"],
)
def test_optima_are_those_of_the_recording_and_certified(smooth, rho, names, committed):
    W, b, best = problem(committed, names)
    found = certified.minimum(smooth, W, b, rho)
    np.testing.assert_allclose(found.value, best, rtol=1e-13)
    assert (found.gap < 1e-13 * np.maximum(1, best)).all()
    for name, x in zip(names, found.x, strict=True):
        np.testing.assert_allclose(x, committed[f"{name}/x_star"], atol=1e-7)
    # The gap bounds what is lost, and it knows a point that is not optimal.
    other = certified.certify(smooth, W, b, rho, found.x + 0.01)
    assert (other.value - best <= other.gap + 1e-12).all()
    assert (other.gap > 1e-6).all()


# Tasks, meta-training, evaluation


@pytest.mark.parametrize("family", ["lasso", "logistic_l1"])
def test_instances_have_the_structure_they_say(family):
    task = tasks.make(family, shift=(0.0, 0.3))
    phi = task.sample(jax.random.key(0))
    scale = 1.0 if family == "lasso" else 0.25 / len(phi.b)
    assert float(phi.lipschitz) == pytest.approx(scale * np.linalg.norm(phi.W, 2) ** 2, rel=1e-4)
    x = jax.random.normal(jax.random.key(1), (phi.W.shape[1],))
    smooth = {"lasso": lasso, "logistic_l1": logistic}[family](phi.W, phi.b, x)
    assert float(task.composite.smooth(x, None, phi, 0 * x)) == pytest.approx(float(smooth), rel=1e-5)
    whole = smooth + prox.l1(*task.composite.penalty(phi)).value(x)
    assert float(task.loss(x, None, phi, 0 * x)) == pytest.approx(float(whole), rel=1e-5)
    if family == "lasso":
        np.testing.assert_allclose(jnp.linalg.norm(phi.W, axis=0), 1.0, rtol=1e-5)
    for settings in ({"nonzeros": 999}, {"shift": (0.3, 0.1)}, {"rows": 0}, {"log10_strength": (0.0, 9.0)}):
        with pytest.raises(ValueError, match=f"{family}: "):
            tasks.make(family, **settings)


def test_a_wrapped_task_has_no_structure():
    """Or a rule with a proximal operator would be given a gradient past the wrapper."""
    assert tasks.make("lasso", augment=[("scale_loss", {"decades": 1})]).composite is None
    assert augment.scale_loss(tasks.make("lasso")).composite is None
    assert tasks.make("lasso").composite


@pytest.mark.parametrize("name", ["l2o_pa", "l2o_dm"])
def test_an_inner_step_gives_each_rule_its_gradient(name):
    """With a proximal operator that of the smooth part; without a subgradient of the whole."""
    task, rule = tasks.make("lasso"), rules.make(name, **({"form": "PBA", "hidden": 4} if name == "l2o_pa" else {}))
    theta = rule.init_theta(jax.random.key(0))
    inner = make_inner(rule, task, horizon=Horizon(9, 9), meta_loss="fresh", loss_limit=1e6)
    particle = inner.reset(jax.random.key(1))
    phi, y = particle.phi, particle.params
    more = dict(prox=prox.l1(phi.strength), lipschitz=phi.lipschitz) if name == "l2o_pa" else {}
    tx = rule.bind(theta, **more)
    state = tx.init(y)
    step = jax.jit(inner.step)
    for t in range(3):
        particle, value, *_ = step(theta, particle, jax.random.key(t))
        gradient = jax.grad(lambda y: task.composite.smooth(y, None, phi, 0 * y))
        g = gradient(y) if name == "l2o_pa" else jax.grad(task.loss)(y, None, phi, 0 * y)
        updates, state = tx.update(g, state, y, grad_fn=gradient)
        y = optax.apply_updates(y, updates)
        np.testing.assert_allclose(particle.params, y, rtol=1e-4, atol=1e-6)
        assert float(value) == pytest.approx(float(task.loss(y, None, phi, 0 * y)), rel=1e-4)


@pytest.fixture(scope="module")
def few():
    with jax.enable_x64(True):
        return judge.draw(judge.PROBLEMS["lasso"], "20x40", 3, 0)


def test_gaps_are_those_of_the_methods_own_iterates(few):
    with jax.enable_x64(True):
        task, instances = few
        assert instances.gap < l2o_problems.FLOOR
        methods = l2o_methods.classical(judge.PROBLEMS["lasso"])
        at = [0, 1, 7, 30]
        at_y, at_x = l2o_methods.gaps(task, methods["FISTA"], instances, at)
        for i, best in enumerate(instances.best):
            phi = jax.tree.map(lambda leaf, i=i: leaf[i], instances.phi)
            r = prox.l1(phi.strength)
            for gap, point in ((at_x, lambda y, state: state.x), (at_y, lambda y, state: y)):
                tx = proximal.fista(lipschitz=phi.lipschitz, prox=r)
                objective, _ = classical(tx, phi.W, phi.b, r, 30, objective_at=point)
                np.testing.assert_allclose(gap[:, i], (objective[np.array(at)] - best) / best, rtol=1e-6)
        slow, quick = (l2o_methods.gaps(task, methods[name], instances, [30])[1, -1] for name in ("ISTA", "FISTA"))
        assert (quick < slow).all()


def test_what_is_tuned_is_the_best_of_its_grid(few):
    with jax.enable_x64(True):
        task, instances = few
        methods = l2o_methods.classical(judge.PROBLEMS["lasso"])
        method = methods["momentum, tuned"]._replace(grid={"a": (0.3, 0.8, 0.95)})
        (chosen,) = l2o_methods.tune(task, method, instances).values()
        found = [
            l2o_methods.gaps(task, method, instances, [judge.TUNED_AT], a=a)[0, -1].mean() for a in (0.3, 0.8, 0.95)
        ]
        assert chosen == method.grid["a"][int(np.argmin(found))]
        assert l2o_methods.tune(task, methods["ISTA"], instances) == {}


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "prepare_jax", lambda: None)
    monkeypatch.setattr(judge, "KS", (1, 2, 3, 5))
    monkeypatch.setattr(judge, "unrolled", lambda problem, cache: {})
    sets = {"5x8": l2o_problems.Set({"rows": 5, "columns": 8, "nonzeros": 2}, 3), "other": l2o_problems.Set({})}
    monkeypatch.setitem(judge.PROBLEMS, "lasso", judge.PROBLEMS["lasso"]._replace(sets=sets))
    monkeypatch.setattr(
        judge,
        "classical",
        lambda problem: {
            "ISTA": judge.Method(lambda one: proximal.ista(lipschitz=one.lipschitz, prox=one.prox)),
        },
    )
    out, cache = tmp_path / "l2o", tmp_path / "cache"
    words = ["l2o", "--sets", "5x8", "--instances", "9", "--out", str(out), "--cache", str(cache)]
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert "| ISTA |" in said
    assert "3 instances" in said
    assert {path.name for path in out.iterdir()} == set(judge.FILES)
    held = list(csv.DictReader((out / "l2o.csv").read_text().splitlines()))
    assert [(row["at"], row["k"]) for row in held] == [(at, str(k)) for at in "yx" for k in (1, 2, 3, 5)]
    assert float(held[3]["mean"]) < float(held[0]["mean"])
    # Optima are kept, and read where instances and solver are the same.
    kept = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert len(kept) == 2  # instances to tune on, instances to judge on
    monkeypatch.setattr(certified, "minimum", None)
    assert cli.main(words) == 0
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == kept
    with pytest.raises(TypeError):
        cli.main([*words, "--seed", "5"])
    assert cli.main([*words, "--sets", "6x8"]) == 2
