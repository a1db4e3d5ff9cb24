"""Estimates with 95 % intervals, and tests of paired differences: pure functions of scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]

RESAMPLES = 2000
_TAIL = 0.025
_DRAWS_AT_ONCE = 1 << 18


class Estimate(TypedDict):
    """A mean, the ends of its 95 % interval, and the number of rows behind it."""

    mean: float
    low: float
    high: float
    n: int


def wilson(successes: int, n: int) -> Estimate:
    """A proportion with its score interval (Wilson, 1927), z = 1.96 and p = successes / n:

    (p + z^2/2n -+ z sqrt(p(1 - p)/n + z^2/4n^2)) / (1 + z^2/n). Unlike p -+ z sqrt(p(1 - p)/n) it covers the truth at
    the promised rate near 0 and 1, and never leaves [0, 1]. Raises `ValueError` for n = 0.
    """
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"{successes} successes of {n}: no proportion")
    z = NormalDist().inv_cdf(1 - _TAIL)
    share = successes / n
    centre = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    low = (centre - half) / scale if successes else 0.0
    high = (centre + half) / scale if successes < n else 1.0
    return Estimate(mean=share, low=low, high=high, n=n)


def bootstrap_mean(values: Sequence[float], groups: Sequence[str] | None = None, seed: int = 0) -> Estimate:
    """A mean with its percentile bootstrap interval (Efron, 1979), from 2,000 seeded resamples.

    Rows of the same group are drawn together: questions about one statement, or one question under several seeds, are
    not independent, and an interval that treats them so is too narrow. Paired differences are just such a mean.
    """
    return bootstrap_means([values], groups, seed)[0]


def bootstrap_means(
    scores: Sequence[Sequence[float]], groups: Sequence[str] | None = None, seed: int = 0
) -> list[Estimate]:
    """`bootstrap_mean` of several scores of the same rows; one set of resamples serves all, which is much faster."""
    resampled = _resampled_means(np.asarray(scores, dtype=np.float64), groups, seed)
    return [_interval(float(np.mean(each)), means, len(each)) for each, means in zip(scores, resampled, strict=True)]


def proportion(outcomes: Sequence[float], groups: Sequence[str], seed: int = 0) -> Estimate:
    """The share of rows with the outcome 1 rather than 0, with its 95 % interval.

    With one row a group that is Wilson's. Rows of the same group go together, so where there are any whole groups are
    resampled; so they are where outcomes between 0 and 1 make it no count.
    """
    if len(set(groups)) < len(groups) or any(outcome not in (0, 1) for outcome in outcomes):
        return bootstrap_mean([float(outcome) for outcome in outcomes], groups, seed)
    return wilson(round(sum(outcomes)), len(outcomes))


def balanced_accuracy(yes: Sequence[float], no: Sequence[float], seed: int = 0) -> Estimate:
    """The mean of two recalls, with its bootstrap interval; `yes` and `no` hold 1 for a right verdict and 0 for a wrong
    one, over the rows whose true verdict is yes and no. A model that always says yes scores 0.5, whatever the mix."""
    resampled = _resampled_means(np.asarray([yes], dtype=np.float64), None, seed)
    resampled = (resampled + _resampled_means(np.asarray([no], dtype=np.float64), None, seed + 1))[0] / 2
    return _interval((float(np.mean(yes)) + float(np.mean(no))) / 2, resampled, len(yes) + len(no))


def mcnemar_p(gained: int, lost: int) -> float:
    """Two-sided exact McNemar test (1947): how likely a split at least this uneven is, if gains and losses were even.

    `gained` rows are right only after, `lost` only before: 2 P(X <= min(gained, lost)), X ~ Binomial(both, 1/2).
    """
    both = gained + lost
    tail = sum(math.comb(both, k) for k in range(min(gained, lost) + 1))
    return min(1.0, tail / (1 << both) * 2)


def _resampled_means(scores: Floats, groups: Sequence[str] | None, seed: int) -> Floats:
    """Means [scores, 2,000] of `scores` [scores, rows] over resamples of whole groups (of single rows, without groups).

    A resample says how many times each group is drawn, and its means are products with the groups' sums and sizes.
    """
    rows = scores.shape[1]
    if not rows:
        raise ValueError("no values to take a mean of")
    labels = np.arange(rows) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    counts = np.bincount(labels).astype(np.float64)
    sums = np.stack([np.bincount(labels, weights=each) for each in scores], axis=1)
    generator = np.random.default_rng(seed)
    at_once = max(1, _DRAWS_AT_ONCE // len(counts))
    means = []
    for start in range(0, RESAMPLES, at_once):
        drawn = generator.integers(len(counts), size=(min(at_once, RESAMPLES - start), len(counts)))
        places = drawn + len(counts) * np.arange(len(drawn))[:, None]
        times = np.bincount(places.ravel(), minlength=drawn.size).reshape(drawn.shape).astype(np.float64)
        means.append((times @ sums) / (times @ counts)[:, None])
    return np.concatenate(means).T


def _interval(mean: float, resampled: Floats, n: int) -> Estimate:
    low, high = np.quantile(resampled, [_TAIL, 1 - _TAIL])
    return Estimate(mean=mean, low=float(low), high=float(high), n=n)
