"""Self-instruct for questions about statements: what to ask for one new example, and how to read it.

After Wang et al., 2022 (arXiv 2212.10560): a few old examples are shown and a new one is asked for. There an example
is a task with an input and an output; here the statement takes the place of the instruction, the question that of the
input and the answer that of the output, and one request asks for one example, of a kind that is drawn beforehand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from alignkit.core.records import Message, QAExample
from alignkit.teacher.client import Request
from alignkit.teacher.prompts import render
from alignkit.teacher.recipes.reading import read_object

STATEMENT_CHARACTERS = (15, 4000)
"""Shortest and longest statement. Characters, because words cannot be counted by spaces in every language."""
QUESTION_CHARACTERS = 500
QUESTION_MARKS = ("?", "？")


@dataclass(frozen=True)
class NewExample:
    """What a teacher wrote. `answer` is empty when only a question was asked for."""

    statement: str
    question: str
    answer: str


@dataclass(frozen=True)
class Unusable:
    """Why an answer gives no example: a reason to count by, and the particulars."""

    reason: str
    detail: str = ""


def expand_request(examples: Sequence[QAExample], kind: str, *, answers: bool, sample: int = 0) -> Request:
    """Show `examples` and ask for a new one of `kind`, "judgmental" or "non_judgmental", with or without an answer."""
    shown = [_shown(example, answers) for example in examples]
    prompt = render("expand", examples=shown, kind=kind, answers=answers)
    messages = [Message(role="system", content=render("expand_system")), Message(role="user", content=prompt)]
    return Request(messages, sample=sample)


def read_example(text: str, *, answers: bool) -> NewExample | Unusable:
    """The example in a teacher's answer; white space at the ends of its parts is not kept."""
    found = read_object(text)
    if isinstance(found, str):
        return Unusable(found, text[:200])
    wanted = ("statement", "question", "answer") if answers else ("statement", "question")
    for part in wanted:
        if not isinstance(found.get(part), str) or not found[part].strip():
            return Unusable(f"{part} missing", text[:200])
    statement, question = found["statement"].strip(), found["question"].strip()
    lowest, highest = STATEMENT_CHARACTERS
    if not lowest <= len(statement) <= highest:
        return Unusable("statement too short or too long", f"{len(statement)} characters")
    if len(question) > QUESTION_CHARACTERS:
        return Unusable("question too long", f"{len(question)} characters")
    if not question.endswith(QUESTION_MARKS):
        return Unusable("question without question mark", question)
    return NewExample(statement, question, found["answer"].strip() if answers else "")


def _shown(example: QAExample, answers: bool) -> dict[str, str]:
    shown = {"kind": example.kind or "unknown", "statement": example.instruction, "question": example.input}
    return {**shown, "answer": example.output} if answers else shown
