"""Scoring many rows so that a kill costs one block of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from alignkit.core.journal import Journal
from alignkit.core.progress import progress
from alignkit.core.records import Message
from alignkit.scoring.base import Scorer

Score = tuple[float | None, str | None]
"""A score and None, or None and the reason why there is none."""

NOT_A_NUMBER = "score is not a number"


def score_all(
    scorer: Scorer, rows: Sequence[tuple[str, list[Message]]], journal: Journal, block: int = 256
) -> list[Score]:
    """The score of each row, given by its id and its conversation, in the rows' order.

    What is in the journal is not scored again; each finished block is in it before the next one begins. The journal's
    fingerprint must name the scorer and the rows' contents: an id alone does not say that a text is still the same. A
    score that is not a finite number becomes None, with a reason. Raises `ValueError` when two rows have one id.
    """
    if len({id for id, _ in rows}) < len(rows):
        raise ValueError("two rows have the same id")
    return list(progress(_score_blocks(scorer, rows, journal, block), "score rows", len(rows)))


def _score_blocks(
    scorer: Scorer, rows: Sequence[tuple[str, list[Message]]], journal: Journal, block: int
) -> Iterator[Score]:
    """Each row's score. Blocks begin at the same rows in every run, whatever the journal holds."""
    for start in range(0, len(rows), block):
        some = rows[start : start + block]
        missing = [(id, conversation) for id, conversation in some if id not in journal.done]
        scores = scorer.score([conversation for _, conversation in missing]) if missing else []
        for (id, _), score, reason in zip(missing, scores, scorer.reasons if missing else [], strict=True):
            finite = score is None or math.isfinite(score)
            journal.add(id, [score, reason] if finite else [None, NOT_A_NUMBER])
        for id, _ in some:
            score, reason = journal.done[id]
            yield score, reason
