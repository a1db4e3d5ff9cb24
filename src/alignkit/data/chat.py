"""The only place where a conversation becomes tokens and labels.

The prompt's ids are the chat template with the generation prompt, exactly what the model sees when it generates. The
answer's ids are what the template adds when the answer is there, up to and including the end-of-turn token, and nothing
after it (ChatML adds a newline that no model ever generates). Where that token stands is found by rendering a probe
conversation, so any template will do whose rendering of a prompt is a prefix of its rendering with the answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import TYPE_CHECKING, Any

from alignkit.core.errors import UserError
from alignkit.core.records import Message, QAExample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""Label of a token that is not learned."""

_SWITCHES: dict[str, Any] = {"enable_thinking": False}
"""For the template: answers stand as they are, without a reasoning block. A template ignores switches it lacks."""

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Characters that could steer a terminal."""


@dataclass(frozen=True)
class EncodedExample:
    """Token ids of prompt and answer, and the labels: `IGNORED` on the prompt, the id itself on the answer."""

    input_ids: list[int]
    labels: list[int]


class RefusedError(UserError):
    """A conversation that the chat template or the tokenizer cannot take; other conversations may be fine."""


def qa_prompt(example: QAExample) -> list[Message]:
    """One user turn: the statement, an empty line, the question; or the one of the two that is not empty."""
    parts = [part for part in (example.instruction, example.input) if part.strip()]
    if not parts:
        raise UserError(f"row '{example.id}': instruction and input are both empty. Remove the row.")
    return [Message(role="user", content="\n\n".join(parts))]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Token ids of a conversation up to where the assistant's next turn begins.

    The text of a special token inside a message becomes that token; `special_token_in` finds such messages.
    """
    return _tokens(tokenizer, _render(tokenizer, messages, for_generation=True))


def encode_conversation(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Token ids of a conversation that ends with an assistant turn, up to and including its end-of-turn token."""
    prompt_ids, answer_ids = _encode(tokenizer, messages)
    return prompt_ids + answer_ids


def encode_example(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message], completion: Sequence[Message], max_length: int
) -> EncodedExample | str:
    """Token ids and labels of a prompt and its completion (one assistant turn), or the reason to drop the row."""
    messages = [*prompt, *completion]
    if not messages[-1].content.strip():
        return "empty answer"
    if special := special_token_in(tokenizer, messages):
        return f"the text holds the special token {special}"
    try:
        prompt_ids, answer_ids = _encode(tokenizer, messages)
    except RefusedError as error:
        return str(error)
    if len(prompt_ids) + len(answer_ids) > max_length:
        return f"longer than max_length ({max_length} tokens)"
    return EncodedExample(prompt_ids + answer_ids, [IGNORED] * len(prompt_ids) + answer_ids)


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that the chat template puts after an assistant turn: where generation stops.

    Raises `UserError` when there is no chat template, or none that alignkit can learn from.
    """
    return _ending(tokenizer).token


def special_token_in(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str | None:
    """The first special token whose text stands in a message, where it would be read as the token; None for none."""
    pattern = _special_pattern(tuple(sorted(_special_tokens(tokenizer))))
    found = (pattern.search(message.content) for message in messages)
    return next((match[0] for match in found if match), None)


# -- rendering ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Ending:
    """How a template ends an assistant turn: the end-of-turn token, and the text that follows it."""

    token: int
    rest: str


def _encode(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
    """Token ids of the prompt and of the answer. Raises `RefusedError` when the one is not a prefix of the whole."""
    if not messages or messages[-1].role != "assistant":
        raise RefusedError("the conversation does not end with an assistant turn")
    ending = _ending(tokenizer)
    prompt = _render(tokenizer, messages[:-1], for_generation=True)
    whole = _render(tokenizer, messages, for_generation=False)
    if not whole.startswith(prompt) or not whole.endswith(ending.rest):
        raise RefusedError("the chat template writes this prompt differently when its answer is there")
    answer = whole[len(prompt) : len(whole) - len(ending.rest)]
    prompt_ids, ids = _tokens(tokenizer, prompt), _tokens(tokenizer, prompt + answer)
    if ids[: len(prompt_ids)] == prompt_ids:
        return prompt_ids, ids[len(prompt_ids) :]
    # The answer begins with characters that merge with the prompt's last token. A model that generates cannot reach
    # back into its prompt, so the answer stands on its own.
    return prompt_ids, _tokens(tokenizer, answer)


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, for_generation: bool) -> str:
    if not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path or ''} has no chat template: use a chat model, "
            "or set model.chat_template to a .jinja file"
        )
    plain = [message.model_dump() for message in messages]
    try:
        rendered = tokenizer.apply_chat_template(
            plain, tokenize=False, add_generation_prompt=for_generation, **_SWITCHES
        )
    except Exception as error:  # templates raise what they like: jinja2's errors, TypeError, ...
        raise RefusedError(f"the chat template refuses the conversation ({str(error).splitlines()[0]})") from error
    return str(rendered)


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False, verbose=False))


