"""Estimates with 95 % intervals: pure functions of scores. `comparison` tests differences."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from statistics import NormalDist
from typing import Any, TypedDict, TypeVar

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]

Key = TypeVar("Key", bound=Hashable)

RESAMPLES = 2000
_TAIL = 0.025
_DRAWS_AT_ONCE = 1 << 18


class Estimate(TypedDict):
    """A mean, the ends of its 95 % interval, and the number of rows behind it."""

    mean: float
    low: float
    high: float
    n: int


def wilson(successes: float, n: int) -> Estimate:
    """A proportion with its score interval (Wilson, 1927), z = 1.96 and p = successes / n:

    (p + z^2/2n -+ z sqrt(p(1 - p)/n + z^2/4n^2)) / (1 + z^2/n). Unlike p -+ z sqrt(p(1 - p)/n) it covers the truth at
    the promised rate near 0 and 1, and never leaves [0, 1]. Successes may be halves, as ties are in a win rate: these
    vary less than the formula takes them to, so that the interval is rather too wide. Raises `ValueError` for n = 0.
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


def bootstrap_together(
    samples: Mapping[Key, tuple[Sequence[float], Sequence[str]]], seed: int = 0
) -> dict[Key, Estimate]:
    """`bootstrap_mean` of several (values, groups), by key; those with the same groups share one set of resamples."""
    alike: dict[tuple[str, ...], list[Key]] = {}
    for key, (_, groups) in samples.items():
        alike.setdefault(tuple(groups), []).append(key)
    found: dict[Key, Estimate] = {}
    for shared, keys in alike.items():
        found |= zip(keys, bootstrap_means([samples[key][0] for key in keys], shared, seed), strict=True)
    return found


def proportion(outcomes: Sequence[float], groups: Sequence[str], seed: int = 0) -> Estimate:
    """The share of rows with the outcome 1 rather than 0, with its 95 % interval.

    With one row a group that is Wilson's. Rows of the same group go together, so where there are any whole groups are
    resampled; so they are where outcomes between 0 and 1 make it no count. All outcomes being equal no resample differs
    from another, which proves nothing: then the groups are counted, by Wilson's formula.
    """
    apart = len(set(groups))
    if apart < len(groups) and len(set(outcomes)) == 1 and outcomes[0] in (0, 1):
        return Estimate(**{**wilson(outcomes[0] * apart, apart), "n": len(outcomes)})
    if apart < len(groups) or any(outcome not in (0, 1) for outcome in outcomes):
        return bootstrap_mean([float(outcome) for outcome in outcomes], groups, seed)
    return wilson(round(sum(outcomes)), len(outcomes))


def number_groups(groups: Sequence[str]) -> npt.NDArray[np.intp]:
    """For each row the place of its group among all groups in order. Not by `np.unique`: that would give every name,
    which may be a whole document, the room of the longest."""
    places = {group: place for place, group in enumerate(sorted(set(groups)))}
    return np.asarray([places[group] for group in groups], dtype=np.intp)


def balanced_accuracy(yes: Sequence[float], no: Sequence[float], seed: int = 0) -> Estimate:
    """The mean of two recalls, with its bootstrap interval; `yes` and `no` hold 1 for a right verdict and 0 for a wrong
    one, over the rows whose true verdict is yes and no. A model that always says yes scores 0.5, whatever the mix."""
    resampled = _resampled_means(np.asarray([yes], dtype=np.float64), None, seed)
    resampled = (resampled + _resampled_means(np.asarray([no], dtype=np.float64), None, seed + 1))[0] / 2
    return _interval((float(np.mean(yes)) + float(np.mean(no))) / 2, resampled, len(yes) + len(no))


def _resampled_means(scores: Floats, groups: Sequence[str] | None, seed: int) -> Floats:
    """Means [scores, 2,000] of `scores` [scores, rows] over resamples of whole groups (of single rows, without groups).

    A resample says how many times each group is drawn, and its means are products with the groups' sums and sizes.
    """
    rows = scores.shape[1]
    if not rows:
        raise ValueError("no values to take a mean of")
    labels = np.arange(rows) if groups is None else number_groups(groups)
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
