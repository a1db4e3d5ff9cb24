"""The judge stage and scorer: grades, what has no grade, and that it is never made up."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from alignkit import judge
from alignkit.core.app import load_config
from alignkit.core.config import RowsConfig, TeacherConfig, TeacherMode
from alignkit.core.errors import UserError
from alignkit.core.manifest import read_manifest
from alignkit.core.records import Completion, CompletionSet, Message, QAExample
from alignkit.data.chat import qa_prompt
from alignkit.data.closed_world import World, answer
from alignkit.judge import JudgeConfig
from alignkit.scoring.judge import JudgeScorer, share_won
from alignkit.teacher.client import Answer, OnAnswer, Request, Usage
from alignkit.teacher.reading import read_reply
from alignkit.teacher.recipes.judge import Criterion, Rubric, compare_request, judge_request, read_rubric
from alignkit.teacher.scripted import OUTSIDE, ScriptedTeacher
from alignkit.teacher.server import TeacherServer

OUTSIDE_REASON = "the scripted teacher knows only the closed world"


def completion_set(number: int, *, world: bool = True) -> CompletionSet:
    """A prompt with a right answer, a wrong one, and the right one again."""
    drawn = World(number)
    passage = drawn.passage()
    question = drawn.ask(passage)
    right, wrong = answer(passage.facts, question), drawn.corrupt(passage, question)
    statement = passage.statement if world else "Some other statement."
    prompt = qa_prompt(QAExample(id="x", instruction=statement, input=question.text))
    completions = [Completion(text=text, model="m", sampling={"temperature": 0.7}) for text in (right, wrong, right)]
    return CompletionSet(id=f"row-{number}", parents=["p"], prompt=prompt, completions=completions, reference=right)


def configure(rows: Sequence[CompletionSet], folder: Path, **changes: Any) -> JudgeConfig:
    path = folder / "completions.jsonl"
    path.write_text("".join(row.model_dump_json(exclude_none=True) + "\n" for row in rows), encoding="utf-8")
    teacher = TeacherConfig(model="scripted")
    return JudgeConfig(
        data=RowsConfig(path=str(path)), teacher=teacher, name="judge", output_dir=str(folder / "out"), **changes
    )


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class Says:
    """A teacher that says whatever it is told to, in turn or by the request, and remembers what it was asked."""

    def __init__(self, *texts: str, by: Callable[[Request], str] | None = None) -> None:
        self.texts, self.by = texts, by
        self.usage = Usage()
        self.asked: list[Request] = []
        self.calls = 0

    def ask(self, requests: Sequence[Request], on_answer: OnAnswer | None = None) -> list[Answer]:
        self.asked += requests
        self.calls += 1
        texts = [self.by(each) if self.by else self.texts[n % len(self.texts)] for n, each in enumerate(requests)]
        answers = [read_reply(request, text) for request, text in zip(requests, texts, strict=True)]
        self.usage.count(answers)
        return answers


# -- the stage ---------------------------------------------------------------------------------------------------------


def test_every_completion_gets_its_score_and_nothing_else_changes(tmp_path: Path) -> None:
    rows = [completion_set(number) for number in range(130)]
    artifact = judge.run(configure(rows, tmp_path))
    scored = [CompletionSet.model_validate(row) for row in read_rows(tmp_path / "out" / "scored.jsonl")]
    for row, before in zip(scored, rows, strict=True):
        scores = [completion.score for completion in row.completions]
        assert scores[0] == scores[2] == 10 and scores[1] is not None and scores[1] <= 4
        bare = [completion.model_copy(update={"score": None}) for completion in row.completions]
        assert row.model_copy(update={"completions": bare}) == before
    assert artifact.metrics["completions"] == 390 and artifact.metrics["without_grade"] == 0
    assert artifact.metrics["scores"]["10"] == 260
    assert artifact.metrics["usage"]["requests"] == 260  # equal completions of a prompt are graded once
    assert artifact.metrics["mean_score"] == pytest.approx(
        sum(c.score for row in scored for c in row.completions if c.score is not None) / 390
    )


def test_completions_without_a_grade_are_dropped_with_the_reason(tmp_path: Path) -> None:
    rows = [*(completion_set(number) for number in range(9)), completion_set(9, world=False)]
    artifact = judge.run(configure(rows, tmp_path))
    assert [row["id"] for row in read_rows(tmp_path / "out" / "scored.jsonl")] == [
        f"row-{number}" for number in range(9)
    ]
    dropped = read_rows(tmp_path / "out" / "dropped.jsonl")
    assert len(dropped) == 3 and artifact.dropped == {OUTSIDE_REASON: 3}
    assert all(row["reason"] == OUTSIDE_REASON and row["row"]["id"] == "row-9" for row in dropped)
    assert artifact.checks[0].passed and artifact.checks[0].detail.startswith("3 of 30 completions without a grade")


def test_too_many_failures_fail_the_stage_after_everything_is_written(tmp_path: Path) -> None:
    rows = [completion_set(0), completion_set(1, world=False)]
    with pytest.raises(UserError, match=f"3 of 6 completions without a grade, most of them: {OUTSIDE_REASON}"):
        judge.run(configure(rows, tmp_path))
    assert len(read_rows(tmp_path / "out" / "scored.jsonl")) == 1
    assert len(read_rows(tmp_path / "out" / "dropped.jsonl")) == 3
    manifest = read_manifest(tmp_path / "out")
    assert manifest and manifest["status"] == "failed" and manifest["dropped"] == {OUTSIDE_REASON: 3}
    judge.run(configure(rows, tmp_path, max_failure_rate=0.5))  # half is just allowed then


def test_a_rate_that_makes_no_sense(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="max_failure_rate"):
        judge.run(configure([completion_set(0)], tmp_path, max_failure_rate=2.0))


def test_the_shipped_configuration_composes() -> None:
    config = load_config("judge", ["run=x"])
    assert isinstance(config, JudgeConfig)
    assert config.teacher.mode is TeacherMode.scripted and config.data.path == "runs/x/sample/completions.jsonl"


# -- the scorer --------------------------------------------------------------------------------------------------------


def dialogue(reply: str) -> list[Message]:
    return [Message(role="user", content="Notes.\n\nWhat?"), Message(role="assistant", content=reply)]


def test_scores_and_reasons_are_in_the_order_of_the_conversations() -> None:
    teacher = Says('{"score": 7}', "no idea")
    scorer = JudgeScorer(teacher)
    assert scorer.score([dialogue("a"), dialogue("b"), dialogue("a")]) == [7.0, None, 7.0]
    assert scorer.reasons == [None, "no JSON object in the answer: no idea", None]
    assert (teacher.calls, len(teacher.asked)) == (1, 2)  # equal conversations are asked once, all in one call
    assert scorer.score([]) == [] and scorer.reasons == []
    assert teacher.calls == 1


def test_the_judge_is_asked_at_temperature_zero_and_sees_everything() -> None:
    teacher = Says('{"score": 1}')
    JudgeScorer(teacher).score([dialogue("the reply")])
    (request,) = teacher.asked
    assert request.temperature == 0.0
    shown = json.loads(request.messages[-1].content.split("\n")[0])
    assert shown == {"conversation": [{"role": "user", "content": "Notes.\n\nWhat?"}], "reply": "the reply"}


NO_FIELDS = "the JSON has not the fields asked for"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"score": 10, "reason": "r"}', 10.0),
        ('Well: ```{"score": 3.5}```', 3.5),
        ('{"score": 0}', 0.0),
        ('{"score": 11}', NO_FIELDS),
        ('{"score": -1}', NO_FIELDS),
        ('{"score": NaN}', None),  # no JSON, though Python's reader takes it: whatever the reason
        ('{"score": Infinity}', None),
        ('{"score": "8"}', NO_FIELDS),
        ('{"score": true}', NO_FIELDS),
        ('{"score": null}', NO_FIELDS),
        ('{"grade": 8}', NO_FIELDS),
        ("8", "no JSON object in the answer"),
        ('{"score": 8', "the JSON of the answer is broken"),
        ("", "empty answer"),
    ],
)
def test_a_grade_is_read_or_missing_but_never_made_up(text: str, expected: object) -> None:
    scorer = JudgeScorer(Says(text))
    (score,) = scorer.score([dialogue("a")])
    if isinstance(expected, float):
        assert score == expected and scorer.reasons == [None]
    else:
        assert score is None and scorer.reasons[0]
        assert expected in (None, scorer.reasons[0].partition(": ")[0])


def test_several_judges_weigh_the_same_and_the_spread_is_kept() -> None:
    # The second judge fails on its second sample, so its mean is 2; (mean(8, 6) + 2) / 2 = 4.5, and 8 - 2 = 6.
    judges = Says('{"score": 8, "reason": "good"}', '{"score": 6}'), Says('{"score": 2}', "hm")
    scorer = JudgeScorer(*judges, samples=2, temperature=0.7)
    assert scorer.score([dialogue("a")]) == [4.5]
    (grades,) = scorer.grades
    assert [(each.judge, each.score, each.reason) for each in grades.given] == [(0, 8, "good"), (0, 6, ""), (1, 2, "")]
    assert grades.spread == 6 and grades.missing == ["no JSON object in the answer: hm"]
    assert [(each.sample, each.temperature) for each in judges[1].asked] == [(0, 0.7), (1, 0.7)]
    scorer.score([dialogue("a"), dialogue("b")])
    assert [each.calls for each in judges] == [2, 2]


def test_one_grade_has_no_spread() -> None:
    scorer = JudgeScorer(Says('{"score": 8}'))
    scorer.score([dialogue("a")])
    assert scorer.grades[0].spread is None


# -- the rubric --------------------------------------------------------------------------------------------------------


def test_weights_on_any_scale_share_out_ten_points() -> None:
    rubric = Rubric(
        criteria=[
            Criterion(name="truth", weight=3, text="it is true."),
            Criterion(name="tone", weight=1, text="kind."),
        ],
        limits="At most 1 if it is rude.",
    )
    (prompt,) = [message.content for message in judge_request(dialogue("a"), rubric).messages if message.role == "user"]
    assert "- 7.5 for truth: it is true.\n- 2.5 for tone: kind.\nAt most 1 if it is rude.\n" in prompt
    assert "conclusion" not in prompt
    assert [each["points"] for each in read_rubric().points()] == ["6", "3", "1"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("criteria: []", "criteria: List should have at least 1 item"),
        ("criteria: [{name: a, weight: 0, text: b}]", r"criteria\.0\.weight: Input should be greater than 0"),
        ("criteria: [{name: a, points: 1, text: b}]", r"criteria\.0\.weight: Field required"),
        ("criteria: [{name: a, weight: .nan, text: b}]", r"criteria\.0\.weight"),
        ("a: [", "cannot be read"),
        ("just words", "the file: Input should be"),
        ("", "the file: Input should be"),
    ],
)
def test_a_rubric_that_is_none_is_one_clear_message(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "rubric.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=f"rubric=.*rubric.yaml: {message}"):
        read_rubric(str(path))


def test_a_rubric_file_is_an_input_that_decides_what_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "rubric.yaml"
    path.write_text("criteria: [{name: brevity, weight: 1, text: the shorter the better.}]", encoding="utf-8")
    with caplog.at_level("WARNING", "alignkit"):
        artifact = judge.run(configure([completion_set(0)], tmp_path, rubric=str(path)))
    assert [entry["key"] for entry in artifact.inputs] == ["data.path", "rubric"]
    assert "the scripted teacher grades by rules of its own" in caplog.text
    teacher = Says('{"score": 5}')
    monkeypatch.setattr("alignkit.teacher.client.open_teacher", lambda config: teacher)
    judge.run(configure([completion_set(0)], tmp_path, rubric=str(path), force=True))
    assert all("- 10 for brevity: the shorter the better." in each.messages[-1].content for each in teacher.asked)


# -- pairs -------------------------------------------------------------------------------------------------------------


def shown(request: Request) -> dict[str, Any]:
    material: dict[str, Any] = json.loads(request.messages[-1].content.split("\n")[0])
    return material


def longer(request: Request) -> str:
    first, second = len(shown(request)["first"]), len(shown(request)["second"])
    better = "tie" if first == second else "first" if first > second else "second"
    return json.dumps({"better": better})


def test_pairwise_scores_are_the_share_of_wins() -> None:
    teacher = Says(by=longer)
    scorer = JudgeScorer(teacher, pairwise=True)
    # "ccc" beats all; "bb" and "dd" tie and beat "a": 3/3, 1.5/3, 1.5/3, 0/3 of the wins.
    scores = scorer.score([dialogue(reply) for reply in ("a", "bb", "ccc", "dd", "bb")])
    assert scores == [0.0, 5.0, 10.0, 5.0, 5.0]
    assert teacher.calls == 1 and len(teacher.asked) == 12  # four different replies: 4 * 3 ordered pairs
    orders = {(shown(each)["first"], shown(each)["second"]) for each in teacher.asked}
    assert all((second, first) in orders for first, second in orders) and len(orders) == 12
    assert (scorer.compared, scorer.swayed) == (6, 0)


@pytest.mark.parametrize("place", ["first", "second"])
def test_a_judge_that_favours_a_place_decides_nothing(place: str) -> None:
    scorer = JudgeScorer(Says(json.dumps({"better": place})), pairwise=True)
    assert scorer.score([dialogue("a"), dialogue("b"), dialogue("c")]) == [5.0, 5.0, 5.0]
    assert (scorer.compared, scorer.swayed) == (3, 3)


@pytest.mark.parametrize(
    ("forward", "backward", "expected"),
    [
        ("first", "second", 1.0),
        ("second", "first", 0.0),
        ("first", "first", 0.5),
        ("second", "second", 0.5),
        ("tie", "tie", 0.5),
        ("first", "tie", 0.5),
        ("tie", "second", 0.5),
    ],
)
def test_only_verdicts_that_agree_decide(forward: str, backward: str, expected: float) -> None:
    assert share_won(forward, backward) == expected


def test_replies_to_different_prompts_are_not_compared() -> None:
    other = [Message(role="user", content="Other notes.\n\nWhat?"), Message(role="assistant", content="long reply")]
    teacher = Says(by=longer)
    scorer = JudgeScorer(teacher, pairwise=True)
    assert scorer.score([dialogue("a"), other]) == [None, None]
    assert scorer.reasons == ["no other reply to compare with: "] * 2 and teacher.asked == []
    assert scorer.score([dialogue("a"), other, dialogue("bb")]) == [0.0, None, 10.0]


def test_replies_to_prompts_that_differ_in_a_call_are_not_compared() -> None:
    def after(query: str, reply: str) -> list[Message]:
        call = {"type": "function", "function": {"name": "find", "arguments": {"query": query}}}
        first, *_, last = dialogue(reply)
        return [first, Message.model_validate({"role": "assistant", "content": "", "tool_calls": [call]}), last]

    scorer = JudgeScorer(Says(by=longer), pairwise=True)
    assert scorer.score([after("Anna", "a"), after("Bo", "bb")]) == [None, None]
    assert scorer.score([after("Anna", "a"), after("Anna", "bb")]) == [0.0, 10.0]


def test_a_comparison_that_one_order_leaves_open_is_missing() -> None:
    def refuses(request: Request) -> str:
        return "I would rather not." if shown(request)["first"] == "c" else longer(request)

    scorer = JudgeScorer(Says(by=refuses), pairwise=True)
    assert scorer.score([dialogue("a"), dialogue("bb"), dialogue("c")]) == [0.0, 10.0, None]
    assert scorer.reasons == [None, None, "no JSON object in the answer: I would rather not."]
    assert len(scorer.grades[0].missing) == 1 and scorer.compared == 1


def test_the_scripted_teacher_compares_by_its_rubric() -> None:
    row = completion_set(5)
    right, wrong, _ = (completion.text for completion in row.completions)
    teacher = ScriptedTeacher()
    orders = [(right, wrong, "first"), (wrong, right, "second"), (right, right, "tie")]
    answers = teacher.ask([compare_request(row.prompt, first, second) for first, second, _ in orders])
    assert [answer.value.better for answer in answers] == [better for *_, better in orders]
    (outside,) = teacher.ask([compare_request(dialogue("")[:1], "a", "b")])
    assert outside.text == OUTSIDE and not outside.usable


def test_the_stage_compares(tmp_path: Path) -> None:
    rows = [*(completion_set(number) for number in range(4)), completion_set(9, world=False)]
    artifact = judge.run(configure(rows, tmp_path, mode=judge.JudgeMode.pairwise))
    scored = [CompletionSet.model_validate(row) for row in read_rows(tmp_path / "out" / "scored.jsonl")]
    assert [[completion.score for completion in row.completions] for row in scored] == [[10, 0, 10]] * 4
    assert artifact.metrics["comparisons"] == 4 and artifact.metrics["decided_by_order"] == 0
    assert artifact.dropped == {OUTSIDE_REASON: 3}
    assert artifact.metrics["usage"]["requests"] == 10


def test_equal_completions_are_set_aside_and_count_as_no_failure(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [completion_set(number) for number in range(4)]
    rows[1:] = [row.model_copy(update={"completions": row.completions[:1] * 3}) for row in rows[1:]]
    with caplog.at_level("INFO"):
        artifact = judge.run(configure(rows, tmp_path, mode=judge.JudgeMode.pairwise, max_failure_rate=0.0))
    assert [row["id"] for row in read_rows(tmp_path / "out" / "scored.jsonl")] == ["row-0"]
    assert artifact.dropped == {"no other reply to compare with": 9}
    assert artifact.metrics["completions"] == 3 and artifact.metrics["without_grade"] == 9
    assert "9 others, the only ones to their prompt" in caplog.text
    assert "tokens" in caplog.text and "cost    n/a" in caplog.text
    with pytest.raises(UserError, match="no completion has a grade"):
        judge.run(configure(rows[1:], tmp_path, mode=judge.JudgeMode.pairwise))


def test_a_served_teacher_grades_and_nothing_is_asked_twice(tmp_path: Path) -> None:
    rows = [completion_set(number) for number in range(5)]
    with TeacherServer(ScriptedTeacher()) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        config = configure(rows, tmp_path)
        config.teacher = TeacherConfig(
            mode=TeacherMode.openai,
            base_url=server.base_url,
            model="scripted",
            api_key_env="",
            store=str(tmp_path / "store.sqlite"),
        )
        artifact = judge.run(config)
        assert [artifact.metrics["usage"][key] for key in ("requests", "from_store")] == [10, 0]
        asked = server.requests
        artifact = judge.run(replace(config, force=True))
        assert server.requests == asked and artifact.metrics["usage"]["from_store"] == 10
        artifact = judge.run(replace(config, mode=judge.JudgeMode.pairwise))
        assert artifact.metrics["comparisons"] == 5 and artifact.metrics["usage"]["failed"] == 0
        server.shutdown()
        thread.join()
    scored = [CompletionSet.model_validate(row) for row in read_rows(tmp_path / "out" / "scored.jsonl")]
    assert [[completion.score for completion in row.completions] for row in scored] == [[10, 0, 10]] * 5


# -- several judges in the stage ---------------------------------------------------------------------------------------


def served(rows: Sequence[CompletionSet], folder: Path, **changes: Any) -> JudgeConfig:
    """A configuration with a teacher that is served, under the name of judge-a."""
    config = configure(rows, folder, **changes)
    config.teacher = TeacherConfig(mode=TeacherMode.openai, model="judge-a")
    return config


def test_every_grade_is_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judges = {"judge-a": Says('{"score": 8, "reason": "good"}'), "judge-b": Says('{"score": 5}', "no")}
    monkeypatch.setattr("alignkit.teacher.client.open_teacher", lambda config: judges[config.model])
    artifact = judge.run(served([completion_set(0)], tmp_path, more_judges=["judge-b"]))
    first, second, third = read_rows(tmp_path / "out" / "grades.jsonl")
    a, b = {"judge": "judge-a", "score": 8, "reason": "good"}, {"judge": "judge-b", "score": 5, "reason": ""}
    assert first == {"id": "row-0", "completion": 0, "score": 6.5, "spread": 3, "grades": [a, b], "missing": []}
    missing = ["no JSON object in the answer: no"]
    assert second == {
        "id": "row-0",
        "completion": 1,
        "score": 8,
        "spread": None,
        "grades": [a],
        "missing": missing,
    }
    assert third == {**first, "completion": 2}
    metrics = artifact.metrics
    assert (metrics["grades"], metrics["missing_grades"], metrics["mean_spread"]) == (5, 1, 3)
    assert metrics["teacher"] == "judge-a, judge-b" and metrics["usage"]["requests"] == 4
    assert metrics["self_preference"] == {}


def test_a_judge_that_wrote_what_it_grades_is_pointed_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    row = completion_set(0)
    row.completions[1].model = "owner/Judge-A"  # hubs and servers spell the same name differently
    expanded = tmp_path / "expand"
    expanded.mkdir()
    manifest = {"stage": "expand", "status": "complete", "fingerprint": "", "inputs": [], "outputs": []}
    (expanded / "manifest.json").write_text(json.dumps(manifest | {"metrics": {"teacher": "judge-b"}}))
    monkeypatch.setattr("alignkit.teacher.client.open_teacher", lambda config: Says('{"score": 5}'))
    config = served([row], expanded, more_judges=["judge-b", "judge-c"])
    config.output_dir = str(tmp_path / "out")
    with caplog.at_level("WARNING", "alignkit"):
        artifact = judge.run(config)
    assert artifact.metrics["self_preference"] == {
        "judge-a": {"completions": 1, "data": False},
        "judge-b": {"completions": 0, "data": True},
    }
    assert "judge-a also wrote 1 of the 3 completions," in caplog.text
    assert "judge-b also wrote the data behind them," in caplog.text
    assert "judge-c" not in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 3}, "samples=3 with temperature=0"),
        ({"samples": 0}, "samples must be at least 1"),
        ({"more_judges": ["scripted"]}, "name each judge once"),
        ({"more_judges": ["another"]}, "the scripted teacher is a single judge"),
    ],
)
def test_settings_without_sense_stop_before_anything_is_asked(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        judge.run(configure([completion_set(0)], tmp_path, **changes))
    assert not (tmp_path / "out").exists()


# -- the demo ----------------------------------------------------------------------------------------------------------


def test_the_scripted_judge_is_the_scorer_of_the_demo() -> None:
    row = completion_set(5)
    conversations = [[*row.prompt, Message(role="assistant", content=c.text)] for c in row.completions]
    right, wrong, again = JudgeScorer(ScriptedTeacher()).score(conversations)
    assert right == again == 10.0 and wrong is not None and wrong < 5
    assert judge_request(conversations[0]).messages[0].role == "system"
