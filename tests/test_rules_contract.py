"""The contract of an update rule, over every registered one: whatever is done with an optax transform works."""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import pkgutil
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lopt import rules
from lopt.transform import LABELS

RULES = sorted(rules.REGISTRY)
HORIZON = 20
RANK_6 = (1, 3, 2, 3, 1, 2)
SHAPES = {"b": (3,), "w": (4, 3)}  # few and the same everywhere: each new shape is compiled


# Made of another rule's parts: those that l2o_pa is compared with; elo, which clips and then is small_fc; mulo, which
# is small_fc until multipliers are bound. make test-all looks at them too.
LATER = ("elo", "l2o_dm", "mulo", "rnnprop")


@pytest.fixture(params=[pytest.param(x, marks=pytest.mark.slow) if x in LATER else x for x in RULES])
def name(request):
    return request.param


SMALL = {  # as many meta-parameters as it takes to run every line
    "celo": dict(lstm_hidden=8),
    "l2o_dm": dict(hidden=4),
    "l2o_pa": dict(hidden=4),
    "nn_adam": dict(lstm_hidden=4),
    "rnnprop": dict(hidden=4),
    "velo": dict(lstm_hidden=8, bank=4),
}


@functools.cache
def built(name):
    rule = rules.make(name, **SMALL.get(name, {}))
    return rule, rule.init_theta(jax.random.key(7))


def bound(name, **bind):
    rule, theta = built(name)
    return rule.bind(theta, **{"num_steps": HORIZON} | bind)


def tree(seed, shapes=SHAPES, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(rng.normal(size=shape), dtype) for k, shape in shapes.items()}


PARAMS, GRADS = tree(0), [tree(1), tree(2), tree(3)]
LOSS = {"value": np.float32(1.5)}

# Compiling is what these tests do; optimised in full in the parity tests and where jax.jit stands.
jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
)


def updates_of(tx, grads, params=PARAMS, state=None):
    """The updates of one step."""
    return tx.update(grads, tx.init(params) if state is None else state, params, **LOSS)[0]


def loop(tx, grads, params=PARAMS, update=None):
    """Plain steps: params and state after the last."""
    state = tx.init(params)
    for t, g in enumerate(grads):
        # Falling: VeLO's features of a loss that stands still are a quotient of rounding errors.
        updates, state = (update or tx.update)(g, state, params, value=LOSS["value"] / (1 + t))
        params = optax.apply_updates(params, updates)
    return params, state


def at(tx, count, params=PARAMS):
    """The state at the start, but for the number of updates made."""
    return tx.init(params)._replace(count=jnp.int32(count))


def close(ours, theirs, rtol=1e-4, atol=1e-6):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol), ours, theirs)


def same(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def types(tree):
    return jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x), getattr(x, "weak_type", False)), tree)


# What a rule is


def test_every_module_is_registered():
    modules = {m.name for m in pkgutil.iter_modules(rules.__path__) if not m.name.startswith("_")}
    assert modules == set(rules.REGISTRY)
    assert all(path == f"lopt.rules.{name}" for name, path in rules.REGISTRY.items())


def test_settings_rebuild_the_rule(name):
    rule, theta = built(name)
    factory = getattr(importlib.import_module(rules.REGISTRY[name]), name)
    assert rule.name == name
    assert set(rule.settings) == set(inspect.signature(factory).parameters)
    again = rules.make(name, **json.loads(json.dumps(rule.settings)))
    assert (again.settings, again.needs) == (rule.settings, rule.needs)
    same(again.init_theta(jax.random.key(7)), theta)
    assert rule.needs <= {"value", "num_steps", "grad_fn"}
    assert all(x.dtype == jnp.float32 and jnp.isfinite(x).all() for x in jax.tree.leaves(theta))
    other = rule.init_theta(jax.random.key(8))
    assert not all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(theta), jax.tree.leaves(other), strict=True))


# Transformations of JAX


def test_steps_compile_once_and_equal_the_plain_loop(name):
    tx, traces = bound(name), []

    @functools.partial(jax.jit, donate_argnums=1)
    def update(*args, **kw):
        traces.append(1)
        return tx.update(*args, **kw)

    ours = loop(tx, GRADS, update=update)
    assert len(traces) == 1
    close(ours, loop(tx, GRADS))
    assert (int(ours[1].count), int(ours[1].skipped)) == (len(GRADS), 0)
    assert types(ours[1]) == types(tx.init(PARAMS))
    assert {x.dtype for x in jax.tree.leaves(ours[1].leaves)} == {jnp.dtype("float32")}
    assert {x.dtype for x in ours[1][:2]} == {jnp.dtype("int32")}
    assert not any(np.array_equal(ours[0][k], PARAMS[k]) for k in PARAMS)


