"""Update rules: one paper, one file. `make(name, **settings)` builds one; `REGISTRY` lists them."""

from __future__ import annotations

import importlib
import inspect

import numpy as np

from lopt.base import LearnedOptimizer, unknown

REGISTRY: dict[str, str] = {
    "celo": "lopt.rules.celo",
    "celo2": "lopt.rules.celo2",
    "elo": "lopt.rules.elo",
    "l2o_dm": "lopt.rules.l2o_dm",
    "l2o_pa": "lopt.rules.l2o_pa",
    "mlp": "lopt.rules.mlp",
    "mulo": "lopt.rules.mulo",
    "nn_adam": "lopt.rules.nn_adam",
    "rnnprop": "lopt.rules.rnnprop",
    "small_fc": "lopt.rules.small_fc",
    "tiny": "lopt.rules.tiny",
    "velo": "lopt.rules.velo",
}


def make(name: str, /, **settings) -> LearnedOptimizer:
    """Build a registered rule. Raises ValueError naming the nearest valid rule or setting."""
    if name not in REGISTRY:
        raise unknown("lopt.rules.make", "rule", name, REGISTRY)
    factory = getattr(importlib.import_module(REGISTRY[name]), name)
    valid = inspect.signature(factory).parameters
    for key in settings:
        if key not in valid:
            raise unknown(f"lopt.rules.make: {name}", "setting", key, valid)
    settings = {key: _plain(value) for key, value in settings.items()}
    for key, value in settings.items():
        _check(f"lopt.rules.make: {name}: {key}", value, valid[key].annotation)
    return factory(**settings)


def _plain(value: object) -> object:
    """Without NumPy, whose numbers no JSON holds."""
    if isinstance(value, list | tuple):
        return tuple(_plain(x) for x in value)
    return _plain(value.tolist()) if isinstance(value, np.generic | np.ndarray) else value


def _check(where: str, value: object, annotation: str) -> None:
    """Refuse a value of another type than the factory's annotation ("int", "float | None" …) says."""
    kind, _, optional = annotation.partition(" | ")
    if kind == "tuple[float, ...]":
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where}, got {value!r}; valid: a list of numbers.")
        for x in value:
            _check(where, x, "float")
        return
    if value is None and optional:
        return
    types = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}[kind]
    if not isinstance(value, types) or (isinstance(value, bool) and kind != "bool"):
        raise ValueError(f"{where}, got {value!r}; valid: {annotation}.")
    if isinstance(value, int | float) and not abs(value) < 1e300:
        raise ValueError(f"{where}, got {value}; valid: a finite number.")
