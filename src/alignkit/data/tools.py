"""Tool calls and tool schemas for the chat template: as they are where it shows them, else in a textual form of ours.

Many templates ignore what they do not know, so that a call would vanish from the conversation without a word. What a
template shows is found by rendering probes. The textual form of a call, at the end of its turn's content:

    <tool_call>
    {"name": "retrieve", "arguments": {"query": "Where is Lund?"}}
    </tool_call>

The schemas then stand in the system turn. JSON keeps other scripts as they are, in training and in generation alike.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from pydantic_core import from_json

from alignkit.core.records import Message, ToolCall, Tools

Turns = list[dict[str, Any]]
"""Turns as a chat template takes them."""

_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)


class MalformedCallError(ValueError):
    """A generated turn begins a tool call that cannot be read."""


@dataclass(frozen=True)
class Shown:
    """What a template shows of what it is given."""

    calls: bool
    several_calls: bool
    """Whether all of several calls in one turn."""
    text_beside_calls: bool
    schemas: bool
    roles: frozenset[str]
    """Roles whose turns do not vanish. A template that refuses a turn says so itself."""


def find_shown(render: Callable[[Turns, Tools | None], str | None]) -> Shown:
    """Find out what a template shows, by words that stand nowhere else. `render` gives None for a refusal."""
    user, system = {"role": "user", "content": "probed_text"}, {"role": "system", "content": "probed_text"}
    identity = "probe0001"  # some templates demand nine characters
    first, second = (
        {
            "type": "function",
            "id": identity,
            "function": {"name": "probed_function", "arguments": {"probed_key": value}},
        }
        for value in ("probed_value", "another_value")
    )
    call: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": [first]}
    result = {"role": "tool", "content": "probed_result", "name": "probed_function", "tool_call_id": identity}
    nothing = {"type": "object", "properties": {}}
    schema = {"type": "function", "function": {"name": "probed_function", "description": "", "parameters": nothing}}

    def shows(turns: Turns, *words: str, schemas: Tools | None = None, refused: bool = False) -> bool:
        text = render(turns, schemas)
        return refused if text is None else all(word in text for word in words)

    called = ("probed_function", "probed_value")
    knows_calls = shows([user, call], *called)
    before = call if knows_calls else {"role": "assistant", "content": "A call."}
    kept = {"tool": shows([user, before, result], "probed_result", refused=True)}
    kept["system"] = shows([system, {**user, "content": "Hello"}], "probed_text", refused=True)
    return Shown(
        calls=knows_calls,
        several_calls=shows([user, {**call, "tool_calls": [first, second]}], "another_value", refused=True),
        text_beside_calls=shows([user, {**call, "content": "probed_beside"}], *called, "probed_beside"),
        schemas=shows([user], "probed_function", schemas=[schema]),
        roles=frozenset({"user", "assistant", *(role for role, is_kept in kept.items() if is_kept)}),
    )


def fit(messages: Sequence[Message], tools: Tools, shown: Shown) -> tuple[list[Message], Tools | None] | str:
    """The turns and schemas to give to a template so that nothing vanishes, or the reason why something would."""
    fitted, schemas = list(messages), [dict(tool) for tool in tools] or None
    if not shown.calls:
        fitted = _with_calls_as_text(fitted)
    elif not shown.text_beside_calls and any(each.tool_calls and each.content.strip() for each in fitted):
        return "the chat template leaves out the text beside a tool call"
    elif not shown.several_calls and any(len(each.tool_calls or ()) > 1 for each in fitted):
        return "the chat template leaves out all but one of several tool calls"
    if schemas and not shown.schemas:
        fitted, schemas = _with_schemas_as_text(fitted, schemas), None
    if vanishing := {message.role for message in fitted} - shown.roles:
        return f"the chat template leaves out turns of the role {', '.join(sorted(vanishing))}"
    return fitted, schemas


def tools_as_text(messages: Sequence[Message], tools: Tools) -> list[Message]:
    """The turns for who is given nothing but text: calls in the textual form, the schemas in the system turn."""
    return _with_schemas_as_text(_with_calls_as_text(messages), tools)


def call_text(call: ToolCall) -> str:
    """A call in the textual form."""
    return tagged(to_json(call.function.model_dump()))


def tagged(body: str) -> str:
    """The JSON text of a call between the tags of the textual form."""
    return f"<tool_call>\n{body}\n</tool_call>"


def read_calls(text: str) -> tuple[str, list[ToolCall]]:
    """What a generated turn says, and the calls that it ends with: the inverse of `call_text`.

    Calls stand in their tags (what Qwen and Hermes write, and the textual form), or are bare JSON and the whole turn
    (what is left of a Mistral's or Llama's call, whose marks are special tokens). What follows a call is not read:
    models that go on there make up the result. Raises `MalformedCallError` for tags around anything but a call.
    """
    bodies = _CALL.findall(text)
    if bodies:
        return text[: text.index("<tool_call>")].strip(), [call for body in bodies for call in _calls(body)]
    if not text.lstrip().startswith(("{", "[")):
        return text, []
    try:
        return "", _calls(text)
    except MalformedCallError:  # JSON may be the answer
        return text, []


def _calls(body: str) -> list[ToolCall]:
    """The calls in a JSON object, or in a list of them. Llama calls the arguments parameters."""
    try:
        value = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise MalformedCallError("not JSON") from error
    entries = value if isinstance(value, list) else [value]
    arguments = [
        entry.get("arguments", entry.get("parameters")) if isinstance(entry, dict) else None for entry in entries
    ]
    if not entries or None in arguments:
        raise MalformedCallError("not a name and arguments")
    try:
        return [
            ToolCall.model_validate({"function": {"name": entry.get("name"), "arguments": given}})
            for entry, given in zip(entries, arguments, strict=True)
        ]
    except ValidationError as error:
        raise MalformedCallError("not a name and arguments") from error


def to_json(value: Any) -> str:
    """JSON that keeps other scripts as they are."""
    return json.dumps(value, ensure_ascii=False)


def _with_calls_as_text(messages: Sequence[Message]) -> list[Message]:
    return [_with_call_as_text(message) if message.tool_calls else message for message in messages]


def _with_call_as_text(message: Message) -> Message:
    said = [message.content] if message.content.strip() else []
    return Message(role=message.role, content="\n".join([*said, *map(call_text, message.tool_calls or ())]))


def _with_schemas_as_text(messages: list[Message], tools: Tools) -> list[Message]:
    """The schemas at the end of the system turn, or in a new one."""
    functions = "\n".join(to_json(tool) for tool in tools)
    form = '<tool_call>\n{"name": "...", "arguments": {...}}\n</tool_call>'
    text = f"Functions that can be called:\n{functions}\n\nA call is written like this:\n{form}"
    if messages and messages[0].role == "system":
        return [Message(role="system", content=f"{messages[0].content}\n\n{text}".strip()), *messages[1:]]
    return [Message(role="system", content=text), *messages]