def test_scan_of_cond_equals_the_plain_loop(name):
    tx = bound(name)

    def step(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params, value=LOSS["value"] / (1 + state.count))
        return optax.apply_updates(params, updates), state

    def body(carry, x):
        g, wanted = x
        return jax.lax.cond(wanted, step, lambda carry, g: carry, carry, g), None

    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *GRADS), jnp.asarray([True, False, True])
    ours = jit(lambda carry: jax.lax.scan(body, carry, stacked))((PARAMS, tx.init(PARAMS)))[0]
    close(ours, loop(tx, [GRADS[0], GRADS[2]]))


def test_vmaps_over_params_and_a_bad_one_leaves_the_others_alone(name):
    tx = bound(name)
    params = jax.tree.map(lambda *x: jnp.stack(x), tree(4), tree(5))
    grads = jax.tree.map(lambda *x: jnp.stack(x), GRADS[0], GRADS[1])
    grads["w"] = grads["w"].at[1, 2, 0].set(jnp.nan)
    update = jit(jax.vmap(functools.partial(tx.update, **LOSS)))
    updates, state = update(grads, jax.vmap(tx.init)(params), params)
    close(jax.tree.map(lambda x: x[0], updates), updates_of(tx, GRADS[0], tree(4)))
    assert not updates["w"][1].any()
    assert (state.count.tolist(), state.skipped.tolist()) == ([1, 1], [0, 1])


def test_vmaps_over_theta_and_lr(name):
    rule, _ = built(name)
    thetas, lrs = jax.vmap(rule.init_theta)(jax.random.split(jax.random.key(0), 2)), jnp.asarray([0.1, 0.3])
    thetas = jax.tree.map(lambda x: x.at[1].add(0.03), thetas)
    state = bound(name).init(PARAMS)

    def updates(theta, lr):
        return updates_of(rule.bind(theta, num_steps=HORIZON, lr=lr), GRADS[0], state=state)

    ours = jit(jax.vmap(updates))(thetas, lrs)
    for i in range(2):
        pick = functools.partial(jax.tree.map, lambda x, i=i: x[i])
        close(pick(ours), updates(pick(thetas), lrs[i]))
    assert not np.allclose(3 * ours["w"][0], ours["w"][1], rtol=0.01)


def test_differentiable_in_theta_even_where_gradients_are_zero(name):
    wide = {"hidden": 16} if "hidden" in built(name)[0].settings else {}  # wide compiles faster
    rule = rules.make(name, **SMALL.get(name, {}) | wide)
    told = {"lipschitz": 300.0} if name == "l2o_pa" else {}  # longer gradient steps kill all units
    x = jnp.abs(tree(4, {"x": (5, 4)})["x"])
    start = {"b": jnp.ones(3), "w": jnp.abs(PARAMS["w"]).at[:, 2].set(-3.0)}  # a dead unit: b[2] has gradient 0

    def meta_loss(theta):
        tx = rule.bind(theta, num_steps=HORIZON, **told)

        def body(carry, _):
            params, state = carry
            value, g = jax.value_and_grad(lambda p: jnp.mean((jax.nn.relu(x @ p["w"]) @ p["b"] - 1) ** 2))(params)
            updates, state = tx.update(g, state, params, value=value)
            return (optax.apply_updates(params, updates), state), value

        return jnp.sum(jax.lax.scan(body, (start, tx.init(start)), length=3)[1])

    gradient = jit(jax.grad(meta_loss))(rule.init_theta(jax.random.key(0)))
    for path, g in jax.tree.leaves_with_path(gradient):
        assert jnp.isfinite(g).all(), path
    silent = {".mixer.dead.w", ".mixer.dead.b"} | (
        {".mixer.controls.w", ".mixer.controls.b"} if name == "celo" else set()
    )
    moved = {jax.tree_util.keystr(path) for path, g in jax.tree.leaves_with_path(gradient) if jnp.any(g != 0)}
    assert moved == {jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(gradient)} - silent


def test_sharded_params_give_the_unsharded_result(name):
    tx, shapes = bound(name), {"b": (8,), "w": (16, 8)}
    params, grads = tree(6, shapes), tree(7, shapes)
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    specs = {"b": jax.P("y"), "w": jax.P("x", "y")}
    place = functools.partial(
        jax.tree.map, lambda x, s: jax.device_put(x, jax.sharding.NamedSharding(mesh, s)), is_leaf=lambda x: x is None
    )
    update = jit(lambda g, p: tx.update(g, tx.init(p), p, **LOSS))
    ours = update(place(grads, specs), place(params, specs))
    assert len(ours[0]["w"].sharding.device_set) == 8
    close(ours, update(grads, params), rtol=1e-5)


