"""MuSiQue (Trivedi et al., 2022, arXiv 2108.00573): questions of two to four steps, each answered by a paragraph.

A later sub-question refers to an earlier answer as `#1`, which is filled in. Some sub-questions are no questions but
relations ("Green >> performer"): such a row is dropped. In an unanswerable row the paragraph of at least one step has
been taken away; that step gets the most similar paragraph that is left, and the steps that rest on it are left out.
"""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel

from alignkit.core.records import Dropped
from alignkit.data.sources.raw import Format, RawRow
from alignkit.data.sources.short_answers import ShortAnswer, ShortSubQuestion, usable
from alignkit.data.wording import contains, tokens

_REFERENCE = re.compile(r"#(\d+)")


class _Paragraph(BaseModel):
    idx: int
    title: str = ""
    paragraph_text: str

    @property
    def text(self) -> str:
        """Title and text, as QA-Expert writes them."""
        return f"{self.title}. {self.paragraph_text}" if self.title else self.paragraph_text


class _Step(BaseModel):
    question: str
    answer: str
    paragraph_support_idx: int | None = None


class _MuSiQue(BaseModel):
    question: str
    answer: str = ""
    answer_aliases: list[str] = []
    answerable: bool = True
    paragraphs: list[_Paragraph]
    question_decomposition: list[_Step]


def with_own_id(fields: dict[str, Any]) -> dict[str, Any]:
    """The row with an id that no other has: in MuSiQue-Full an unanswerable row has that of its answerable twin."""
    if "question_decomposition" in fields and fields.get("answerable") is False and "id" in fields:
        return {**fields, "id": f"{fields['id']}-unanswerable"}
    return fields


def read_short_answer(raw: RawRow) -> ShortAnswer | Dropped:
    """A row of MuSiQue-Answerable or MuSiQue-Full."""
    row = raw.record(_MuSiQue)
    for step in row.question_decomposition:
        if ">>" in step.question:
            return raw.drop("ill-formed sub-question", step.question)
    steps = _sub_questions(row)
    if isinstance(steps, str):
        return raw.drop(steps)
    if row.answerable == any(step.unanswerable for step in steps):
        return raw.drop(
            "sub-question without paragraph" if row.answerable else "unanswerable, yet every sub-question is answered"
        )
    short = ShortAnswer(
        id=raw.id,
        question=row.question,
        paragraphs=list(dict.fromkeys(step.paragraph for step in steps)) or [""],
        answers=list(dict.fromkeys([row.answer, *row.answer_aliases])) if row.answerable else [],
        unanswerable=not row.answerable,
        plausible=[] if row.answerable else [row.answer],
        sub_questions=steps,
        dataset="musique",
    )
    return usable(raw, short)


def _sub_questions(row: _MuSiQue) -> list[ShortSubQuestion] | str:
    """The steps that can be taken; a reason when a reference or a paragraph number leads nowhere."""
    texts = {paragraph.idx: paragraph.text for paragraph in row.paragraphs}
    steps: list[ShortSubQuestion] = []
    lost: set[int] = set()
    for number, step in enumerate(row.question_decomposition, 1):
        references = {int(reference) for reference in _REFERENCE.findall(step.question)}
        if not references <= set(range(1, number)):
            return "sub-question refers to a step that is not before it"
        if references & lost:
            lost.add(number)
            continue
        question = _REFERENCE.sub(lambda match: row.question_decomposition[int(match[1]) - 1].answer, step.question)
        if step.paragraph_support_idx is None:
            lost.add(number)
            paragraph = _most_similar(question, step.answer, list(texts.values()))
        else:
            paragraph = texts.get(step.paragraph_support_idx)
        if paragraph is None:
            return "sub-question without paragraph"
        open_step = number in lost
        steps.append(
            ShortSubQuestion(
                question=question, answer="" if open_step else step.answer, paragraph=paragraph, unanswerable=open_step
            )
        )
    return steps


def _most_similar(question: str, answer: str, paragraphs: list[str]) -> str | None:
    """The paragraph without the answer that has the most words of the question; the first of several."""
    words = set(tokens(question))
    without = [paragraph for paragraph in paragraphs if not contains(paragraph, answer)]
    return max(without, key=lambda paragraph: len(words & set(tokens(paragraph))), default=None)


FORMATS = (Format("MuSiQue", ("question", "paragraphs", "question_decomposition"), read_short_answer),)
