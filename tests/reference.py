"""The update rules once more: plain float64 NumPy, derived from their published formulas and not from lopt.

A reference is built from meta-parameters and settings; its `step(grads, params, loss)` returns the updates u of
p ← p + u and moves its state on. Slow, complete and short, so that it can be checked against the papers by reading.

Sources, cited below by their letters:
  [A] Metz et al. (2022), arXiv:2203.11860 (AdaFac-MLP, "small_fc", and the plain MLP)
  [V] Metz et al. (2022), "VeLO", arXiv:2211.09760
  [M] Thérien et al. (2024), "µLO", arXiv:2406.00153
  [C] Moudgil et al. (2025), "Celo", arXiv:2501.12670
  [D] Moudgil et al. (2026), "Celo2", arXiv:2602.19142
  [P] Janson et al. (2025), "PyLO", arXiv:2506.10315, its naive optimizers: the order of inputs, every epsilon, ELO
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

Tree = Mapping[str, np.ndarray]
TAU = np.array([1, 3, 10, 30, 100, 300, 1e3, 3e3, 1e4, 3e4, 1e5])  # [A] time scales
LEFT = np.array([0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1, 1.1])  # [V] fractions of the horizon


# Small things


def rsqrt(x):
    with np.errstate(divide="ignore"):
        return 1 / np.sqrt(x)


def floored_rsqrt(x):
    return 1 / np.sqrt(np.maximum(x, 1e-9))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def mean_square(x, axes=None):
    return np.mean(np.square(x), axes, keepdims=axes is not None)


def normalised(xs, eps, axes=None):
    """Each input divided by its root mean square over the tensor, or over these axes of it."""
    return [x * rsqrt(mean_square(x, axes) + eps) for x in xs]


def network(layers, xs, constants=()):
    """A ReLU network on every element: inputs of the tensor's shape, then constants; the outputs are the last axis."""
    x = np.stack(xs, -1)
    x = np.concatenate([x, np.broadcast_to(constants, (*x.shape[:-1], len(constants)))], -1)
    for i, (w, b) in enumerate(layers):
        x = (np.maximum(x, 0) if i else x) @ w + b
    return x


def time_features(t):
    """[A] tanh(t/τ - 1), t counted from 0."""
    return np.tanh(t / TAU - 1)


def clipped_together(grads: Tree, max_norm: float | None) -> Tree:
    """[P] All gradients times max_norm / max(their joint norm, max_norm)."""
    if max_norm is None:
        return grads
    norm = np.sqrt(sum(np.sum(g**2) for g in grads.values()))
    return {k: g * (max_norm / max(norm, max_norm)) for k, g in grads.items()}


def clipped_alone(g, max_norm: float | None):
    """[P] `max_grad_norm` of AdafacLO: min(1, max / (norm + 1e-6)), tensor by tensor."""
    return g if max_norm is None else g * min(1, max_norm / (np.sqrt(np.sum(g**2)) + 1e-6))


def lstm(layer, x, hidden, cell):
    """[V] Next (hidden, cell): gates on [x, hidden] in the order i g f o, a forget bias of 1."""
    w, b = layer
    i, g, f, o = np.split(np.concatenate([x, hidden], -1) @ w + b, 4, -1)
    cell = sigmoid(f + 1) * cell + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(cell), cell


# Moving averages and what is made of them


class Decays(NamedTuple):
    """[A] as initialised, [V], [P]."""

    m: Sequence[float] = (0.9, 0.99, 0.999)
    v: float = 0.999
    factored: Sequence[float] = (0.9, 0.99, 0.999)


def decays_with(offsets, initial: Decays) -> Decays:
    """[A] Learned decays: x = log(1 - d)/10 is shifted, d = 1 - exp(10 x), within [0, 1]."""
    if offsets is None:
        return initial

    def shifted(d, by):
        return np.clip(1 - np.exp(10 * (np.log(1 - np.array(d)) / 10 + by)), 0, 1)

    m, v, factored = initial
    return Decays(shifted(m, offsets.m), shifted([v], offsets.v)[0], shifted(factored, offsets.factored))


