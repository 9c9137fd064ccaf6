"""Token scores against numbers worked out by hand."""

import math

import numpy as np
import pytest

from horen_bench.metrics.token_match import (
    Scores,
    agreement,
    mean_interval,
    op_interval,
    overall_performance,
    same_length_accuracy,
    token_accuracy,
)

NAN = math.nan


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize(
    ("predicted", "target", "score"),
    [
        ([7, 8, 9, 6], [7, 8, 9, 6], 1.0),
        ([7, 0, 9, 6], [7, 8, 9, 6], 0.75),
        ([7, 8], [7, 8, 9, 6], 0.5),  # missing tokens are wrong, what is there counts
        ([7, 8, 9, 6, 5, 5], [7, 8], 1.0),  # what follows the target is not looked at
        ([8, 9, 6], [7, 8, 9, 6], 0.0),  # shifted by one: positions count, not membership
        ([], [7], 0.0),
    ],
)
def test_accuracy_counts_target_positions(predicted: list[int], target: list[int], score: float) -> None:
    assert token_accuracy(predicted, target) == score


@pytest.mark.parametrize(
    ("predicted", "target", "score"),
    [
        ([7, 8, 9], [7, 8, 9, 6], 0.0),  # one too short: nothing, though three of four are right
        ([7, 8, 0, 6], [7, 8, 9, 6], 0.75),
        ([7, 8, 9, 6, 5], [7, 8, 9, 6], 1.0),  # too long is cut first
        ([], [7], 0.0),
    ],
)
def test_release_rule_gives_nothing_to_a_short_answer(predicted: list[int], target: list[int], score: float) -> None:
    assert same_length_accuracy(predicted, target) == score


@pytest.mark.parametrize("score", [token_accuracy, same_length_accuracy])
def test_empty_target_is_refused_instead_of_scored(score: object) -> None:
    assert callable(score)
    with pytest.raises(ValueError, match="an empty target cannot be scored"):
        score([], [])


@pytest.mark.parametrize(
    ("first", "second", "score"),
    [
        ([], [], 1.0),
        ([], [3, 4], 0.0),
        ([3, 4], [3, 4, 5, 6], 0.5),  # over the longer length
        ([3, 4, 5], [3, 0, 5], 2 / 3),
        ([3, 4], [4, 3], 0.0),
    ],
)
def test_agreement_is_over_the_longer_output_and_symmetric(first: list[int], second: list[int], score: float) -> None:
    assert agreement(first, second) == score
    assert agreement(second, first) == score


def test_op_is_the_geometric_mean_of_unrounded_means() -> None:
    assert overall_performance(0.5, 0.25, 1.0) == pytest.approx(0.5)
    # 0.001 ** (1/3) = 0.1; rounding the factors to two digits first would give 0.
    assert overall_performance(0.004, 0.25, 1.0) == pytest.approx(0.1)
    assert overall_performance(0.0, 1.0, 1.0) == 0.0
    assert overall_performance(0.0, 0.0, 0.0) == 0.0
    assert math.isnan(overall_performance(1.0, NAN, 1.0))


def test_interval_of_a_mean_is_the_textbook_one() -> None:
    """400 coin flips, half of them heads: mean 0.5, standard error 0.025, so 0.451 to 0.549."""
    scores = np.array([0.0, 1.0] * 200)
    low, high = mean_interval(scores, generator())
    assert low == pytest.approx(0.451, abs=0.006)
    assert high == pytest.approx(0.549, abs=0.006)


def test_interval_belongs_to_the_seed_alone() -> None:
    scores = generator(1).random(50)
    assert mean_interval(scores, generator(5)) == mean_interval(scores, generator(5))
    assert mean_interval(scores, generator(5)) != mean_interval(scores, generator(6))


def test_interval_leaves_out_cases_without_a_score() -> None:
    scores = generator(1).random(50)
    gaps = np.insert(scores, [0, 7, 50], NAN)
    assert mean_interval(gaps, generator(5)) == mean_interval(scores, generator(5))


@pytest.mark.parametrize("scores", [[], [0.5], [NAN], [0.5, NAN, NAN]])
def test_fewer_than_two_scores_have_no_interval(scores: list[float]) -> None:
    assert np.isnan(mean_interval(np.array(scores), generator())).all()


def test_interval_of_equal_scores_is_a_point() -> None:
    assert mean_interval(np.ones(5), generator()) == (1.0, 1.0)


def triple() -> tuple[Scores, Scores, Scores]:
    rng = generator(3)
    return rng.random(80), rng.random(80), rng.random(80)


def test_interval_of_op_contains_op_and_belongs_to_the_seed() -> None:
    rel, gen, loc = triple()
    op = overall_performance(rel.mean(), gen.mean(), loc.mean())
    low, high = op_interval(rel, gen, loc, generator(5))
    assert low < op < high
    assert high - low < 0.2
    assert op_interval(rel, gen, loc, generator(5)) == (low, high)


def test_interval_of_op_draws_cases_whole() -> None:
    """Where Gen is high exactly where Rel is low, their product moves less than if drawn apart."""
    rel = np.tile([0.2, 0.8], 40)
    opposed = op_interval(rel, 1 - rel, np.ones(80), generator())
    alike = op_interval(rel, rel, np.ones(80), generator())
    assert opposed[1] - opposed[0] < 0.1 * (alike[1] - alike[0])


def test_interval_of_op_stands_gaps_in_one_score() -> None:
    rel, gen, loc = triple()
    loc[::2] = NAN
    op = overall_performance(rel.mean(), gen.mean(), float(np.nanmean(loc)))
    low, high = op_interval(rel, gen, loc, generator())
    assert low < op < high


def test_interval_of_op_of_zeros_is_zero() -> None:
    assert op_interval(np.zeros(5), np.ones(5), np.ones(5), generator()) == (0.0, 0.0)


def test_op_without_any_locality_has_no_interval_and_warns_of_nothing() -> None:
    rel, gen, _ = triple()
    assert np.isnan(op_interval(rel, gen, np.full(80, NAN), generator())).all()
