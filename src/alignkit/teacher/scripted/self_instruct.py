"""Scripted rules: write new examples of the closed world, whole or step by step.

As a task of the closed world counts a statement. Its inputs are questions about it, and its outputs answers; that its
questions are judgmental, which makes it a classification, is drawn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from alignkit.core.records import Message
from alignkit.data.closed_world import Fact, Passage, Question, World
from alignkit.teacher.reading import OUTSIDE
from alignkit.teacher.scripted.answering import read_facts, write_answer
from alignkit.teacher.scripted.json_lines import read_json

UNANSWERABLE_SHARE = 0.14
FACTS = 3
"""Facts a passage."""
MOST_INSTANCES = 3
_FORMS = ('{"statement"', '{"instructions"', '{"classification"', '{"instances"')
_KIND_ASKED = re.compile(r'new example of kind "(judgmental|non_judgmental)"')
_NUMBER_ASKED = re.compile(r"^Write (?:at most )?(\d+) (?:new tasks|instances)", re.MULTILINE)


def reply(messages: Sequence[Message], world: World, mistake_rate: float) -> str | None:
    """What the last line of the prompt asks for, where all that is shown is of the world; tries again when told to."""
    prompt = next((message.content for message in messages if message.role == "user"), "")
    *lines, asked = prompt.split("\n")
    form = next((form for form in _FORMS if form in asked), None)
    if form is None:
        return None
    shown = [read_json(line) for line in lines if line.startswith('{"')]
    statements = [read_facts(str(each.get("statement", each.get("instruction")))) for each in shown]
    if not statements or None in statements:
        return OUTSIDE
    kind, number = _KIND_ASKED.search(prompt), _NUMBER_ASKED.search(prompt)
    if form == '{"statement"' and kind:
        return write_example(world, kind[1], mistake_rate if '"answer"' in asked else None)
    if form == '{"instructions"' and number:
        return json.dumps({"instructions": [world.passage(FACTS).statement for _ in range(int(number[1]))]})
    if form == '{"classification"':
        return json.dumps({"classification": world.rng.random() < 0.5})
    if form == '{"instances"' and number and (facts := statements[-1]):
        output_first = asked.index('"output"') < asked.index('"input"')
        return write_instances(world, facts, min(int(number[1]), MOST_INSTANCES), output_first, mistake_rate)
    return OUTSIDE


def write_example(world: World, kind: str, mistake_rate: float | None) -> str:
    """A new passage, a question of a kind, and, unless `mistake_rate` is None, its answer."""
    passage = world.passage(FACTS)
    question = _question(world, passage, kind)
    example = {"statement": passage.statement, "question": question.text}
    if mistake_rate is not None:
        example["answer"] = write_answer(world, passage, question, mistake_rate)
    return json.dumps(example)


def write_instances(world: World, facts: tuple[Fact, ...], most: int, output_first: bool, mistake_rate: float) -> str:
    """Up to `most` questions about what a statement says, no two alike, and their answers.

    With `output_first` they are judgmental: the classes are yes and no.
    """
    passage = Passage("", facts, tuple(dict.fromkeys(fact.entity for fact in facts)))
    kind, order = ("judgmental", ("output", "input")) if output_first else ("non_judgmental", ("input", "output"))
    drawn = [_question(world, passage, kind) for _ in range(world.rng.randint(1, most))]
    instances = [
        {"input": question.text, "output": write_answer(world, passage, question, mistake_rate)}
        for question in {question.text: question for question in drawn}.values()
    ]
    return json.dumps({"instances": [{field: instance[field] for field in order} for instance in instances]})


def _question(world: World, passage: Passage, kind: str) -> Question:
    if world.rng.random() < UNANSWERABLE_SHARE and len(passage.facts) <= FACTS:  # more may leave nothing unsaid
        while (question := world.ask(passage, "unanswerable")).kind != kind:
            pass
        return question
    return world.ask(passage, world.rng.choice(("yes", "no")) if kind == "judgmental" else "value")
