"""Sets of instances of composite convex problems with certified optima, kept by content."""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

import tasks
from meta_test import cells
from tasks import certified
from tasks.base import Task

if TYPE_CHECKING:
    from jaxtyping import Float

FLOOR = 1e-12  # of relative gaps, and what an optimum is certified to


class Set(NamedTuple):
    """Settings of a family, and how many instances are drawn of it at most."""

    settings: Mapping[str, Any]
    most: int = 1024
    family: str = ""  # "": the problem's


class Problem(NamedTuple):
    """A kind of problem and its sets of instances, the first one that of meta-training."""

    family: str
    sets: Mapping[str, Set]
    constrained: bool = False  # r is the indicator of a set: only x, the proximal operator's output, is compared
    # Learned steps of the safeguard at most: those of meta-training; 10 where they gain little later, chosen among 5 to
    # 100 on 24 instances a set of seed 77, which nothing else has seen.
    steps: int = 100


PATCHES = "tasks.lasso:patches"
ILL = {"nonzeros": 8, "magnitude": (5.0, 5.0), "shift": (0.3, 0.3), "log10_strength": (-2.0, -2.0)}
PROBLEMS = {
    "lasso": Problem(
        "lasso",
        {
            "20x40": Set({}),
            "64x128": Set({"rows": 64, "columns": 128, "nonzeros": 10}, 64),
            "250x500": Set({"rows": 250, "columns": 500, "nonzeros": 50}, 16),
            "20x40, ill-conditioned": Set(ILL, 128),
            "image patches, 64x128": Set({}, 64, PATCHES),
        },
    ),
    "logistic": Problem(
        "logistic_l1",
        {
            "100x20": Set({}),
            "1000x50": Set({"rows": 1000, "columns": 50, "nonzeros": 20}, 32),
            "100x20, ill-conditioned": Set({"shift": (0.3, 0.3), "log10_strength": (-2.0, -2.0)}, 128),
            "breast_cancer": Set({}, 64, "tasks.logistic_l1:table"),
        },
        steps=10,
    ),
    "elastic_net": Problem("lasso", {"20x40": Set({"l2": 0.1}, 128)}),
    "group_lasso": Problem("structured_regression", {"40x80": Set({}, 128)}),
    "nnls": Problem(
        "structured_regression",
        {"60x40": Set({"structure": "nonnegative", "rows": 60, "groups": 10, "noise": 0.3}, 64)},
        constrained=True,
    ),
    "total_variation": Problem(
        "structured_regression",
        {"100": Set({"structure": "total_variation", "rows": 100, "log10_strength": (0.0, 0.0)}, 128)},
        constrained=True,
    ),
    "matrix_completion": Problem("matrix_completion", {"12x10": Set({}, 64)}),
}


class Instances(NamedTuple):
    """N instances of a set and their certified optima."""

    phi: Any  # leading axis N
    best: Float[np.ndarray, " N"]
    gap: float  # the largest duality gap of `best`, relative


def draw(problem: Problem, name: str, count: int, seed: int, cache: Path | None = None) -> tuple[Task, Instances]:
    """Instances and their optima, those read from a folder where it has them.

    Raises RuntimeError where an optimum is not certified to FLOOR.
    """
    held = problem.sets[name]
    family = held.family or problem.family
    task = tasks.make(family, **held.settings)
    phi = jax.jit(jax.vmap(task.sample))(jax.random.split(jax.random.key(seed), count))
    best, gap = optima(family, task, phi, cache)
    relative = float(np.max(gap / best))
    if not relative <= FLOOR:
        raise RuntimeError(f"lopt-eval l2o: the optima of {name} are certified to {relative:.1e} only.")
    return task, Instances(phi, best, relative)


def optima(family: str, task: Task, phi: Any, cache: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """[N] least values and duality gaps, by the task's `optimum`; files are keyed by instances and solver."""
    composite = task.composite
    if composite is None or composite.optimum is None:
        raise ValueError(
            f"lopt-eval l2o: {task.name} has no solver of its optima; valid: a `composite` with `optimum`."
        )
    digest = hashlib.sha256(task.name.encode())
    for source in (sys.modules[composite.optimum.__module__], certified):
        digest.update(inspect.getsource(source).encode())
    for leaf in jax.tree.leaves((phi, task.data)):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    path = cache / f"{family.rpartition(':')[2]}-{digest.hexdigest()[:16]}.npz" if cache else None
    if path and path.is_file():
        with np.load(path) as held:
            return held["value"], held["gap"]
    found = composite.optimum(jax.tree.map(np.asarray, phi), jax.tree.map(np.asarray, task.data))
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial.npz")
        np.savez(partial, value=found.value, gap=found.gap)
        partial.replace(path)
    return found.value, found.gap


def home() -> Path:
    """Where optima and unrolled networks are kept."""
    return cells.home() / "l2o"
