"""VeLO: an LSTM per tensor mixes a bank of tiny MLPs and sets each tensor's step size.

Source: Metz et al. (2022), "VeLO: Training versatile learned optimizers by scaling up", arXiv:2211.09760.

Differs from the paper: `weight_decay` is decoupled and multiplied by `lr`. The layer `dead` is computed by nobody; it
is in theta because it is in every released checkpoint.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lopt import features as F
from lopt.base import LearnedOptimizer, positive, unknown
from lopt.rules.celo2 import INPUTS
from lopt.rules.celo2 import inputs as velo_inputs
from lopt.tensor import Leaf, Moved, Tensor
from lopt.transform import Arithmetic, Told, define

COMPAT = ("", "pylo", "bugged_loss_features", "bugged_next_lstm_state")
FRACTIONS = (0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1)
LOSS_DECAYS = 10
CONTEXT = 30  # LSTM inputs a tensor


class Mixer(NamedTuple):
    """The network across tensors: hidden width H, I inputs a tensor, K controls."""

    initial_hidden: jax.Array  # [H]
    initial_cell: jax.Array  # [H]
    dead: F.Layer  # [I, H], without influence
    pooled: F.Layer  # [I, H], rectified and max-pooled over tensors
    mix: F.Layer  # [I, H]
    lstm: F.Layer  # [2H, 4H], gates i g f o
    controls: F.Layer  # [H, K]
    step_size: F.Layer  # [H, 1]


class Theta(NamedTuple):
    mixer: Mixer
    bank: tuple[F.Layer, ...]  # w [K, fan_in, fan_out], b [K, fan_out]


class LossFeatures(NamedTuple):
    """Moving averages of the loss over ten horizons."""

    mean: jax.Array  # [10] EMAs without bias correction
    least: jax.Array  # [10] running minima of the corrected EMAs
    iteration: jax.Array  # () int32


class Shared(NamedTuple):
    hidden: jax.Array  # [tensors, H]
    cell: jax.Array  # [tensors, H]
    loss: LossFeatures


def init_loss_features() -> LossFeatures:
    mean = jnp.zeros(LOSS_DECAYS, jnp.float32)
    return LossFeatures(mean, jnp.full_like(mean, jnp.finfo(jnp.float32).max), jnp.zeros((), jnp.int32))


def init_mixed(tensors: int, hidden: int) -> Shared:
    zeros = jnp.zeros((tensors, hidden), jnp.float32)
    return Shared(zeros, zeros, init_loss_features())


def update_loss_features(state: LossFeatures, value: jax.Array, horizon) -> tuple[LossFeatures, jax.Array]:
    """Add a loss; returns the 9 features in [-1, 1], 0 for the first two iterations."""
    log_horizon = jnp.log10(jnp.asarray(horizon, jnp.float32))
    decay = jnp.exp(-1.0 / 10.0 ** (1.0 + (log_horizon - 1.0) * jnp.linspace(0.0, 1.0, LOSS_DECAYS)))
    i = state.iteration
    correction = 1 - decay ** (i + 1).astype(jnp.float32)
    # The cap divides last step's averages by this step's correction, as the released weights have seen it.
    highest = jnp.where(i == 0, value, jnp.max(state.mean / correction))
    mean = decay * state.mean + (1 - decay) * jnp.minimum(value, 2 * jnp.abs(highest))
    corrected = mean / correction
    least = jnp.minimum(state.least, corrected)
    ratio = (corrected[:-1] - least[:-1]) / jnp.maximum(1e-8, corrected[1:] - least[:-1])
    features = jnp.where(i + 1 <= 2, 0.0, jnp.clip(ratio - 1.0, -1.0, 1.0))
    return LossFeatures(mean, least, i + 1), features


def time_left(told: Told) -> jax.Array:
    """[9] tanh(10 (t/num_steps - tau))."""
    fraction = told.count.astype(jnp.float32) / jnp.asarray(told.num_steps, jnp.float32)
    return jnp.tanh(10 * (fraction - jnp.asarray(FRACTIONS, jnp.float32)))


def tensor_features(tensor: Tensor, mean_square: jax.Array) -> jax.Array:
    """[12] mean_rms, rank one-hot 5, var_m 3, var_rms 3: the previous step's accumulators over the tensor's scale.

    Args:
      tensor: whose state holds them.
      mean_square: () of its parameters.
    """
    scale = F.safe_rsqrt(mean_square)

    def moments(g, p, acc, _):
        return [jnp.mean(m * scale) for m in acc.m], jnp.mean(acc.v * scale)

    mean_m, mean_v = tensor.means(moments)

    def central(g, p, acc, _):
        pairs = list(zip(acc.m, mean_m, strict=True))
        # The released weights were trained with the second moment minus the mean of the FIRST, so it stays.
        var_rms = [jnp.mean((acc.v * scale - mean) ** 2) for _, mean in pairs]
        return [jnp.mean((m * scale - mean) ** 2) for m, mean in pairs] + var_rms

    variances = jnp.stack(tensor.means(central))
    rank = jax.nn.one_hot(min(sum(n > 1 for n in tensor.leaf.shape), 4), 5)
    return jnp.concatenate([_squash(mean_v[None]), rank, _squash(variances)])


def _squash(x: jax.Array) -> jax.Array:
    return jnp.clip(jnp.log(1e-8 + jnp.abs(10 * x)), -5.0, 5.0) / 2


def _apply(layer: F.Layer, x: jax.Array) -> jax.Array:
    return x @ layer.w + layer.b[None, :]


def mix(theta: Mixer, x: jax.Array, shared: Shared, anew: jax.Array) -> tuple[jax.Array, jax.Array, Shared]:
    """Controls [tensors, K], step sizes [tensors] and the next LSTM state, from inputs x [tensors, I].

    Where `anew` the learned initial state is read, so that a state made by `init` does not depend on theta.
    """
    hidden = jnp.where(anew, theta.initial_hidden[None, :], shared.hidden)
    cell = jnp.where(anew, theta.initial_cell[None, :], shared.cell)
    pooled = jnp.max(jax.nn.relu(_apply(theta.pooled, x)), axis=0, keepdims=True)
    y = _apply(theta.mix, x) + pooled
    cell, hidden = F.lstm_cell(_apply(theta.lstm, jnp.concatenate([y, hidden], axis=-1)), cell)
    return (
        _apply(theta.controls, hidden),
        _apply(theta.step_size, hidden)[:, 0],
        shared._replace(hidden=hidden, cell=cell),
    )


def init_mixer(key: jax.Array, inputs: int, hidden: int, controls: int) -> Mixer:
    """Truncated-normal weights of std 1/sqrt(fan_in), zero biases and initial state; the key is consumed."""
    shapes = [(inputs, hidden)] * 3 + [(2 * hidden, 4 * hidden), (hidden, controls), (hidden, 1)]
    layers = [F.init_mlp(k, shape)[0] for k, shape in zip(jax.random.split(key, len(shapes)), shapes, strict=True)]
    zeros = jnp.zeros(hidden, jnp.float32)
    return Mixer(zeros, zeros, *layers)


def init_bank(key: jax.Array, size: int, width: int) -> tuple[F.Layer, ...]:
    """`size` independent per-parameter networks 30-width-width-3; the key is consumed."""
    return jax.vmap(lambda k: F.init_mlp(k, (INPUTS, width, width, 3)))(jax.random.split(key, size))


def per_parameter(
    tensor: Tensor, layers, mean_square, size, axes, decays: F.Decays, exp_mult: float
) -> tuple[Moved, F.Accumulators]:
    """The update of a tensor along size · rms(p) · out · exp(exp_mult · magnitude).

    Args:
      tensor: gradients are clipped to ±1000 here.
      layers: of the tensor's own network.
      mean_square: () of its parameters.
      size: () step size.
      axes: factored ones.
      decays: of the averages.
      exp_mult: see `velo`.
    """
    tensor = tensor.changed(lambda g: jnp.clip(g, -1000.0, 1000.0))
    size = size * jnp.sqrt(mean_square + 1e-9)

    def features(g, p, acc, rows):
        acc = F.accumulate(acc, g, rows, decays)
        return velo_inputs(acc, g, p, rows, 1e-6), acc

    def direction(g, p, acc, rows):
        xs, acc = features(g, p, acc, rows)
        direction, magnitude, _ = F.mlp(layers, xs, scales, g.shape, None)
        return size * direction * jnp.exp(exp_mult * magnitude), acc

    rows = F.rows(tensor, axes, decays)
    scales = F.rms_scales(tensor, lambda *block: features(*block)[0], rows, 1e-5)
    return F.move(tensor, direction, rows)


def described(tensor: Tensor) -> tuple[jax.Array, jax.Array]:
    """[12] features and () the mean square of the parameters, which they are scaled by."""
    mean_square = tensor.mean_square()
    return tensor_features(tensor, mean_square), mean_square


def axes_of(leaf: Leaf, compat: str) -> tuple[int, int] | None:
    """Factored axes; PyLO's VeLO breaks ties between the two largest the other way, but for the first two of four."""
    axes = F.factored_axes(leaf.shape)
    if compat != "pylo" or axes is None or leaf.shape[axes[0]] != leaf.shape[axes[1]]:
        return axes
    return axes if len(leaf.shape) == 4 and set(axes) == {0, 1} else axes[::-1]


