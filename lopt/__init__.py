"""Learned optimizers as optax transforms: `tx = lopt.load("lopt-base", num_steps=1000)`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lopt import baselines as baselines
    from lopt import convert as convert
    from lopt import mup as mup
    from lopt import nowcast as nowcast
    from lopt import prox as prox
    from lopt import proximal as proximal
    from lopt import rules as rules
    from lopt.averaging import averaged as averaged
    from lopt.averaging import eval_params as eval_params
    from lopt.base import LearnedOptimizer as LearnedOptimizer
    from lopt.pretrained import available as available
    from lopt.pretrained import load as load
    from lopt.pretrained import read as read
    from lopt.pretrained import save as save

__version__ = "0.1.0"

# Resolved on first use, so that the command-line tools can import their light parts without JAX.
_HOME = {
    "LearnedOptimizer": "lopt.base",
    "available": "lopt.pretrained",
    "averaged": "lopt.averaging",
    "baselines": "lopt.baselines",
    "convert": "lopt.convert",
    "eval_params": "lopt.averaging",
    "load": "lopt.pretrained",
    "mup": "lopt.mup",
    "nowcast": "lopt.nowcast",
    "prox": "lopt.prox",
    "proximal": "lopt.proximal",
    "read": "lopt.pretrained",
    "rules": "lopt.rules",
    "save": "lopt.pretrained",
}
__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lopt' has no attribute {name!r}")
    module = importlib.import_module(_HOME[name])
    return module if _HOME[name] == f"lopt.{name}" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
