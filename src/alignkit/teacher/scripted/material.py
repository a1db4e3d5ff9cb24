"""What a prompt is about: the JSON object on its first line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from alignkit.core.records import Message
from alignkit.teacher.scripted.json_lines import read_json


def read_material(messages: Sequence[Message], reply_form: str, fields: Sequence[str]) -> dict[str, Any] | None:
    """The material of the last prompt that asks for a reply like `reply_form` and has `fields`; None without one.

    A reply that was refused is asked for once more by a turn that only says what was wrong, so the prompt may stand
    before the last turn.
    """
    for message in reversed(messages):
        lines = message.content.split("\n")
        if message.role == "user" and reply_form in lines[-1]:
            material = read_json(lines[0])
            return material if all(field in material for field in fields) else None
    return None


def texts(material: dict[str, Any], *names: str) -> list[str] | None:
    """Some fields of the material, where each is a text; else None."""
    values = [material.get(name) for name in names]
    return [value for value in values if isinstance(value, str)] if all(isinstance(v, str) for v in values) else None
