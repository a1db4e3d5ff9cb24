"""What the reward model is given to score: conversations that end with an answer, read and brought into groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from alignkit.core.errors import UserError
from alignkit.core.records import Message
from alignkit.data.chat import (
    RefusedError,
    encode_conversation,
    encode_prompt,
    encode_rendered,
    special_token_in,
)
from alignkit.models.value_head import PromptGroup


def group_by_prompt(
    tokenizer: Any, conversations: Sequence[Sequence[Message] | str], max_length: int
) -> tuple[list[PromptGroup], list[list[list[int]]], dict[int, str]]:
    """Conversations as groups of distinct answers to one prompt, and index -> reason for those that cannot be read.

    Beside the groups are, for each of their answers, the indices of the conversations that end with it. A conversation
    that is given as rendered text is a group of its own, without a prompt.
    """
    reasons: dict[int, str] = {}
    texts: dict[str, list[int]] = {}
    places: dict[tuple[str, ...], dict[str, list[int]]] = {}
    for index, conversation in enumerate(conversations):
        if isinstance(conversation, str):
            texts.setdefault(conversation, []).append(index)
        elif conversation[-1].tool_calls:
            reasons[index] = "the answer calls a tool"
        else:
            key = tuple(message.model_dump_json() for message in conversation[:-1])
            places.setdefault(key, {}).setdefault(conversation[-1].content, []).append(index)

    encoded: list[tuple[tuple[int, ...], list[tuple[int, ...] | str], list[list[int]]]] = [
        ((), [encode_text(tokenizer, text, max_length)], [indices]) for text, indices in texts.items()
    ]
    for answers in places.values():
        indices = list(answers.values())
        prompt: Any = conversations[indices[0][0]][:-1]
        encoded.append((*encode_answers(tokenizer, prompt, list(answers), max_length), indices))
    groups: list[PromptGroup] = []
    owners: list[list[list[int]]] = []
    for prompt_ids, answer_ids, indices in encoded:
        for ids, same in zip(answer_ids, indices, strict=True):
            reasons |= {index: ids for index in same if isinstance(ids, str)}
        if readable := tuple(ids for ids in answer_ids if not isinstance(ids, str)):
            groups.append(PromptGroup(prompt_ids, readable))
            owners.append([same for ids, same in zip(answer_ids, indices, strict=True) if not isinstance(ids, str)])
    return groups, owners, reasons


def encode_text(tokenizer: Any, text: str, max_length: int) -> tuple[int, ...] | str:
    """Token ids of a conversation that is rendered already, or the reason why it cannot be read."""
    try:
        ids = tuple(encode_rendered(tokenizer, text))
    except RefusedError as error:
        return str(error)
    return ids if len(ids) <= max_length else _too_long(len(ids), max_length)


def encode_answers(
    tokenizer: Any, prompt: Sequence[Message], answers: Sequence[str], max_length: int
) -> tuple[tuple[int, ...], list[tuple[int, ...] | str]]:
    """Token ids of a prompt, and of each answer with its end-of-turn token or the reason why it cannot be read."""
    try:
        prompt_ids = tuple(encode_prompt(tokenizer, prompt))
    except RefusedError as error:
        return (), [str(error)] * len(answers)
    encoded: list[tuple[int, ...] | str] = []
    for answer in answers:
        messages = [*prompt, Message(role="assistant", content=answer)]
        try:
            ids = encode_conversation(tokenizer, messages)
        except RefusedError as error:
            encoded.append(str(error))
            continue
        if special := special_token_in(tokenizer, messages):
            encoded.append(f"the text holds the special token {special}")
        elif len(ids) > max_length:
            encoded.append(_too_long(len(ids), max_length))
        else:
            encoded.append(tuple(ids[len(prompt_ids) :]))
    return prompt_ids, encoded


def _too_long(tokens: int, max_length: int) -> str:
    return f"longer than max_length ({tokens} of {max_length} tokens)"


def read_conversation(row: Mapping[str, Any] | str, index: int) -> list[Message] | str:
    """The conversation of a row to be scored; `UserError` naming row `index` when it has not the form."""
    if isinstance(row, str):
        return row
    try:
        if "messages" in row:
            messages = _turns(row["messages"], "user")
        else:
            messages = _turns(row["prompt"], "user") + _turns(row["completion"], "assistant")
    except (KeyError, TypeError, ValidationError) as error:
        raise UserError(
            f'row {index}: give {{"messages": [{{"role", "content"}}, ...]}} or {{"prompt", "completion"}} ({error})'
        ) from error
    if len(messages) < 2 or messages[-1].role != "assistant":
        raise UserError(f"row {index}: a conversation to score is a prompt and, at its end, an assistant's turn")
    return messages


def _turns(value: Any, role: str) -> list[Message]:
    """Messages, or a text as the one message of `role`."""
    if isinstance(value, str):
        return [Message.model_validate({"role": role, "content": value})]
    return [Message.model_validate(turn) for turn in value]
