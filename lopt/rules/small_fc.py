"""small_fc (AdaFac-MLP): a tiny MLP on 39 features of each parameter.

Source: Metz et al. (2022), "Practical tradeoffs between memory, compute, and performance in learned
optimizers", arXiv:2203.11860; its PyTorch form: Janson et al. (2025), PyLO, arXiv:2506.10315.

Differs from the paper: `weight_decay` is decoupled and multiplied by `lr`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lopt import features as F
from lopt.base import LearnedOptimizer, positive, unknown
from lopt.tensor import Tensor
from lopt.transform import Arithmetic, define, sum_of_squares

FEATURES = 28  # per element; 11 time features are added


class DecayOffsets(NamedTuple):
    """Learned shifts of x = log(1 - decay)/10."""

    m: jax.Array | None  # [3]
    v: jax.Array | None  # [1]
    factored: jax.Array | None  # [3]


class Theta(NamedTuple):
    mlp: tuple[F.Layer, ...]
    decays: DecayOffsets | None  # None where the rule's decays are fixed


def decay_at(initial: Sequence[float] | jax.Array, offset: jax.Array | None) -> jax.Array:
    """The decays that learned offsets give: 1 - exp(10 x), x = log(1 - initial)/10 + offset, within [0, 1]."""
    if offset is None:
        return jnp.asarray(initial, jnp.float32)
    x = np.log1p(-np.asarray(initial)) / 10
    return jnp.clip(1 - jnp.exp(10 * (x.astype(np.float32) + offset)), 0.0, 1.0)


def inputs(acc: F.Accumulators, g: jax.Array, p: jax.Array, rows: F.Rows | None) -> list[jax.Array]:
    """The 28 inputs in their published order, before normalisation."""
    inv = jax.lax.rsqrt(acc.v + 1e-6)
    f = F.factors(acc, None if rows is None else rows.mean)
    row, col = acc.row, acc.row if acc.col is None else acc.col
    return [
        *(g, p, *acc.m, acc.v),
        *(m * inv for m in acc.m),
        inv,
        *F.factored_gradient(g, f),
        *(*row, *col, *F.rsqrt_all(row, 1e-8), *F.rsqrt_all(col, 1e-8)),
        *F.factored_momenta(acc, f, eps=1e-6),
    ]


def clip_norm_of(tensor: Tensor, max_norm: float) -> Tensor:
    """The gradient scaled to at most this L2 norm, as PyTorch clips one tensor alone."""
    scale = jnp.minimum(1.0, max_norm / (F.safe_sqrt(sum_of_squares(tensor)) + 1e-6))
    return tensor.changed(lambda g: g * scale)


def arithmetic_of(
    theta: Theta, initial: F.Decays, *, step_mult: float, exp_mult: float, max_grad_norm: float | None = None
) -> Arithmetic:
    """The rule on leaves, for this theta and the decays that its offsets shift."""

    def init_leaf(leaf, p):
        return F.init_accumulators(p, len(initial.m), F.factored_axes(leaf.shape))

    def update(tensor, common, own):
        theta, told = common
        offsets = theta.decays or DecayOffsets(None, None, None)
        v = decay_at((float(initial.v),), offsets.v)[0]
        decays = F.Decays(decay_at(initial.m, offsets.m), v, decay_at(initial.factored, offsets.factored))
        if max_grad_norm is not None:
            tensor = clip_norm_of(tensor, max_grad_norm)

        def features(g, p, acc, rows):
            acc = F.accumulate(acc, g, rows, decays)
            return inputs(acc, g, p, rows), acc

        def direction(g, p, acc, rows):
            xs, acc = features(g, p, acc, rows)
            direction, magnitude = F.mlp(theta.mlp, xs, scales, g.shape, F.time_features(told.count))
            return direction * jnp.exp(magnitude * exp_mult) * step_mult, acc

        rows = F.rows(tensor, F.factored_axes(tensor.leaf.shape), decays)
        scales = F.rms_scales(tensor, lambda *block: features(*block)[0], rows, 1e-5)
        return F.move(tensor, direction, rows)

    return Arithmetic(init_leaf, update, theta)


def small_fc(
    *,
    hidden: int = 4,
    step_mult: float = 1e-3,
    exp_mult: float = 1e-3,
    learned_decays: bool = True,
    momenta: tuple[float, ...] = (0.9, 0.99, 0.999),
    second_moment: float = 0.999,
    factored: tuple[float, ...] = (0.9, 0.99, 0.999),
    max_grad_norm: float | None = None,
    compat: str = "",
) -> LearnedOptimizer:
    """Build the rule.

    Args:
      hidden: width of both hidden layers; 4 in the paper (197 meta-parameters), 32 in µLO and PyLO (2,409).
      step_mult: size of a step of direction 1; .001 in the paper, .01 in PyLO and µLO.
      exp_mult: scale of the magnitude output inside its exponential.
      learned_decays: whether the 7 decays are meta-parameters.
      momenta: decays of the three momenta; where they are learned, where they start.
      second_moment: decay of the second moment.
      factored: decays of the three factored second moments.
      max_grad_norm: each tensor's gradient is scaled to at most this norm, or None (PyLO's option of that name).
      compat: "" or "pylo" (weight decay applied to the already moved parameters).

    Raises:
      ValueError: on an argument out of range.
    """
    positive("small_fc", hidden=hidden, step_mult=step_mult, max_grad_norm=max_grad_norm)
    if compat not in ("", "pylo"):
        raise unknown("small_fc", "compat", compat, ("", "pylo"))

    decays = F.decays("small_fc", momenta, second_moment, factored)

    def init_theta(key: jax.Array) -> Theta:
        layers = F.init_mlp(key, (FEATURES + len(F.TIME_SCALES), hidden, hidden, 2))
        offsets = DecayOffsets(*(jnp.zeros(n, jnp.float32) for n in (3, 1, 3))) if learned_decays else None
        return Theta(layers, offsets)

    def arithmetic(theta: Theta) -> Arithmetic:
        return arithmetic_of(theta, decays, step_mult=step_mult, exp_mult=exp_mult, max_grad_norm=max_grad_norm)

    settings = dict(
        hidden=hidden,
        step_mult=step_mult,
        exp_mult=exp_mult,
        learned_decays=learned_decays,
        momenta=decays.m,
        second_moment=second_moment,
        factored=decays.factored,
        max_grad_norm=max_grad_norm,
        compat=compat,
    )
    return define("small_fc", settings, init_theta, arithmetic, decay_after=compat == "pylo")
