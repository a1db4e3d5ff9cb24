"""What every scorer is: something that says how good an answer is. Higher is better."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from alignkit.core.records import Message


class Scorer(Protocol):
    """Scores conversations that end with the assistant turn to be judged."""

    reasons: list[str | None]
    """Of the last call: for each conversation why it has no score, or None where it has one."""

    def score(self, conversations: Sequence[list[Message]]) -> list[float | None]:
        """One score a conversation, higher is better; None where there is none, never a made-up number."""
        ...
