"""The judge stage and scorer: grades, what has no grade, and that it is never made up."""

from __future__ import annotations

import json
from collections.abc import Sequence
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
from alignkit.scoring.judge import JudgeScorer
from alignkit.teacher.client import Answer, OnAnswer, Request
from alignkit.teacher.recipes.judge import judge_request, read_score
from alignkit.teacher.scripted import ScriptedTeacher

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
    """A teacher that gives one answer to everything and remembers what it was asked."""

    def __init__(self, *answers: Answer) -> None:
        self.answers = answers
        self.asked: list[Request] = []

    def ask(self, requests: Sequence[Request], on_answer: OnAnswer | None = None) -> list[Answer]:
        self.asked += requests
        return [self.answers[position % len(self.answers)] for position in range(len(requests))]


# -- the stage ---------------------------------------------------------------------------------------------------------


def test_every_completion_gets_its_score_and_nothing_else_changes(tmp_path: Path) -> None:
    rows = [completion_set(number) for number in range(130)]  # more than one chunk
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
    scorer = JudgeScorer(Says(Answer('{"score": 7}', prompt_tokens=4, completion_tokens=1), Answer("no idea")))
    assert scorer.score([dialogue("a"), dialogue("b"), dialogue("a")]) == [7.0, None, 7.0]
    assert scorer.reasons == [None, "no JSON object in the answer: no idea", None]
    assert (scorer.usage.requests, scorer.usage.prompt_tokens, scorer.usage.unreported) == (2, 4, 1)
    assert scorer.score([]) == [] and scorer.reasons == []


def test_the_judge_is_asked_at_temperature_zero_and_sees_everything() -> None:
    teacher = Says(Answer('{"score": 1}'))
    JudgeScorer(teacher).score([dialogue("the reply")])
    (request,) = teacher.asked
    assert request.temperature == 0.0
    shown = json.loads(request.messages[-1].content.split("\n")[0])
    assert shown == {"conversation": [{"role": "user", "content": "Notes.\n\nWhat?"}], "reply": "the reply"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"score": 10, "reason": "r"}', 10.0),
        ('Well: ```{"score": 3.5}```', 3.5),
        ('{"score": 0}', 0.0),
        ('{"score": 11}', "the score is not from 0 to 10"),
        ('{"score": -1}', "the score is not from 0 to 10"),
        ('{"score": NaN}', "the score is not from 0 to 10"),
        ('{"score": Infinity}', "the score is not from 0 to 10"),
        ('{"score": "8"}', "the answer has no number as score"),
        ('{"score": true}', "the answer has no number as score"),
        ('{"score": null}', "the answer has no number as score"),
        ('{"grade": 8}', "the answer has no number as score"),
        ("8", "no JSON object in the answer"),
        ('{"score": 8', "the JSON of the answer is broken"),
        ("", "no JSON object in the answer"),
    ],
)
def test_reading_a_score(text: str, expected: object) -> None:
    found = read_score(Answer(text))
    assert (found.partition(": ")[0] if isinstance(found, str) else found) == expected


def test_a_failed_request_has_no_score() -> None:
    assert read_score(Answer(None, "500: broken")) == "no answer: 500: broken"


def test_the_scripted_judge_is_the_scorer_of_the_demo() -> None:
    row = completion_set(5)
    conversations = [[*row.prompt, Message(role="assistant", content=c.text)] for c in row.completions]
    right, wrong, again = JudgeScorer(ScriptedTeacher()).score(conversations)
    assert right == again == 10.0 and wrong is not None and wrong < 5
    assert judge_request(conversations[0]).messages[0].role == "system"
