"""Is one system better than another on the same questions? Paired differences, tested by document.

Questions about one document are correlated: what is hard about the document is hard for all of them. A test that takes
them one by one rejects a true null far more often than it promises, so the unit here is the cluster, all questions
about one document. docs/evaluation_statistics.md says how to read the numbers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NotRequired

import numpy as np
import numpy.typing as npt

from alignkit.core.errors import UserError
from alignkit.core.records import QAExample
from alignkit.evaluation.metrics.catalogue import METRICS, SHARE
from alignkit.evaluation.statistics import Estimate, bootstrap_mean, bootstrap_together, number_groups, wilson

Floats = npt.NDArray[np.floating[Any]]

ALPHA, POWER = 0.05, 0.80
"""Two-sided level, and the chance to find what is there, of the minimum detectable difference."""
FEW_CLUSTERS = 10
"""Of fewer clusters neither bootstrap nor t quantiles keep what they promise (Cameron, Gelbach & Miller, 2008)."""
HELPED, HURT, NO_HELP = "helped", "hurt", "did not help"
NOT_SHOWN, NOT_COMPARED = "was not shown to help", "not compared"
"""Verdicts. Not shown: the interval lies above zero, but p, adjusted for several scores, does not bear it out."""
DOCUMENT = "document"
"""What questions are clustered by, unless told otherwise."""
FLIPS = 10_000
"""Random sign flips where there are too many to try them all."""
_MOST_EXACT = 13
"""Clusters of which all 2^n sign flips are tried, fewer than `FLIPS`."""
_DRAWS_AT_ONCE = 1 << 20


class WinRate(Estimate):
    """Share of questions that the new system wins, ties counted half, and how many it won, tied and lost."""

    wins: int
    ties: int
    losses: int


class Difference(Estimate):
    """What a new system has over an old one in one score: the mean paired difference and what can be said of it."""

    clusters: int
    p: float
    """Two-sided, of the sign-flip test over clusters."""
    p_holm: float
    """`p` adjusted for all scores of the same comparison."""
    mde: NotRequired[float]
    """Smallest true difference that so many clusters find 80 times in 100; absent where no question differs."""
    win_rate: WinRate


@dataclass(frozen=True)
class Paired:
    """Differences new - old of one score, and the cluster that each belongs to."""

    differences: Sequence[float]
    clusters: Sequence[str]


def compare_paired(scores: Mapping[str, Paired], seed: int = 0) -> dict[str, Difference]:
    """Each score's difference with interval, p, minimum detectable difference and win rate.

    The scores given are one family: `p_holm` holds for all of them together.
    """
    found = {name: permutation_p(each.differences, each.clusters, seed) for name, each in scores.items()}
    adjusted = dict(zip(found, holm(list(found.values())), strict=True))
    samples = {(name, "mean"): (each.differences, each.clusters) for name, each in scores.items()}
    samples |= {(name, "won"): (_outcomes(each.differences), each.clusters) for name, each in scores.items()}
    known = bootstrap_together(samples, seed)
    return {
        name: _difference(each, found[name], adjusted[name], known[name, "mean"], known[name, "won"])
        for name, each in scores.items()
    }


def _difference(paired: Paired, p: float, p_holm: float, estimate: Estimate, won: Estimate) -> Difference:
    difference = Difference(
        mean=estimate["mean"],
        low=estimate["low"],
        high=estimate["high"],
        n=estimate["n"],
        clusters=len(set(paired.clusters)),
        p=p,
        p_holm=p_holm,
        win_rate=win_rate(paired.differences, paired.clusters, resampled=won),
    )
    if (mde := minimum_detectable_difference(paired.differences, paired.clusters)) is not None:
        difference["mde"] = mde
    return difference


def document_of(row: QAExample, cluster_by: str = DOCUMENT) -> str | None:
    """What the questions that are correlated with this one share: the row's field `cluster_by`.

    For "document" that is the field of this name, or else the document of the page or chunk `<document>#<number>` that
    the row's first parent is, as rows of the recipes `documents` and `raft` have it; None where the row tells neither.
    Raises `UserError` when a row has no other field that was named.
    """
    value = getattr(row, cluster_by, None)
    if value not in (None, "", []):
        return str(value)
    if cluster_by != DOCUMENT:
        known = ", ".join(name for name, found in row.model_dump().items() if found not in (None, "", [], {}))
        raise UserError(f"cluster_by={cluster_by}: the row {row.id} has no such field. It has {known}")
    chunk = re.fullmatch(r"(.+)#\d+(?:\.\d+)?", row.parents[0]) if row.parents else None
    return chunk[1] if chunk else None


# -- tests -------------------------------------------------------------------------------------------------------------


def permutation_p(differences: Sequence[float], clusters: Sequence[str], seed: int = 0) -> float:
    """Two-sided p of no difference, by flipping the signs of whole clusters (Fisher, 1935, section 21).

    Where the two systems are equal, their names can be swapped in every cluster without changing anything, and every
    pattern of signs of the cluster totals T_c is equally likely. p is the share of patterns s with |sum s_c T_c| at
    least |sum T_c|. All patterns are tried for up to 13 clusters with a total that is not 0; of more, 10,000 are drawn
    and p = (1 + as extreme ones) / (1 + drawn), which never is 0 (Phipson & Smyth, 2010). With one question a cluster
    and scores of 0 and 1 that is McNemar's exact test.
    """
    totals = _totals(differences, clusters)[0]
    totals = totals[np.abs(totals) > 1e-12 * max(1.0, float(np.abs(totals).max()))]
    if not len(totals):
        return 1.0
    least = abs(float(totals.sum())) - 1e-9 * float(np.abs(totals).sum())  # sums in another order round differently
    if len(totals) <= _MOST_EXACT:
        patterns = np.arange(1 << len(totals))[:, None] >> np.arange(len(totals)) & 1
        return float(np.mean(np.abs((2.0 * patterns - 1) @ totals) >= least))
    generator, extreme, left = np.random.default_rng(seed), 0, FLIPS
    while left:
        drawn = min(left, max(1, _DRAWS_AT_ONCE // len(totals)))
        bits = np.frombuffer(generator.bytes(drawn * -(-len(totals) // 8)), dtype=np.uint8).reshape(drawn, -1)
        kept = np.unpackbits(bits, axis=1, count=len(totals)).astype(np.float64) @ totals
        extreme += int(np.count_nonzero(np.abs(2 * kept - totals.sum()) >= least))
        left -= drawn
    return (1 + extreme) / (1 + FLIPS)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for being several (Holm, 1979), in the order given.

    The j-th smallest of m is multiplied by m - j + 1, and is at least the one before it: rejecting those below alpha
    keeps the chance of any false rejection below alpha, however the tests depend on each other.
    """
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = highest
    return adjusted


