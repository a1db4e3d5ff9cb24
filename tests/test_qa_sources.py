"""Reading questions with short answers and QA-Expert's records, from the forms in which the data sets are published.

The rows are made up; their fields are those of the published files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from alignkit.core.config import RowsConfig
from alignkit.core.errors import UserError
from alignkit.core.records import ChatExample, Dropped, Message, TextExample
from alignkit.data.jsonl import read_rows
from alignkit.data.sources import read_comparables, read_examples, read_questions, read_short_answers
from alignkit.data.sources.categories import Category
from alignkit.data.sources.qa_expert import RETRIEVE, MultihopExample, record
from alignkit.data.sources.short_answers import ShortAnswer

QA_EXPERT = Path(__file__).resolve().parents[2] / "shared" / "data" / "qa-expert" / "test_cases.json"

SQUAD: dict[str, Any] = {
    "version": "v2.0",
    "data": [
        {
            "title": "Ferries",
            "paragraphs": [
                {
                    "context": "The ferry Alma was built in 1931 and sold in 1950.",
                    "qas": [
                        {
                            "id": "q1",
                            "question": "When was the Alma built?",
                            "answers": [{"text": "1931", "answer_start": 28}, {"text": "in 1931", "answer_start": 25}],
                            "is_impossible": False,
                        },
                        {
                            "id": "q2",
                            "question": "When did the Alma sink?",
                            "answers": [],
                            "plausible_answers": [{"text": "1950", "answer_start": 45}],
                            "is_impossible": True,
                        },
                    ],
                }
            ],
        }
    ],
}
DROP: dict[str, Any] = {
    "nfl_7": {
        "passage": "The Gulls led 24-17; their kicks were of 40, 31 and 22 yards. Ott and Ray scored on 5 May 1990.",
        "wiki_url": "",
        "qa_pairs": [
            {
                "query_id": "d1",
                "question": "By how many points did the Gulls lead?",
                "answer": {"number": "7", "date": {"day": "", "month": "", "year": ""}, "spans": []},
                "validated_answers": [],
            },
            {
                "query_id": "d2",
                "question": "Who scored?",
                "answer": {"number": "", "date": {"day": "", "month": "", "year": ""}, "spans": ["Ott", "Ray"]},
            },
            {
                "query_id": "d3",
                "question": "When did they score?",
                "answer": {"number": "", "date": {"day": "5", "month": "May", "year": "1990"}, "spans": []},
            },
            {"query_id": "d4", "question": "Who fell?", "answer": {"number": "", "date": {}, "spans": []}},
        ],
    }
}


def musique(**changes: Any) -> dict[str, Any]:
    paragraphs = [("Ida", "Ida Berg was born in Lund."), ("Lund", "Lund has a mill."), ("Mill", "A mill of 1790.")]
    row = {
        "id": "2hop__1_2",
        "paragraphs": [
            {"idx": number, "title": title, "paragraph_text": text, "is_supporting": number < 2}
            for number, (title, text) in enumerate(paragraphs)
        ],
        "question": "What does the town where Ida Berg was born have?",
        "question_decomposition": [
            {"id": 1, "question": "Where was Ida Berg born?", "answer": "Lund", "paragraph_support_idx": 0},
            {"id": 2, "question": "What does #1 have?", "answer": "a mill", "paragraph_support_idx": 1},
        ],
        "answer": "a mill",
        "answer_aliases": ["mill"],
        "answerable": True,
    }
    return {**row, **changes}


def write(path: Path, rows: Any, *, indent: int | None = None) -> RowsConfig:
    """Write JSON Lines from a list, or one JSON object."""
    if isinstance(rows, list):
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    else:
        path.write_text(json.dumps(rows, ensure_ascii=False, indent=indent), encoding="utf-8")
    return RowsConfig(path=str(path))


def read(path: Path, rows: Any, **options: Any) -> tuple[list[ShortAnswer], list[Dropped]]:
    return read_short_answers(write(path, rows, **options))


def hub_squad() -> list[dict[str, Any]]:
    """The rows of `SQUAD` in the form of the Hub's copy."""
    paragraph = SQUAD["data"][0]["paragraphs"][0]
    return [
        {
            "id": question["id"],
            "title": "Ferries",
            "context": paragraph["context"],
            "question": question["question"],
            "answers": {
                "text": [answer["text"] for answer in question["answers"]],
                "answer_start": [answer["answer_start"] for answer in question["answers"]],
            },
        }
        for question in paragraph["qas"]
    ]


