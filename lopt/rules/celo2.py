"""Celo2: a tiny MLP gives the direction, normalisation the size; AdamW for what is not a matrix.

Source: Moudgil et al. (2026), arXiv:2602.19142. Newton–Schulz: Jordan et al. (2024), Muon.

Differs from the paper: `weight_decay` is decoupled and multiplied by `lr` for every tensor; with
`compat="pylo"` tensors under AdamW are decayed by lr · adam_lr_mult, as in PyLO.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lopt import features as F
from lopt.base import LearnedOptimizer, positive, unknown
from lopt.tensor import Leaf, Scaled, Tensor
from lopt.transform import Arithmetic, clip_scale, define

INPUTS, UNFACTORED_INPUTS = 30, 15


class Theta(NamedTuple):
    mlp: tuple[F.Layer, ...]


class Adam(NamedTuple):
    """Moments of a tensor that AdamW updates."""

    m: jax.Array  # like the tensor; EMA of the gradient
    v: jax.Array  # like the tensor; EMA of the squared gradient


def inputs(acc: F.Accumulators, g: jax.Array, p: jax.Array, rows: F.Rows | None, eps: float) -> list[jax.Array]:
    """VeLO's 30 inputs before normalisation. Tensors of rank 1 have no factors: full averages stand for both."""
    inv = jax.lax.rsqrt(acc.v + eps)
    f = F.factors(acc, None if rows is None else rows.mean)
    xs = [g, jnp.clip(g, -0.1, 0.1), p, *acc.m, acc.v, *(m * inv for m in acc.m), inv]
    xs += [*F.factored_gradient(g, f), g * inv]
    row, col = acc.row, acc.row if acc.col is None else acc.col
    return [*xs, *row, *col, *F.rsqrt_all(row, 1e-8), *F.rsqrt_all(col, 1e-8), *F.factored_momenta(acc, f, eps=0.0)]


