"""The account of a recipe: what each of its steps asked, and how much of it could be used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from alignkit.teacher.client import Answer, Request, Teacher


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


def left_open(answers: Iterable[Answer]) -> int:
    """How many answers a dry run did not give; it takes each for a new row, to count the requests that are needed."""
    from alignkit.teacher.dry_run import DRY_RUN

    return sum(answer.reason == DRY_RUN for answer in answers)