@pytest.mark.parametrize(
    "name",
    [pytest.param(one, marks=() if one in ("celo2", "tiny", "velo") else pytest.mark.slow) for one in RULES],
    indirect=True,
)
def test_what_is_bound_may_be_traced_on_a_mesh_with_explicit_axes(name):
    """As a training loop has it: a state made eagerly, then jitted steps; no type changes from step to step."""
    rule, theta = built(name)
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    shapes, specs = {"b": (8,), "s": (), "w": (16, 8)}, {"b": jax.P("y"), "s": jax.P(), "w": jax.P("x", "y")}
    place = lambda tree: {k: jax.device_put(x, jax.sharding.NamedSharding(mesh, specs[k])) for k, x in tree.items()}  # noqa: E731
    params, grads = tree(6, shapes), tree(7, shapes)

    def updates(grads, params, state, lr, theta):
        tx = rule.bind(theta, num_steps=HORIZON, lr=lr, multipliers={"b": 1.0, "s": 1.0, "w": jnp.float32(0.5)})
        return tx.update(grads, state, params, **LOSS)

    tx = bound(name)
    expected = updates(grads, params, tx.init(params), 0.5, theta)
    p, g = place(params) | {"none": None}, place(grads) | {"none": None}
    with jax.set_mesh(mesh):
        state = tx.init(p)
        ours, after = jit(updates)(g, p, state, jnp.float32(0.5), theta)
    assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)
    assert jax.tree.map(jax.typeof, ours) == jax.tree.map(jax.typeof, p)
    assert ours.pop("none") is None
    close(ours, expected[0], rtol=1e-4)
    again = tx.init(p)  # without the mesh as context
    assert jax.tree.map(jax.typeof, again) == jax.tree.map(jax.typeof, state)


def test_orbax_saves_and_restores_the_state(name, tmp_path):
    import orbax.checkpoint as ocp

    tx = bound(name)
    params = {"none": None, "scalar": jnp.ones(()), "empty": jnp.ones((0, 3)), **PARAMS}
    grads = {"none": None, "scalar": jnp.ones(()), "empty": jnp.ones((0, 3)), **GRADS[0]}
    _, state = tx.update(grads, tx.init(params), params, **LOSS)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(tx.init, params))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    same(restored, state)


def test_the_last_update_is_told_by_label(name):
    tx = bound(name, labels=lambda path, p: "output" if path == "w" else None)
    updates, state = tx.update(GRADS[0], tx.init(PARAMS), PARAMS, **LOSS)
    expected = {"output": jnp.sqrt(jnp.mean(updates["w"] ** 2)), "vector": jnp.sqrt(jnp.mean(updates["b"] ** 2))}
    close(state.update_rms, expected, atol=0)
    assert bound(name, diagnostics=False).init(PARAMS).update_rms is None


def test_multipliers_scale_the_direction_and_not_the_decay(name):
    factors = {"b": 1.0, "w": 0.25}
    plain = updates_of(bound(name), GRADS[0])
    close(updates_of(bound(name, multipliers=factors), GRADS[0]), {k: factors[k] * plain[k] for k in plain})
    decayed = updates_of(bound(name, weight_decay=0.1), GRADS[0])
    ours = updates_of(bound(name, weight_decay=0.1, multipliers=factors), GRADS[0])
    close(ours["w"], decayed["w"] - 0.75 * plain["w"])
    alike = {"a": {"b": PARAMS["w"]}, "a/b": PARAMS["w"]}  # two paths, one string
    ours = updates_of(bound(name, multipliers={"a": {"b": 1.0}, "a/b": 0.25}), alike, alike)
    close(ours["a/b"], 0.25 * ours["a"]["b"])
    with pytest.raises(ValueError, match=r"multipliers has no 'w'; valid: a tree like the parameters"):
        updates_of(bound(name, multipliers={"b": 1.0}), GRADS[0])


def test_multipliers_of_a_part(name):
    """`optax.multi_transform` shows a rule fewer parameters than the multipliers were made for."""
    factors = {"b": 1.0, "w": 0.25}
    tx = bound(name, multipliers=factors)
    split = optax.multi_transform({"learned": tx, "sgd": optax.sgd(0.5)}, {"w": "learned", "b": "sgd"})
    alone = updates_of(bound(name), {"w": GRADS[0]["w"]}, {"w": PARAMS["w"]})["w"]
    close(updates_of(split, GRADS[0])["w"], 0.25 * alone)


# Composition with optax


def test_chain(name):
    tx = bound(name)
    chained = optax.chain(optax.clip_by_global_norm(0.1), tx, optax.scale_by_schedule(lambda count: 0.5 ** (count + 1)))
    clip, state, params = optax.clip_by_global_norm(0.1), tx.init(PARAMS), PARAMS
    for i, g in enumerate(GRADS[:2]):
        updates, state = tx.update(clip.update(g, clip.init(g))[0], state, params, **LOSS)
        params = optax.apply_updates(params, jax.tree.map(lambda u, i=i: 0.5 ** (i + 1) * u, updates))
    close(loop(chained, GRADS[:2])[0], params)


