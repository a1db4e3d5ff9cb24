"""The judge between two systems: both orders, ties, missing verdicts, cost, self-preference; and people's labels."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from served import serving

from alignkit.core.artifact import Artifact
from alignkit.core.config import StageConfig, TeacherConfig, TeacherMode
from alignkit.core.errors import UserError
from alignkit.core.records import QAExample
from alignkit.data.closed_world import World, answer
from alignkit.evaluation.agreement import agreement, cohen_kappa, read_labels, weighted_kappa
from alignkit.evaluation.comparison import document_of
from alignkit.evaluation.predictions import ModelAnswer, Prediction, compare
from alignkit.evaluation.preferences import add_preferences, warn_of_self_preference
from alignkit.teacher.scripted import ScriptedTeacher
from alignkit.teacher.server import TeacherServer

PAIRS = [("new", "old")]


def world_rows(count: int, pick: Callable[[int, str, str], tuple[str, str]]) -> list[Prediction]:
    """Questions of the closed world; `pick` says what new and old answer, given a right and a wrong answer."""
    rows = []
    for number in range(count):
        drawn = World(number)
        passage = drawn.passage()
        question = drawn.ask(passage)
        right, wrong = answer(passage.facts, question), drawn.corrupt(passage, question)
        texts = dict(zip(("new", "old"), pick(number, right, wrong), strict=True))
        answers = {name: ModelAnswer(text=text, finished=True, scores={}) for name, text in texts.items()}
        fields: dict[str, Any] = {"id": f"q{number}", "instruction": passage.statement, "input": question.text}
        rows.append(Prediction(**fields, reference=right, answers=answers))
    return rows


def open_artifact(folder: Path) -> Artifact:
    return Artifact.open("evaluate", StageConfig(name="evaluate", output_dir=str(folder / "evaluate")))


def served(server: TeacherServer, folder: Path) -> TeacherConfig:
    return TeacherConfig(
        mode=TeacherMode.openai,
        model="scripted",
        base_url=server.base_url,
        api_key_env="",
        store=str(folder / "store.sqlite"),
    )


def verdicts_of(artifact: Artifact) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (artifact.folder / "preferences.jsonl").read_text().splitlines()]


def test_the_scripted_teacher_prefers_the_right_answer_in_either_place(tmp_path: Path) -> None:
    """Even rows: new is right; every third of the others: both say the same; else old is right."""

    def pick(number: int, right: str, wrong: str) -> tuple[str, str]:
        return (right, wrong) if number % 2 == 0 else (right, right) if number % 3 == 0 else (wrong, right)

    with open_artifact(tmp_path) as artifact:
        rows = add_preferences(world_rows(12, pick), PAIRS, TeacherConfig(model="scripted"), artifact)
    assert [row.preferences["new>old"] for row in rows] == [1, 0, 1, 0.5, 1, 0, 1, 0, 1, 0.5, 1, 0]
    said = artifact.metrics["pairwise"]
    assert (said["pairs"], said["equal_answers"], said["missing"]) == (12, 2, 0)
    assert (said["disagreed_with_itself"]["mean"], said["disagreed_with_itself"]["n"]) == (0, 10)
    assert said["usage"]["requests"] == 20  # both orders of ten pairs; nobody is asked about equal answers
    assert artifact.metrics["usage"] == said["usage"]
    assert verdicts_of(artifact)[0] == {
        "id": "q0",
        "new": "new",
        "old": "old",
        "preference": 1.0,
        "new_first": "first",
        "old_first": "second",
        "missing": None,
    }
    found = compare(rows, "new", "old")["preference"]
    assert (found["win_rate"]["wins"], found["win_rate"]["ties"], found["win_rate"]["losses"]) == (6, 2, 4)
    assert found["win_rate"]["mean"] == pytest.approx(7 / 12)


def test_a_served_judge_that_is_killed_pays_for_no_verdict_twice(tmp_path: Path) -> None:
    rows = world_rows(6, lambda _, right, wrong: (right, wrong))
    with serving(ScriptedTeacher()) as server:
        config = served(server, tmp_path)
        with pytest.raises(KeyboardInterrupt), open_artifact(tmp_path) as artifact:
            add_preferences(rows[:4], PAIRS, config, artifact)
            raise KeyboardInterrupt
        with open_artifact(tmp_path) as artifact:
            add_preferences(rows, PAIRS, config, artifact)
    usage = artifact.metrics["pairwise"]["usage"]
    assert (usage["requests"], usage["from_store"], usage["sent"]) == (12, 8, 4)


class Says:
    """A judge that answers by a function of the request's text."""

    def __init__(self, say: Callable[[str], str]) -> None:
        from alignkit.teacher.client import Usage

        self.say, self.usage = say, Usage()

    def ask(self, requests: Sequence[Any], on_answer: Any = None) -> list[Any]:
        from alignkit.teacher.reading import read_reply

        answers = [read_reply(request, self.say(request.messages[-1].content)) for request in requests]
        self.usage.count(answers)
        return answers


