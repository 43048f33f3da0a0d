"""ELO: small_fc's arithmetic with fixed decays and an explicit learning rate, meta-trained by imitation.

Source: Janson et al. (2025), PyLO, arXiv:2506.10315 (ELO).

Differs from the original: a gradient that is not finite skips its tensor; with `compat="pylo"` such elements are
replaced instead (NaN by 0, infinities by the largest number), unless `nonfinite` is given.
"""

from __future__ import annotations

import jax.numpy as jnp

from lopt.base import LearnedOptimizer, positive, unknown
from lopt.rules import small_fc as base
from lopt.transform import Arithmetic, clip_global_norm, define


def elo(
    *, hidden: int = 32, exp_mult: float = 1e-3, clip_norm: float | None = None, compat: str = ""
) -> LearnedOptimizer:
    """Build the rule.

    Args:
      hidden: width of both hidden layers (32: 2,402 meta-parameters).
      exp_mult: scale of the magnitude output inside its exponential.
      clip_norm: gradients are scaled to at most this global norm, or None.
      compat: "" or "pylo" (elements of a gradient that are not finite are replaced).

    `lr` defaults to .01.

    Raises:
      ValueError: on an argument out of range.
    """
    positive("elo", hidden=hidden, clip_norm=clip_norm)
    if compat not in ("", "pylo"):
        raise unknown("elo", "compat", compat, ("", "pylo"))
    inner = base.small_fc(hidden=hidden, learned_decays=False)

    def arithmetic(theta: base.Theta) -> Arithmetic:
        rule = base.arithmetic_of(theta, step_mult=1.0, exp_mult=exp_mult)

        def update(leaves, grads, states, params, shared, told):
            if compat == "pylo":
                grads = [jnp.nan_to_num(g) for g in grads]
            if clip_norm is not None:
                grads = clip_global_norm(grads, clip_norm)
            return rule.update(leaves, grads, states, params, shared, told)

        return rule._replace(update=update)

    settings = {"hidden": hidden, "exp_mult": exp_mult, "clip_norm": clip_norm, "compat": compat}
    nonfinite = "propagate" if compat == "pylo" else "skip_leaf"
    return define("elo", settings, inner.init_theta, arithmetic, lr=0.01, nonfinite=nonfinite)
