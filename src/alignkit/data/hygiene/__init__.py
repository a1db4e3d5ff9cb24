"""Which rows are fit to be selected at all: tests of texts, each in a file of its own, and `clean`, which runs them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Match:
    """Another row, by its position, and how much is shared with it (0 to 1)."""

    row: int
    similarity: float