@dataclass
class Judged:
    rows: list[Prediction]
    artifact: Artifact


def judged_by(
    say: Callable[[str], str], rows: list[Prediction], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Judged:
    monkeypatch.setattr("alignkit.evaluation.preferences.open_teacher", lambda _: Says(say))
    with open_artifact(folder) as artifact:
        return Judged(add_preferences(rows, PAIRS, TeacherConfig(model="m"), artifact), artifact)


def test_a_judge_that_likes_a_place_gives_ties_and_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = world_rows(5, lambda _, right, wrong: (right, wrong))
    found = judged_by(lambda _: '{"better": "first"}', rows, tmp_path, monkeypatch)
    assert [row.preferences["new>old"] for row in found.rows] == [0.5] * 5
    said = found.artifact.metrics["pairwise"]
    assert (said["favoured_first"], said["favoured_second"]) == (5, 0)
    assert said["disagreed_with_itself"]["mean"] == 1
    assert compare(found.rows, "new", "old")["preference"]["win_rate"]["ties"] == 5


def test_an_answer_without_a_verdict_is_missing_neither_tie_nor_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of thirty pairs cannot be read in one of its orders."""
    rows = world_rows(30, lambda _, right, wrong: (right, wrong))
    unreadable = rows[7].input

    def say(text: str) -> str:
        return "I like both." if unreadable in text else '{"better": "tie"}'

    found = judged_by(say, rows, tmp_path, monkeypatch)
    without = [row.id for row in found.rows if not row.preferences]
    assert without and len(without) == found.artifact.metrics["pairwise"]["missing"] < 3
    assert compare(found.rows, "new", "old")["preference"]["n"] == 30 - len(without)
    with pytest.raises(UserError, match="'pairs judged' failed: 30 of 30 pairs without a verdict"):
        judged_by(lambda _: "Both.", rows, tmp_path, monkeypatch)


def test_what_the_grades_cost_is_added_up(tmp_path: Path) -> None:
    rows = world_rows(3, lambda _, right, wrong: (right, wrong))
    with open_artifact(tmp_path) as artifact:
        from dataclasses import asdict

        from alignkit.teacher.client import Usage

        artifact.metrics["usage"] = asdict(Usage(requests=10, cost=2.0))
        add_preferences(rows, PAIRS, TeacherConfig(model="scripted"), artifact)
    assert artifact.metrics["usage"]["requests"] == 16
    assert artifact.metrics["usage"]["cost"] is None  # that of the scripted one is not known, so neither is the sum


def test_no_common_answer_is_an_error(tmp_path: Path) -> None:
    rows = [row.model_copy(update={"answers": {}}) for row in world_rows(2, lambda _, right, wrong: (right, wrong))]
    with pytest.raises(UserError, match="no question was answered by both"), open_artifact(tmp_path) as artifact:
        add_preferences(rows, PAIRS, TeacherConfig(model="scripted"), artifact)


# -- the judge's own writing -------------------------------------------------------------------------------------------


def write_step(folder: Path, stage: str, inputs: list[Path], **metrics: str) -> Path:
    folder.mkdir(parents=True)
    entries = [{"key": "data.path", "path": str(path), "sha256": None, "rows": 1} for path in inputs]
    manifest = {"stage": stage, "status": "complete", "fingerprint": "", "inputs": entries, "outputs": []}
    (folder / "manifest.json").write_text(json.dumps(manifest | {"metrics": metrics}))
    (folder / "out").mkdir()
    return folder / "out"


def test_a_judge_that_wrote_the_training_data_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("alignkit"), "propagate", True)
    data = write_step(tmp_path / "expand", "expand", [], teacher="Owner/Model-X")
    first = write_step(tmp_path / "sft", "sft", [data])
    second = write_step(tmp_path / "dpo", "dpo", [first, data])
    other = write_step(tmp_path / "other", "sft", [])
    held_out = write_step(tmp_path / "test", "expand", [], teacher="another")
    adapters = {"base": "", "sft": str(first), "dpo": str(second), "other": str(other)}
    with open_artifact(tmp_path) as artifact:
        judge = TeacherConfig(mode=TeacherMode.openai, model="model-x")
        warn_of_self_preference(judge, adapters, str(held_out), artifact)
        assert artifact.metrics["self_preference"]["systems"] == ["sft", "dpo"]
        assert "model-x also wrote the training data of sft, dpo, and judges favour" in caplog.text
        caplog.clear()
        judge = TeacherConfig(mode=TeacherMode.openai, model="another")
        warn_of_self_preference(judge, adapters, str(held_out), artifact)
        assert "another also wrote the held-out rows" in caplog.text
        caplog.clear()
        warn_of_self_preference(
            TeacherConfig(mode=TeacherMode.openai, model="third"), adapters, str(held_out), artifact
        )
        assert not caplog.text


# -- people ------------------------------------------------------------------------------------------------------------


def test_kappa_of_the_textbook() -> None:
    """Two readers of 50 proposals: 20 times both yes, 15 both no, 5 and 10 apart. p_o = 0.7, and by chance
    25/50 * 30/50 + 25/50 * 20/50 = 0.5, so that kappa is 0.2 / 0.5."""
    one = np.array([1.0] * 25 + [0.0] * 25)
    other = np.array([1.0] * 20 + [0.0] * 5 + [1.0] * 10 + [0.0] * 15)
    assert cohen_kappa(one, other) == pytest.approx(0.4)
    assert cohen_kappa(one, one) == 1
    assert np.isnan(cohen_kappa(np.ones(3), np.ones(3)))


def test_weighted_kappa_by_hand() -> None:
    """Grades 1 2 3 and 1 2 2: squares apart 0 0 1, mean 1/3; over all nine pairs 0 1 1, 1 0 0, 4 1 1, mean 1."""
    assert weighted_kappa(np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.0, 2.0])) == pytest.approx(1 - (1 / 3) / 1)
    assert weighted_kappa(np.array([1.0, 3.0]), np.array([3.0, 1.0])) == pytest.approx(-1)


def test_weighted_kappa_agrees_with_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(0)
    one, other = generator.integers(11, size=(2, 60))
    expected = metrics.cohen_kappa_score(one, other, weights="quadratic")
    assert weighted_kappa(one.astype(float), other.astype(float)) == pytest.approx(expected)
    assert cohen_kappa(one.astype(float), other.astype(float)) == pytest.approx(metrics.cohen_kappa_score(one, other))


def judged_rows() -> list[Prediction]:
    """Twenty questions; the judge gives new the grades 0 to 9 twice, and old always 5; it prefers new above 5."""
    rows = []
    for number in range(20):
        grade = float(number % 10)
        answers = {
            "new": ModelAnswer(text=f"new {number}", finished=True, scores={"judge": grade}),
            "old": ModelAnswer(text=f"old {number}", finished=True, scores={"judge": 5.0} if number else {}),
        }
        better = {"new>old": 1.0 if grade > 5 else 0.0 if grade < 5 else 0.5}
        rows.append(
            Prediction(
                id=f"q{number}", instruction=f"s{number}", input="?", reference="", answers=answers, preferences=better
            )
        )
    return rows


def write_labels(path: Path, labels: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(label) + "\n" for label in labels))
    return str(path)


def test_agreement_with_peoples_grades(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Ten labels equal to the judge's grade but the last, which is two below; one by its text, three of no use."""
    labels: list[dict[str, Any]] = [{"id": f"q{n}", "system": "new", "grade": n} for n in range(1, 9)]
    labels += [
        {"id": "q10", "text": "new 10", "grade": 0.0, "comment": "right"},
        {"id": "q9", "system": "new", "grade": 7},
    ]
    labels += [{"id": "gone", "system": "new", "grade": 1}, {"id": "q3", "text": "never said", "grade": 1}]
    labels.append({"id": "q0", "system": "old", "grade": 1})
    found = agreement(judged_rows(), read_labels(write_labels(tmp_path / "labels.jsonl", labels), ["new", "old"]))
    assert (found["labels"], found["unmatched"], found["without_judgement"]) == (13, 2, 1)
    assert "2 of 13 are of a question or answer that is not here, and left out; the first: " in caplog.text
    assert "labels.jsonl:11" in caplog.text and "1 of 13 are not judged" in caplog.text
    grades = found["grades"]
    assert (grades["same"]["mean"], grades["within_one"]["mean"]) == (0.9, 0.9)
    assert grades["judge_minus_person"]["mean"] == pytest.approx(0.2)
    judge, people = [*range(1, 9), 0, 9], [*range(1, 9), 0, 7]
    squares = np.mean([[(one - other) ** 2 for one in judge] for other in people])
    assert grades["kappa"]["mean"] == pytest.approx(1 - 0.4 / squares)
    assert grades["kappa"]["low"] < grades["kappa"]["mean"] < grades["kappa"]["high"] <= 1
    assert "preferences" not in found


def test_agreement_with_peoples_preferences_in_either_direction(tmp_path: Path) -> None:
    """Of ten labels three are the judge's wins, three its losses told the other way round, two ties, and two wrong."""
    labels: list[dict[str, Any]] = [{"id": f"q{n}", "systems": ["new", "old"], "better": "first"} for n in (6, 7, 8)]
    labels += [{"id": f"q{n}", "systems": ["old", "new"], "better": "first"} for n in (0, 1, 2)]
    labels += [{"id": f"q{n}", "systems": ["old", "new"], "better": "tie"} for n in (5, 15)]
    labels += [{"id": "q9", "systems": ["new", "old"], "better": "second"}]
    labels += [{"id": "q3", "systems": ["new", "old"], "better": "tie"}]
    found = agreement(judged_rows(), read_labels(write_labels(tmp_path / "labels.jsonl", labels), ["new", "old"]))
    preferences = found["preferences"]
    assert preferences["same"]["mean"] == 0.8
    by_chance = (4 * 3 + 4 * 4 + 2 * 3) / 100  # judge: 4 new, 4 old, 2 ties; people: 3 new, 4 old, 3 ties
    assert preferences["kappa"]["mean"] == pytest.approx((0.8 - by_chance) / (1 - by_chance))


@pytest.mark.parametrize(
    ("system", "grades", "reason"),
    [
        ("old", [5, 5, 5, 5], "people say the same of all 4 answers"),
        ("new", [5, 5, 5, 5], "people say the same of all 4 answers"),
        ("old", [4, 5, 6, 5], "the judge says the same of all 4 answers"),
    ],
)
def test_where_all_give_one_grade_there_is_agreement_but_no_kappa(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, system: str, grades: list[int], reason: str
) -> None:
    labels = [{"id": f"q{n}", "system": system, "grade": grade} for n, grade in enumerate(grades, 1)]
    found = agreement(judged_rows(), read_labels(write_labels(tmp_path / "labels.jsonl", labels), ["new", "old"]))
    assert found["grades"]["same"]["n"] == 4 and "kappa" not in found["grades"]
    assert found["grades"]["no_kappa"] == reason
    assert f"no kappa, since {reason}" in caplog.text
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ({"id": "q1", "system": "neu", "grade": 5}, "no system is called 'neu'; there are new, old"),
        ({"id": "q1", "system": "new", "grade": 11}, "grade: Input should be less than or equal to 10"),
        ({"id": "q1", "system": "new", "grade": "good"}, "grade: Input should be a valid number"),
        ({"id": "q1", "grade": 5}, "a grade needs the system"),
        ({"id": "q1", "system": "new"}, "either a grade from 0 to 10 or better"),
        ({"id": "q1", "systems": ["new", "new"], "better": "tie"}, "better needs systems"),
        (
            {"id": "q1", "systems": ["new", "old"], "better": "new"},
            "better: Input should be 'first', 'second' or 'tie'",
        ),
        ({"system": "new", "grade": 5}, "id: missing"),
        ({"id": "q0", "system": "new", "grade": 4}, "labels again what .*labels.jsonl:1 labels"),
    ],
)
def test_a_bad_label_is_named_by_its_line(tmp_path: Path, label: dict[str, Any], message: str) -> None:
    path = write_labels(tmp_path / "labels.jsonl", [{"id": "q0", "system": "new", "grade": 5}, label])
    with pytest.raises(UserError, match=rf"labels\.jsonl:2: .*{message}"):
        read_labels(path, ["new", "old"])


