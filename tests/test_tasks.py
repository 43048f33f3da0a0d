"""The registry, and what is particular to families on labelled rows. The contract is in test_families.py."""

from __future__ import annotations

import ast
import functools
import itertools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tasks
from tasks import SPLITS, data
from tasks.cnn import conv3x3
from tasks.supervised import Examples, cross_entropy

SUPERVISED = ["cnn", "image_mlp", "tabular_mlp"]
KEYS = jax.random.split(jax.random.key(0), 5)
make = functools.cache(tasks.make)


def start(task):
    """phi, params of the task."""
    phi = jax.jit(task.sample)(KEYS[0])
    return phi, jax.jit(task.init)(KEYS[1], phi)


def test_registry_lists_every_factory():
    found = set()
    for path in Path(tasks.__file__).parent.glob("*.py"):
        body = ast.parse(path.read_text()).body
        if any(isinstance(node, ast.FunctionDef) and node.name == path.stem for node in body):
            found.add(path.stem)
    assert found == set(tasks.REGISTRY)
    assert all(module == f"tasks.{family}" for family, module in tasks.REGISTRY.items())


def test_make_names_the_nearest():
    with pytest.raises(ValueError, match=r"unknown family 'imagemlp'\. Did you mean 'image_mlp'\?"):
        tasks.make("imagemlp")
    with pytest.raises(ValueError, match=r"no setting 'hiden'\. Did you mean 'hidden'\?"):
        tasks.make("image_mlp", hiden=(3,))


# Supervised families


def marked(task):
    """The task's data with each row's contents replaced by its number."""
    rows = jnp.arange(len(task.data.y))
    x = task.data.x
    return Examples(jnp.broadcast_to(rows.reshape(-1, *[1] * (x.ndim - 1)).astype(x.dtype), x.shape), rows)


def phis(task):
    """One phi per data set of the task, in the order of its rows."""
    drawn = [jax.jit(task.sample)(key) for key in jax.random.split(KEYS[4], 24)]
    return [phi for _, phi in sorted({int(phi.start[0]): phi for phi in drawn}.items())]


@pytest.mark.parametrize("family", SUPERVISED)
def test_rows_stay_in_their_split(family):
    task = make(family)
    held, used = marked(task), []
    for phi, source in zip(phis(task), task.provenance, strict=True):
        for split in SPLITS:
            batch = functools.partial(task.batch, phi=phi, data=held, split=split)
            drawn = jax.vmap(batch)(jax.random.split(KEYS[2], 60))
            assert jnp.array_equal(drawn.x.reshape(*drawn.y.shape, -1)[..., 0], drawn.y)  # images keep their labels
            rows = set(np.ravel(drawn.y).tolist())
            start, stop = data.load(source.id).splits[split]
            assert len(rows) > 0.6 * (stop - start)  # the whole range is drawn from
            assert max(rows) - min(rows) < stop - start
            used.append(rows | set(np.ravel(task.eval_batches(phi, held, split).y).tolist()))
    for one, other in itertools.combinations(used, 2):
        assert not one & other


@pytest.mark.parametrize("family", SUPERVISED)
@pytest.mark.parametrize("split", SPLITS)
def test_evaluation_sets_are_the_first_rows_of_the_split(family, split):
    task = make(family)
    sets = [data.load(source.id) for source in task.provenance]
    rows = min(750, *(stop - start for start, stop in (one.splits[split] for one in sets)))
    offset = 0
    for phi, one in zip(phis(task), sets, strict=True):
        x, y = jax.jit(task.eval_batches, static_argnums=2)(phi, task.data, split)
        first = offset + one.splits[split][0]
        assert y.shape[1] <= 250
        assert rows - len(y) < y.size <= rows
        assert x.shape[:2] == y.shape
        assert np.array_equal(x.reshape(-1, *x.shape[2:]), task.data.x[first : first + y.size])
        assert np.array_equal(np.ravel(y), one.y[one.splits[split][0] :][: y.size])
        offset += len(one.x)
    twice = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), phi)
    vmapped = jax.vmap(task.eval_batches, (0, None, None))(twice, task.data, split)
    assert np.array_equal(vmapped.y[1], y)


