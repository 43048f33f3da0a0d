"""docs/rules.md says what the code does: its tables are parsed and each number recomputed."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import parity
import pytest

import lopt
from lopt import convert, rules

PAGE = (Path(__file__).parents[1] / "docs/rules.md").read_text()


def table(heading: str) -> dict[str, dict[str, str]]:
    """Rows of the table whose header has this cell, by their first cell."""
    lines = [line for line in PAGE.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    start = next(i for i, row in enumerate(cells) if heading in row)
    rows = {}
    for row in cells[start + 2 :]:
        if row[0] == "rule" or len(row) != len(cells[start]):  # another table
            break
        rows[row[0].strip("`")] = dict(zip(cells[start], row, strict=True))
    return rows


RULES, DEFAULTS = table("paper"), table("schedule")


def build(row: str) -> lopt.LearnedOptimizer:
    """The rule of a first cell: `name` or `name(setting=value, …)`."""
    name, _, settings = row.partition("(")
    call = ast.parse(f"dict({settings}" if settings else "dict()", mode="eval").body
    return rules.make(name, **{one.arg: ast.literal_eval(one.value) for one in call.keywords})  # pyrefly: ignore


def size(tree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def initial(rule, shapes):
    tx = lambda theta: rule.bind(theta, num_steps=10)  # noqa: E731
    params = {k: jnp.zeros(s) for k, s in shapes.items()}
    return jax.eval_shape(lambda key: tx(rule.init_theta(key)).init(params), jax.random.key(0))


def test_every_rule_has_a_row():
    assert {row.split("(")[0] for row in RULES} == set(rules.REGISTRY)
    assert set(DEFAULTS) == set(rules.REGISTRY)


@pytest.mark.parametrize("row", RULES)
def test_numbers(row):
    rule, says = build(row), RULES[row]
    theta = jax.eval_shape(rule.init_theta, jax.random.key(0))
    assert says[r"\|theta\|"] == f"{sum(x.size for x in jax.tree.leaves(theta)):,}"
    one, two = initial(rule, {"a": (1024, 1024)}), initial(rule, {"a": (1024, 1024), "b": (8, 8)})
    assert says["state, B/param"] == f"{size(one.leaves) / 2**20:.2f}"
    assert says["+ B/tensor"] == str(size(two.shared) - size(one.shared))
    vector = {"16.01": 20, "16.02": 28}.get(says["state, B/param"], float(says["state, B/param"]))
    first = 4 if rule.name == "tiny" else 0  # bytes a tensor: its size at the start
    assert (size(initial(rule, {"b": (1024,)}).leaves) - first) / 2**10 == (8 if rule.name == "celo2" else vector)
    assert set(says["needs"].split(", ")) - {"–"} == set(rule.needs)
    named = set(re.findall(r"`([\w-]+)`", says["weights"]))
    assert named <= set(convert.REGISTRY) | set(lopt.available())


def test_every_recording_is_named_with_its_tolerance():
    said = {}
    for row, says in RULES.items():
        for name, atol in re.findall(r"`(\w+/\w+)`, ([\de-]+)", says["arithmetic verified by"]):
            assert parity.CASES[name].rule == row.split("(")[0]
            said[name] = float(atol)
    assert said == {name: case.atol for name, case in parity.CASES.items()}


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults(name):
    """What is written as keywords changes nothing, so it is the default."""
    small = {"velo": dict(lstm_hidden=4, bank=2), "celo": dict(lstm_hidden=4)}
    says, rule = DEFAULTS[name], rules.make(name, **small.get(name, {}))
    theta = rule.init_theta(jax.random.key(0))
    params, grads = {"w": jnp.linspace(-1, 1, 12).reshape(4, 3)}, {"w": jnp.linspace(2, -1, 12).reshape(4, 3)}

    def updates(**bind):
        tx = rule.bind(theta, num_steps=10, **bind)
        state = tx.init(params)._replace(count=jnp.int32(5))
        return tx.update(grads, state, params, value=jnp.float32(1.0))[0]["w"]

    said = dict(lr=float(says["lr"]), weight_decay=float(says["weight_decay"]), schedule=says["schedule"])
    usual = updates()
    np.testing.assert_allclose(usual, updates(**said), rtol=1e-6, atol=1e-12)
    other = "cosine" if said["schedule"] == "constant" else "constant"
    for wrong in (dict(lr=2 * said["lr"]), dict(weight_decay=0.1), dict(schedule=other)):
        assert not np.allclose(usual, updates(**said | wrong), rtol=1e-3, atol=1e-9)
    for quirk in re.findall(r'`"(\w+)"`', says["`compat` restores"]):
        rules.make(name, compat=quirk)


@pytest.mark.parametrize("row", [row for row in RULES if row.startswith("nn_adam")])
def test_nn_adam_starts_as_optax_s(row):
    rule = build(row)
    theta = rule.init_theta(jax.random.key(0))
    if theta.clock is not None:
        theta = theta._replace(clock=jax.tree.map(jnp.zeros_like, theta.clock))
    ours, theirs = rule.bind(theta), optax.adam(1e-3)
    params = {"w": jnp.linspace(-1, 1, 12).reshape(4, 3)}
    states = [ours.init(params), theirs.init(params)]
    for t in range(3):
        grads = {"w": jnp.cos(jnp.arange(12.0).reshape(4, 3) + t)}
        a, states[0] = ours.update(grads, states[0], params)
        b, states[1] = theirs.update(grads, states[1], params)
        np.testing.assert_allclose(a["w"], b["w"], rtol=1e-4)


def test_the_last_loss_is_what_multi_steps_passes_on():
    rule = rules.make("celo", lstm_hidden=4)
    tx = rule.bind(rule.init_theta(jax.random.key(0)), num_steps=10)
    params = grads = {"w": jnp.ones((4, 3))}

    def after(losses, tx):
        state = tx.init(params)
        for value in losses:
            _, state = tx.update(grads, state, params, value=jnp.float32(value))
        return state

    many = after([7.0, 2.0], optax.MultiSteps(tx, 2)).inner_opt_state
    np.testing.assert_array_equal(many.shared.loss.mean, after([2.0], tx).shared.loss.mean)
