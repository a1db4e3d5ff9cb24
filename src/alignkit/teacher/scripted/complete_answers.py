"""Scripted rules: full answers to questions of the closed world whose short answers are given."""

from __future__ import annotations

import json
from collections.abc import Sequence

from alignkit.core.records import Message
from alignkit.data.closed_world import (
    UNANSWERABLE,
    Fact,
    Passage,
    World,
    read_question,
    read_sentence,
    read_statement,
)
from alignkit.teacher.reading import OUTSIDE
from alignkit.teacher.scripted.answering import write_answer
from alignkit.teacher.scripted.comparisons import conclude, read_two_fact_question
from alignkit.teacher.scripted.material import read_material, texts

_SPAN = '{"answer": "..."}'
_REASONED = '{"thought": "...", "final_answer"'
_CALCULATED = '{"thought": "...", "operation"'


def reply(messages: Sequence[Message], world: World, mistake_rate: float) -> str | None:
    """What one of the four prompts of the recipe asks for; its texts must be of the world."""
    for form in (_SPAN, _REASONED, _CALCULATED):
        if (material := read_material(messages, form, ("question", "short_answer"))) is not None:
            if "facts" in material:
                written = _from_facts(material, world, mistake_rate)
            elif form == _CALCULATED:
                written = _calculated(material, world, mistake_rate)
            else:
                written = _from_context(material, world, mistake_rate, reasoned=form == _REASONED)
            return OUTSIDE if written is None else json.dumps(written, ensure_ascii=False)
    return None


def _from_context(
    material: dict[str, object], world: World, mistake_rate: float, *, reasoned: bool
) -> dict[str, str] | None:
    """The answer to a question about one fact, with the fact as a thought where one is asked for."""
    facts, question = _read(material)
    asked = read_question(question)
    if facts is None or asked is None:
        return None
    entities = tuple(dict.fromkeys(fact.entity for fact in facts))
    text = write_answer(world, Passage("", facts, entities), asked, mistake_rate)
    if not reasoned:
        return {"answer": text}
    evidence, _, _ = text.rpartition(", so ")
    return {"thought": f"{evidence}." if evidence else text, "final_answer": text}


def _calculated(material: dict[str, object], world: World, mistake_rate: float) -> dict[str, str] | None:
    """The difference of two numbers; a mistaken one is off by one."""
    facts, question = _read(material)
    asked = read_two_fact_question(question)
    conclusion = conclude(asked, facts) if facts and asked else None
    if facts is None or asked is None or conclusion is None:
        return None
    thought = " ".join(fact.canonical for fact in facts if fact.relation == asked.relation)
    operation = conclusion.operation
    if operation and world.rng.random() < mistake_rate:
        operation = operation.replace("= ", "= 1")
    return {"thought": thought, "operation": operation, "final_answer": conclusion.sentence}


def _from_facts(material: dict[str, object], world: World, mistake_rate: float) -> dict[str, str] | None:
    """The fact with the short answer in it, which is the last of a chain; a mistaken one is another of them."""
    sentences, shorts = material.get("facts"), material.get("short_answer")
    if not isinstance(sentences, list) or not isinstance(shorts, list) or not sentences:
        return None
    facts = [read_sentence(str(sentence)) for sentence in sentences]
    if any(fact is None and sentence != UNANSWERABLE for fact, sentence in zip(facts, sentences, strict=True)):
        return None
    thought = " ".join(map(str, sentences))
    if not shorts:
        return {"thought": thought, "final_answer": UNANSWERABLE}
    fitting = [fact.canonical for fact in facts if fact is not None and fact.value in shorts]
    if not fitting or world.rng.random() < mistake_rate:
        return {"thought": thought, "final_answer": str(sentences[0])}
    return {"thought": thought, "final_answer": fitting[-1]}


def _read(material: dict[str, object]) -> tuple[tuple[Fact, ...] | None, str]:
    fields = texts(material, "context", "question")
    return (read_statement(fields[0]), fields[1]) if fields else (None, "")
