"""How to ask for a grade, and how to read one."""

from __future__ import annotations

from collections.abc import Sequence

from alignkit.core.records import Message
from alignkit.teacher.client import Answer, Request
from alignkit.teacher.prompts import render
from alignkit.teacher.recipes.reading import read_object

HIGHEST_SCORE = 10.0


def judge_request(conversation: Sequence[Message]) -> Request:
    """Ask for a grade of the last turn of a conversation. Temperature 0: a grade is not to depend on the draw."""
    *before, reply = conversation
    shown = [message.model_dump() for message in before]
    prompt = render("judge", conversation=shown, reply=reply.content)
    messages = [Message(role="system", content=render("judge_system")), Message(role="user", content=prompt)]
    return Request(messages, temperature=0.0)


def read_score(answer: Answer) -> float | str:
    """The score from 0 to 10 in an answer; or "reason: particulars" where it has none."""
    if answer.text is None:
        return f"no answer: {answer.error}"
    found = read_object(answer.text)
    if isinstance(found, str):
        return f"{found}: {answer.text[:200]}"
    score = found.get("score")
    if isinstance(score, bool) or not isinstance(score, int | float):
        return f"the answer has no number as score: {answer.text[:200]}"
    if not 0 <= score <= HIGHEST_SCORE:  # NaN and infinities, which Python's JSON reader accepts, are neither
        return f"the score is not from 0 to 10: {answer.text[:200]}"
    return float(score)
