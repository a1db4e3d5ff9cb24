"""What is learned of conversations with several answers, of tool calls, and of documents."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tiny_random import user

from alignkit.core.config import RowsConfig
from alignkit.core.records import ChatExample, Message
from alignkit.data.chat import (
    IGNORED,
    EncodedExample,
    encode_example,
    encode_prompt,
    end_of_turn_id,
)
from alignkit.data.labels import audit_labels, preview
from alignkit.data.sources import read_examples
from alignkit.models.tiny.tokenizer import build_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BESIDE = Path(__file__).resolve().parents[2] / "shared" / "data"
REAL = Path(os.environ.get("ALIGNKIT_SHARED_DATA", _BESIDE))

CHATML = str(build_tokenizer().chat_template)
OPENING = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
TURN = "{{ '<|im_start|>' + m.role + ('\n' + m.content if m.content or not m.tool_calls else '') }}"
CALLS = "{% for c in m.tool_calls or [] %}{{ '\n<call>' + (c.function | tojson) + '</call>' }}{% endfor %}"
KNOWS_TOOLS = (  # shows schemas in a system turn, calls behind the content, and results in user turns
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for t in tools %}{{ t | tojson }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% endif %}{% for m in messages %}"
    "{% if m.role == 'tool' %}{{ '<|im_start|>user\n<result>' + m.content + '</result>' }}"
    "{% else %}" + TURN + CALLS + "{% endif %}{{ '<|im_end|>\n' }}{% endfor %}" + OPENING
)
DISPLACES = (  # writes a call in place of the content
    "{% for m in messages %}{% if m.tool_calls %}{{ '<|im_start|>assistant' }}" + CALLS + "{% else %}" + TURN + ""
    "{% endif %}{{ '<|im_end|>\n' }}{% endfor %}" + OPENING
)
SKIPS_RESULTS = (
    "{% for m in messages %}{% if m.role != 'tool' %}" + TURN + "{{ '<|im_end|>\n' }}{% endif %}{% endfor %}" + OPENING
)
NO_SYSTEM = CHATML.replace("{% for message in messages %}", "{% for message in messages if message.role != 'system' %}")
REWRITES = CHATML.replace(  # like templates that take the reasoning out of all answers but the last
    "message['content']", "(message['content'] if loop.last else message['content'] | replace('Hm. ', ''))"
)
SCHEMA = {
    "type": "function",
    "function": {
        "name": "retrieve",
        "description": "Find a paragraph.",
        "parameters": {"type": "object", "properties": {"query": {"type": "string", "description": "what for"}}},
    },
}


def said(text: str = "", query: str | None = None) -> Message:
    """An assistant's turn: a text, a call, or both."""
    if query is None:
        return Message(role="assistant", content=text)
    call = {"type": "function", "function": {"name": "retrieve", "arguments": {"query": query}}}
    return Message.model_validate({"role": "assistant", "content": text, "tool_calls": [call]})


def found(text: str) -> Message:
    return Message(role="tool", content=text, name="retrieve")


QUESTION = user("Wer leitet Åbo?")
SEARCH = [said(query="Åbo"), found("Åbo has a mill."), said("It is a town.", "mayor"), found("Eva."), said("Eva.")]


def with_template(template: str) -> PreTrainedTokenizerBase:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return with_template(CHATML)


def encoded(tokenizer: PreTrainedTokenizerBase, completion: list[Message], **options: Any) -> EncodedExample:
    row = encode_example(tokenizer, options.pop("prompt", QUESTION), completion, 4096, **options)
    assert isinstance(row, EncodedExample), row
    return row


def blocks(tokenizer: PreTrainedTokenizerBase, row: EncodedExample) -> list[str]:
    """The learned runs of tokens as text."""
    runs = groupby(zip(row.labels, row.input_ids, strict=True), key=lambda pair: pair[0] != IGNORED)
    return [str(tokenizer.decode([label for label, _ in run])) for is_learned, run in runs if is_learned]


def passes(tokenizer: PreTrainedTokenizerBase, *rows: EncodedExample) -> bool:
    return all(passed for _, passed, _ in audit_labels(tokenizer, rows))


# -- several turns -----------------------------------------------------------------------------------------------------


def test_several_turns_by_hand(tokenizer: PreTrainedTokenizerBase) -> None:
    """Each answer with its end; neither the headers nor the turns of others."""
    row = encoded(tokenizer, [said("yes"), *user("Why?"), said("no")], prompt=user("Who?"))
    start, end = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>"))
    newline, header = tokenizer.encode("\n"), tokenizer.encode("assistant")

    def asked(text: str) -> list[int]:
        return [start, *tokenizer.encode("user\n"), *tokenizer.encode(text), end, *newline, start, *header, *newline]

    expected = [
        (asked("Who?"), [*tokenizer.encode("yes"), end]),
        ([*newline, *asked("Why?")], [*tokenizer.encode("no"), end]),
    ]
    assert row.input_ids == [id for before, answer in expected for id in before + answer]
    assert row.labels == [id for before, answer in expected for id in [IGNORED] * len(before) + answer]
    assert row.ends == 2
    assert passes(tokenizer, row)


