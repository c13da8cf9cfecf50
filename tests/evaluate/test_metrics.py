"""The figures: against hand-computed cases, against torchmetrics, and their statistics under known truths."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.kid import poly_mmd

from fewstep.evaluate.metrics import (
    KID_UNIT,
    NORMAL_95,
    coverage,
    density,
    diversity,
    frechet_distance,
    kid,
    kid_difference,
    kid_interval,
    paired_distance,
    pixel_rmse,
    precision,
    vendi_score,
)

WIDTH = 8


def captioned_sets(rng, count, shifts=(0.0, 0.0), caption_share=0.8):
    """Feature sets whose rows share their caption's part, shifted apart in distribution; all widths alike."""
    of_caption = rng.normal(size=(count, WIDTH)) * caption_share
    own = np.sqrt(1 - caption_share**2)
    return [of_caption + own * rng.normal(size=(count, WIDTH)) + shift for shift in shifts]


def test_kid_of_two_captions_is_the_value_computed_by_hand():
    # k(a, b) = (ab + 1)³ at D = 1: k(0,1) = 1, k(2,3) = 343, and across captions k(0,3) = 1, k(1,2) = 27
    x, y = np.array([[0.0], [1.0]]), np.array([[2.0], [3.0]])
    assert kid(x, y) * KID_UNIT == pytest.approx(1 + 343 - 1 - 27)


def test_kid_is_torchmetrics_without_the_terms_of_equal_captions():
    x, y = captioned_sets(np.random.default_rng(0), 50, shifts=(0.0, 0.4))
    same_caption = ((x * y).sum(axis=1) / WIDTH + 1) ** 3
    cross = (x @ y.T / WIDTH + 1) ** 3
    kept = (cross.sum() - same_caption.sum()) / (50 * 49)
    expected = poly_mmd(torch.from_numpy(x), torch.from_numpy(y)).item() + 2 * (cross.mean() - kept)
    assert kid(x, y) * KID_UNIT == pytest.approx(expected, rel=1e-9)


def test_kid_is_unbiased_for_sets_that_share_captions():
    rng = np.random.default_rng(1)
    draws = [captioned_sets(rng, 30) for _ in range(800)]
    values = np.array([kid(x, y) for x, y in draws])
    usual = np.array([poly_mmd(*map(torch.from_numpy, pair)).item() / KID_UNIT for pair in draws])
    standard_error = values.std() / np.sqrt(len(values))
    assert abs(values.mean()) < 3 * standard_error
    assert usual.mean() < -10 * standard_error, (
        "the usual estimator's bias, which this one avoids, has vanished"
    )


@pytest.mark.parametrize("shift", [0.0, 0.25])
def test_intervals_cover_the_true_value_as_often_as_they_say(shift):
    rng = np.random.default_rng(2)
    truth = np.mean([kid(*captioned_sets(rng, 400, (0.0, shift))) for _ in range(40)]) if shift else 0.0
    intervals = [kid_interval(*captioned_sets(rng, 60, (0.0, shift))) for _ in range(300)]
    covered = np.mean([interval.low <= truth <= interval.high for interval in intervals])
    assert covered >= 0.9


def test_a_shift_puts_zero_outside_the_interval():
    interval = kid_interval(*captioned_sets(np.random.default_rng(3), 200, (0.0, 0.5)))
    assert interval.low > 0
    assert interval.low < interval.value < interval.high


def test_the_interval_is_centred_on_kid_and_shrinks_with_more_captions():
    rng = np.random.default_rng(4)
    x, y = captioned_sets(rng, 800, (0.0, 0.5))
    few, many = kid_interval(x[:100], y[:100]), kid_interval(x, y)
    assert many.value == pytest.approx(kid(x, y))
    assert (many.high - many.low) < 0.6 * (few.high - few.low)


def test_the_difference_of_two_sets_of_the_same_noise_is_sharper_than_their_separate_intervals():
    rng = np.random.default_rng(5)
    candidate, reference = captioned_sets(rng, 200, (0.4, 0.0))
    close = candidate + 0.02 * rng.normal(size=candidate.shape)
    difference = kid_difference(candidate, close, reference)
    separate = kid_interval(candidate, reference)
    assert difference.value == pytest.approx(kid(candidate, reference) - kid(close, reference))
    assert (difference.high - difference.low) < 0.2 * (separate.high - separate.low)


