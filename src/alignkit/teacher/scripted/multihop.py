"""Scripted rules: make comparisons up in the closed world, and answer questions about them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from random import Random

from alignkit.core.records import Message
from alignkit.data.closed_world import (
    RELATIONS,
    SUBJECTS,
    UNANSWERABLE,
    Fact,
    Passage,
    Relation,
    World,
    lexicon,
    read_question,
    read_sentence,
    read_statement,
)
from alignkit.teacher.reading import OUTSIDE
from alignkit.teacher.scripted.answering import write_answer
from alignkit.teacher.scripted.comparisons import Form, TwoFactQuestion, conclude, number, read_two_fact_question
from alignkit.teacher.scripted.material import read_material, texts


def reply(messages: Sequence[Message], world: World, mistake_rate: float) -> str | None:
    """What one of the four prompts of the recipe asks for; its texts must be of the world."""
    rules = (
        ('{"entity_1"', ("sub_category", "question_type"), _comparison),
        ('{"entity": ', ("entity", "attribute", "other"), _negative),
        ('{"evidence"', ("question", "paragraph"), _answer),
        ('{"summary"', ("question", "facts"), _final_answer),
    )
    for form, fields, rule in rules:
        if (material := read_material(messages, form, fields)) is not None:
            written = rule(material, world, mistake_rate)
            return OUTSIDE if written is None else json.dumps(written, ensure_ascii=False)
    return None


def _comparison(material: dict[str, object], world: World, mistake_rate: float) -> dict[str, object] | None:
    """Two entities of a kind, one relation of both, and a paragraph about each.

    A mistaken one forgets the relation in its second paragraph.
    """
    kind, rng = str(material.get("sub_category")), world.rng
    if kind not in SUBJECTS:
        return None
    first, second = rng.sample(lexicon()[kind], 2)
    relation = rng.choice(_relations(kind))
    values = _values(world, relation, first, second)
    question = TwoFactQuestion(_form(material, values), relation, first, second)
    facts = [Fact(entity, relation, value) for entity, value in zip((first, second), values, strict=True)]
    conclusion = conclude(question, facts)
    assert conclusion is not None
    forgotten = rng.random() < mistake_rate
    return {
        "entity_1": first,
        "entity_2": second,
        "attributes": [each.noun for each in _relations(kind)],
        "attribute": relation.noun,
        "question": question.text,
        "sub_question_1": world.value_question(first, relation).text,
        "sub_question_2": world.value_question(second, relation).text,
        "paragraph_1": _paragraph(world, first, relation, facts[0], avoid=second),
        "paragraph_2": _paragraph(world, second, relation, None if forgotten else facts[1], avoid=first),
        "answer_1": values[0],
        "answer_2": values[1],
        "thought": " ".join(fact.canonical for fact in facts),
        "final_answer": conclusion.sentence,
    }


def _form(material: dict[str, object], values: tuple[str, str]) -> Form:
    if material.get("question_type") == "yes-no":
        return "same"
    return "higher" if None not in (number(values[0]), number(values[1])) else "both"


def _values(world: World, relation: Relation, first: str, second: str) -> tuple[str, str]:
    """The relation's values for two entities; the same one now and then, and never one of the two."""
    possible = [value for value in world.values(relation.value) if value not in (first, second)]
    one = world.rng.choice(possible)
    return one, one if world.rng.random() < 0.3 else world.rng.choice(possible)


def _negative(material: dict[str, object], world: World, _: float) -> dict[str, object] | None:
    """A paragraph about another entity, another relation, or both."""
    fields = texts(material, "entity", "attribute", "question", "other")
    asked = read_question(fields[2]) if fields else None
    if fields is None or asked is None:
        return None
    entity, relation = asked.entity, asked.relation
    if fields[3] != "attribute":
        entity = world.rng.choice([name for name in lexicon()[relation.subject] if name != asked.entity])
    if fields[3] != "entity":
        relation = world.rng.choice([each for each in _relations(relation.subject) if each != asked.relation])
    value = _values(world, relation, entity, asked.entity)[0]
    right = read_statement(str(material.get("paragraph"))) or ()
    avoid = {fact.value for fact in right} | {asked.entity} if fields[3] == "attribute" else {asked.entity}
    if value in avoid:
        value = world.rng.choice([each for each in world.values(relation.value) if each not in avoid])
    return {
        "entity": entity,
        "attribute": relation.noun,
        "paragraph": f"Notes: {_sentence(world.rng, Fact(entity, relation, value))}",
    }


def _answer(material: dict[str, object], world: World, mistake_rate: float) -> dict[str, object] | None:
    """The answer to a question about one fact, in the form that the recipe asks for."""
    fields = texts(material, "question", "paragraph")
    facts, asked = (read_statement(fields[1]), read_question(fields[0])) if fields else (None, None)
    if facts is None or asked is None:
        return None
    entities = tuple(dict.fromkeys(fact.entity for fact in facts))
    text = write_answer(world, Passage("", facts, entities), asked, mistake_rate)
    stated = read_sentence(text)
    if stated is None:
        evidence = f"The paragraph is about {' and '.join(entities)}."
        return {"evidence": evidence, "answerable": False, "short_answer": "", "answer": UNANSWERABLE}
    evidence = f"The paragraph says: {text}"
    return {"evidence": evidence, "answerable": True, "short_answer": stated.value, "answer": text}


def _final_answer(material: dict[str, object], world: World, mistake_rate: float) -> dict[str, object] | None:
    """What follows from the facts; a mistaken answer takes one of them for another."""
    sentences, asked = material.get("facts"), read_two_fact_question(str(material.get("question")))
    if not isinstance(sentences, list) or asked is None:
        return None
    facts = [fact for sentence in sentences if (fact := read_sentence(str(sentence))) is not None]
    if len(facts) + sentences.count(UNANSWERABLE) != len(sentences):
        return None
    summary = " ".join(map(str, sentences))
    if facts and world.rng.random() < mistake_rate:
        facts[-1] = Fact(facts[-1].entity, facts[-1].relation, world.rng.choice(world.values(facts[-1].relation.value)))
    conclusion = conclude(asked, facts)
    if conclusion is None:
        return {"summary": summary, "answerable": False, "short_answer": "", "answer": UNANSWERABLE}
    return {
        "summary": summary,
        "answerable": True,
        "short_answer": conclusion.short,
        "answer": conclusion.sentence,
    }


def _relations(kind: str) -> list[Relation]:
    return [relation for relation in RELATIONS if relation.subject == kind]


def _paragraph(world: World, entity: str, relation: Relation, fact: Fact | None, *, avoid: str) -> str:
    """A statement of `fact` and one other about the entity, in any order, that does not name `avoid`."""
    other = world.rng.choice([each for each in _relations(relation.subject) if each != relation])
    facts = [Fact(entity, other, _values(world, other, entity, avoid)[0]), *([fact] if fact else [])]
    world.rng.shuffle(facts)
    return "Notes: " + " ".join(_sentence(world.rng, each) for each in facts)


def _sentence(rng: Random, fact: Fact) -> str:
    return rng.choice(fact.relation.sentences).format(e=fact.entity, v=fact.value)
