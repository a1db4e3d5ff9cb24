"""Questions with scored answers, and a stand-in for what sets rows aside, for tests of what is chosen."""

from __future__ import annotations

from typing import Any

from alignkit.core.records import Completion, CompletionSet, Message


def completion(text: str, score: float | None, *, finished: bool = True) -> Completion:
    return Completion(text=text, model="m", score=score, finished=finished)


def row(id: str, *completions: Completion) -> CompletionSet:
    return CompletionSet(
        id=id, parents=["p"], prompt=[Message(role="user", content=f"question {id}")], completions=list(completions)
    )


class Drops:
    """Remembers what was dropped."""

    def __init__(self) -> None:
        self.reasons: list[tuple[str, str]] = []
        self.details: list[str] = []

    def __call__(self, row: Any, reason: str, detail: str = "") -> None:
        self.reasons.append((row.id, reason))
        self.details.append(detail)
