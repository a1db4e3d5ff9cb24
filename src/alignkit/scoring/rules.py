"""Quality of a question-answer row by rule: pure functions of its text, no model and no teacher."""

from __future__ import annotations

import re
from typing import Literal

from alignkit.core.records import QAExample
from alignkit.data.words import words

Verdict = Literal["yes", "no", "undecided"]

_AFFIRMED = "(?:是|对|能|可以|会|需要|有|应该|行)"
_CHINESE_VERDICT = rf"(?:(?P<no>不|没|否|错){_AFFIRMED}?|{_AFFIRMED})的?"
_UNDECIDED = re.compile(
    r"\b(?:cannot|can't) be (?:decided|determined|answered|known)\b"
    r"|\bdoes(?: not|n't) (?:\w+ )?(?:say|state|tell|mention)\b"
    r"|无法(?:判断|确定|回答)|(?:没有|未)(?:说明|提到)"
)
_AT_END = (re.compile(r"\b(?:yes|(?P<no>no))\W*$"), re.compile(rf"所以{_CHINESE_VERDICT}[。！.!]*$"))
_AT_START = (re.compile(r"^\W*(?:yes|(?P<no>no))(?:[,.;:!]|$)"), re.compile(rf"^{_CHINESE_VERDICT}(?:[，。！,.!]|$)"))


def repetition(text: str, length: int = 3) -> float:
    """Share of the text's runs of `length` words that occurred in it before: 0 when all differ, towards 1 in a loop."""
    found = words(text)
    runs = [tuple(found[start : start + length]) for start in range(len(found) - length + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def read_verdict(answer: str) -> Verdict | None:
    """The verdict that an English or Chinese answer carries, at its end ("..., so no.") or its start ("Yes, ...").

    None when there is none, or when start and end contradict each other. "undecided" is an answer that says that the
    statement does not tell.
    """
    text = " ".join(answer.casefold().split())
    found = [match for patterns in (_AT_END, _AT_START) for pattern in patterns if (match := pattern.search(text))]
    verdicts = {"no" if match["no"] else "yes" for match in found}
    if len(verdicts) == 1:
        return "no" if "no" in verdicts else "yes"
    return "undecided" if not verdicts and _UNDECIDED.search(text) else None


def broken_rules(example: QAExample, *, min_words: int, max_words: int, max_repetition: float) -> list[str]:
    """The rules that a row's answer breaks, the gravest first; none for a good row.

    A good answer is not empty, has between `min_words` and `max_words` words, repeats at most the share
    `max_repetition` of its three-word runs, does not merely give the question back, and carries a verdict when the row
    is judgmental.
    """
    if not example.output.strip():
        return ["empty answer"]
    count = len(words(example.output))
    rules = {
        "answer too short": count < min_words,
        "answer too long": count > max_words,
        "answer repeats itself": repetition(example.output) > max_repetition,
        "answer is the question": words(example.output) == words(example.input),
        "judgmental answer without a verdict": example.kind == "judgmental" and read_verdict(example.output) is None,
    }
    return [rule for rule, broken in rules.items() if broken]


def rule_quality(broken: list[str]) -> float:
    """Quality from 0 to 10, the judge's scale: 10 / (1 + rules broken); an empty answer has 0."""
    return 0.0 if broken == ["empty answer"] else 10 / (1 + len(broken))
