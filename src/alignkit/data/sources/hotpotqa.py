"""HotpotQA (Yang et al., 2018, arXiv 1809.09600): questions that need two Wikipedia paragraphs."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from alignkit.core.records import Dropped, QAExample
from alignkit.data.sources.raw import RawRow

FIELDS = ("question", "answer", "context", "supporting_facts")


class HotpotQA(BaseModel):
    """A row of HotpotQA; `context` and `supporting_facts` as pairs (see `as_pairs`)."""

    question: str
    answer: str
    context: list[tuple[str, list[str]]]
    supporting_facts: list[tuple[str, int]]


def read_question(raw: RawRow, paragraphs: str = "gold") -> QAExample | Dropped:
    """The statement is the row's paragraphs, `gold` (those that support the answer) or `all` (with the distractors).

    A yes/no question is judgmental.
    """
    pairs = {name: as_pairs(raw.fields[name]) for name in ("context", "supporting_facts")}
    row = raw.record(HotpotQA, **pairs)
    supporting = {title for title, _ in row.supporting_facts}
    if not supporting or supporting - {title for title, _ in row.context}:
        return raw.drop("a supporting paragraph is missing")
    statement = "\n".join(
        f"{title}: {''.join(sentences).strip()}"
        for title, sentences in row.context
        if paragraphs == "all" or title in supporting
    )
    if not row.question.strip():
        return raw.drop("empty question")
    return QAExample(
        id=raw.id,
        instruction=statement,
        input=row.question,
        output=row.answer,
        kind="judgmental" if row.answer in ("yes", "no") else "non_judgmental",
        source="hotpotqa",
    )


def as_pairs(value: Any) -> Any:
    """The Hub's copy holds parallel lists, `title` and another, where the original file holds pairs; else unchanged."""
    if not isinstance(value, dict) or len(value) != 2 or "title" not in value:
        return value
    (other,) = (column for name, column in value.items() if name != "title")
    return list(zip(value["title"], other, strict=True)) if _same_length(value["title"], other) else value


def _same_length(left: Any, right: Any) -> bool:
    return isinstance(left, list) and isinstance(right, list) and len(left) == len(right)