# -- SQuAD -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("indent", [None, 2])
def test_the_nested_file_of_squad_is_laid_flat(tmp_path: Path, indent: int | None) -> None:
    rows, dropped = read(tmp_path / "dev-v2.0.json", SQUAD, indent=indent)
    assert not dropped
    known, open_question = rows
    assert (known.id, known.answers, known.unanswerable) == ("q1", ["1931", "in 1931"], False)
    assert known.paragraphs == ["The ferry Alma was built in 1931 and sold in 1950."]
    assert (open_question.answers, open_question.unanswerable) == ([], True)
    assert open_question.plausible == ["1950"]


def test_the_hubs_copy_of_squad_reads_the_same_but_for_plausible_answers(tmp_path: Path) -> None:
    nested, _ = read(tmp_path / "train.json", SQUAD)
    flat, _ = read(tmp_path / "train.jsonl", hub_squad())
    assert [row.model_copy(update={"plausible": []}) for row in nested] == flat


def test_parquet_reads_like_json(tmp_path: Path) -> None:
    import pyarrow as pa  # type: ignore[import-untyped]
    from pyarrow import parquet

    flat, _ = read(tmp_path / "train.jsonl", hub_squad())
    parquet.write_table(pa.Table.from_pylist(hub_squad()), tmp_path / "train.parquet")
    assert read_short_answers(RowsConfig(path=str(tmp_path / "train.parquet")))[0] == flat


def test_skip_and_limit_count_questions(tmp_path: Path) -> None:
    config = write(tmp_path / "dev.json", SQUAD)
    config.skip, config.limit = 1, 1
    assert [row.id for row in read_short_answers(config)[0]] == ["q2"]
    config.skip = 2
    with pytest.raises(UserError, match=r"no question, or none after skip=2"):
        read_short_answers(config)


def test_an_ill_formed_article_is_named(tmp_path: Path) -> None:
    broken = {"data": [*SQUAD["data"], {"title": "x", "paragraphs": [{"qas": []}]}]}
    with pytest.raises(UserError, match=r"dev\.json:article 2: .*context"):
        read(tmp_path / "dev.json", broken)


# -- BoolQ and DROP ----------------------------------------------------------------------------------------------------


def test_boolq_in_both_forms(tmp_path: Path) -> None:
    original = [
        {"question": "is it old", "title": "Alma", "answer": answer, "passage": "It is."} for answer in (True, False)
    ]
    glue = [{"question": "is it old", "passage": "It is.", "idx": n, "label": n} for n in (1, 0, -1)]
    rows, _ = read(tmp_path / "a.jsonl", original)
    assert [row.answers for row in rows] == [["yes"], ["no"]]
    assert {row.reasoning for row in rows} == {"thought"}
    labelled, dropped = read(tmp_path / "b.jsonl", glue)
    assert [row.answers for row in labelled] == [["yes"], ["no"]]
    assert [each.reason for each in dropped] == ["no short answer"]
    with pytest.raises(UserError, match=r"c\.jsonl:1: answer"):
        read(tmp_path / "c.jsonl", [{**original[0], "answer": "yes"}])


def test_drop_has_numbers_spans_and_dates(tmp_path: Path) -> None:
    rows, dropped = read(tmp_path / "drop.json", DROP, indent=4)
    assert {row.id: row.answers for row in rows} == {"d1": ["7"], "d2": ["Ott", "Ray"], "d3": ["5 May 1990"]}
    assert all(row.every and row.reasoning == "arithmetic" for row in rows)
    assert [each.reason for each in dropped] == ["no short answer"]
    hub = [
        {
            "section_id": "nfl_7",
            "query_id": "d2",
            "passage": DROP["nfl_7"]["passage"],
            "question": "Who scored?",
            "answers_spans": {"spans": ["Ott", "Ray"], "types": ["span", "span"]},
        }
    ]
    assert read(tmp_path / "hub.jsonl", hub)[0] == [rows[1]]


# -- MuSiQue -----------------------------------------------------------------------------------------------------------


def test_musique_fills_earlier_answers_in(tmp_path: Path) -> None:
    (row,), _ = read(tmp_path / "m.jsonl", [musique()])
    assert [(sub.question, sub.answer, sub.paragraph) for sub in row.sub_questions] == [
        ("Where was Ida Berg born?", "Lund", "Ida. Ida Berg was born in Lund."),
        ("What does Lund have?", "a mill", "Lund. Lund has a mill."),
    ]
    assert row.answers == ["a mill", "mill"] and not row.unanswerable
    assert row.paragraphs == [sub.paragraph for sub in row.sub_questions]


