"""The teacher as a scorer: 0 to 10 by a rubric."""

from __future__ import annotations

from collections.abc import Sequence

from alignkit.core.records import Message
from alignkit.teacher.client import Teacher, Usage
from alignkit.teacher.recipes.judge import judge_request, read_score


class JudgeScorer:
    """Scores by asking a teacher, at temperature 0; equal conversations of one call are asked once.

    `reasons` and `usage` say what went wrong in the last call, and what all calls took.
    """

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher
        self.reasons: list[str | None] = []
        self.usage = Usage()

    def score(self, conversations: Sequence[list[Message]]) -> list[float | None]:
        """One score from 0 to 10 a conversation; None, with its reason, where the answer holds none."""
        keys = [tuple((message.role, message.content) for message in conversation) for conversation in conversations]
        unique = dict(zip(keys, conversations, strict=True))
        answers = self.teacher.ask([judge_request(conversation) for conversation in unique.values()])
        self.usage.count(answers)
        read = dict(zip(unique, map(read_score, answers), strict=True))
        self.reasons = [found if isinstance(found := read[key], str) else None for key in keys]
        return [None if isinstance(found := read[key], str) else found for key in keys]
