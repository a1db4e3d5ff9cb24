"""BoolQ (Clark et al., 2019, arXiv 1905.10044): yes/no questions about Wikipedia passages.

The original and the Hub's copy have `answer`, true or false; SuperGLUE's has `label`, 1, 0, or -1 for unknown.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, StrictBool

from alignkit.core.records import Dropped
from alignkit.data.sources.raw import Format, RawRow
from alignkit.data.sources.short_answers import ShortAnswer, usable


class _BoolQ(BaseModel):
    question: str
    passage: str
    answer: StrictBool


def read_short_answer(raw: RawRow) -> ShortAnswer | Dropped:
    """A row with `answer`."""
    row = raw.record(_BoolQ)
    short = ShortAnswer(
        id=raw.id,
        question=row.question,
        paragraphs=[row.passage],
        answers=["yes" if row.answer else "no"],
        reasoning="thought",
        dataset="boolq",
    )
    return usable(raw, short)


def read_labelled(raw: RawRow) -> ShortAnswer | Dropped:
    """A row with `label`."""
    label: Any = raw.fields["label"]
    if label == -1:
        return raw.drop("no short answer", f"{raw.place}: label -1")
    answer = {0: False, 1: True}.get(label, label) if isinstance(label, int) else label
    return read_short_answer(RawRow(raw.place, raw.id, {**raw.fields, "answer": answer}))


FORMATS = (
    Format("BoolQ", ("question", "passage", "answer"), read_short_answer),
    Format("BoolQ of SuperGLUE", ("question", "passage", "label"), read_labelled),
)