def factored_axes(shape, swap_ties=False) -> tuple[int, int]:
    """(largest, second largest) by a stable sort; [P] its VeLO swaps equal ones, but for the first two of four."""
    order = np.argsort(shape, kind="stable")
    d0, d1 = int(order[-1]), int(order[-2])
    kernel = len(shape) == 4 and {d0, d1} == {0, 1}
    return (d1, d0) if swap_ties and shape[d0] == shape[d1] and not kernel else (d0, d1)


class Averages:
    """[A] Momenta, second moment and Adafactor's row and column of one tensor: EMAs from 0, not bias-corrected."""

    def __init__(self, shape, decays: Decays, swap_ties=False):
        self.decays, self.factored = decays, len(shape) > 1
        self.m, self.v = [np.zeros(shape) for _ in decays.m], np.zeros(shape)
        if self.factored:
            self.d0, self.d1 = factored_axes(shape, swap_ties)
        self.row = [0.0 for _ in decays.factored]  # without axis d0; the full diagonal below rank 2
        self.col = [0.0 for _ in decays.factored]  # without axis d1

    def add(self, g) -> None:
        def ema(old, new, d):
            return d * old + (1 - d) * new

        q = g * g + 1e-30
        row, col = (q.mean(self.d0), q.mean(self.d1)) if self.factored else (q, q)
        self.m = [ema(m, g, d) for m, d in zip(self.m, self.decays.m, strict=True)]
        self.v = ema(self.v, g * g, self.decays.v)
        self.row = [ema(x, row, d) for x, d in zip(self.row, self.decays.factored, strict=True)]
        self.col = [ema(x, col, d) for x, d in zip(self.col, self.decays.factored, strict=True)]

    def spread(self) -> tuple[list, list]:
        """Row and column averages as inputs, of the tensor's shape."""
        if not self.factored:
            return self.row, self.row
        rows = [np.broadcast_to(np.expand_dims(x, self.d0), self.v.shape) for x in self.row]
        return rows, [np.broadcast_to(np.expand_dims(x, self.d1), self.v.shape) for x in self.col]

    def row_factors(self) -> list:
        """rsqrt(row / (mean of row over d1 + 1e-9)), or rsqrt of the diagonal."""
        if not self.factored:
            return [floored_rsqrt(x + 1e-9) for x in self.row]
        d1 = self.d1 - (self.d0 < self.d1)  # where axis d1 is once d0 is gone
        shares = [x / (x.mean(d1, keepdims=True) + 1e-9) for x in self.row]
        return [np.expand_dims(floored_rsqrt(x), self.d0) for x in shares]

    def col_factors(self) -> list:
        """rsqrt(col), or 1."""
        if not self.factored:
            return [1.0 for _ in self.row]
        return [np.expand_dims(floored_rsqrt(x), self.d1) for x in self.col]

    def fac_g(self, g) -> list:
        return [g * r * c for r, c in zip(self.row_factors(), self.col_factors(), strict=True)]

    def fac_mom(self, eps) -> list:
        """Momenta times both factors; below rank 2 times rsqrt(diagonal + eps)."""
        if not self.factored:
            return [m * rsqrt(x + eps) for m, x in zip(self.m, self.row, strict=True)]
        return [m * r * c for m, r, c in zip(self.m, self.row_factors(), self.col_factors(), strict=True)]


def inputs_28(a: Averages, g, p) -> list:
    """[A] in the order of [P]."""
    inv, (row, col) = rsqrt(a.v + 1e-6), a.spread()
    xs = [g, p, *a.m, a.v, *(m * inv for m in a.m), inv, *a.fac_g(g), *row, *col]
    return [*xs, *(rsqrt(x + 1e-8) for x in row), *(rsqrt(x + 1e-8) for x in col), *a.fac_mom(1e-6)]


