"""The mathematics of single families, each against a second way to get it."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from products import products

import tasks
from tasks import graph_network, pinn, policy_gradient, quadratic, rnn_lm, synthetic
from tasks.diffusion import noised
from tasks.layers import attention, group_norm, initialise, layer_norm, shape
from tasks.supervised import ERRORS, squared
from tasks.vae import gaussian_kl
from tasks.vit import patches

FAST: Any = {"xla_backend_optimization_level": 0}  # compiling is most of the time
KEYS = jax.random.split(jax.random.key(0), 4)


# Quadratics and test functions


@pytest.mark.parametrize("name", quadratic.SPECTRA)
def test_spectra_have_their_condition(name):
    for dim in (1, 2, 9, 64):
        found = quadratic.spectrum_named(name, dim, 100.0)
        assert found.shape == (dim,)
        assert (np.diff(found) <= 0).all()
        assert found[0] == pytest.approx(1)
        assert dim == 1 or found[-1] == pytest.approx(0.01, rel=1e-6)
    task = tasks.make("quadratic", dim=9, spectrum=name)
    values = jnp.linalg.eigvalsh(task.sample(KEYS[0]).hessian)
    np.testing.assert_allclose(values[::-1], quadratic.spectrum_named(name, 9, 100.0), atol=1e-5)


def test_marchenko_pastur_is_that_of_a_wishart_matrix():
    ratio = 0.25
    condition = ((1 + ratio**0.5) / (1 - ratio**0.5)) ** 2
    x = np.random.default_rng(0).normal(size=(2000, 500))
    wishart = np.sort(np.linalg.eigvalsh(x.T @ x / 2000))[::-1]
    ours = quadratic.spectrum_named("marchenko_pastur", 500, condition) * (1 + ratio**0.5) ** 2
    np.testing.assert_allclose(ours, wishart, atol=0.05)
    assert abs(quadratic.spectrum_named("geometric", 500, condition) * (1 + ratio**0.5) ** 2 - wishart).max() > 0.15


def test_a_quadratic_s_noise_has_its_size_and_only_in_training():
    task = tasks.make("quadratic", dim=8, log10_noise=(-1.0, -1.0))
    phi, x = task.sample(KEYS[0]), jnp.ones(8)
    noise = (
        jax.vmap(lambda key: jax.grad(task.loss)(x, key, phi, task.batch(key, phi, (), "train")))(
            jax.random.split(KEYS[1], 4000)
        )
        - (phi.hessian @ x)[None]
    )
    assert noise.std() == pytest.approx(0.1, rel=0.03)
    assert jax.grad(task.loss)(x, KEYS[1], phi, task.batch(KEYS[1], phi, (), "test")) == pytest.approx(phi.hessian @ x)


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("function", synthetic.FUNCTIONS)
def test_functions_are_zero_and_flat_at_their_optimum_alone(function, rotate):
    task = tasks.make("synthetic", function=function, dim=5, rotate=rotate)
    phi = task.sample(KEYS[0])
    best = synthetic.optimum(function, phi)
    value, grad = jax.value_and_grad(task.loss)(best, KEYS[0], phi, jnp.zeros(5))
    assert value == pytest.approx(0, abs=1e-4)
    assert function == "ackley" or jnp.abs(grad).max() < 1e-2  # whose minimum is the tip of a cone
    random = jax.vmap(lambda key: task.init(key, phi))(jax.random.split(KEYS[1], 200))
    losses = jax.vmap(lambda x: task.loss(x, KEYS[0], phi, jnp.zeros(5)))(random)
    assert losses.min() > value
    assert 0.05 < jnp.median(losses) < 50


def test_functions_at_known_points():
    assert synthetic.rosenbrock(jnp.array([-1.0, 2.0])) == pytest.approx(104)
    assert synthetic.rastrigin(jnp.array([0.5, 1.0])) == pytest.approx(21.25)
    assert synthetic.styblinski_tang(jnp.zeros(2)) == pytest.approx(78.33233, rel=1e-6)
    assert synthetic.ackley(jnp.ones(2)) == pytest.approx(3.6253849, rel=1e-5)


# Partial differential equations


@pytest.mark.parametrize("name", pinn.EQUATIONS)
def test_exact_solutions_solve_their_equation(name):
    equation = pinn.EQUATIONS[name]
    phi = equation.sample(KEYS[0])
    x, t = jax.random.uniform(KEYS[1], (2, 200))
    scale = jnp.abs(pinn.derivatives(phi.exact, x, t)[2]).max()  # of u_t
    assert jnp.abs(phi.residual(phi.exact, x, t)).max() < 1e-3 * scale
    wrong = phi._replace(viscosity=1.2 * phi.viscosity)
    assert jnp.abs(wrong.residual(phi.exact, x, t)).max() > 0.05 * scale


def test_derivatives_are_those_of_a_polynomial():
    x, t = jax.random.uniform(KEYS[1], (2, 20))
    found = pinn.derivatives(lambda x, t: x**3 * t**2, x, t)
    for one, other in zip(found, (x**3 * t**2, 3 * x**2 * t**2, 2 * x**3 * t, 6 * x * t**2), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


def test_edges_are_where_the_solution_is_known():
    task = tasks.make("pinn", batch_size=300)
    x, t = task.batch(KEYS[0], task.sample(KEYS[0]), (), "train").edge.T
    start, sides = t == 0, (x == 0) | (x == 1)
    assert (start | sides).all()
    assert jnp.mean(start) == pytest.approx(1 / 3, abs=0.1)
    assert jnp.mean(x == 1) == pytest.approx(1 / 3, abs=0.1)


# Gradients that are not backprop's


def near_mean(draws, expected):
    """Whether draws [N, P] have the expected mean, within 4.5 standard errors."""
    error = jnp.abs(draws.mean(0) - expected) / (draws.std(0) / len(draws) ** 0.5)
    return bool(error.max() < 4.5)


def test_es_is_unbiased_and_noisy():
    """On a quadratic the smoothed loss's gradient is the loss's own; its value exceeds it by the trace."""
    settings = {"dim": 4, "log10_noise": (-1.0, -1.0)}
    task, plain = (
        tasks.make("es", task="quadratic", settings=settings, pairs=4, std=0.5),
        tasks.make("quadratic", **settings),
    )
    phi, x = plain.sample(KEYS[0]), jnp.arange(1.0, 5.0)
    batch = plain.batch(KEYS[1], phi, (), "train")
    draw = jax.jit(jax.vmap(lambda key: task.value_and_grad(x, key, phi, batch)))
    value, grads = draw(jax.random.split(KEYS[2], 4000))
    true = jax.grad(plain.loss)(x, KEYS[0], phi, batch)
    assert near_mean(grads, true)
    assert not near_mean(grads, 0.9 * true)
    smoothed = plain.loss(x, KEYS[0], phi, batch) + 0.5 * 0.5**2 * jnp.trace(phi.hessian)
    assert near_mean(value[:, None], smoothed[None])
    assert task.loss(x, KEYS[0], phi, batch) == plain.loss(x, KEYS[0], phi, batch)


def cart_pole(length):
    settings = dict(hidden=(), episodes=2, length=length, spread=0.0)
    task = tasks.make("policy_gradient", environment="cart_pole", **settings)
    phi = jax.jit(task.sample)(KEYS[0])
    params = jax.tree.map(lambda p: p + 0.5, jax.jit(task.init)(KEYS[1], phi))
    start = jnp.array([[0.0, 0.0, 0.19, 0.3, 1.0]] * 2)  # about to fall, depending on the pushes
    return task, phi, params, start


def test_policy_gradient_is_unbiased():
    """Against the sum over all sequences of actions of a short episode."""
    length = 4
    task, phi, params, start = cart_pole(length)
    world = policy_gradient.ENVIRONMENTS["cart_pole"]

    def expected_loss(params):
        total = 0.0
        for actions in itertools.product((0, 1), repeat=length):
            state, log_prob, reward = start[:1], 0.0, 0.0
            for action in actions:
                logits = world.observe(state) @ params["layer0"]["w"] + params["layer0"]["b"][None]
                log_prob += jax.nn.log_softmax(logits)[0, action]
                state = world.step(phi.physics, state, jnp.array([2.0 * action - 1]))
                reward += state[0, 4]
            total += jnp.exp(log_prob) * reward / length
        return 1 - total

    value, true = jax.jit(jax.value_and_grad(expected_loss))(params)
    draw = jax.jit(jax.vmap(lambda key: task.value_and_grad(params, key, phi, start)))
    values, grads = draw(jax.random.split(KEYS[2], 20_000))
    found = jnp.concatenate([grads["layer0"]["w"].reshape(len(values), -1), grads["layer0"]["b"]], axis=-1)
    true = jnp.concatenate([true["layer0"]["w"].ravel(), true["layer0"]["b"]])
    assert 0.01 < value < 0.99
    assert near_mean(values[:, None], value[None])
    assert jnp.abs(true).max() > 1e-3
    assert near_mean(found, true)
    assert not near_mean(found, 0.5 * true)


def test_policy_gradient_of_normal_actions_is_unbiased():
    """One step from one state: against the integral over the policy's noise."""
    task = tasks.make("policy_gradient", hidden=(), episodes=2, length=1, spread=0.0)
    world, phi = policy_gradient.ENVIRONMENTS["swing_up"], jax.jit(task.sample)(KEYS[0])
    params = jax.tree.map(lambda p: p + 0.3, jax.jit(task.init)(KEYS[1], phi))
    start = jnp.array([[1.0, 0.5, 0.8, -2.0]] * 2)
    place, weight = np.polynomial.hermite_e.hermegauss(40)

    def expected_loss(params):
        mean = (world.observe(start[:1]) @ params["layer0"]["w"] + params["layer0"]["b"][None])[0, 0]
        actions = jnp.tanh(mean + world.std * jnp.asarray(place, jnp.float32))
        state = world.step(phi.physics, jnp.broadcast_to(start[:1], (len(place), 4)), actions)
        return 1 - world.reward(state) @ jnp.asarray(weight / weight.sum(), jnp.float32)

    value, true = jax.jit(jax.value_and_grad(expected_loss))(params)
    values, grads = jax.jit(jax.vmap(lambda key: task.value_and_grad(params, key, phi, start)))(
        jax.random.split(KEYS[2], 20_000)
    )
    found = jnp.concatenate([grads["layer0"]["w"].reshape(len(values), -1), grads["layer0"]["b"]], axis=-1)
    true = jnp.concatenate([true["layer0"]["w"].ravel(), true["layer0"]["b"]])
    assert near_mean(values[:, None], value[None])
    assert near_mean(found, true)
    assert not near_mean(found, -true)
    assert not near_mean(found, 0.5 * true)


