"""With mesh and specs every device updates its part: the same result, and only small reductions cross the network."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from test_blocks import some_slow
from test_rules_contract import LOSS, RULES, bound, close, jit, tree

from lopt import blocks

SHAPES = {"a": (16, 8), "b": (8,), "c": (2, 3, 8, 8), "s": (), "w": (16, 8)}
SPECS = {"a": jax.P("x", "y"), "b": jax.P("y"), "c": jax.P(None, None, ("x", "y")), "s": None, "w": jax.P("x", "y")}
LARGE = re.compile(r"all-gather|all-to-all|collective-permute|collective-broadcast")


def mesh_of(axis_type=jax.sharding.AxisType.Auto):
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)


def place(mesh, values):
    spec = {k: s or jax.P() for k, s in SPECS.items()}
    return {k: jax.device_put(x, jax.sharding.NamedSharding(mesh, spec[k])) for k, x in values.items()}


def updated(tx, grads, params):
    state = tx.init(params)
    compiled = jit(lambda g, s, p: tx.update(g, s, p, **LOSS)).lower(grads, state, params).compile()
    return compiled(grads, state, params), state, compiled.as_text()


def exchanged(text: str) -> list[int]:
    """Elements of every all-reduce."""
    shapes = re.findall(r"= \(?([^=]*?)\)? all-reduce(?:-start)?\(", text)
    sizes = [re.findall(r"\[([\d,]*)\]", shape) for shape in shapes]
    product = lambda dims: functools.reduce(lambda n, d: n * int(d), filter(None, dims.split(",")), 1)  # noqa: E731
    return [sum(product(dims) for dims in one) for one in sizes]


@pytest.mark.parametrize("name", some_slow(RULES, ("celo2", "small_fc", "tiny")))
def test_parts_give_the_whole_result(name):
    # All ranks, and equal tensors that are stacked, for two rules; a matrix and a vector for the others.
    shapes = SHAPES if name in ("small_fc", "velo") else {k: SHAPES[k] for k in ("b", "w")}
    params, grads, mesh = tree(6, shapes), tree(7, shapes), mesh_of()
    expected, _, _ = updated(bound(name), grads, params)
    tx = bound(name, mesh=mesh, specs={k: SPECS[k] for k in shapes})
    (ours, after), before, text = updated(tx, place(mesh, grads), place(mesh, params))
    close((ours, after), expected, rtol=1e-4)
    assert ours["w"].sharding.spec == SPECS["w"]
    same = jax.tree.map(lambda x, y: x.sharding.is_equivalent_to(y.sharding, x.ndim), after, before)
    assert all(jax.tree.leaves(same))
    if name == "celo2":  # Newton-Schulz needs whole matrices
        assert "all-gather" in text
    else:
        assert not LARGE.search(text)
        assert max(exchanged(text), default=0) < 100  # rows, columns and means, several at once; not tensors of 128


def test_without_mesh_and_specs_parameters_are_gathered(monkeypatch):
    """Or the test above could not fail."""
    monkeypatch.setattr(blocks, "BLOCK", 8)
    blocks.cut.cache_clear()
    shapes = {k: SHAPES[k] for k in ("b", "w")}
    params, grads, mesh = tree(6, shapes), tree(7, shapes), mesh_of()
    expected, _, _ = updated(bound("small_fc"), grads, params)
    ours, _, text = updated(bound("small_fc"), place(mesh, grads), place(mesh, params))
    blocks.cut.cache_clear()
    close(ours, expected, rtol=1e-4)
    assert LARGE.search(text)


def test_local_newton_schulz_would_be_noticed(monkeypatch):
    from lopt.tensor import Tensor

    shapes = {"w": SHAPES["w"]}
    params, grads, mesh = tree(6, shapes), tree(7, shapes), mesh_of()
    expected, _, _ = updated(bound("celo2"), grads, params)
    monkeypatch.setattr(Tensor, "gathered", lambda self, f, x: f(x))
    ours, _, _ = updated(bound("celo2", mesh=mesh, specs={"w": SPECS["w"]}), place(mesh, grads), place(mesh, params))
    with pytest.raises(AssertionError):
        close(ours, expected, rtol=1e-4)


def test_blocks_and_explicit_axes(monkeypatch):
    shapes = {k: SHAPES[k] for k in ("b", "w")}
    params, grads, mesh = tree(6, shapes), tree(7, shapes), mesh_of(jax.sharding.AxisType.Explicit)
    expected, _, _ = updated(bound("tiny"), grads, params)
    monkeypatch.setattr(blocks, "BLOCK", 8)
    blocks.cut.cache_clear()
    with jax.set_mesh(mesh):
        tx = bound("tiny", mesh=mesh, specs={k: SPECS[k] for k in shapes})
        ours, _, text = updated(tx, place(mesh, grads), place(mesh, params))
    blocks.cut.cache_clear()
    close(ours, expected, rtol=1e-4)
    assert not LARGE.search(text)


@pytest.mark.parametrize(
    ("specs", "complaint"),
    [
        (None, "both or neither"),
        ({"b": None}, "a tree like the parameters"),
        (SPECS | {"b": jax.P("z")}, "unknown mesh axis 'z'"),
        (SPECS | {"c": jax.P("x")}, "2 in 4 parts"),
        (SPECS | {"b": jax.P(None, "x")}, "at most 1 axes"),
    ],
)
def test_what_does_not_go_together_is_refused(specs, complaint):
    params = {k: jnp.zeros(shape) for k, shape in SHAPES.items()}
    with pytest.raises(ValueError, match=complaint):
        bound("small_fc", mesh=mesh_of(), specs=specs).init(params)
