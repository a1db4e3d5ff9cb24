"""The rows that pass between stages, one JSON object a line, with TRL's column names.

Every row has an `id` that it keeps from stage to stage, and may name the rows it was made from in `parents`: together
they let `alignkit lineage` walk from any row back to its seed. Unknown fields are kept, not dropped.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)
from pydantic_core import from_json


class Row(BaseModel):
    """What all rows share."""

    model_config = ConfigDict(extra="allow", strict=True, defer_build=True)

    id: str = Field(min_length=1)
    parents: list[str] = []


def _read_json_text(value: Any) -> Any:
    """What a text holds as JSON; anything else as it is. Data sets have arguments and schemas in either form."""
    return from_json(value, allow_inf_nan=False) if isinstance(value, str) else value


class _Turn(BaseModel):
    """A part of a conversation. What it does not have is not written: chat templates take a null for something."""

    model_config = ConfigDict(extra="forbid", strict=True, defer_build=True)

    @model_serializer(mode="wrap")
    def _without_absent(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if value is not None}


class FunctionCall(_Turn):
    """Which function is called, with which arguments: an object, which may come as JSON text."""

    name: str = Field(min_length=1)
    arguments: Annotated[dict[str, Any], BeforeValidator(_read_json_text)] = {}


class ToolCall(_Turn):
    """A call in the form of OpenAI and TRL; `id` is for chat templates that want one. ShareGPT has it as JSON text."""

    type: Literal["function"] = "function"
    id: str | None = None
    function: Annotated[FunctionCall, BeforeValidator(_read_json_text)]


Tools = Annotated[list[dict[str, Any]], BeforeValidator(_read_json_text)]
"""JSON schemas of the functions that may be called, or the JSON text of such a list."""


class Message(_Turn):
    """One turn of a conversation.

    An assistant turn may call tools (its `content` is then often empty, and may be null), and a turn of the role `tool`
    brings a result; `name` and `tool_call_id` say of what.
    """

    role: Literal["system", "user", "assistant", "tool"]
    content: str
    tool_calls: list[ToolCall] | None = None
    name: str | None = None
    tool_call_id: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _call_needs_no_text(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and fields.get("tool_calls") and fields.get("content") is None:
            return {**fields, "content": ""}
        return fields

    @model_validator(mode="after")
    def _only_assistants_call(self) -> Message:
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"a turn of the role {self.role} cannot call tools")
        self.tool_calls = self.tool_calls or None
        return self


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
    """A prompt and the completion to learn: an assistant turn, or several with tool and user turns between them."""

    prompt: list[Message] = Field(min_length=1)
    completion: list[Message] = Field(min_length=1)
    tools: Tools | None = None
    source: str = ""


class TextExample(Row):
    """A document, to be learned as a whole."""

    text: str
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


class RetrievalExample(Row):
    """A query, the passages that answer it and passages that do not, by the field names of LLM-Embedder.

    (Zhang et al., 2023, arXiv 2310.07554.) Several rows may ask one query: they have its `query_id`.
    """

    query: str = Field(min_length=1)
    pos: list[str] = []
    neg: list[str] = []
    pos_index: list[int | str] = []
    """Of each passage of `pos` its id in the corpus, where it is known; `neg_index` likewise."""
    neg_index: list[int | str] = []
    teacher_scores: list[float] | None = None
    """How good a teacher finds each passage, those of `pos` first, then those of `neg`; higher is better."""
    answers: list[str] = []
    task: str = Field(min_length=1)
    query_id: str = Field(min_length=1)

    @model_validator(mode="after")
    def _scores_belong_to_the_passages(self) -> RetrievalExample:
        passages = len(self.pos) + len(self.neg)
        if self.teacher_scores is not None and len(self.teacher_scores) != passages:
            raise ValueError(
                f"{len(self.teacher_scores)} teacher_scores for {passages} passages ({len(self.pos)} pos and "
                f"{len(self.neg)} neg): they were made for others, so remove them or score the passages again"
            )
        return self


class Dropped(BaseModel):
    """A row that did not pass, and why. `row` is the row as it was read."""

    reason: str
    row: dict[str, Any]
    detail: str = ""
