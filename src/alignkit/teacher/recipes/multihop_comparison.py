"""Making a comparison up: what is asked of the teacher, and what is wrong with what comes back.

A comparison is written by one call; each check below is one of QA-Expert's, or keeps a text from being mistaken for
what it is not. Nothing is repaired: a text is used as it was written, hyphens, numbers and signs included, or refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel

from alignkit.core.records import Message
from alignkit.data.wording import QUESTION_MARKS, contains, language_problem, tokens, verdict
from alignkit.teacher.client import Request
from alignkit.teacher.prompts import render

PLACEHOLDER = "entity"
"""The prompt's own word for the two things; a text in which it stands was not thought through."""
QuestionType = Literal["wh", "yes-no"]
Other = Literal["entity", "attribute", "both"]


class Comparison(BaseModel):
    """What a teacher makes up, in the order in which it does; `attributes` is the list that `attribute` is from."""

    entity_1: str
    entity_2: str
    attributes: list[str]
    attribute: str
    question: str
    sub_question_1: str
    sub_question_2: str
    paragraph_1: str
    paragraph_2: str
    answer_1: str
    answer_2: str
    thought: str
    final_answer: str


class Negative(BaseModel):
    """A paragraph that leaves a question open, and what it is about instead."""

    entity: str
    attribute: str
    paragraph: str


@dataclass(frozen=True)
class Replacement:
    """A paragraph (1 or 2) of a comparison that is to be replaced, and what is to be different in the new one."""

    paragraph: int
    other: Other


def comparison_request(
    category: str,
    sub_category: str,
    popularity: int,
    question_type: QuestionType,
    *,
    attribute_number: int,
    other_attributes: int,
    sample: int = 0,
) -> Request:
    """Ask for a whole comparison at temperature 1."""
    prompt = render(
        "multihop_comparison",
        category=category,
        sub_category=sub_category,
        popularity=popularity,
        question_type=question_type,
        attribute_number=attribute_number,
        other_attributes=other_attributes,
    )

    def check(found: Comparison) -> str | None:
        problem = comparison_problem(found, question_type)
        return problem or language_problem(found.question, category, sub_category)

    return Request(_messages(prompt), sample=sample, temperature=1.0, shape=Comparison, check=check)


def comparison_problem(found: Comparison, question_type: QuestionType) -> str | None:
    """What is wrong with a comparison, as "reason: detail"; None when nothing is."""
    for field, value in found:
        if not (value.strip() if isinstance(value, str) else any(each.strip() for each in value)):
            return f"{field} missing"
    entities = (found.entity_1, found.entity_2)
    questions = (found.question, found.sub_question_1, found.sub_question_2)
    paragraphs = (found.paragraph_1, found.paragraph_2)
    if contains(*entities) or contains(*reversed(entities)):
        return f"one thing is named in the other: {entities[0]}, {entities[1]}"
    if found.attribute.strip().casefold() not in {each.strip().casefold() for each in found.attributes}:
        return f"attribute is not in the list: {found.attribute}"
    for text in questions:
        if not text.strip().endswith(QUESTION_MARKS):
            return f"question without question mark: {text}"
    for text in (*entities, *questions, *paragraphs, found.thought, found.final_answer):
        if PLACEHOLDER in tokens(text):
            return f'the word "{PLACEHOLDER}": {text[:100]}'
    if len({tuple(tokens(text)) for text in questions}) < len(questions):
        return "a question is asked twice"
    if tokens(paragraphs[0]) == tokens(paragraphs[1]):
        return "a paragraph is written twice"
    return _naming_problem(found) or _verdict_problem(found, question_type)


def _naming_problem(found: Comparison) -> str | None:
    """Which text names one of the two things where it must not, or fails to where it must."""
    entities = (found.entity_1.strip(), found.entity_2.strip())
    for entity in entities:
        if not contains(found.question, entity):
            return f"question does not name both things: {entity}"
    parts = ((found.sub_question_1, found.paragraph_1), (found.sub_question_2, found.paragraph_2))
    for number, (entity, other, (question, paragraph)) in enumerate(zip(entities, entities[::-1], parts, strict=True)):
        if not contains(question, entity):
            return f"sub-question does not name its thing: {number + 1}, {entity}"
        if contains(question, other):
            return f"sub-question names the other thing: {number + 1}, {other}"
        if not contains(paragraph, entity):
            return f"paragraph does not name its thing: {number + 1}, {entity}"
    return None


def _verdict_problem(found: Comparison, question_type: QuestionType) -> str | None:
    answer = verdict(found.final_answer)
    if question_type == "yes-no" and answer is None:
        return f"final answer is neither yes nor no: {found.final_answer}"
    if question_type == "wh" and answer is not None:
        return f"final answer is yes or no: {found.final_answer}"
    return None


def negative_request(category: str, found: Comparison, replacement: Replacement) -> Request:
    """Ask for a paragraph that leaves a sub-question open."""
    first = replacement.paragraph == 1
    entity = found.entity_1 if first else found.entity_2
    answer = found.answer_1 if first else found.answer_2
    prompt = render(
        "multihop_negative",
        category=category,
        entity=entity,
        attribute=found.attribute,
        question=found.sub_question_1 if first else found.sub_question_2,
        paragraph=found.paragraph_1 if first else found.paragraph_2,
        other=replacement.other,
    )

    def check(negative: Negative) -> str | None:
        return _negative_problem(negative, entity, found.attribute, answer, replacement.other)

    return Request(_messages(prompt), temperature=1.0, shape=Negative, check=check)


def _negative_problem(negative: Negative, entity: str, attribute: str, answer: str, other: Other) -> str | None:
    """What is wrong with a replacement, as "reason: detail"; None when nothing is."""
    if not contains(negative.paragraph, negative.entity):
        return f"negative paragraph does not name what it is about: {negative.entity}"
    if other == "attribute":
        if not contains(negative.paragraph, entity):
            return f"negative paragraph does not name the thing of its question: {entity}"
        if contains(negative.paragraph, answer):
            return f"negative paragraph has the answer: {answer}"
    elif contains(negative.paragraph, entity):
        return f"negative paragraph names the thing of its question: {entity}"
    if other != "entity" and negative.attribute.strip().casefold() == attribute.strip().casefold():
        return f"negative paragraph is about the same attribute: {attribute}"
    return None


def _messages(prompt: str) -> list[Message]:
    return [Message(role="system", content=render("multihop_system")), Message(role="user", content=prompt)]