@pytest.mark.parametrize("template", [CHATML, KNOWS_TOOLS])
def test_every_answer_is_learned_after_exactly_what_a_model_sees_when_it_generates_it(template: str) -> None:
    tokenizer = with_template(template)
    row = encoded(tokenizer, SEARCH, tools=[SCHEMA])
    begins = [place for place in range(1, len(row.labels)) if row.labels[place - 1] == IGNORED != row.labels[place]]
    turns = [place for place, message in enumerate(SEARCH) if message.role == "assistant"]
    assert len(begins) == len(turns) == row.ends == 3
    for place, turn in zip(begins, turns, strict=True):
        assert row.input_ids[:place] == encode_prompt(tokenizer, [*QUESTION, *SEARCH[:turn]], [SCHEMA])
    assert passes(tokenizer, row)


def test_the_prompts_answers_are_learned_when_the_whole_conversation_is(tokenizer: PreTrainedTokenizerBase) -> None:
    prompt = [*user("Hi"), said("Hello."), *user("Who?")]
    assert blocks(tokenizer, encoded(tokenizer, [said("Eva.")], prompt=prompt)) == ["Eva.<|im_end|>"]
    whole = encoded(tokenizer, [said("Eva.")], prompt=prompt, whole=True)
    assert blocks(tokenizer, whole) == ["Hello.<|im_end|>", "Eva.<|im_end|>"]
    assert passes(tokenizer, whole)


def test_a_greeting_that_nothing_asks_for_is_not_learned(tokenizer: PreTrainedTokenizerBase) -> None:
    row = encoded(
        tokenizer, [said("Eva.")], prompt=[said("Hello."), *user("Who?"), said("Me?"), *user("No.")], whole=True
    )
    assert blocks(tokenizer, row) == ["Me?<|im_end|>", "Eva.<|im_end|>"]


def test_an_answer_of_several_never_merges_with_what_stands_before_it(tokenizer: PreTrainedTokenizerBase) -> None:
    """A newline at the beginning of an answer would be one token with the header's."""
    row = encoded(tokenizer, [said("\nyes"), *user("Why?"), said("\nno")], prompt=user("Who?"))
    assert blocks(tokenizer, row) == ["\nyes<|im_end|>", "\nno<|im_end|>"]
    assert passes(tokenizer, row)


def test_a_template_that_rewrites_earlier_answers_drops_the_row() -> None:
    tokenizer = with_template(REWRITES)
    turns = [said("Hm. Yes."), *user("Why?"), said("Hm. So.")]
    assert encode_example(tokenizer, QUESTION, turns, 999) == (
        "the chat template writes earlier answers differently when others follow"
    )
    one = encoded(tokenizer, turns[2:], prompt=[*QUESTION, *turns[:2]])
    assert blocks(tokenizer, one) == ["Hm. So.<|im_end|>"]
    assert "Hm. Yes." not in str(tokenizer.decode(one.input_ids))


def test_an_empty_turn_among_several_drops_the_row(tokenizer: PreTrainedTokenizerBase) -> None:
    turns = [said(" "), *user("Why?"), said("no")]
    assert encode_example(tokenizer, QUESTION, turns, 999) == "empty answer"
    assert blocks(tokenizer, encoded(tokenizer, turns[2:], prompt=[*QUESTION, *turns[:2]])) == ["no<|im_end|>"]


# -- tools -------------------------------------------------------------------------------------------------------------


def test_a_template_that_knows_tools_is_given_them() -> None:
    tokenizer = with_template(KNOWS_TOOLS)
    row = encoded(tokenizer, SEARCH, tools=[SCHEMA])
    assert blocks(tokenizer, row) == [
        '<call>{"name": "retrieve", "arguments": {"query": "Åbo"}}</call><|im_end|>',
        'It is a town.\n<call>{"name": "retrieve", "arguments": {"query": "mayor"}}</call><|im_end|>',
        "Eva.<|im_end|>",
    ]
    text = str(tokenizer.decode(row.input_ids))
    assert text.startswith("<|im_start|>system\n" + json.dumps(SCHEMA))
    assert "<|im_start|>user\n<result>Åbo has a mill.</result><|im_end|>" in text


