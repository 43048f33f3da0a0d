"""The coordinate check on tasks with `mup_base`: what Adam changes does not depend on the width. It can fail."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from products import products

import tasks
from lopt import mup, rules
from meta_train.config import Group
from meta_train.inner import Horizon, make_inner
from meta_train.program import _multipliers

FAST: Any = {"xla_backend_optimization_level": 0}
FLAT, SLOPED = 0.15, 0.3  # slopes of log2 change against log2 width
LOGITS = 0.25  # what is flat enough for narrow attention's logits, whose slopes are 0.7 to 1.8 otherwise
STEPS, SEEDS = 10, 6


def mlp(width: int, base: int | None) -> tasks.Task:
    hidden = (width, width)
    return tasks.make("image_mlp", data="digits", hidden=hidden, mup_base=base and (base, base))


def regression(width: int, base: int | None) -> tasks.Task:
    return tasks.make("tabular_regression", hidden=(width, width), mup_base=base and (base, base))


def table(width: int, base: int | None) -> tasks.Task:
    return tasks.make("tabular_mlp", hidden=(width, width), mup_base=base and (base, base))


def vit(width: int, base: int | None) -> tasks.Task:
    return tasks.make("vit", data="digits", width=width, depth=2, patch=4, mup_base=base)


def mixer(width: int, base: int | None) -> tasks.Task:
    sizes = dict(width=width, channel_hidden=2 * width, token_hidden=8)
    return tasks.make("mlp_mixer", data="digits", depth=2, patch=4, mup_base=base, **sizes)


def siren(width: int, base: int | None) -> tasks.Task:
    hidden = (width, width)
    return tasks.make("coordinate_mlp", data="digits", size=8, hidden=hidden, mup_base=base and (base, base))


def transformer(width: int, base: int | None) -> tasks.Task:
    return tasks.make("transformer_lm", width=width, depth=2, length=16, batch_size=8, mup_base=base)


FACTORIES = {one.__name__: one for one in (mlp, regression, table, vit, mixer, siren, transformer)}
LRS = {"siren": 1e-4}  # its sines multiply a step by omega


def flat(name: str) -> float:
    return LOGITS if name in ("transformer", "vit") else FLAT


@functools.cache
def change(name: str, width: int, base: int | None, adapted: bool, queries: bool = False) -> np.ndarray:
    """[products] root mean square change of each product over STEPS of Adam on one batch, geometric mean over SEEDS.

    From the task's own init; with `queries` those begin as they do without `mup_base`.
    """
    make, key = FACTORIES[name], jax.random.key(0)
    task = make(width, base)
    phi = task.sample(key)
    shapes = [jax.eval_shape(make(w, base).init, key, phi) for w in (base or width, width)]
    factors = mup.multipliers(*shapes, "adam") if adapted else jax.tree.map(lambda _: 1.0, shapes[1])
    adam = optax.adam(LRS.get(name, 3e-3))

    def run(key: jax.Array, data: Any, factors: Any) -> list[jax.Array]:
        params = task.init(key, phi)
        if queries:
            drawn = make(width, None).init(key, phi)
            params = jax.tree.map_with_path(lambda path, p, r: r if "query" in str(path) else p, params, drawn)
        batch = task.batch(key, phi, data, "train")

        def step(_: jax.Array, carry: Any) -> Any:
            params, state = carry
            updates, state = adam.update(jax.grad(task.loss)(params, key, phi, batch), state)
            return optax.apply_updates(params, jax.tree.map(jnp.multiply, updates, factors)), state

        trained, _ = jax.lax.fori_loop(0, STEPS, step, (params, adam.init(params)))
        measured = lambda params: products(task.loss, params, key, phi, batch)  # noqa: E731
        pairs = zip(measured(params), measured(trained), strict=True)
        return [jnp.sqrt(jnp.mean((after - before) ** 2)) for before, after in pairs]

    mapped = jax.jit(jax.vmap(run, (0, None, None)), compiler_options=FAST)
    return np.exp(np.mean(np.log(mapped(jax.random.split(key, SEEDS), task.data, factors)), axis=1))


def slopes(
    name: str, widths: tuple[int, ...], *, base: bool = True, adapted: bool = True, queries: bool = False
) -> np.ndarray:
    """[products] sizes of the slopes of the logarithms."""
    first, *rest = widths
    found = [change(name, first, first, True, queries)]
    found += [change(name, w, first if base else None, adapted, queries) for w in rest]
    return np.abs(np.polyfit(np.log2(widths), np.log2(np.stack(found)), 1)[0])


@pytest.mark.parametrize("name", ["mlp", pytest.param("transformer", marks=pytest.mark.slow)])
def test_what_training_changes_does_not_depend_on_the_width(name):
    widths = (128, 512)
    assert max(slopes(name, widths)) < flat(name)
    assert max(slopes(name, widths, adapted=False)) > SLOPED  # without the optimizer's part
    assert max(slopes(name, widths, base=False, adapted=False)) > SLOPED


@pytest.mark.slow
def test_queries_drawn_at_random_would_be_seen():
    """In the logits of the second block of attention."""
    assert max(slopes("transformer", (128, 512), queries=True)) > LOGITS


@pytest.mark.slow
@pytest.mark.parametrize("name", FACTORIES)
def test_to_width_1024(name):
    assert max(slopes(name, (128, 256, 512, 1024))) < flat(name)


@pytest.mark.parametrize("name", FACTORIES)
def test_forward_and_init_are_those_of_lopt_mup(name):
    """At the base width queries alone change; wider, init and forward multipliers are what lopt.mup says of shapes."""
    make, key = FACTORIES[name], jax.random.key(0)
    plain, base, wide = make(32, None), make(32, 32), make(128, 32)
    phi = plain.sample(key)
    batch = plain.batch(key, phi, plain.data, "train")
    params = plain.init(key, phi)
    still = lambda path: "query" in str(path)  # noqa: E731
    params = jax.tree.map_with_path(lambda path, p: 0 * p if still(path) else p, params)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, params, base.init(key, phi)))
    assert any(still(path) for path, _ in jax.tree.leaves_with_path(params)) == (name in ("transformer", "vit"))
    assert plain.loss(params, key, phi, batch) == pytest.approx(float(base.loss(params, key, phi, batch)), rel=1e-6)
    grown = wide.init(key, phi)
    about = mup.describe(params, grown)
    for old, new, one in zip(*map(jax.tree.leaves, (params, grown)), leaves(about), strict=True):
        if not old.any():
            assert not new.any()
        elif old.ndim > 1:
            chance = 4 / old.size**0.5  # of the standard deviation of so few weights
            assert new.std() / old.std() == pytest.approx(one.init, rel=max(0.25, chance))
    assert [one.forward for one in leaves(about) if one.role == "output"] == [0.25]
    # A wide network whose output weights are all equal has 0.25 times the sum in its logits.
    doubled = jax.tree.map(lambda p, one: p if one.role != "output" else 4 * p, grown, about)
    standard = make(128, None)
    if name in ("mlp", "regression", "table"):
        scaled = jax.tree.map(lambda p, one: p if one.role != "output" else p * one.forward, doubled, about)
        assert standard.loss(scaled, key, phi, batch) == pytest.approx(float(wide.loss(doubled, key, phi, batch)))


def leaves(about: Any) -> list[mup.Mup]:
    return jax.tree.leaves(about, is_leaf=lambda x: isinstance(x, mup.Mup))


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        (
            "image_mlp",
            {"mup_base": (8, 8)},
            r"image_mlp: mup_base, got \(8, 8\); valid: as many widths as hidden=\(32,\)",
        ),
        ("image_mlp", {"mup_base": (), "hidden": ()}, r"image_mlp: mup_base, got \(\)"),
        ("vit", {"mup_base": 3}, "vit: mup_base, got 3 with heads=2; valid: multiples of heads"),
        (
            "coordinate_mlp",
            {"mup_base": (8,)},
            r"coordinate_mlp: mup_base, got \(8,\); valid: as many widths as hidden=",
        ),
        ("mlp_mixer", {"mup_base": 0}, "mlp_mixer: mup_base, got \\[0\\]; valid: positive integers"),
        (
            "mlp_mixer",
            {"mup_base": 8, "channel_hidden": 6},
            "mlp_mixer: channel_hidden, got 6 with width=32, mup_base=8; valid: multiples of width / mup_base",
        ),
        ("transformer_lm", {"width": 33}, "transformer_lm: width, got 33 with heads=2; valid: multiples of heads"),
    ],
)
def test_settings_are_validated(family, settings, message):
    with pytest.raises(ValueError, match=message):
        tasks.make(family, **settings)


def params_of(task: tasks.Task) -> Any:
    return jax.eval_shape(lambda key: task.init(key, task.sample(key)), jax.random.key(0))


@pytest.mark.parametrize(
    ("family", "narrow", "wide"),
    [
        ("image_mlp", {"data": "digits", "hidden": (8, 8)}, {"data": "digits", "hidden": (16, 16), "mup_base": (8, 8)}),
        ("mlp_mixer", {"data": "digits", "width": 8, "channel_hidden": 16}, {"data": "digits", "mup_base": 8}),
        ("transformer_lm", {"width": 16, "depth": 1}, {"width": 32, "depth": 1, "mup_base": 16}),
    ],
)
def test_base_of_a_wide_task(family, narrow, wide):
    """Shapes of the narrow network, so that factors are those a user would compute from both."""
    base = tasks.mup_base(family, wide)
    assert base is not None
    expected = params_of(tasks.make(family, **narrow))
    assert jax.tree.map(lambda x: x.shape, params_of(base)) == jax.tree.map(lambda x: x.shape, expected)
    assert tasks.mup_base(family, narrow) is None


def test_meta_training_under_mup_multiplies_hidden_updates():
    settings = {"data": "digits", "hidden": (16, 16)}
    rule = rules.make("mulo", hidden=4)
    theta = rule.init_theta(jax.random.key(0))
    moved = {}
    for base in (None, (8, 8)):
        group = Group("image_mlp", settings | {"mup_base": base})
        task = tasks.make(group.family, **group.settings)
        # The parametrised task itself differs; here the same one is stepped with the factors and without.
        inner = make_inner(
            rule, tasks.make("image_mlp", **settings), horizon=Horizon(9, 9), multipliers=_multipliers(group, task)
        )
        particle = inner.reset(jax.random.key(1))
        after, *_ = jax.jit(inner.step, compiler_options=FAST)(theta, particle, jax.random.key(2))
        moved[base] = [
            np.ravel(b - a) for a, b in zip(*map(jax.tree.leaves, (particle.params, after.params)), strict=True)
        ]
    ratios = [float(np.dot(b, a) / np.dot(a, a)) for a, b in zip(moved[None], moved[8, 8], strict=True)]
    shapes = [x.shape for x in jax.tree.leaves(params_of(tasks.make("image_mlp", **settings)))]
    assert (16, 16) in shapes
    np.testing.assert_allclose(ratios, [0.5 if shape == (16, 16) else 1.0 for shape in shapes], rtol=1e-3)
