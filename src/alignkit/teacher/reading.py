"""Reading a reply: is it what was asked for, and if not, what to say when asking once more."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from alignkit.core.records import Message
from alignkit.data.sources.raft import refuses
from alignkit.teacher.client import Answer, Request
from alignkit.teacher.failures import DECLINED

OUTSIDE = "I only know the closed world of the demonstration."
"""What the scripted teacher says of everything else."""
MOST_REPEATS = 2
"""How often a reply that is not usable is asked for once more."""
NO_OBJECT = "no JSON object in the answer"
SHOWN_CHARACTERS = 4_000
"""What is sent back of a reply that was not usable."""
_THOUGHTS = re.compile(r"\A\s*<think>.*?</think>\s*", re.DOTALL)
"""What reasoning models say before their answer, where the server does not set it apart."""
_OBJECT = re.compile(r'\{\s*["}]')
"""Where a JSON object can begin; other braces belong to the prose around it."""


def read_reply(request: Request, text: str) -> Answer:
    """The answer in a reply: its value where it is usable, else the reason why it is not."""
    if text == OUTSIDE:
        return Answer(text, reason="the scripted teacher knows only the closed world")
    said = _THOUGHTS.sub("", text)
    if not said.strip():
        return Answer(text, reason="empty answer")
    value: Any = said
    if request.shape is not None:
        found = read_object(said)
        if isinstance(found, str):
            declined = found == NO_OBJECT and refuses(said[:SHOWN_CHARACTERS])
            return Answer(text, reason=DECLINED if declined else found, detail=text[:200])
        try:
            value = request.shape.model_validate(found)
        except ValidationError as error:
            return Answer(text, reason="the JSON has not the fields asked for", detail=_problems(error))
    problem = request.check(value) if request.check else None
    if problem is not None:
        reason, _, detail = problem.partition(": ")
        return Answer(text, reason=reason, detail=detail)
    return Answer(text, value)


def ask_again(request: Request, refused: Answer) -> Request:
    """The same request after a reply that was not usable: the reply, and what is wrong with it."""
    complaint = f"That cannot be used: {refused.reason}{': ' if refused.detail else ''}{refused.detail}. Answer again."
    shown = (refused.text or "")[:SHOWN_CHARACTERS].strip() or "(nothing)"
    said = [Message(role="assistant", content=shown), Message(role="user", content=complaint)]
    return replace(request, messages=[*request.messages, *said])


def read_object(text: str) -> dict[str, Any] | str:
    """The first JSON object in a reply, whatever stands around it; a reason when there is none.

    Models wrap JSON in prose and code fences however plainly one asks, so only the object itself must be well-formed.
    They also break lines inside of strings, which cannot be mistaken for anything else.
    """
    start = _OBJECT.search(text)
    if start is None:
        return NO_OBJECT
    try:
        value: dict[str, Any] = _DECODER.raw_decode(text, start.start())[0]
        if "\\u" in text:  # half a surrogate pair is no letter, and could not be written to any file
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return "the JSON of the answer is broken"
    return value


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number in JSON")


_DECODER = json.JSONDecoder(strict=False, parse_constant=_no_number)


def _problems(error: ValidationError) -> str:
    return "; ".join(
        f"{'.'.join(map(str, problem['loc'])) or 'object'}: {problem['msg']}" for problem in error.errors()
    )[:300]