def test_multi_steps(name):
    tx = bound(name)
    many = optax.MultiSteps(tx, every_k_schedule=2)
    params, state = loop(many, GRADS[:2], update=jit(many.update))
    close(params, loop(tx, [jax.tree.map(lambda a, b: (a + b) / 2, *GRADS[:2])])[0])
    assert int(state.inner_opt_state.count) == 1


def test_multi_transform_and_masked(name):
    tx = bound(name)
    alone = updates_of(tx, {"w": GRADS[0]["w"]}, {"w": PARAMS["w"]})["w"]
    split = optax.multi_transform({"learned": tx, "sgd": optax.sgd(0.5)}, {"w": "learned", "b": "sgd"})
    close(updates_of(split, GRADS[0]), {"w": alone, "b": -0.5 * GRADS[0]["b"]})
    masked = optax.masked(tx, {"w": True, "b": False})
    close(updates_of(masked, GRADS[0]), {"w": alone, "b": GRADS[0]["b"]})


def test_injected_learning_rate(name):
    injected = optax.inject_hyperparams(lambda lr: bound(name, lr=lr))(lr=lambda count: 0.1 * (count + 1))
    tx, state, params = bound(name, lr=0.1), bound(name).init(PARAMS), PARAMS
    for i, g in enumerate(GRADS[:2]):
        updates, state = tx.update(g, state, params, **LOSS)
        params = optax.apply_updates(params, jax.tree.map(lambda u, i=i: (i + 1) * u, updates))
    close(loop(injected, GRADS[:2])[0], params)


# Leaves of all kinds


def test_none_leaves_pass_through(name):
    tx = bound(name)
    plain = updates_of(tx, GRADS[0])
    wrap = lambda x: {"none": None, "w": x["w"], "list": [None, x["b"]]}  # noqa: E731
    ours = updates_of(tx, wrap(GRADS[0]), wrap(PARAMS))
    assert jax.tree.structure(ours) == jax.tree.structure(wrap(PARAMS))
    same(ours, wrap(plain))


def test_a_missing_gradient_leaves_its_tensor_alone(name):
    tx = bound(name)
    start = tx.init(PARAMS)
    updates, state = tx.update(GRADS[0] | {"b": None}, start, PARAMS, **LOSS)
    same(updates["b"], np.zeros(3))
    same(state.leaves["b"], start.leaves["b"])
    assert updates["w"].any()


def test_every_rank(name):
    tx = bound(name)
    shapes = {"r0": (), "r1": (1,)} | {f"rank{n}": RANK_6[6 - n :] for n in range(1, 7)}
    params, grads = tree(8, shapes), tree(9, shapes)
    state = tx.init(params)
    assert types(jax.eval_shape(tx.update, grads, state, params, **LOSS)) == (types(params), types(state))


@pytest.mark.parametrize("rank", [5, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 3, 4, 6))])
def test_a_leaf_of_this_rank_beside_scalars(name, rank):
    tx = bound(name)
    shapes = {"r0": (), "r1": (1,), "rank": RANK_6[6 - rank :]}
    params, grads = tree(8, shapes), tree(9, shapes)
    params["r1"], grads["r1"] = (x["r0"].reshape(1) for x in (params, grads))
    updates, state = jit(lambda g, p: tx.update(g, tx.init(p), p, **LOSS))(grads, params)
    assert all(jnp.isfinite(u).all() and u.any() for u in updates.values())
    # A scalar acts as shape (1,), and its state is in one stack with that's, but for a rule without stacks.
    close(updates["r0"], updates["r1"][0])
    if name == "l2o_pa":
        close(state.leaves["r0"], state.leaves["r1"])
    else:
        assert state.leaves["r1"] is None
        close(*(jax.tree.map(lambda x, i=i: x[i], state.leaves["r0"]) for i in (0, 1)))


@pytest.mark.parametrize(
    "params", [np.ones((4, 3), np.float32), np.float32(1.0), 1.0, {}], ids=["array", "number", "float", "nothing"]
)
def test_params_need_not_be_a_dict(name, params):
    tx = bound(name)
    updates, state = jax.eval_shape(tx.update, params, tx.init(params), params, **LOSS)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)
    assert types(state) == types(tx.init(params))


def test_low_precision_params_are_updated_in_float32(name):
    tx = bound(name, weight_decay=0.1)
    low = {"b": jnp.float16, "w": jnp.bfloat16}
    cast = lambda tree: {k: x.astype(low[k]) for k, x in tree.items()}  # noqa: E731
    wide = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)  # noqa: E731
    params, grads = cast(PARAMS), cast(GRADS[0])
    start = tx.init(params)
    updates, state = tx.update(grads, start, params, **LOSS)
    expected, expected_state = tx.update(wide(grads), tx.init(wide(params)), wide(params), **LOSS)
    assert {k: x.dtype for k, x in updates.items()} == low
    assert types(state) == types(start) == types(expected_state)
    same(state, expected_state)
    same(updates, cast(expected))
    same(updates_of(tx, wide(grads), params), updates)  # gradients may be of another precision


