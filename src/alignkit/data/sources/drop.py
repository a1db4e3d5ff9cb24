"""DROP (Dua et al., 2019, arXiv 1903.00161): questions that take counting, adding or comparing over a passage.

The original file nests questions in passages; the Hub's copy has a row a question. An answer is a number, a date or
one or more spans, all of which belong to it. (The Hub's validation split runs the answers of several annotators
together, so that there all their wordings are asked for; its train split and the original file do not.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from alignkit.core.records import Dropped
from alignkit.data.jsonl import Placed, to_record
from alignkit.data.sources.raw import Format, RawRow
from alignkit.data.sources.short_answers import ShortAnswer, usable


class _Date(BaseModel):
    day: str = ""
    month: str = ""
    year: str = ""


class _Answer(BaseModel):
    number: str = ""
    date: _Date = _Date()
    spans: list[str] = []

    @property
    def parts(self) -> list[str]:
        """The number, the spans, or the date: the first that there is."""
        date = " ".join(part for part in (self.date.day, self.date.month, self.date.year) if part)
        return [self.number] if self.number else self.spans or ([date] if date else [])


class _Question(BaseModel):
    question: str
    passage: str
    answer: _Answer


class _Spans(BaseModel):
    spans: list[str]


class _HubQuestion(BaseModel):
    question: str
    passage: str
    answers_spans: _Spans


class _Passage(BaseModel):
    passage: str
    qa_pairs: list[dict[str, Any]]


def is_nested(whole: Mapping[str, Any]) -> bool:
    """Whether a JSON object is a file of DROP."""
    return any(isinstance(each, dict) and "passage" in each and "qa_pairs" in each for each in whole.values())


def flatten(path: str, whole: Mapping[str, Any]) -> Iterator[Placed]:
    """The questions of a file, each with its passage. Raises `UserError` that names the passage that is ill-formed."""
    for name, fields in whole.items():
        place = f"{path}:{name}"
        passage = to_record(place, fields, _Passage)
        for question in passage.qa_pairs:
            named = {"id": question["query_id"]} if "query_id" in question else {}
            yield place, {**named, **question, "section_id": name, "passage": passage.passage}


def read_short_answer(raw: RawRow) -> ShortAnswer | Dropped:
    """A question of the original file."""
    row = raw.record(_Question)
    return _short_answer(raw, row.question, row.passage, row.answer.parts)


def read_hub(raw: RawRow) -> ShortAnswer | Dropped:
    """A question of the Hub's copy."""
    row = raw.record(_HubQuestion)
    return _short_answer(raw, row.question, row.passage, row.answers_spans.spans)


def _short_answer(raw: RawRow, question: str, passage: str, parts: list[str]) -> ShortAnswer | Dropped:
    short = ShortAnswer(
        id=str(raw.fields.get("query_id") or raw.id),
        question=question,
        paragraphs=[passage],
        answers=list(dict.fromkeys(parts)),
        every=True,
        reasoning="arithmetic",
        dataset="drop",
    )
    return usable(raw, short)


FORMATS = (
    Format("DROP of the Hub", ("question", "passage", "answers_spans"), read_hub),
    Format("DROP", ("question", "passage", "answer", "query_id"), read_short_answer),
)
