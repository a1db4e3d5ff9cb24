"""What every teacher is: something that takes many requests at once and answers each, or says why it did not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from alignkit.core.config import TeacherConfig, TeacherMode
from alignkit.core.records import Message


@dataclass(frozen=True)
class Request:
    """One question to the teacher.

    `sample` tells repetitions of the same messages apart, so that each is answered (and stored) on its own.
    `temperature` overrides the configured one.
    """

    messages: list[Message]
    sample: int = 0
    temperature: float | None = None


@dataclass(frozen=True)
class Answer:
    """What came back: a text, or the error that stands in its place. Token counts are None where none were reported."""

    text: str | None
    error: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    stored: bool = False
    """Whether it came from the response store and cost nothing this time."""


OnAnswer = Callable[[int, Answer], None]
"""Called with a request's position and its answer, in the order in which the answers arrive."""


class Teacher(Protocol):
    """Answers requests in bulk; `ask` returns one answer a request, in the order of the requests.

    Raises `UserError` when going on is pointless (a refused key, an unknown model); what was answered is stored.
    """

    def ask(self, requests: Sequence[Request], on_answer: OnAnswer | None = None) -> list[Answer]:
        """Answer every request."""
        ...


@dataclass
class Usage:
    """Requests and tokens of a stage, summed over its answers."""

    requests: int = 0
    from_store: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    unreported: int = 0
    """Answers for which the server reported no usage; their tokens are missing from the sums."""

    def count(self, answers: Iterable[Answer]) -> None:
        """Add answers to the sums."""
        for answer in answers:
            self.requests += 1
            self.from_store += answer.stored
            self.failed += answer.text is None
            self.prompt_tokens += answer.prompt_tokens or 0
            self.completion_tokens += answer.completion_tokens or 0
            self.unreported += answer.text is not None and answer.prompt_tokens is None


def open_teacher(config: TeacherConfig) -> Teacher:
    """The teacher that the configuration names."""
    if config.mode is TeacherMode.scripted:
        from alignkit.teacher.scripted import ScriptedTeacher

        return ScriptedTeacher(mistake_rate=config.mistake_rate)
    from alignkit.teacher.openai_client import OpenAITeacher

    return OpenAITeacher(config)
