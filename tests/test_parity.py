"""Our rules against recorded trajectories of other implementations, step by step; and that the comparison can fail."""

from __future__ import annotations

import os

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from conftest import SHARED
from test_blocks import some_slow

from lopt import features as F
from lopt import transform
from lopt.rules import celo2, small_fc, velo


@pytest.mark.parametrize("name", parity.CASES)
def test_recording_is_reproduced(name, request):
    """In full where the reference data is, elsewhere the committed beginning of it."""
    if name in parity.COMMITTED and not (SHARED / "parity").is_dir() and not os.environ.get("LOPT_SHARED_REQUIRED"):
        assert parity.mismatch(name, parity.read(parity.fixture(name))) is None
        return
    full = parity.read(request.getfixturevalue("shared") / f"parity/{name}.npz")
    assert parity.mismatch(name, full) is None
    if name not in parity.COMMITTED:
        return
    reduced = parity.read(parity.fixture(name))
    for group in ("theta", "p0", "grads", "params"):  # the fixture is a copy of its beginning
        theirs, ours = getattr(full, group), getattr(reduced, group)
        assert theirs.keys() == ours.keys()
        assert all(
            np.array_equal(theirs[k] if x.shape == theirs[k].shape else theirs[k][: len(x)], x) for k, x in ours.items()
        )


def test_every_fixture_has_a_case():
    assert {path.name for path in parity.FIXTURES.glob("parity_*.npz")} == {
        parity.fixture(name).name for name in parity.COMMITTED
    }


def keywords(**changed):
    """A function -> the same with these keywords forced."""
    return lambda f: lambda *args, **kw: f(*args, **kw | changed)


def first_step_corrected(inputs):
    """Momenta as bias correction has them at the first step."""
    decays = small_fc.decay_at((0.9, 0.99, 0.999), jnp.asarray(parity.PYLO_DECAY_OFFSETS[0]))
    return lambda acc, *args: inputs(acc._replace(m=acc.m / (1 - decays.reshape(-1, *[1] * (acc.m.ndim - 1)))), *args)


def swapped(i, j):
    """Inputs i and j in each other's place."""

    def change(inputs):
        def wrong(*args):
            xs = inputs(*args)
            xs[i], xs[j] = xs[j], xs[i]
            return xs

        return wrong

    return change


def settings(name, **changed):
    """The table of cases with another setting in one."""
    return lambda cases: cases | {name: cases[name]._replace(settings=cases[name].settings | changed)}


def on_first_axes(f):
    return lambda x: jnp.moveaxis(f(jnp.moveaxis(x, (0, 1), (-2, -1))), (-2, -1), (0, 1))


def binding(name, **changed):
    """The table of cases with another keyword of bind in one."""
    return lambda cases: cases | {name: cases[name]._replace(bind=cases[name].bind | changed)}


def uncapped(update):
    """Loss features that see the largest loss they are told."""
    cap = 2.0  # of the averages of losses that begin at 2.3

    def wrong(state, value, horizon):
        fooled = state._replace(mean=state.mean + jnp.where(value > 5, cap, 0.0))
        return update(fooled, value, horizon)

    return wrong