def test_x64(name):
    plain = updates_of(bound(name, weight_decay=0.1), GRADS[0])
    with jax.enable_x64(True):
        tx = bound(name, weight_decay=0.1)
        for dtype in ("float32", "float64"):
            params = tree(0, dtype=dtype)
            state = tx.init(params)
            assert {x.dtype for x in jax.tree.leaves(state.leaves)} == {jnp.dtype(dtype)}
            assert types(jax.eval_shape(tx.update, params, state, params, **LOSS)) == (types(params), types(state))
        close(updates_of(tx, tree(1, dtype="float64"), tree(0, dtype="float64")), plain, rtol=1e-3, atol=1e-5)


def test_empty_leaves(name):
    tx = bound(name)
    more = lambda tree: tree | {"empty": jnp.zeros((0, 3))}  # noqa: E731
    updates, state = tx.update(more(GRADS[0]), tx.init(more(PARAMS)), more(PARAMS), **LOSS)
    assert updates.pop("empty").shape == (0, 3)
    same(updates, updates_of(tx, GRADS[0]))
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(state))


def test_integer_leaves_are_refused_by_name_unless_frozen(name):
    params, grads = (
        {"net": PARAMS | {"steps": jnp.arange(2)}},
        {"net": GRADS[0] | {"steps": np.zeros(2, jax.dtypes.float0)}},
    )
    with pytest.raises(ValueError, match=r"parameter 'net/steps' has dtype int32; valid: float16, bfloat16"):
        bound(name).init(params)
    updates = updates_of(bound(name, labels=lambda path, _: "freeze" if path == "net/steps" else None), grads, params)
    assert updates["net"].pop("steps").tolist() == [0, 0]
    same(updates["net"], updates_of(bound(name), GRADS[0]))


# What the arguments mean


def test_other_arguments_of_an_update_are_ignored(name):
    tx = bound(name)
    updates, _ = tx.update(GRADS[0], tx.init(PARAMS), PARAMS, **LOSS, grad=GRADS[1], something="else")
    same(updates, updates_of(tx, GRADS[0]))


def test_lr_multiplies(name):
    close(
        updates_of(bound(name, lr=0.3), GRADS[0]),
        {k: 3 * u for k, u in updates_of(bound(name, lr=0.1), GRADS[0]).items()},
    )


def test_num_steps_may_be_traced(name):
    tx = bound(name, schedule="cosine")
    traced = jit(lambda n: updates_of(bound(name, schedule="cosine", num_steps=n), GRADS[0], state=at(tx, 5)))
    close(traced(HORIZON), updates_of(tx, GRADS[0], state=at(tx, 5)))


def test_schedules(name):
    unit = updates_of(tx := bound(name, schedule="constant"), GRADS[0], state=at(bound(name), 5))
    scaled = lambda factor: jax.tree.map(lambda u: factor * u, unit)  # noqa: E731
    cosine = bound(name, schedule="cosine")
    close(updates_of(cosine, GRADS[0], state=at(tx, 5)), scaled(0.5 * (1 + np.cos(np.pi * 5 / HORIZON))))
    own = bound(name, schedule=lambda count, num_steps: count / num_steps)
    close(updates_of(own, GRADS[0], state=at(tx, 5)), scaled(5 / HORIZON))
    for count in (HORIZON, 2 * HORIZON):  # held past the horizon
        assert not any(u.any() for u in updates_of(cosine, GRADS[0], state=at(tx, count)).values())
        assert all(jnp.isfinite(u).all() and u.any() for u in updates_of(tx, GRADS[0], state=at(tx, count)).values())


def test_weight_decay_is_decoupled_and_scheduled(name):
    bind = dict(lr=0.3, schedule="cosine")
    tx = bound(name, **bind)
    without = updates_of(tx, GRADS[0], state=at(tx, 5))
    rate = 0.3 * 0.5 * (1 + np.cos(np.pi * 5 / HORIZON))
    for decay in (0.2, jnp.float32(0.2)):
        ours = updates_of(bound(name, weight_decay=decay, **bind), GRADS[0], state=at(tx, 5))
        close(ours, jax.tree.map(lambda u, p: u - rate * 0.2 * p, without, PARAMS), atol=1e-7)


