"""RAFT rows as they go around: what is mended, flagged and dropped on the way to training."""

from __future__ import annotations

from typing import Any

import pytest

from alignkit.core.errors import UserError
from alignkit.core.records import ChatExample, Dropped, QAExample
from alignkit.data.sources import raft
from alignkit.data.sources.raw import RawRow

GOLD = 'Applications must be in by 15 January; late ones are "not" read by the office.'
OTHERS = ["The library opens\nat nine o'clock.", "Fees are due in March. " + "It's a rule. " * 20]
DOCUMENTS = [OTHERS[0], GOLD, OTHERS[1]]
QUESTION = "When must applications be in?"
REASONING = "The document says ##begin_quote##Applications must be in by  15 January##end_quote##.\n\n"
ROW: dict[str, Any] = {
    "id": "row-1",
    "type": "general",
    "question": QUESTION,
    "context": {"title": [["placeholder_title"] * 3], "sentences": [DOCUMENTS]},
    "oracle_context": GOLD,
    "cot_answer": f"{REASONING}<ANSWER>: By 15 January.",
    "instruction": "".join(f"<DOCUMENT>{text}</DOCUMENT>\n" for text in DOCUMENTS) + QUESTION,
}
PRINTED = (
    "{'sentences': array([array([" + repr(DOCUMENTS[0]) + ",\n              " + repr(DOCUMENTS[1]) + ",\n       "
    "       " + repr(DOCUMENTS[2]) + "],\n                    dtype=object)                    ],\n"
    "      dtype=object), 'title': array([array(['placeholder_title', 'placeholder_title'], dtype=object)],\n"
    "      dtype=object)}"
)


def raw(id: str = "row-1", **changes: Any) -> RawRow:
    fields = {key: value for key, value in {**ROW, "id": id, **changes}.items() if value is not None}
    return RawRow("file.arrow:7", id, fields)


def example(row: RawRow, **options: Any) -> ChatExample:
    found = raft.read_row(row, **options)
    assert isinstance(found, ChatExample), found
    return found


def flags(row: RawRow) -> list[str]:
    return list(example(row).model_dump()["flags"])


def test_a_clean_row_is_the_instruction_and_the_whole_answer() -> None:
    found = example(raw())
    assert [message.model_dump() for message in found.prompt] == [{"role": "user", "content": ROW["instruction"]}]
    assert [message.content for message in found.completion] == [ROW["cot_answer"]]
    assert (found.id, found.parents, found.source) == ("row-1", [], "raft")
    assert flags(raw()) == []


@pytest.mark.parametrize(
    "context",
    [ROW["context"], {"sentences": DOCUMENTS}, DOCUMENTS, [DOCUMENTS], PRINTED, repr(DOCUMENTS), str(ROW["context"])],
)
def test_without_an_instruction_the_documents_come_from_the_context_in_any_form(context: Any) -> None:
    assert example(raw(context=context, instruction=None)).prompt[0].content == ROW["instruction"]
    assert example(raw(context=context)).prompt[0].content == ROW["instruction"]


@pytest.mark.parametrize("context", ["__import__('os').getcwd()", "array(", "[" * 5000, "1 + 1", "{'a': f('x')}"])
def test_a_context_that_is_no_printed_value_is_a_text(context: str) -> None:
    prompt = example(raw(context=context, instruction=None)).prompt[0].content
    assert prompt == f"<DOCUMENT>{context}</DOCUMENT>\n{QUESTION}"


def test_a_corrected_question_takes_the_place_of_the_old_one() -> None:
    found = raw(question="Bis wann muss man sich bewerben?")
    assert example(found).prompt[0].content.endswith("</DOCUMENT>\nBis wann muss man sich bewerben?")
    assert flags(found) == ["the instruction asked another question"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"cot_answer": REASONING}, "no <ANSWER>"),
        ({"cot_answer": f"{REASONING}<ANSWER>: "}, "no <ANSWER>"),
        ({"oracle_context": "2 Nr."}, "gold document shorter than 40 characters"),
        ({"oracle_context": "x" * 39 + " "}, "gold document shorter than 40 characters"),
        ({"question": " "}, "empty question"),
        ({"question": "Your request seems unclear. Could you provide a topic?"}, "the question is a refusal"),
        ({"question": "The provided context is insufficient to generate questions."}, "the question is a refusal"),
        ({"instruction": None, "context": None}, "no documents"),
        ({"instruction": QUESTION, "context": {"sentences": []}}, "no documents"),
    ],
)
def test_what_is_dropped_and_why(changes: dict[str, Any], reason: str) -> None:
    for read in (raft.read_row, raft.read_question):
        found = read(raw(**changes))
        assert isinstance(found, Dropped)
        assert (found.reason, found.detail) == (reason, "file.arrow:7")


