"""Scripted rules: questions about a document of the closed world, and answers with their evidence."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache

from alignkit.core.records import Message
from alignkit.data.closed_world import UNANSWERABLE, Fact, Passage, Question, World, read_question, read_sentence
from alignkit.teacher.reading import OUTSIDE
from alignkit.teacher.scripted.answering import write_answer
from alignkit.teacher.scripted.json_lines import read_json

_QUESTIONS_ASKED = re.compile(r"^Write (\d+) (questions that the document answers|requests that users)", re.MULTILINE)
_ANSWER_ASKED = "The last line of your reply begins with <ANSWER>:"
_SENTENCE = re.compile(r"[^.\n]+\.")


def reply(messages: Sequence[Message], world: World, mistake_rate: float) -> str | None:
    """Questions about a document, or the answer to one; documents without a sentence of the world are outside it.

    A mistaken answer is wrong, or it quotes what does not stand in the document. When asked again, it tries again.
    """
    prompt = next((message.content for message in messages if message.role == "user"), "")
    wanted = _QUESTIONS_ASKED.search(prompt)
    if not wanted and not prompt.endswith(_ANSWER_ASKED):
        return None
    material = read_json(prompt.split("\n")[0])
    facts = read_document(str(material.get("document")))
    question = read_question(str(material.get("question")))
    if facts and wanted and wanted[2].startswith("questions"):
        return write_questions(world, facts, int(wanted[1]))
    return write_reasoning(world, facts, question, mistake_rate) if facts and question else OUTSIDE


@lru_cache(maxsize=4096)
def read_document(text: str) -> dict[Fact, str]:
    """The facts that a document states, each with its sentence word for word. Headings and the like are passed over."""
    found: dict[Fact, str] = {}
    for match in _SENTENCE.finditer(text):
        sentence = match[0].strip().removeprefix("Notes:").strip()
        if (fact := read_sentence(sentence)) is not None:
            found.setdefault(fact, sentence)
    return found


def write_questions(world: World, facts: dict[Fact, str], count: int) -> str:
    """At most `count` questions, no two about the same fact."""
    drawn = world.rng.sample(list(facts), min(count, len(facts)))
    return json.dumps({"questions": [_question(world, _passage(facts), fact).text for fact in drawn]})


def write_reasoning(world: World, facts: dict[Fact, str], question: Question, mistake_rate: float) -> str:
    """The evidence, quoted, and the final answer."""
    passage = _passage(facts)
    asked = [fact for fact in facts if fact.entity == question.entity and fact.relation == question.relation]
    if not asked:
        return f"<ANSWER>: {UNANSWERABLE}"
    quote, final = facts[asked[0]], write_answer(world, passage, question, 0)
    if world.rng.random() < mistake_rate:
        if world.rng.random() < 0.5:
            final = world.corrupt(passage, question)
        else:
            value = world.wrong_value(passage, asked[0])
            quote = re.sub(rf"\b{asked[0].value}\b", value, quote)
    return f"The question is about {question.entity}. ##begin_quote##{quote}##end_quote##\n<ANSWER>: {final}"


def _question(world: World, passage: Passage, fact: Fact) -> Question:
    form = world.rng.choice(("value", "value", "yes", "no"))
    if form == "value":
        return world.value_question(fact.entity, fact.relation)
    proposed = fact.value if form == "yes" else world.wrong_value(passage, fact)
    return world.verdict_question(fact.entity, fact.relation, proposed)


def _passage(facts: Iterable[Fact]) -> Passage:
    stated = tuple(facts)
    return Passage("", stated, tuple(dict.fromkeys(fact.entity for fact in stated)))
