"""What is measured on loss curves. Pure functions of NumPy arrays; losses that are not finite count as infinite.

A curve is recorded at evaluations 0 … E-1; `smoothed` is the median of the last WINDOW of them, so that neither a
target nor a hit is one lucky evaluation. All that follows is computed on smoothed curves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float, Int

WINDOW = 5


class Verdict(NamedTuple):
    """A learned rule against a reference in one column."""

    outcome: Literal["won", "lost", "tie"]
    unanimous: bool  # every paired seed says the same as the means


def smoothed(losses: Float[np.ndarray, "*S E"]) -> Float[np.ndarray, "*S E"]:
    """Median of each evaluation and the WINDOW - 1 before it; infinite where there are not that many."""
    losses = np.where(np.isfinite(losses), losses, np.inf)
    out = np.full(losses.shape, np.inf)
    if losses.shape[-1] >= WINDOW:
        windows = np.lib.stride_tricks.sliding_window_view(losses, WINDOW, axis=-1)
        out[..., WINDOW - 1 :] = np.sort(windows, axis=-1)[..., WINDOW // 2]
    return out


def final(losses: Float[np.ndarray, "*S E"]) -> Float[np.ndarray, "*S"]:
    """The last smoothed loss."""
    return smoothed(losses)[..., -1]


def seed_mean(losses: Float[np.ndarray, "S E"]) -> Float[np.ndarray, " E"]:
    """Mean over seeds of their smoothed curves; infinite where one seed is."""
    return smoothed(losses).mean(axis=0)


def first_hit(steps: Int[np.ndarray, " E"], curve: Float[np.ndarray, " E"], target: float) -> int | None:
    """The first step at which a smoothed curve is at or below a finite target, or None."""
    hits = np.flatnonzero(curve <= target) if np.isfinite(target) else []
    return int(steps[hits[0]]) if len(hits) else None


def speed_up(reference: int | None, hit: int | None) -> float:
    """Steps of the reference over steps taken: 0 if never reached, NaN where the reference has no target itself."""
    if reference is None:
        return float("nan")
    return 0.0 if hit is None else reference / max(hit, 1)


def choose(finals: Float[np.ndarray, "P S"]) -> int:
    """The point of least mean over seeds; one with a seed that is not finite only if all have."""
    means = np.where(np.isfinite(finals), finals, np.inf).mean(axis=1)
    return int(np.argmin(means))


def at_edge(value: float, grid: Float[np.ndarray, " G"]) -> bool:
    """Whether a chosen value is an end of its grid, so that the best may lie beyond."""
    return bool(value <= np.min(grid) or value >= np.max(grid))


def verdict(
    rule: Float[np.ndarray, " S"], reference: Float[np.ndarray, " S"], *, higher_is_better: bool = False
) -> Verdict:
    """Compare means over the same seeds; a mean that is not finite loses to one that is."""
    sign = -1.0 if higher_is_better else 1.0
    ours, theirs = (np.where(np.isfinite(x), sign * x, np.inf) for x in (rule, reference))
    wins, losses = ours < theirs, ours > theirs
    if ours.mean() < theirs.mean():
        return Verdict("won", bool(wins.all()))
    if ours.mean() > theirs.mean():
        return Verdict("lost", bool(losses.all()))
    return Verdict("tie", not (wins | losses).any())


def speed_verdict(speed: float) -> Verdict:
    """Of a speed-up: below 1, and never, is lost; without a target nobody has won."""
    if speed > 1.0:
        return Verdict("won", True)
    return Verdict("lost" if speed < 1.0 else "tie", True)