def test_the_difference_of_a_set_and_itself_is_exactly_zero():
    x, y = captioned_sets(np.random.default_rng(6), 20)
    assert kid_difference(x, x, y) == (0.0, 0.0, 0.0)


def test_paired_distance_compares_corresponding_rows_only():
    x = np.array([[0.0, 0.0], [10.0, 0.0]], dtype=np.float32)
    y = np.array([[3.0, 4.0], [10.0, 1.0]], dtype=np.float32)
    assert paired_distance(x, y) == pytest.approx((5 + 1) / 2)


def test_pixel_error_is_two_from_black_to_white():
    black = np.zeros((3, 2, 2, 3), dtype=np.uint8)
    assert pixel_rmse(black, black + 255) == pytest.approx(2.0)
    one_in_four = black.copy()
    one_in_four[:, 0, 0] = 255
    assert pixel_rmse(black, one_in_four) == pytest.approx(1.0)


def test_diversity_is_the_mean_distance_of_two_different_images():
    triangle = np.array([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]], dtype=np.float32)
    assert diversity(triangle) == pytest.approx((3 + 4 + 5) / 3)


def test_the_frechet_distance_is_torchmetrics() -> None:
    x, y = captioned_sets(np.random.default_rng(4), 200, shifts=(0.0, 0.3))
    y = y * np.linspace(0.5, 2, WIDTH)
    moments = [torch.tensor(value) for z in (x, y) for value in (z.mean(0), np.cov(z, rowvar=False))]
    assert frechet_distance(x, y) == pytest.approx(float(_compute_fid(*moments)), rel=1e-6)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)


def test_the_frechet_distance_of_a_shift_is_its_square() -> None:
    x = np.random.default_rng(5).normal(size=(64, WIDTH))
    assert frechet_distance(x, x + 0.5) == pytest.approx(0.25 * WIDTH)


def of_one_distribution(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 16))


def test_precision_counts_the_images_among_the_real_ones():
    real, near = of_one_distribution(200, 0), of_one_distribution(100, 1)
    assert precision(real, real).value == 1
    assert precision(real + 100, real).value == 0
    both = np.concatenate([near, near + 100])
    assert precision(both, real).value == pytest.approx(precision(near, real).value / 2)
    # Real images that are not generated cost recall, and no precision.
    assert precision(real[:, :], np.concatenate([real, real + 100])).value == 1
    assert precision(np.concatenate([real, real + 100]), real).value == 0.5


def test_density_of_one_distribution_is_one_and_grows_where_images_crowd():
    real, others = of_one_distribution(1000, 0), of_one_distribution(1000, 1)
    estimate = density(others, real)
    assert estimate.low < 1 < estimate.high
    assert density(others * 0.5, real).value > 1.5
    assert density(others + 100, real).value == 0
    # A set in its own neighbourhoods: each has itself and k others.
    assert density(real, real).value == pytest.approx(6 / 5)


def test_coverage_of_one_distribution_is_that_of_its_closed_form():
    """Naeem et al., lemma 2: 1 − (N − 1)…(N − k) / ((M + N − 1)…(M + N − k)), for any distribution."""
    real_count, count, k = 300, 200, 5
    expected = 1 - np.prod([(real_count - i) / (count + real_count - i) for i in range(1, k + 1)])
    values = [
        coverage(of_one_distribution(count, 2 * seed), of_one_distribution(real_count, 2 * seed + 1), k).value
        for seed in range(20)
    ]
    assert np.mean(values) == pytest.approx(expected, abs=0.01)


def test_shares_have_intervals_that_hold_at_the_ends_too():
    far = precision(of_one_distribution(50, 0) + 100, of_one_distribution(50, 1))
    assert (far.value, far.low) == (0, 0)
    assert far.high == pytest.approx(NORMAL_95**2 / (50 + NORMAL_95**2))


def test_the_vendi_score_counts_different_images():
    different = np.eye(12)
    assert vendi_score(different) == pytest.approx(12)
    assert vendi_score(np.repeat(different[:1], 12, axis=0)) == pytest.approx(1)
    # Three kinds, four of each; lengths of features don't matter.
    assert vendi_score(np.repeat(different[:3], 4, axis=0) * np.arange(1, 13)[:, None]) == pytest.approx(3)
    # As many images as features and more: both Gram matrices have the same score.
    many = of_one_distribution(40, 0)
    padded = np.concatenate([many, np.zeros((40, 40))], axis=1)
    assert vendi_score(many) == pytest.approx(vendi_score(padded))
