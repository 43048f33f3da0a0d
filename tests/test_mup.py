"""Maximal-update parametrisation: roles and multipliers by hand, and the coordinate check, which can fail."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest

from lopt import mup
from lopt.mup import Mup

spec = importlib.util.spec_from_file_location(
    "coordinate_check", Path(__file__).parents[1] / "benchmarks/coordinate_check.py"
)
assert spec is not None
assert spec.loader is not None
check = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check)


# name: (base, target, role, fan_in, fan_out, init, forward, times lr of µLO and Adam, of SGD)
BY_HAND = {
    "scalar": ((), (), "finite", 1, 1, 1, 1, 1, 1),
    "bias": ((64,), (256,), "vector", 1, 4, 1, 1, 1, 4),
    "bias of the output": ((10,), (10,), "finite", 1, 1, 1, 1, 1, 1),
    "first layer": ((784, 64), (784, 256), "input", 1, 4, 1, 1, 1, 4),
    "embedding": ((5000, 64), (5000, 256), "input", 1, 4, 1, 1, 1, 4),
    "hidden": ((64, 64), (256, 256), "hidden", 4, 4, 0.5, 1, 1 / 4, 1),
    "widening": ((64, 128), (256, 1024), "hidden", 4, 8, 0.5, 1, 1 / 4, 2),
    "narrower": ((64, 64), (16, 16), "hidden", 1 / 4, 1 / 4, 2, 1, 4, 1),
    "readout": ((64, 10), (256, 10), "output", 4, 1, 1, 1 / 4, 1, 4),
    "first kernel": ((3, 3, 3, 16), (3, 3, 3, 32), "input", 1, 2, 1, 1, 1, 2),
    "kernel": ((3, 3, 16, 32), (3, 3, 64, 64), "hidden", 4, 2, 0.5, 1, 1 / 4, 1 / 2),
    "depthwise": ((3, 3, 1, 16), (3, 3, 1, 32), "input", 1, 2, 1, 1, 1, 2),
    "layers of a scan": ((6, 64, 64), (6, 256, 256), "hidden", 4, 4, 0.5, 1, 1 / 4, 1),
    "query, more heads": ((64, 4, 16), (128, 8, 16), "hidden", 2, 2, 0.5**0.5, 1, 1 / 2, 1),
    "query, larger heads": ((64, 4, 16), (256, 4, 32), "hidden", 4, 2, 0.5, 1, 1 / 4, 1 / 2),
    "attention's output, more heads": ((4, 16, 64), (8, 16, 128), "hidden", 2, 2, 0.5**0.5, 1, 1 / 2, 1),
    "attention's output, larger heads": ((4, 16, 64), (4, 64, 128), "hidden", 4, 2, 0.5, 1, 1 / 4, 1 / 2),
    "empty": ((0, 3), (0, 3), "finite", 1, 1, 1, 1, 1, 1),
    "at the base": ((64, 64), (64, 64), "finite", 1, 1, 1, 1, 1, 1),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name):
    old, new, *about, adam, sgd = BY_HAND[name]
    base, target = ({"x": jax.ShapeDtypeStruct(s, jnp.float32)} for s in (old, new))
    assert mup.describe(base, target) == {"x": Mup(*about)}
    assert [mup.multipliers(base, target, o)["x"] for o in ("mulo", "adam", "sgd")] == [adam, adam, sgd]


def test_trees_keep_their_structure():
    base = {"net": [jnp.ones((4, 4)), None], "scale": 1.0}
    target = {"net": [np.ones((8, 8)), None], "scale": 2.0}
    assert mup.multipliers(base, target) == {"net": [0.5, None], "scale": 1.0}
    assert mup.multipliers(base["net"][0], target["net"][0]) == 0.5
    assert mup.multipliers({}, {}) == {}


def test_the_recording_s_multipliers():
    """PyLO's tensors of tests/parity.py: torch's (out, in) there, so its last infinite dimension is the fan-in."""
    infinite = {  # infdims_base_and_dim of the recording's settings: [base, dim] an axis, base None where finite
        "mat": [[4, 16], [4, 8]],
        "vec": [[4, 8]],
        "conv": [[None, 3], [None, 3], [None, 4], [4, 8]],
        "sq": [[2, 6], [2, 6]],
    }
    target = {k: np.zeros([dim for _, dim in axes][::-1]) for k, axes in infinite.items()}
    base = {k: np.zeros([dim if b is None else b for b, dim in axes][::-1]) for k, axes in infinite.items()}
    del base["conv"], target["conv"]  # its only infinite axis is the last of torch's, which is no kernel's
    expected = {k: x for k, x in parity.MULTIPLIERS.items() if k in target}
    assert mup.multipliers(base, target) == pytest.approx(expected)
    base, target = np.zeros((3, 3, 4, 4)), np.zeros((3, 3, 4, 8))
    assert mup.multipliers(base, target) == parity.MULTIPLIERS["conv"]


@pytest.mark.parametrize(
    ("base", "target", "message"),
    [
        ((4,), (4, 4), r"'net/w' is \[4\] in base and \[4, 4\] in target; valid: the same rank"),
        ((3, 3, 4, 4), (5, 3, 4, 8), r"'net/w' is .*; valid: only the last two axes differ"),
        ((64, 4, 16), (128, 8, 32), r"'net/w' is .*; valid: at most two axes differ"),
        ((0, 4), (2, 4), r"'net/w' is .*; valid: axes of at least 1"),
        ((2, 4), (0, 4), r"'net/w' is .*; valid: axes of at least 1"),
    ],
)
def test_errors_name_the_tensor(base, target, message):
    base, target = ({"net": {"w": np.zeros(s)}} for s in (base, target))
    with pytest.raises(ValueError, match=message):
        mup.describe(base, target)


def test_trees_that_differ():
    one, two = {"a": np.zeros(2), "b": np.zeros(2)}, {"a": np.zeros(2), "b": None}
    with pytest.raises(ValueError, match="'b' is in base and not in target"):
        mup.describe(one, two)
    with pytest.raises(ValueError, match="'b' is in target and not in base"):
        mup.multipliers(two, one)
    with pytest.raises(ValueError, match="valid: trees of the same containers"):
        mup.describe([np.zeros(2)], (np.zeros(2),))
    with pytest.raises(ValueError, match=r"unknown optimizer 'adamw'. Did you mean 'adam'\? valid: adam, mulo, sgd"):
        mup.multipliers(one, one, "adamw")


# The coordinate check

FLAT, SLOPED = 0.1, 0.4  # slopes of log2 change against log2 width


def slopes(optimizer, parametrisation):
    return np.abs(check.slopes(check.changes(optimizer, parametrisation, seeds=1)))


@pytest.mark.parametrize(
    "optimizer", [pytest.param(one, marks=() if one == "mulo" else pytest.mark.slow) for one in check.OPTIMIZERS]
)
def test_what_training_changes_does_not_depend_on_the_width(optimizer):
    assert max(slopes(optimizer, "muP")) < FLAT
    assert max(slopes(optimizer, "standard")) > SLOPED


@pytest.mark.parametrize("optimizer", check.OPTIMIZERS)
def test_missing_multipliers_are_noticed(optimizer, monkeypatch):
    monkeypatch.setattr(mup, "multipliers", lambda base, target, optimizer: dict.fromkeys(target, 1.0))
    assert max(slopes(optimizer, "muP")) > SLOPED
