"""In blocks, stacked or whole and one by one: the same updates, for every rule; and a wrong block is noticed."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_rules_contract import HORIZON, LOSS, RULES, built, tree

from lopt import blocks, rules, tensor

# Few, as compiling is what these tests do. Of the last the columns are as long as the tensor.
SHAPES = {"m": (12, 8), "r": (66,), "thin": (66, 1)}
ALL = ((100,), (66,), (12, 8), (7, 11), (2, 40), (3, 3, 4, 5), (2, 1, 3, 5, 3))
WHOLE = 1 << 16
SMALL = {"lstm_hidden": 8, "bank": 4}  # of velo
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def set_block(monkeypatch, elements):
    monkeypatch.setattr(blocks, "BLOCK", elements)
    blocks.cut.cache_clear()


@pytest.fixture(autouse=True)
def forget_cuts():
    yield
    blocks.cut.cache_clear()


def two_steps(name, shapes, dtype=np.float32, **bind):
    rule, theta = built(name)
    tx = rule.bind(theta, **{"num_steps": HORIZON, "weight_decay": 0.1} | bind)
    params, state = tree(1, shapes, dtype), tx.init(tree(1, shapes, dtype))
    update = jit(lambda *args: tx.update(*args, **LOSS))
    for seed in (2, 3):
        updates, state = update(tree(seed, shapes, dtype), state, params)
        params = optax.apply_updates(params, updates)
    return updates, state


def close(ours, theirs, rtol=1e-4, atol=1e-6):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol), ours, theirs)


def some_slow(names, quick):
    """The others are run by make test-all."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", some_slow(RULES, ("nn_adam", "small_fc", "tiny")))
def test_blocks_change_nothing(name, monkeypatch):
    expected = two_steps(name, SHAPES)
    set_block(monkeypatch, 32)
    assert all(blocks.cut(shape) for shape in SHAPES.values())
    close(two_steps(name, SHAPES), expected)


