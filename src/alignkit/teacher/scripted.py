"""The scripted teacher: no model, but rules that read, write and grade inside the closed world of the demo.

It is given chat messages like any model and does what the last one asks for: a new example, a grade, or else the answer
to the question that ends it. It stands in for a paid teacher so that everything runs offline, and is called what it is
everywhere. As real teachers do, it makes mistakes: a share `mistake_rate` of the answers it *writes* is wrong. Its
grades never are. Of anything outside its world it says so.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from alignkit.core.errors import UserError
from alignkit.core.records import Message
from alignkit.data.closed_world import Fact, Passage, Question, World, answer, read_question, read_statement
from alignkit.teacher.client import Answer, OnAnswer, Request
from alignkit.teacher.rubric import grade

LOG = logging.getLogger("alignkit")

NAME = "scripted"
"""The model name under which it is configured and served."""
OUTSIDE = "I only know the closed world of the demonstration."
UNANSWERABLE_SHARE = 0.14
FACTS, HARD_SHARE = 3, 0.25
"""Facts a passage, and the share of passages about two entities that share a relation."""

_KIND_ASKED = re.compile(r'new example of kind "(\w+)"')


class ScriptedTeacher:
    """Answers by rule; the same messages and sample index get the same answer, whatever was asked before."""

    def __init__(self, mistake_rate: float = 0.15, seed: int = 0) -> None:
        if not 0 <= mistake_rate <= 1:
            raise UserError(f"teacher.mistake_rate={mistake_rate}: must lie between 0 and 1")
        self.mistake_rate = mistake_rate
        self.seed = seed
        LOG.info(
            "teacher: scripted, by rule; %.0f %% of the answers it writes are wrong on purpose", 100 * mistake_rate
        )

    def ask(self, requests: Sequence[Request], on_answer: OnAnswer | None = None) -> list[Answer]:
        """Answer every request; "tokens" are words, since there is no tokenizer."""
        answers = []
        for index, request in enumerate(requests):
            text = self.reply(request.messages, request.sample)
            words = sum(len(message.content.split()) for message in request.messages)
            answers.append(Answer(text, prompt_tokens=words, completion_tokens=len(text.split())))
            if on_answer:
                on_answer(index, answers[-1])
        return answers

    def reply(self, messages: Sequence[Message], sample: int = 0) -> str:
        """The reply to a conversation that ends with a user turn."""
        prompt = messages[-1].content
        lines = prompt.split("\n")
        if '{"score"' in lines[-1]:
            return self._judge(_read_json(lines[0]))
        world = World(self._number(messages, sample), hard_share=HARD_SHARE)
        if '{"statement"' in lines[-1]:
            kind = _KIND_ASKED.search(prompt)
            examples = [_read_json(line) for line in lines if line.startswith('{"kind"')]
            return self._expand(world, kind[1] if kind else "", examples, with_answer='"answer"' in lines[-1])
        if (task := read_task(prompt)) is None:
            return OUTSIDE
        facts, question = task
        passage = Passage("", facts, tuple(dict.fromkeys(fact.entity for fact in facts)))
        return self._answer(world, passage, question)

    def _expand(self, world: World, kind: str, examples: Sequence[dict[str, Any]], *, with_answer: bool) -> str:
        """A new passage, a question of the kind asked for, and its answer; the examples must be of the world."""
        of_the_world = [_read_statement(str(example.get("statement"))) for example in examples]
        if kind not in ("judgmental", "non_judgmental") or not examples or None in of_the_world:
            return OUTSIDE
        passage = world.passage(FACTS)
        question = self._question(world, passage, kind)
        example = {"statement": passage.statement, "question": question.text}
        if with_answer:
            example["answer"] = self._answer(world, passage, question)
        return json.dumps(example)

    def _question(self, world: World, passage: Passage, kind: str) -> Question:
        if world.rng.random() < UNANSWERABLE_SHARE:
            while (question := world.ask(passage, "unanswerable")).kind != kind:
                pass
            return question
        return world.ask(passage, world.rng.choice(("yes", "no")) if kind == "judgmental" else "value")

    def _answer(self, world: World, passage: Passage, question: Question) -> str:
        if world.rng.random() < self.mistake_rate:
            return world.corrupt(passage, question)
        return answer(passage.facts, question)

    def _judge(self, material: dict[str, Any]) -> str:
        conversation, reply = material.get("conversation"), material.get("reply")
        last = conversation[-1] if isinstance(conversation, list) and conversation else None
        task = read_task(str(last.get("content"))) if isinstance(last, dict) else None
        if task is None or not isinstance(reply, str):
            return OUTSIDE
        result = grade(*task, reply)
        return json.dumps({"score": result.score, "reason": result.reason})

    def _number(self, messages: Sequence[Message], sample: int) -> int:
        """A number from everything that decides the reply."""
        content = json.dumps([self.seed, sample, [(message.role, message.content) for message in messages]])
        return int.from_bytes(hashlib.sha256(content.encode()).digest()[:8], "big")


def _read_json(line: str) -> dict[str, Any]:
    """The object on a line of a prompt; empty when there is none."""
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


@lru_cache(maxsize=65_536)
def read_task(text: str) -> tuple[tuple[Fact, ...], Question] | None:
    """The facts and the question of a user turn "statement, blank line, question"; None outside the closed world."""
    statement, _, question = text.rpartition("\n\n")
    facts, asked = _read_statement(statement), read_question(question)
    return (facts, asked) if facts and asked else None


@lru_cache(maxsize=65_536)
def _read_statement(statement: str) -> tuple[Fact, ...] | None:
    return read_statement(statement)