def inputs_30(a: Averages, g, p, eps) -> list:
    """[V] in the order of [P]; [D] has the same with another eps."""
    inv, (row, col) = rsqrt(a.v + eps), a.spread()
    xs = [g, np.clip(g, -0.1, 0.1), p, *a.m, a.v, *(m * inv for m in a.m), inv, *a.fac_g(g), g * inv, *row, *col]
    return [*xs, *(rsqrt(x + 1e-8) for x in row), *(rsqrt(x + 1e-8) for x in col), *a.fac_mom(0.0)]


# Rules


@dataclass(kw_only=True)
class Rule:
    """What all references share; fields are named as lopt's settings and what its `bind` takes.

    theta: meta-parameters in float64, a layer is (weights [in, out], biases).
    """

    theta: Any
    lr: float = 1.0
    weight_decay: float = 0.0
    num_steps: int = 0
    compat: str = ""
    momenta: Sequence[float] | None = None  # None: the published ones
    second_moment: float | None = None
    factored: Sequence[float] | None = None
    decays: Decays = field(default=Decays(), init=False)
    t: int = field(default=0, init=False)  # steps so far
    state: dict[str, Any] = field(default_factory=dict, init=False)

    def __post_init__(self):
        self.decays = self.given(Decays())

    def given(self, published: Decays) -> Decays:
        own = (self.momenta, self.second_moment, self.factored)
        return Decays(*(x if y is None else y for x, y in zip(published, own, strict=True)))

    def step(self, grads: Tree, params: Tree, loss=None) -> Tree:
        """The updates; scalars act as tensors of shape (1,)."""
        g, p = ({k: np.atleast_1d(np.asarray(x, np.float64)) for k, x in tree.items()} for tree in (grads, params))
        updates = self.updates(g, p, loss)
        self.t += 1
        return {k: u.reshape(np.shape(params[k])) for k, u in updates.items()}

    def updates(self, grads: Tree, params: Tree, loss) -> Tree:
        return {k: self.update(k, grads[k], params[k]) for k in params}

    def update(self, k: str, g, p):
        raise NotImplementedError

    def averages(self, k: str, p) -> Averages:
        swap = isinstance(self, Velo) and "pylo" in self.compat
        return self.state.setdefault(k, Averages(p.shape, self.decays, swap))

    def moved(self, p, direction, factor=1.0):
        """lopt's unified -lr · (factor · direction + weight_decay · p), or [P]: lr · factor, decay of the moved p."""
        if "pylo" not in self.compat:
            return -self.lr * (factor * direction + self.weight_decay * p)
        lr = self.lr * factor
        return (p - lr * direction) * (1 - lr * self.weight_decay) - p


@dataclass(kw_only=True)
class SmallFc(Rule):
    """[A]; [M] with factors of the learning rate."""

    step_mult: float = 1e-3
    exp_mult: float = 1e-3
    max_grad_norm: float | None = None
    multipliers: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self):
        self.decays = decays_with(self.theta.decays, self.given(Decays()))

    def direction(self, k, g, p):
        averages = self.averages(k, p)
        averages.add(g)
        out = network(self.theta.mlp, normalised(inputs_28(averages, g, p), 1e-5), time_features(self.t))
        return out[..., 0] * np.exp(out[..., 1] * self.exp_mult)

    def update(self, k, g, p):
        direction = self.direction(k, clipped_alone(g, self.max_grad_norm), p) * self.step_mult
        return self.moved(p, direction, self.multipliers.get(k, 1.0))


@dataclass(kw_only=True)
class Mulo(SmallFc):
    """[M] small_fc with another step_mult."""

    step_mult: float = 1e-2


@dataclass(kw_only=True)
class Elo(SmallFc):
    """[P] small_fc's direction without step_mult, gradients clipped together, decay with the step."""

    lr: float = 0.01
    clip_norm: float | None = None

    def updates(self, grads, params, loss):
        grads = clipped_together(grads, self.clip_norm)
        return {k: -self.lr * (self.direction(k, grads[k], p) + self.weight_decay * p) for k, p in params.items()}


