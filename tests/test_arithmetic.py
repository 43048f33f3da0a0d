"""Our rules against tests/reference.py, step by step, in settings that no recording has; and that it can fail.

Open loop: at every step ours is given the reference's parameters, and only its state evolves on its own.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import reference as R

from lopt import rules

SHAPES = {"mat": (8, 5), "vec": (8,), "conv": (3, 3, 2, 4), "sq": (6, 6), "s": (), "r5": (2, 1, 3, 2, 3)}
STEPS = 40
# Settings that the reference sees in theta.
IN_THETA = ("hidden", "pace", "learned_decays", "lstm_hidden", "bank", "lr0")
LSTM = 4e-4  # VeLO's statistics are logarithms of differences, its loss features their quotients
NEWTON = 1e-4  # Newton–Schulz multiplies what is small, and its rounding, by 3.4445 at each iteration
REFERENCES = dict(
    small_fc=R.SmallFc,
    mulo=R.Mulo,
    elo=R.Elo,
    mlp=R.Mlp,
    celo2=R.Celo2,
    velo=R.Velo,
    celo=R.Celo,
    tiny=R.Tiny,
    nn_adam=R.NnAdam,
)

# Compiling takes nearly all the time; the rounding is as good.
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


class Case(NamedTuple):
    rule: str
    settings: dict[str, Any]
    bind: dict[str, Any]
    tensors: str = "mat vec conv sq s r5"
    tolerance: float = 2e-5  # of the size of a step: float32's rounding as seen, times five or so
    labels: Mapping[str, str] = {}
    last_layer: float = 1.0  # factor of the network's last weights


PYLO = dict(compat="pylo")
ELO = dict(exp_mult=0.05)
VELO = dict(lstm_hidden=8, bank=4, hidden=2, exp_mult=0.05, step_mult=0.1)
CELO = dict(lstm_hidden=8, hidden=2, exp_mult=0.05)
OLD = "pylo+bugged_loss_features+bugged_next_lstm_state"
DECAYS = dict(momenta=(0.8, 0.95, 0.99), second_moment=0.9, factored=(0.7, 0.9, 0.97))
MULTIPLIERS = {"mat": 0.5, "vec": 1.0, "conv": 0.25, "sq": 1 / 3, "s": 2.0, "r5": 0.125}
LABELS = {"mat": "embedding", "sq": "output"}
ADAM = dict(hidden=3, adam_weight_decay=0.5, adam_lr_mult=3.0, clip_norm=0.5)
RATE = dict(lr=0.01, weight_decay=0.1)
CASES = {
    "small_fc, pylo": Case(
        "small_fc",
        PYLO | dict(exp_mult=0.1, step_mult=0.01, max_grad_norm=0.5),
        dict(lr=0.7, weight_decay=0.1),
        "conv s",
    ),
    "small_fc, other decays": Case("small_fc", DECAYS | dict(step_mult=0.01), {}, "mat"),
    "small_fc, wide": Case(
        "small_fc", dict(hidden=32, exp_mult=0.1, step_mult=0.01), dict(lr=0.7, weight_decay=0.05), "sq r5"
    ),
    "small_fc, fixed decays": Case(
        "small_fc", DECAYS | dict(exp_mult=-0.05, learned_decays=False), dict(lr=0.7), "vec"
    ),
    "mulo, pylo": Case(
        "mulo",
        PYLO | dict(exp_mult=0.02, max_grad_norm=1.0),
        dict(lr=0.7, weight_decay=0.1, multipliers=MULTIPLIERS),
        "mat vec",
    ),
    "mulo": Case("mulo", DECAYS | dict(step_mult=0.02), dict(weight_decay=0.1, multipliers=MULTIPLIERS), "mat s", 6e-5),
    "elo, clipped": Case("elo", ELO | dict(clip_norm=0.3), dict(lr=0.02, weight_decay=0.3), "mat s", 1e-4),
    "elo, pylo": Case("elo", ELO | PYLO | DECAYS, dict(weight_decay=0.3), "vec"),
    "mlp": Case(
        "mlp",
        dict(momenta=(0.2, 0.4, 0.6, 0.8, 0.9, 0.99), exp_mult=0.05, step_mult=0.02),
        dict(lr=0.7, weight_decay=0.01),
        tolerance=1e-4,
    ),
    "celo2, all learned": Case(
        "celo2", dict(hidden=3, adam=False, param_scale=True, exp_mult=0.1, rms_mult=0.2), RATE, "mat s", NEWTON
    ),
    "celo2, raw": Case(
        "celo2",
        DECAYS | dict(hidden=12, adam=False, newton_schulz=False, rsqrt_eps=1e-6, exp_mult=0.1),
        RATE,
        "vec conv",
    ),
    "celo2, small outputs": Case(
        "celo2", dict(hidden=2, param_scale=True, newton_schulz=False), RATE, "mat", 5e-5, last_layer=1e-4
    ),
    "celo2, labels, pylo": Case("celo2", ADAM | PYLO, RATE, "mat vec sq s r5", NEWTON, labels=LABELS),
    "celo2, labels": Case("celo2", ADAM, RATE, "mat vec sq", labels=LABELS),
    "celo2, other Adam": Case("celo2", dict(adam_b1=0.8, adam_b2=0.99), RATE, "vec s"),
    "velo": Case("velo", VELO, dict(lr=0.5, weight_decay=0.01, num_steps=200), "conv s r5", LSTM),
    "velo, pylo": Case("velo", VELO | PYLO, dict(lr=0.5, weight_decay=0.01, num_steps=310), "sq vec", LSTM),
    "velo, loss of 10": Case("velo", VELO | dict(compat="bugged_loss_features"), dict(num_steps=150), "vec s", LSTM),
    "velo, no memory": Case(
        "velo", VELO | DECAYS | dict(compat="bugged_next_lstm_state"), dict(num_steps=150), "mat vec", LSTM
    ),
    "velo, past the horizon": Case("velo", VELO | dict(compat=OLD), dict(num_steps=15, weight_decay=0.01), "sq s"),
    "celo": Case("celo", CELO | dict(step_mult=0.1), dict(weight_decay=0.01, num_steps=100), "mat s"),
    "celo, phase 1": Case(
        "celo", CELO | DECAYS | dict(step_mult=0.02, scheduler=False), dict(num_steps=100), "mat vec"
    ),
    "tiny": Case("tiny", dict(hidden=4), dict(weight_decay=0.1, num_steps=310), "mat r5"),
    "tiny, clipped": Case(
        "tiny",
        dict(hidden=4, step_mult=0.01, min_rms=0.6, clip=1.5, momenta=(0.8, 0.95, 0.99), second_moment=0.9),
        dict(lr=0.7, schedule="constant", num_steps=20),
        "vec s sq",
    ),
    "tiny, paced": Case("tiny", dict(hidden=4, pace=8), dict(num_steps=100), "mat vec s"),
    "tiny, orthogonal": Case("tiny", dict(hidden=4, newton_schulz=True), dict(num_steps=100), "mat vec r5"),
    "tiny, decayed": Case(
        "tiny",
        dict(hidden=4, pace=8, pace_gain=3.0, decay=0.3, fan_in=1.5, min_rms=0.4, longest=150.0),
        dict(num_steps=100, weight_decay=0.1),
        "mat vec r5",
    ),
    "tiny, longer": Case(
        "tiny", dict(hidden=4, pace=8, decay=0.3, longest=30.0), dict(num_steps=100, weight_decay=0.1), "mat vec"
    ),
    "tiny, bounded": Case(
        "tiny",
        dict(hidden=4, pace=8, decay=2.0, step_mult=0.1, fan_in=2.5, min_rms=0.3, largest=1.1, small=0.53, spared=0.8),
        dict(num_steps=100),
        "mat sq vec r5",
    ),
    "nn_adam, LSTM": Case("nn_adam", dict(lstm_hidden=8, lr0=0.01), dict(lr=0.5, weight_decay=0.1)),
}


class Data(NamedTuple):
    grads: dict[str, np.ndarray]  # [T, ...]
    params: dict[str, np.ndarray]  # [T, ...] before each step, where the reference has brought them
    losses: np.ndarray  # [T]


def gradients(shapes, steps):
    """Of magnitudes 1e-3 to 10, and now and then 10,000 times that; with rows and elements of 0."""
    rng = np.random.default_rng(0)
    size = 10.0 ** rng.uniform(-3, 1, steps) * np.where(np.arange(steps) % 17 == 7, 1e4, 1)
    grads = {k: rng.normal(size=(steps, *s)) * size.reshape(-1, *[1] * len(s)) for k, s in shapes.items()}
    if "vec" in grads:
        grads["vec"][:, 3] = 0
    if "mat" in grads:
        grads["mat"][:3, 5] = 0
    return {k: g.astype(np.float32) for k, g in grads.items()}


def losses_of(steps):
    """Noise, which keeps the quotients of VeLO's loss features well conditioned, and spikes that its cap cuts."""
    return (np.random.default_rng(4).uniform(1, 3, steps) + 9 * (np.arange(steps) % 25 == 9)).astype(np.float32)


