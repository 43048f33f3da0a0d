"""µLO: small_fc whose step is scaled per tensor as maximal-update parametrisation asks.

Source: Thérien et al. (2024), "µLO: Compute-efficient meta-generalization of learned optimizers", arXiv:2406.00153.

The multipliers come from shapes alone (`lopt.mup.multipliers`) and are given to `bind`. The model's side (initialiser
and forward scales) is the task's or the user's: `lopt.mup.describe`.
"""

from __future__ import annotations

from lopt import features as F
from lopt.base import LearnedOptimizer, positive, unknown
from lopt.rules import small_fc as base
from lopt.transform import Arithmetic, define


def mulo(
    *,
    hidden: int = 32,
    step_mult: float = 1e-2,
    exp_mult: float = 1e-3,
    learned_decays: bool = True,
    momenta: tuple[float, ...] = (0.9, 0.99, 0.999),
    second_moment: float = 0.999,
    factored: tuple[float, ...] = (0.9, 0.99, 0.999),
    max_grad_norm: float | None = None,
    compat: str = "",
) -> LearnedOptimizer:
    """Build the rule: `bind(theta, multipliers=tree)`, a factor a tensor; without it the rule is small_fc's.

    Args:
      hidden: width of both hidden layers (32: 2,409 meta-parameters).
      step_mult: size of a step of direction 1.
      exp_mult: scale of the magnitude output inside its exponential.
      learned_decays: whether the 7 decays are meta-parameters.
      momenta: decays of the three momenta; where they are learned, where they start.
      second_moment: decay of the second moment.
      factored: decays of the three factored second moments.
      max_grad_norm: each tensor's gradient is scaled to at most this norm, or None.
      compat: "" or "pylo" (weight decay applied to the moved parameters, and scaled by the multiplier).

    Raises:
      ValueError: on an argument out of range.
    """
    positive("mulo", hidden=hidden, step_mult=step_mult, max_grad_norm=max_grad_norm)
    if compat not in ("", "pylo"):
        raise unknown("mulo", "compat", compat, ("", "pylo"))
    decays = F.decays("mulo", momenta, second_moment, factored)
    inner = base.small_fc(hidden=hidden, learned_decays=learned_decays)

    def arithmetic(theta: base.Theta) -> Arithmetic:
        return base.arithmetic_of(theta, decays, step_mult=step_mult, exp_mult=exp_mult, max_grad_norm=max_grad_norm)

    settings = {
        "hidden": hidden,
        "step_mult": step_mult,
        "exp_mult": exp_mult,
        "learned_decays": learned_decays,
        "momenta": decays.m,
        "second_moment": second_moment,
        "factored": decays.factored,
        "max_grad_norm": max_grad_norm,
        "compat": compat,
    }
    return define("mulo", settings, inner.init_theta, arithmetic, decay_after=compat == "pylo")
