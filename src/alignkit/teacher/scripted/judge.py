"""Scripted rules: grade a reply to a question of the closed world, or say which of two is better."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from alignkit.core.records import Message
from alignkit.data.closed_world import Fact, Question, World
from alignkit.teacher.reading import OUTSIDE
from alignkit.teacher.scripted.answering import read_task
from alignkit.teacher.scripted.json_lines import read_json
from alignkit.teacher.scripted.rubric import grade


def reply(messages: Sequence[Message], world: World, mistake_rate: float) -> str | None:
    """The grade that the prompt `judge` asks for, or the verdict of `judge_pair`; they are never mistaken."""
    lines = messages[-1].content.split("\n")
    if '{"score"' in lines[-1]:
        return _grade(read_json(lines[0]))
    if '{"better"' in lines[-1]:
        return _compare(read_json(lines[0]))
    return None


def _grade(material: dict[str, Any]) -> str:
    task, answered = _task(material), material.get("reply")
    if task is None or not isinstance(answered, str):
        return OUTSIDE
    result = grade(*task, answered)
    return json.dumps({"score": result.score, "reason": result.reason})


def _compare(material: dict[str, Any]) -> str:
    """The reply with the higher grade is the better one."""
    task, first, second = _task(material), material.get("first"), material.get("second")
    if task is None or not isinstance(first, str) or not isinstance(second, str):
        return OUTSIDE
    scores = grade(*task, first).score, grade(*task, second).score
    better = "tie" if scores[0] == scores[1] else "first" if scores[0] > scores[1] else "second"
    return json.dumps({"better": better, "reason": f"{scores[0]} points against {scores[1]}"})


def _task(material: dict[str, Any]) -> tuple[tuple[Fact, ...], Question] | None:
    """The facts and the question of the last turn of the conversation that is shown."""
    conversation = material.get("conversation")
    last = conversation[-1] if isinstance(conversation, list) and conversation else None
    return read_task(str(last.get("content"))) if isinstance(last, dict) else None
