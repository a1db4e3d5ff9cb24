"""Best of n: what to choose among n scored completions of a prompt, and what choosing among more of them is worth."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from math import comb, fsum, log

from alignkit.core.records import Completion


def scored(completions: Sequence[Completion]) -> list[Completion]:
    """The completions that may be chosen or rejected: finished ones that have a score."""
    return [completion for completion in completions if completion.finished and completion.score is not None]


def ranked(completions: Sequence[Completion]) -> list[Completion]:
    """The different texts among the completions that have a score, the best first, equals in their order.

    A text that was written several times stands here once, with the mean of its scores.
    """
    by_text: dict[str, list[Completion]] = {}
    for completion in scored(completions):
        by_text.setdefault(completion.text, []).append(completion)
    merged = [same[0].model_copy(update={"score": _mean_score(same)}) for same in by_text.values()]
    return sorted(merged, key=_score, reverse=True)


def kl_bound(n: int) -> float:
    """How far choosing the best of `n` moves a policy: KL(best of n || policy) <= log n - (n - 1) / n, in nats.

    Given as its value by Stiennon et al., 2020 (arXiv 2009.01325, appendix G.3); it is an upper bound, close
    where no answer is likely to be drawn twice (Beirami et al., 2024, arXiv 2401.01879).
    """
    return log(n) - (n - 1) / n


def expected_best(scores: Sequence[float], k: int, values: Sequence[float] | None = None) -> float:
    """Mean, over all ways to draw `k` of these completions, of the value of the one with the highest score.

    This is the unbiased estimate of best-of-k from N >= k samples. With s_1 <= ... <= s_N, the i-th is the best of
    C(i - 1, k - 1) of the C(N, k) subsets, so

        sum_{i=k..N} C(i - 1, k - 1) / C(N, k) * v_i.

    `values` (v) are the scores themselves unless given: with the grades of another judge the result is what that judge
    thinks of the best by these scores. Among equal scores each counts with their mean value, as if one of them were
    chosen at random. With fewer than `k` completions all are drawn.
    """
    count = len(scores)
    k = min(k, count)
    ranked = sorted(zip(scores, scores if values is None else values, strict=True))
    total, place = 0.0, 0
    for _, tied in groupby(ranked, key=lambda pair: pair[0]):
        group = [value for _, value in tied]
        weight = sum(comb(i, k - 1) for i in range(place, place + len(group)))
        total += weight * sum(group) / len(group)
        place += len(group)
    return total / comb(count, k)


def powers_of_two(largest: int) -> list[int]:
    """1, 2, 4, ... up to `largest`, and `largest` itself."""
    return [*(1 << power for power in range(largest.bit_length()) if 1 << power < largest), largest]


def _score(completion: Completion) -> float:
    assert completion.score is not None
    return completion.score


def _mean_score(completions: Sequence[Completion]) -> float:
    """The mean; of equal scores exactly that score."""
    scores = [_score(completion) for completion in completions]
    return scores[0] if min(scores) == max(scores) else fsum(scores) / len(scores)
