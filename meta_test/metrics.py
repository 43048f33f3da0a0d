"""What is measured on loss curves. Pure functions of NumPy arrays; losses that are not finite count as infinite.

A curve is recorded at evaluations 0 … E-1; `smoothed` is the median of the last WINDOW of them, so that neither a
target nor a hit is one lucky evaluation. All that follows is computed on smoothed curves.
"""

from __future__ import annotations

from collections.abc import Callable
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


# Over tasks. Scores are [tasks, seeds]; NaN is what could not be scored and is left out, 0 a target never reached.

CONFIDENCE = 0.95
RESAMPLES = 2000


def paired_speed_ups(
    steps: Int[np.ndarray, " E"],
    losses: Float[np.ndarray, "S E"],
    reference_steps: Int[np.ndarray, " F"],
    reference: Float[np.ndarray, "S F"],
) -> Float[np.ndarray, " S"]:
    """Speed-up on each seed to the reference's best smoothed loss on the same seed; the reference's own is 1."""
    out = []
    for ours, theirs in zip(smoothed(losses), smoothed(reference), strict=True):
        target = float(theirs.min())
        out.append(speed_up(first_hit(reference_steps, theirs, target), first_hit(steps, ours, target)))
    return np.array(out)


def iqm(scores: Float[np.ndarray, "*B T S"]) -> Float[np.ndarray, "*B"]:
    """Interquartile mean over tasks and seeds: of the middle half of all scores, those that are cut counted in part.

    With n scores a quarter of n is taken away at each end, n/4 need not be whole. Agarwal et al. (2021), §4.3.

    >>> float(iqm(np.array([[0.0, 1.0, 2.0, 100.0]]))), float(iqm(np.array([[0.0], [3.0], [9.0]])))
    (1.5, 3.5)
    """
    flat = np.sort(scores.reshape(*scores.shape[:-2], -1), axis=-1)  # NaN last
    n = (~np.isnan(flat)).sum(-1, keepdims=True)
    ends = np.arange(1, flat.shape[-1] + 1)
    weights = np.clip(np.minimum(ends, 0.75 * n) - np.maximum(ends - 1, 0.25 * n), 0, 1)
    total = (weights * np.where(weights > 0, flat, 0)).sum(-1)
    return np.where(n[..., 0] > 0, total / np.maximum(weights.sum(-1), 1e-9), np.nan)


def task_means(scores: Float[np.ndarray, "*B T S"]) -> Float[np.ndarray, "*B T"]:
    """Means over the seeds that were scored; NaN without any."""
    count = (~np.isnan(scores)).sum(-1)
    return np.where(count > 0, np.nansum(scores, -1) / np.maximum(count, 1), np.nan)


def median_of_means(scores: Float[np.ndarray, "*B T S"]) -> Float[np.ndarray, "*B"]:
    """Median over tasks of their means over seeds."""
    means = np.sort(task_means(scores), axis=-1)  # NaN last
    n = (~np.isnan(means)).sum(-1, keepdims=True)
    middle = [np.take_along_axis(means, np.maximum(at, 0), -1)[..., 0] for at in ((n - 1) // 2, n // 2 - (n == 0))]
    return np.where(n[..., 0] > 0, (middle[0] + middle[1]) / 2, np.nan)


def mean_of(scores: Float[np.ndarray, "*B T S"]) -> Float[np.ndarray, "*B"]:
    """Mean over tasks of their means over seeds."""
    means = task_means(scores)
    n = (~np.isnan(means)).sum(-1)
    return np.where(n > 0, np.nansum(means, -1) / np.maximum(n, 1), np.nan)


def stratified_bootstrap(
    statistic: Callable[[Float[np.ndarray, "B T S"]], Float[np.ndarray, " B"]],
    scores: Float[np.ndarray, "T S"],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of a statistic: seeds are drawn with replacement within each task, tasks stay.

    It says how sure the result is on these tasks, not on others. Of one seed there is no interval: NaN. Agarwal et al.
    (2021), §4.1.
    """
    tasks, seeds = scores.shape
    if not tasks or seeds < 2:
        return float("nan"), float("nan")
    draws = np.random.default_rng(seed).integers(0, seeds, (resamples, tasks, seeds))
    found = statistic(scores[np.arange(tasks)[:, None], draws])
    found = found[~np.isnan(found)]
    if not found.size:
        return float("nan"), float("nan")
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(found, [tail, 1 - tail])
    return float(low), float(high)


def performance_profile(hits: Float[np.ndarray, "O T"], ratios: Float[np.ndarray, " R"]) -> Float[np.ndarray, "O R"]:
    """Share of tasks on which an optimizer needs at most `ratio` times the steps of the fastest one there.

    Args:
      hits: steps to the target; infinite where never. Tasks that nobody solves count for all as unsolved.
      ratios: ≥ 1.

    Source: Dolan & Moré (2002), "Benchmarking optimization software with performance profiles", section 2.
    """
    hits = np.where(np.isfinite(hits), np.maximum(hits, 1), np.inf)
    best = hits.min(axis=0)
    relative = np.where(np.isfinite(hits), hits / np.where(np.isfinite(best), best, 1.0), np.inf)
    return (relative[:, :, None] <= ratios).mean(axis=1)


def wins(ours: Float[np.ndarray, "T S"], theirs: Float[np.ndarray, "T S"]) -> Float[np.ndarray, "T S"]:
    """1 where our final loss is less than theirs on the same seed, ½ where equal; what is not finite is the worst."""
    ours, theirs = (np.where(np.isfinite(x), x, np.inf) for x in (ours, theirs))
    return (ours < theirs) + 0.5 * (ours == theirs)


def ranks(losses: Float[np.ndarray, "O *T"]) -> Float[np.ndarray, "O *T"]:
    """Rank among the optimizers, 1 the least loss, ties shared; what is not finite is the worst."""
    losses = np.where(np.isfinite(losses), losses, np.inf)
    less = (losses[None] < losses[:, None]).sum(1)
    equal = (losses[None] == losses[:, None]).sum(1)
    return less + (equal + 1) / 2


def critical_difference(optimizers: int, tasks: int) -> float:
    """Mean ranks that differ by less are not told apart by Nemenyi's test at 5 %; NaN for fewer than two optimizers.

    q √(k (k + 1) / 6 N), q the studentised range's quantile over √2. Demšar (2006), "Statistical comparisons of
    classifiers over multiple data sets", §3.2.
    """
    from scipy.stats import studentized_range

    if optimizers < 2 or tasks < 1:
        return float("nan")
    q = studentized_range.ppf(CONFIDENCE, optimizers, np.inf) / np.sqrt(2)
    return float(q * np.sqrt(optimizers * (optimizers + 1) / (6 * tasks)))


def divergence_rate(losses: Float[np.ndarray, "S E"]) -> float:
    """Share of seeds whose loss was ever not finite."""
    return float((~np.isfinite(losses)).any(axis=-1).mean())
