"""The rows that pass between stages, one JSON object a line, with TRL's column names.

Every row has an `id` that it keeps from stage to stage, and may name the rows it was made from in `parents`: together
they let `alignkit lineage` walk from any row back to its seed. Unknown fields are kept, not dropped.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Row(BaseModel):
    """What all rows share."""

    model_config = ConfigDict(extra="allow", strict=True, defer_build=True)

    id: str = Field(min_length=1)
    parents: list[str] = []


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="forbid", strict=True, defer_build=True)

    role: Literal["system", "user", "assistant", "tool"]
    content: str


class QAExample(Row):
    """A statement segment, a question about it and its answer.

    `instruction` is the statement, `input` the question, `output` the answer (empty when only the question is known).
    """

    instruction: str
    input: str = ""
    output: str = ""
    kind: Literal["judgmental", "non_judgmental"] | None = None
    """Whether the question is to be answered by yes or no; none: not known."""
    classification: bool | None = None
    """Whether the answer is one of a few labels, of which yes and no are a case; none: not known."""
    source: str = ""
    scores: dict[str, float] = {}


class ChatExample(Row):
    """A prompt and the completion to learn: `completion` is one assistant turn."""

    prompt: list[Message] = Field(min_length=1)
    completion: list[Message] = Field(min_length=1)
    source: str = ""


class Completion(BaseModel):
    """One sampled answer: who wrote it, with which sampling parameters, and its score if it has one."""

    model_config = ConfigDict(extra="forbid", defer_build=True)

    text: str
    model: str
    sampling: dict[str, float] = {}
    finished: bool = True
    """False when the length limit cut the text before an end-of-turn token."""
    score: float | None = None


class CompletionSet(Row):
    """A prompt and the completions sampled for it. `reference` is the known right answer, if there is one."""

    prompt: list[Message] = Field(min_length=1)
    completions: list[Completion]
    reference: str | None = None


class PreferencePair(Row):
    """Two answers to one prompt, the better and the worse. `margin` is how much better (score units, above zero)."""

    prompt: list[Message] = Field(min_length=1)
    chosen: list[Message] = Field(min_length=1)
    rejected: list[Message] = Field(min_length=1)
    margin: float | None = None
    source: str = ""

    @model_validator(mode="after")
    def _differ(self) -> PreferencePair:
        if self.chosen == self.rejected:
            raise ValueError("chosen and rejected are the same text")
        return self


class DocumentPage(Row):
    """One page of a document; `page` counts from 1. `id` is `<document>#<page>` when it is not given."""

    id: str = ""
    document: str = Field(min_length=1)
    page: int = Field(ge=1)
    text: str
    metadata: dict[str, str] = {}

    @model_validator(mode="after")
    def _name(self) -> DocumentPage:
        self.id = self.id or f"{self.document}#{self.page}"
        return self


class Dropped(BaseModel):
    """A row that did not pass, and why. `row` is the row as it was read."""

    reason: str
    row: dict[str, Any]
    detail: str = ""
