"""What recipes share: requests under the name of a step, with an account, in rounds no larger than they need to be."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from pydantic import BaseModel

from alignkit.core.records import Dropped
from alignkit.teacher.client import Answer, Request, Teacher

Kept = TypeVar("Kept")

LEFT_OVER = "left over"
"""Why good questions and rows are dropped that nobody wanted any more."""


@dataclass
class Step:
    """One step's sums. `refused` counts the reasons for which answers could not be used."""

    asked: int = 0
    usable: int = 0
    stored: int = 0
    refused: Counter[str] = field(default_factory=Counter)


class Asker:
    """Asks a teacher under the name of a step. `steps` holds the account, in the order of the first requests.

    `announce` is told a step's name before its requests.
    """

    def __init__(self, teacher: Teacher, announce: Callable[[str], None] | None = None) -> None:
        self.teacher = teacher
        self.announce = announce
        self.steps: dict[str, Step] = {}

    def __call__(self, step: str, requests: Sequence[Request]) -> list[Answer]:
        """One answer a request, in their order."""
        account = self.steps.setdefault(step, Step())
        if self.announce:
            self.announce(step)
        answers = self.teacher.ask(requests) if requests else []
        for answer in answers:
            account.asked += 1
            account.usable += answer.usable
            account.stored += answer.stored
            if answer.reason is not None:
                account.refused[answer.reason] += 1
        return answers

    @property
    def asked(self) -> int:
        """Requests of all steps."""
        return sum(step.asked for step in self.steps.values())

    @property
    def failed(self) -> int:
        """Requests of all steps without a usable answer."""
        return sum(step.asked - step.usable for step in self.steps.values())


def round_size(most: int, missing: int | None, rows_each: int = 1) -> int:
    """How many things to ask about together when each may give so many rows: no more than `missing` rows take.

    `most` where no number of rows is wanted (None).
    """
    return most if missing is None else min(most, math.ceil(missing / rows_each))


def left_open(found: Iterable[object]) -> int:
    """How many answers, or rows made of them, a dry run did not give.

    A recipe takes each for a new row, to count the requests that are needed.
    """
    from alignkit.teacher.dry_run import DRY_RUN

    return sum(isinstance(each, Answer | Dropped) and each.reason == DRY_RUN for each in found)


def left_over(rows: Iterable[BaseModel]) -> list[Dropped]:
    """Rows beyond the number that is wanted, set aside: they were paid for."""
    return [Dropped(reason=LEFT_OVER, row=row.model_dump()) for row in rows]


def set_aside(found: Iterable[Kept | Dropped]) -> Generator[Dropped, None, list[Kept]]:
    """Yield what was dropped, and return the rest."""
    kept: list[Kept] = []
    for each in found:
        if isinstance(each, Dropped):
            yield each
        else:
            kept.append(each)
    return kept
