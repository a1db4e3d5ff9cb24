"""`clean`: one reason a row, in order, and every rule can be switched off."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from alignkit.core.config import RowsConfig
from alignkit.core.errors import UserError
from alignkit.core.records import QAExample
from alignkit.data.hygiene.clean import clean
from alignkit.data.hygiene.config import HygieneConfig, PersonalData
from alignkit.data.hygiene.language import language, languages

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
OFF = HygieneConfig(
    empty_answer=False,
    personal_data=PersonalData.ignore,
    exact_duplicates=False,
    near_duplicates=None,
    contamination_words=None,
)
STATEMENT = "The old miller of the village sold his last sack of flour to a young baker from over the wide river."


def row(id: str, instruction: str = STATEMENT, input: str = "", output: str = "Yes.") -> QAExample:
    return QAExample(id=id, instruction=instruction, input=input, output=output)


def reasons(rows: list[QAExample], config: HygieneConfig, evaluation: list[QAExample] | None = None) -> dict[str, str]:
    """Row id -> reason and detail; every row is either kept or dropped, and rows keep their order."""
    kept, dropped = clean(rows, config, evaluation or [])
    assert len(kept) + len(dropped) == len(rows)
    order = [each.id for each in rows]
    assert [each.id for each in kept] == sorted((each.id for each in kept), key=order.index)
    return {each.row["id"]: f"{each.reason}: {each.detail}".removesuffix(": ") for each in dropped}


def test_each_row_is_dropped_by_the_first_rule_that_it_breaks() -> None:
    rows = [
        row("good"),
        row("empty", output=" \n"),
        row("copy", output="yes. "),
        row("near", STATEMENT.replace("flour", "wheat")),
        row("other answer", output="No."),
        row("leak", "", "Who was it that sold the last sack of flour?", "The miller."),
        row("leak again", "", "Who was it that sold the last sack of flour?", "The miller."),
    ]
    evaluation = [row("test-7", "", "Who was it that sold the last sack of flour?", "")]
    assert reasons(rows, HygieneConfig(), evaluation) == {
        "empty": "empty answer",
        "copy": "exact duplicate: of good",
        "near": "near duplicate: of good: 0.818 alike",
        "leak": "in the evaluation data: holds 100% of evaluation row test-7",
        "leak again": "exact duplicate: of leak",
    }


def test_with_every_rule_off_all_rows_stay_as_they_are() -> None:
    rows = [row("a", output=""), row("b", output=""), row("c", "mail anna@firm.de", output="")]
    assert clean(rows, OFF, rows) == (rows, [])


def test_lengths_count_words_and_in_chinese_characters() -> None:
    limits = HygieneConfig(min_question_words=2, max_question_words=6, min_answer_words=1, max_answer_words=3)
    rows = [
        row("ok", "one two", "three", "four"),
        row("short question", "one", "", "four"),
        row("long question", "one two three", "four five six seven", "four"),
        row("no words", "one two", "", "!!!"),
        row("long answer", "one two", "", "a b c d"),
        row("中文", "这句话共有七字", "", "是"),
        row("中", "六个字的问题", "", "是"),
    ]
    assert reasons(rows, limits) == {
        "short question": "question too short: 1 words, fewer than 2",
        "long question": "question too long: 7 words, more than 6",
        "no words": "answer too short: 0 words, fewer than 1",
        "long answer": "answer too long: 4 words, more than 3",
        "中文": "question too long: 7 words, more than 6",
    }
    endless = [row("blob", "a" * 100, "", "b")]
    assert reasons(endless, HygieneConfig(max_characters=99)) == {"blob": "row too long: 103 characters, more than 99"}


def test_a_row_in_another_language_is_dropped_and_a_short_one_kept() -> None:
    rows = [
        row("en", "What is the capital of France?", "", "The capital of France is Paris."),
        row("fr", "Quelle est la capitale de la France?", "", "La capitale de la France est Paris."),
        row("zh", "法国的首都是哪里？", "", "法国的首都是巴黎。"),
        row("short", "Ja?", "", "42"),
    ]
    assert reasons(rows, HygieneConfig(languages=["en", "zh"])) == {"fr": "language not wanted: fr"}
    with pytest.raises(UserError, match=r"hygiene\.languages: english is not known; give ISO 639-1 codes out of .*en"):
        clean(rows, HygieneConfig(languages=["english"]))


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("Give three tips for staying healthy.", "en"),
        ("列出三种水果", "zh"),
        ("請用繁體中文回答這個問題", "zh"),
        ("不是，因为小明比小红高。", "zh"),
        ("日本の首都はどこですか", "ja"),
        ("Der Hund läuft im Park.", "de"),
        ("yes", None),
        ("Paris", None),
        ("def f(x): return x + 1", None),
        ("x^2 + 3 = 4", None),
        ("", None),
    ],
)
def test_the_language_of_short_texts(text: str, code: str | None) -> None:
    assert language(text) == code


def test_only_two_letter_codes_are_offered() -> None:
    assert {len(code) for code in languages()} == {2}
    assert {"en", "zh"} <= set(languages())


def test_personal_data_is_flagged_dropped_or_ignored() -> None:
    rows = [row("a", "Mail anna@firm.de", output="Done."), row("b", "Mail nobody", output="Done.")]
    kept, dropped = clean(rows, HygieneConfig())
    assert not dropped
    assert kept[0].model_dump()["personal_data"] == ["e-mail address"]
    assert "personal_data" not in kept[1].model_dump()
    assert "personal_data" not in rows[0].model_dump()
    flagged = clean(kept, HygieneConfig())[0]
    assert flagged == kept
    assert reasons(rows, HygieneConfig(personal_data=PersonalData.drop)) == {"a": "personal data: e-mail address"}
    assert clean(rows, HygieneConfig(personal_data=PersonalData.ignore))[0] == rows


def test_a_field_of_that_name_gives_way_to_what_was_found() -> None:
    first = QAExample.model_validate({**row("a", "Mail anna@firm.de").model_dump(), "personal_data": 3})
    assert clean([first], HygieneConfig())[0][0].model_dump()["personal_data"] == ["e-mail address"]


def test_what_is_dropped_is_written_down_as_it_was_read() -> None:
    original = QAExample.model_validate({**row("a", output="").model_dump(), "extra": [1]})
    (dropped,) = clean([original], HygieneConfig())[1]
    assert dropped.row == original.model_dump()
    json.dumps(dropped.model_dump())


def test_no_rows() -> None:
    assert clean([], HygieneConfig(languages=["en"]), [row("a")]) == ([], [])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"near_duplicates": 0.0}, "hygiene.near_duplicates=0.0"),
        ({"contamination_share": 1.5}, "hygiene.contamination_share=1.5"),
        ({"contamination_words": 0}, "hygiene.contamination_words=0"),
        ({"min_answer_words": 5, "max_answer_words": 4}, "hygiene.max_answer_words=4 is less than"),
    ],
)
def test_settings_that_mean_nothing_are_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        HygieneConfig(**values)  # type: ignore[arg-type]


def test_the_configuration_costs_no_import_of_numpy() -> None:
    code = "import sys, alignkit.data.hygiene.config; assert 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real data is not here")
def test_on_real_instructions_only_what_is_in_the_evaluation_goes() -> None:
    from alignkit.data.sources import read_questions

    rows = [
        example
        for file in ("mods/example.json", "self-instruct/seed_tasks.jsonl")
        for example in read_questions(RowsConfig(path=str(SHARED / file)))[0]
    ]
    evaluation = read_questions(RowsConfig(path=str(SHARED / "self-instruct/davinci_predictions.jsonl")))[0]
    assert reasons(rows, HygieneConfig(), evaluation) == {}
    leaked = [example.model_copy(update={"id": f"leak-{example.id}", "output": "?"}) for example in evaluation]
    dropped = reasons([*rows, *leaked], HygieneConfig(), evaluation)
    assert Counter(reason.split(":")[0] for reason in dropped.values()) == {"in the evaluation data": 252}
