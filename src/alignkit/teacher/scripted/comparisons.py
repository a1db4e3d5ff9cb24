"""Questions of the closed world that take two facts: how they are written, read back and answered."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from alignkit.data.closed_world import RELATIONS, Fact, Relation, lexicon

Form = Literal["higher", "same", "both", "difference"]
_TEMPLATES: dict[Form, str] = {
    "higher": "Which has the higher {noun}, {first} or {second}?",
    "same": "Is the {noun} of {first} the same as that of {second}?",
    "both": "What is the {noun} of {first}, and what is that of {second}?",
    "difference": "How much higher is the {noun} of {first} than that of {second}?",
}
_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()


@dataclass(frozen=True)
class TwoFactQuestion:
    """A question about one relation of two entities."""

    form: Form
    relation: Relation
    first: str
    second: str

    @property
    def text(self) -> str:
        """The question in words."""
        return _TEMPLATES[self.form].format(noun=self.relation.noun, first=self.first, second=self.second)


@dataclass(frozen=True)
class Conclusion:
    """What follows from two facts: in a word, in a sentence, and as a calculation where there is one."""

    short: str
    sentence: str
    operation: str = ""


def read_two_fact_question(text: str) -> TwoFactQuestion | None:
    """The question that a text is; None when it is no such question of the world."""
    for form, template in _TEMPLATES.items():
        pattern = re.escape(template)
        for name in ("noun", "first", "second"):
            pattern = pattern.replace(rf"\{{{name}\}}", rf"(?P<{name}>.+?)")
        if match := re.fullmatch(pattern, text.strip()):
            for relation in RELATIONS:
                names = lexicon()[relation.subject]
                if relation.noun == match["noun"] and match["first"] in names and match["second"] in names:
                    return TwoFactQuestion(form, relation, match["first"], match["second"])
    return None


def conclude(question: TwoFactQuestion, facts: Iterable[Fact]) -> Conclusion | None:
    """The answer that the facts give; None when one is missing, or is no number where numbers are compared."""
    values = {fact.entity: fact.value for fact in facts if fact.relation == question.relation}
    if question.first not in values or question.second not in values:
        return None
    one, other, noun = values[question.first], values[question.second], question.relation.noun
    both = f"The {noun} of {question.first} is {one}, and that of {question.second} is {other}"
    if question.form == "both":
        return Conclusion(f"{one}, and that of {question.second} is {other}", f"{both}.")
    if question.form == "same":
        verdict = "yes" if one == other else "no"
        return Conclusion(verdict, f"{both}, so {verdict}.")
    high, low = number(one), number(other)
    if high is None or low is None:
        return None
    if question.form == "difference":
        sentence = f"The {noun} of {question.first} is {high - low} higher than that of {question.second}."
        return Conclusion(str(high - low), sentence, f"{high} - {low} = {high - low}")
    if high == low:
        return Conclusion("neither", f"{both}, so neither has the higher {noun}.")
    winner = question.first if high > low else question.second
    return Conclusion(winner, f"{both}, so {winner} has the higher {noun}.")


def number(word: str) -> int | None:
    """The value of a number from 0 to 99 in words or digits; None for anything else."""
    if word.isdecimal():
        return int(word)
    tens, _, ones = word.partition("-")
    if tens in _TENS:
        rest = _ONES.index(ones) if ones in _ONES[1:10] else 0 if not ones else None
        return None if rest is None else 10 * (_TENS.index(tens) + 2) + rest
    return _ONES.index(word) if word in _ONES else None
