"""Metrics over tasks, by hand; each with a wrong variant that would not pass."""

from __future__ import annotations

import doctest
import importlib
import math

import numpy as np
import pytest

from meta_test import metrics

INF, NAN = math.inf, math.nan
STEPS = np.arange(0, 80, 10)


def plateau(*levels: float) -> np.ndarray:
    """A curve that stays 5 evaluations at each level, so that its smoothed curve gets there at the third of them."""
    return np.repeat(levels, 5).astype(float)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([0, 1, 2, 100], 1.5),
        ([0, 3, 9], (0.25 * 0 + 3 + 0.25 * 9) / 1.5),
        ([7], 7.0),
        ([0, 0, 0, 0, 4, 4, 4, 4], 2.0),
        ([NAN, 0, 1, 2, 100], 1.5),  # what could not be scored is left out
        ([0, 1, 2, INF], 1.5),
        ([1, 2, 3, 4, 5], (0.75 * 2 + 3 + 0.75 * 4) / 2.5),
        ([NAN], NAN),
    ],
)
def test_iqm(scores, expected):
    np.testing.assert_allclose(metrics.iqm(np.array([scores], float)), expected)


def test_iqm_is_neither_the_mean_nor_the_median():
    scores = np.array([[0.0, 1.0, 1.0, 4.0, 5.0, 90.0, 91.0, 92.0]])
    assert metrics.iqm(scores) == (1 + 4 + 5 + 90) / 4
    assert metrics.iqm(scores) not in (scores.mean(), np.median(scores))
    assert metrics.iqm(scores.reshape(4, 2)) == metrics.iqm(scores)  # over all tasks and seeds at once


def test_median_and_mean_are_over_tasks():
    scores = np.array([[0.0, 2.0], [4.0, 4.0], [90.0, 110.0], [NAN, NAN]])
    assert metrics.median_of_means(scores) == 4.0
    assert metrics.mean_of(scores) == (1 + 4 + 100) / 3
    assert np.nanmedian(scores) == 4.0 != np.nanmean(scores)
    assert metrics.median_of_means(np.array([[0.0, 10.0], [1.0, 1.0], [NAN, 9.0]])) == 5.0  # pooled it would be 1
    assert math.isnan(metrics.median_of_means(np.full((2, 2), NAN)))
    # Leading axes are many at once.
    both = np.stack([scores, scores[::-1] * 2])
    for statistic in (metrics.iqm, metrics.median_of_means, metrics.mean_of):
        np.testing.assert_allclose(statistic(both), [statistic(scores), 2 * statistic(scores)])


def test_bootstrap_draws_seeds_within_tasks():
    # Seeds agree on each task: nothing is uncertain, however far tasks are apart. Drawing tasks would not say so.
    tasks_apart = np.repeat([[0.0], [1.0], [5.0]], 4, axis=1)
    assert metrics.stratified_bootstrap(metrics.mean_of, tasks_apart) == (2.0, 2.0)
    # One task of two seeds: a resample's mean is 0, ½ or 1 with probability ¼, ½ and ¼.
    assert metrics.stratified_bootstrap(metrics.mean_of, np.array([[0.0, 1.0]])) == (0.0, 1.0)
    # Of n seeds of variance s² the mean's interval is ± 1.96 s / √n.
    rng = np.random.default_rng(1)
    scores = rng.normal(size=(1, 200))
    low, high = metrics.stratified_bootstrap(metrics.mean_of, scores, resamples=4000)
    half = 1.96 * scores.std() / math.sqrt(200)
    np.testing.assert_allclose([low, high], [scores.mean() - half, scores.mean() + half], atol=0.1 * half)
    # Tasks are drawn independently of each other: of 16 alike the interval is a quarter as long.
    many = np.repeat(scores, 16, axis=0)
    low16, high16 = metrics.stratified_bootstrap(metrics.mean_of, many)
    np.testing.assert_allclose((high16 - low16) / (high - low), 0.25, rtol=0.15)
    assert metrics.stratified_bootstrap(metrics.mean_of, scores) == metrics.stratified_bootstrap(
        metrics.mean_of, scores
    )
    assert all(map(math.isnan, metrics.stratified_bootstrap(metrics.iqm, np.full((2, 3), NAN))))


