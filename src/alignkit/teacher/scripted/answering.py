"""Scripted rules: answer a question about a statement of the closed world."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from alignkit.core.records import Message
from alignkit.data.closed_world import Fact, Passage, Question, World, answer, read_question, read_statement


def reply(messages: Sequence[Message], world: World, mistake_rate: float) -> str | None:
    """The answer to a last turn "statement, blank line, question"; None outside the closed world."""
    if (task := read_task(messages[-1].content)) is None:
        return None
    facts, question = task
    passage = Passage("", facts, tuple(dict.fromkeys(fact.entity for fact in facts)))
    return write_answer(world, passage, question, mistake_rate)


def write_answer(world: World, passage: Passage, question: Question, mistake_rate: float) -> str:
    """The right answer, or with probability `mistake_rate` a wrong one."""
    if world.rng.random() < mistake_rate:
        return world.corrupt(passage, question)
    return answer(passage.facts, question)


@lru_cache(maxsize=65_536)
def read_task(text: str) -> tuple[tuple[Fact, ...], Question] | None:
    """The facts and the question of a user turn "statement, blank line, question"; None outside the closed world."""
    statement, _, question = text.rpartition("\n\n")
    facts, asked = read_facts(statement), read_question(question)
    return (facts, asked) if facts and asked else None


@lru_cache(maxsize=65_536)
def read_facts(statement: str) -> tuple[Fact, ...] | None:
    """`read_statement`, remembered."""
    return read_statement(statement)
