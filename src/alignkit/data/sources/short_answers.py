"""Questions with short answers: one row type for SQuAD, BoolQ, DROP, MuSiQue, HotpotQA and rows of our own."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from alignkit.core.records import Dropped, Row
from alignkit.data.sources.raw import RawRow

VERDICTS = ("yes", "no")


class ShortSubQuestion(BaseModel):
    """A step towards a short answer: its question with earlier answers filled in, its answer and its paragraph."""

    model_config = ConfigDict(extra="allow", strict=True, defer_build=True)

    question: str
    answer: str = ""
    paragraph: str
    unanswerable: bool = False


class ShortAnswer(Row):
    """A question about paragraphs, and its short answer.

    `answers` are different wordings of one answer, or, with `every`, the parts of it. An `unanswerable` question has
    none; `plausible` are the answers that a careless reader would give to it. `reasoning` is what a full answer is to
    have besides: a thought (where the answer is yes or no), or a thought and an arithmetic operation.
    """

    question: str
    paragraphs: list[str] = Field(min_length=1)
    answers: list[str] = Field(default_factory=list)
    every: bool = False
    unanswerable: bool = False
    plausible: list[str] = Field(default_factory=list)
    reasoning: Literal["none", "thought", "arithmetic"] = "none"
    sub_questions: list[ShortSubQuestion] = Field(default_factory=list)
    dataset: str = ""

    @property
    def verdict(self) -> str | None:
        """The answer of a yes/no question; None for any other."""
        found = {answer.strip().casefold() for answer in self.answers}
        return found.pop() if len(found) == 1 and found <= set(VERDICTS) else None


def usable(raw: RawRow, row: ShortAnswer) -> ShortAnswer | Dropped:
    """The row, unless there is nothing to ask or to answer with."""
    if not row.question.strip():
        return raw.drop("empty question")
    if not any(paragraph.strip() for paragraph in row.paragraphs):
        return raw.drop("empty context")
    if not row.unanswerable and not any(answer.strip() for answer in row.answers):
        return raw.drop("no short answer")
    return row
