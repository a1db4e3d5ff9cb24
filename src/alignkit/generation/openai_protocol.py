"""What an OpenAI-compatible server reads and says: requests checked field by field, replies, errors in its form."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import from_json

from alignkit.core.config import SamplingConfig
from alignkit.core.records import Message

Form = TypeVar("Form", bound=BaseModel)

IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
"""Parameters that change no answer: accepted whatever they say."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "logit_bias": (None, {}),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "parallel_tool_calls": (None, True, False),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
}
"""Parameters that are not supported, and the values with which they ask for nothing: those are accepted."""
MOST_CONVERSATIONS = 64
"""Conversations in one request for rewards."""


class ApiError(Exception):
    """A request that gets no answer: the status and the fields of the error."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        kind = {401: "authentication_error", 500: "server_error", 503: "server_error"}.get(status)
        self.body = {
            "error": {"message": message, "type": kind or "invalid_request_error", "param": param, "code": code}
        }


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Request):
    """What a stream holds besides the text. Obfuscation, padding against eavesdroppers, is never added."""

    include_usage: bool = False
    include_obfuscation: bool = False


class ChatRequest(_Request):
    """A request for chat completions."""

    model: str
    messages: list[Message] = Field(min_length=1)
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    stop: list[str] = Field(default=[], max_length=16)
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    n: int = Field(default=1, ge=1)
    stream: bool = False
    stream_options: StreamOptions | None = None

    @field_validator("messages", mode="before")
    @classmethod
    def _plain(cls, value: Any) -> Any:
        return [_plain_message(each) for each in value] if isinstance(value, list) else value

    @field_validator("stop", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("stop")
    @classmethod
    def _not_empty(cls, value: list[str]) -> list[str]:
        if not all(value):
            raise ValueError("a stop string must not be empty")
        return value

    @model_validator(mode="after")
    def _agree(self) -> ChatRequest:
        both = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(both) > 1:
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        if self.stream_options and not self.stream:
            raise ValueError("stream_options is only for stream=true")
        return self

    @property
    def most_tokens(self) -> int | None:
        """How many tokens an answer may have, under either name; None where the request leaves it open."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def usage_wanted(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, max_tokens: int) -> SamplingConfig:
        """The same as the other generators read it."""
        return SamplingConfig(
            n=self.n, temperature=[self.temperature] * 2, top_p=[self.top_p] * 2, max_new_tokens=max_tokens
        )

    def drawn_seed(self) -> int:
        """The seed that is asked for, or one that nobody knows."""
        return secrets.randbits(63) if self.seed is None else self.seed


class RewardRequest(_Request):
    """A request for rewards: one conversation, or several. Each ends with the answer to score."""

    model: str | None = None
    messages: list[Any] | None = None
    conversations: list[list[Any]] | None = Field(default=None, min_length=1, max_length=MOST_CONVERSATIONS)

    @model_validator(mode="after")
    def _one_or_several(self) -> RewardRequest:
        if (self.messages is None) == (self.conversations is None):
            raise ValueError("give either messages, one conversation, or conversations, a list of them")
        return self

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The conversations as the reward model reads them."""
        several = self.conversations if self.conversations is not None else [self.messages]
        return [{"messages": messages} for messages in several]


def read_chat(body: bytes) -> ChatRequest:
    """The request in a body. Raises `ApiError` that names the parameter."""
    fields = _read_object(body)
    for name in IGNORED:
        fields.pop(name, None)
    for name, neutral in NEUTRAL.items():
        if fields.pop(name, None) not in neutral:
            raise ApiError(400, f"{name} is not supported here: leave it out", param=name, code="unsupported_parameter")
    fields = {name: value for name, value in fields.items() if value is not None}  # null asks for the default
    return _validated(ChatRequest, fields)


def read_rewards(body: bytes) -> RewardRequest:
    """The request for rewards in a body. Raises `ApiError`."""
    return _validated(RewardRequest, _read_object(body))


def _read_object(body: bytes) -> dict[str, Any]:
    try:
        fields = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from error
    if not isinstance(fields, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    return fields


def _validated(form: type[Form], fields: dict[str, Any]) -> Form:
    try:
        return form.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        param = ".".join(map(str, first["loc"])) or None
        if first["type"] == "extra_forbidden" and len(first["loc"]) == 1:
            raise ApiError(400, f"unknown parameter: {param}", param=param, code="unknown_parameter") from error
        said = first["msg"].removeprefix("Value error, ")
        message = f"{param}: {said}" if param else said
        raise ApiError(400, message, param=param, code="invalid_value") from error


def _plain_message(value: Any) -> Any:
    """A message as our records have it: text parts joined, `developer` as `system`, what is null left out."""
    if not isinstance(value, dict):
        return value
    message = {name: each for name, each in value.items() if each is not None and each != []}
    if message.get("role") == "developer":
        message["role"] = "system"
    content = message.get("content")
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        if len(texts) < len(content) or not all(isinstance(text, str) for text in texts):
            raise ValueError("content may only have parts of the type text")
        message["content"] = "".join(map(str, texts))
    return message


# -- replies -----------------------------------------------------------------------------------------------------------


class ChatReply:
    """The parts that a reply to one chat request is made of."""

    def __init__(self, model: str, *, stream: bool, usage_wanted: bool = False) -> None:
        kind = "chat.completion.chunk" if stream else "chat.completion"
        self.head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "object": kind, "created": int(time.time())}
        self.head["model"] = model
        self.usage_wanted = usage_wanted

    def whole(self, texts: list[str], reasons: list[str], usage: Mapping[str, int]) -> dict[str, Any]:
        """The reply at once."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": None,
                "finish_reason": reason,
            }
            for index, (text, reason) in enumerate(zip(texts, reasons, strict=True))
        ]
        return {**self.head, "choices": choices, "usage": dict(usage)}

    def chunk(self, index: int, delta: Mapping[str, str], reason: str | None = None) -> dict[str, Any]:
        """A part of one answer. Where the usage comes at the end, every other part says that it has none."""
        choice = {"index": index, "delta": dict(delta), "logprobs": None, "finish_reason": reason}
        return {**self.head, "choices": [choice], **({"usage": None} if self.usage_wanted else {})}

    def last(self, usage: Mapping[str, int]) -> dict[str, Any]:
        """The part behind all answers."""
        return {**self.head, "choices": [], "usage": dict(usage)}


def describe_usage(prompt: int, completion: int) -> dict[str, int]:
    """Tokens as the protocol counts them; an answer's end-of-turn token is one of its own."""
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def describe_models(names: list[str]) -> list[dict[str, Any]]:
    """The models as `/v1/models` lists them."""
    return [{"id": name, "object": "model", "created": 0, "owned_by": "alignkit"} for name in names]
