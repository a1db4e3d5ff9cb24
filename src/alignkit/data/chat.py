"""The only place where a conversation or a document becomes tokens and labels.

A prompt's ids are the chat template with the generation prompt, exactly what the model sees when it generates. An
answer's ids are what the template adds when the answer is there, up to and including the end-of-turn token, and nothing
after it (ChatML adds a newline that no model ever generates). Where that token stands is found by rendering a probe
conversation, so any template will do whose rendering of a prompt is a prefix of its rendering with the answer. Several
answers in one conversation are found turn by turn in the same way: what stands between the end of one and the beginning
of the next is never learned. A document is learned whole, and its end with it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from alignkit.core.config import ModelConfig
from alignkit.core.errors import UserError, first_line
from alignkit.core.records import ChatExample, Message, QAExample, TextExample, Tools
from alignkit.data.tools import Shown, find_shown, fit, to_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""Label of a token that is not learned."""

_SWITCHES: dict[str, Any] = {"enable_thinking": False}
"""For the template: answers stand as they are, without a reasoning block. A template ignores switches it lacks."""


@dataclass(frozen=True)
class EncodedExample:
    """Token ids and their labels: the id itself where it is learned, `IGNORED` elsewhere."""

    input_ids: list[int]
    labels: list[int]
    ends: int = 1
    """How many ends are learned: one for each learned turn; one where a document ends, none in its other pieces."""
    document_end: int | None = None
    """The token that ends the document; None in a conversation."""


class RefusedError(UserError):
    """A conversation that the chat template or the tokenizer cannot take; other conversations may be fine."""


def qa_prompt(example: QAExample) -> list[Message]:
    """One user turn: the statement, an empty line, the question; or the one of the two that is not empty."""
    parts = [part for part in (example.instruction, example.input) if part.strip()]
    if not parts:
        raise UserError(f"row '{example.id}': instruction and input are both empty. Remove the row.")
    return [Message(role="user", content="\n\n".join(parts))]


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Tools | None = None
) -> list[int]:
    """Token ids of a conversation up to where the assistant's next turn begins.

    The text of a special token inside a message becomes that token; `special_token_in` finds such messages.
    """
    return _tokens(tokenizer, _render(tokenizer, messages, tools, for_generation=True))