def theta_of(name):
    """Every meta-parameter drawn anew, so that none is without influence: biases and initial states too."""
    case, rng = CASES[name], np.random.default_rng(1)

    def drawn(x, scale=0.3):
        scale = 1 / np.sqrt(x.shape[-2]) if x.ndim > 1 else scale
        return (scale * rng.normal(size=x.shape)).astype(np.float32)

    # Only the shapes of lopt's: to draw its own would be compiled, which takes longer than all that follows.
    theta = jax.eval_shape(rules.make(case.rule, **case.settings).init_theta, jax.random.key(0))
    decays = getattr(theta, "decays", None)
    theta = jax.tree.map(drawn, theta)
    if decays is not None:  # logarithms over 10
        theta = theta._replace(decays=jax.tree.map(functools.partial(drawn, scale=0.07), decays))
    if case.rule == "nn_adam":  # the same, of lr, 1 - b1, 1 - b2 and eps
        out = jax.tree.map(lambda x: 0.1 * x, theta.clock.out)
        theta = theta._replace(
            log=np.float32(np.log([0.01, 0.1, 0.002, 1e-6]) / 10), clock=theta.clock._replace(out=out)
        )
    if case.rule == "velo":  # their mean over the bank is multiplied by 100
        theta = theta._replace(bank=jax.tree.map(lambda x: x / 12, theta.bank))
    if case.last_layer != 1:
        *first, last = theta.mlp
        theta = theta._replace(mlp=(*first, jax.tree.map(lambda x: case.last_layer * x, last)))
    return theta


