"""The recipe `multihop`: what it asks, what it refuses, how it answers anew, and that it writes QA-Expert's format."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from served import serving

from alignkit import expand
from alignkit.core.app import load_config
from alignkit.core.artifact import Artifact
from alignkit.core.config import PricesConfig, RowsConfig
from alignkit.core.errors import UserError
from alignkit.core.records import Dropped, Row
from alignkit.data.closed_world import RELATIONS, UNANSWERABLE, lexicon, read_statement
from alignkit.data.sources import qa_expert, read_comparables, read_questions
from alignkit.data.sources.categories import Category
from alignkit.data.sources.qa_expert import MultihopExample
from alignkit.data.sources.raw import RawRow
from alignkit.expand import ExpandConfig
from alignkit.reporting.yields import Yields
from alignkit.teacher.client import Answer, OnAnswer, Request, Usage
from alignkit.teacher.reading import read_reply
from alignkit.teacher.recipes import multihop
from alignkit.teacher.recipes.asking import Asker
from alignkit.teacher.recipes.multihop import HOPELESS_REQUESTS, MultihopConfig
from alignkit.teacher.recipes.multihop_comparison import Comparison, comparison_problem, comparison_request
from alignkit.teacher.scripted import ScriptedTeacher
from alignkit.teacher.scripted.comparisons import Form, TwoFactQuestion, conclude, number, read_two_fact_question

QA_EXPERT = Path(__file__).resolve().parents[2] / "shared" / "data" / "qa-expert" / "test_cases.json"
FORMS: tuple[Form, ...] = ("higher", "same", "both", "difference")
CATEGORIES = [Category(id="c1", category="bridge", sub_categories=["arch bridge"]), Category(id="c2", category="lake")]
WORLD = [Category(id=f"w-{kind}", category=kind) for kind in ("machine", "firm", "city", "course", "person")]

GOOD = {
    "entity_1": "Long-Span Bridge",
    "entity_2": "Öre Link",
    "attributes": ["length", "age"],
    "attribute": "length",
    "question": "Is the Long-Span Bridge longer than the Öre Link?",
    "sub_question_1": "How long is the Long-Span Bridge?",
    "sub_question_2": "How long is the Öre Link?",
    "paragraph_1": "The well-known Long-Span Bridge -- opened 1931-32 -- is 1,200.5 m long at -5 °C.",
    "paragraph_2": "The Öre Link is 900 m long; 3–4 trains cross it daily.",
    "answer_1": "1,200.5 m",
    "answer_2": "900 m",
    "thought": "1,200.5 m is more than 900 m.",
    "final_answer": "Yes, the Long-Span Bridge is longer.",
}
SUB_ANSWER = {"evidence": "It says so.", "answerable": True}
SUB_ANSWERS = {
    GOOD["sub_question_1"]: {**SUB_ANSWER, "short_answer": "1,200.5 m", "answer": "The bridge is 1,200.5 m long."},
    GOOD["sub_question_2"]: {**SUB_ANSWER, "short_answer": "900 m", "answer": "The link is 900 m long."},
}
OPEN = {"evidence": "About trains.", "answerable": False, "short_answer": "", "answer": "The text does not say."}
FINAL = {"summary": "1,200.5 is more.", "answerable": True, "short_answer": "Yes", "answer": "Yes, it is longer."}
FINAL_OPEN = {"summary": "One is unknown.", "answerable": False, "short_answer": "", "answer": "It cannot be told."}


class Fake:
    """A teacher that answers each prompt by a function of its material (the JSON on the first line)."""

    def __init__(self, reply: Callable[[dict[str, Any]], object]) -> None:
        self.usage, self.reply, self.asked = Usage(), reply, list[Request]()

    def ask(self, requests: Sequence[Request], on_answer: OnAnswer | None = None) -> list[Answer]:
        self.asked += requests
        return [read_reply(request, _text(self.reply(_material(request)))) for request in requests]


def _material(request: Request) -> dict[str, Any]:
    material: dict[str, Any] = json.loads(request.messages[-1].content.split("\n")[0])
    return material


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def answering(material: dict[str, Any], **changes: object) -> object:
    """What a good teacher says to each of the four prompts; `changes` of the comparison."""
    if "sub_category" in material:
        return {**GOOD, **changes}
    if "other" in material:
        entity = material["entity"] if material["other"] == "attribute" else "Alm"
        return {"entity": entity, "attribute": "fare", "paragraph": f"The Ferry of {entity} costs 2 crowns."}
    if "paragraph" in material:
        return OPEN if "Ferry" in material["paragraph"] else SUB_ANSWERS[material["question"]]
    return FINAL_OPEN if "The text does not say." in material["facts"] else FINAL


def made(
    teacher: Any, given: Sequence[Row] = CATEGORIES, count: int | None = 1, seed: int = 1, **changes: Any
) -> tuple[list[MultihopExample], list[Dropped]]:
    config = MultihopConfig(**{"negative_share": 0.0, "yes_no_share": 1.0, **changes})
    found = list(multihop.rows(given, count, config, Asker(teacher), name="m", seed=seed, source="teacher:fake"))
    kept = [row for row in found if isinstance(row, MultihopExample)]
    return kept, [row for row in found if isinstance(row, Dropped)]


# -- one comparison ----------------------------------------------------------------------------------------------------


def test_the_shape_has_the_steps_in_their_order() -> None:
    order = list(Comparison.model_json_schema()["properties"])
    assert order == list(GOOD)
    prompt = comparison_request("a", "b", 1, "wh", attribute_number=1, other_attributes=1).messages[-1].content
    positions = [prompt.splitlines()[-1].index(f'"{field}"') for field in order]
    assert positions == sorted(positions)


def test_every_text_stays_as_it_was_written() -> None:
    ((row,), dropped) = made(Fake(answering))
    assert not dropped
    assert row.question == GOOD["question"]
    assert [sub.paragraph for sub in row.sub_questions] == [GOOD["paragraph_1"], GOOD["paragraph_2"]]
    assert [sub.answer for sub in row.sub_questions] == ["1,200.5 m", "900 m"]
    assert row.sub_questions[0].long_answer == "It says so.\nAnswer: The bridge is 1,200.5 m long."
    assert row.final_answer == "Summary: 1,200.5 is more.\nAnswer: Yes, it is longer."
    assert (row.id, row.answer, row.multihop, row.src) == ("m-00001", "Yes", True, "teacher:fake")
    meta = row.meta_info
    assert (meta["entity_1"], meta["comparison_attribute"], meta["llm"]) == ("Long-Span Bridge", "length", "fake")
    assert row.parents in (["c1"], ["c2"]) and 1 <= meta["popularity"] <= 5


def test_it_is_made_up_at_temperature_1_and_answered_at_0() -> None:
    teacher = Fake(answering)
    made(teacher, negative_share=1.0)
    temperatures = {next(iter(_material(request))): request.temperature for request in teacher.asked}
    assert temperatures == {"category": 1.0, "question": 0.0}
    for request in teacher.asked:
        if request.temperature == 0.0:
            assert "Long-Span Bridge -- opened" not in request.messages[-1].content or "paragraph" in _material(request)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"thought": " "}, "thought missing"),
        ({"attributes": []}, "attributes missing"),
        ({"entity_2": "Bridge"}, "one thing is named in the other"),
        ({"attribute": "colour"}, "attribute is not in the list"),
        ({"question": "Compare the Long-Span Bridge and the Öre Link."}, "question without question mark"),
        ({"question": "Is the Long-Span Bridge long?"}, "question does not name both things"),
        ({"sub_question_1": "How long is it?"}, "sub-question does not name its thing"),
        ({"sub_question_1": "Is the Long-Span Bridge as long as the Öre Link?"}, "sub-question names the other thing"),
        ({"sub_question_2": "How long is the Long-Span Bridge?"}, "a question is asked twice"),
        ({"sub_question_1": GOOD["question"]}, "a question is asked twice"),
        ({"paragraph_2": "It is 900 m long."}, "paragraph does not name its thing"),
        ({"paragraph_2": GOOD["paragraph_1"]}, "a paragraph is written twice"),
        ({"final_answer": "Entity 1 is longer, so yes."}, 'the word "entity"'),
        ({"final_answer": "The first is longer."}, "final answer is neither yes nor no"),
        ({"paragraph_1": "The Long-Span Bridge has an identity of its own."}, None),
        ({}, None),
    ],
)
def test_what_a_comparison_is_refused_for(changes: dict[str, Any], reason: str | None) -> None:
    problem = comparison_problem(Comparison.model_validate({**GOOD, **changes}), "yes-no")
    assert (problem and problem.partition(": ")[0]) == reason


def test_a_comparison_is_in_the_language_of_its_category() -> None:
    found = Comparison.model_validate(GOOD)
    for sub_category, reason in (("bridges", None), ("桥梁", "another language than asked for")):
        request = comparison_request("", sub_category, 1, "yes-no", attribute_number=1, other_attributes=1)
        assert request.check
        problem = request.check(found)
        assert (problem and problem.partition(": ")[0]) == reason


def test_a_wh_question_is_not_answered_by_yes() -> None:
    found = Comparison.model_validate(GOOD)
    assert str(comparison_problem(found, "wh")).startswith("final answer is yes or no")


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("Here are two fine bridges.", "no JSON object in the answer"),
        ('{"entity_1": "A", "entity_2"', "the JSON of the answer is broken"),
        ("", "empty answer"),
        ({key: value for key, value in GOOD.items() if key != "thought"}, "the JSON has not the fields asked for"),
        ({**GOOD, "attributes": "length"}, "the JSON has not the fields asked for"),
    ],
)
def test_what_is_not_of_the_form_is_dropped(reply: object, reason: str) -> None:
    rows, dropped = made(Fake(lambda material: reply), max_requests=2)
    assert not rows
    assert [each.reason for each in dropped] == [reason] * 2
    assert dropped[0].row["id"] == "request-1" and dropped[0].row["parents"]


def test_the_same_comparison_is_kept_once() -> None:
    rows, dropped = made(Fake(answering), count=3)
    assert len(rows) == 1
    assert Counter(each.reason for each in dropped) == {"compared before": 8}  # three times count asked, less one


def test_a_hopeless_teacher_is_not_asked_for_long() -> None:
    teacher = Fake(lambda material: "no")
    made(teacher, count=1000, round_size=20)
    assert HOPELESS_REQUESTS <= len(teacher.asked) < HOPELESS_REQUESTS + 20


# -- answering anew ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sub", "final", "reason"),
    [
        (OPEN, FINAL, "paragraph does not answer its sub-question"),
        (
            {**SUB_ANSWERS[GOOD["sub_question_2"]], "short_answer": "800 m"},
            FINAL,
            "answer does not contain the short answer",
        ),
        (
            {**SUB_ANSWER, "short_answer": "800 m", "answer": "It is 800 m long."},
            FINAL,
            "short answer is not in the paragraph",
        ),
        ({**OPEN, "answer": "It is long."}, FINAL, "answer does not say that the question is open"),
        ({**OPEN, "short_answer": "900 m"}, FINAL, "short answer to a question left open"),
        ({**OPEN, "evidence": ""}, FINAL, "evidence missing"),
        ({**OPEN, "answer": "文中没有说明。"}, FINAL, "another language than asked for"),
        (None, {**FINAL_OPEN, "answer": "无法比较。"}, "another language than asked for"),
        (None, FINAL_OPEN, "final answer does not follow from its facts"),
        (None, {**FINAL, "short_answer": ""}, "short answer missing"),
        (None, "Yes!", "no JSON object in the answer"),
    ],
)
def test_answers_that_are_of_no_use(sub: Any, final: Any, reason: str) -> None:
    def reply(material: dict[str, Any]) -> object:
        if "facts" in material:
            return final
        if material.get("question") == GOOD["sub_question_2"] and sub is not None:
            return sub
        return answering(material)

    rows, dropped = made(Fake(reply), max_requests=1)
    assert not rows
    assert [each.reason for each in dropped] == [reason]
    assert dropped[0].detail.startswith(("sub-question 2: ", "final answer: ", "It cannot be told."))


def test_facts_are_the_answers_without_their_evidence() -> None:
    teacher = Fake(answering)
    made(teacher)
    assert _material(teacher.asked[-1])["facts"] == ["The bridge is 1,200.5 m long.", "The link is 900 m long."]


def test_records_are_answered_anew(tmp_path: Path) -> None:
    sub = {"paragraph": GOOD["paragraph_1"], "question": GOOD["sub_question_1"], "long_answer": "old", "answer": "old"}
    other = {**sub, "paragraph": GOOD["paragraph_2"], "question": GOOD["sub_question_2"]}
    several = {
        "id": "a",
        "question": GOOD["question"],
        "final_answer": "old",
        "sub_questions": [sub, other],
        "tag": "t",
    }
    single = {"id": "b", "question": sub["question"], "final_answer": "old", "sub_questions": [sub], "multihop": False}
    path = tmp_path / "records.json"
    path.write_text(json.dumps([several, single]), encoding="utf-8")
    given, _ = read_comparables(RowsConfig(path=str(path)))
    teacher = Fake(answering)
    (first, second), dropped = made(teacher, given, count=None)
    assert not dropped
    assert (first.id, first.parents, first.tag) == ("m-00001", ["a"], "t")
    assert first.final_answer.endswith("Answer: Yes, it is longer.")
    assert (
        second.final_answer
        == second.sub_questions[0].long_answer
        == "It says so.\nAnswer: The bridge is 1,200.5 m long."
    )
    assert len(teacher.asked) == 3 + 1  # three sub-questions, and one final answer: a single question needs none


@pytest.mark.skipif(not QA_EXPERT.exists(), reason="the real records are not here")
def test_the_real_records_are_answered_anew() -> None:
    given, _ = read_comparables(RowsConfig(path=str(QA_EXPERT)))
    shorts = {
        sub.question: sub.answer for row in given if isinstance(row, MultihopExample) for sub in row.sub_questions
    }

    def reply(material: dict[str, Any]) -> object:
        short = shorts.get(material["question"], "20 October 1952")
        explained = {"summary": "It says so."} if "facts" in material else {"evidence": "It says so."}
        return {**explained, "answerable": True, "short_answer": short, "answer": f"It is {short}."}

    rows, dropped = made(Fake(reply), given, count=None)
    assert not dropped
    for row, old in zip(rows, given, strict=True):
        assert isinstance(old, MultihopExample)
        assert [sub.paragraph for sub in row.sub_questions] == [sub.paragraph for sub in old.sub_questions]
        assert (row.question, row.tag, row.multihop) == (old.question, old.tag, old.multihop)
    assert rows[2].answer == "after the 2008–09 Gaza War"


# -- negatives ---------------------------------------------------------------------------------------------------------


def test_a_negative_leaves_the_question_open() -> None:
    replaced: Counter[tuple[int, str]] = Counter()
    for seed in range(30):
        teacher = Fake(answering)
        (row,), dropped = made(teacher, negative_share=1.0, max_requests=1, seed=seed)
        assert not dropped
        negatives = [(each["sub_question"], each["other"]) for each in row.meta_info["negatives"]]
        replaced.update(negatives)
        assert len(negatives) == sum("other" in _material(request) for request in teacher.asked)
        for step, sub in enumerate(row.sub_questions, 1):
            is_open = step in [paragraph for paragraph, _ in negatives]
            assert (sub.unanswerable is True) == is_open == ("Ferry" in sub.paragraph) == (sub.answer is None)
        assert row.answer is None and row.final_answer.endswith("It cannot be told.")
    assert len(replaced) == 6  # either paragraph, in each of the three ways


@pytest.mark.parametrize(
    ("negative", "reasons"),
    [
        ({"paragraph": "It costs 2 crowns."}, {"negative paragraph does not name what it is about"}),
        (
            {"paragraph": "The Ferry of Alm passes the Öre Link and the Long-Span Bridge, 900 m and 1,200.5 m long."},
            {"negative paragraph names the thing of its question", "negative paragraph has the answer"},
        ),
        (
            {"attribute": "length"},
            {"negative paragraph is about the same attribute"},
        ),
    ],
)
def test_what_a_negative_is_refused_for(negative: dict[str, str], reasons: set[str]) -> None:
    def reply(material: dict[str, Any]) -> object:
        written = answering(material)
        return {**written, **negative} if "other" in material and isinstance(written, dict) else written

    found = set()
    for seed in range(12):
        _, dropped = made(Fake(reply), negative_share=1.0, max_requests=1, seed=seed)
        found |= {each.reason for each in dropped}
    assert found and found <= reasons


def test_a_teacher_that_answers_an_open_question_is_not_believed() -> None:
    def reply(material: dict[str, Any]) -> object:
        return FINAL if "facts" in material else answering(material)

    reasons = Counter(
        each.reason
        for seed in range(12)
        for each in made(Fake(reply), negative_share=1.0, max_requests=1, seed=seed)[1]
    )
    assert reasons["final answer although a fact is missing"] > 0


# -- settings ----------------------------------------------------------------------------------------------------------


def test_what_is_drawn_is_spread_and_seeded() -> None:
    def drawn(seed: int) -> list[tuple[str, int, str]]:
        teacher = Fake(lambda material: "no")
        made(teacher, count=400, max_requests=400, seed=seed, yes_no_share=0.5, round_size=400)
        found = [_material(request) for request in teacher.asked]
        return [(each["sub_category"], each["popularity"], each["question_type"]) for each in found]

    once = drawn(1)
    assert once == drawn(1) != drawn(2)
    assert {popularity for _, popularity, _ in once} == {1, 2, 3, 4, 5}
    assert 150 < sum(kind == "wh" for _, _, kind in once) < 250  # 200 expected, five standard deviations either way
    assert {sub_category for sub_category, _, _ in once} == {"arch bridge", "lake"}


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"yes_no_share": 1.5}, "multihop.yes_no_share"),
        ({"negative_share": -0.1}, "multihop.negative_share"),
        ({"round_size": 0}, "multihop.round_size"),
        ({"max_requests": 0}, "multihop.max_requests"),
    ],
)
def test_numbers_that_make_no_sense(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError, match=key):
        MultihopConfig(**changes).check()


def test_it_needs_a_count_or_records() -> None:
    with pytest.raises(UserError, match="needs categories and a count"):
        made(Fake(answering), count=None)


# -- the scripted teacher ----------------------------------------------------------------------------------------------


def test_without_mistakes_every_scripted_row_is_right() -> None:
    rows, dropped = made(ScriptedTeacher(mistake_rate=0), WORLD, count=60, negative_share=0.3, yes_no_share=0.5)
    assert len(rows) == 60
    assert {each.reason for each in dropped} <= {"compared before"}
    open_rows = 0
    for row in rows:
        question = read_two_fact_question(row.question)
        assert question is not None
        facts = [fact for sub in row.sub_questions for fact in read_statement(sub.paragraph) or ()]
        conclusion = conclude(question, facts)
        is_open = any(sub.unanswerable for sub in row.sub_questions)
        open_rows += is_open
        assert row.answer == (None if is_open else conclusion and conclusion.short)
        assert row.final_answer.endswith(UNANSWERABLE) == is_open
    assert 6 <= open_rows <= 32  # 18 expected


def test_scripted_mistakes_are_caught_or_made() -> None:
    _, dropped = made(ScriptedTeacher(mistake_rate=0.5), WORLD, count=40, negative_share=0.3, yes_no_share=0.5)
    assert {"paragraph does not answer its sub-question"} <= {each.reason for each in dropped}


def test_outside_its_world_the_scripted_teacher_says_so() -> None:
    rows, dropped = made(ScriptedTeacher(), max_requests=3)
    assert not rows
    assert {each.reason for each in dropped} == {"the scripted teacher knows only the closed world"}


def test_two_fact_questions_are_read_back() -> None:
    for relation in RELATIONS:
        first, second = lexicon()[relation.subject][:2]
        for form in FORMS:
            question = TwoFactQuestion(form, relation, first, second)
            assert read_two_fact_question(question.text) == question
    assert read_two_fact_question("Which has the higher weight, Atlantis or Ys?") is None


def test_numbers_in_words() -> None:
    assert [number(word) for word in ("zero", "nine", "nineteen", "twenty", "ninety-nine", "41")] == [
        0,
        9,
        19,
        20,
        99,
        41,
    ]
    assert [number(word) for word in ("red", "twenty-zero", "-", "twenty-ten", "")] == [None] * 5


# -- the stage ---------------------------------------------------------------------------------------------------------


def test_the_stage_in_process_and_over_loopback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = ["recipe=multihop", "count=12", "run=r"]
    expand.run(configured([*settings, "name=inside"]))
    with serving(ScriptedTeacher()) as server:
        remote = ["teacher.mode=openai", f"teacher.base_url={server.base_url}", "teacher.api_key_env=''"]
        artifact = expand.run(configured([*settings, *remote, "name=outside"]))
        asked, rows = server.requests, Path("runs/r/outside/expanded.jsonl").read_bytes()
        expand.run(configured([*settings, *remote, "name=outside", "force=true"]))
        assert server.requests == asked  # everything came from the response store
        assert Path("runs/r/outside/expanded.jsonl").read_bytes() == rows
    assert artifact.metrics["accepted"] == 12
    for name in ("inside", "outside"):
        questions, unusable = read_questions(RowsConfig(path=f"runs/r/{name}/expanded.jsonl"))  # as later stages do
        assert [question.id for question in questions] == [f"{name}-{number:05d}" for number in range(1, 13)]
        assert not unusable


def configured(overrides: list[str]) -> ExpandConfig:
    config = load_config("expand", overrides)
    assert isinstance(config, ExpandConfig)
    return config


def test_records_are_written_with_their_nulls(tmp_path: Path) -> None:
    """A record that had no short answer has `answer: null` in the output, too, as QA-Expert's readers expect."""
    record = {
        "question": "Where is it?",
        "multihop": False,
        "answer": None,
        "final_answer": "Summary: unknown.",
        "sub_questions": [
            {"question": "Where is it?", "answer": None, "paragraph": "Nothing is said.", "long_answer": "x"}
        ],
    }
    example = qa_expert.read_record(RawRow("file:1", "row-1", record))
    assert isinstance(example, MultihopExample)
    written = qa_expert.record(example)
    assert written["answer"] is None and written["sub_questions"][0]["answer"] is None
    config = load_config("expand", ["recipe=multihop", "count=1", f"output_dir={tmp_path}"])
    artifact = Artifact.open("expand", config)
    with artifact:
        account = Yields({}, 1, {}, Usage(), PricesConfig())
        expand.write(artifact, config, Asker(ScriptedTeacher()), [example], account)
    (line,) = (tmp_path / "expanded.jsonl").read_text().splitlines()
    assert json.loads(line)["answer"] is None