SMALL, LEARNED, BASE, FULL = "pylo/adafaclo", "pylo/celo2_all_learned", "pylo/celo2_base", "pylo/celo2"
MULO, ELO, VELO = "pylo/mulo", "pylo/elo", "pylo/velo"
MLP, VELO2 = "learned_optimization/mlp_lopt_h32", "learned_optimization/hyper_v2_16_8"
MLP_MOMENTA = (0.1, 0.5, 0.9, 0.99, 0.999, 0.9999)
MUTANTS = {  # what is wrong -> (case, object, attribute, right value -> wrong value)
    "row and column swapped": (SMALL, F, "factored_axes", lambda f: lambda shape: (axes := f(shape)) and axes[::-1]),
    "bias correction": (SMALL, small_fc, "inputs", first_step_corrected),
    "decays not learned": (SMALL, small_fc, "decay_at", lambda f: lambda initial, offset: f(initial, None)),
    "step_mult x 1.01": (SMALL, parity, "CASES", settings(SMALL, step_mult=0.0101)),
    "eps of factored momenta": (SMALL, F, "factored_momenta", keywords(eps=1e-8)),
    "eps of normalisation": (
        SMALL,
        F,
        "rms_scales",
        lambda f: lambda t, xs, rows, eps, axes=None: f(t, xs, rows, 1e-9, axes),
    ),
    "time one step late": (SMALL, F, "time_features", lambda f: lambda count: f(count + 1)),
    "no exponential": (SMALL, parity, "CASES", settings(SMALL, exp_mult=0.0)),
    "no nonlinearity, wide": (SMALL, jax.nn, "relu", lambda f: lambda x: x),
    "no nonlinearity, narrow": (LEARNED, jax.nn, "relu", lambda f: lambda x: x),
    "eps of roots": (LEARNED, F, "rsqrt_all", lambda f: lambda xs, eps: f(xs, 1e-6)),
    "two inputs swapped": (LEARNED, celo2, "inputs", swapped(1, 2)),
    "normalised over all axes": (
        LEARNED,
        F,
        "rms_scales",
        lambda f: lambda t, xs, rows, eps, axes: f(t, xs, rows, eps),
    ),
    "not clipped to 1000": (BASE, jnp, "clip", lambda f: lambda x, lo, hi: x if hi == 1000 else f(x, lo, hi)),
    "clipped tensor by tensor": (FULL, celo2, "clip_scale", lambda f: lambda tensors, n: f(tensors[:1], n)),
    "four Newton-Schulz iterations": (FULL, F, "orthogonalize", lambda f: lambda x: f(x, 4)),
    "wrong matrix of a kernel": (FULL, F, "orthogonalize", on_first_axes),
    "decay of Adam's tensors": (FULL, parity, "CASES", settings(FULL, compat="")),
    "momenta in another order": (MLP, parity, "CASES", settings(MLP, momenta=MLP_MOMENTA[::-1])),
    "no muP multipliers": (MULO, parity, "CASES", binding(MULO, multipliers=None)),
    "not clipped at all": (ELO, parity, "CASES", settings(ELO, clip_norm=None)),
    "decay after the step": (ELO, transform, "as_optax", keywords(decay_after=True)),
    "ties not swapped": (VELO, parity, "CASES", settings(VELO, compat="")),
    "released loss horizon": (VELO, parity, "CASES", settings(VELO, compat="pylo+bugged_loss_features")),
    "LSTM without memory": (VELO, parity, "CASES", settings(VELO, compat="pylo+bugged_next_lstm_state")),
    "losses not capped": (VELO, velo, "update_loss_features", uncapped),
    "this step's statistics": (VELO, velo, "tensor_features", lambda f: lambda tensor, square: f(tensor, 4 * square)),
    "no learned initial state": (
        VELO2,
        velo,
        "mix",
        lambda f: lambda theta, x, shared, anew: f(theta, x, shared, False),
    ),
}


def shorter(name):
    """A recording of fewer tensors, which compile sooner; all of them where clipping or an LSTM couples them."""
    full = parity.read(parity.fixture(name))
    some = {SMALL: {"conv", "vec"}, LEARNED: {"conv", "vec"}, BASE: {"sq"}, MLP: {"a_w", "c_b"}}
    keep = some.get(name, set(full.p0))
    parts = {group: {k: x for k, x in getattr(full, group).items() if k in keep} for group in ("p0", "grads", "params")}
    return full._replace(**parts)


@pytest.mark.parametrize("wrong", MUTANTS)
def test_a_wrong_variant_is_noticed(wrong, monkeypatch):
    name, where, attribute, change = MUTANTS[wrong]
    monkeypatch.setattr(where, attribute, change(getattr(where, attribute)))
    assert parity.mismatch(name, shorter(name), jit=False) is not None


@pytest.mark.parametrize("name", some_slow(sorted({name for name, *_ in MUTANTS.values()}), (SMALL, BASE, VELO)))
def test_without_jit_nothing_differs(name):
    """Else the variants above might be noticed for the wrong reason."""
    assert parity.mismatch(name, shorter(name), jit=False) is None