@dataclass(kw_only=True)
class Mlp(Rule):
    """[A] the plain MLP: g, p, six momenta, the time."""

    step_mult: float = 1e-3
    exp_mult: float = 1e-3

    def update(self, k, g, p):
        old, decays = self.state.get(k, [np.zeros_like(g)] * 6), self.momenta or (0.1, 0.5, 0.9, 0.99, 0.999, 0.9999)
        momenta = self.state[k] = [d * m + (1 - d) * g for d, m in zip(decays, old, strict=True)]
        out = network(self.theta.mlp, normalised([g, p, *momenta], 1e-5), time_features(self.t))
        return self.moved(p, out[..., 0] * np.exp(out[..., 1] * self.exp_mult) * self.step_mult)


def newton_schulz(x):
    """[D] Five iterations towards an orthogonal matrix, on the last two axes, the wider one last."""
    if x.shape[-2] > x.shape[-1]:
        return np.swapaxes(newton_schulz(np.swapaxes(x, -1, -2)), -1, -2)
    x = x / (np.sqrt(np.sum(x**2, (-2, -1), keepdims=True)) + 1e-8)
    for _ in range(5):
        gram = x @ np.swapaxes(x, -1, -2)
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x


@dataclass(kw_only=True)
class Celo2(Rule):
    """[D] in the form of [P]; tensors under AdamW: rank < 2 and what has a label.

    Decay of those under AdamW: lr · wd · p, in [P] lr · adam_lr_mult · wd · p.
    """

    lr: float = 0.01
    exp_mult: float = 0.0
    rsqrt_eps: float = 1e-8
    newton_schulz: bool = True
    rms_mult: float = 1.0
    param_scale: bool = False
    adam: bool = True
    adam_lr_mult: float = 1.0
    adam_weight_decay: float | None = None
    adam_b1: float = 0.9
    adam_b2: float = 0.95
    clip_norm: float | None = None
    labels: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self):
        self.decays = self.given(Decays(v=0.95))

    def updates(self, grads, params, loss):
        grads = {k: np.clip(g, -1000, 1000) for k, g in clipped_together(grads, self.clip_norm).items()}
        return super().updates(grads, params, loss)

    def update(self, k, g, p):
        if self.adam and (g.ndim < 2 or k in self.labels):
            return self.adam_update(k, g, p)
        direction = self.direction(k, g, p)
        return -self.lr * (direction * self.rms_mult + self.weight_decay * p)

    def adam_update(self, k, g, p):
        m, v = self.state.get(k, (0.0, 0.0))
        m, v = self.state[k] = (
            self.adam_b1 * m + (1 - self.adam_b1) * g,
            self.adam_b2 * v + (1 - self.adam_b2) * g**2,
        )
        m_hat, v_hat = m / (1 - self.adam_b1 ** (self.t + 1)), v / (1 - self.adam_b2 ** (self.t + 1))
        lr = self.lr * self.adam_lr_mult
        decay = self.weight_decay if self.adam_weight_decay is None else self.adam_weight_decay
        return -lr * m_hat / (np.sqrt(v_hat) + 1e-8) - (lr if self.compat == "pylo" else self.lr) * decay * p

    def direction(self, k, g, p):
        """Of root mean square 1 over the last two axes; below rank 2 only the first 15 inputs."""
        averages, last_two = self.averages(k, p), tuple(range(max(0, g.ndim - 2), g.ndim))
        averages.add(g)
        xs = inputs_30(averages, g, p, self.rsqrt_eps)[: 30 if g.ndim > 1 else 15]
        (w, b), *rest = self.theta.mlp
        out = network([(w[: len(xs)], b), *rest], normalised(xs, 1e-9, last_two))
        d = self.sized(out[..., 0] * np.exp(out[..., 1] * self.exp_mult), p)
        if self.newton_schulz and g.ndim > 1:
            d = newton_schulz(d)
        return normalised([d], 1e-9, last_two)[0]

    def sized(self, d, p):
        return d * np.sqrt(mean_square(p) + 1e-9) if self.param_scale else d


