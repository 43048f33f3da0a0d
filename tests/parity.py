"""Recorded trajectories of other implementations, and how to replay them with ours.

To add one: a row in CASES, a function from its theta to ours, then `python tests/fixtures/make_parity.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lopt import features as F
from lopt import rules
from lopt.rules import celo2, small_fc

FIXTURES = Path(__file__).parent / "fixtures"
Arrays = Mapping[str, np.ndarray]

# Constants of PyLO's code, in none of its checkpoints: momenta, second moment, factored.
PYLO_DECAY_OFFSETS = ([0.15216392, 0.14245212, 0.06812963], [0.01079706], [0.18621896, -0.10864615, -0.06185547])


class Case(NamedTuple):
    rule: str
    settings: dict[str, Any]
    bind: dict[str, Any]
    theta: Callable[[Arrays], Any]  # their meta-parameters to ours
    atol: float = 2e-6  # as the README of the recording says


class Recording(NamedTuple):
    theta: Arrays  # names of the implementation that was recorded
    p0: Arrays  # initial value of each tensor
    grads: Arrays  # [T, ...] fed at step t
    params: Arrays  # [T, ...] after step t
    losses: np.ndarray | None  # [T] told at step t


def pylo_small_fc(theta: Arrays) -> small_fc.Theta:
    layers = [(theta[f"network.{k}.weight"], theta[f"network.{k}.bias"]) for k in ("input", "linear_0", "output")]
    return small_fc.Theta(
        tuple(F.Layer(jnp.asarray(w.T), jnp.asarray(b)) for w, b in layers),
        small_fc.DecayOffsets(*(jnp.asarray(x) for x in PYLO_DECAY_OFFSETS)),
    )


def pylo_celo2(theta: Arrays) -> celo2.Theta:
    first = (np.concatenate([theta[f"w0.{i}"] for i in range(14)]), theta["b0"])
    rest = [(theta[f"dense_w.{i}"], theta[f"dense_b.{i}"]) for i in range(2)]
    return celo2.Theta(tuple(F.Layer(jnp.asarray(w), jnp.asarray(b)) for w, b in (first, *rest)))


def google_small_fc(theta: Arrays) -> small_fc.Theta:
    offsets = [theta[f"{k}_decays"] for k in ("momentum", "rms", "adafactor")]
    return small_fc.Theta(
        tuple(F.Layer(jnp.asarray(theta[f"nn/~/w{i}"]), jnp.asarray(theta[f"nn/~/b{i}"])) for i in range(3)),
        small_fc.DecayOffsets(*(jnp.asarray(x) for x in offsets)),
    )


CASES: dict[str, Case] = {  # file under parity/ -> case
    "learned_optimization/adafac_mlp_h4": Case("small_fc", {}, {}, google_small_fc),
    "learned_optimization/adafac_mlp_h4_scalarpath": Case("small_fc", {}, {}, google_small_fc),
    "learned_optimization/adafac_mlp_h32": Case("small_fc", dict(hidden=32), {}, google_small_fc),
    "pylo/adafaclo": Case("small_fc", dict(hidden=32, step_mult=0.01), {}, pylo_small_fc),
    "pylo/celo2": Case(
        "celo2",
        dict(clip_norm=1.0, adam_lr_mult=20.0, compat="pylo"),
        dict(lr=0.01, weight_decay=0.1),
        pylo_celo2,
        atol=1e-5,  # Newton–Schulz
    ),
    "pylo/celo2_base": Case("celo2", dict(newton_schulz=False), dict(lr=0.01), pylo_celo2),
    "pylo/celo2_all_learned": Case("celo2", dict(newton_schulz=False, adam=False), dict(lr=0.01), pylo_celo2),
}


def fixture(name: str) -> Path:
    """The committed, reduced copy of a recording."""
    return FIXTURES / f"parity_{name.replace('/', '_')}.npz"


def read(path: Path) -> Recording:
    """A recording in any of its layouts: PyLO's, learned_optimization's (one array a step), ours."""
    with np.load(path) as file:
        arrays = dict(file)

    def under(prefix: str) -> dict[str, np.ndarray]:
        return {k.removeprefix(prefix): x for k, x in arrays.items() if k.startswith(prefix)}

    p0, grads, params = under("p0/"), under("grads/"), under("params/")
    if not grads:
        steps = range(len(arrays["losses"]))
        grads = {k: np.stack([arrays[f"g{t}/{k}"] for t in steps]) for k in p0}
        params = {k: np.stack([arrays[f"p{t + 1}/{k}"] for t in steps]) for k in p0}
    return Recording(under("theta/"), p0, grads, params, arrays.get("losses"))


@functools.cache
def _jitted(name: str) -> Callable[..., Any]:
    case = CASES[name]
    rule = rules.make(case.rule, **case.settings)
    # theta is an argument: recordings of equal shapes share one compilation
    return jax.jit(lambda theta, *args, **kw: rule.bind(theta, **case.bind).update(*args, **kw))


def errors(name: str, recording: Recording, *, jit: bool = True) -> Iterator[dict[str, float]]:
    """Replay a case; after each step, the largest absolute difference of each tensor."""
    case = CASES[name]
    theta = case.theta(recording.theta)
    tx = rules.make(case.rule, **case.settings).bind(theta, **case.bind)
    update = functools.partial(_jitted(name), theta) if jit else tx.update
    params = {k: jnp.asarray(x) for k, x in recording.p0.items()}
    state = tx.init(params)
    for t in range(len(next(iter(recording.grads.values())))):
        extra = {} if recording.losses is None else dict(value=jnp.asarray(recording.losses[t]))
        updates, state = update({k: jnp.asarray(g[t]) for k, g in recording.grads.items()}, state, params, **extra)
        params = jax.tree.map(jnp.add, params, updates)
        yield {k: float(np.max(np.abs(params[k] - recording.params[k][t]))) for k in params}


def mismatch(name: str, recording: Recording, *, jit: bool = True) -> str | None:
    """The first step and tensor that differ by more than the case's tolerance, in words, or None."""
    atol = CASES[name].atol
    for t, by_tensor in enumerate(errors(name, recording, jit=jit)):
        for tensor, error in by_tensor.items():
            if not error <= atol:  # NaN is a mismatch
                return f"step {t}, {tensor}: off by {error:.2g}, allowed {atol:.2g}"
    return None
