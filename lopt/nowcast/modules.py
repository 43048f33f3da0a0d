"""Layers of a parameter tree: which leaves are of one, by the names of flax Linen, NNX, haiku and lopt's tasks."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

KERNELS, BIASES, TABLES = ("kernel", "w", "weight"), ("bias", "b", "offset", "beta"), ("embedding", "embeddings")
SCALES = ("scale", "gamma", "weight")


class Leaf(NamedTuple):
    path: str
    shape: tuple[int, ...]


class Module(NamedTuple):
    """The leaves of one layer."""

    path: str
    kernel: Leaf | None
    bias: Leaf | None
    scale: Leaf | None

    @property
    def name(self) -> str:
        return self.path.split("/")[-1].lower()

    @property
    def parent(self) -> str:
        return self.path.rpartition("/")[0]

    @property
    def b(self) -> str | None:
        return self.bias.path if self.bias else None

    def size(self) -> int:
        """Of a norm."""
        some = self.scale or self.bias
        return math.prod(some.shape) if some else 0

    @property
    def norm(self) -> tuple[str | None, str | None]:
        return (self.scale.path if self.scale else None, self.b)


def by_path(params: Any) -> list[tuple[str, Any]]:
    """Path and leaf of each."""
    return [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    ]


def floating(params: Any) -> list[tuple[str, tuple[int, ...]]]:
    """Path and shape of each leaf of floats."""
    return [
        (path, tuple(np.shape(leaf)))
        for path, leaf in by_path(params)
        if jax.numpy.issubdtype(jax.numpy.result_type(leaf), jax.numpy.floating) and np.size(leaf)
    ]


def parse(params: Any) -> list[Module]:
    """Layers in the natural order of their names."""
    found: dict[str, dict[str, Leaf]] = {}
    for path, shape in floating(params):
        parts = path.split("/")
        if (
            parts[-1] in ("value", "raw_value")
            and len(parts) > 1
            and parts[-2] in (*KERNELS, *BIASES, *SCALES, *TABLES)
        ):
            parts = parts[:-1]  # a variable of NNX
        role, place = parts[-1], "/".join(p for p in parts[:-1] if p not in ("~",))
        leaf, wide = Leaf(path, shape), max(shape, default=1) != math.prod(shape)
        if role in SCALES and not (role == "weight" and wide):
            kind = "scale"
        elif role in BIASES:
            kind = "bias"
        elif role in KERNELS or role in TABLES:
            kind = "kernel"
        else:  # an array that has the name of its layer
            place, kind = f"{place}/{role}" if place else role, "kernel" if len(shape) > 1 else "bias"
        found.setdefault(place, {})[kind] = leaf
    modules = [Module(path, some.get("kernel"), some.get("bias"), some.get("scale")) for path, some in found.items()]
    return sorted(modules, key=lambda m: natural(m.path))


def natural(path: str) -> list[Any]:
    return [[(0, int(x), "") if x.isdigit() else (1, 0, x) for x in re.findall(r"\d+|\D+", p)] for p in path.split("/")]


def is_named(m: Module, names: Iterable[str]) -> bool:
    return m.name in names


def first_named(modules: Iterable[Module], names: Iterable[str]) -> Module | None:
    """The first by the order of names."""
    by_name = {m.name: m for m in reversed(list(modules)) if m.kernel}
    return next((by_name[name] for name in names if name in by_name), None)


def doubt(message: str) -> ValueError:
    return ValueError(f"lopt.nowcast.recognise: {message}; describe the network with lopt.nowcast.Graph.")