def encode_conversation(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Token ids of a conversation that ends with an assistant turn, up to and including its end-of-turn token."""
    return _encode(tokenizer, messages, [len(messages) - 1], None).input_ids


def encode_rendered(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a conversation that the chat template has rendered already, its end-of-turn token last.

    Raises `RefusedError` for a text that does not end there: it is no conversation that ends with an answer.
    """
    ending = _ending(tokenizer)
    ids = _tokens(tokenizer, text.removesuffix(ending.rest))
    if ids[-1:] != [ending.token]:
        token = tokenizer.convert_ids_to_tokens(ending.token)
        raise RefusedError(f"a text that does not end with {token} is no conversation that the chat template rendered")
    return ids


def encode_example(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[Message],
    completion: Sequence[Message],
    max_length: int,
    *,
    tools: Tools | None = None,
    whole: bool = False,
) -> EncodedExample | str:
    """Token ids and labels of a conversation, or the reason to drop the row.

    Every assistant turn of the completion is learned, with its end-of-turn token; if `whole`, those of the prompt, too,
    but for a greeting that opens it: no prompt asks for that.
    """
    messages, first = [*prompt, *completion], 1 if whole else len(prompt)
    learned = [turn for turn in range(first, len(messages)) if messages[turn].role == "assistant"]
    if any(not messages[turn].content.strip() and not messages[turn].tool_calls for turn in learned):
        return "empty answer"
    if special := special_token_in(tokenizer, messages, tools):
        return f"the text holds the special token {special}"
    try:
        encoded = _encode(tokenizer, messages, learned, tools)
    except RefusedError as error:
        return str(error)
    return f"longer than max_length ({max_length} tokens)" if len(encoded.input_ids) > max_length else encoded


def encode_document(
    tokenizer: PreTrainedTokenizerBase, text: str, end: int, max_length: int, *, split: bool = False
) -> list[EncodedExample] | str:
    """A document as one row whose tokens are all learned, with `end` behind them; or the reason to drop it.

    If `split`, one that is too long becomes several rows. Each begins with the last token of the one before it, which
    only gives the first prediction something to stand on: every token but the first is learned exactly once.
    """
    if not text.strip():
        return "empty document"
    if special := special_token_in(tokenizer, [Message(role="user", content=text)]):
        return f"the text holds the special token {special}"
    ids = [*tokenizer.encode(text, verbose=False), end]  # begins as the base's documents do: with bos where it has one
    if len(ids) > max_length and not (split and max_length > 1):
        return f"longer than max_length ({max_length} tokens)"
    pieces = [ids[start : start + max_length] for start in range(0, len(ids) - 1, max_length - 1)]
    return [
        EncodedExample(piece, [IGNORED, *piece[1:]], ends=int(number == len(pieces)), document_end=end)
        for number, piece in enumerate(pieces, 1)
    ]


def encode_row(
    tokenizer: PreTrainedTokenizerBase,
    example: ChatExample | TextExample,
    model: ModelConfig,
    *,
    whole: bool = False,
    split: bool = False,
) -> list[EncodedExample] | str:
    """A conversation as one row, a document as one or, if `split`, several; or the reason to drop it.

    See `encode_example` and `encode_document`; the longest row has `model.max_length` tokens.
    """
    if isinstance(example, TextExample):
        end = document_end_id(tokenizer, model.document_end)
        return encode_document(tokenizer, example.text, end, model.max_length, split=split)
    row = encode_example(
        tokenizer, example.prompt, example.completion, model.max_length, tools=example.tools, whole=whole
    )
    return row if isinstance(row, str) else [row]


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that the chat template puts after an assistant turn: where generation stops.

    Raises `UserError` when there is no chat template, or none that alignkit can learn from.
    """
    return _ending(tokenizer).token


def template_up_to_the_end(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's chat template without what it writes after an assistant's last turn (ChatML: a newline).

    For programs that read a score at the last token of whatever the template renders.
    """
    template, rest = str(tokenizer.chat_template), _ending(tokenizer).rest
    if not rest:
        return template
    shown = template.removesuffix("\n")
    end = f"conversation if add_generation_prompt else conversation.removesuffix({rest!r})"
    return f"{{% set conversation %}}\n{shown}{{% endset %}}{{{{ {end} }}}}"


def document_end_id(tokenizer: PreTrainedTokenizerBase, token: str | None) -> int:
    """The token that ends a document: the special token that is named, or else the tokenizer's eos token."""
    token = token or tokenizer.eos_token
    if token not in _special_tokens(tokenizer):
        raise UserError(
            f"model.document_end={token}: name the special token that ends a document. An ordinary one could stand "
            "within a text."
        )
    return tokenizer.get_vocab()[token]


def special_token_in(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Tools | None = None
) -> str | None:
    """The first special token whose text stands in a message, where it would be read as the token; None for none.

    Calls and schemas count as what messages say.
    """
    pattern = _special_pattern(tuple(sorted(_special_tokens(tokenizer))))
    called = [to_json(call.model_dump()) for message in messages for call in message.tool_calls or ()]
    found = map(pattern.search, [*(message.content for message in messages), *called, to_json(tools or [])])
    return next((match[0] for match in found if match), None)


# -- rendering ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Ending:
    """How a template ends an assistant turn: the end-of-turn token, and the text that follows it."""

    token: int
    rest: str


def _encode(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], learned: Sequence[int], tools: Tools | None
) -> EncodedExample:
    """The conversation up to the end of its last turn, whose turns number `learned` are to be learned.

    Raises `RefusedError` where what a model sees before a turn is not what stands before it once it is there.
    """
    if not messages or messages[-1].role != "assistant":
        raise RefusedError("the conversation does not end with an assistant turn")
    ending = _ending(tokenizer)
    ids: list[int] = []
    labels: list[int] = []
    done = ""
    for turn in learned:
        prompt = _render(tokenizer, messages[:turn], tools, for_generation=True)
        closed = _render(tokenizer, messages[: turn + 1], tools, for_generation=False)
        if not prompt.startswith(done):
            raise RefusedError("the chat template writes earlier answers differently when others follow")
        if not closed.startswith(prompt) or not closed.endswith(ending.rest):
            raise RefusedError("the chat template writes this prompt differently when its answer is there")
        before = _continue(tokenizer, ids, done, prompt)
        done = closed[: len(closed) - len(ending.rest)]
        answer = _continue(tokenizer, ids + before, prompt, done)
        if answer[-1:] != [ending.token]:
            raise RefusedError("the chat template ends this turn with another token than a plain answer")
        ids += before + answer
        labels += [IGNORED] * len(before) + answer
    return EncodedExample(ids, labels, ends=len(learned))