@pytest.mark.parametrize(
    ("answer", "flag"),
    [
        ("By 15 January.\n<ANSWER>: By 15 January.", "no quote"),
        (f"{REASONING.replace('must', 'should')}<ANSWER>: By 15 January.", "quote not verbatim"),
        (f"##begin_quote####end_quote##{REASONING}<ANSWER>: By 15 January.", "quote not verbatim"),
    ],
)
def test_an_answer_without_evidence_is_flagged_or_dropped(answer: str, flag: str) -> None:
    assert flags(raw(cot_answer=answer)) == [flag]
    found = raft.read_row(raw(cot_answer=answer), quotes="drop")
    assert isinstance(found, Dropped) and found.reason == flag
    assert flags(raw(cot_answer=answer, flags=[flag, "mine"])) == [flag, "mine"]
    with pytest.raises(ValueError, match="'flag' or 'drop'"):
        raft.read_row(raw(), quotes="keep")


def test_saying_that_there_is_no_answer_is_kept_and_flagged() -> None:
    said = f"{REASONING}<ANSWER>: The context does not provide enough information."
    assert flags(raw(cot_answer=said)) == ["the answer is a refusal"]


def test_ids_that_start_anew_get_a_mark_of_the_content() -> None:
    first, second = raw("seed_task_3"), raw("seed_task_3", question="Until when?")
    assert example(first).id == example(raw("seed_task_3")).id != example(second).id
    assert example(first).id.startswith("seed_task_3-")
    assert example(first).parents == ["seed_task_3"]
    assert example(raw("seed_task_x")).id == "seed_task_x"


def test_a_field_of_another_type_is_an_error_with_its_place() -> None:
    with pytest.raises(UserError, match=r"file\.arrow:7: cot_answer"):
        raft.read_row(raw(cot_answer=3))


def test_a_row_as_a_question_has_the_final_answer_alone() -> None:
    found = raft.read_question(raw())
    assert isinstance(found, QAExample)
    assert (found.input, found.output) == (QUESTION, "By 15 January.")
    assert found.instruction == ROW["instruction"].removesuffix(f"\n{QUESTION}")


def test_an_evaluation_row() -> None:
    fields = {"question": QUESTION, "context": "<DOCUMENT>a</DOCUMENT>\n", "gold_final_answer": "By 15 January."}
    found = raft.read_evaluation(RawRow("file:1", "file-1", fields))
    assert isinstance(found, QAExample)
    assert (found.instruction, found.input, found.output) == ("<DOCUMENT>a</DOCUMENT>", QUESTION, "By 15 January.")
    for field, reason in (("question", "empty question"), ("gold_final_answer", "empty answer")):
        dropped = raft.read_evaluation(RawRow("file:1", "file-1", {**fields, field: " "}))
        assert isinstance(dropped, Dropped) and dropped.reason == reason


def pair(prompt: Any, completion: Any) -> ChatExample | Dropped:
    return raft.read_prompt_and_completion(RawRow("file:1", "p", {"prompt": prompt, "completion": completion}))


def test_a_completion_loses_its_stop_text() -> None:
    found = pair(ROW["instruction"], ROW["cot_answer"] + "<STOP>\n")
    assert isinstance(found, ChatExample)
    assert found.completion[0].content == ROW["cot_answer"]
    assert found.prompt[0].content == ROW["instruction"]
    dropped = pair(ROW["instruction"], f"{REASONING}<STOP>")
    assert isinstance(dropped, Dropped) and dropped.reason == "no <ANSWER>"


def test_other_chat_examples_stay_as_they_are() -> None:
    found = pair("What ends a completion?", "<STOP>")
    assert isinstance(found, ChatExample) and found.completion[0].content == "<STOP>"
    turns = (
        [{"role": "user", "content": "<DOCUMENT>a</DOCUMENT>\nWhat?"}],
        [{"role": "assistant", "content": "a<STOP>"}],
    )
    found = pair(*turns)
    assert isinstance(found, ChatExample) and found.completion[0].content == "a<STOP>"


@pytest.mark.parametrize(
    ("quote", "document", "found"),
    [
        ("a b", "x a  b y", True),
        ("第一 条", "根据第一条规定", True),
        ("a c", "a b c", False),
        ("", "abc", False),
        (" \n", "abc", False),
    ],
)
def test_white_space_does_not_count_in_a_quote(quote: str, document: str, found: bool) -> None:
    assert raft.stands_in(quote, document) == found


def test_the_parts_of_an_answer() -> None:
    text = 'a ##begin_quote## "b" ##end_quote## c <ANSWER>: d ##begin_quote##e##end_quote## <ANSWER>: f \n'
    assert raft.quotations(text) == ["b", "e"]
    assert raft.final_answer(text) == "f"
    assert raft.final_answer("f") is None
    assert raft.quotations("##begin_quote##b") == ["b"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("I'm sorry, but there is not enough context.", True),
        ("The provided context doesn't contain enough information to answer.", True),
        ("This is not specified in the given document.", True),
        ("Der bereitgestellte Kontext ist nicht gültig. Bitte geben Sie einen Text an.", True),
        ("抱歉，我无法回答这个问题。", True),
        ("文档中没有提到这一点。", True),
        ("The statement does not say.", True),
        ("What happens if the document is not submitted in time?", False),
        ("The law does not specify a maximum.", False),
        ("Worauf bezieht sich Abs. 1 im gegebenen Kontext?", False),
        ("为什么他无法参加考试？", False),
        ("Who may provide a certificate?", False),
    ],
)
def test_refusals_are_told_by_their_phrases(text: str, found: bool) -> None:
    assert raft.refuses(text) == found