def test_labels(name):
    seen = {}
    tx, start = bound(name), bound(name).init(PARAMS)
    ours = updates_of(bound(name, weight_decay=0.2, labels=lambda path, p: seen.update({path: p.shape})), GRADS[0])
    assert seen == SHAPES
    spared = bound(name, weight_decay=0.2, labels=lambda path, p: ("no_decay",) if p.ndim < 2 else ())
    close(updates_of(spared, GRADS[0]), {"w": ours["w"], "b": updates_of(tx, GRADS[0])["b"]})
    frozen = bound(name, labels=lambda path, p: "freeze" if path == "b" else None)
    updates, state = frozen.update(GRADS[0], frozen.init(PARAMS), PARAMS, **LOSS)
    alone = updates_of(tx, {"w": GRADS[0]["w"]}, {"w": PARAMS["w"]})  # a rule across tensors does not see it
    same(updates, {**alone, "b": np.zeros(3)})
    assert jax.tree.leaves(state.leaves["b"]) == []
    assert types(state.leaves["w"]) == types(start.leaves["w"])
    for label in LABELS:
        jax.eval_shape(bound(name, labels=lambda path, p, label=label: label).init, PARAMS)
    with pytest.raises(ValueError, match=r"labels\('b'\), got 3; valid: a label, several or None"):
        bound(name, labels=lambda path, p: 3).init(PARAMS)
    with pytest.raises(ValueError, match=r"labels\('b'\): unknown label 'nodecay'. Did you mean 'no_decay'"):
        bound(name, labels=lambda path, p: "nodecay").init(PARAMS)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_nonfinite_element_skips_its_leaf(name, bad):
    tx = bound(name, weight_decay=0.1)
    _, before = tx.update(GRADS[1], tx.init(PARAMS), PARAMS, **LOSS)
    updates, state = tx.update(GRADS[0] | {"w": GRADS[0]["w"].at[1, 2].set(bad)}, before, PARAMS, **LOSS)
    expected, undisturbed = tx.update(GRADS[0], before, PARAMS, **LOSS)
    same(updates, {"w": np.zeros((4, 3)), "b": expected["b"]})
    same(state.leaves, {"w": before.leaves["w"], "b": undisturbed.leaves["b"]})
    assert (int(state.count), int(state.skipped)) == (2, 1)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(state))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_leaves_no_trace(name, bad):
    """Of a rule that needs it; the others never see it."""
    tx = bound(name)
    start = tx.init(PARAMS)
    updates, state = tx.update(GRADS[0], start, PARAMS, value=bad)
    if "value" in built(name)[0].needs:
        assert not any(u.any() for u in updates.values())
        same((state.count, state.leaves, state.shared), (start.count, start.leaves, start.shared))
        assert int(state.skipped) == len(SHAPES)
    else:
        same(updates, updates_of(tx, GRADS[0]))


def test_a_gradient_too_large_to_square_skips_its_leaf(name):
    tx = bound(name)
    for large, skips in ((1e20, True), (1e19, True), (4e18, False), (1e15, False)):  # 12 elements of 1e19: the sum
        bad = GRADS[0] | {"w": jnp.full((4, 3), large)}
        updates, state = tx.update(bad, tx.init(PARAMS), PARAMS, **LOSS)
        # L2O-DM normalises nothing: its gates are shut then, and it says 0.
        assert bool(updates["w"].any()) != skips or (name == "l2o_dm" and not skips)
        assert int(state.skipped) == skips
        for tree in (updates, state.leaves, tx.update(GRADS[0], state, PARAMS, **LOSS)):
            assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(tree)), large


def test_tiny_leaves_alone_what_has_no_gradient():
    """A frozen part or an unused row; every other input of the network is no reason to move."""
    tx, zero = bound("tiny"), jax.tree.map(jnp.zeros_like, PARAMS)
    half = {"w": GRADS[0]["w"].at[1].set(0.0), "b": zero["b"]}
    updates = updates_of(tx, half)
    assert not updates["b"].any()
    assert not updates["w"][1].any()
    assert updates["w"][0].all()


def test_a_learned_decay_is_of_matrices_that_had_a_gradient():
    """And of no vector, and of nothing that is labelled so; a step without direction shows the decay alone."""
    rule = rules.make("tiny", pace=4, decay=0.5, step_mult=0.1)
    zero = jax.tree.map(jnp.zeros_like, rule.init_theta(jax.random.key(0)))
    seen = {"w": GRADS[0]["w"], "b": GRADS[0]["b"]}
    shrink = lambda grads, **options: updates_of(rule.bind(zero, num_steps=10, **options), grads)  # noqa: E731
    close(shrink(seen), {"w": -0.1 * 0.5 * PARAMS["w"], "b": jnp.zeros_like(PARAMS["b"])})
    close(shrink(seen, lr=0.5)["w"], -0.5 * 0.1 * 0.5 * PARAMS["w"])
    for still in (shrink(jax.tree.map(jnp.zeros_like, seen)), shrink(seen, labels=lambda path, p: "no_decay")):
        assert not any(u.any() for u in still.values())