# -- how much, and how much could be seen ------------------------------------------------------------------------------


def win_rate(
    differences: Sequence[float], clusters: Sequence[str], seed: int = 0, *, resampled: Estimate | None = None
) -> WinRate:
    """The share of questions won, ties counted half, with its 95 % interval.

    With one question a cluster that is Wilson's; where questions share a cluster, whole clusters are resampled, unless
    the caller has done so and gives `resampled`.
    """
    wins, losses = sum(each > 0 for each in differences), sum(each < 0 for each in differences)
    ties = len(differences) - wins - losses
    outcomes = _outcomes(differences)
    apart = len(set(clusters))
    if apart == len(outcomes) or len(set(outcomes)) == 1:  # all resamples of equal outcomes are equal, too
        estimate = Estimate(**{**wilson(apart * (wins + ties / 2) / len(outcomes), apart), "n": len(outcomes)})
    else:
        estimate = resampled or bootstrap_mean(outcomes, clusters, seed)
    return WinRate(**estimate, wins=wins, ties=ties, losses=losses)


def _outcomes(differences: Sequence[float]) -> list[float]:
    """1 for a question won, 0.5 for a tie, 0 for one lost."""
    return [0.5 * (1 + (each > 0) - (each < 0)) for each in differences]


def minimum_detectable_difference(differences: Sequence[float], clusters: Sequence[str]) -> float | None:
    """The smallest true mean difference that a two-sided test at 5 % finds with a chance of 80 %.

    (t_0.975 + t_0.80) * SE (Bloom, 1995; for evaluations Miller, 2024, arXiv 2411.00640, section 5) with the quantiles
    of Student's t at G - 1 degrees of freedom, G clusters, and the clustered standard error of a mean m of n questions:
    SE^2 = G / (G - 1) * sum_c (T_c - n_c m)^2 / n^2. With clusters of one size that is the standard deviation of the
    cluster means over sqrt(G). None where nothing varies or there is but one cluster: then there is nothing to go by.
    """
    from scipy.special import stdtrit

    totals, counts = _totals(differences, clusters)
    groups, n = len(totals), len(differences)
    if groups < 2:
        return None
    centred = totals - counts * totals.sum() / n
    error = math.sqrt(groups / (groups - 1) * float(centred @ centred)) / n
    if error < 1e-12 * max(1.0, float(np.abs(totals).max())):
        return None
    quantiles = stdtrit(groups - 1, [1 - ALPHA / 2, POWER])
    return float(quantiles.sum()) * error


