"""Reading sentences, statements and questions of the closed world back: the inverse of writing them."""

from __future__ import annotations

import re
from functools import cache

from alignkit.data.closed_world.grammar import RELATIONS, Relation, lexicon
from alignkit.data.closed_world.world import Fact, Question


def _pattern(template: str) -> re.Pattern[str]:
    escaped = re.escape(template).replace(r"\{e\}", r"(?P<e>\w+)").replace(r"\{v\}", r"(?P<v>\w+)")
    return re.compile(escaped)


@cache
def _sentence_patterns() -> tuple[tuple[re.Pattern[str], Relation], ...]:
    return tuple((_pattern(template), relation) for relation in RELATIONS for template in relation.sentences)


@cache
def _question_patterns() -> tuple[tuple[re.Pattern[str], Relation], ...]:
    return tuple(
        (_pattern(template), relation)
        for relation in RELATIONS
        for template in (*relation.questions, *relation.verdict_questions)
    )


def read_sentence(sentence: str) -> Fact | None:
    """The fact that a sentence of the world states; None when the sentence is not of the world."""
    for pattern, relation in _sentence_patterns():
        if (match := pattern.fullmatch(sentence)) and _well_typed(relation, match["e"], match["v"]):
            return Fact(match["e"], relation, match["v"])
    return None


def read_statement(statement: str) -> tuple[Fact, ...] | None:
    """The facts of a statement segment; None when any of its sentences is not of the world."""
    sentences = re.findall(r"[^.]+\.", statement.removeprefix("Notes:"))
    facts = [read_sentence(sentence.strip()) for sentence in sentences]
    return None if not facts or None in facts else tuple(fact for fact in facts if fact is not None)


def read_question(text: str) -> Question | None:
    """What a question asks; None when it is not a question of the world."""
    for pattern, relation in _question_patterns():
        if match := pattern.fullmatch(text.strip()):
            found = match.groupdict()
            if _well_typed(relation, found["e"], found.get("v")):
                return Question(text.strip(), found["e"], relation, found.get("v"))
    return None


def _well_typed(relation: Relation, entity: str, value: str | None) -> bool:
    words = lexicon()
    return entity in words[relation.subject] and (value is None or value in words[relation.value])
