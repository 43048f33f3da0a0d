"""ELO: small_fc's arithmetic with fixed decays and an explicit learning rate, meta-trained by imitation.

Source: Janson et al. (2025), PyLO, arXiv:2506.10315 (ELO).

Differs from the original: a gradient that is not finite skips its tensor. With `compat="pylo"` such elements are
replaced (NaN by 0, infinities by the largest number); a gradient whose sum of squares overflows still skips, where the
original's state would be lost.
"""

from __future__ import annotations

import jax.numpy as jnp

from lopt import features as F
from lopt.base import LearnedOptimizer, positive, unknown
from lopt.rules import small_fc as base
from lopt.transform import Arithmetic, clip_scale, define


def elo(
    *,
    hidden: int = 32,
    exp_mult: float = 1e-3,
    momenta: tuple[float, ...] = (0.9, 0.99, 0.999),
    second_moment: float = 0.999,
    factored: tuple[float, ...] = (0.9, 0.99, 0.999),
    clip_norm: float | None = None,
    compat: str = "",
) -> LearnedOptimizer:
    """Build the rule.

    Args:
      hidden: width of both hidden layers (32: 2,402 meta-parameters).
      exp_mult: scale of the magnitude output inside its exponential.
      momenta: decays of the three momenta.
      second_moment: decay of the second moment.
      factored: decays of the three factored second moments.
      clip_norm: gradients are scaled to at most this global norm, or None.
      compat: "" or "pylo" (NaN in a gradient counts as 0).

    `lr` defaults to .01.

    Raises:
      ValueError: on an argument out of range.
    """
    positive("elo", hidden=hidden, clip_norm=clip_norm)
    if compat not in ("", "pylo"):
        raise unknown("elo", "compat", compat, ("", "pylo"))
    decays = F.decays("elo", momenta, second_moment, factored)
    inner = base.small_fc(hidden=hidden, learned_decays=False)

    def arithmetic(theta: base.Theta) -> Arithmetic:
        rule = base.arithmetic_of(theta, decays, step_mult=1.0, exp_mult=exp_mult)

        def prepare(groups, shared, told):
            return (told, clip_scale(groups, clip_norm)), [()] * len(groups), shared

        def update(tensor, common, own):
            theta, (told, scale) = common
            return rule.update(tensor.changed(lambda g: g * scale), (theta, told), own)

        return rule._replace(update=update, prepare=prepare, clean=jnp.nan_to_num if compat == "pylo" else rule.clean)

    settings = {
        "hidden": hidden,
        "exp_mult": exp_mult,
        "momenta": decays.m,
        "second_moment": second_moment,
        "factored": decays.factored,
        "clip_norm": clip_norm,
        "compat": compat,
    }
    return define("elo", settings, inner.init_theta, arithmetic, lr=0.01)
