"""Whether two numbers of the same answers rise together: over all answers, and among the answers to one prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt

from alignkit.evaluation.statistics import Estimate, bootstrap_mean

Floats = npt.NDArray[np.floating[Any]]
Coefficient = Callable[[Floats, Floats], float]
"""A correlation of two lists of the same length, from -1 to 1; NaN where one of them is constant."""

RESAMPLES = 1000
_TAIL = 0.025


class Correlation(TypedDict):
    """`over` all answers, with how many; `within`: the mean of the prompts' own coefficients, with how many prompts.

    None where it is not defined: all values are equal.
    """

    over: Estimate | None
    within: Estimate | None


def pearson(x: Floats, y: Floats) -> float:
    """The linear correlation: covariance by the product of the standard deviations (Pearson, 1895)."""
    if len(x) < 2 or (x == x[0]).all() or (y == y[0]).all():
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])


def spearman(x: Floats, y: Floats) -> float:
    """The linear correlation of ranks (Spearman, 1904); equal values share the mean of their ranks."""
    from scipy.stats import rankdata

    return pearson(rankdata(x), rankdata(y))


def kendall(x: Floats, y: Floats) -> float:
    """Kendall's tau-b (1945): (concordant - discordant) pairs / sqrt(pairs that x tells apart * pairs that y does)."""
    from scipy.stats import kendalltau

    if len(x) < 2 or (x == x[0]).all() or (y == y[0]).all():
        return float("nan")
    return float(kendalltau(x, y, variant="b").statistic)


def correlation(
    coefficient: Coefficient, x: Sequence[float], y: Sequence[float], prompts: Sequence[str], seed: int = 0
) -> Correlation:
    """A coefficient over all answers and within prompts, each with its 95 % bootstrap interval over whole prompts.

    `prompts` names the prompt of each answer. Over all answers the prompts themselves count: a model that only knows
    which questions are easy does well there, and is told apart by what it does within prompts. A prompt whose values
    are constant in x or y has no coefficient and is left out within prompts.
    """
    values = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    places: dict[str, list[int]] = {}
    for place, prompt in enumerate(prompts):
        places.setdefault(prompt, []).append(place)
    members = [np.asarray(each) for each in places.values()]
    own = [coefficient(values[0][each], values[1][each]) for each in members]
    known = [each for each in own if not np.isnan(each)]
    return Correlation(
        over=_over(coefficient, *values, members, seed), within=bootstrap_mean(known, seed=seed) if known else None
    )


def _over(coefficient: Coefficient, x: Floats, y: Floats, members: Sequence[Any], seed: int) -> Estimate | None:
    """All answers together; resamples without a coefficient (all values equal) say nothing about the interval."""
    found = coefficient(x, y)
    if np.isnan(found):
        return None
    generator = np.random.default_rng(seed)
    resampled = []
    for _ in range(RESAMPLES):
        drawn = np.concatenate([members[place] for place in generator.integers(len(members), size=len(members))])
        resampled.append(coefficient(x[drawn], y[drawn]))
    low, high = np.nanquantile(resampled, [_TAIL, 1 - _TAIL]) if not np.isnan(resampled).all() else (-1.0, 1.0)
    return Estimate(mean=found, low=float(low), high=float(high), n=len(x))
