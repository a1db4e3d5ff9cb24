"""Scoring many rows so that a kill costs one block of them."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence

from alignkit.core.journal import Journal
from alignkit.core.progress import progress
from alignkit.core.records import CompletionSet, Message
from alignkit.scoring.base import Scorer

LOG = logging.getLogger("alignkit")

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
            journal.add(id, list(_finite(score, reason)))
        for id, _ in some:
            score, reason = journal.done[id]
            yield score, reason


def score_completions(
    scorer: Scorer, rows: Sequence[CompletionSet], journal: Journal, block: int, noun: str = "score"
) -> list[CompletionSet]:
    """The rows with a score for each finished completion, or None; unfinished ones have None.

    Journalled by row, `block` rows at a time: a block that is not there as a whole is scored anew as a whole, so that
    an interrupted run ends with the very scores of one that was not. The journal's fingerprint must name the scorer and
    the completions' texts. Why scores are missing goes to the log, under the `noun` they are called by there.
    """
    blocks = [rows[start : start + block] for start in range(0, len(rows), block)]
    for some in progress(blocks, f"{noun} completions", total=len(blocks)):
        if all(row.id in journal.done for row in some):
            continue
        answers = [
            [*row.prompt, Message(role="assistant", content=completion.text)]
            for row in some
            for completion in row.completions
            if completion.finished
        ]
        scores = scorer.score(answers) if answers else []
        found = iter(zip(scores, scorer.reasons if answers else [], strict=True))
        for row in some:
            journal.add(row.id, [_finite(*next(found)) if each.finished else (None, None) for each in row.completions])
    missing = [reason for row in rows for _, reason in journal.done[row.id] if reason]
    if missing:
        count = sum(completion.finished for row in rows for completion in row.completions)
        LOG.warning("%d of %d completions have no %s, the first because: %s", len(missing), count, noun, missing[0])
    return [
        row.model_copy(
            update={
                "completions": [
                    completion.model_copy(update={"score": score})
                    for completion, (score, _) in zip(row.completions, journal.done[row.id], strict=True)
                ]
            }
        )
        for row in rows
    ]


def _finite(score: float | None, reason: str | None) -> Score:
    """A score, or None with the reason, also where the score is not a finite number."""
    return (score, reason) if score is None or math.isfinite(score) else (None, NOT_A_NUMBER)
