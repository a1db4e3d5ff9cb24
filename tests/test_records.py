"""The rows that pass between stages: what is required, what is kept, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from alignkit.core.records import ChatExample, Completion, CompletionSet, Message, PreferencePair, QAExample, Row

USER = {"role": "user", "content": "Is 4 even?"}
YES = {"role": "assistant", "content": "Yes."}
NO = {"role": "assistant", "content": "No."}


def test_fields_of_others_are_kept() -> None:
    row = QAExample.model_validate({"id": "a", "instruction": "4 is even.", "input": "Is it?", "domain": "numbers"})
    assert row.model_dump(exclude_defaults=True)["domain"] == "numbers"


@pytest.mark.parametrize(
    ("kind", "row", "field"),
    [
        (QAExample, {"instruction": "x"}, "id"),
        (QAExample, {"id": "", "instruction": "x"}, "id"),
        (QAExample, {"id": 1, "instruction": "x"}, "id"),
        (QAExample, {"id": "a", "instruction": None}, "instruction"),
        (QAExample, {"id": "a", "instruction": "x", "kind": "other"}, "kind"),
        (ChatExample, {"id": "a", "prompt": [], "completion": [YES]}, "prompt"),
        (ChatExample, {"id": "a", "prompt": [USER]}, "completion"),
        (ChatExample, {"id": "a", "prompt": [{"role": "boss", "content": ""}], "completion": [YES]}, "role"),
        (CompletionSet, {"id": "a", "prompt": [USER], "completions": [{"text": "x"}]}, "model"),
        (PreferencePair, {"id": "a", "prompt": [USER], "chosen": [YES], "rejected": []}, "rejected"),
        (PreferencePair, {"id": "a", "prompt": [USER], "chosen": [YES], "rejected": [YES]}, "same text"),
    ],
)
def test_a_bad_row_is_refused_by_field(kind: type[Row], row: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError, match=field):
        kind.model_validate(row)


def test_a_call_needs_no_text_and_what_is_absent_is_not_written() -> None:
    call = {"type": "function", "function": {"name": "find", "arguments": {"query": "Åbo", "limit": None}}}
    turn = {"role": "assistant", "content": "", "tool_calls": [call]}
    for given in ({**turn, "content": None}, {"role": "assistant", "tool_calls": [call]}):
        assert Message.model_validate(given).model_dump() == turn
    assert Message.model_validate({**YES, "tool_calls": []}).model_dump() == YES
    arguments = '{"query": "\\u00c5bo", "limit": null}'
    as_text = {**turn, "tool_calls": [{**call, "function": {"name": "find", "arguments": arguments}}]}
    assert Message.model_validate(as_text).model_dump() == turn


@pytest.mark.parametrize("arguments", ['{"query": ', "[1]", '{"x": NaN}', '{"x": "\\ud800"}', 3])
def test_arguments_that_are_no_object_are_refused(arguments: object) -> None:
    call = {"function": {"name": "find", "arguments": arguments}}
    with pytest.raises(ValidationError, match=r"tool_calls\.0\.function\.arguments"):
        Message.model_validate({"role": "assistant", "content": "", "tool_calls": [call]})


def test_rows_survive_a_trip_to_disk() -> None:
    completion = Completion(text="Yes.", model="sft", sampling={"temperature": 0.7}, finished=False, score=7.5)
    rows: list[Row] = [
        CompletionSet.model_validate({"id": "a", "prompt": [USER], "completions": [completion], "reference": "Yes."}),
        PreferencePair.model_validate({"id": "a", "prompt": [USER], "chosen": [YES], "rejected": [NO], "margin": 2.0}),
    ]
    for row in rows:
        assert type(row).model_validate_json(row.model_dump_json(exclude_none=True)) == row
