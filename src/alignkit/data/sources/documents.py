"""Rows of the recipe `documents`: a question, the passages that are shown with it, and the answer."""

from __future__ import annotations

from pydantic import BaseModel

from alignkit.core.records import Dropped, QAExample
from alignkit.data.sources.raw import RawRow

FIELDS = ("question", "context", "answer", "chunks_rag")
"""What a row of this format has."""


class _Fields(BaseModel):
    question: str
    context: str
    answer: str
    parents: list[str] = []
    source: str = ""


def read_question(raw: RawRow) -> QAExample | Dropped:
    """The context as the statement. The row's system message is left to whoever trains on it."""
    row = raw.record(_Fields)
    if not row.question.strip():
        return raw.drop("no question")
    return QAExample(
        id=raw.id,
        parents=row.parents,
        instruction=row.context,
        input=row.question,
        output=row.answer,
        source=row.source,
    )
