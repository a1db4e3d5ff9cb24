"""How to ask for a grade, or for the better of two replies, and what the answers are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from alignkit.core.errors import UserError
from alignkit.core.records import Message
from alignkit.teacher.client import Request
from alignkit.teacher.prompts import prompts_dir, render

HIGHEST_SCORE = 10.0


class Criterion(BaseModel):
    """One part of a rubric: its weight, on any scale, and in words what earns it."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1)
    weight: float = Field(gt=0, allow_inf_nan=False)
    text: str = Field(min_length=1)


class Rubric(BaseModel):
    """What is graded by: criteria whose weights share out the 10 points, and limits on their sum, in words."""

    model_config = ConfigDict(extra="forbid")

    criteria: list[Criterion] = Field(min_length=1)
    limits: str = ""

    def points(self) -> list[dict[str, str]]:
        """The criteria as prompts show them, with their share of 10 points."""
        total = sum(criterion.weight for criterion in self.criteria)
        return [
            {
                "name": criterion.name,
                "points": f"{HIGHEST_SCORE * criterion.weight / total:.3g}",
                "text": criterion.text,
            }
            for criterion in self.criteria
        ]


class Grade(BaseModel):
    """A score from 0 to 10 and why. NaN and infinities, which Python's JSON reader accepts, are no scores."""

    score: float = Field(ge=0, le=HIGHEST_SCORE, allow_inf_nan=False, strict=True)
    reason: str = ""


class Verdict(BaseModel):
    """Which of two replies is better, by its place, and why."""

    better: Literal["first", "second", "tie"]
    reason: str = ""


def read_rubric(path: str | None = None) -> Rubric:
    """The rubric in a YAML or JSON file; the shipped one when no file is named. Raises `UserError`."""
    import yaml

    file = Path(path) if path else prompts_dir() / "judge_rubric.yaml"
    try:
        return Rubric.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"rubric={file}: cannot be read ({' '.join(str(error).split())})") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(
            f"rubric={file}: {place}: {first['msg']}. A rubric has criteria, each with name, weight and text, and "
            "perhaps limits."
        ) from error


def judge_request(
    conversation: Sequence[Message], rubric: Rubric | None = None, *, sample: int = 0, temperature: float = 0.0
) -> Request:
    """Ask for a grade of the last turn of a conversation. At temperature 0 it does not depend on the draw."""
    *before, reply = conversation
    return _request("judge", before, rubric, Grade, sample, temperature, reply=reply.content)


def compare_request(
    conversation: Sequence[Message],
    first: str,
    second: str,
    rubric: Rubric | None = None,
    *,
    sample: int = 0,
    temperature: float = 0.0,
) -> Request:
    """Ask which of two replies to a conversation is better. To be asked in both orders: judges favour a place."""
    return _request("judge_pair", conversation, rubric, Verdict, sample, temperature, first=first, second=second)


def _request(
    prompt: str,
    conversation: Sequence[Message],
    rubric: Rubric | None,
    shape: type[BaseModel],
    sample: int,
    temperature: float,
    **replies: str,
) -> Request:
    rubric = rubric or read_rubric()
    shown = [message.model_dump() for message in conversation]
    text = render(prompt, conversation=shown, criteria=rubric.points(), limits=rubric.limits, **replies)
    messages = [Message(role="system", content=render("judge_system")), Message(role="user", content=text)]
    return Request(messages, sample=sample, temperature=temperature, shape=shape)
