"""Hand-designed optimizers to compare with: `get("adamw").make(lr=1e-3)`. One paper, one file; optax's in a table."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lopt.baselines.base import Baseline

_OPTAX = (
    "adabelief adadelta adafactor adagrad adam adamax adamw adan ademamix adopt amsgrad averaged_adamw cocob"
    " dadapt_adamw dog dowg lamb lars lbfgs lion lookahead madgrad mechanic momentum momo momo_adam muon nadamw"
    " nesterov novograd prodigy radam rmsprop sam schedule_free_adamw schedule_free_sgd sgd signum sophia yogi"
)
# Name -> module, imported on demand, so that a command's --help needs no JAX. Its BASELINES has the entry.
REGISTRY: dict[str, str] = {
    **dict.fromkeys(_OPTAX.split(), "lopt.baselines.of_optax"),
    "adabound": "lopt.baselines.adabound",
    "adahessian": "lopt.baselines.adahessian",
    "adam_atan2": "lopt.baselines.adam_atan2",
    "adamp": "lopt.baselines.adamp",
    "adamuon": "lopt.baselines.adamuon",
    "came": "lopt.baselines.came",
    "cautious_adamw": "lopt.baselines.cautious",
    "cautious_lion": "lopt.baselines.cautious",
    "diffgrad": "lopt.baselines.diffgrad",
    "exadam": "lopt.baselines.exadam",
    "gravity": "lopt.baselines.gravity",
    "hand_celo2": "lopt.baselines.hand_celo2",
    "innaprop": "lopt.baselines.innaprop",
    "laprop": "lopt.baselines.laprop",
    "mars": "lopt.baselines.mars",
    "shampoo": "lopt.baselines.shampoo",
    "soap": "lopt.baselines.soap",
    "swats": "lopt.baselines.swats",
}


def names() -> list[str]:
    """All baselines, sorted."""
    return sorted(REGISTRY)


def get(name: str) -> Baseline:
    """The baseline of a name. Raises ValueError naming the nearest valid one."""
    if name not in REGISTRY:
        from lopt.base import unknown

        raise unknown("lopt.baselines.get", "baseline", name, REGISTRY)
    return next(b for b in importlib.import_module(REGISTRY[name]).BASELINES if b.name == name)