def _totals(differences: Sequence[float], clusters: Sequence[str]) -> tuple[Floats, Floats]:
    """The sum and the number of the differences of each cluster."""
    if not len(differences):
        raise ValueError("no differences to test")
    labels = number_groups(clusters)
    counts: Floats = np.bincount(labels).astype(np.float64)
    totals = np.bincount(labels, weights=np.asarray(differences, dtype=np.float64))
    return np.asarray(totals, dtype=np.float64), counts


def verdict(difference: Difference | None) -> str:
    """What may be said of a difference: that the new system helped or hurt only where interval and p agree.

    The interval, which excludes zero, and the p-value, at most 5 % after Holm's adjustment over the scores of the
    comparison, are of two methods; near the border one may pass without the other.
    """
    if difference is None:
        return NOT_COMPARED
    significant = difference["p_holm"] <= ALPHA
    if difference["low"] > 0:
        return HELPED if significant else NOT_SHOWN
    return HURT if difference["high"] < 0 and significant else NO_HELP


# -- in words ----------------------------------------------------------------------------------------------------------


def in_words(title: str, scores: Mapping[str, Difference], of: str, left_out: int) -> tuple[list[str], list[str]]:
    """What the numbers show, and what they do not, a sentence each. `of` is what clusters are: "documents"."""
    shown: list[str] = []
    warnings: list[str] = []
    for name, each in scores.items():
        (shown if each["p_holm"] <= ALPHA else warnings).append(f"{title}: {_power(name, each, of)}")
    least = min((each["clusters"] for each in scores.values()), default=FEW_CLUSTERS)
    if least < FEW_CLUSTERS:
        warnings.append(f"{title}: only {least} {of}: intervals from so few are too narrow, and are not to be trusted")
    if left_out:
        warnings.append(f"{title}: {left_out:,} questions that only one of them answered are left out")
    return shown, warnings


def _power(name: str, found: Difference, of: str) -> str:
    """What so many questions can show, and whether this difference is one of them."""
    said, what = f"{found['n']:,} questions about {found['clusters']:,} {of}", name.replace("_", " ")
    if "mde" not in found:
        return f"{said} all have the same difference in {what}, so that it is not known how small a one they can show"
    least, mean = in_units(name, found["mde"]), in_units(name, abs(found["mean"]))
    said += f" can show a difference of {least} in {what} or more"
    if found["p_holm"] > ALPHA and abs(found["mean"]) < found["mde"]:
        return f"{said}, not {mean}: neither that it is better nor that it is not"
    return f"{said}; this one is {mean}, p = {found['p_holm']:.2g}"


def in_units(name: str, value: float) -> str:
    """A difference as people say it: shares in points of a hundred, other scores on their own scale."""
    other = name in METRICS and METRICS[name].scale != SHARE
    return f"{value:.2f}" if other else f"{100 * value:.1f} points"