def test_paired_speed_ups():
    # Evaluations every 10 steps from 0. The reference reaches 1 (its best) when 3 of the last 5 are 1: at evaluation 7.
    reference = np.stack([plateau(3, 1, 1), plateau(4, 2, 2), plateau(3, 1, 1), np.full(15, NAN)])
    ours = np.stack([np.full(15, 0.5), plateau(4, 4, 2), plateau(3, 2, 2), np.zeros(15)])
    steps = np.arange(15) * 10
    found = metrics.paired_speed_ups(steps, ours, steps, reference)
    # Reached at the first smoothed evaluation, 4; a plateau equal to the target at evaluation 12; never; no target.
    np.testing.assert_allclose(found, [70 / 40, 70 / 120, 0.0, NAN])
    np.testing.assert_allclose(metrics.paired_speed_ups(steps, reference, steps, reference), [1, 1, 1, NAN])
    # One common target, the best of the mean curve, would give another answer on the first two seeds.
    common = metrics.seed_mean(reference[:3]).min()
    assert metrics.first_hit(steps, metrics.smoothed(ours[1]), float(common)) is None


def test_a_diverging_run_reaches_the_target_only_before():
    steps, reference = np.arange(15) * 10, plateau(3, 2, 1)[None]
    early = np.concatenate([np.zeros(6), np.full(9, NAN)])[None]
    late = np.concatenate([np.full(6, 5.0), np.full(9, NAN)])[None]
    np.testing.assert_allclose(metrics.paired_speed_ups(steps, early, steps, reference), [120 / 40])
    assert metrics.paired_speed_ups(steps, late, steps, reference).tolist() == [0.0]


def test_performance_profile():
    hits = np.array([[10.0, 40.0, INF, INF], [20.0, 10.0, 5.0, INF], [0.0, INF, 15.0, INF]])
    ratios = np.array([1.0, 2.0, 3.0, 4.0, 20.0])
    # Relative to the fastest of each task (a hit at step 0 counts as 1): 10, 4, -, -; 20, 1, 1, -; 1, -, 3, -.
    expected = [[0, 0, 0, 0.25, 0.5], [0.5, 0.5, 0.5, 0.5, 0.75], [0.25, 0.25, 0.5, 0.5, 0.5]]
    np.testing.assert_allclose(metrics.performance_profile(hits, ratios), expected)
    # A task that nobody solves is in the denominator: leaving it out would end at 1.
    assert metrics.performance_profile(hits, np.array([1e9])).max() == 0.75
    # Ties are fastest, all of them.
    np.testing.assert_allclose(metrics.performance_profile(np.full((3, 2), 7.0), np.array([1.0])), 1.0)


def test_wins():
    ours = np.array([[1.0, 2.0, NAN, INF, 1.0]])
    theirs = np.array([[2.0, 2.0, NAN, 1.0, -INF]])
    assert metrics.wins(ours, theirs).tolist() == [[1.0, 0.5, 0.5, 0.0, 1.0]]
    assert metrics.wins(theirs, ours).tolist() == [[0.0, 0.5, 0.5, 1.0, 0.0]]


def test_ranks():
    losses = np.array([[1.0, 3.0, NAN], [2.0, 3.0, INF], [3.0, 1.0, 5.0], [2.0, NAN, 4.0]])
    expected = [[1.0, 2.5, 3.5], [2.5, 2.5, 3.5], [4.0, 1.0, 2.0], [2.5, 4.0, 1.0]]
    np.testing.assert_allclose(metrics.ranks(losses), expected)
    np.testing.assert_allclose(metrics.ranks(losses).sum(0), 10.0)  # ties share; the least of them all would not add up


def test_critical_difference():
    # Demšar (2006), §3.2: four classifiers on 14 data sets, 2.569 √(4·5 / (6·14)) = 1.25.
    assert round(metrics.critical_difference(4, 14), 2) == 1.25
    assert metrics.critical_difference(4, 56) == pytest.approx(metrics.critical_difference(4, 14) / 2)
    # Table 5: q for 2, 5, 10 optimizers; the same of three digits for as many as one likes.
    for optimizers, q in ((2, 1.960), (5, 2.728), (10, 3.164)):
        assert metrics.critical_difference(optimizers, 1) == pytest.approx(
            q * math.sqrt(optimizers * (optimizers + 1) / 6), rel=3e-4
        )
    assert metrics.critical_difference(57, 10) > metrics.critical_difference(20, 10)
    assert math.isnan(metrics.critical_difference(1, 10))


def test_divergence_rate():
    curves = np.array([[1.0, 2.0, 3.0], [1.0, NAN, 3.0], [1.0, 2.0, INF], [1e30, 1.0, 1.0]])
    assert metrics.divergence_rate(curves) == 0.5  # of runs, whenever; of losses it would be 1 in 6


@pytest.mark.parametrize("module", ["metrics", "cells", "tuning", "runs"])
def test_doctests(module):
    found = doctest.testmod(importlib.import_module(f"meta_test.{module}"))
    assert found.attempted > 0
    assert found.failed == 0
