"""Classical proximal methods, the safeguard and the penalties: recorded and hand-computed steps, and optima."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from composite import PENALTIES, RHO, classical, lasso, logistic

from lopt import prox, proximal
from lopt.proximal_safeguard import safeguard
from tasks.logistic_l1 import paper_lipschitz


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


def test_the_papers_constant_is_the_norm_and_not_its_square(committed):
    with jax.enable_x64(True):
        z = {key.split("/")[1]: x for key, x in committed.items() if key.startswith("logistic_small_0/")}
        W, b, r = z["W"].astype(float), z["b"].astype(float), prox.l1(float(z["rho"]))
        soft = paper_lipschitz(jnp.asarray(W))
        assert proximal.SAFE / float(soft) == pytest.approx(float(z["step"]), rel=1e-6)
        tx = proximal.ista(lipschitz=proximal.SAFE / float(z["step"]), prox=r)
        objective, _ = classical(tx, W, b, r, 200, logistic)
        np.testing.assert_allclose(objective, z["ista_obj"], rtol=1e-12, atol=1e-12)
        assert objective[-1] > z["ista_trueL_obj"][-1]  # it is behind


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
