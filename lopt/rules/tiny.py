"""tiny: a Celo2-like direction of fixed size, scaled by the tensor and a cosine over the horizon.

Source: ours, after Moudgil et al. (2026), Celo2, arXiv:2602.19142. The only thing a user says is `num_steps`.

Differs from Celo2: momenta are bias-corrected, features include the time, each is clipped after
normalisation, a linear skip connection starts at the hand-set direction m·rsqrt(v), and a step is
step_mult · exp(log_step) · schedule(t/T) · max(rms(p), min_rms) long in root mean square, so no learning rate is
needed and every tensor, of whatever rank, goes through the network. With `pace` a second network, of a few numbers of
the tensor, adds to log_step: among them how much of m·rsqrt(v) noise has averaged away, which a direction of fixed
length no longer tells.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lopt import features as F
from lopt.base import LearnedOptimizer, positive
from lopt.tensor import Scaled
from lopt.transform import Arithmetic, define

INPUTS = 17  # per element; t/T and log t are added
SIGNALS = slice(6, 9)  # the inputs m·rsqrt(v)
HAND_SET = 6  # that of decay .9
MOMENTUM = 0  # of decay .9
GRADIENTS = (3, 14)  # the inputs g and g·rsqrt(v)
NESTEROV = 0.3  # of the gradient beside the momentum of decay .9, both of length 1
PACE_INPUTS = 7  # of a tensor
SMALLEST = 1e-3  # of what has a logarithm taken


class Theta(NamedTuple):
    mlp: tuple[F.Layer, ...]
    skip: jax.Array  # [19] the direction's linear part; starts at momentum .9 times rsqrt(v), see newton_schulz
    log_step: jax.Array  # () natural logarithm of a factor of step_mult; starts at 0
    pace: tuple[F.Layer, ...] = ()  # adds to log_step, and to the logarithm of `decay`; starts near 0


class Moments(NamedTuple):
    acc: F.Accumulators
    initial: jax.Array  # () root mean square of the tensor when its state was made


def condition(signals: jax.Array, rms: jax.Array, rank: int, told: Any) -> jax.Array:
    """The inputs of `pace`, [PACE_INPUTS].

    Args:
      signals: [3] root mean squares over the tensor of m·rsqrt(v), one a momentum; 1 where gradients agree.
      rms: () of the parameters.
      rank: of the tensor.
      told: count and num_steps.
    """
    t = told.count.astype(jnp.float32)
    low = [jnp.log(jnp.maximum(x, SMALLEST)) / 3 for x in (*signals, rms)]
    return jnp.stack([jnp.minimum(t / told.num_steps, 1.0), jnp.log1p(t) / 7, *low, jnp.float32(rank == 1)])


def paced(layers: tuple[F.Layer, ...], x: jax.Array) -> jax.Array:
    """What `pace` says before its gain, [1 or 2] of [PACE_INPUTS]."""
    hidden, last = layers
    return jnp.tanh(x @ hidden.w + hidden.b) @ last.w + last.b


def inputs(
    acc: F.Accumulators, g: jax.Array, p: jax.Array, rows: F.Rows | None, decays: F.Decays, count: jax.Array
) -> list[jax.Array]:
    """The 17 inputs before normalisation. Averages are bias-corrected here, so acc.row has one decay."""
    t = (count + 1).astype(g.dtype)
    momenta = [m / (1 - d**t) for m, d in zip(acc.m, decays.m, strict=True)]
    correction = 1 / (1 - decays.v**t)
    v = acc.v * correction + 1e-16
    acc = acc._replace(
        row=acc.row[0][None] * correction, col=None if acc.col is None else acc.col[0][None] * correction
    )
    f = F.factors(acc, None if rows is None else rows.mean * correction)
    row = f.row[0]
    col = jnp.ones_like(row) if f.col is None else f.col[0]
    inv = jax.lax.rsqrt(v)
    return [
        *momenta,
        *(g, p, inv),
        *(m * inv for m in momenta),
        *(m * row for m in momenta),
        *(g * col, row, g * inv, jnp.log(v) / 10, col),
    ]


def tiny(
    *,
    hidden: int = 8,
    pace: int = 0,
    step_mult: float = 0.03,
    min_rms: float = 0.02,
    clip: float = 5.0,
    momenta: tuple[float, ...] = (0.9, 0.99, 0.999),
    second_moment: float = 0.98,
    newton_schulz: bool = False,
    pace_gain: float = 1.0,
    decay: float = 0.0,
    fan_in: float = 0.0,
    average: float = 0.0,
    longest: float = 0.0,
    largest: float = 0.0,
    small: float = 1.0,
    spared: float = 0.0,
) -> LearnedOptimizer:
    """Build the rule.

    Args:
      hidden: width of both hidden layers (8: 261 meta-parameters).
      pace: width of the hidden layer of the network that sets the length of a tensor's step (8: 73 more); 0: none.
      step_mult: length of a step in units of the tensor's root mean square.
      min_rms: the least root mean square a tensor is taken to have (biases start at 0).
      clip: normalised features are clipped to ± this.
      momenta: decays of the three momenta.
      second_moment: decay of the second moment, the full and the factored one.
      newton_schulz: orthogonalise the direction of tensors of rank >= 2 over their last two axes. What it starts at
        is then the sum of the momentum of decay .9 and that times rsqrt(v), each of length 1 and with some of the
        gradient added, as in Nesterov's momentum.
      pace_gain: of what `pace` says. With 10 a perturbation of .01 of the network's weights changes a length by some
        ten per cent, as much as matters.
      decay: of tensors of rank >= 2 without the label "no_decay", in units of their step: they shrink by decay ·
        step_mult · exp(log_step) · schedule(t/T) of themselves. `pace` then has a second output, of its logarithm. 0:
        none.
      fan_in: tensors of rank >= 2 are taken to have a root mean square of fan_in/sqrt(n) at least, not min_rms, n the
        product of all axes but the last, of which there are inputs to a unit where matrices are [in, out]. 0: min_rms.
      average: power of the average of the parameters that `lopt.eval_params` reads, see `lopt.averaged`; 0: none.
        `bind(…, average=)` overrides it.
      longest: horizon in updates, above which all lengths are multiplied by sqrt(longest/num_steps). A step whose
        length is a share s of the tensor's size, in directions that are noise, multiplies the size by sqrt(1 + s²);
        over num_steps of them it grows without bound, and units die, unless s² · num_steps stays what it was where
        the rule was meta-trained. 0: never.
      largest: root mean square that a tensor is taken to have at most, in units of the least one, or of its own at the
        start where that is more. What noise has made larger than that grows with the root of the number of steps, no
        longer exponentially. 0: no bound.
      small: a tensor of rank >= 2 that starts smaller than fan_in/sqrt(n), and not at 0, is taken to be as large as it
        starts at least, but no less than this share of fan_in/sqrt(n): whoever made it small (a SIREN's hidden layers
        by a factor of thirty) knew why. 1: never.
      spared: what is not larger than this, in units of the least root mean square, does not decay; what is decays by
        1 - (spared · least / rms)² of what it would. 0: all does. Over a long horizon decay would otherwise hold
        weights at sizes too small to fit anything.

    The default `schedule` is "cosine"; `num_steps` is needed whatever the schedule, as t/num_steps is a feature.

    Raises:
      ValueError: on an argument out of range.
    """
    if not isinstance(pace, int) or pace < 0:
        raise ValueError(f"tiny: pace, got {pace}; valid: an integer >= 0.")
    positive("tiny", hidden=hidden, step_mult=step_mult, min_rms=min_rms, clip=clip, pace_gain=pace_gain)
    at_least_0 = dict(decay=decay, fan_in=fan_in, average=average, longest=longest, spared=spared)
    for key, value in at_least_0.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"tiny: {key}, got {value!r}; valid: a number >= 0.")
    if largest and not 1 <= largest < math.inf:
        raise ValueError(f"tiny: largest, got {largest!r}; valid: a number >= 1, or 0 for no bound.")
    if decay and not pace:
        raise ValueError(f"tiny: decay, got {decay!r} with pace=0; valid: 0, or with a pace, which learns it.")
    if not 0 < small <= 1:
        raise ValueError(f"tiny: small, got {small!r}; valid: a number in (0, 1].")
    decays = F.decays("tiny", momenta, second_moment, (second_moment,) * 3)._replace(factored=(second_moment,))

    def init_theta(key: jax.Array) -> Theta:
        *layers, last = F.init_mlp(key, (INPUTS + 2, hidden, hidden, 1))
        # The hand-set direction alone at first: meta-training starts from an optimizer that works.
        mlp = (*layers, last._replace(w=0.1 * last.w))
        skip = jnp.zeros(INPUTS + 2, jnp.float32).at[HAND_SET].set(1.0)
        if newton_schulz:
            skip = skip.at[MOMENTUM].set(1.0).at[jnp.array(GRADIENTS)].set(NESTEROV)
        log_step = jnp.zeros((), jnp.float32)
        if not pace:
            return Theta(mlp, skip, log_step)
        *layers, last = F.init_mlp(jax.random.fold_in(key, 1), (PACE_INPUTS, pace, 2 if decay else 1))
        return Theta(mlp, skip, log_step, (*layers, last._replace(w=0.1 / pace_gain * last.w)))

    def init_leaf(leaf, p):
        acc = F.init_accumulators(p, len(decays.m), F.factored_axes(leaf.shape))
        acc = acc._replace(row=acc.row[:1], col=None if acc.col is None else acc.col[:1])
        return Moments(acc, F.safe_sqrt(jnp.mean(p * p)))

    def arithmetic(theta: Theta) -> Arithmetic:
        def update(tensor, common, own):
            theta, told = common
            initial = tensor.state.initial
            tensor = tensor.with_state(tensor.state.acc)
            t = told.count.astype(jnp.float32)
            time = jnp.stack([jnp.minimum(t / told.num_steps, 1.0), jnp.log1p(t) / 7])

            def features(g, p, acc, rows):
                acc = F.accumulate(acc, g, rows, decays)
                return inputs(acc, g, p, rows, decays, told.count), acc

            def direction(g, p, acc, rows):
                xs, acc = features(g, p, acc, rows)
                xs = [jnp.clip(x * s, -clip, clip) for x, s in zip(xs, scales, strict=True)]
                (direction,) = F.mlp(theta.mlp, xs, None, g.shape, time)
                direction += F.linear(theta.skip, xs, g.shape, time)
                # What never had a gradient (a frozen part, an unused row) stays, though its parameter is an input too.
                return jnp.where(acc.v > 0, direction, 0.0), acc

            rows = F.rows(tensor, F.factored_axes(tensor.leaf.shape), decays)
            scales = F.rms_scales(tensor, lambda *block: features(*block)[0], rows, 1e-12)
            rms = F.safe_sqrt(tensor.mean_square())
            shape, matrix = tensor.leaf.shape, len(tensor.leaf.shape) >= 2
            said: Any = (0.0, 0.0)
            signals = 1 / scales[SIGNALS].reshape(-1)
            if pace:
                said = pace_gain * paced(theta.pace, condition(signals, rms, len(shape), told))
            share = step_mult * jnp.exp(theta.log_step + said[0])
            if longest:
                share *= jnp.sqrt(jnp.minimum(longest / told.num_steps, 1.0))
            least: Any = min_rms
            if fan_in and matrix:
                least = fan_in / math.sqrt(math.prod(shape[:-1]))
                least *= jnp.where(initial > 0, jnp.clip(initial / least, small, 1.0), 1.0)
            if decay and matrix and "no_decay" not in tensor.leaf.labels:
                # Not of what never had a gradient: a frozen part would vanish though nobody asked for decay.
                seen = signals[-1] > SMALLEST / 10
                excess = 1 - jnp.square(spared * least / jnp.maximum(rms, SMALLEST * least)) if spared else 1.0
                shrink = share * decay * jnp.exp(said[1]) * jnp.maximum(excess, 0.0)
                tensor = tensor.decayed(jnp.where(seen, shrink, 0.0))
            most = largest * jnp.maximum(least, initial) if largest else None
            size = share * jnp.clip(rms, least, most)
            matrices = F.orthogonalize if newton_schulz and matrix else None
            scaled = Scaled(lambda square: size * jax.lax.rsqrt(square + 1e-12), None, matrices)
            moved, acc = F.move(tensor, direction, rows, scaled)
            return moved, Moments(acc, initial)

        return Arithmetic(init_leaf, update, theta)

    settings = dict(
        hidden=hidden,
        pace=pace,
        step_mult=step_mult,
        min_rms=min_rms,
        clip=clip,
        momenta=decays.m,
        second_moment=second_moment,
        newton_schulz=newton_schulz,
        pace_gain=pace_gain,
        decay=decay,
        fan_in=fan_in,
        average=average,
        longest=longest,
        largest=largest,
        small=small,
        spared=spared,
    )
    return define("tiny", settings, init_theta, arithmetic, needs={"num_steps"}, schedule="cosine", average=average)
