"""What both shapes of `self_instruct` share: examples to show, and the tests that every new text must pass."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Protocol

from alignkit.core.errors import UserError
from alignkit.core.records import QAExample
from alignkit.data.words import words

HOPELESS_REQUESTS = 50
"""A teacher that has given nothing usable in as many answers is not asked further."""
_CHINESE = re.compile("[\u3400-\u4dbf\u4e00-\u9fff]")
_STANDS_ALONE = "(?<![a-z0-9_]){}(?![a-z0-9_])"
"""Not \\b, which sees no border between a Chinese character and a Latin letter."""


class Match(Protocol):
    """An accepted text by its label, and how similar it is."""

    @property
    def label(self) -> str: ...  # noqa: D102
    @property
    def similarity(self) -> float: ...  # noqa: D102


class Novelty(Protocol):
    """What the recipe needs of a novelty filter (`alignkit.scoring.novelty.NoveltyFilter`)."""

    def add(self, text: str, label: str) -> None:
        """Accept a text under a label."""
        ...

    def most_similar(self, text: str) -> Match | None:
        """The accepted text that `text` repeats, if any."""
        ...


class Blacklist:
    """Words that a new text must not hold, from a file: one word or phrase a line, `#` begins a comment.

    Case does not count. A word must stand alone, but for Chinese, which has no borders between words.
    Raises `UserError` when the file cannot be read. Without a file nothing is forbidden.
    """

    def __init__(self, path: str | None) -> None:
        listed = [] if path is None else _read_lines(path)
        forms = [re.escape(word) if _CHINESE.search(word) else _STANDS_ALONE.format(re.escape(word)) for word in listed]
        self._pattern = re.compile("|".join(forms), re.IGNORECASE) if forms else None

    def find(self, text: str) -> set[str]:
        """The words of the list that `text` holds, in lower case."""
        return {found[0].lower() for found in self._pattern.finditer(text)} if self._pattern else set()


def _read_lines(path: str) -> list[str]:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"self_instruct.blacklist={path}: {error}. Name a text file, or null for no list.") from error
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def mix(
    seeds: Sequence[QAExample], accepted: Sequence[QAExample], human: int, machine: int, rng: Random
) -> tuple[list[QAExample], list[str]]:
    """Examples to show, in random order, and the ids of the seeds among them.

    `human` seeds and `machine` accepted rows; more seeds take the place of rows that are not there yet.
    """
    made = rng.sample(accepted, min(machine, len(accepted)))
    drawn = rng.sample(seeds, min(human + machine - len(made), len(seeds)))
    shown = [*drawn, *made]
    rng.shuffle(shown)
    return shown, [example.id for example in drawn]


def length_problem(name: str, text: str, lowest: int, highest: int) -> str | None:
    """Why `text` is too short or too long, in words (Chinese and the like: characters); None if it is neither."""
    count = len(words(text))
    return None if lowest <= count <= highest else f"{name} too short or too long: {count} words"
