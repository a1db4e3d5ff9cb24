"""What a retriever is: passages in, the best passages for a query out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from pydantic import BaseModel, ConfigDict, Field


class Passage(BaseModel):
    """A piece of text that can be found. `id` is stable: the same piece of the same document keeps it."""

    model_config = ConfigDict(frozen=True)

    id: str = Field(min_length=1)
    text: str
    title: str = ""
    document: str | None = None
    page: int | None = None
    """Page of the document, from 1: what an answer cites."""


@dataclass(frozen=True)
class Found:
    """A passage that was found, and its score: higher is better, comparable within one query only."""

    passage: Passage
    score: float


class Retriever(Protocol):
    """Finds passages. Hits of a query stand best first, equal scores by passage id; none is there twice."""

    def index(self, passages: Iterable[Passage]) -> None:
        """Hold these passages and no others. Raises `UserError` when two have one id."""

    def add(self, passages: Iterable[Passage]) -> None:
        """Hold these as well; a passage whose id is there already takes its place."""

    def delete(self, ids: Iterable[str]) -> None:
        """Hold these no longer; an id that is not there is no error."""

    def search(self, queries: Sequence[str], k: int) -> list[list[Found]]:
        """For each query its at most `k` best passages. A query without a word in common may find none."""

    def __len__(self) -> int:
        """How many passages are held."""
