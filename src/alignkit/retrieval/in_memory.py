"""The retriever that needs no server: passages in memory, found by BM25."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from alignkit.core.errors import UserError
from alignkit.retrieval.base import Found, Passage
from alignkit.retrieval.bm25 import BM25Index


class BM25Retriever:
    """A `Retriever` by the words of titles and texts; the index is made at the first search after a change."""

    def __init__(self) -> None:
        self._passages: dict[str, Passage] = {}
        self._index: BM25Index | None = None
        self._order: list[Passage] = []

    def index(self, passages: Iterable[Passage]) -> None:
        """Hold these passages and no others. Raises `UserError` when two have one id."""
        held: dict[str, Passage] = {}
        for passage in passages:
            if passage.id in held:
                raise UserError(f"two passages have the id '{passage.id}'; give each one of its own")
            held[passage.id] = passage
        self._passages, self._index = held, None

    def add(self, passages: Iterable[Passage]) -> None:
        """Hold these as well; a passage whose id is there already takes its place."""
        self._passages |= {passage.id: passage for passage in passages}
        self._index = None

    def delete(self, ids: Iterable[str]) -> None:
        """Hold these no longer; an id that is not there is no error."""
        for id in ids:
            self._passages.pop(id, None)
        self._index = None

    def search(self, queries: Sequence[str], k: int) -> list[list[Found]]:
        """For each query its at most `k` best passages, those that share no word with it left out."""
        if self._index is None:
            self._order = sorted(self._passages.values(), key=lambda passage: passage.id)
            self._index = BM25Index([f"{passage.title} {passage.text}" for passage in self._order])
        return [[Found(self._order[hit.index], hit.score) for hit in hits] for hits in self._index.search(queries, k)]

    def __len__(self) -> int:
        return len(self._passages)