def test_a_template_that_ignores_tools_gets_them_as_text(tokenizer: PreTrainedTokenizerBase) -> None:
    row = encoded(tokenizer, SEARCH, tools=[SCHEMA], prompt=[Message(role="system", content="Search."), *QUESTION])
    assert blocks(tokenizer, row) == [
        '<tool_call>\n{"name": "retrieve", "arguments": {"query": "Åbo"}}\n</tool_call><|im_end|>',
        'It is a town.\n<tool_call>\n{"name": "retrieve", "arguments": {"query": "mayor"}}\n</tool_call><|im_end|>',
        "Eva.<|im_end|>",
    ]
    system, _, rest = str(tokenizer.decode(row.input_ids)).partition("<|im_end|>")
    assert system.startswith("<|im_start|>system\nSearch.\n\nFunctions that can be called:\n" + json.dumps(SCHEMA))
    assert "<|im_start|>tool\nÅbo has a mill.<|im_end|>" in rest
    alone = encode_prompt(tokenizer, QUESTION, [SCHEMA])
    assert str(tokenizer.decode(alone)).startswith("<|im_start|>system\nFunctions that can be called:\n")


def test_arguments_as_json_text_are_the_same_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    """In either form, other scripts stay as they are: escapes would be other tokens than those that are generated."""
    call = {"type": "function", "function": {"name": "retrieve", "arguments": '{"query": "\\u00c5bo 你好"}'}}
    as_text = Message.model_validate({"role": "assistant", "content": None, "tool_calls": [call]})
    row = encoded(tokenizer, [as_text])
    assert row == encoded(tokenizer, [said(query="Åbo 你好")])
    assert '"Åbo 你好"' in blocks(tokenizer, row)[0]


@pytest.mark.parametrize(
    ("template", "completion", "reason"),
    [
        (DISPLACES, SEARCH, "the chat template leaves out the text beside a tool call"),
        (SKIPS_RESULTS, SEARCH, "the chat template leaves out turns of the role tool"),
        (NO_SYSTEM, SEARCH, "the chat template leaves out turns of the role system"),
    ],
)
def test_what_would_vanish_drops_the_row(template: str, completion: list[Message], reason: str) -> None:
    assert encode_example(with_template(template), QUESTION, completion, 999, tools=[SCHEMA]) == reason


def test_several_calls_in_one_turn_are_all_there_or_the_row_is_not() -> None:
    both = said(query="Åbo").model_copy(
        update={"tool_calls": [*(said(query="Åbo").tool_calls or ()), *(said(query="mayor").tool_calls or ())]}
    )
    for template in (CHATML, KNOWS_TOOLS):
        (learned,) = blocks(with_template(template), encoded(with_template(template), [both]))
        assert '"Åbo"' in learned and '"mayor"' in learned
    first_only = with_template(KNOWS_TOOLS.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]"))
    reason = "the chat template leaves out all but one of several tool calls"
    assert encode_example(first_only, QUESTION, [both], 999) == reason
    encoded(first_only, SEARCH)


def test_what_a_template_has_no_place_for_is_of_no_matter_where_it_does_not_occur() -> None:
    row = encoded(with_template(DISPLACES), [SEARCH[0], *SEARCH[3:]])
    assert blocks(with_template(DISPLACES), row)[0].endswith("</call><|im_end|>")
    for template in (SKIPS_RESULTS, NO_SYSTEM):
        encoded(with_template(template), [said("Eva.")])


def test_special_tokens_in_calls_and_schemas_drop_the_row(tokenizer: PreTrainedTokenizerBase) -> None:
    reason = "the text holds the special token <|im_end|>"
    assert encode_example(tokenizer, QUESTION, [said(query="<|im_end|>")], 999) == reason
    forged = {**SCHEMA, "description": "<|im_end|>"}
    assert encode_example(tokenizer, QUESTION, [said("Eva.")], 999, tools=[forged]) == reason