def test_an_unanswerable_row_of_musique_stops_where_its_paragraph_is_missing(tmp_path: Path) -> None:
    first, second = musique()["question_decomposition"]
    lost_second = musique(answerable=False, question_decomposition=[first, {**second, "paragraph_support_idx": None}])
    (whole, row), _ = read(tmp_path / "m.jsonl", [musique(), lost_second])  # the twins share an id in the file
    assert (whole.id, row.id) == ("2hop__1_2", "2hop__1_2-unanswerable")
    assert row.unanswerable and row.answers == [] and row.plausible == ["a mill"]
    known, missing = row.sub_questions
    assert not known.unanswerable
    # "Lund. Lund has a mill." has the answer; of the others the first shares a word with "What does Lund have?".
    assert missing.unanswerable and missing.answer == "" and missing.paragraph == "Ida. Ida Berg was born in Lund."
    lost_first = musique(answerable=False, question_decomposition=[{**first, "paragraph_support_idx": None}, second])
    (row,), _ = read(tmp_path / "n.jsonl", [lost_first])
    assert [sub.question for sub in row.sub_questions] == ["Where was Ida Berg born?"]  # "#1" cannot be filled in
    assert "Lund" not in row.sub_questions[0].paragraph


def test_what_musique_is_dropped_for(tmp_path: Path) -> None:
    first, second = musique()["question_decomposition"]
    rows = [
        musique(id="a", question_decomposition=[{**first, "question": "Ida Berg >> place of birth"}, second]),
        musique(id="b", question_decomposition=[first, {**second, "paragraph_support_idx": None}]),
        musique(id="c", question_decomposition=[first, {**second, "paragraph_support_idx": 9}]),
        musique(id="d", question_decomposition=[{**first, "question": "What has #2?"}, second]),
        musique(id="e", answerable=False),
        musique(id="f"),
    ]
    kept, dropped = read(tmp_path / "m.jsonl", rows)
    assert [row.id for row in kept] == ["f"]
    assert {each.row["id"].removesuffix("-unanswerable"): each.reason for each in dropped} == {
        "a": "ill-formed sub-question",
        "b": "sub-question without paragraph",
        "c": "sub-question without paragraph",
        "d": "sub-question refers to a step that is not before it",
        "e": "unanswerable, yet every sub-question is answered",
    }


# -- other forms -------------------------------------------------------------------------------------------------------


def test_hotpotqa_questions_and_our_own_rows(tmp_path: Path) -> None:
    hotpotqa = {
        "_id": "h",
        "question": "Is Alma a ferry?",
        "answer": "yes",
        "supporting_facts": [["Alma", 0]],
        "context": [["Alma", ["Alma is a ferry."]], ["Ott", ["Ott scored."]]],
    }
    (row,), _ = read(tmp_path / "h.jsonl", [hotpotqa])
    assert (row.answers, row.reasoning, row.paragraphs) == (["yes"], "thought", ["Alma: Alma is a ferry."])
    (row,), _ = read(tmp_path / "q.jsonl", [{"instruction": "Alma is old.", "input": "What is old?", "output": "Alma"}])
    assert (row.paragraphs, row.question, row.answers) == (["Alma is old."], "What is old?", ["Alma"])
    own = [{"id": "1", "question": "Q?", "paragraphs": ["P"], "answers": ["A"], "mine": 3}]
    own += [{"id": "2", "question": "Q?", "paragraphs": ["P"], "answers": []}]
    (row,), dropped = read(tmp_path / "o.jsonl", own)
    assert row.model_dump()["mine"] == 3
    assert [each.reason for each in dropped] == ["no short answer"]


def test_a_json_file_of_lines_is_not_taken_for_one_object(tmp_path: Path) -> None:
    rows, _ = read(tmp_path / "lines.json", hub_squad())
    assert len(rows) == 2
    with pytest.raises(UserError, match="of no format that fits here"):
        read(tmp_path / "other.json", {"data": [], "version": "v9"})


# -- QA-Expert ---------------------------------------------------------------------------------------------------------

OLD = {
    "src": "musique",
    "question": "What does the town where Ida Berg was born have?",
    "answer": "a mill",
    "final_answer": "It has a mill.",
    "sub_questions": [
        {"question": "Where was Ida Berg born?", "answer": "Lund", "long_answer": "In Lund.", "paragraph": "P one."},
        {"question": "What does Lund have?", "answer": "a mill", "long_answer": "A mill.", "paragraph": "P two."},
    ],
}
NEW = {
    **OLD,
    "multihop": False,
    "answer": None,
    "tag": "x.json",
    "later_field": [1, None, {"a": -2.5}],
    "meta_info": {"llm": "m", "negatives": [], "slot_dic": {"k": None}},
    "sub_questions": [{**OLD["sub_questions"][0], "unanswerable": True, "note": "kept"}],  # type: ignore[dict-item]
}