def reference(name, **changed) -> R.Rule:
    case = CASES[name]
    theta = jax.tree.map(lambda x: np.asarray(x, np.float64), theta_of(name))
    told = {k: x for k, x in (case.settings | case.bind).items() if k not in IN_THETA}
    labels = dict(labels=case.labels) if case.labels else {}
    return REFERENCES[case.rule](theta=theta, **told | labels | changed)


@functools.cache
def ours_and_reference(name, steps=STEPS) -> tuple[Data, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The data of a case, and the updates [T, ...] that ours and the reference make of it."""
    case, rng = CASES[name], np.random.default_rng(2)
    shapes = {k: SHAPES[k] for k in case.tensors.split()}
    grads, losses, right = gradients(shapes, steps), losses_of(steps), reference(name)
    p = {k: (0.5 * rng.normal(size=s)).astype(np.float32) for k, s in shapes.items()}
    params = {k: np.zeros((steps, *s), np.float32) for k, s in shapes.items()}
    theirs = {k: np.zeros((steps, *s)) for k, s in shapes.items()}
    for t in range(steps):
        u = right.step({k: g[t] for k, g in grads.items()}, p, float(losses[t]))
        for k in shapes:
            params[k][t], theirs[k][t] = p[k], u[k]
        p = {k: np.asarray(p[k] + u[k], np.float32) for k in shapes}
    data = Data(grads, params, losses)
    return data, ours(case, theta_of(name), data), theirs


def ours(case, theta, data: Data) -> dict[str, np.ndarray]:
    """Updates [T, ...]."""
    rule = rules.make(case.rule, **case.settings)
    bind = dict(case.bind)
    if case.labels:
        bind["labels"] = lambda path, leaf: case.labels.get(path)
    if "multipliers" in bind:
        bind["multipliers"] = {k: bind["multipliers"][k] for k in data.params}

    @functools.partial(jax.jit, compiler_options=FAST)
    def run(theta, data):
        tx = rule.bind(theta, **bind)

        def step(state, xs):
            updates, state = tx.update(xs.grads, state, xs.params, value=xs.losses)
            return state, updates

        return jax.lax.scan(step, tx.init(jax.tree.map(lambda x: x[0], data.params)), data)[1]

    return jax.tree.map(np.asarray, run(theta, data))


def error(ours, theirs) -> float:
    """The largest difference of any element of any tensor, over the size of the tensor's step.

    That is its largest element, at this step or on average over all, whichever is more: the only element of a scalar
    may pass through 0.
    """
    worst = 0.0
    for k, u in theirs.items():
        axes = tuple(range(1, u.ndim))
        size = np.max(np.abs(u), axes)
        off = np.max(np.abs(ours[k] - u), axes) / np.maximum(size, size.mean())
        worst = max(worst, np.max(np.where(np.isfinite(off), off, np.inf)))
    return worst


@pytest.mark.parametrize("steps", [STEPS, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CASES)
def test_updates_are_the_references(name, steps):
    _, ours, theirs = ours_and_reference(name, steps)
    assert error(ours, theirs) <= CASES[name].tolerance


def test_every_rule_and_kind_of_tensor_is_compared():
    recorded = {"l2o_dm", "l2o_pa", "rnnprop"}  # in float64, which is as good: tests/test_l2o_parity.py
    assert {case.rule for case in CASES.values()} == set(REFERENCES) == set(rules.REGISTRY) - recorded
    assert {k for case in CASES.values() for k in case.tensors.split()} == set(SHAPES)


def each_alone(clip):
    return lambda grads, max_norm: {k: clip({k: g}, max_norm)[k] for k, g in grads.items()}


def sized_last(direction):
    """Celo2's param_scale where it is not made void by normalisation."""
    return lambda self, k, g, p: direction(self, k, g, p) * np.sqrt(np.mean(p**2))


def first_added(features):
    """VeLO's statistics after this step's gradient, were it 1."""

    def wrong(averages, p):
        later = copy.deepcopy(averages)
        later.add(np.ones_like(p))
        return features(later, p)

    return wrong


def without_memory(lstm):
    return lambda layer, x, hidden, cell: lstm(layer, x, 0 * hidden, 0 * cell)


def without_forget_bias(lstm):
    def wrong(layer, x, hidden, cell):
        w, b = layer
        return lstm((w, b - np.repeat([0, 0, 1, 0], len(b) // 4)), x, hidden, cell)

    return wrong


class Patch(NamedTuple):
    where: Any  # tests/reference.py or a class of it
    attribute: str
    change: Any  # right value -> wrong value


WRONG: dict[str, tuple[str, dict[str, Any] | Patch]] = {  # what is wrong with the reference -> (case, how)
    "small_fc: decay before the step": ("small_fc, pylo", dict(compat="")),
    "small_fc: decay after the step": ("small_fc, wide", dict(compat="pylo")),
    "small_fc: exp_mult ignored": ("small_fc, pylo", dict(exp_mult=0.0)),
    "small_fc: exp_mult of its default": ("small_fc, wide", dict(exp_mult=1e-3)),
    "small_fc: step_mult of its default": ("small_fc, wide", dict(step_mult=1e-3)),
    "small_fc: max_grad_norm ignored": ("small_fc, pylo", dict(max_grad_norm=None)),
    "small_fc: decays not learned": (
        "small_fc, pylo",
        Patch(R, "decays_with", lambda f: lambda offsets, initial: initial),
    ),
    "mulo: multipliers ignored": ("mulo, pylo", dict(multipliers={})),
    "mulo: decay not multiplied": ("mulo, pylo", dict(compat="")),
    "mulo: decay multiplied": ("mulo", dict(compat="pylo")),
    "mulo: step_mult of its default": ("mulo", dict(step_mult=0.01)),
    "elo: clipped tensor by tensor": ("elo, clipped", Patch(R, "clipped_together", each_alone)),
    "elo: not clipped": ("elo, clipped", dict(clip_norm=None)),
    "elo: exp_mult of its default": ("elo, pylo", dict(exp_mult=1e-3)),
    "elo: no decay": ("elo, pylo", dict(weight_decay=0.0)),
    "mlp: exp_mult of its default": ("mlp", dict(exp_mult=1e-3)),
    "mlp: step_mult of its default": ("mlp", dict(step_mult=1e-3)),
    "celo2: no Newton-Schulz": ("celo2, all learned", dict(newton_schulz=False)),
    "celo2: rms_mult ignored": ("celo2, all learned", dict(rms_mult=1.0)),
    "celo2: exp_mult ignored": ("celo2, all learned", dict(exp_mult=0.0)),
    "celo2: Adam for scalars": ("celo2, all learned", dict(adam=True)),
    "celo2: param_scale at the end": ("celo2, all learned", Patch(R.Celo2, "direction", sized_last)),
    "celo2: param_scale ignored": ("celo2, small outputs", dict(param_scale=False)),
    "celo2: rsqrt_eps of its default": ("celo2, raw", dict(rsqrt_eps=1e-8)),
    "celo2: Newton-Schulz regardless": ("celo2, raw", dict(newton_schulz=True)),
    "celo2: clipped tensor by tensor": ("celo2, labels, pylo", Patch(R, "clipped_together", each_alone)),
    "celo2: not clipped": ("celo2, labels", dict(clip_norm=None)),
    "celo2: outputs not under Adam": ("celo2, labels, pylo", dict(labels={"mat": "embedding"})),
    "celo2: Adam's decay not multiplied": ("celo2, labels, pylo", dict(compat="")),
    "celo2: Adam's decay multiplied": ("celo2, labels", dict(compat="pylo")),
    "celo2: Adam's decay ignored": ("celo2, labels", dict(adam_weight_decay=None)),
    "celo2: adam_lr_mult ignored": ("celo2, labels", dict(adam_lr_mult=1.0)),
    "celo2: adam_b1 of its default": ("celo2, other Adam", dict(adam_b1=0.9)),
    "celo2: adam_b2 of its default": ("celo2, other Adam", dict(adam_b2=0.95)),
    "velo: ties swapped, decay after": ("velo, pylo", dict(compat="")),
    "velo: ties not swapped": ("velo, pylo", Patch(R, "factored_axes", lambda f: lambda shape, swap_ties: f(shape))),
    "velo: loss horizon of 10": ("velo", dict(compat="bugged_loss_features")),
    "velo: loss horizon of the run": ("velo, loss of 10", dict(compat="")),
    "velo: LSTM without memory": ("velo", dict(compat="bugged_next_lstm_state")),
    "velo: LSTM with memory": ("velo, no memory", dict(compat="")),
    "velo: three quirks, one left out": ("velo, past the horizon", dict(compat="pylo+bugged_loss_features")),
    "velo: another horizon": ("velo, past the horizon", dict(num_steps=16)),
    "velo: exp_mult of its default": ("velo", dict(exp_mult=1e-3)),
    "velo: losses not capped": ("velo", Patch(R.LossFeatures, "cap", lambda f: lambda *args: np.inf)),
    "velo: statistics of a later step": ("velo", Patch(R, "tensor_features", first_added)),
    "velo: no forget bias": ("velo", Patch(R, "lstm", without_forget_bias)),
    "celo: phase 1 for 2": ("celo", dict(scheduler=False)),
    "celo: phase 2 for 1": ("celo, phase 1", dict(scheduler=True)),
    "celo: sizes themselves": ("celo", Patch(R.Celo, "sizes", lambda f: R.Velo.sizes)),
    "celo: step_mult of its default": ("celo, phase 1", dict(step_mult=1e-3)),
    "tiny: no schedule": ("tiny", dict(schedule="constant")),
    "tiny: no bias correction": ("tiny", Patch(R.Tiny, "corrected", lambda f: lambda self, averages: averages)),
    "tiny: step_mult of its default": ("tiny, clipped", dict(step_mult=0.03)),
    "tiny: min_rms ignored": ("tiny, clipped", dict(min_rms=0.0)),
    "tiny: not paced": ("tiny, paced", Patch(R.Tiny, "pace", lambda f: lambda self, averages, p: np.zeros(1))),
    "tiny: paced by raw averages": (
        "tiny, paced",
        Patch(R.Tiny, "corrected", lambda f: lambda self, averages: averages),
    ),
    "tiny: paced without rank": (
        "tiny, paced",
        Patch(R.Tiny, "pace", lambda f: lambda self, a, p: f(self, a, p[None])),
    ),
    "tiny: pace without gain": ("tiny, decayed", dict(pace_gain=1.0)),
    "tiny: decay as at first": (
        "tiny, decayed",
        Patch(R.Tiny, "pace", lambda f: lambda self, a, p: f(self, a, p) * (1, 0)),
    ),
    "tiny: as long over a longer horizon": ("tiny, longer", dict(longest=0.0)),
    "tiny: longer over a shorter one": (
        "tiny, decayed",
        Patch(R.Tiny, "shortened", lambda f: lambda self: np.sqrt(self.longest / self.num_steps)),
    ),
    "tiny: any size": ("tiny, bounded", dict(largest=0.0)),
    "tiny: no larger than the least": ("tiny, bounded", Patch(R.Tiny, "greatest", lambda f: lambda self, x, first: x)),
    "tiny: none is spared": ("tiny, bounded", dict(spared=0.0)),
    "tiny: whatever it started as": ("tiny, bounded", dict(small=1.0)),
    "tiny: as small as it started": ("tiny, bounded", dict(small=1e-3)),
    "tiny: as small as it is": (
        "tiny, bounded",
        Patch(R.Tiny, "least", lambda f: lambda self, p, first: f(self, p, np.sqrt(np.mean(p**2)))),
    ),
    "tiny: no decay": ("tiny, decayed", dict(decay=0.0)),
    "tiny: min_rms for matrices": ("tiny, decayed", dict(fan_in=0.0)),
    "tiny: fan out": ("tiny, decayed", Patch(R.Tiny, "least", lambda f: lambda self, p, first: f(self, p.T, first))),
    "tiny: no Newton-Schulz": ("tiny, orthogonal", dict(newton_schulz=False)),
    "tiny: Newton-Schulz regardless": ("tiny", dict(newton_schulz=True)),
    "tiny: clip of its default": ("tiny, clipped", dict(clip=5.0)),
    **{
        f"{case}: {key} of its default": (case, {key: None})
        for case in ("small_fc, other decays", "small_fc, fixed decays", "mulo", "elo, pylo", "celo2, raw")
        for key in DECAYS
    },
    **{f"velo: {key} of its default": ("velo, no memory", {key: None}) for key in DECAYS},
    **{f"celo: {key} of its default": ("celo, phase 1", {key: None}) for key in DECAYS},
    "mlp: momenta of its default": ("mlp", dict(momenta=None)),
    "tiny: momenta of its default": ("tiny, clipped", dict(momenta=None)),
    "tiny: second_moment of its default": ("tiny, clipped", dict(second_moment=None)),
    "nn_adam: LSTM without memory": ("nn_adam, LSTM", Patch(R, "lstm", without_memory)),
    "nn_adam: no forget bias": ("nn_adam, LSTM", Patch(R, "lstm", without_forget_bias)),
    "nn_adam: time one step late": (
        "nn_adam, LSTM",
        Patch(R, "time_features", lambda f: lambda t: f(t + 1)),
    ),
}


def replayed(data: Data, wrong: R.Rule) -> dict[str, np.ndarray]:
    """What a reference makes of given gradients and parameters: [T, ...] updates."""
    steps = range(len(data.losses))
    out = [wrong.step(*({k: x[t] for k, x in tree.items()} for tree in data[:2]), float(data.losses[t])) for t in steps]
    return {k: np.stack([u[k] for u in out]) for k in data.params}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_reference_is_noticed(what, monkeypatch):
    name, how = WRONG[what]
    data, ours, theirs = ours_and_reference(name)
    if isinstance(how, Patch):
        monkeypatch.setattr(how.where, how.attribute, how.change(getattr(how.where, how.attribute)))
    wrong = replayed(data, reference(name, **({} if isinstance(how, Patch) else how)))
    assert error(ours, wrong) > CASES[name].tolerance >= error(ours, theirs)