def _ending(tokenizer: PreTrainedTokenizerBase) -> _Ending:
    return _probe(tokenizer, str(tokenizer.chat_template))


@lru_cache(maxsize=8)
def _probe(tokenizer: PreTrainedTokenizerBase, template: str) -> _Ending:
    """Find out how the template ends an assistant turn. `template` is in the cache's key: users replace it."""
    question, answer = Message(role="user", content="Is this a probe?"), Message(role="assistant", content="It is.")
    try:
        prompt = _render(tokenizer, [question], for_generation=True)
        whole = _render(tokenizer, [question, answer], for_generation=False)
    except RefusedError as error:
        raise UserError(f"{error}, even for one question and its answer. Set model.chat_template.") from error
    if not whole.startswith(prompt):
        raise UserError(
            f"the chat template opens an answer with {prompt[-40:]!r} when it is to be generated, but writes it "
            "differently when it is there: training and generation would not agree. Set model.chat_template."
        )
    after = whole[len(prompt) :].rpartition(answer.content)[2]
    specials = _special_tokens(tokenizer)
    token = next((id for id in _tokens(tokenizer, after) if tokenizer.convert_ids_to_tokens(id) in specials), None)
    if answer.content not in whole[len(prompt) :] or token is None:
        raise UserError(
            f"the chat template ends an assistant turn with {after!r}, which holds no special token of the tokenizer: "
            "a model could not learn to stop. Set model.chat_template."
        )
    return _Ending(token, rest=after.partition(str(tokenizer.convert_ids_to_tokens(token)))[2])


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Texts of all special tokens, also those that have no role such as eos."""
    return {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}


@lru_cache(maxsize=8)
def _special_pattern(tokens: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(token) for token in tokens) or r"(?!)")


# -- looking at labels -------------------------------------------------------------------------------------------------


def audit_labels(tokenizer: PreTrainedTokenizerBase, encoded: Sequence[EncodedExample]) -> list[tuple[str, bool, str]]:
    """Check the labels before training: (name, passed, detail) for each rule. Rows may be padded."""
    end, pad = end_of_turn_id(tokenizer), tokenizer.pad_token_id
    learned = [[index for index, label in enumerate(row.labels) if label != IGNORED] for row in encoded]
    rows = list(zip(encoded, learned, strict=True))
    rules = (
        ("every row learns something", [bool(where) for where in learned]),
        ("end of turn is learned", [bool(where) and row.labels[where[-1]] == end for row, where in rows]),
        ("prompt is not learned", [bool(where) and where[0] > 0 and _is_block(where) for where in learned]),
        ("padding is not learned", [pad == end or all(row.labels[i] != pad for i in where) for row, where in rows]),
        ("labels equal the tokens", [all(row.labels[i] == row.input_ids[i] for i in where) for row, where in rows]),
    )
    return [(name, bool(results) and all(results), _count(results)) for name, results in rules]


def preview(
    tokenizer: PreTrainedTokenizerBase, encoded: Sequence[EncodedExample], count: int = 3, *, colour: bool = True
) -> str:
    """The first rows as text: what is learned stands in brackets ⟦ ⟧ and, with `colour`, in green on a terminal."""
    green, grey, plain = ("\033[32m", "\033[90m", "\033[0m") if colour else ("", "", "")
    shown = []
    for row in encoded[:count]:
        parts = []
        for is_learned, ids in _runs(row):
            text = _CONTROL.sub("␛", str(tokenizer.decode(ids)))
            parts.append(f"{green}⟦{text}⟧{plain}" if is_learned else f"{grey}{text}{plain}")
        shown.append("".join(parts))
    return "\n\n".join(f"row {number}\n{text}" for number, text in enumerate(shown, 1))


def _is_block(positions: list[int]) -> bool:
    return positions[-1] - positions[0] + 1 == len(positions)


def _count(results: list[bool]) -> str:
    if all(results):
        return f"{len(results)} rows"
    return f"{results.count(False)} of {len(results)} rows fail, the first is row {results.index(False) + 1}"


def _runs(row: EncodedExample) -> Iterator[tuple[bool, list[int]]]:
    """The row's tokens in runs that are learned or not."""
    pairs: Any = zip(row.labels, row.input_ids, strict=True)
    for is_learned, run in groupby(pairs, key=lambda pair: pair[0] != IGNORED):
        yield is_learned, [id for _, id in run]
