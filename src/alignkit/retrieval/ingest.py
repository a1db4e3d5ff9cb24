"""What every engine does when passages come in: blocks, digests, and no id twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import TypeVar

from alignkit.core.errors import UserError
from alignkit.retrieval.base import Passage

Value = TypeVar("Value", str, int)

BLOCK = 1000
"""Passages that are stored at once: what a kill can cost."""


def digest(passage: Passage) -> str:
    """Hexadecimal; two passages with one digest are the same, and one that is held already is not embedded again."""
    fields = [passage.text, passage.title, passage.document, passage.page]
    return hashlib.sha256(json.dumps(fields).encode()).hexdigest()[:32]


def blocks(passages: Iterable[Passage], size: int = BLOCK) -> Iterator[list[Passage]]:
    """The passages in lists of at most `size`; of several with one id in a list the last."""
    block: dict[str, Passage] = {}
    for passage in passages:
        block.pop(passage.id, None)
        block[passage.id] = passage
        if len(block) == size:
            yield list(block.values())
            block = {}
    if block:
        yield list(block.values())


def some_at_a_time(values: Iterable[Value], size: int = BLOCK) -> Iterator[list[Value]]:
    """Ids, or numbers, in lists of at most `size`, none twice in one list."""
    block: dict[Value, None] = {}
    for value in values:
        block[value] = None
        if len(block) == size:
            yield list(block)
            block = {}
    if block:
        yield list(block)


def without_repeats(passages: Iterable[Passage], seen: set[str]) -> Iterator[Passage]:
    """The passages, their ids put into `seen`. Raises `UserError` for an id that is there already."""
    for passage in passages:
        if passage.id in seen:
            raise UserError(f"two passages have the id {passage.id!r}: give each an id of its own")
        seen.add(passage.id)
        yield passage
