"""From a request to what is sent, and from what comes back to a reply. Nothing here talks to anybody.

`request_parts` is everything that decides the reply, `store_key` its hash; `request_body` is how it is written for one
server, which may change (`dialect`) without changing the key.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from pydantic import BaseModel

from alignkit.core.config import Structured, TeacherApi, TeacherConfig
from alignkit.core.hashing import hash_text
from alignkit.core.records import Message
from alignkit.data.tools import tagged, to_json, tools_as_text
from alignkit.teacher.address import server_url
from alignkit.teacher.client import Request
from alignkit.teacher.dialect import Dialect, response_format, strict_schema
from alignkit.teacher.failures import DECLINED, FILTERED, Failure, classify, no_answer, short
from alignkit.teacher.store import Reply

LONGEST_REPLY_CHARACTERS = 1_000_000
"""A longer text is nobody's answer; only its beginning is kept."""
BEGINNING_CHARACTERS = 2_000
CUT = "cut at teacher.max_tokens"
_ROLES = {"system": "System", "user": "User", "assistant": "Assistant", "tool": "Tool"}


def request_parts(config: TeacherConfig, request: Request) -> dict[str, Any]:
    """Everything that decides the reply to a request: host, model, messages, tools, sampling, sample index, schema."""
    temperature = config.temperature if request.temperature is None else request.temperature
    parts = {
        "host": server_url(config),
        "api": config.api.value,
        "model": config.model,
        "messages": [_message(message) for message in request.messages],
        "temperature": temperature,
        "max_tokens": config.max_tokens if request.max_tokens is None else request.max_tokens,
        "sample": request.sample,
        "schema": None if request.shape is None else schema_name(request.shape),
    }
    return parts | ({"tools": request.tools} if request.tools else {})


def store_key(parts: Mapping[str, Any]) -> str:
    """The key of a request in the response store: 64 hexadecimal digits. Also its `custom_id` in a batch."""
    return hash_text(json.dumps(parts, sort_keys=True))


def request_body(
    parts: Mapping[str, Any], request: Request, dialect: Dialect, rung: Structured | None = None
) -> dict[str, Any]:
    """The JSON body for the endpoint; `parts` are the request's. `rung` overrides the dialect's."""
    body: dict[str, Any] = {"model": parts["model"]}
    if parts["api"] == TeacherApi.completions.value:
        body |= {"prompt": prompt_text(request.messages), "stop": [f"\n{_ROLES['user']}:"]}
    elif request.tools and not dialect.tools:
        body["messages"] = [_message(message) for message in tools_as_text(request.messages, request.tools)]
    else:
        body["messages"] = parts["messages"]
        if request.tools:
            body["tools"] = request.tools
    body[dialect.max_tokens] = parts["max_tokens"]
    if dialect.temperature:
        body["temperature"] = parts["temperature"]
    if request.shape and (wanted := response_format(request.shape, rung or dialect.structured)) is not None:
        body["response_format"] = wanted
    return body


def endpoint(config: TeacherConfig) -> str:
    """The path below the base URL that bodies are posted to."""
    return "/completions" if config.api is TeacherApi.completions else "/chat/completions"


def prompt_text(messages: Sequence[Message]) -> str:
    """A conversation as one prompt for a model without a chat template: `User: ...`, blank line, `Assistant:`."""
    turns = [f"{_ROLES[message.role]}: {clean(message.content)}" for message in messages]
    return "\n\n".join([*turns, f"{_ROLES['assistant']}:"])


def read_completion(payload: Any) -> Reply | Failure:
    """The reply in a completion object (chat or text), which may be no completion at all."""
    if not isinstance(payload, Mapping):
        return no_answer("the server replied with something that is no completion", 200)
    choices = payload.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, Mapping):
        return _no_choices(payload)
    message = choice["message"] if isinstance(choice.get("message"), Mapping) else choice
    text, refusal = message.get("content", message.get("text")), message.get("refusal")
    finish = choice.get("finish_reason")
    reason, detail = None, ""
    if isinstance(refusal, str) and refusal.strip() and not text:
        text, reason, detail = refusal, DECLINED, short(refusal)
    elif finish == "content_filter":
        reason = FILTERED
    elif finish == "length":
        reason = CUT
    if isinstance(calls := message.get("tool_calls"), list) and calls:
        text = "\n".join([*([text] if isinstance(text, str) and text.strip() else []), *map(_call_text, calls)])
    text = clean(text) if isinstance(text, str) else None
    if text is not None and len(text) > LONGEST_REPLY_CHARACTERS:
        reason, detail = "answer far too long", f"{len(text)} characters"
        text = text[:BEGINNING_CHARACTERS]
    prompt_tokens, completion_tokens = _usage(payload)
    model = payload.get("model")
    return Reply(
        text if text is not None or reason else "",
        finish if isinstance(finish, str) else None,
        prompt_tokens,
        completion_tokens,
        clean(model) if isinstance(model, str) else None,
        reason=reason,
        detail=clean(detail),
    )


def _message(message: Message) -> dict[str, Any]:
    """A turn in the protocol's form, where the arguments of a call are JSON text."""
    turn: dict[str, Any] = {"role": message.role, "content": clean(message.content)}
    turn |= {name: value for name in ("name", "tool_call_id") if (value := getattr(message, name)) is not None}
    if message.tool_calls:
        calls = [call.model_dump(exclude_none=True) for call in message.tool_calls]
        turn["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": clean(to_json(call["function"]["arguments"]))}}
            for call in calls
        ]
    return turn


def _call_text(call: Any) -> str:
    """A call of a reply in the textual form. Arguments that are not JSON stay as they are, for the reader to see."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        return tagged(to_json(call))
    arguments = function.get("arguments")
    arguments = arguments if isinstance(arguments, str) else to_json(arguments)
    return tagged(f'{{"name": {to_json(function.get("name"))}, "arguments": {arguments or "{}"}}}')


def clean(text: str) -> str:
    """A text without lone surrogates, which can be neither stored nor sent."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


@cache
def schema_name(shape: type[BaseModel]) -> str:
    """A shape's name with a hash of its schema: a change of the one or the other asks anew."""
    return f"{shape.__name__}-{hash_text(json.dumps(strict_schema(shape), sort_keys=True))[:16]}"


def _no_choices(payload: Mapping[str, Any]) -> Failure:
    """A completion without choices: some servers send their errors with status 200."""
    prompt_tokens, completion_tokens = _usage(payload)
    error = payload.get("error")
    if error:
        code = error.get("code") if isinstance(error, Mapping) else None
        status = code if isinstance(code, int) and 400 <= code < 600 else 500
        return classify(status, payload)
    failure = no_answer("the server replied with a completion that holds no choices", 200)
    return replace(failure, prompt_tokens=prompt_tokens, completion_tokens=completion_tokens)


def _usage(payload: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Prompt and completion tokens as the server reports them; a completion it does not speak of has none."""
    usage = payload.get("usage")
    if not isinstance(usage, Mapping):
        return None, None
    prompt, completion = _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens"))
    return (None, None) if prompt is None else (prompt, completion or 0)


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and 0 <= value < 2**53 else None