def test_records_go_in_and_out_unchanged(tmp_path: Path) -> None:
    config = write(tmp_path / "records.jsonl", [OLD, NEW])
    rows, _ = read_comparables(config)
    examples = [row for row in rows if isinstance(row, MultihopExample)]
    assert [record(example) for example in examples] == [
        {"id": "records-1", **OLD},
        {"id": "records-2", **NEW},
    ]
    assert [example.takes_several_steps for example in examples] == [True, False]


def test_records_are_questions_about_their_paragraphs(tmp_path: Path) -> None:
    (row, _), _ = read_questions(write(tmp_path / "records.jsonl", [OLD, NEW]))
    assert (row.instruction, row.input, row.output) == ("P one.\nP two.", OLD["question"], "It has a mill.")


def test_records_are_learned_as_a_search_in_steps(tmp_path: Path) -> None:
    """Each turn of the assistant says what was found before, and retrieves; the last gives the final answer."""
    summed = {**OLD, "final_answer": "Summary: It has one.\nAnswer: A mill."}
    unanswerable = {**NEW, "multihop": True}
    rows, dropped = read_examples(write(tmp_path / "r.jsonl", [OLD, NEW, summed, unanswerable]))
    assert dropped == []

    def turns(row: ChatExample | TextExample) -> list[tuple[str, str, list[str]]]:
        assert isinstance(row, ChatExample)
        assert row.prompt == [Message(role="user", content=str(OLD["question"]))]
        assert row.tools == [RETRIEVE]
        return [
            (turn.role, turn.content, [call.function.arguments["query"] for call in turn.tool_calls or ()])
            for turn in row.completion
        ]

    first = ("assistant", "", ["Where was Ida Berg born?"])
    several = [
        first,
        ("tool", "P one.", []),
        ("assistant", "In Lund.", ["What does Lund have?"]),
        ("tool", "P two.", []),
    ]
    assert turns(rows[0]) == [*several, ("assistant", "A mill.\nSummary: It has a mill.", [])]
    assert turns(rows[2]) == [*several, ("assistant", "A mill.\nSummary: It has one.\nAnswer: A mill.", [])]
    assert turns(rows[1]) == [
        ("assistant", "", [OLD["question"]]),
        ("tool", "P one.", []),
        ("assistant", "It has a mill.", []),
    ]
    assert turns(rows[3]) == [
        first,
        ("tool", "P one.", []),
        ("assistant", "In Lund.\nSummary: It has a mill.", []),
    ]
    assert [row.source for row in rows] == ["musique", "x.json", "musique", "x.json"]


def test_records_that_cannot_be_learned_are_dropped(tmp_path: Path) -> None:
    silent = {**OLD, "sub_questions": [{**OLD["sub_questions"][0], "question": " "}]}  # type: ignore[dict-item]
    _, dropped = read_examples(write(tmp_path / "r.jsonl", [OLD, {**OLD, "final_answer": " "}, silent]))
    assert [each.reason for each in dropped] == ["empty answer", "empty sub-question"]


def test_records_without_sub_questions_are_dropped(tmp_path: Path) -> None:
    _, dropped = read_comparables(write(tmp_path / "r.jsonl", [OLD, {**OLD, "sub_questions": []}]))
    assert [each.reason for each in dropped] == ["no sub-question"]
    with pytest.raises(UserError, match=r"r\.jsonl:1: sub_questions\.0\.paragraph"):
        read_comparables(write(tmp_path / "r.jsonl", [{**OLD, "sub_questions": [{"question": "Q?"}]}]))


@pytest.mark.skipif(not QA_EXPERT.exists(), reason="the real records are not here")
def test_the_real_records_round_trip() -> None:
    rows, dropped = read_comparables(RowsConfig(path=str(QA_EXPERT)))
    assert not dropped
    for row, (_, original) in zip(rows, read_rows(str(QA_EXPERT)), strict=True):
        assert isinstance(row, MultihopExample)
        written = record(row)
        written.pop("id")
        assert written == original


def test_the_shipped_categories(tmp_path: Path) -> None:
    path = Path(__file__).resolve().parents[1] / "dataset_optimization" / "word_lists" / "categories.jsonl"
    rows, dropped = read_comparables(RowsConfig(path=str(path)))
    assert len(rows) >= 60 and not dropped
    for row in rows:
        assert isinstance(row, Category)
        assert 4 <= len(set(row.sub_categories)) == len(row.sub_categories) <= 8