@pytest.mark.parametrize(
    ("name", "call_or_reason"),
    [
        ("qwen2_5", '<tool_call>\n{"name": "retrieve", "arguments": {"query": "Åbo"}}\n</tool_call><|im_end|>'),
        ("llama3", '<tool_call>\n{"name": "retrieve", "arguments": {"query": "Åbo"}}\n</tool_call><|eot_id|>'),
        ("llama3_1", "the chat template leaves out the text beside a tool call"),
        ("qwen3", "the chat template writes earlier answers differently when others follow"),
        ("gptoss", "the chat template ends this turn with another token than a plain answer"),
        ("phi3", "the chat template leaves out turns of the role tool"),
    ],
)
def test_templates_of_others(name: str, call_or_reason: str) -> None:
    """The templates that come with TRL, where it still has them."""
    path = Path(str(files("trl"))) / "chat_templates" / f"{name}.jinja"
    if not path.exists():
        pytest.skip(f"TRL has no {name}.jinja")
    tokenizer = with_template(path.read_text(encoding="utf-8"))
    others = ["<|start_header_id|>", "<|eot_id|>", "<|start|>", "<|message|>", "<|call|>", "<|return|>", "<|end|>"]
    tokenizer.add_tokens(others, special_tokens=True)
    tokenizer.bos_token = "<|endoftext|>"
    row = encode_example(tokenizer, QUESTION, SEARCH, 9999, tools=[SCHEMA])
    if isinstance(row, str):
        assert row == call_or_reason
        return
    learned = blocks(tokenizer, row)
    assert learned[0] == call_or_reason
    assert learned[1].startswith("It is a town.\n")
    assert learned[2].startswith("Eva.<|")
    assert passes(tokenizer, row)


# -- QA-Expert's own masking cases -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["tiny", "qwen", "knows tools"])
def test_golden_masking_cases(family: str) -> None:
    """As many learned blocks as the assistant has turns, each the text of its turn, white space and end aside."""
    records, vocabulary = REAL / "qa-expert" / "test_cases.json", REAL / "qwen-7b-chat"
    if not (records.exists() and vocabulary.exists()):
        pytest.skip(f"{records} is not at hand")
    tokenizer: Any = with_template(KNOWS_TOOLS if family == "knows tools" else CHATML)
    if family == "qwen":
        from alignkit.models.qwen_v1_tokenizer import load_tokenizer

        tokenizer = load_tokenizer(vocabulary)
    examples, dropped = read_examples(RowsConfig(path=str(records)))
    assert (len(examples), dropped) == (3, [])
    assert [len(example.completion) for example in examples if isinstance(example, ChatExample)] == [5, 3, 3]
    for example in examples:
        assert isinstance(example, ChatExample)
        row = encode_example(tokenizer, example.prompt, example.completion, 4096, tools=example.tools)
        assert isinstance(row, EncodedExample), row
        assert passes(tokenizer, row)
        spoken = [message for message in example.completion if message.role == "assistant"]
        learned = blocks(tokenizer, row)
        assert len(learned) == len(spoken) == row.ends
        for block, message in zip(learned, spoken, strict=True):
            tag = "call" if family == "knows tools" else "tool_call"
            calls = [json.dumps(call.function.model_dump(), ensure_ascii=False) for call in message.tool_calls or ()]
            expected = message.content + "".join(f"<{tag}>{call}</{tag}>" for call in calls) + "<|im_end|>"
            assert "".join(block.split()) == "".join(expected.split())
        pairs = zip(row.input_ids, row.labels, strict=True)
        unlearned = str(tokenizer.decode([id for id, label in pairs if label == IGNORED]))
        others = [*example.prompt, *(message for message in example.completion if message.role == "tool")]
        assert all(" ".join(message.content.split()) in " ".join(unlearned.split()) for message in others)


# -- the audit ---------------------------------------------------------------------------------------------------------


def failed(tokenizer: PreTrainedTokenizerBase, *rows: EncodedExample) -> set[str]:
    return {name for name, passed, _ in audit_labels(tokenizer, rows) if not passed}


def test_the_audit_sees_a_turn_of_another_role(tokenizer: PreTrainedTokenizerBase) -> None:
    """Learned wholly, in part, or in place of an answer: what other roles say is one block too many, or too few."""
    good = encoded(tokenizer, SEARCH)
    places = [place for place, label in enumerate(good.labels) if label == IGNORED]
    between = [place for place in places if place > good.labels.index(end_of_turn_id(tokenizer))]
    for wrong in (between[:1], between[4:6], between):
        labels = [good.input_ids[place] if place in wrong else label for place, label in enumerate(good.labels)]
        assert failed(tokenizer, good, replace(good, labels=labels)), wrong


def test_the_audit_sees_a_missing_end(tokenizer: PreTrainedTokenizerBase) -> None:
    good = encoded(tokenizer, SEARCH)
    first = good.labels.index(end_of_turn_id(tokenizer))
    labels = [*good.labels[:first], IGNORED, *good.labels[first + 1 :]]
    assert failed(tokenizer, replace(good, labels=labels)) == {"end of turn is learned"}


def test_the_preview_shows_several_blocks(tokenizer: PreTrainedTokenizerBase) -> None:
    row = encoded(tokenizer, [said("yes"), *user("Why?"), said("no")], prompt=user("Who?"))
    middle = "\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    assert preview(tokenizer, [row], colour=False) == (
        f"row 1\n<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n⟦yes<|im_end|>⟧{middle}⟦no<|im_end|>⟧"
    )
