"""What the engines on a server share: the calls of a `Retriever`, over what each engine says in its server's words."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import numpy.typing as npt

from alignkit.core.errors import UserError
from alignkit.core.retrieval_config import SearchMode
from alignkit.retrieval.base import Found, Passage
from alignkit.retrieval.embedder import RetrievalEmbedder, require_embedder
from alignkit.retrieval.fusion import Ranking, search_rankings
from alignkit.retrieval.ingest import blocks, digest, some_at_a_time, without_repeats

Vector = npt.NDArray[np.float32]


class ServerIndex(ABC):
    """A `Retriever` whose passages are on a server. `embedder` is needed for every mode but bm25.

    An engine connects in its constructor and then looks whether its index is there (`_look`). It is made with the first
    passages; everything else raises `UserError` where there is none, and for an index of another embedder.
    """

    NOUN: str
    """What the server calls an index."""

    def __init__(
        self,
        url: str,
        name: str,
        embedder: RetrievalEmbedder | None,
        mode: SearchMode,
        *,
        candidates: int,
        rrf_k: int,
        approximate: bool,
    ) -> None:
        self.url, self.name, self.mode, self.approximate = url, name, mode, approximate
        self.embedder = embedder if mode is not SearchMode.bm25 else None
        self.candidates, self.rrf_k = candidates, rrf_k
        self._made = False

    def __len__(self) -> int:
        with self._explained():
            self._require()
            return self._count()

    def index(self, passages: Iterable[Passage]) -> None:
        """Hold these passages and no others; those that are there already, unchanged, cost next to nothing."""
        seen: set[str] = set()
        self.add(without_repeats(passages, seen))
        with self._explained():
            held = [id for id in self._all_ids() if id not in seen]
        self.delete(held)

    def add(self, passages: Iterable[Passage]) -> None:
        """Hold these as well, block by block. Raises `UserError` for passages that the server refuses."""
        with self._explained():
            self._make_ready()
            for block in blocks(passages):
                self._add(block)
            self._finish()
        if self.embedder is not None:
            self.embedder.warn_of_cut()

    def delete(self, ids: Iterable[str]) -> None:
        """Hold these no longer."""
        with self._explained():
            self._require()
            for block in some_at_a_time(ids):
                self._remove(block)

    def search(self, queries: Sequence[str], k: int, documents: Collection[str] | None = None) -> list[list[Found]]:
        """For each query its at most `k` best passages; `documents` leaves only passages of these documents."""
        with self._explained():
            self._require()
            return search_rankings(
                self, queries, k, self.mode, candidates=self.candidates, rrf_k=self.rrf_k, documents=documents
            )

    def _add(self, block: Sequence[Passage]) -> None:
        held = self._digests([passage.id for passage in block])
        digests = [digest(passage) for passage in block]
        new = [(each, own) for each, own in zip(block, digests, strict=True) if held.get(each.id) != own]
        if not new:
            return
        vectors: Sequence[Vector | None] = [None] * len(new)
        if self.embedder is not None:
            embedded = self.embedder.embed_passages([passage for passage, _ in new])
            vectors = [vector if vector.any() else None for vector in embedded]
        self._store([(passage, own, vector) for (passage, own), vector in zip(new, vectors, strict=True)])

    def _make_ready(self) -> None:
        """Make the index unless it is there. Raises `UserError` for passages without vectors beside some with them."""
        if not self._made:
            self._create()
            self._made = True
            self._check_embedder()
        if self.embedder is None and self._settings():
            raise UserError(
                f"{self.name} holds vectors, which passages that are added need as well: set retrieval.embedder"
            )

    def _check_embedder(self) -> None:
        """Raise `UserError` when the vectors that are there are another embedder's, or there are none."""
        if self.embedder is not None:
            settings = self._settings()
            built_by = settings.get("embedder", ""), settings.get("name", "")
            require_embedder(f"the {self.NOUN} {self.name}", *built_by, self.embedder)

    def _look(self) -> bool:
        """Whether the index is there by now. Raises `UserError` when it is another embedder's."""
        found = self._exists()
        if found:
            self._check_embedder()
        return found

    def _require(self) -> None:
        self._made = self._made or self._look()
        if not self._made:
            raise UserError(f"{self._place} has no index {self.name}. Make one with python -m alignkit.index")

    # -- what an engine says ----------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def _place(self) -> str:
        """The server, for messages: nothing secret."""

    @abstractmethod
    def _explained(self) -> AbstractContextManager[None]:
        """Inside it the client's errors become `UserError`."""

    @abstractmethod
    def _exists(self) -> bool:
        """Whether the index is there."""

    @abstractmethod
    def _create(self) -> None:
        """Make the index, with a place for vectors where there is an embedder; another process may be faster."""

    @abstractmethod
    def _settings(self) -> dict[str, str]:
        """`embedder` (its key) and `name` of the embedder whose vectors the index holds; empty without vectors."""

    @abstractmethod
    def _count(self) -> int:
        """How many passages there are."""

    @abstractmethod
    def _all_ids(self) -> Iterable[str]:
        """The ids of all passages."""

    @abstractmethod
    def _digests(self, ids: Sequence[str]) -> Mapping[str, Any]:
        """The digests of the passages of these ids that are there."""

    @abstractmethod
    def _store(self, rows: Sequence[tuple[Passage, str, Vector | None]]) -> None:
        """Put in passages with their digests and vectors, in the place of those that have their ids."""

    @abstractmethod
    def _remove(self, ids: Sequence[str]) -> None:
        """Take out the passages of these ids that are there."""

    @abstractmethod
    def _finish(self) -> None:
        """After the last block: let what was stored be found."""

    @abstractmethod
    def by_words(self, queries: Sequence[str], k: int, documents: Collection[str] | None) -> list[Ranking]:
        """By BM25, at most `k` a query, all above zero."""

    @abstractmethod
    def by_vectors(self, queries: Sequence[str], k: int, documents: Collection[str] | None) -> list[Ranking]:
        """By cosine, at most `k` a query; a query of zeros is similar to nothing."""

    @abstractmethod
    def passages(self, ids: Collection[str]) -> Mapping[str, Passage]:
        """The passages of these ids that are there."""
