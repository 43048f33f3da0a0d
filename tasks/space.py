"""Host-side draws of a family's settings: what changes shapes cannot be in phi. Not a family itself.

A family's module has `SPACE`: setting -> distribution. A key may be a tuple of settings that are drawn together.

Source of the idea: the parametric tasks of Metz et al. (2022), "VeLO: training versatile learned optimizers by scaling
up", arXiv:2211.09760, appendix C.
"""

from __future__ import annotations

import difflib
import math
import zlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np


class Choice(NamedTuple):
    """One of the options, each as likely as the others."""

    options: tuple[Any, ...]

    def draw(self, rng: np.random.Generator) -> Any:
        return self.options[rng.integers(len(self.options))]


class LogInt(NamedTuple):
    """A log-uniform integer, both ends included."""

    low: int
    high: int

    def draw(self, rng: np.random.Generator) -> int:
        return min(int(math.exp(rng.uniform(math.log(self.low), math.log(self.high + 1)))), self.high)


class LogFloat(NamedTuple):
    """A log-uniform number, of three digits."""

    low: float
    high: float

    def draw(self, rng: np.random.Generator) -> float:
        return float(f"{math.exp(rng.uniform(math.log(self.low), math.log(self.high))):.3g}")


class Widths(NamedTuple):
    """A tuple of log-uniform integers whose length is uniform, its ends included."""

    shortest: int
    longest: int
    low: int
    high: int

    def draw(self, rng: np.random.Generator) -> tuple[int, ...]:
        one = LogInt(self.low, self.high)
        return tuple(one.draw(rng) for _ in range(rng.integers(self.shortest, self.longest + 1)))


def near(name: str, valid: Iterable[str]) -> str:
    """The end of an error's message: the nearest valid name, and all of them."""
    closest = difflib.get_close_matches(name, list(valid), n=1)
    hint = f" Did you mean {closest[0]!r}?" if closest else ""
    return f"{hint} valid: {', '.join(valid)}."


Distribution = Choice | LogInt | LogFloat | Widths
BATCH = LogInt(16, 256)
INIT = Choice((0.0, 0.25, 0.5))  # log10_init_scale
ACTIVATION = Choice(("relu", "gelu", "silu", "tanh"))
CLASSIFICATION = Choice(("cross_entropy", "cross_entropy", "squared"))
# Sets that may be meta-trained on, at sizes that make small tasks.
SMALL_IMAGES = Choice((("digits", 8), ("mnist5k", 8), ("mnist5k", 14)))
# The same with the side of a patch, which divides the image's.
PATCHES = Choice(tuple((*one, side) for one in SMALL_IMAGES.options for side in (2, 4 if one[1] == 8 else 7)))
IMAGES = Choice((*SMALL_IMAGES.options, ("mnist5k", 28)))


def draw(family: str, space: Mapping[str | tuple[str, ...], Distribution], seed: int) -> dict[str, Any]:
    """Settings of a family by a seed; the same on every machine."""
    rng = np.random.default_rng([zlib.crc32(family.encode()), seed])
    settings: dict[str, Any] = {}
    for names, distribution in space.items():
        drawn: Any = distribution.draw(rng)
        settings |= {names: drawn} if isinstance(names, str) else dict(zip(names, drawn, strict=True))
    return settings