class LossFeatures:
    """[V] Ten EMAs of the loss, bias-corrected, and their running minima."""

    def __init__(self, horizon: int):
        self.decays = np.exp(-1 / np.logspace(1, np.log10(horizon), 10))
        self.iteration, self.mean, self.least = 0, np.zeros(10), np.full(10, np.inf)

    def cap(self, loss, correction) -> float:
        return 2 * abs(np.max(self.mean / correction) if self.iteration else loss)

    def add(self, loss) -> np.ndarray:
        """The nine features after this loss; zero while iteration <= 2."""
        correction = 1 - self.decays ** (self.iteration + 1)
        loss = min(loss, self.cap(loss, correction))
        self.mean = self.decays * self.mean + (1 - self.decays) * loss
        self.iteration += 1
        corrected = self.mean / correction
        self.least = np.minimum(self.least, corrected)
        above = (corrected[:-1] - self.least[:-1]) / np.maximum(1e-8, corrected[1:] - self.least[:-1])
        return np.clip(above - 1, -1, 1) * (self.iteration > 2)


def fraction_left(t, num_steps):
    """[V] tanh(10 (t/num_steps - τ))."""
    return np.tanh(10 * (t / num_steps - LEFT))


def squashed(x):
    """[V] clip(log(1e-8 + 10 |x|), ±5)/2."""
    return np.clip(np.log(1e-8 + 10 * np.abs(x)), -5, 5) / 2


def tensor_features(averages: Averages, p) -> np.ndarray:
    """[V] mean_rms, rank one-hot 5, var_m 3, var_rms 3, from the averages before this step over rms(p).

    v is scaled as m is, and var_rms subtracts the mean of m: what the released weights were trained with.
    """
    scale = floored_rsqrt(mean_square(p))
    m, v = [x * scale for x in averages.m], averages.v * scale
    one_hot = np.arange(5) == min(sum(n > 1 for n in p.shape), 4)
    var_m = np.array([np.mean((x - x.mean()) ** 2) for x in m])
    var_rms = np.array([np.mean((v - x.mean()) ** 2) for x in m])
    return np.concatenate([[squashed(v.mean())], one_hot, squashed(var_m), squashed(var_rms)])


@dataclass(kw_only=True)
class Velo(Rule):
    """[V]; compat: [P]'s order and ties, and the two quirks of released checkpoints."""

    step_mult: float = 1e-3
    exp_mult: float = 1e-3
    loss: LossFeatures = field(init=False)

    def __post_init__(self):
        super().__post_init__()
        self.loss = LossFeatures(10 if "bugged_loss_features" in self.compat else self.num_steps)

    def context(self, params, loss) -> np.ndarray:
        """[tensors, 30] inputs of the LSTM."""
        common = [*fraction_left(self.t, self.num_steps), *self.loss.add(loss)]
        return np.stack([[*common, *tensor_features(self.averages(k, p), p)] for k, p in params.items()])

    def hidden(self, x) -> np.ndarray:
        """[tensors, H] of the LSTM on linear(x) + the largest relu(linear(x)) of any tensor."""
        mixer = self.theta.mixer
        (w, b), (pooled_w, pooled_b) = mixer.mix, mixer.pooled
        y = x @ w + b + np.maximum(x @ pooled_w + pooled_b, 0).max(0)
        start = [np.tile(s, (len(x), 1)) for s in (mixer.initial_hidden, mixer.initial_cell)]
        old = start if "bugged_next_lstm_state" in self.compat else self.state.get("lstm", start)
        self.state["lstm"] = lstm(mixer.lstm, y, *old)
        return self.state["lstm"][0]

    def networks(self, hidden) -> list:
        """One a tensor: 100 times the mean over the bank of control times network."""
        w, b = self.theta.mixer.controls
        mixed = [
            [100 * np.tensordot(controls, part, 1) / len(part) for part in layer]
            for controls in hidden @ w + b
            for layer in self.theta.bank
        ]
        n = len(self.theta.bank)
        return [mixed[i : i + n] for i in range(0, len(mixed), n)]

    def sizes(self, hidden) -> np.ndarray:
        w, b = self.theta.mixer.step_size
        return (hidden @ w + b)[:, 0]

    def updates(self, grads, params, loss):
        hidden = self.hidden(self.context(params, loss))
        each = zip(params.items(), self.networks(hidden), self.sizes(hidden), strict=True)
        return {k: self.moved(p, size * self.direction(k, grads[k], p, layers)) for (k, p), layers, size in each}

    def direction(self, k, g, p, layers):
        g, averages = np.clip(g, -1000, 1000), self.averages(k, p)
        averages.add(g)
        out = network(layers, normalised(inputs_30(averages, g, p, 1e-6), 1e-5))
        return np.sqrt(mean_square(p) + 1e-9) * out[..., 0] * np.exp(self.exp_mult * out[..., 1]) * self.step_mult