@pytest.mark.parametrize("family", SUPERVISED)
def test_init_scale_multiplies_each_matrix(family):
    task, plain = make(family, log10_init_scale=1.0), make(family)
    assert task.init_loss is None
    (phi, scaled), (still, params) = start(task), start(plain)
    assert jnp.array_equal(still.scale, jnp.ones_like(still.scale))
    assert jnp.all((phi.scale > 0.1) & (phi.scale < 10))
    assert len(set(phi.scale.tolist())) == len(phi.scale)
    for index, scale in enumerate(phi.scale):
        layer = f"layer{index}"
        np.testing.assert_allclose(scaled[layer]["w"], params[layer]["w"] * scale, rtol=1e-5)
        assert not scaled[layer]["b"].any()


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "tanh"])
def test_activations_and_softmax_regression(activation):
    task = tasks.make("tabular_mlp", hidden=(16, 16), activation=activation)
    phi, params = start(task)
    std = params["layer1"]["w"].std() * math.sqrt(16)
    assert std == pytest.approx(math.sqrt(2) if activation == "relu" else 1, rel=0.25)
    batch = task.batch(KEYS[2], phi, task.data, "train")
    assert jnp.isfinite(task.loss(params, KEYS[2], phi, batch))
    assert list(start(tasks.make("tabular_mlp", hidden=()))[1]) == ["layer0"]


def test_cross_entropy_is_minus_the_log_probability():
    logits, y = 30 * jax.random.normal(KEYS[0], (6, 4)), jnp.array([0, 1, 2, 3, 3, 0])
    np.testing.assert_allclose(
        cross_entropy(logits, y), -jax.nn.log_softmax(logits)[jnp.arange(6), y].mean(), rtol=1e-5
    )


@pytest.mark.parametrize(("size", "stride"), [(14, 1), (14, 2), (7, 2), (1, 2)])
def test_convolution_equals_lax(size, stride):
    side, rng = -(-size // stride), np.random.default_rng(0)
    shapes = (5, size, size, 3), (3, 3, 3, 4), (5, side, side, 4)
    x, w, g = (0.3 * rng.standard_normal(shape, np.float32) for shape in shapes)

    def lax(x, w):
        dimensions = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, w, (stride, stride), "SAME", dimension_numbers=dimensions)

    @jax.jit
    def both(x, w, cotangent):
        ours, vjp = jax.vjp(lambda x, w: conv3x3(x, w, stride), x, w)
        theirs, lax_vjp = jax.vjp(lax, x, w)
        return (ours, *vjp(cotangent)), (theirs, *lax_vjp(cotangent))

    for one, other in zip(*both(x, w, g), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("image_mlp", {"data": "mnist"}, "valid, nearest first: mnist5k"),
        ("image_mlp", {"data": ()}, r"image_mlp: data, got \[\]; valid: one or more different names"),
        ("image_mlp", {"data": ("digits", "digits")}, "image_mlp: data, got .*; valid: one or more different names"),
        ("image_mlp", {"size": 14}, "digits size, got 14; valid: 8"),
        ("image_mlp", {"hidden": (0,)}, r"image_mlp: hidden, got \(0,\); valid: positive integers"),
        ("tabular_mlp", {"hidden": (2.0,)}, r"tabular_mlp: hidden, got \(2.0,\)"),
        ("tabular_mlp", {"data": "digits"}, "'digits' holds images; valid: breast_cancer"),
        ("tabular_mlp", {"batch_size": 0}, r"tabular_mlp: batch_size, got \[0\]"),
        ("tabular_mlp", {"activation": "rellu"}, "activation, got 'rellu'; valid: relu, gelu"),
        ("tabular_mlp", {"log10_init_scale": -1.0}, "log10_init_scale, got -1.0; valid: a finite number"),
        ("tabular_mlp", {"log10_init_scale": math.nan}, "log10_init_scale, got nan"),
        ("cnn", {"channels": ()}, r"cnn: channels, got \(\); valid: 1 or more positive integers"),
    ],
)
def test_settings_are_validated(family, settings, message):
    with pytest.raises(ValueError, match=message):
        tasks.make(family, **settings)


def test_data_sets_must_have_equal_classes(monkeypatch):
    load = lambda name, size: data.images(name, size)._replace(classes=len(name))  # noqa: E731
    monkeypatch.setattr("tasks.image_mlp.images", load)
    with pytest.raises(ValueError, match=r"digits 6 classes .* mnist5k 7 classes .*; valid: sets with equal classes"):
        tasks.make("image_mlp")


def test_an_unknown_split_is_refused():
    task = make("tabular_mlp")
    with pytest.raises(ValueError, match="split, got 'valid'; valid: train, validation, test"):
        task.batch(KEYS[0], start(task)[0], task.data, "valid")