def test_nonfinite_modes(name):
    bad = GRADS[0] | {"w": GRADS[0]["w"].at[1, 2].set(jnp.nan)}
    tx = bound(name, weight_decay=0.1, nonfinite="skip_tree")
    start = tx.init(PARAMS)
    updates, state = tx.update(bad, start, PARAMS, **LOSS)
    assert not any(u.any() for u in updates.values())
    same((state.leaves, state.shared), (start.leaves, start.shared))  # the step did not happen
    assert (int(state.count), int(state.skipped)) == (0, len(SHAPES))
    same(updates_of(tx, GRADS[0]), updates_of(bound(name, weight_decay=0.1), GRADS[0]))
    assert not jnp.isfinite(updates_of(bound(name, nonfinite="propagate"), bad)["w"]).all()


def test_rows_and_columns_have_no_order(name):
    """A permuted problem gets the permuted update."""
    rows, columns = np.asarray([2, 0, 3, 1]), np.asarray([1, 2, 0])
    permute = lambda tree: {"b": tree["b"][columns], "w": tree["w"][rows][:, columns]}  # noqa: E731
    tx = bound(name)
    params, _ = loop(tx, [permute(g) for g in GRADS[:2]], permute(PARAMS))
    close(params, permute(loop(tx, GRADS[:2])[0]))


# Bad input


@pytest.mark.parametrize(
    ("bind", "message"),
    [
        (dict(num_steps=0), "num_steps, got 0; valid: an integer >= 1"),
        (dict(weight_decay=-0.1), "weight_decay, got -0.1; valid: a finite number >= 0"),
        (dict(lr=optax.linear_schedule(1.0, 0.0, 9)), "lr, got a function; valid: a number, with schedule=lambda"),
        (dict(lr="0.1"), "lr, got '0.1'; valid: a finite number >= 0"),
        (dict(lr=np.float32(-1)), "valid: a finite number >= 0"),
        (dict(lr=jnp.float32(np.nan)), "lr, got Array(nan, dtype=float32); valid: a finite number >= 0"),
        (dict(lr=jnp.ones(3)), "valid: a finite number >= 0"),
        (dict(schedule=optax.cosine_decay_schedule(1.0, 9)), "or a function of (count, num_steps)"),
        (dict(schedule=3), "schedule, got 3; valid: constant, cosine, or a function"),
        (dict(labels={"b": "freeze"}), "valid: a function of (path, leaf)"),
        (dict(schedule="cosin"), "unknown schedule 'cosin'. Did you mean 'cosine'? valid: constant, cosine."),
        (dict(schedule="cosine", num_steps=None), ""),
        (
            dict(nonfinite="skip"),
            "unknown nonfinite 'skip'. Did you mean 'skip_tree'? valid: propagate, skip_leaf, skip_tree.",
        ),
    ],
)
def test_bad_arguments_are_named(name, bind, message):
    with pytest.raises(ValueError, match=rf"lopt\.rules\.{name}: .*{re.escape(message)}"):
        bound(name, **bind)


def test_a_misspelt_argument_is_refused(name):
    with pytest.raises(TypeError, match="weight_decy"):
        bound(name, weight_decy=0.1)


def test_what_a_rule_needs_is_asked_for(name):
    rule, theta = built(name)
    if "num_steps" in rule.needs:
        with pytest.raises(ValueError, match="needs the horizon: pass num_steps="):
            rule.bind(theta)
    tx = bound(name)
    with pytest.raises(ValueError, match=r"call tx\.update\(grads, state, params\)"):
        tx.update(GRADS[0], tx.init(PARAMS))
    if "value" in rule.needs:
        with pytest.raises(ValueError, match=r"call tx\.update\(grads, state, params, value=loss\)"):
            tx.update(GRADS[0], tx.init(PARAMS), PARAMS)
        with pytest.raises(ValueError, match=r"value, got shape \(2,\); valid: the loss, a scalar"):
            tx.update(GRADS[0], tx.init(PARAMS), PARAMS, value=np.ones(2))