def celo2(
    *,
    hidden: int = 8,
    exp_mult: float = 0.0,
    momenta: tuple[float, ...] = (0.9, 0.99, 0.999),
    second_moment: float = 0.95,
    factored: tuple[float, ...] = (0.9, 0.99, 0.999),
    rsqrt_eps: float = 1e-8,
    newton_schulz: bool = True,
    rms_mult: float = 1.0,
    param_scale: bool = False,
    adam: bool = True,
    adam_lr_mult: float = 1.0,
    adam_weight_decay: float | None = None,
    adam_b1: float = 0.9,
    adam_b2: float = 0.95,
    clip_norm: float | None = None,
    compat: str = "",
) -> LearnedOptimizer:
    """Build the rule.

    Args:
      hidden: width of both hidden layers (8: 347 meta-parameters).
      exp_mult: scale of the magnitude output inside its exponential; 0 leaves the output unused, as published.
      momenta: decays of the three momenta.
      second_moment: decay of the second moment.
      factored: decays of the three factored second moments.
      rsqrt_eps: added to the second moment under its root.
      newton_schulz: orthogonalise the direction of tensors of rank >= 2 over their last two axes.
      rms_mult: root mean square of a direction (over the last two axes).
      param_scale: multiply the direction by the tensor's own root mean square before Newton–Schulz.
      adam: AdamW for tensors of rank < 2 and those labelled "embedding" or "output"; False: the learned
        rule for all.
      adam_lr_mult: AdamW's learning rate as a multiple of `lr`.
      adam_weight_decay: AdamW's weight decay, or None for that of `bind`.
      adam_b1: decay of AdamW's first moment.
      adam_b2: decay of AdamW's second moment.
      clip_norm: gradients are scaled to at most this global norm, or None.
      compat: "" or "pylo" (AdamW's decay is multiplied by adam_lr_mult).

    `lr` defaults to .01.

    Raises:
      ValueError: on an argument out of range.
    """
    positive("celo2", hidden=hidden, rsqrt_eps=rsqrt_eps, rms_mult=rms_mult, clip_norm=clip_norm)
    decays = F.decays("celo2", momenta, second_moment, factored)
    for key, decay in {"adam_b1": adam_b1, "adam_b2": adam_b2}.items():
        if not 0 <= decay < 1:
            raise ValueError(f"celo2: {key}, got {decay}; valid: [0, 1).")
    for key, factor in {"adam_lr_mult": adam_lr_mult, "adam_weight_decay": adam_weight_decay}.items():
        if factor is not None and factor < 0:
            raise ValueError(f"celo2: {key}, got {factor}; valid: >= 0.")
    if compat not in ("", "pylo"):
        raise unknown("celo2", "compat", compat, ("", "pylo"))

    def under_adam(leaf: Leaf) -> bool:
        return adam and (len(leaf.shape) < 2 or bool(leaf.labels & {"embedding", "output"}))

    def init_theta(key: jax.Array) -> Theta:
        return Theta(F.init_mlp(key, (INPUTS, hidden, hidden, 3)))

    def init_leaf(leaf: Leaf, p: jax.Array) -> Adam | F.Accumulators:
        if under_adam(leaf):
            return Adam(jnp.zeros_like(p), jnp.zeros_like(p))
        return F.init_accumulators(p, len(decays.m), F.factored_axes(leaf.shape))

    def adam_step(tensor: Tensor, count: jax.Array):
        def direction(g, p, state, _):
            t = (count + 1).astype(g.dtype)
            state = Adam(adam_b1 * state.m + (1 - adam_b1) * g, adam_b2 * state.v + (1 - adam_b2) * g * g)
            m_hat, v_hat = state.m / (1 - adam_b1**t), state.v / (1 - adam_b2**t)
            return adam_lr_mult * m_hat / (F.safe_sqrt(v_hat) + 1e-8), state

        return tensor.move(direction, tensor.state)

    def arithmetic(theta: Theta) -> Arithmetic:

        def prepare(groups, shared, told):
            return (told, clip_scale(groups, clip_norm)), [()] * len(groups), shared

        def update(tensor, common, own):
            theta, (told, scale) = common
            tensor = tensor.changed(lambda g: jnp.clip(g * scale, -1000.0, 1000.0))
            if under_adam(tensor.leaf):
                return adam_step(tensor, told.count)
            rank = len(tensor.leaf.shape)
            last_two = tuple(range(max(0, rank - 2), rank))

            def features(g, p, acc, rows):
                acc = F.accumulate(acc, g, rows, decays)
                return inputs(acc, g, p, rows, rsqrt_eps)[: INPUTS if rank >= 2 else UNFACTORED_INPUTS], acc

            def direction(g, p, acc, extra):
                rows, scales = extra  # the scales too are cut: they differ along the axes before the last two
                xs, acc = features(g, p, acc, rows)
                direction, magnitude, _ = F.mlp(theta.mlp, xs, scales, g.shape, None)
                return direction * jnp.exp(magnitude * exp_mult) * size, acc

            rows = F.rows(tensor, F.factored_axes(tensor.leaf.shape), decays)
            scales = F.rms_scales(tensor, lambda *block: features(*block)[0], rows, 1e-9, last_two)
            size = jnp.sqrt(tensor.mean_square() + 1e-9) if param_scale else 1.0
            matrices = F.orthogonalize if newton_schulz and rank >= 2 else None
            scaled = Scaled(lambda square: jax.lax.rsqrt(square + 1e-9) * rms_mult, last_two, matrices)
            return F.move(tensor, direction, rows, scaled, (rows, scales))

        def decay(leaf: Leaf, weight_decay):
            if not under_adam(leaf):
                return weight_decay
            own = weight_decay if adam_weight_decay is None else adam_weight_decay
            return own * adam_lr_mult if compat == "pylo" else own

        return Arithmetic(init_leaf, update, theta, prepare, decay=decay)

    settings = dict(
        hidden=hidden,
        exp_mult=exp_mult,
        momenta=decays.m,
        second_moment=second_moment,
        factored=decays.factored,
        rsqrt_eps=rsqrt_eps,
        newton_schulz=newton_schulz,
        rms_mult=rms_mult,
        param_scale=param_scale,
        adam=adam,
        adam_lr_mult=adam_lr_mult,
        adam_weight_decay=adam_weight_decay,
        adam_b1=adam_b1,
        adam_b2=adam_b2,
        clip_norm=clip_norm,
        compat=compat,
    )
    return define("celo2", settings, init_theta, arithmetic, lr=0.01)