def velo(
    *,
    lstm_hidden: int = 512,
    bank: int = 256,
    hidden: int = 4,
    step_mult: float = 1e-3,
    exp_mult: float = 1e-3,
    momenta: tuple[float, ...] = (0.9, 0.99, 0.999),
    second_moment: float = 0.999,
    factored: tuple[float, ...] = (0.9, 0.99, 0.999),
    compat: str = "",
) -> LearnedOptimizer:
    """Build the rule. Defaults are the released size, 2,320,385 meta-parameters.

    Args:
      lstm_hidden: width of the LSTM.
      bank: number of per-parameter networks that are mixed.
      hidden: width of both hidden layers of each.
      step_mult: size of a step of direction 1.
      exp_mult: scale of the magnitude output inside its exponential.
      momenta: decays of the three momenta.
      second_moment: decay of the second moment.
      factored: decays of the three factored second moments.
      compat: quirks, joined by "+": "pylo" (weight decay applied to the moved parameters, ties of factored axes
        swapped), "bugged_loss_features" (a horizon of 10 in the loss averages), "bugged_next_lstm_state" (the LSTM
        starts anew at every step).

    Raises:
      ValueError: on an argument out of range.
    """
    positive("velo", lstm_hidden=lstm_hidden, bank=bank, hidden=hidden, step_mult=step_mult)
    decays = F.decays("velo", momenta, second_moment, factored)
    quirks = compat.split("+")
    for quirk in quirks:
        if quirk not in COMPAT:
            raise unknown("velo", "compat", quirk, COMPAT)
    axes_compat = "pylo" if "pylo" in quirks else ""

    def init_theta(key: jax.Array) -> Theta:
        mixer_key, bank_key = jax.random.split(key)
        return Theta(init_mixer(mixer_key, CONTEXT, lstm_hidden, bank), init_bank(bank_key, bank, hidden))

    def init_leaf(leaf, p):
        return F.init_accumulators(p, len(decays.m), axes_of(leaf, axes_compat))

    def init_shared(leaves):
        return init_mixed(len(leaves), lstm_hidden)

    def arithmetic(theta: Theta) -> Arithmetic:
        def prepare(groups, shared, told):
            horizon = 10 if "bugged_loss_features" in quirks else told.num_steps
            loss, loss_features = update_loss_features(shared.loss, told.value, horizon)
            features, mean_squares = zip(*(group.each(described) for group in groups), strict=True)
            x = jnp.concatenate(features)
            x = x[np.argsort([i for group in groups for i in group.indices])]
            common = jnp.concatenate([time_left(told), loss_features])
            x = jnp.concatenate([jnp.broadcast_to(common, (len(x), len(common))), x], axis=1)
            anew = (told.count == 0) | ("bugged_next_lstm_state" in quirks)
            controls, step_size, mixed = mix(theta.mixer, x, shared, anew)

            def own(group, mean_square):
                members = np.array(group.indices)
                return controls[members], step_mult * step_size[members], mean_square

            return None, [own(*xs) for xs in zip(groups, mean_squares, strict=True)], mixed._replace(loss=loss)

        def update(tensor, common, own):
            networks, (controls, size, mean_square) = common[0], own
            layers = [F.Layer(*(100 * jnp.tensordot(controls, part, 1) / bank for part in layer)) for layer in networks]
            return per_parameter(tensor, layers, mean_square, size, axes_of(tensor.leaf, axes_compat), decays, exp_mult)

        return Arithmetic(init_leaf, update, theta.bank, prepare, init_shared)

    settings = {
        "lstm_hidden": lstm_hidden,
        "bank": bank,
        "hidden": hidden,
        "step_mult": step_mult,
        "exp_mult": exp_mult,
        "momenta": decays.m,
        "second_moment": second_moment,
        "factored": decays.factored,
        "compat": compat,
    }
    return define("velo", settings, init_theta, arithmetic, needs={"value", "num_steps"}, decay_after="pylo" in quirks)
