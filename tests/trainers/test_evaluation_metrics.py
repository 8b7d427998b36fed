"""Measures of a guard: against values known by hand, and against what they promise."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_allclose

from mmguard_trainers.evaluation import metrics
from mmguard_trainers.evaluation.metrics import Floats, Ints, MetricError

LABELS: Ints = np.array([0, 0, 0, 0, 1, 1, 1, 1])
SCORES: Floats = np.array([0.1, 0.2, 0.3, 0.8, 0.25, 0.7, 0.8, 0.9])


def drawn(n: int, seed: int) -> tuple[Ints, Floats]:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 2, n)
    labels[:2] = 0, 1
    return labels, np.clip(generator.normal(0.4 + 0.2 * labels, 0.2), 0, 1)


def test_auroc_is_the_share_of_pairs_in_order_with_ties_as_half() -> None:
    pairs = [(u, s) for u in SCORES[LABELS == 1] for s in SCORES[LABELS == 0]]
    expected = np.mean([(u > s) + 0.5 * (u == s) for u, s in pairs])
    assert metrics.auroc(LABELS, SCORES) == pytest.approx(expected)


def test_average_precision_of_a_perfect_order_is_one() -> None:
    assert metrics.average_precision(LABELS, LABELS.astype(float)) == 1.0
    assert metrics.average_precision(LABELS, SCORES) < 1.0


@pytest.mark.parametrize("measure", [metrics.auroc, metrics.average_precision])
def test_one_class_alone_has_no_order_to_measure(measure: metrics.Statistic) -> None:
    with pytest.raises(MetricError, match="rows of one class; give safe and unsafe rows"):
        measure(np.ones(3, dtype=int), np.array([0.1, 0.2, 0.3]))


def test_f1_differs_by_what_is_averaged() -> None:
    f1 = metrics.f1_scores(np.array([0, 0, 0, 1]), np.array([False, False, True, True]))
    assert f1["binary"] == pytest.approx(2 / 3)
    assert f1["macro"] == pytest.approx((0.8 + 2 / 3) / 2)
    assert f1["weighted"] == pytest.approx(0.75 * 0.8 + 0.25 * 2 / 3)


def test_rates_count_each_class_by_itself() -> None:
    tpr, fpr = metrics.rates(LABELS, SCORES >= 0.7)
    assert (tpr.hits, tpr.n, fpr.hits, fpr.n) == (3, 4, 1, 4)


def test_no_false_alarm_in_n_rows_still_leaves_the_exact_bound() -> None:
    rate = metrics.proportion(0, 100)
    assert (rate.rate, rate.low) == (0.0, 0.0)
    assert rate.upper == pytest.approx(1 - 0.05 ** (1 / 100))
    assert rate.high == pytest.approx(1 - 0.025 ** (1 / 100))
    assert metrics.proportion(100, 100).high == 1.0


def test_the_upper_bound_covers_the_true_rate_as_often_as_it_says() -> None:
    # 400 draws of a rate of 3 %: fewer than 360 covered has a chance below 1e-4 at 95 %.
    hits = np.random.default_rng(0).binomial(200, 0.03, 400)
    covered = sum(metrics.proportion(int(h), 200).upper >= 0.03 for h in hits)
    assert covered >= 360


@pytest.mark.parametrize("target", [0.0, 0.01, 0.1, 0.25, 0.5])
@pytest.mark.parametrize("seed", range(5))
def test_a_threshold_keeps_the_false_alarm_rate_and_is_the_lowest_that_does(
    target: float, seed: int
) -> None:
    labels, scores = drawn(300, seed)
    scores = scores.round(2).clip(0, 0.99)  # with many ties
    threshold = metrics.threshold_at_fpr(labels, scores, target)
    safe = scores[labels == 0]
    assert np.mean(safe >= threshold) <= target
    assert np.mean(safe >= scores[scores < threshold].max()) > target


def test_safe_rows_that_score_one_leave_no_threshold() -> None:
    with pytest.raises(MetricError, match="2 of 3 safe rows score 1, more than may be raised"):
        metrics.threshold_at_fpr(np.array([0, 0, 0, 1]), np.array([1.0, 1.0, 0.2, 1.0]), 0.1)


@pytest.mark.parametrize("ratio", [0.2, 1.0, 10.0])
@pytest.mark.parametrize("seed", range(5))
def test_no_threshold_costs_less_than_the_one_of_least_cost(ratio: float, seed: int) -> None:
    labels, scores = drawn(200, seed)
    scores = scores.round(2).clip(0, 0.99)

    def cost(threshold: float) -> float:
        raised = scores >= threshold
        return ratio * float((~raised & (labels == 1)).sum()) + float(
            (raised & (labels == 0)).sum()
        )

    chosen = cost(metrics.threshold_of_least_cost(labels, scores, ratio))
    assert chosen == min(cost(t) for t in np.linspace(0, 1, 1001))


def test_costlier_misses_lower_the_threshold() -> None:
    labels, scores = drawn(400, 0)
    cheap, dear = (metrics.threshold_of_least_cost(labels, scores, ratio) for ratio in (0.1, 10))
    assert dear < cheap


def test_calibrated_scores_have_no_calibration_error_and_shifted_ones_have_the_shift() -> None:
    scores = np.repeat([0.25, 0.75], 400)
    labels = np.concatenate([np.arange(400) < 100, np.arange(400) < 300]).astype(int)
    assert metrics.expected_calibration_error(labels, scores) == pytest.approx(0)
    assert metrics.expected_calibration_error(labels, scores + 0.1) == pytest.approx(0.1)


def test_reliability_bins_hold_every_row_once() -> None:
    bins = metrics.reliability_bins(LABELS, np.append(SCORES[:-1], 1.0), 10)
    assert sum(found.n for found in bins if found) == len(SCORES)
    assert bins[5] is None
    assert bins[8] == metrics.Bin(2, 0.8, 0.5)


def test_the_bootstrap_interval_is_the_same_for_a_seed_and_holds_the_value() -> None:
    labels, scores = drawn(200, 3)
    first, again = (
        metrics.bootstrap_interval(metrics.auroc, labels, scores, resamples=200, seed=1)
        for _ in range(2)
    )
    assert first == again
    assert first[0] < metrics.auroc(labels, scores) < first[1]


def test_copies_in_one_group_do_not_narrow_the_interval() -> None:
    labels, scores = drawn(60, 4)
    groups = [str(i) for i in range(60)]
    alone = metrics.bootstrap_interval(metrics.auroc, labels, scores, groups, resamples=250)
    copied = metrics.bootstrap_interval(
        metrics.auroc, np.tile(labels, 9), np.tile(scores, 9), groups * 9, resamples=250
    )
    blind = metrics.bootstrap_interval(
        metrics.auroc, np.tile(labels, 9), np.tile(scores, 9), resamples=250
    )
    width, blind_width = copied[1] - copied[0], blind[1] - blind[0]
    assert_allclose(width, alone[1] - alone[0], rtol=0.3)
    assert blind_width < 0.5 * width


def test_every_resample_keeps_the_balance_of_the_classes() -> None:
    labels, scores = np.array([1, *[0] * 30]), np.linspace(0, 1, 31)
    low, high = metrics.bootstrap_interval(
        lambda drawn_labels, _: float(drawn_labels.sum()), labels, scores, resamples=50
    )
    assert (low, high) == (1.0, 1.0)
