"""Foreign formats become our rows: hand-made rows of each format, and, where they are at hand, the real files."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignkit.core.config import RowsConfig
from alignkit.core.errors import UserError
from alignkit.core.records import ChatExample, Dropped, Message, TextExample
from alignkit.data.sources import (
    read_completions,
    read_examples,
    read_graded,
    read_graded_or_preferences,
    read_preferences,
    read_questions,
)
from alignkit.data.sources.preferences import parse_dialogue

Turn = tuple[str, str]

_BESIDE = Path(__file__).resolve().parents[2] / "shared" / "data"
REAL = Path(os.environ.get("ALIGNKIT_SHARED_DATA", _BESIDE))


def rows_of(path: Path, rows: list[Any]) -> RowsConfig:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return RowsConfig(path=str(path))


def real(*parts: str) -> RowsConfig:
    path = REAL.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{path} is not at hand")
    return RowsConfig(path=str(path))


def turns(messages: list[Message]) -> list[Turn]:
    return [(message.role, message.content) for message in messages]


def read_chats(rows: RowsConfig) -> tuple[list[ChatExample], list[Dropped]]:
    """`read_examples` of a file without documents."""
    examples, dropped = read_examples(rows)
    chats = [example for example in examples if isinstance(example, ChatExample)]
    assert len(chats) == len(examples)
    return chats, dropped


def message_of(action: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        action()
    return str(caught.value)


# -- examples and questions -------------------------------------------------------------------------------------------

HOTPOT: dict[str, Any] = {
    "_id": "5a7",
    "question": "In which country is the tower?",
    "answer": "France",
    "context": [
        ["Rome", ["Rome is a city.", " It is old."]],
        ["Eiffel Tower", ["The tower is in Paris.", " It is tall."]],
        ["Paris", ["Paris is in France."]],
    ],
    "supporting_facts": [["Paris", 0], ["Eiffel Tower", 0]],
}
ASKED = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "q"}]
ANSWER = {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("row", "id", "prompt", "completion"),
    [
        ({"id": "x", "instruction": "S.", "input": "Q?", "output": "A."}, "x", [("user", "S.\n\nQ?")], "A."),
        ({"instruction": "Do it.", "input": "", "output": "Done.\n"}, "file-1", [("user", "Do it.")], "Done.\n"),
        ({"id": 17, "instruction": "", "input": "Q?", "output": "A."}, "17", [("user", "Q?")], "A."),
        (
            {
                "id": "s",
                "instruction": "Add.",
                "instances": [{"input": "1 2", "output": "3"}, {"input": "", "output": ""}],
            },
            "s",
            [("user", "Add.\n\n1 2")],
            "3",
        ),
        (
            HOTPOT,
            "5a7",
            [
                (
                    "user",
                    "Eiffel Tower: The tower is in Paris. It is tall.\nParis: Paris is in France.\n\n"
                    "In which country is the tower?",
                )
            ],
            "France",
        ),
        ({"prompt": "Q?", "completion": "A."}, "file-1", [("user", "Q?")], "A."),
        (
            {"id": "c", "prompt": ASKED, "completion": [ANSWER]},
            "c",
            [("user", "Hi"), ("assistant", "Hello"), ("user", "q")],
            "a",
        ),
        ({"messages": [*ASKED, ANSWER]}, "file-1", [("user", "Hi"), ("assistant", "Hello"), ("user", "q")], "a"),
    ],
)
def test_each_format_becomes_a_prompt_and_a_completion(
    tmp_path: Path, row: dict[str, Any], id: str, prompt: list[Turn], completion: str
) -> None:
    (example,), dropped = read_chats(rows_of(tmp_path / "file.jsonl", [row]))
    assert dropped == []
    assert example.id == id
    assert turns(example.prompt) == prompt
    assert turns(example.completion) == [("assistant", completion)]


def test_hotpotqa_keeps_the_paragraphs_asked_for_in_their_order(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "a.jsonl", [HOTPOT, {**HOTPOT, "_id": "2", "answer": "yes"}])
    gold, _ = read_questions(rows)
    everything, _ = read_questions(rows, hotpotqa_paragraphs="all")
    assert [line.split(":")[0] for line in gold[0].instruction.splitlines()] == ["Eiffel Tower", "Paris"]
    assert [line.split(":")[0] for line in everything[0].instruction.splitlines()] == ["Rome", "Eiffel Tower", "Paris"]
    assert gold[0].input == HOTPOT["question"]
    assert [row.kind for row in gold] == ["non_judgmental", "judgmental"]
    with pytest.raises(ValueError, match="'gold' or 'all'"):
        read_questions(rows, hotpotqa_paragraphs="some")


def test_hotpotqa_in_columns_reads_the_same(tmp_path: Path) -> None:
    context, facts = HOTPOT["context"], HOTPOT["supporting_facts"]
    columns = {
        "context": {"title": [pair[0] for pair in context], "sentences": [pair[1] for pair in context]},
        "supporting_facts": {"title": [pair[0] for pair in facts], "sent_id": [pair[1] for pair in facts]},
    }
    rows, _ = read_questions(rows_of(tmp_path / "a.jsonl", [HOTPOT]))
    others, _ = read_questions(rows_of(tmp_path / "b.jsonl", [{**HOTPOT, **columns}]))
    assert rows == others
    columns["context"]["sentences"].pop()
    assert "context" in message_of(lambda: read_questions(rows_of(tmp_path / "c.jsonl", [{**HOTPOT, **columns}])))


def test_unusable_examples_are_returned_with_their_reasons(tmp_path: Path) -> None:
    good = {"instruction": "S.", "output": "A."}
    rows = [good, {"instruction": "S.", "output": " \n"}, {"instruction": " ", "input": "", "output": "A."}]
    examples, dropped = read_examples(rows_of(tmp_path / "qa.jsonl", rows))
    assert [example.id for example in examples] == ["qa-1"]
    assert [each.reason for each in dropped] == ["empty answer", "empty question"]
    assert [each.row for each in dropped] == rows[1:]
    assert dropped[0].detail == f"{tmp_path / 'qa.jsonl'}:2"

    chats = [
        {"messages": [*ASKED, ANSWER]},
        {"messages": ASKED},
        {"messages": [ANSWER]},
        {"messages": []},
        {"messages": [*ASKED, {**ANSWER, "content": ""}]},
    ]
    _, dropped = read_examples(rows_of(tmp_path / "chat.jsonl", chats))
    reasons = ["no final assistant turn", "empty question", "no final assistant turn", "empty answer"]
    assert [each.reason for each in dropped] == reasons

    tasks = [{"instruction": "x", "instances": [{"input": "", "output": "y"}]}, {"instruction": "x", "instances": []}]
    _, dropped = read_questions(rows_of(tmp_path / "tasks.jsonl", tasks))
    assert [each.reason for each in dropped] == ["no instance"]

    hotpot = [HOTPOT, {**HOTPOT, "_id": "2", "supporting_facts": [["London", 0]]}]
    _, dropped = read_questions(rows_of(tmp_path / "hotpot.jsonl", hotpot))
    assert [each.reason for each in dropped] == ["a supporting paragraph is missing"]


def test_questions_need_no_answer(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "a.jsonl", [{"id": "x", "instruction": "S.", "input": "Q?"}])
    (question,), _ = read_questions(rows)
    assert question.output == ""
    assert "no format that fits here" in message_of(lambda: read_examples(rows))


def test_a_models_answers_as_self_instruct_evaluates_them(tmp_path: Path) -> None:
    rows = [
        {"id": "u-1", "instruction": "Add.", "input": "1 2", "response": "\n\n3\n", "target": "4", "model": "x"},
        {"instruction": "Sing.", "response": ""},
        {"instruction": " ", "input": "", "response": "a"},
    ]
    questions, (dropped,) = read_questions(rows_of(tmp_path / "predictions.jsonl", rows))
    found = [(row.id, row.instruction, row.input, row.output, row.kind) for row in questions]
    assert found == [("u-1", "Add.", "1 2", "3", None), ("predictions-2", "Sing.", "", "", None)]
    assert dropped.reason == "empty question"
    examples, (_, unanswered) = read_chats(rows_of(tmp_path / "again.jsonl", rows[:2] + rows[1:2]))
    assert [example.completion[0].content for example in examples] == ["3"]
    assert unanswered.reason == "empty answer"
    wrong = rows_of(tmp_path / "wrong.jsonl", [{"instruction": "Add.", "response": 3}])
    assert "wrong.jsonl:1: response" in message_of(lambda: read_questions(wrong))


@pytest.mark.parametrize(
    ("completion", "output"),
    [
        (" Hello.<|endoftext|>", "Hello."),
        (" Hello.\n<|endoftext|> \n", "Hello."),
        ("Hello.", "Hello."),
        ("a <|endoftext|> b", "a <|endoftext|> b"),
        ("<|endoftext|>", ""),
    ],
)
def test_prompts_and_completions_as_gpt_3_was_tuned_on(tmp_path: Path, completion: str, output: str) -> None:
    rows = rows_of(tmp_path / "prompts.jsonl", [{"prompt": "Say hello.\n\n", "completion": completion}])
    ((row,), _) = read_questions(rows)
    assert (row.id, row.instruction, row.input, row.output) == ("prompts-1", "Say hello.", "", output)


def test_turns_are_no_prompt_text(tmp_path: Path) -> None:
    """Chat examples have the same two fields: what is to be learnt from them is read, a question is not made up."""
    rows = rows_of(tmp_path / "chat.jsonl", [{"id": "c", "prompt": ASKED, "completion": [ANSWER]}])
    assert "chat.jsonl:1: prompt" in message_of(lambda: read_questions(rows))


def test_made_ids_count_from_the_beginning_of_the_file(tmp_path: Path) -> None:
    """Two stages that share one file by skip and limit see the same row under the same id."""
    rows = rows_of(tmp_path / "a.jsonl", [{"instruction": f"{n}", "output": "x"} for n in range(5)])
    rows.skip, rows.limit = 3, 1
    (example,), _ = read_chats(rows)
    assert (example.id, example.prompt[0].content) == ("a-4", "3")


CALL = {"type": "function", "function": {"name": "find", "arguments": '{"what": "Åbo"}'}}
CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL]}
FOUND = {"role": "tool", "name": "find", "content": "A town."}
TOOLS = [{"type": "function", "function": {"name": "find"}}]


@pytest.mark.parametrize(
    ("row", "completion"),
    [
        ({"prompt": ASKED, "completion": [CALLS, FOUND, ANSWER], "tools": TOOLS}, ["", "A town.", "a"]),
        ({"prompt": ASKED, "completion": [CALLS, FOUND, ANSWER], "tools": json.dumps(TOOLS)}, ["", "A town.", "a"]),
        ({"messages": [*ASKED, CALLS, FOUND, ANSWER], "tools": TOOLS}, ["a"]),
        ({"messages": [*ASKED, CALLS], "tools": TOOLS}, [""]),
    ],
)
def test_conversations_may_call_tools(tmp_path: Path, row: dict[str, Any], completion: list[str]) -> None:
    (example,), dropped = read_chats(rows_of(tmp_path / "tools.jsonl", [row]))
    assert dropped == []
    assert [message.content for message in example.completion] == completion
    assert example.tools == TOOLS
    calls = [call for turn in [*example.prompt, *example.completion] for call in turn.tool_calls or ()]
    assert [call.function.arguments for call in calls] == [{"what": "Åbo"}]


SHARED: list[dict[str, Any]] = [
    {"from": "system", "value": "Be brief."},
    {"from": "human", "value": "q"},
    {"from": "function_call", "value": '{"name": "find", "arguments": {"what": "Åbo"}}'},
    {"from": "observation", "value": "A town."},
    {"from": "gpt", "value": "a"},
]


def test_sharegpt_conversations_are_read(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "s.jsonl", [{"conversations": SHARED, "tools": json.dumps(TOOLS)}])
    (example,), _ = read_chats(rows)
    asked = [("system", "Be brief."), ("user", "q"), ("assistant", ""), ("tool", "A town.")]
    assert (turns(example.prompt), turns(example.completion)) == (asked, [("assistant", "a")])
    assert [call.model_dump() for call in example.prompt[2].tool_calls or ()] == [
        {"type": "function", "function": {"name": "find", "arguments": {"what": "Åbo"}}}
    ]
    assert example.tools == TOOLS
    for changed, problem in (
        ({"from": "function_call", "value": "find"}, "messages.2.tool_calls.0.function: expected"),
        ({"from": "nobody", "value": "x"}, "messages.2.role: Input should be 'system'"),
        ({"from": "gpt"}, "conversations.2.value: missing"),
    ):
        wrong = rows_of(tmp_path / "wrong.jsonl", [{"conversations": [*SHARED[:2], changed, SHARED[4]]}])
        assert f"wrong.jsonl:1: {problem}" in message_of(lambda wrong=wrong: read_examples(wrong))  # type: ignore[misc]


def test_the_real_qwen_conversations_are_read() -> None:
    examples, dropped = read_chats(real("qwen-7b-chat", "test_sampled_qwen.json"))
    assert dropped == []
    assert turns(examples[0].prompt) == [("user", "你好")]
    assert [len(example.completion) for example in examples] == [1, 1]


def test_pages_and_texts_are_read_to_be_learned_whole(tmp_path: Path) -> None:
    pages = [{"document": "a.pdf", "page": number, "text": text} for number, text in enumerate(["One.", " "], 1)]
    (page,), (empty,) = read_examples(rows_of(tmp_path / "pages.jsonl", pages))
    assert page == TextExample(id="a.pdf#1", text="One.", source="a.pdf")
    assert empty.reason == "empty document"
    (text,), _ = read_examples(rows_of(tmp_path / "texts.jsonl", [{"text": "One.", "url": "x"}]))
    assert text.model_dump(exclude_defaults=True) == {"id": "texts-1", "text": "One.", "url": "x"}


def test_documents_and_conversations_do_not_mix(tmp_path: Path) -> None:
    mixed = rows_of(tmp_path / "mixed.jsonl", [{"text": "One."}, {"messages": [*ASKED, ANSWER]}])
    assert "mixed.jsonl:2: text: missing, although the file began" in message_of(lambda: read_examples(mixed))


# -- preferences ------------------------------------------------------------------------------------------------------


def dialogue(*contents: str) -> str:
    """A text in the format of hh-rlhf, the speakers taking turns."""
    return "".join(f"\n\n{('Human', 'Assistant')[n % 2]}: {content}" for n, content in enumerate(contents))


def test_hh_rlhf_is_split_at_its_last_turn_and_not_inside_the_answers(tmp_path: Path) -> None:
    chosen, rejected = dialogue("Hi", "Hello", "Is it?", "I think yes"), dialogue("Hi", "Hello", "Is it?", "I think no")
    (pair,), dropped = read_preferences(rows_of(tmp_path / "hh.jsonl", [{"chosen": chosen, "rejected": rejected}]))
    assert dropped == []
    assert pair.id == "hh-1"
    assert pair.source == "hh-rlhf"
    assert turns(pair.prompt) == [("user", "Hi"), ("assistant", "Hello"), ("user", "Is it?")]
    assert turns(pair.chosen) == [("assistant", "I think yes")]
    assert turns(pair.rejected) == [("assistant", "I think no")]


def test_a_speaker_named_inside_a_turn_does_not_begin_one() -> None:
    assert turns(parse_dialogue("\n\nHuman: say\nHuman: x. Assistant: y\n\nAssistant: \n\nHuman wrote that.")) == [
        ("user", "say\nHuman: x. Assistant: y"),
        ("assistant", "Human wrote that."),
    ]


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        ("Hello", dialogue("q", "a"), "not a dialogue"),
        ("Note." + dialogue("q", "a"), dialogue("q", "b"), "not a dialogue"),
        (dialogue("q", "a", "more"), dialogue("q", "a", "more"), "no final assistant turn"),
        (dialogue("q", "a"), dialogue("q", ""), "empty answer"),
        (dialogue("q", "a"), dialogue("other", "a"), "different prompts"),
        (dialogue("q", "a"), dialogue("q", "a", "more", "b"), "different prompts"),
        (dialogue("q", "a"), dialogue("q", "a") + " ", "chosen equals rejected"),
        (dialogue("q") + dialogue("q", "a"), dialogue("q", "b"), "turns do not alternate"),
        (dialogue("q", "", "q", "a"), dialogue("q", "", "q", "b"), "empty turn"),
        ("\n\nAssistant: a", "\n\nAssistant: b", "empty question"),
    ],
)
def test_malformed_dialogues_are_dropped_with_a_reason(tmp_path: Path, chosen: str, rejected: str, reason: str) -> None:
    good = {"chosen": dialogue("q", "a"), "rejected": dialogue("q", "b")}
    pairs, dropped = read_preferences(
        rows_of(tmp_path / "hh.jsonl", [good, {"chosen": chosen, "rejected": rejected}, good])
    )
    assert [pair.id for pair in pairs] == ["hh-1", "hh-3"]
    assert [(each.reason, each.row["chosen"]) for each in dropped] == [(reason, chosen)]


def test_our_own_pairs_are_read_as_they_are(tmp_path: Path) -> None:
    pair = {"id": "p", "prompt": ASKED, "chosen": [ANSWER], "rejected": [{**ANSWER, "content": "b"}], "margin": 1.5}
    rows = [
        pair,
        {**pair, "id": "same", "rejected": [ANSWER]},
        {**pair, "id": "mute", "rejected": [ASKED[0]]},
        {**pair, "id": "several", "rejected": [ANSWER, ASKED[0], ANSWER]},
        {**pair, "id": "tools", "tools": TOOLS},
    ]
    (read,), dropped = read_preferences(rows_of(tmp_path / "pairs.jsonl", rows))
    assert read.model_dump(exclude_defaults=True) == pair
    assert [each.reason for each in dropped] == [
        "chosen equals rejected",
        "no final assistant turn",
        "an answer is not one assistant's turn",
        "pairs with tools are not learned",
    ]


def test_full_hh_rlhf_gives_the_pairs_of_hh_rlhf(tmp_path: Path) -> None:
    prompt, chosen, rejected = dialogue("Hi", "Hello", "Is it?"), " I think yes", "I think no"
    whole = {
        "chosen": dialogue("Hi", "Hello", "Is it?", "I think yes"),
        "rejected": f"{prompt}\n\nAssistant: I think no",
    }
    cut = {"prompt": prompt + "\n\nAssistant:", "response": chosen, "chosen": chosen, "rejected": rejected}
    (expected,), _ = read_preferences(rows_of(tmp_path / "hh.jsonl", [whole]))
    pairs, dropped = read_preferences(
        rows_of(
            tmp_path / "hh.jsonl",
            [
                {**cut, "rejected": "no\n\nHuman: And?\n\nAssistant: no"},
                {**cut, "rejected": " "},
                {**cut, "prompt": prompt},
                {**cut, "rejected": "I think yes"},
                cut,
            ],
        )
    )
    assert pairs == [expected.model_copy(update={"id": "hh-5"})]
    assert [each.reason for each in dropped] == [
        "different prompts",
        "empty answer",
        "no final assistant turn",  # the answer would be a part of the question
        "chosen equals rejected",
    ]


def test_rewardbench_is_read_by_subset(tmp_path: Path) -> None:
    row = {"prompt": "q", "chosen": "a", "chosen_model": "x", "rejected": "b", "rejected_model": "y", "id": 0}
    rows = [
        {**row, "subset": "donotanswer"},
        {**row, "subset": "hep-cpp"},  # counted anew in each subset
        {**row, "subset": "hep-cpp", "id": 1, "prompt": [{"role": "system", "content": "s"}, *ASKED]},
        {**row, "subset": "hep-cpp", "id": 2, "chosen": ""},
    ]
    pairs, dropped = read_preferences(rows_of(tmp_path / "bench.jsonl", rows))
    assert [(pair.id, pair.source) for pair in pairs] == [
        ("donotanswer-0", "rewardbench/donotanswer"),
        ("hep-cpp-0", "rewardbench/hep-cpp"),
        ("hep-cpp-1", "rewardbench/hep-cpp"),
    ]
    assert [turns(pair.prompt) for pair in pairs[1:]] == [
        [("user", "q")],
        [("system", "s"), *((turn["role"], turn["content"]) for turn in ASKED)],
    ]
    assert (turns(pairs[0].chosen), turns(pairs[0].rejected)) == ([("assistant", "a")], [("assistant", "b")])
    assert [each.reason for each in dropped] == ["empty answer"]


def test_whole_conversations_are_split_at_their_last_turn(tmp_path: Path) -> None:
    rows = [
        {"chosen": [*ASKED, ANSWER], "rejected": [*ASKED, {**ANSWER, "content": "b"}], "score_chosen": 8.0},
        {"chosen": [*ASKED, ANSWER], "rejected": [ASKED[0], ASKED[0], ANSWER]},
    ]
    (pair,), dropped = read_preferences(rows_of(tmp_path / "ultrafeedback.jsonl", rows))
    assert (turns(pair.rejected), pair.source) == ([("assistant", "b")], "")
    assert turns(pair.prompt) == [(turn["role"], turn["content"]) for turn in ASKED]
    assert [each.reason for each in dropped] == ["turns do not alternate"]


@pytest.mark.parametrize(
    ("score", "problem"),
    [
        ("NaN", ":2: not JSON (NaN is not a JSON value)"),
        ("Infinity", ":2: not JSON (Infinity is not a JSON value)"),
        ("1e999", ":2: holds a value that JSON does not know (Out of range float values"),
        ("10.5", ":2: completions.0.score: 10.5 is no grade from 0 to 10"),
        ("-1", ":2: completions.0.score: -1 is no grade from 0 to 10"),
        ('"high"', ":2: completions.0.score: Input should be a valid number"),
    ],
)
def test_a_score_that_is_no_grade_is_one_clear_message(tmp_path: Path, score: str, problem: str) -> None:
    row = (
        '{"id": "%s", "prompt": [{"role": "user", "content": "q"}], '
        '"completions": [{"text": "x", "model": "m", "score": %s}]}'
    )
    path = tmp_path / "scored.jsonl"
    path.write_text(row % ("a", "10.0") + "\n" + row % ("b", score) + "\n", encoding="utf-8")
    rows = RowsConfig(path=str(path))
    for read in (read_graded, read_graded_or_preferences):
        message = message_of(lambda read=read: read(rows))  # type: ignore[misc]
        assert message.startswith(str(path) + problem), message
        assert "\n" not in message


def test_graded_completions_and_pairs_are_told_apart(tmp_path: Path) -> None:
    graded = {"id": "a", "prompt": ASKED, "completions": [{"text": "x", "model": "m", "score": 3}]}
    pair = {"chosen": dialogue("q", "a"), "rejected": dialogue("q", "b")}
    first = read_graded_or_preferences(rows_of(tmp_path / "a.jsonl", [graded]))
    second = read_graded_or_preferences(rows_of(tmp_path / "b.jsonl", [pair]))
    assert [[len(rows) for rows in found] for found in (first, second)] == [[1, 0, 0], [0, 1, 0]]


def test_a_prompt_without_completions_is_dropped(tmp_path: Path) -> None:
    full = {"id": "a", "prompt": ASKED, "completions": [{"text": "x", "model": "m", "score": 3}]}
    (row,), dropped = read_completions(rows_of(tmp_path / "a.jsonl", [full, {**full, "id": "b", "completions": []}]))
    assert row.completions[0].score == 3.0
    assert [each.reason for each in dropped] == ["no completions"]


# -- bad input --------------------------------------------------------------------------------------------------------


def test_a_file_of_another_row_type_is_named_by_its_fields(tmp_path: Path) -> None:
    pairs = rows_of(tmp_path / "pairs.jsonl", [{"id": "p", "prompt": [], "chosen": [], "rejected": []}])
    for read, expected in (
        (read_examples, "chat example (prompt, completion)"),
        (read_questions, "HotpotQA (question, answer, context, supporting_facts)"),
        (read_completions, "completion set (prompt, completions)"),
    ):
        message = message_of(lambda read=read: read(pairs))  # type: ignore[misc]
        assert message.startswith(f"{pairs.path}:1: the fields id, prompt, chosen, rejected are of no format that fits")
        assert expected in message
    nothing = rows_of(tmp_path / "nothing.jsonl", [{}])
    assert "the fields (none) are of no format" in message_of(lambda: read_preferences(nothing))


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([{"instruction": "x", "output": "y"}, {"instruction": "x"}], ":2: output: missing, although the file began"),
        ([{"instruction": "x", "output": None}], ":1: output: Input should be a valid string (found null)"),
        ([{"instruction": ["x"], "output": "y"}], ":1: instruction: Input should be a valid string"),
        ([{"instruction": "x", "instances": [{"input": "x"}]}], ":1: instances.0.output: missing"),
        ([{**HOTPOT, "context": [["Rome"]]}], ":1: context.0.1: missing"),
        ([{**HOTPOT, "supporting_facts": "Rome"}], ":1: supporting_facts: Input should be a valid list"),
        ([{"prompt": "q", "completion": ["a"]}], ":1: completion: Input should be a valid string"),
        (
            [{"prompt": ASKED, "completion": [ASKED[0], ANSWER]}],
            ":1: completion: must begin and end with an assistant turn",
        ),
        ([{"prompt": ASKED, "completion": ASKED[:1]}], ":1: completion: must begin and end with an assistant turn"),
        ([{"messages": [{"from": "human", "value": "q"}]}], ":1: messages.0.role, messages.0.content: missing"),
        ([{"messages": [{**CALLS, "role": "user"}]}], ":1: messages.0: a turn of the role user cannot call tools"),
        ([{"messages": [{"role": "bot", "content": "q"}]}], ":1: messages.0.role: Input should be 'system'"),
        ([{"id": "", "instruction": "x", "output": "y"}], ":1: id: must be a text that is not empty, found ''"),
        ([{"id": None, "instruction": "x", "output": "y"}], ":1: id: must be a text that is not empty, found None"),
        ([{"id": True, "instruction": "x", "output": "y"}], ":1: id: must be a text that is not empty, found True"),
        ([{"id": "a", "instruction": "x", "output": "y"}] * 2, ":2: id 'a' stands already at"),
        ([{"instruction": "x", "output": ""}] * 2, ": none of its 2 rows can be used (empty answer)"),
    ],
)
def test_a_wrong_row_is_one_clear_message(tmp_path: Path, rows: list[dict[str, Any]], problem: str) -> None:
    config = rows_of(tmp_path / "file.jsonl", rows)
    message = message_of(lambda: read_examples(config))
    assert message.startswith(config.path + problem), message
    assert "\n" not in message


def test_a_wrong_dialogue_is_one_clear_message(tmp_path: Path) -> None:
    for row, problem in (
        ({"chosen": dialogue("q", "a"), "rejected": 3}, "rejected: Input should be a valid string (found 3)"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "prompt: Input should be a valid list"),
        ({"chosen": dialogue("q", "a")}, "the fields chosen are of no format that fits"),
    ):
        config = rows_of(tmp_path / "a.jsonl", [row])
        assert message_of(lambda config=config: read_preferences(config)).startswith(f"{config.path}:1: {problem}")  # type: ignore[misc]


# -- real files -------------------------------------------------------------------------------------------------------


def test_the_real_hotpotqa_rows_are_all_usable() -> None:
    rows = real("hotpotqa", "dev-distractor-350.jsonl")
    questions, dropped = read_questions(rows)
    assert (len(questions), len(dropped)) == (350, 0)
    assert Counter(row.kind for row in questions) == {"non_judgmental": 326, "judgmental": 24}
    everything, _ = read_questions(rows, hotpotqa_paragraphs="all")
    for gold, full in zip(questions, everything, strict=True):
        paragraphs = gold.instruction.split("\n")
        assert len(paragraphs) == 2
        assert len(full.instruction) > len(gold.instruction)
        assert all(paragraph in full.instruction for paragraph in paragraphs)


def test_the_real_hh_rlhf_rows_split_into_prompt_and_answers() -> None:
    rows = real("hh-rlhf", "harmless-base-test-1500.jsonl")
    pairs, dropped = read_preferences(rows)
    assert len(pairs) == 1492
    assert Counter(each.reason for each in dropped) == {"empty answer": 4, "turns do not alternate": 4}
    texts = [json.loads(line)["chosen"] for line in Path(rows.path).read_text(encoding="utf-8").splitlines()]
    for pair in pairs:
        rebuilt = "".join(
            f"\n\n{'Human' if turn.role == 'user' else 'Assistant'}: {turn.content}"
            for turn in [*pair.prompt, *pair.chosen]
        )
        assert rebuilt == texts[int(pair.id.rpartition("-")[2]) - 1]


def test_real_dialogues_cut_in_two_give_the_same_pairs(tmp_path: Path) -> None:
    """As full-hh-rlhf cuts them: the prompt ends behind the last marker."""
    rows = real("hh-rlhf", "harmless-base-test-1500.jsonl")
    cut = []
    for number, line in enumerate(Path(rows.path).read_text(encoding="utf-8").splitlines(), 1):
        sides = {name: text.rpartition("\n\nAssistant:") for name, text in json.loads(line).items()}
        prompt = sides["chosen"][0] + sides["chosen"][1]
        answers = {name: answer for name, (_, _, answer) in sides.items()}
        cut.append({"id": f"{Path(rows.path).stem}-{number}", "prompt": prompt, **answers})
    assert read_preferences(rows_of(tmp_path / "full.jsonl", cut))[0] == read_preferences(rows)[0]


def test_the_real_alpaca_and_self_instruct_rows_are_all_usable() -> None:
    alpaca, dropped = read_examples(real("mods", "example.json"))
    assert (len(alpaca), len(dropped)) == (100, 0)
    assert [alpaca[0].id, alpaca[-1].id] == ["example-1", "example-100"]
    tasks, dropped = read_questions(real("self-instruct", "seed_tasks.jsonl"))
    assert (len(tasks), len(dropped)) == (175, 0)
    assert all(task.output.strip() for task in tasks)


def test_the_end_of_text_mark_of_a_completion_is_no_text(tmp_path: Path) -> None:
    answers = [" News <|endoftext|>", " News", " a <|endoftext|> b"]
    rows = rows_of(tmp_path / "t0.jsonl", [{"prompt": "What is it?", "completion": answer} for answer in answers])
    examples, _ = read_examples(rows)
    assert [example.completion[0].content for example in examples if isinstance(example, ChatExample)] == [
        "News",
        " News",
        " a <|endoftext|> b",
    ]
