"""Whether a passage holds an answer: its words in a row; case, Unicode width and punctuation do not count."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

from alignkit.data.wording import line_of_tokens, tokens

_VERDICTS = (["yes"], ["no"])
"""Answers that stand in passages by chance."""


def answer_in(answers: Sequence[str]) -> Callable[[str], bool] | None:
    """A function that says whether one of the answers stands in a text.

    None where there is no answer to look for: none is known, or it is a mere yes or no.
    """
    wanted = [line_of_tokens(found) for answer in answers if (found := tokens(answer)) and found not in _VERDICTS]
    return (lambda text: any(answer in _line(text) for answer in wanted)) if wanted else None


@lru_cache(maxsize=1 << 14)
def _line(text: str) -> str:
    return line_of_tokens(tokens(text))