def test_adam_swings_the_pole_up_and_the_wrong_way_does_not():
    """At the factory's defaults, 300 steps, at each learning rate of a decade."""
    task = tasks.make("policy_gradient")
    adam = optax.adam(1.0)
    phi = jax.jit(task.sample)(KEYS[0])
    begin = jax.jit(task.init)(KEYS[1], phi)

    def trained(rate):
        def step(carry, key):
            params, state = carry
            batch_key, loss_key = jax.random.split(key)
            batch = task.batch(batch_key, phi, (), "train")
            updates, state = adam.update(task.value_and_grad(params, loss_key, phi, batch)[1], state)
            return (jax.tree.map(lambda p, u: p + rate * u, params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (begin, adam.init(begin)), jax.random.split(KEYS[2], 300))
        return params

    def judge(params):
        lost = lambda key: task.loss(params, key, phi, task.batch(key, phi, (), "validation"))  # noqa: E731
        return jnp.mean(jax.vmap(lost)(jax.random.split(KEYS[3], 4)))

    *right, wrong = jax.jit(jax.vmap(lambda rate: judge(trained(rate))))(jnp.array([0.003, 0.01, 0.03, -0.01])).tolist()
    first = float(jax.jit(judge)(begin))
    assert max(right) < 0.85 * first, (first, right)
    assert min(right) < 0.7 * first, (first, right)
    assert wrong > 0.95 * first, (first, wrong)


def test_a_hanging_pole_keeps_its_energy_and_the_rail_has_ends():
    world = policy_gradient.ENVIRONMENTS["swing_up"]
    gravity, mass, length, _ = world.physics

    def energy(state):  # over the cart's mass, of a rod about its middle
        _, velocity, angle, spin = state.T
        moving = 0.5 * (1 + mass) * velocity**2 + mass * length * velocity * spin * jnp.cos(angle)
        return moving + mass * length**2 * spin**2 * 2 / 3 + mass * gravity * length * jnp.cos(angle)

    step = jax.jit(world.step)
    state = jnp.array([[0.0, 0.3, 1.5, 1.0]])
    first = energy(state)
    for _ in range(100):
        state = step(jnp.array(world.physics), state, jnp.zeros(1))
        assert abs(energy(state) - first) < 0.1 * mass * gravity * length
        assert abs(state[0, 0]) < world.most_x
    for _ in range(200):
        state = step(jnp.array(world.physics), state, jnp.ones(1))
    assert state[0, 0] == pytest.approx(world.most_x, abs=0.05)
    assert world.reward(jnp.zeros((1, 4))) == 1
    assert world.reward(jnp.array([[0.0, 0.0, jnp.pi, 0.0]])) == pytest.approx(0, abs=1e-6)


def test_a_fallen_pole_stays_fallen_and_a_pendulum_keeps_its_energy():
    world = policy_gradient.ENVIRONMENTS["cart_pole"]
    state, physics = jnp.array([[0.0, 0.0, 0.25, 0.0, 1.0]]), jnp.array(world.physics)
    for _ in range(3):
        state = world.step(physics, state, jnp.array([1.0]))
        assert world.reward(state) == 0
        assert jnp.isfinite(state).all()
    world = policy_gradient.ENVIRONMENTS["pendulum"]
    state, (gravity, length, mass) = jnp.array([[2.0, 0.0]]), world.physics

    def energy(state):  # of a rod about its end
        return mass * length**2 * state[:, 1] ** 2 / 6 + 0.5 * mass * gravity * length * jnp.cos(state[:, 0])

    first = energy(state)
    for _ in range(100):
        state = world.step(jnp.array(world.physics), state, jnp.zeros(1))
        assert abs(energy(state) - first) < 0.15 * mass * gravity * length
    assert world.reward(jnp.zeros((1, 2))) == 1
    assert world.reward(jnp.array([[jnp.pi, 0.0]])) == pytest.approx(0, abs=1e-6)


# Layers


def test_normalisations_and_attention_equal_flax():
    nn = pytest.importorskip("flax.linen")
    x = jax.random.normal(KEYS[0], (3, 4, 4, 8)) * 3 + 1
    params = {"scale": jax.random.normal(KEYS[1], (8,)), "bias": jax.random.normal(KEYS[2], (8,))}
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    close(group_norm(params, x, 2), nn.GroupNorm(2, epsilon=1e-5).apply({"params": params}, x))
    close(layer_norm(params, x), nn.LayerNorm(epsilon=1e-5).apply({"params": params}, x))
    x = x.reshape(3, 16, 8)
    block = initialise(KEYS[1], {name: shape(8, 8) for name in ("query", "key", "value", "merge")})
    heads = {name: {"kernel": w.reshape(8, 2, 4)} for name, w in block.items() if name != "merge"}
    heads |= {"out": {"kernel": block["merge"].reshape(2, 4, 8)}}
    model = nn.MultiHeadDotProductAttention(num_heads=2, use_bias=False)
    for causal in (False, True):
        mask = nn.make_causal_mask(jnp.ones((3, 16))) if causal else None
        ours = attention(block, x, heads=2, causal=causal, logit_scale=0.5)
        close(ours, model.apply({"params": heads}, x, mask=mask))


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_gated_cells_equal_flax(cell):
    nn = pytest.importorskip("flax.linen")
    width = 5
    model = nn.GRUCell(width) if cell == "gru" else nn.LSTMCell(width)
    x, h, c = jax.random.normal(KEYS[0], (3, 2, width))
    gates = {"gru": ("r", "z", "n"), "lstm": ("i", "f", "o", "g")}[cell]
    count = len(gates)
    layer = initialise(KEYS[1], {"w": shape(width, count * width), "recurrent": shape(width, count * width)})
    split = [dict(zip(gates, jnp.split(layer[name], count, -1), strict=True)) for name in ("w", "recurrent")]
    zeros = jnp.zeros(width)
    params = {f"i{gate}": {"kernel": split[0][gate]} for gate in gates}
    params |= {f"h{gate}": {"kernel": split[1][gate], "bias": zeros} for gate in gates}
    if cell == "gru":
        params = {k: v | ({"bias": zeros} if k[0] == "i" or k == "hn" else {}) for k, v in params.items()}
        params = {
            k: {n: p for n, p in v.items() if n == "kernel" or k[0] == "i" or k == "hn"} for k, v in params.items()
        }
        expected, _ = model.apply({"params": params}, h, x)
        ours = rnn_lm.gru(layer, x @ layer["w"], (h,))
    else:
        params["hf"]["bias"] = zeros + 1  # the forget gate's
        (memory, expected), _ = model.apply({"params": params}, (c, h), x)
        ours = rnn_lm.lstm(layer, x @ layer["w"], (h, c))
        np.testing.assert_allclose(ours[1], memory, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ours[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "settings"),
    [("rnn_lm", {"cell": cell, "depth": 2, "width": 8}) for cell in rnn_lm.CELLS] + [("transformer_lm", {"width": 8})],
)
def test_language_models_see_the_past_alone(family, settings):
    task = tasks.make(family, length=8, batch_size=2, **settings)

    @functools.partial(jax.jit, compiler_options=FAST)
    def logits(held):
        phi = task.sample(KEYS[0])
        params = task.init(KEYS[1], phi)
        tokens = task.batch(KEYS[2], phi, held, "train")
        assert tokens.shape == (2, 9)
        changed = tokens.at[:, 5:].set((tokens[:, 5:] + 1) % 63)
        found = [products(task.loss, params, KEYS[3], phi, one)[-1] for one in (tokens, changed)]
        return [one.reshape((8, 2, -1) if family == "rnn_lm" else (2, 8, -1)) for one in found]

    before, after = (x if family == "transformer_lm" else x.swapaxes(0, 1) for x in logits(task.data))
    assert before.shape == (2, 8, 63)
    np.testing.assert_allclose(before[:, :5], after[:, :5], atol=1e-6)
    assert (abs(before - after)[:, 5:].max(-1) > 1e-3).all()


def test_language_batches_are_contiguous_text():
    task = tasks.make("rnn_lm", length=40)
    phi = task.sample(KEYS[0])
    held = tasks.data.text("kjv")
    plain = held.decode(held.tokens[: held.splits["train"][1]])
    for row in np.asarray(task.batch(KEYS[1], phi, task.data, "train"))[:4]:
        assert held.decode(row) in plain


def test_patches_are_squares_row_by_row():
    x = jnp.arange(32.0).reshape(1, 4, 4, 2)
    found = patches(x, 2)
    assert found.shape == (1, 4, 8)
    np.testing.assert_array_equal(found[0, 1], x[0, :2, 2:].ravel())


def test_kl_of_gaussians_and_noising():
    mean, log_std = jnp.array([[0.5, -1.0]]), jnp.array([[0.2, -0.7]])
    z = mean + jnp.exp(log_std) * jax.random.normal(KEYS[0], (200_000, 2))
    log_ratio = -0.5 * ((z - mean) / jnp.exp(log_std)) ** 2 - log_std + 0.5 * z**2
    assert gaussian_kl(mean, log_std)[0] == pytest.approx(float(log_ratio.sum(1).mean()), rel=0.02)
    x, noise = jax.random.normal(KEYS[1], (2, 3, 20_000))
    found = noised(x, noise, jnp.array([0.0, 0.4, 1.0]))
    np.testing.assert_allclose(found[0], x[0], atol=1e-6)
    np.testing.assert_allclose(found[2], noise[2], atol=1e-5)
    assert found[1].std() == pytest.approx(1, rel=0.02)


def test_losses_of_single_predictions():
    error = jnp.array([-2.0, 0.5, 1.0])
    np.testing.assert_allclose(ERRORS["huber"](error), [1.5, 0.125, 0.5])
    np.testing.assert_allclose(ERRORS["squared"](error), [2.0, 0.125, 0.5])
    assert squared(jnp.array([[1.0, 0.0], [2.0, 0.0]]), jnp.array([0, 1])) == pytest.approx(2.5)


def at_zero(family, **settings):
    """The loss at params that are 0, its batch and phi."""
    task, key = tasks.make(family, **settings), jax.random.key(3)

    @jax.jit
    def first(held):
        phi = task.sample(key)
        params = jax.tree.map(jnp.zeros_like, jax.eval_shape(task.init, key, phi))
        batch = task.batch(key, phi, held, "train")
        return task.loss(params, key, phi, batch), batch, phi

    loss, batch, phi = first(task.data)
    return float(loss), batch, phi


def test_losses_of_vaes_pinns_and_graphs_are_what_they_are_called():
    """At params 0 all outputs are 0, a PDE's residual too, and the KL divergence of the latents is 0."""
    pytest.importorskip("haiku")
    for loss, of in (("squared", lambda e: 50 * e**2), ("absolute", lambda e: 10 * abs(e))):  # a spread of 0.1
        found, batch, _ = at_zero("vae", loss=loss, hidden=(4,), latents=2)
        assert found == pytest.approx(float(of(batch.x - 0.5).mean()), rel=1e-5)
    assert at_zero("vae", hidden=(4,), latents=2)[0] == pytest.approx(np.log(2))
    huber = lambda e: jnp.where(abs(e) < 1, e**2, 2 * abs(e) - 1)  # noqa: E731
    for loss, of in (("squared", jnp.square), ("absolute", abs), ("huber", huber)):
        found, batch, phi = at_zero("pinn", loss=loss, hidden=(4,), boundary_weight=3.0)
        exact = phi.exact(batch.edge[:, 0], batch.edge[:, 1])
        assert found == pytest.approx(float(3 * of(exact).mean()), rel=1e-5)
    assert at_zero("graph_network", loss="squared")[0] == pytest.approx(1)  # from a one-hot label
    assert at_zero("graph_network")[0] == pytest.approx(np.log(4))
    for family, valid in (("vae", "bernoulli, sq"), ("pinn", "squared, ab"), ("graph_network", "cross_entropy, sq")):
        with pytest.raises(ValueError, match=f"{family}: loss, got 'cubic'; valid: {valid}"):
            tasks.make(family, loss="cubic")


# Data of their own


def test_graphs():
    graph, classes, stops, source = graph_network.load("karate_club")
    linked = graph.mix > 0
    assert int(linked.sum() - 34) == 2 * 78
    assert linked.sum(0)[[0, 33, 11]].tolist() == [17, 18, 2]  # with themselves
    assert (classes, stops[-1], graph.label.sum()) == (2, 34, 17)
    assert source.id == "karate_club"
    np.testing.assert_allclose(graph.mix, graph.mix.T)
    block, *_ = graph_network.load("block_model")
    same = block.label[:, None] == block.label[None]
    linked = (block.mix > 0) & ~np.eye(160, dtype=bool)
    assert linked[same].mean() == pytest.approx(0.12, abs=0.02)
    assert linked[~same].mean() == pytest.approx(0.02, abs=0.005)
    degree = linked.sum(0) + 1
    np.testing.assert_allclose(
        block.mix[0], (linked[0] | (np.arange(160) == 0)) / np.sqrt(degree[0] * degree), rtol=1e-5
    )


def test_matrix_entries_are_those_of_the_matrix_and_all_are_used():
    task = tasks.make("matrix_factorisation", rows=8, columns=6)
    phi = task.sample(KEYS[0])
    matrix = phi.left @ phi.right.T + phi.noise
    used = []
    for split in tasks.SPLITS:
        row, column, value = task.eval_batches(phi, (), split)
        np.testing.assert_allclose(value, matrix[row, column], rtol=1e-5, atol=1e-6)
        used += (row * 6 + column).ravel().tolist()
    assert sorted(used) == list(range(48))


def test_pixels_are_those_of_the_image():
    task = tasks.make("coordinate_mlp", data="rgb_patches", size=16)
    phi = task.sample(KEYS[0])
    pixels = [task.eval_batches(phi, task.data, split) for split in tasks.SPLITS]
    place, colour = (jnp.concatenate([one[i][0] for one in pixels]) for i in (0, 1))
    assert colour.shape == (256, 3)
    row, column = np.rint((np.asarray(place) + 1) * 8 - 0.5).astype(int).T
    assert len(set(zip(row, column, strict=True))) == 256
    np.testing.assert_allclose(colour, 2 * task.data[phi.image][row, column] - 1, atol=1e-6)
