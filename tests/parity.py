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
from lopt.rules import celo, celo2, mlp, small_fc, velo

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
    committed: bool = True  # a reduced copy is in fixtures; released weights of peers may not be committed


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


def pylo_elo(theta: Arrays) -> small_fc.Theta:
    return pylo_small_fc(theta)._replace(decays=None)


def google_mlp(theta: Arrays) -> mlp.Theta:
    names = [f"mlp/~/linear_{i}" for i in range(3)]
    return mlp.Theta(tuple(F.Layer(jnp.asarray(theta[f"{k}/w"]), jnp.asarray(theta[f"{k}/b"])) for k in names))


def _google_bank(theta: Arrays) -> tuple[F.Layer, ...]:
    w = [np.concatenate([theta[f"ff_mod_stack/~/w0__{i}"] for i in range(14)], axis=1)]
    w += [theta[f"ff_mod_stack/~/w{i}"] for i in (1, 2)]
    return tuple(F.Layer(jnp.asarray(x), jnp.asarray(theta[f"ff_mod_stack/~/b{i}"])) for i, x in enumerate(w))


def _google_mixer(theta: Arrays) -> velo.Mixer:
    names = ("linear", "linear_1", "linear_2", "rnn/linear", "rnn_to_controls", "step_size")
    start = [jnp.asarray(theta[f"lstm_init_state/{k}"][0]) for k in ("hidden", "cell")]
    layers = [F.Layer(*(jnp.asarray(theta[f"rnn_params/{k}/{part}"]) for part in "wb")) for k in names]
    return velo.Mixer(*start, *layers)


def google_velo(theta: Arrays) -> velo.Theta:
    return velo.Theta(_google_mixer(theta), _google_bank(theta))


def google_celo(theta: Arrays) -> celo.Theta:
    return celo.Theta(_google_mixer(theta), _google_bank(theta))


def pylo_velo(theta: Arrays) -> velo.Theta:
    parts = (
        ("input_weights_", "input_bias_"),
        ("hidden_weights_.0", "hidden_bias_.0"),
        ("output_weights_", "output_bias_"),
    )
    bank = [
        F.Layer(jnp.asarray(np.swapaxes(theta[f"mlp.{w}"], 1, 2)), jnp.asarray(theta[f"mlp.{b}"])) for w, b in parts
    ]
    names = ("mix_layer1", "mix_layer2", "final_mix_layer", "lstm.linear", "rnn_to_controls", "step_size")
    start = [jnp.asarray(theta[f"rnn.lstm_init_state.{i}"][0]) for i in range(2)]
    layers = [F.Layer(jnp.asarray(theta[f"rnn.{k}.weight"].T), jnp.asarray(theta[f"rnn.{k}.bias"])) for k in names]
    return velo.Theta(velo.Mixer(*start, *layers), tuple(bank))


MULTIPLIERS = {"mat": 0.5, "sq": 1 / 3, "vec": 1.0, "conv": 1.0}  # lr_per_tensor of the recording's settings

CASES: dict[str, Case] = {  # file under parity/ -> case
    "learned_optimization/adafac_mlp_h4": Case("small_fc", {}, {}, google_small_fc),
    "learned_optimization/adafac_mlp_h4_scalarpath": Case("small_fc", {}, {}, google_small_fc),
    "learned_optimization/adafac_mlp_h32": Case("small_fc", dict(hidden=32), {}, google_small_fc),
    "learned_optimization/mlp_lopt_h32": Case("mlp", {}, {}, google_mlp),
    "learned_optimization/hyper_v2_16_8": Case("velo", dict(lstm_hidden=16, bank=8), dict(num_steps=100), google_velo),
    "learned_optimization/celo_pretrained": Case("celo", {}, dict(num_steps=100), google_celo, committed=False),
    "pylo/mulo": Case("mulo", {}, dict(multipliers=MULTIPLIERS), pylo_small_fc),
    "pylo/elo": Case("elo", dict(clip_norm=1.0), dict(weight_decay=0.1), pylo_elo),
    "pylo/velo": Case("velo", dict(lstm_hidden=64, bank=32, compat="pylo"), dict(num_steps=20), pylo_velo),
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


COMMITTED = [name for name, case in CASES.items() if case.committed]


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
