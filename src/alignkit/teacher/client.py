"""What every teacher is: something that takes many requests at once and answers each, or says why it did not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pydantic import BaseModel

from alignkit.core.config import TeacherConfig, TeacherMode
from alignkit.core.records import Message, Tools


@dataclass(frozen=True)
class Request:
    """One question to the teacher, and what a usable answer to it is.

    `sample` tells repetitions of the same messages apart, so that each is answered (and stored) on its own.
    `temperature` and `max_tokens` override the configured ones.
    """

    messages: list[Message]
    sample: int = 0
    temperature: float | None = None
    max_tokens: int | None = None
    shape: type[BaseModel] | None = None
    """The JSON object that is wanted; None: plain text."""
    tools: Tools | None = None
    """Functions that the answer may call; a call comes as text (`data.tools.call_text`)."""
    check: Callable[[Any], str | None] | None = None
    """What is wrong with an answer that can be read (an instance of `shape`, or the text); None when nothing is."""


@dataclass(frozen=True)
class Answer:
    """What came back. Token counts are None where none were reported."""

    text: str | None
    """The last reply, whether usable or not; None when there is none."""
    value: Any = None
    """What was read from it: an instance of the request's `shape`, or the text; None when it is not usable."""
    reason: str | None = None
    """Why there is no usable answer, in words to count by ("no answer", "not JSON"); None when there is one."""
    detail: str = ""
    """The particulars of `reason`."""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    stored: bool = False
    """Whether it came from the response store and cost nothing this time."""

    @property
    def usable(self) -> bool:
        """Whether `value` is what was asked for."""
        return self.reason is None


OnAnswer = Callable[[int, Answer], None]
"""Called with a request's position and its answer, in the order in which the answers arrive."""


class Teacher(Protocol):
    """Answers requests in bulk; `ask` returns one answer a request, in the order of the requests.

    Raises `UserError` when going on is pointless (a refused key, an unknown model); what was answered is stored, and
    the same requests find it again. `usage` sums up everything that was asked.
    """

    usage: Usage

    def ask(self, requests: Sequence[Request], on_answer: OnAnswer | None = None) -> list[Answer]:
        """Answer every request."""
        ...


@dataclass
class Usage:
    """Requests, tokens and cost of a stage. Tokens are those of every reply behind its answers, each counted once:
    refused and repeated ones too, and those that the response store already had.
    """

    requests: int = 0
    from_store: int = 0
    failed: int = 0
    sent: int = 0
    """Attempts made over the network this time, retries and repetitions among them."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    unreported: int = 0
    """Replies for which the server reported no usage; their tokens and cost are missing from the sums."""
    cost: float | None = None
    """Of all these tokens, in the currency of teacher.prices; None where the price is not known."""
    paid_now: float | None = None
    """The part of `cost` for replies that came this time."""

    def count(self, answers: Iterable[Answer]) -> None:
        """Add answers, with the tokens that they report."""
        for answer in answers:
            self.count_answer(answer)
            self.count_tokens(answer.prompt_tokens, answer.completion_tokens)
            self.unreported += answer.text is not None and answer.prompt_tokens is None

    def count_answer(self, answer: Answer) -> None:
        """Add an answer, without its tokens."""
        self.requests += 1
        self.from_store += answer.stored
        self.failed += not answer.usable

    def count_tokens(self, prompt_tokens: int | None, completion_tokens: int | None) -> None:
        """Add tokens where any were reported."""
        self.prompt_tokens += prompt_tokens or 0
        self.completion_tokens += completion_tokens or 0


def sum_usage(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Several usages, each as a mapping, together; a figure that one of them does not know is not known."""
    return {
        key: None if any(part[key] is None for part in parts) else sum(part[key] for part in parts) for key in parts[0]
    }


def open_teacher(config: TeacherConfig) -> Teacher:
    """The teacher that the configuration names."""
    if config.mode is TeacherMode.scripted:
        from alignkit.teacher.scripted import ScriptedTeacher

        return ScriptedTeacher(mistake_rate=config.mistake_rate)
    if config.mode is TeacherMode.batch:
        from alignkit.teacher.batch import BatchTeacher

        return BatchTeacher(config)
    from alignkit.teacher.openai_client import OpenAITeacher

    return OpenAITeacher(config)
