"""SQuAD 1.1 and 2.0 (Rajpurkar et al., 2018, arXiv 1806.03822): spans of Wikipedia paragraphs, and, in 2.0, no answer.

The original file nests questions in paragraphs in articles; the Hub's copy has a row a question. A question is
unanswerable where the file says so (`is_impossible`) or gives no answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from alignkit.core.records import Dropped
from alignkit.data.jsonl import Placed, to_record
from alignkit.data.sources.raw import Format, RawRow
from alignkit.data.sources.short_answers import ShortAnswer, usable

FIELDS = ("question", "context", "answers")


class _Span(BaseModel):
    text: str


class _Question(BaseModel):
    question: str
    context: str
    answers: list[_Span]
    is_impossible: bool = False
    plausible_answers: list[_Span] = []


class _Paragraph(BaseModel):
    context: str
    qas: list[dict[str, Any]]


class _Article(BaseModel):
    title: str = ""
    paragraphs: list[_Paragraph]


def is_nested(whole: Mapping[str, Any]) -> bool:
    """Whether a JSON object is a file of SQuAD."""
    articles = whole.get("data")
    return isinstance(articles, list) and any(isinstance(each, dict) and "paragraphs" in each for each in articles)


def flatten(path: str, whole: Mapping[str, Any]) -> Iterator[Placed]:
    """The questions of a file, each with its paragraph. Raises `UserError` for an ill-formed article."""
    for number, fields in enumerate(whole["data"], 1):
        article = to_record(f"{path}:article {number}", fields, _Article)
        for index, paragraph in enumerate(article.paragraphs, 1):
            place = f"{path}:article {number}, paragraph {index}"
            for question in paragraph.qas:
                yield place, {**question, "title": article.title, "context": paragraph.context}


def read_short_answer(raw: RawRow) -> ShortAnswer | Dropped:
    """A question of either form."""
    answers = raw.fields["answers"]
    if isinstance(answers, dict):  # the Hub's copy holds parallel lists
        answers = [{"text": text} for text in answers.get("text", [])]
    row = raw.record(_Question, answers=answers)
    unanswerable = row.is_impossible or not row.answers
    short = ShortAnswer(
        id=raw.id,
        question=row.question,
        paragraphs=[row.context],
        answers=[] if unanswerable else _texts(row.answers),
        unanswerable=unanswerable,
        plausible=_texts(row.plausible_answers),
        dataset="squad",
    )
    return usable(raw, short)


def _texts(spans: list[_Span]) -> list[str]:
    return list(dict.fromkeys(span.text for span in spans))


FORMATS = (Format("SQuAD", FIELDS, read_short_answer),)
