"""Suites: which problems an optimizer is judged on, by name. Needs no JAX, so that `lopt-eval list` is quick."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Problem(NamedTuple):
    """A task at a horizon."""

    family: str  # of tasks.REGISTRY
    settings: Mapping[str, Any]  # of the family's factory
    num_steps: int  # T, updates
    note: str  # how far it is from what shipped rules were meta-trained on; every table and plot carries it

    def describe(self) -> str:
        settings = ", ".join(f"{name}={value}" for name, value in self.settings.items())
        return f"{self.family}({settings}), T={self.num_steps}"


SUITES: dict[str, tuple[Problem, ...]] = {
    "digits": (
        Problem(
            "image_mlp",
            {"data": "digits", "size": 8, "hidden": (32,)},
            1000,
            "the kind of task that most open rules were meta-trained on",
        ),
    ),
    "quickstart": (
        Problem("tabular_mlp", {"data": "breast_cancer", "hidden": (64,)}, 500, "tabular data, never met"),
        Problem(
            "cnn",
            {"data": "mnist5k", "size": 14, "channels": (8, 16)},
            500,
            "same images at another size, other network",
        ),
    ),
}