@dataclass(kw_only=True)
class Celo(Velo):
    """[C] VeLO with one network and an LSTM told only of time and loss; its output is the log of ten step sizes.

    Without the scheduler (phase 1) each step size is 1.
    """

    scheduler: bool = True

    def context(self, params, loss):
        common = [*fraction_left(self.t, self.num_steps), *self.loss.add(loss)]
        return np.tile(common, (len(params), 1))

    def networks(self, hidden):
        return [[(w[0], b[0]) for w, b in self.theta.bank]] * len(hidden)

    def sizes(self, hidden):
        return np.exp(super().sizes(hidden)) / 10 if self.scheduler else np.ones(len(hidden))


@dataclass(kw_only=True)
class Tiny(Rule):
    """As the docstrings of lopt/rules/tiny.py say: bias-corrected averages, a skip connection, steps of a given rms."""

    step_mult: float = 0.03
    min_rms: float = 0.02
    clip: float = 5.0
    newton_schulz: bool = False
    pace_gain: float = 1.0
    decay: float = 0.0
    fan_in: float = 0.0
    longest: float = 0.0
    largest: float = 0.0
    small: float = 1.0
    spared: float = 0.0
    schedule: str = "cosine"

    def __post_init__(self):
        self.decays = self.given(Decays(v=0.98))
        self.decays = self.decays._replace(factored=(self.decays.v,))

    def corrected(self, averages: Averages) -> Averages:
        """The same with each average divided by 1 - decay^t, t counted from 1."""
        t, decays = self.t + 1, averages.decays
        fair = Averages(averages.v.shape, decays)
        fair.m = [m / (1 - d**t) for m, d in zip(averages.m, decays.m, strict=True)]
        fair.v = averages.v / (1 - decays.v**t)
        fair.row, fair.col = ([x / (1 - decays.v**t) for x in xs] for xs in (averages.row, averages.col))
        return fair

    def inputs(self, averages: Averages, g, p) -> list:
        a = self.corrected(averages)
        v = a.v + 1e-16
        (row,), (col,) = a.row_factors(), a.col_factors()
        row, col = np.broadcast_to(row, g.shape), np.broadcast_to(col, g.shape)
        xs = [*a.m, g, p, rsqrt(v), *(m * rsqrt(v) for m in a.m), *(m * row for m in a.m)]
        return [*xs, g * col, row, g * rsqrt(v), np.log(v) / 10, col]

    def rate(self) -> float:
        fraction = min(self.t / self.num_steps, 1)
        return self.lr * (0.5 * (1 + np.cos(np.pi * fraction)) if self.schedule == "cosine" else 1.0)

    def pace(self, a: Averages, p) -> np.ndarray:
        """[1 or 2] Added to log_step, and to the logarithm of decay."""
        sizes = [np.sqrt(mean_square(m * rsqrt(a.v + 1e-16)) + 1e-12) for m in a.m] + [np.sqrt(mean_square(p))]
        logs = [np.log(max(x, 1e-3)) / 3 for x in sizes]
        x = np.array([min(self.t / self.num_steps, 1), np.log1p(self.t) / 7, *logs, float(p.ndim == 1)])
        (w, b), (out, shift) = self.theta.pace
        return self.pace_gain * (np.tanh(x @ w + b) @ out + shift)

    def shortened(self) -> float:
        """Factor of all lengths."""
        return np.sqrt(self.longest / self.num_steps) if 0 < self.longest < self.num_steps else 1.0

    def greatest(self, least: float, first: float) -> float:
        """What `largest` counts in."""
        return max(least, first)

    def least(self, p, first: float) -> float:
        """The least root mean square that p is taken to have, `first` being its own at the start."""
        if not self.fan_in or p.ndim < 2:
            return self.min_rms
        expected = self.fan_in / np.sqrt(p.size / p.shape[-1])
        return expected if first == 0 else min(max(first, self.small * expected), expected)

    def update(self, k, g, p):
        averages = self.averages(k, p)
        averages.add(g)
        xs = [np.clip(x, -self.clip, self.clip) for x in normalised(self.inputs(averages, g, p), 1e-12)]
        time = [min(self.t / self.num_steps, 1), np.log1p(self.t) / 7]
        direction = network(self.theta.mlp, xs, time)[..., 0] + network([(self.theta.skip, 0.0)], xs, time)
        direction = np.where(averages.v > 0, direction, 0)
        if self.newton_schulz and g.ndim > 1:
            direction = newton_schulz(direction)
        direction = normalised([direction], 1e-12)[0]
        log_step, log_decay = self.theta.log_step, ()
        if self.theta.pace:
            more, *log_decay = self.pace(self.corrected(averages), p)
            log_step = log_step + more
        share = self.step_mult * np.exp(log_step) * self.shortened()
        rms = np.sqrt(mean_square(p))
        first = self.state.setdefault(f"{k}'s first size", rms)
        least = self.least(p, first)
        size = share * min(max(rms, least), self.largest * self.greatest(least, first) or np.inf)
        shrink = share * self.decay * np.exp(log_decay[0]) if self.decay and p.ndim > 1 else 0
        shrink *= max(1 - (self.spared * least / rms) ** 2, 0)
        return -self.rate() * (size * direction + (shrink + self.weight_decay) * p)