def test_labels_of_nothing_here_are_an_error(tmp_path: Path) -> None:
    path = write_labels(tmp_path / "labels.jsonl", [{"id": "elsewhere", "system": "new", "grade": 5}])
    with pytest.raises(UserError, match=r"none of 1 labels .* 1 are of questions or answers that are not here"):
        agreement(judged_rows(), read_labels(path, ["new", "old"]))


# -- what questions share ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "cluster_by", "expected"),
    [
        ({"document": "a.md", "parents": ["b.md#3"]}, "document", "a.md"),
        ({"parents": ["manuals/b#1.md#3", "c.md#1.2"]}, "document", "manuals/b#1.md"),  # recipe=documents: a page
        ({"parents": ["c.md#1.2"]}, "document", "c.md"),  # recipe=raft: a chunk
        ({"parents": ["seeds-0014"]}, "document", None),
        ({}, "document", None),
        ({"machine_code": "X7", "document": "a.md"}, "machine_code", "X7"),
        ({"source": "squad"}, "source", "squad"),
    ],
)
def test_the_document_of_a_row(fields: dict[str, Any], cluster_by: str, expected: str | None) -> None:
    row = QAExample.model_validate({"id": "q", "instruction": "s", **fields})
    assert document_of(row, cluster_by) == expected


def test_a_field_that_a_row_does_not_have_is_an_error() -> None:
    with pytest.raises(UserError, match=r"cluster_by=machine: the row q has no such field. It has id, instruction"):
        document_of(QAExample(id="q", instruction="s"), "machine")
