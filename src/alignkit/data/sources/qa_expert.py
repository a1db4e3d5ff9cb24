"""QA-Expert's records: a question, the sub-questions it falls into, and the answer to each from a paragraph of its own.

Two forms are about, and both are read: the older has `src`; the newer has `multihop`, `tag` and `meta_info`, too.
Nothing is lost between reading a record and writing it: fields that are not named here stay in their place.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from alignkit.core.records import Dropped, QAExample, Row
from alignkit.data.sources.raw import RawRow

FIELDS = ("question", "sub_questions", "final_answer")
VERDICTS = ("yes", "no")


class SubQuestion(BaseModel):
    """A question that one paragraph answers, or that `paragraph` leaves open although it was found for it.

    `answer` is the short answer, `long_answer` the whole one.
    """

    model_config = ConfigDict(extra="allow", strict=True, defer_build=True)

    question: str
    paragraph: str
    long_answer: str
    answer: str | None = None
    unanswerable: bool | None = None


class MultihopExample(Row):
    """A question that is answered by way of `sub_questions`: `final_answer` whole, `answer` short."""

    question: str
    sub_questions: list[SubQuestion]
    final_answer: str
    answer: str | None = None
    multihop: bool | None = None
    src: str | None = None
    tag: str | None = None
    meta_info: dict[str, Any] = Field(default_factory=dict)

    @property
    def takes_several_steps(self) -> bool:
        """The newer form says so; in the older one it is a question with several sub-questions."""
        return self.multihop if self.multihop is not None else len(self.sub_questions) > 1


def read_record(raw: RawRow) -> MultihopExample | Dropped:
    """A record of either form."""
    example = raw.record(MultihopExample, id=raw.id)
    if not example.question.strip():
        return raw.drop("empty question")
    if not example.sub_questions:
        return raw.drop("no sub-question")
    return example


def read_question(raw: RawRow) -> QAExample | Dropped:
    """The record as one question: the statement is all its paragraphs, the answer the final one."""
    example = read_record(raw)
    if isinstance(example, Dropped):
        return example
    short = (example.answer or "").strip().casefold()
    return QAExample(
        id=example.id,
        parents=example.parents,
        instruction="\n".join(dict.fromkeys(each.paragraph for each in example.sub_questions)),
        input=example.question,
        output=example.final_answer,
        kind="judgmental" if short in VERDICTS else "non_judgmental" if short else None,
        source=example.tag or example.src or "qa-expert",
    )


def record(example: MultihopExample) -> dict[str, Any]:
    """The record to write: exactly the fields that were read or set, in QA-Expert's names, and the row's id."""
    return example.model_dump(mode="json", exclude_unset=True)