@pytest.mark.parametrize(
    ("rule", "settings", "message"),
    [
        ("smal_fc", {}, "unknown rule 'smal_fc'. Did you mean 'small_fc'? valid: celo, "),
        ("small_fc", {"hiden": 4}, "small_fc: unknown setting 'hiden'. Did you mean 'hidden'"),
        ("small_fc", {"hidden": 0}, "small_fc: hidden, got 0; valid: > 0"),
        ("small_fc", {"hidden": 4.0}, "small_fc: hidden, got 4.0; valid: int"),
        ("small_fc", {"learned_decays": 1}, "small_fc: learned_decays, got 1; valid: bool"),
        ("small_fc", {"step_mult": -1}, "small_fc: step_mult, got -1; valid: > 0"),
        ("mulo", {"max_grad_norm": "1"}, "mulo: max_grad_norm, got '1'; valid: float | None"),
        ("elo", {"exp_mult": float("nan")}, "elo: exp_mult, got nan; valid: a finite number"),
        ("celo2", {"adam_weight_decay": -0.1}, "celo2: adam_weight_decay, got -0.1; valid: >= 0"),
        ("small_fc", {"compat": "pilo"}, "small_fc: unknown compat 'pilo'. Did you mean 'pylo'? valid: '', pylo."),
        ("celo2", {"hidden": 0}, "celo2: hidden, got 0"),
        ("celo2", {"second_moment": 1.0}, "celo2: second_moment, got [1.0]; valid: 1 in [0, 1)"),
        ("mlp", {"momenta": [0.9]}, "mlp: momenta, got [0.9]; valid: 6 in [0, 1)"),
        ("velo", {"factored": 0.9}, "velo: factored, got 0.9; valid: a list of numbers"),
        ("celo2", {"clip_norm": 0.0}, "celo2: clip_norm, got 0.0; valid: > 0"),
        ("celo2", {"compat": "pilo"}, "celo2: unknown compat 'pilo'. Did you mean 'pylo'? valid: '', pylo."),
        ("tiny", {"clip": 0.0}, "tiny: clip, got 0.0; valid: > 0"),
    ],
)
def test_bad_settings_are_named(rule, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        rules.make(rule, **settings)


# Particular rules


def test_small_fc_in_pylo_s_way_decays_what_it_moved():
    bind = functools.partial(rules.make("small_fc", compat="pylo").bind, built("small_fc")[1])
    without, ours = (updates_of(bind(lr=0.5, weight_decay=wd), GRADS[0]) for wd in (0.0, 0.2))
    close(ours, jax.tree.map(lambda u, p: (p + u) * (1 - 0.5 * 0.2) - p, without, PARAMS))


def test_small_fc_clips_each_tensor_alone():
    rule, theta = built("small_fc")
    clip = lambda g: g * min(1.0, 0.5 / (float(jnp.linalg.norm(g)) + 1e-6))  # noqa: E731
    mixed = GRADS[0] | {"b": 1e-3 * GRADS[0]["b"]}  # below the limit: left as it is
    for name in ("small_fc", "mulo"):
        ours = rules.make(name, max_grad_norm=0.5, hidden=4, step_mult=1e-3).bind(theta)
        close(updates_of(ours, mixed), updates_of(rule.bind(theta), jax.tree.map(clip, mixed)), atol=0)
    assert not np.allclose(updates_of(ours, mixed)["w"], updates_of(rule.bind(theta), mixed)["w"], rtol=1e-4)


def test_elo_in_pylo_s_way_replaces_what_is_not_finite():
    theta = built("elo")[1]
    bad, zero = (GRADS[0] | {"w": GRADS[0]["w"].at[1, 2].set(x)} for x in (np.nan, 0.0))
    same(updates_of(rules.make("elo", compat="pylo").bind(theta), bad), updates_of(bound("elo"), zero))
    # An infinity becomes the largest number, whose square would stay in the state for ever.
    tx = rules.make("elo", compat="pylo").bind(theta)
    for large in (np.inf, 1e20):
        updates, state = tx.update(GRADS[0] | {"w": GRADS[0]["w"].at[1, 2].set(large)}, tx.init(PARAMS), PARAMS)
        assert not updates["w"].any()
        assert int(state.skipped) == 1
        assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(state))


def test_celo2_decays_adam_s_tensors_apart():
    theta = built("celo2")[1]
    ours = rules.make("celo2", adam_weight_decay=0.5, adam_lr_mult=3.0).bind(theta, lr=0.1)
    plain = updates_of(rules.make("celo2", adam_lr_mult=3.0).bind(theta, lr=0.1), GRADS[0])
    close(updates_of(ours, GRADS[0]), plain | {"b": plain["b"] - 0.1 * 0.5 * PARAMS["b"]})
    pylo = rules.make("celo2", adam_weight_decay=0.5, adam_lr_mult=3.0, compat="pylo").bind(theta, lr=0.1)
    close(updates_of(pylo, GRADS[0]), plain | {"b": plain["b"] - 0.1 * 3.0 * 0.5 * PARAMS["b"]})


def test_celo2_clips_without_the_skipped_leaf():
    tx = rules.make("celo2", clip_norm=0.1).bind(built("celo2")[1])
    bad, zero = (GRADS[0] | {"w": jnp.full((4, 3), x)} for x in (np.nan, 0.0))
    same(updates_of(tx, bad)["b"], updates_of(tx, zero)["b"])


def test_celo2_gives_adamw_what_is_not_a_matrix():
    rule, theta = built("celo2")
    adam = optax.adamw(0.01, b1=0.9, b2=0.95, weight_decay=0.1)
    label = lambda path, p: "output" if path == "w" else None  # noqa: E731
    close(loop(rule.bind(theta, lr=0.01, weight_decay=0.1, labels=label), GRADS)[0], loop(adam, GRADS)[0])
