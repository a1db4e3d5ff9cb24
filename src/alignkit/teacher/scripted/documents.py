"""Scripted rules: questions about pages of the closed world, their scores, and answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from alignkit.core.records import Message
from alignkit.data.closed_world import Fact, Passage, Question, World, read_question
from alignkit.teacher.reading import OUTSIDE
from alignkit.teacher.scripted.answering import write_answer
from alignkit.teacher.scripted.material import read_material
from alignkit.teacher.scripted.raft import read_document


def reply(messages: Sequence[Message], world: World, mistake_rate: float) -> str | None:
    """What the prompts of the recipe `documents` ask for; pages without a sentence of the world are outside it."""
    if (material := read_material(messages, '{"questions"', ("pages", "count"))) is not None:
        facts = read_pages(material)
        return write_questions(world, list(facts), int(material["count"]), mistake_rate) if facts else OUTSIDE
    if (material := read_material(messages, '"coverage"', ("pages", "questions"))) is not None:
        facts = read_pages(material)
        return json.dumps({"scores": [grade(facts, text) for text in material["questions"]]}) if facts else OUTSIDE
    if (material := read_material(messages, '{"global_relevance"', ("outline", "question"))) is not None:
        return json.dumps({"global_relevance": 9 if read_question(str(material["question"])) else 1})
    if (material := read_material(messages, '"cited"', ("pages", "question"))) is not None:
        facts, question = read_pages(material), read_question(str(material["question"]))
        return write_page_answer(world, facts, question, mistake_rate) if facts and question else OUTSIDE
    return None


def read_pages(material: dict[str, Any]) -> dict[Fact, int]:
    """The facts on the pages, each with its page."""
    pages = [page for page in material["pages"] if isinstance(page, dict)]
    return {fact: int(page["page"]) for page in pages for fact in read_document(str(page.get("text")))}


def write_questions(world: World, facts: Sequence[Fact], count: int, mistake_rate: float) -> str:
    """Questions about facts of the pages; a mistaken one is no question, or about something that nobody wrote."""
    questions = []
    for fact in world.rng.sample(facts, min(count, len(facts))):
        passage = _passage(facts)
        if world.rng.random() < mistake_rate:
            left_open = world.passage(1).facts[0]
            text = world.value_question(left_open.entity, left_open.relation).text
            questions.append(text if world.rng.random() < 0.5 else fact.canonical)
        elif world.rng.random() < 0.5:
            questions.append(world.value_question(fact.entity, fact.relation).text)
        else:
            proposed = fact.value if world.rng.random() < 0.5 else world.wrong_value(passage, fact)
            questions.append(world.verdict_question(fact.entity, fact.relation, proposed).text)
    return json.dumps({"questions": questions})


def grade(facts: dict[Fact, int], text: Any) -> dict[str, int]:
    """Full marks to a question that a fact answers, few to one about an entity of the pages, none to others."""
    question = read_question(str(text))
    about = question is not None and any(fact.entity == question.entity for fact in facts)
    answered = question is not None and any(
        (fact.entity, fact.relation) == (question.entity, question.relation) for fact in facts
    )
    return {"relevance": 10 if answered else 6 if about else 1, "coverage": 10 if answered else 1}


def write_page_answer(world: World, facts: dict[Fact, int], question: Question, mistake_rate: float) -> str:
    """The answer and its page; no answer where the pages hold none."""
    pages = [
        page for fact, page in facts.items() if (fact.entity, fact.relation) == (question.entity, question.relation)
    ]
    if not pages:
        return json.dumps({"answer": "", "cited": []})
    return json.dumps(
        {"answer": write_answer(world, _passage(list(facts)), question, mistake_rate), "cited": pages[:1]}
    )


def _passage(facts: Sequence[Fact]) -> Passage:
    return Passage("", tuple(facts), tuple(dict.fromkeys(fact.entity for fact in facts)))
