"""Conversations: TRL's `prompt` and `completion`, TRL's `messages`, ShareGPT's `conversations`; each may have `tools`.

A completion is one assistant turn, or several with other turns between them. Of whole conversations the last assistant
turn is the completion.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, Field

from alignkit.core.errors import UserError
from alignkit.core.records import ChatExample, Dropped, Message, Tools
from alignkit.data.sources.raw import RawRow

_END_OF_TEXT = "<|endoftext|>"


class _Conversation(BaseModel):
    messages: list[Message]
    tools: Tools | None = None
    parents: list[str] = []
    source: str = ""


class _SharedTurn(BaseModel):
    speaker: str = Field(alias="from")
    value: str


class _SharedConversation(BaseModel):
    conversations: list[_SharedTurn]


_SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "observation": "tool"}
"""Roles by the names that ShareGPT has for them; other names are roles already."""


class _PromptAndCompletion(BaseModel):
    prompt: str
    completion: str


def read_prompt_and_completion(raw: RawRow) -> ChatExample | Dropped:
    """A chat example; plain texts become one user turn and one assistant turn."""
    if isinstance(raw.fields["prompt"], str):
        texts = raw.record(_PromptAndCompletion)
        prompt = [{"role": "user", "content": texts.prompt}]
        completion = [{"role": "assistant", "content": without_end_of_text(texts.completion)}]
        example = raw.record(ChatExample, id=raw.id, prompt=prompt, completion=completion)
    else:
        example = raw.record(ChatExample, id=raw.id)
    if {example.completion[0].role, example.completion[-1].role} != {"assistant"}:
        raise UserError(
            f"{raw.place}: completion: must begin and end with an assistant turn. Put the turns before it into prompt."
        )
    problem = unusable([*example.prompt, *example.completion])
    return raw.drop(problem) if problem else example


def without_end_of_text(completion: str) -> str:
    """A completion as GPT-3 was fine-tuned on, without the end-of-text mark that closes it: the mark is no text."""
    text = completion.rstrip()
    return text.removesuffix(_END_OF_TEXT).strip() if text.endswith(_END_OF_TEXT) else completion


def read_messages(raw: RawRow) -> ChatExample | Dropped:
    """A conversation; all turns before its last, an assistant turn, become the prompt."""
    conversation = raw.record(_Conversation)
    messages = conversation.messages
    problem = unusable(messages)
    if problem:
        return raw.drop(problem)
    return ChatExample(
        id=raw.id,
        parents=conversation.parents,
        prompt=messages[:-1],
        completion=messages[-1:],
        tools=conversation.tools,
        source=conversation.source,
    )


def read_shared(raw: RawRow) -> ChatExample | Dropped:
    """A conversation in ShareGPT's form: `from` and `value`. A turn from `function_call` is a call as JSON text."""
    turns = raw.record(_SharedConversation).conversations
    messages = [_message(turn.speaker, turn.value) for turn in turns]
    return read_messages(RawRow(raw.place, raw.id, {**raw.fields, "messages": messages}))


def _message(speaker: str, value: str) -> dict[str, Any]:
    if speaker == "function_call":
        return {"role": "assistant", "tool_calls": [{"function": value}]}
    return {"role": _SPEAKERS.get(speaker, speaker), "content": value}


def unusable(messages: Sequence[Message]) -> str | None:
    """Why nothing can be learnt from a conversation; None when its last turn is an answer to the turns before it."""
    if not messages or messages[-1].role != "assistant":
        return "no final assistant turn"
    if not messages[-1].content.strip() and not messages[-1].tool_calls:
        return "empty answer"
    if not any(message.role == "user" and message.content.strip() for message in messages):
        return "empty question"
    return None
