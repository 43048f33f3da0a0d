"""Composite problems: optima by a second way, what unrolled networks begin at, shipped weights."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from composite import RHO, TOYS, logistic
from composite import lasso as squares

import lopt
import tasks
from lopt import prox, proximal
from meta_test import l2o_methods, l2o_problems, l2o_unrolled
from tasks import certified, lasso, logistic_l1, matrix_completion, structured_regression
from tasks.sparse import squared_norm

FAST = {"xla_backend_optimization_level": 0}
TASKS = {
    "group_l1": ("structured_regression", {"rows": 12, "groups": 6, "size": 3, "active": 2}),
    "nonnegative": ("structured_regression", {"rows": 16, "groups": 4, "size": 2, "active": 2, "noise": 0.3}),
    "total_variation": ("structured_regression", {"rows": 20, "log10_strength": (-0.3, 0.0)}),
    "matrix_completion": ("matrix_completion", {"rows": 6, "columns": 5, "log10_strength": (-0.5, 0.0)}),
    "elastic_net": ("lasso", {"rows": 6, "columns": 12, "nonzeros": 3, "l2": 0.2}),
    "patches": ("tasks.lasso:patches", {"atoms": 32}),
    "table": ("tasks.logistic_l1:table", {}),
}
MODULES = {"patches": lasso, "table": logistic_l1, "matrix_completion": matrix_completion}


@functools.cache
def solved(name):
    """A task, three instances in float64, and their optima."""
    family, settings = TASKS[name]
    if name in structured_regression.STRUCTURES:
        settings = settings | {"structure": name}
    module = MODULES.get(name, structured_regression)
    with jax.enable_x64(True):
        own = family.rpartition(":")[2]
        task = tasks.make(family, **settings) if own == family else getattr(module, own)(**settings)
        phi = jax.vmap(task.sample)(jax.random.split(jax.random.key(3), 3))
        return task, phi, task.composite.optimum(jax.tree.map(np.asarray, phi), task.data)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "patches" else name for name in TASKS]
)
def test_optima_are_fixed_points_of_the_penalty_s_own_operator(name):
    """By lopt.prox and autodiff, of which the solver in NumPy knows nothing; and a point beside is none."""
    task, phis, found = solved(name)
    assert (found.gap <= 1e-12 * found.value).all()
    with jax.enable_x64(True):

        @functools.partial(jax.jit, compiler_options=FAST)
        def residual(x, phi):
            batch = task.batch(jax.random.key(0), phi, task.data, "test")
            step = 1 / task.composite.lipschitz(phi)
            r = prox.Penalty(task.composite.penalty(phi), task.composite.kind)
            slope = jax.grad(task.composite.smooth)(x, None, phi, batch)
            there = r.apply(x - step * slope, step)
            return jnp.max(jnp.abs(there - x)), task.loss(x, None, phi, batch), task.loss(there, None, phi, batch)

        for k, value in enumerate(found.value):
            phi = jax.tree.map(lambda leaf, k=k: leaf[k], phis)
            x = jnp.asarray(found.x[k]).reshape(task.init(jax.random.key(0), phi).shape)
            off, at, _ = residual(x, phi)
            assert float(off) < 1e-8
            assert float(at) == pytest.approx(value, rel=1e-12)
            off, _, beside = residual(x + 0.1, phi)
            assert float(off) > 1e-4
            assert float(beside) > value * (1 + 1e-9)


@pytest.mark.parametrize("structure", structured_regression.STRUCTURES)
def test_a_certificate_bounds_what_a_point_loses(structure):
    _, phi, found = solved(structure)
    certify = structured_regression.SOLVERS[structure][0]
    for k in range(3):
        shape = (6, 3) if structure == "group_l1" else (found.x.shape[1],)
        W, b, strength = (np.asarray(leaf[k], float) for leaf in phi[:3])
        other = certify(structured_regression.Problem(W, b, float(strength), shape), 0.9 * found.x[k])
        assert other.gap > 1e-4
        assert other.value - found.value[k] <= other.gap + 1e-12


def test_what_phi_draws_is_what_the_penalty_is():
    for structure, kind in structured_regression.PENALTIES.items():
        task = tasks.make("structured_regression", structure=structure)
        phi = task.sample(jax.random.key(0))
        x = jax.random.normal(jax.random.key(1), task.init(jax.random.key(0), phi).shape)
        r = prox.Penalty(task.composite.penalty(phi), kind)
        plain = 0.5 * jnp.sum((phi.W @ x.reshape(-1) - phi.b) ** 2)
        batch = task.batch(jax.random.key(0), phi, (), "test")
        np.testing.assert_allclose(task.loss(x, None, phi, batch), plain + r.value(x), rtol=1e-5)
        assert float(phi.lipschitz) >= 0.999 * np.linalg.norm(phi.W, 2) ** 2
    phi = tasks.make("structured_regression", structure="total_variation", rows=9, active=3).sample(jax.random.key(0))
    signal = jnp.arange(9.0) ** 2
    np.testing.assert_allclose(phi.W.T @ signal, jnp.diff(signal), rtol=1e-6)  # s_i+1 - s_i
    task = tasks.make("matrix_completion")
    phi = task.sample(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (12, 10))
    plain = 0.5 * jnp.sum(jnp.where(phi.mask > 0, x - phi.b, 0.0) ** 2)
    whole = plain + prox.nuclear(phi.strength).value(x)
    np.testing.assert_allclose(task.loss(x, None, phi, 0 * x), whole, rtol=1e-5)
    slope, eps = jax.grad(matrix_completion.nuclear_norm)(x), 1e-2
    step = jax.random.normal(jax.random.key(2), x.shape)
    ends = [matrix_completion.nuclear_norm(x + sign * eps * step) for sign in (1, -1)]
    np.testing.assert_allclose(jnp.vdot(slope, step), (ends[0] - ends[1]) / (2 * eps), rtol=1e-2)
    for family, settings, says in (
        ("structured_regression", {"structure": "ridge"}, "valid: group_l1, nonnegative, total_variation"),
        ("structured_regression", {"active": 99}, "active, got 99; valid: 1 to 20"),
        ("structured_regression", {"log10_strength": (0.0, 9.0)}, r"valid: a range \(low, high\)"),
        ("matrix_completion", {"rank": 11}, "rank, got 11; valid: 1 to 10"),
        ("matrix_completion", {"known": 0.0}, r"known, got 0.0; valid: \(0, 1\]"),
    ):
        with pytest.raises(ValueError, match=says):
            tasks.make(family, **settings)


def test_a_table_of_ones_own(tmp_path):
    x, y, _ = logistic_l1.read("breast_cancer")
    path = tmp_path / "mine.csv"
    lines = [
        "a," * 30 + "class",
        *(",".join(map(str, row)) + (",yes" if one else ",no") for row, one in zip(x, y, strict=True)),
    ]
    path.write_text("\n".join(lines))
    ours = logistic_l1.read(str(path))
    np.testing.assert_allclose(ours[0], x, atol=1e-9)
    assert (ours[1] == y).all()
    assert ours[2][0].id == "mine.csv"
    for content, says in (
        ("1,2,a\n1,3,a\n", "1 classes; valid: 2"),
        ("1,2,a\n1,b\n", "as row 1; valid: numbers and then a class"),
        ("h,class\nnan,a\n", "as row 0"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=says):
            logistic_l1.table(data=str(path))
    path.write_bytes("1,2,ä\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"mine.csv at byte 4 is not UTF-8"):
        logistic_l1.table(data=str(path))
    with pytest.raises(ValueError, match="valid: a CSV file, or breast_cancer"):
        logistic_l1.table(data="no such file")


@pytest.mark.parametrize("name", ["Ada-LISTA", pytest.param("LISTA", marks=pytest.mark.slow)])
def test_unrolled_networks_begin_at_ista_and_learn(name):
    task, network = tasks.make("lasso", rows=6, columns=9, nonzeros=2), l2o_unrolled.NETWORKS[name]
    phi = task.sample(jax.random.key(0))
    if name == "LISTA":  # for one matrix
        sample = task.sample
        task = task._replace(sample=lambda key: phi._replace(b=phi.W @ jnp.where(sample(key).W[0] > 0.5, 1.0, 0.0)[:9]))
    theta = network.start(phi)
    ours, ista = (
        l2o_unrolled.as_optax(network, theta, phi),
        proximal.ista(lipschitz=phi.lipschitz, prox=prox.l1(phi.strength)),
    )
    x = y = jnp.zeros(9)
    state, other = ours.init(x), ista.init(y)
    for _ in range(3):
        updates, state = ours.update(x, state, x)
        x = x + updates
        updates, other = ista.update(phi.W.T @ (phi.W @ y - phi.b), other, y)
        y = y + updates
    np.testing.assert_allclose(x, y, atol=1e-6)
    # After the last layer, the last layer again.
    bent = theta._replace(threshold=theta.threshold.at[-1].set(1e6))
    late = l2o_unrolled.as_optax(network, bent, phi)
    for k, zero in ((0, False), (l2o_unrolled.LAYERS - 1, True), (l2o_unrolled.LAYERS + 5, True)):
        updates, _ = late.update(x, l2o_unrolled.Layers(jnp.asarray(k)), x)
        assert bool(jnp.all(x + updates == 0)) == zero
    learned, scores = l2o_unrolled.train(task, name, steps=25)
    assert scores[-1] < scores[0]
    assert not np.allclose(learned.first, theta.first)


@pytest.mark.parametrize(
    ("name", "problem", "better"),
    [
        ("l2o-lasso", "lasso", 5.0),
        pytest.param("l2o-lasso-mixed", "lasso", 2.0, marks=pytest.mark.slow),
        pytest.param("l2o-logistic", "logistic", 5.0, marks=pytest.mark.slow),
        pytest.param("l2o-logistic-mixed", "logistic", 2.0, marks=pytest.mark.slow),
    ],
)
def test_shipped_weights_are_ahead_of_fista_with_restarts(name, problem, better):
    """After ten gradients, in the distribution they were meta-trained on; docs/l2o.md has the tables."""
    held = l2o_problems.PROBLEMS[problem]
    with jax.enable_x64(True):
        task, instances = l2o_problems.draw(held, next(iter(held.sets)), 16, 7)
        methods = l2o_methods.learned(name) | l2o_methods.classical(held)
        fista = l2o_methods.gaps(task, methods["FISTA, gradient restart"], instances, [10])
        for label in (f"l2o_pa: {name}", f"l2o_pa: {name}, safeguarded"):
            ours = l2o_methods.gaps(task, methods[label], instances, [10])
            assert better * ours.mean() < fista.mean()


def test_shipped_weights_are_loaded_with_their_penalty():
    W, b = jax.random.normal(jax.random.key(0), (8, 12)), jnp.ones(8)
    told = {"prox": prox.l1(0.1), "lipschitz": jnp.linalg.norm(W, 2) ** 2}
    tx, y = lopt.load("l2o-lasso", **told), jnp.zeros(12)
    updates, state = jax.jit(tx.update)(W.T @ (W @ y - b), tx.init(y), y)
    assert jnp.isfinite(updates).all()
    assert l2o_methods.last(state, y).shape == (12,)


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


@pytest.mark.parametrize("family", ["lasso", "logistic_l1"])
def test_instances_have_the_structure_they_say(family):
    task = tasks.make(family, shift=(0.0, 0.3))
    phi = task.sample(jax.random.key(0))
    scale = 1.0 if family == "lasso" else 0.25 / len(phi.b)
    assert 1.0 <= float(phi.lipschitz) / (scale * np.linalg.norm(np.asarray(phi.W, float), 2) ** 2) < 1.001
    x = jax.random.normal(jax.random.key(1), (phi.W.shape[1],))
    smooth = {"lasso": squares, "logistic_l1": logistic}[family](phi.W, phi.b, x)
    assert float(task.composite.smooth(x, None, phi, 0 * x)) == pytest.approx(float(smooth), rel=1e-5)
    whole = smooth + prox.l1(*task.composite.penalty(phi)).value(x)
    assert float(task.loss(x, None, phi, 0 * x)) == pytest.approx(float(whole), rel=1e-5)
    if family == "lasso":
        np.testing.assert_allclose(jnp.linalg.norm(phi.W, axis=0), 1.0, rtol=1e-5)
    for settings in ({"nonzeros": 999}, {"shift": (0.3, 0.1)}, {"rows": 0}, {"log10_strength": (0.0, 9.0)}):
        with pytest.raises(ValueError, match=f"{family}: "):
            tasks.make(family, **settings)


def test_constants_are_never_from_below():
    """Where the power method fails: what it begins with has nothing of the first singular vector."""
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.normal(size=(n, n)))[0] for n in (12, 20))
    left[:, 0] = np.resize([1, -1], 12) / 12**0.5
    left = np.linalg.qr(left)[0]
    bound = jax.jit(squared_norm, compiler_options=FAST)
    for dtype, slack in ((np.float32, 1e-3), (np.float64, 4e-4)):
        with jax.enable_x64(dtype == np.float64):
            for second in (0.9, 0.999, 1.0):
                values = np.r_[1.0, second, np.linspace(0.5, 0.1, 10)]
                W = left @ (values[:, None] * right[:12])
                for matrix in (W, W.T, 1e-3 * W, 1e4 * W):
                    true = np.linalg.norm(matrix.astype(dtype).astype(float), 2) ** 2
                    assert true <= float(bound(jnp.asarray(matrix, dtype))) <= true * (1 + slack)
    assert float(squared_norm(jnp.zeros((2, 3)))) == 0.0
    phi = jax.vmap(tasks.make("lasso").sample)(jax.random.split(jax.random.key(5), 64))
    assert (phi.lipschitz >= np.linalg.norm(np.asarray(phi.W, float), 2, axis=(1, 2)) ** 2).all()
