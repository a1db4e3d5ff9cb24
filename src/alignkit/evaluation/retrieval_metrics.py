"""How well a ranking serves a query: pure functions of ids, best first, and of the ids that are relevant.

All are means over queries of what is defined here for one, with a binary relevance; higher is better, up to 1.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alignkit.evaluation.statistics import bootstrap_mean

METRICS = ("mrr", "recall", "ndcg", "precision", "hit")


@dataclass(frozen=True)
class RankedQuery:
    """What one retriever found for one query.

    `found` are the ids of passages, best first, `relevant` those that it should have found. `holds_answer` says for
    each passage found whether an answer stands in it; None where the answers are not known or are a yes or a no.
    """

    id: str
    task: str
    found: tuple[str, ...]
    relevant: frozenset[str]
    holds_answer: tuple[bool, ...] | None = None

    @property
    def group(self) -> str:
        """Queries for the same passages are not independent: they are resampled together."""
        return min(self.relevant)


def reciprocal_rank(found: Sequence[str], relevant: Collection[str], k: int) -> float:
    """1 / rank of the first relevant passage among the first k, or 0 (MRR; Voorhees, TREC-8, 1999)."""
    return next((1 / rank for rank, id in enumerate(found[:k], 1) if id in relevant), 0.0)


def recall(found: Sequence[str], relevant: Collection[str], k: int) -> float:
    """The share of the relevant passages that is among the first k."""
    return len(set(found[:k]) & set(relevant)) / len(relevant)


def precision(found: Sequence[str], relevant: Collection[str], k: int) -> float:
    """The share of k places that relevant passages take; what a retriever did not fill counts as wrong."""
    return len(set(found[:k]) & set(relevant)) / k


def ndcg(found: Sequence[str], relevant: Collection[str], k: int) -> float:
    """DCG / DCG of the best ranking (Jarvelin and Kekalainen, 2002), DCG@k = sum over i <= k of rel_i / log2(i + 1)."""
    gained = sum(1 / math.log2(rank + 1) for rank, id in enumerate(found[:k], 1) if id in relevant)
    best = sum(1 / math.log2(rank + 1) for rank in range(1, min(k, len(relevant)) + 1))
    return gained / best


def scores_of(query: RankedQuery, cutoffs: Sequence[int]) -> dict[str, float]:
    """Each metric at each cut-off, as `ndcg@10`. `hit@k`: whether an answer stands in one of the first k passages."""
    scores: dict[str, float] = {}
    for k in cutoffs:
        scores[f"mrr@{k}"] = reciprocal_rank(query.found, query.relevant, k)
        scores[f"recall@{k}"] = recall(query.found, query.relevant, k)
        scores[f"ndcg@{k}"] = ndcg(query.found, query.relevant, k)
        scores[f"precision@{k}"] = precision(query.found, query.relevant, k)
        if query.holds_answer is not None:
            scores[f"hit@{k}"] = float(any(query.holds_answer[:k]))
    return scores


def names(cutoffs: Sequence[int]) -> list[str]:
    """The names of all scores, metric by metric."""
    return [f"{metric}@{k}" for metric in METRICS for k in cutoffs]


def summarise(queries: Sequence[RankedQuery], cutoffs: Sequence[int], seed: int = 0) -> dict[str, dict[str, Any]]:
    """Task -> score -> `Estimate`, with 95 % bootstrap intervals; `all` is over the queries of all tasks."""
    scored = [(query, scores_of(query, cutoffs)) for query in queries]
    tasks = ["all", *sorted({query.task for query in queries})]
    summary: dict[str, dict[str, Any]] = {}
    for task in tasks:
        own = [(query, scores) for query, scores in scored if task in ("all", query.task)]
        summary[task] = {}
        for name in names(cutoffs):
            known = [(scores[name], query.group) for query, scores in own if name in scores]
            if known:
                values, groups = zip(*known, strict=True)
                summary[task][name] = bootstrap_mean(values, groups, seed)
    return summary


def compare(
    new: Sequence[RankedQuery], old: Sequence[RankedQuery], cutoffs: Sequence[int], seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Task -> score -> what `new` has over `old` on the same queries, with its paired bootstrap interval.

    Raises `ValueError` when the two did not answer the same queries.
    """
    before: Mapping[str, RankedQuery] = {query.id: query for query in old}
    if [query.id for query in new] != list(before):
        raise ValueError("a paired comparison needs the same queries in the same order")
    tasks = ["all", *sorted({query.task for query in new})]
    scored = [(query, scores_of(query, cutoffs), scores_of(before[query.id], cutoffs)) for query in new]
    comparison: dict[str, dict[str, Any]] = {}
    for task in tasks:
        own = [entry for entry in scored if task in ("all", entry[0].task)]
        comparison[task] = {}
        for name in names(cutoffs):
            known = [(after[name] - was[name], query.group) for query, after, was in own if name in after]
            if known:
                differences, groups = zip(*known, strict=True)
                comparison[task][name] = bootstrap_mean(differences, groups, seed)
    return comparison