def test_what_is_not_cut():
    for shape in ((2 * blocks.BLOCK // 3,), (1_000_003,), (100, 200)):
        assert blocks.cut(shape) is None
    for shape in ((50_257, 768), (3, 3, 512, 512), (10_000, 10_000), (30_522, 768), (2, 10**6)):
        cut = blocks.cut(shape)
        assert cut is not None
        assert blocks.BLOCK / 32 < np.prod(cut.block) < blocks.BLOCK * 32


def wide(tree):
    return jax.tree.map(lambda x: x.astype(np.float32) if x.dtype in blocks.LOW else x, tree)


def renewed(shape, cut, dtype=jnp.float32):
    """A sweep in place over a tensor, momenta that have an axis more, and a row that is not as long."""
    rng = np.random.default_rng(0)
    x, m, row = (jnp.asarray(rng.normal(size=s), dtype) for s in (shape, (2, *shape), (1,) * len(shape)))

    def f(buffers, xs):
        (x, m), row = wide((buffers, xs))
        m = [0.5 * one + x * row for one in m]
        m = tuple(m) if cut else jnp.stack(m)
        return (x + m[1], m), {"mean": jnp.mean(m[0]), "last": jnp.mean(m[1], axis=-1, keepdims=True)}

    measured = blocks.over(lambda *xs: (f(*xs)[0], ()), (x, m), row, cut, lambda new: jnp.mean(new[0] ** 2))
    return *blocks.over(f, (x, m), row, cut), *measured


@pytest.mark.parametrize("shape", ALL)
def test_every_rank_in_blocks(shape, monkeypatch):
    set_block(monkeypatch, 16)
    cut = blocks.cut(shape)
    assert cut is not None
    assert cut.count > 1
    assert cut.count * np.prod(cut.block) == np.prod(shape)
    expected = renewed(shape, None)
    close(renewed(shape, cut), expected)
    monkeypatch.setattr(blocks.Cut, "count", property(lambda cut: int(np.prod(shape) // np.prod(cut.block)) - 1))
    with pytest.raises((AssertionError, TypeError, ValueError)):
        close(renewed(shape, cut), expected)


@pytest.mark.parametrize(
    ("name", "block", "dtype"),
    [
        ("small_fc", 24, "float32"),
        ("nn_adam", 24, "bfloat16"),
        *(
            pytest.param(*xs, "float32", marks=pytest.mark.slow)
            for xs in (("celo2", 24), ("celo2", WHOLE), ("velo", 24), ("velo", WHOLE))
        ),
    ],
)
def test_stacks_change_nothing(name, block, dtype, monkeypatch):
    """Six equal matrices and six equal vectors, all at once and then two or three, in loops over the stack."""
    shapes = {f"m{i}": (4, 3) for i in range(6)} | {f"v{i}": (5,) for i in range(6)}
    updates, state = two_steps(name, shapes, dtype)
    set_block(monkeypatch, block)
    monkeypatch.setattr(tensor, "STACKED", 0)
    expected, alone = wide(two_steps(name, shapes, dtype))
    rtol = 1e-2 if dtype == "bfloat16" else 1e-4
    close(wide(updates), expected, rtol=rtol)
    stacked = [state.leaves[k] for k in shapes]
    assert [x is None for x in stacked] == [i % 6 > 0 for i in range(12)]
    for i, k in enumerate(shapes):
        own = jax.tree.map(lambda x, i=i: x[i % 6], stacked[i - i % 6])
        close(wide(own), alone.leaves[k], rtol=rtol)


def test_a_stack_with_a_gradient_that_is_missing_and_one_that_is_not_finite(monkeypatch):
    params, grads = (tree(i, {f"m{i}": (4, 3) for i in range(4)}) for i in (1, 2))
    grads |= {"m1": None, "m2": grads["m2"].at[0, 0].set(jnp.nan)}
    rule, theta = built("small_fc")
    tx = rule.bind(theta)
    updates, state = tx.update(grads, tx.init(params), params)
    monkeypatch.setattr(tensor, "STACKED", 0)
    expected, alone = tx.update(grads, tx.init(params), params)
    close(updates, expected)
    assert [bool(u.any()) for u in updates.values()] == [True, False, False, True]
    assert int(state.skipped) == int(alone.skipped) == 1
    close(state.leaves["m0"], jax.tree.map(lambda *xs: jnp.stack(xs), *alone.leaves.values()))
    for stacked in (0, 1 << 18):
        monkeypatch.setattr(tensor, "STACKED", stacked)
        with pytest.raises(ValueError, match=r"state of 'm.', not one of . equal tensors; valid: the state of tx.init"):
            tx.update(grads, tx.init(params | {"m3": params["m0"].T}) if stacked else state, params)


# The direction of the second is rounded before it is scaled, and the decay added to it.
@pytest.mark.parametrize(("name", "atol"), [("small_fc", 1e-6), ("tiny", 2e-4)])
def test_low_precision_in_blocks(name, atol, monkeypatch):
    expected = two_steps(name, SHAPES, jnp.bfloat16)
    set_block(monkeypatch, 16)
    ours = two_steps(name, SHAPES, jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(ours[0])} == {jnp.dtype("bfloat16")}
    close(wide(ours), wide(expected), rtol=1e-2, atol=atol)


@pytest.mark.parametrize(
    ("dtype", "size", "windows"), [("bfloat16", 100, 4), ("bfloat16", 400, 1), ("float16", 100, 4)]
)
def test_low_precision_in_windows(dtype, size, windows, monkeypatch):
    """Eleven blocks by so many bytes at once; the last of four windows is shorter."""
    set_block(monkeypatch, 6)
    monkeypatch.setattr(blocks, "WINDOW", size)
    shape = (22, 3)
    cut = blocks.cut(shape)
    assert (cut.count, cut.windows(3 * 66 * 2)) == (11, windows)
    expected = wide(renewed(shape, None, dtype))
    ours = lambda: wide(jit(lambda: renewed(shape, cut, dtype))())  # noqa: E731
    close(ours(), expected, rtol=1e-2)
    put = blocks._put_window
    monkeypatch.setattr(blocks, "_put_window", lambda view, bits, w, count: put(view, bits, w + 1, count))
    if windows > 1:
        with pytest.raises(AssertionError):
            close(ours(), expected, rtol=1e-2)


def test_blocks_under_transformations(monkeypatch):
    """Over theta: vmap and gradient."""
    rule = rules.make("mlp", hidden=16)  # wide compiles faster
    theta = rule.init_theta(jax.random.key(7))
    shapes = {"r": (66,), "a": (3, 2), "b": (3, 2)}
    params, grads = tree(1, shapes), tree(2, shapes)

    def loss(theta):
        updates, _ = rule.bind(theta).update(grads, rule.bind(theta).init(params), params)
        return 1e3 * sum(jnp.sum(u * p) for u, p in zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True))

    thetas = jax.tree.map(lambda x: jnp.stack([x, x + 0.01]), theta)

    def results(block):
        set_block(monkeypatch, block)
        # New functions: the old ones would not be traced again.
        return jit(lambda ts: jax.vmap(loss)(ts))(thetas), jit(lambda t: jax.grad(loss)(t))(theta)

    close(results(16), results(WHOLE), rtol=1e-3)


def test_a_stack_is_differentiated_through_two_updates(monkeypatch):
    """Celo2 clips by the norm of gradients that depend on theta by then."""
    rule = rules.make("celo2", newton_schulz=False, hidden=2)
    theta, p = rule.init_theta(jax.random.key(0)), tree(1, {f"m{i}": (4, 3) for i in range(3)})

    def end(theta):
        tx, params = rule.bind(theta), p
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update(params, state, params)  # of half the sum of squares
            params = optax.apply_updates(params, updates)
        return sum(jnp.sum(x * x) for x in params.values())

    ours = jit(jax.grad(end))(theta)
    monkeypatch.setattr(tensor, "STACKED", 0)
    expected = jit(jax.grad(lambda theta: end(theta)))(theta)  # a new function: the old one would not be traced again
    assert any(x.any() for x in jax.tree.leaves(expected))
    close(ours, expected, atol=1e-4)


@pytest.mark.parametrize("shape", [(64,), (7,), (1, 96), (16, 5), (6, 4), (3, 5, 32, 6), (1, 1, 8)])
def test_mean_squares(shape):
    rng = np.random.default_rng(0)
    xs = rng.normal(size=(11, *shape)).astype(np.float32)
    rank = len(shape)
    for axes in {tuple(range(rank)), tuple(range(max(rank - 2, 0), rank))}:
        expected = np.mean(np.square(xs.astype(np.float64)), axis=tuple(a + 1 for a in axes), keepdims=True)
        np.testing.assert_allclose(blocks.mean_squares([jnp.asarray(x) for x in xs], axes), expected, rtol=1e-6)


def test_factored_axes_that_are_not_averaged_over():
    """Of a convolution with a wide kernel rows and columns have other lengths than the axes Celo2 keeps."""
    rule = rules.make("celo2", newton_schulz=False, hidden=2)
    tx, p, g = rule.bind(rule.init_theta(jax.random.key(0))), *(tree(i, {"c": (5, 4, 3, 2)}) for i in (1, 2))

    def update(g):
        return tx.update(g, tx.init(p), p)[0]

    close(jit(update)(g), jit(lambda g: jax.jvp(update, (g,), (g,))[0])(g))  # derivatives see whole tensors


def test_celo2_in_blocks_of_more_than_two_axes(monkeypatch):
    """Its scales differ along the axes before the last two."""
    rule = rules.make("celo2", newton_schulz=False, hidden=2)
    tx, p, g = rule.bind(rule.init_theta(jax.random.key(0))), *(tree(i, {"c": (5, 4, 6, 2)}) for i in (1, 2))
    expected = tx.update(g, tx.init(p), p)
    set_block(monkeypatch, 12)
    cut = blocks.cut((5, 4, 6, 2))
    assert cut is not None
    assert cut.count > 5
    close(tx.update(g, tx.init(p), p), expected)


def temporary(tx, shapes, dtype):
    """Bytes in the compiled update, gradients and state donated; nothing is run."""
    params = {k: jax.ShapeDtypeStruct(shape, dtype) for k, shape in shapes.items()}
    state = jax.eval_shape(tx.init, params)
    update = jit(lambda *args: tx.update(*args, **LOSS), donate_argnums=(0, 1))
    return update.lower(params, state, params).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    ("name", "dtype", "settings"),
    [
        ("tiny", jnp.bfloat16, {}),
        *(
            pytest.param(name, dtype, settings, marks=pytest.mark.slow)
            for name, settings in (("small_fc", {}), ("celo2", {"newton_schulz": False}), ("velo", SMALL), ("tiny", {}))
            for dtype in (jnp.float32, jnp.bfloat16)
            if (name, dtype) != ("tiny", jnp.bfloat16)
        ),
    ],
)
def test_a_tensor_of_a_hundred_million_needs_little_memory(name, dtype, settings):
    rule = rules.make(name, **settings)
    tx = rule.bind(rule.init_theta(jax.random.key(0)), num_steps=HORIZON)
    assert temporary(tx, {"w": (10_000, 10_000)}, dtype) < 24 << 20


@pytest.mark.slow
def test_a_tree_of_ten_million_needs_little_memory():
    """What is temporary in the compiled update of GPT-2's shapes in 150 leaves."""
    width, layers, vocabulary = 192, 12, 12_288
    sides = {"in": 3 * width, "out": width, "up": 4 * width}
    shapes: dict[str, tuple[int, ...]] = {"tokens": (vocabulary, width), "head": (width, vocabulary)}
    shapes |= {"positions": (1024, width), "head/b": (vocabulary,), "norm": (width,), "norm/b": (width,)}
    for i in range(layers):
        shapes |= {f"{i}/{k}": (width, n) for k, n in sides.items()} | {f"{i}/down": (4 * width, width)}
        shapes |= {f"{i}/{k}/b": (n,) for k, n in sides.items()}
        shapes |= {f"{i}/{k}": (width,) for k in ("down/b", "norm1", "norm1/b", "norm2", "norm2/b")}
    rule, theta = built("small_fc")
    tx = rule.bind(theta, num_steps=HORIZON)
    assert len(shapes) == 150
    assert temporary(tx, shapes, jnp.float32) < 64 << 20
