"""One ranking from several, and what every engine makes of its rankings."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from alignkit.core.retrieval_config import SearchMode
from alignkit.retrieval.base import Found, Passage

RRF_K = 60
"""The constant of reciprocal rank fusion that its authors found, and nearly everyone keeps."""

Ranking = list[tuple[str, float]]
"""Ids of passages with their scores, best first, equal scores by id."""


class Rankings(Protocol):
    """What an engine must be able to do to search in every mode. `documents` leaves only passages of these."""

    def by_words(self, queries: Sequence[str], k: int, documents: Collection[str] | None) -> list[Ranking]:
        """By BM25, at most `k` a query, all above zero."""

    def by_vectors(self, queries: Sequence[str], k: int, documents: Collection[str] | None) -> list[Ranking]:
        """By cosine, at most `k` a query."""

    def passages(self, ids: Collection[str]) -> Mapping[str, Passage]:
        """The passages of these ids."""


def reciprocal_rank_fusion(rankings: Sequence[Sequence[str]], rrf_k: int = RRF_K) -> Ranking:
    """Ids by the sum over the rankings of 1 / (rrf_k + rank), ranks from 1 (Cormack, Clarke and Buettcher, SIGIR 2009).

    Equal sums stand by id. An id that a ranking does not have gets nothing from it.
    """
    scores: dict[str, float] = {}
    for ranking in rankings:
        for rank, id in enumerate(ranking, 1):
            scores[id] = scores.get(id, 0.0) + 1 / (rrf_k + rank)
    return sorted(scores.items(), key=lambda entry: (-entry[1], entry[0]))


def search_rankings(
    engine: Rankings,
    queries: Sequence[str],
    k: int,
    mode: SearchMode,
    *,
    candidates: int,
    rrf_k: int,
    documents: Collection[str] | None,
) -> list[list[Found]]:
    """For each query its at most `k` best passages, by words, by vectors, or by both rankings fused.

    Fused are the `candidates` best of each, or `k` when that is more.
    """
    if k < 1 or not queries:
        return [[] for _ in queries]
    depth = k if mode is not SearchMode.hybrid else max(k, candidates)
    sides: list[list[Ranking]] = []
    if mode is not SearchMode.dense:
        sides.append(engine.by_words(queries, depth, documents))
    if mode is not SearchMode.bm25:
        sides.append(engine.by_vectors(queries, depth, documents))
    if len(sides) == 1:
        ranked = sides[0]
    else:
        ranked = [
            reciprocal_rank_fusion([[id for id, _ in ranking] for ranking in rankings], rrf_k)[:k]
            for rankings in zip(*sides, strict=True)
        ]
    passages = engine.passages({id for ranking in ranked for id, _ in ranking})
    return [[Found(passages[id], score) for id, score in ranking if id in passages] for ranking in ranked]
