"""Reading a teacher's answer."""

from __future__ import annotations

import json
from typing import Any

from alignkit.teacher.scripted import OUTSIDE


def read_object(text: str) -> dict[str, Any] | str:
    """The first JSON object in an answer, whatever stands around it; a reason when there is none.

    Models wrap JSON in prose and code fences however plainly one asks, so only the object itself must be well-formed.
    """
    if text == OUTSIDE:
        return "the scripted teacher knows only the closed world"
    start = text.find("{")
    if start < 0:
        return "no JSON object in the answer"
    try:
        value, _ = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        return "the JSON of the answer is broken"
    return value if isinstance(value, dict) else "no JSON object in the answer"
