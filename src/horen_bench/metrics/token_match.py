"""Token-level scores of short answers (paper E.3.1), and what becomes of them over a set of cases.

Every score is in [0, 1], higher is better.
"""

import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import DegenerateDataWarning, bootstrap

Scores = NDArray[np.float64]


def token_accuracy(predicted: Sequence[int], target: Sequence[int]) -> float:
    """Share of target tokens that the prediction has at the same position; missing tokens are wrong.

    `Acc = 1/|y| * sum_t 1[y^_t = y_t]`; predicted tokens past the target's length are not looked at.

    Raises:
        ValueError: the target is empty; a mean over nothing is neither 0 nor 1.
    """
    if not target:
        raise ValueError("an empty target cannot be scored")
    return sum(p == t for p, t in zip(predicted, target, strict=False)) / len(target)


def same_length_accuracy(predicted: Sequence[int], target: Sequence[int]) -> float:
    """`token_accuracy` that gives nothing at all when the lengths differ (the release's rule).

    The prediction is first cut to the target's length, so only one that is too short scores 0.
    """
    cut = predicted[: len(target)]
    return token_accuracy(cut, target) if len(cut) == len(target) else 0.0


def agreement(first: Sequence[int], second: Sequence[int]) -> float:
    """Share of positions where two outputs agree, over the longer length; 1 if both are empty."""
    longest = max(len(first), len(second))
    return sum(a == b for a, b in zip(first, second, strict=False)) / longest if longest else 1.0


def overall_performance(rel: float, gen: float, loc: float) -> float:
    """OP, the geometric mean of the three (unrounded) means; NaN if one is missing."""
    return float((rel * gen * loc) ** (1 / 3))


def mean_interval(scores: Scores, rng: np.random.Generator, n_resamples: int = 1000) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean over cases, NaN cases left out."""
    kept = scores[~np.isnan(scores)]
    return _interval((kept,), _nan_mean, rng, n_resamples)


def op_interval(
    rel: Scores, gen: Scores, loc: Scores, rng: np.random.Generator, n_resamples: int = 1000
) -> tuple[float, float]:
    """95 % percentile bootstrap interval of OP; cases are drawn whole, `(n_cases,)` each."""
    return _interval((rel, gen, loc), _op_of_samples, rng, n_resamples)


def _interval(
    samples: tuple[Scores, ...], statistic: object, rng: np.random.Generator, n_resamples: int
) -> tuple[float, float]:
    if samples[0].size < 2 or any(np.isnan(sample).all() for sample in samples):
        return (float("nan"), float("nan"))
    with warnings.catch_warnings():
        # A resample can miss a family that few cases have; such resamples are left out of the percentiles.
        warnings.simplefilter("ignore", DegenerateDataWarning)
        resampled = bootstrap(
            samples,
            statistic,
            paired=True,
            method="percentile",
            n_resamples=n_resamples,
            batch=max(1, 4_000_000 // samples[0].size),
            rng=rng,
        ).bootstrap_distribution
    low, high = np.nanpercentile(resampled, [2.5, 97.5])
    return float(low), float(high)


def _nan_mean(scores: Scores, axis: int) -> Scores:
    counts = (~np.isnan(scores)).sum(axis=axis)
    total = np.nansum(scores, axis=axis)
    mean: Scores = np.divide(total, counts, out=np.full_like(total, np.nan), where=counts > 0)
    return mean


def _op_of_samples(rel: Scores, gen: Scores, loc: Scores, axis: int) -> Scores:
    product: Scores = _nan_mean(rel, axis) * _nan_mean(gen, axis) * _nan_mean(loc, axis)
    return np.cbrt(product)