@dataclass(kw_only=True)
class NnAdam(Rule):
    """Adam of lr, 1 - b1, 1 - b2, eps = exp(10 x), x learned and moved by an LSTM that is told the time.

    As the docstrings of lopt/rules/nn_adam.py say; Adam: Kingma and Ba (2015), arXiv:1412.6980, algorithm 1. Bias
    correction divides by 1 - the product of the decays so far.
    """

    kept: np.ndarray = field(default_factory=lambda: np.ones(2), init=False)

    def hyper(self) -> np.ndarray:
        x, clock = self.theta.log, self.theta.clock
        if clock is not None:
            zeros = np.zeros(len(clock.out[0]))
            self.state["lstm"] = lstm(clock.lstm, time_features(self.t), *self.state.get("lstm", (zeros, zeros)))
            x = x + self.state["lstm"][0] @ clock.out[0] + clock.out[1]
        return np.exp(10 * x)

    def updates(self, grads, params, loss):
        rate, *fresh, eps = self.hyper()
        b1, b2 = 1 - np.minimum(fresh, 1)
        self.kept = self.kept * (b1, b2)
        return {k: self.moved(p, rate * self.adam(k, grads[k], b1, b2, eps)) for k, p in params.items()}

    def adam(self, k, g, b1, b2, eps):
        m, v = self.state.get(k, (0.0, 0.0))
        m, v = self.state[k] = (b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2)
        return m / (1 - self.kept[0]) / (np.sqrt(v / (1 - self.kept[1])) + eps)