def _continue(tokenizer: PreTrainedTokenizerBase, ids: list[int], text: str, longer: str) -> list[int]:
    """The ids that come after `ids`, those of `text`, where the text goes on to be `longer`."""
    whole = _tokens(tokenizer, longer)
    if whole[: len(ids)] == ids:
        return whole[len(ids) :]
    # What is new begins with characters that merge with the last token before it. A model that generates cannot reach
    # back into its prompt, so what is new stands on its own, and later turns follow the tokens as they are generated.
    return _tokens(tokenizer, longer[len(text) :])


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Tools | None, *, for_generation: bool
) -> str:
    fitted = fit(messages, tools or [], _shown(tokenizer, str(tokenizer.chat_template)))
    if isinstance(fitted, str):
        raise RefusedError(fitted)
    plain = [message.model_dump() for message in fitted[0]]
    return _apply(tokenizer, plain, fitted[1], for_generation=for_generation)


def _apply(
    tokenizer: PreTrainedTokenizerBase,
    turns: list[dict[str, Any]],
    tools: Tools | None,
    *,
    for_generation: bool,
) -> str:
    if not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path or ''} has no chat template: use a chat model, "
            "or set model.chat_template to a .jinja file"
        )
    try:
        rendered = tokenizer.apply_chat_template(
            turns,
            tools=[*tools] if tools else None,
            tokenize=False,
            add_generation_prompt=for_generation,
            **_SWITCHES,
        )
    except Exception as error:  # templates raise what they like: jinja2's errors, TypeError, ...
        raise RefusedError(f"the chat template refuses the conversation ({first_line(error)})") from error
    return str(rendered)


@lru_cache(maxsize=8)
def _shown(tokenizer: PreTrainedTokenizerBase, template: str) -> Shown:
    """What the template shows of calls, schemas and roles. `template` is in the cache's key: users replace it."""

    def render(turns: list[dict[str, Any]], tools: Tools | None) -> str | None:
        try:
            return _apply(tokenizer, turns, tools, for_generation=False)
        except RefusedError:
            return None

    return find_shown(render)


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False, verbose=False))


def _ending(tokenizer: PreTrainedTokenizerBase) -> _Ending:
    return _probe(tokenizer, str(tokenizer.chat_template))


@lru_cache(maxsize=8)
def _probe(tokenizer: PreTrainedTokenizerBase, template: str) -> _Ending:
    """Find out how the template ends an assistant turn. `template` is in the cache's key: users replace it."""
    question, answer = Message(role="user", content="Is this a probe?"), Message(role="assistant", content="It is.")
    try:
        prompt = _render(tokenizer, [question], None, for_generation=True)
        whole = _render(tokenizer, [question, answer], None, for_generation=False)
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
