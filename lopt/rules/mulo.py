"""µLO: small_fc whose step is scaled per tensor as maximal-update parametrisation asks.

Source: Thérien et al. (2024), "µLO: Compute-efficient meta-generalization of learned optimizers", arXiv:2406.00153.

The multipliers come from shapes alone (`lopt.mup.multipliers`) and are given to `bind`. The model's side (initialiser
and forward scales) is the task's or the user's: `lopt.mup.describe`.
"""

from __future__ import annotations

from lopt.base import LearnedOptimizer, positive, unknown
from lopt.rules import small_fc as base
from lopt.transform import Arithmetic, define


def mulo(
    *,
    hidden: int = 32,
    step_mult: float = 1e-2,
    exp_mult: float = 1e-3,
    learned_decays: bool = True,
    max_grad_norm: float | None = None,
    compat: str = "",
) -> LearnedOptimizer:
    """Build the rule: `bind(theta, multipliers=tree)`, a factor a tensor; without it the rule is small_fc's.

    Args:
      hidden: width of both hidden layers (32: 2,409 meta-parameters).
      step_mult: size of a step of direction 1.
      exp_mult: scale of the magnitude output inside its exponential.
      learned_decays: whether the 7 decays are meta-parameters.
      max_grad_norm: each tensor's gradient is scaled to at most this norm, or None.
      compat: "" or "pylo" (weight decay applied to the moved parameters, and scaled by the multiplier).

    Raises:
      ValueError: on an argument out of range.
    """
    positive("mulo", hidden=hidden, step_mult=step_mult, max_grad_norm=max_grad_norm)
    if compat not in ("", "pylo"):
        raise unknown("mulo", "compat", compat, ("", "pylo"))
    inner = base.small_fc(hidden=hidden, learned_decays=learned_decays)

    def arithmetic(theta: base.Theta) -> Arithmetic:
        return base.arithmetic_of(theta, step_mult=step_mult, exp_mult=exp_mult, max_grad_norm=max_grad_norm)

    settings = {
        "hidden": hidden,
        "step_mult": step_mult,
        "exp_mult": exp_mult,
        "learned_decays": learned_decays,
        "max_grad_norm": max_grad_norm,
        "compat": compat,
    }
    return define("mulo", settings, inner.init_theta, arithmetic, decay_after=compat == "pylo")
