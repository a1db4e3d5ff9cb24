"""Quality by every scorer: who is asked, what passes, and that a row is scored once."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from selecting import (
    arguments,
    audit_of,
    ids,
    make_rows,
    read,
    reasons,
    refused,
    select,
    with_qualities,
)
from smoke import ENVIRONMENT
from tiny_encoders import encoder_settings, save_encoder, word_tokenizer

from alignkit.core.app import run_command
from alignkit.core.config import TeacherConfig
from alignkit.core.errors import UserError
from alignkit.core.journal import Journal
from alignkit.core.records import Message, QAExample
from alignkit.scoring.classifier import ClassifierScorer
from alignkit.scoring.quality import QualityConfig, QualityScorer, RowScorer, broken_by

TEACHER = TeacherConfig(model="scripted")


def row(id: str, output: str, **others: Any) -> QAExample:
    return QAExample.model_validate({"id": id, "instruction": "s", "input": "q", "output": output, **others})


# -- what passes ------------------------------------------------------------------------------------------------------


def test_thresholds_by_scorer() -> None:
    found = {
        scorer.name: QualityConfig(scorer, reward="r", classifier="c").resolve_threshold([5.0])
        for scorer in QualityScorer
    }
    assert found == {"rules": 7, "judge": 7, "reward": 0, "classifier": 0}
    assert QualityConfig(threshold=-2.5).resolve_threshold([5.0]) == -2.5


@pytest.mark.parametrize(
    ("scores", "quantile", "border", "passing"),
    [
        ([1.0, 2.0, 3.0, 4.0, 5.0], 0.4, 3.0, 3),  # place 0.4 * 4 = 1.6, the next higher is 2
        ([5.0, 1.0, 4.0, 2.0, 3.0], 0.5, 3.0, 3),
        ([1.0, 2.0, 3.0, 4.0], 0.0, 1.0, 4),
        ([1.0, 2.0, 3.0, 4.0], 0.99, 4.0, 1),
        ([2.0, 2.0, 2.0, 9.0], 0.5, 2.0, 4),  # rows at the border stay, however many
        ([7.0], 0.5, 7.0, 1),
    ],
)
def test_quantiles_by_hand(scores: list[float], quantile: float, border: float, passing: int) -> None:
    config = QualityConfig(quantile=quantile)
    assert config.resolve_threshold(scores) == border
    assert sum(config.passes(score, border) for score in scores) == passing
    assert not config.passes(float(np.nextafter(border, -np.inf)), border)


def test_a_score_at_the_threshold_does_not_pass() -> None:
    config = QualityConfig(threshold=5)
    assert [config.passes(score, 5.0) for score in (4.9, 5.0, 5.1)] == [False, False, True]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"threshold": 1.0, "quantile": 0.5}, "threshold and quality.quantile: give one"),
        ({"reuse": True}, r"quality.reuse=true: nothing tells on what scale .* add quality.threshold"),
        ({"quantile": 1.0}, r"quantile=1.0: must lie between 0 and 1"),
        ({"quantile": -0.1}, r"quantile=-0.1"),
        ({"scorer": QualityScorer.reward}, r"quality.reward: name the model, since quality.scorer=reward"),
        ({"scorer": QualityScorer.classifier, "reward": "x"}, r"quality.classifier: name the model"),
    ],
)
def test_settings_that_mean_nothing_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        QualityConfig(**values)


def test_a_model_that_is_not_asked_need_not_exist() -> None:
    config = QualityConfig(QualityScorer.reward, reward="runs/mine/reward", classifier="gone")
    assert (config.reward, config.classifier) == ("runs/mine/reward", "none")


# -- who is asked -----------------------------------------------------------------------------------------------------


class Asked:
    """A scorer that scores by the answer's length and remembers how it was made and what it was asked."""

    made: list[tuple[Any, ...]]
    seen: list[list[str]]

    def __init__(self, *given: Any) -> None:
        self.made.append(given)
        self.reasons: list[str | None] = []

    def score(self, conversations: Sequence[list[Message]]) -> list[float | None]:
        texts = [turns[-1].content for turns in conversations]
        self.seen.append(texts)
        self.reasons = ["too long to read" if text == "long" else None for text in texts]
        return [None if text == "long" else float("nan") if text == "nan" else float(len(text)) for text in texts]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> type[Asked]:
    """Every scorer that needs a model or a teacher, replaced."""

    class Fresh(Asked):
        made: list[tuple[Any, ...]] = []  # noqa: RUF012
        seen: list[list[str]] = []  # noqa: RUF012

    for place in ("judge.JudgeScorer", "reward.RewardScorer", "classifier.ClassifierScorer"):
        monkeypatch.setattr(f"alignkit.scoring.{place}", Fresh)
    return Fresh


@pytest.mark.parametrize(
    ("scorer", "made"),
    [("reward", ("runs/r",)), ("classifier", ("folder", "v1", 3, "good")), ("judge", None)],
)
def test_the_scorer_of_the_configuration_is_opened_when_it_is_needed(
    tmp_path: Path, asked: type[Asked], scorer: str, made: tuple[Any, ...] | None
) -> None:
    config = QualityConfig(
        QualityScorer[scorer], reward="runs/r", classifier="folder", revision="v1", batch_size=3, label="good"
    )
    rows = [row("a", "four"), row("b", "  "), row("c", "long"), row("d", "nan")]
    with Journal(tmp_path / "j.jsonl", "x") as journal:
        scorers = RowScorer(config, TeacherConfig(model="scripted", store=str(tmp_path / "store.sqlite")))
        assert asked.made == []
        assert scorers.score([], journal) == scorers.score(rows[1:2], journal)[1:] == []
        assert asked.made == []  # an empty answer needs no model
        found = scorers.score(rows, journal)
    assert found == [(4.0, None), (None, "empty answer"), (None, "too long to read"), (None, "score is not a number")]
    assert asked.seen == [["four", "long", "nan"]]
    assert len(asked.made) == 1
    assert made is None or asked.made == [made]
    assert broken_by(rows[1], config) == []


def test_the_conversation_is_the_one_that_is_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[Message]] = []

    class Kept(Asked):
        made: list[tuple[Any, ...]] = []  # noqa: RUF012
        seen: list[list[str]] = []  # noqa: RUF012

        def score(self, conversations: Sequence[list[Message]]) -> list[float | None]:
            seen.extend(conversations)
            return super().score(conversations)

    monkeypatch.setattr("alignkit.scoring.reward.RewardScorer", Kept)
    with Journal(tmp_path / "j.jsonl", "x") as journal:
        RowScorer(QualityConfig(QualityScorer.reward, reward="r"), TEACHER).score([row("a", "An answer.")], journal)
    assert [(turn.role, turn.content) for turn in seen[0]] == [("user", "s\n\nq"), ("assistant", "An answer.")]


def test_reuse_asks_only_about_rows_without_a_score(tmp_path: Path, asked: type[Asked]) -> None:
    rows = [
        row("a", "aaaa", scores={"quality": 2.5}),
        row("b", "bb"),
        row("c", "c", scores={"quality": float("nan")}),
        row("d", "ddd", scores={"other": 9.0}),
        row("e", "e", scores={"quality": float("-inf")}),
    ]
    expected = [(2.5, None), (2.0, None), (None, "score is not a number"), (3.0, None), (None, "score is not a number")]
    for reuse, seen in ((True, ["bb", "ddd"]), (False, ["aaaa", "bb", "c", "ddd", "e"])):
        asked.seen.clear()
        config = QualityConfig(QualityScorer.reward, reward="r", reuse=reuse, threshold=0)
        with Journal(tmp_path / f"{reuse}.jsonl", "x") as journal:
            found = RowScorer(config, TEACHER).score(rows, journal)
        assert asked.seen == [seen]
        assert found == (expected if reuse else [(float(len(each.output)), None) for each in rows])


# -- the stage --------------------------------------------------------------------------------------------------------


def test_rules_take_their_limits_from_the_configuration(tmp_path: Path) -> None:
    rows = [{"id": f"r-{n}", "instruction": f"statement {n}", "output": "word " * n + "end"} for n in (1, 3, 9)]
    more = ["quality.min_words=3", "quality.max_words=5", "hygiene.near_duplicates=null"]
    artifact = select(tmp_path, rows, *more)
    assert ids(read(artifact.folder, "selected.jsonl")) == ["r-3"]
    assert reasons(artifact) == {"r-1": "answer too short", "r-9": "answer too long"}
    details = {each["row"]["id"]: each["detail"] for each in read(artifact.folder, "dropped.jsonl")}
    assert details == {
        "r-1": "5, threshold 7, answer too short",
        "r-9": "3.33333, threshold 7, answer too long, answer repeats itself",
    }


def test_a_quantile_in_the_stage_and_the_histogram_by_hand(tmp_path: Path) -> None:
    qualities = [1.0, 2.0, 2.0, 3.0, 4.0, 5.0]
    artifact = select(tmp_path, with_qualities(make_rows(6), qualities), "quality.reuse=true", "quality.quantile=0.5")
    assert ids(read(artifact.folder, "selected.jsonl")) == ["row-3", "row-4", "row-5"]  # place 2.5, the next is 3
    assert artifact.metrics["quality"] == {"mean": pytest.approx(17 / 6), "median": 2.5, "threshold": 3.0}
    found = audit_of(artifact)["quality"]
    assert found["edges"] == pytest.approx([1 + 0.2 * number for number in range(21)])
    bins = {0: 1, 5: 2, 10: 1, 15: 1, 19: 1}
    assert found["counts"] == [bins.get(number, 0) for number in range(20)]
    assert found["selected"] == [bins.get(number, 0) if number >= 10 else 0 for number in range(20)]
    assert (found["threshold"], found["scorer"]) == (3.0, "earlier")


@pytest.mark.parametrize("form", ["NaN", "1e999", "parquet"])
def test_a_reused_score_that_is_no_number_is_refused_where_it_stands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    rows = with_qualities(make_rows(3), [9.0, float("nan"), 9.0])
    if form == "parquet":  # which has numbers that JSON has not
        from datasets import Dataset

        path = tmp_path / "rows.parquet"
        Dataset.from_list(rows).to_parquet(str(path))
    else:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row).replace("NaN", form) + "\n" for row in rows), encoding="utf-8")
    assert (
        run_command(
            "select",
            [f"data.path={path}", f"output_dir={tmp_path / 'select'}", "quality.reuse=true", "quality.threshold=7"],
        )
        == 2
    )
    said = capsys.readouterr().err
    assert re.search(r"error: .*rows\.\w+:2: .*JSON", said)
    assert "Traceback" not in said


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(**encoder_settings(num_labels=1))
    return save_encoder(tmp_path_factory.mktemp("classifier"), BertForSequenceClassification, config, word_tokenizer())


LETTERS = "a b c d e f g h".split()


def short_rows(count: int) -> list[dict[str, Any]]:
    """Different rows of words that the tiny classifier knows."""
    rows = []
    for number in range(count):
        digits = [LETTERS[number // 8**place % 8] for place in range(4)]
        rows.append({"id": f"row-{number}", "instruction": "is she old", "input": "?", "output": " ".join(digits)})
    return rows


OPEN = ("hygiene.exact_duplicates=false", "hygiene.near_duplicates=null")


def test_a_classifier_scores_the_stages_rows(tmp_path: Path, classifier: Path) -> None:
    rows = short_rows(8)
    rows[5]["output"] = "a " * 60
    scorer = ClassifierScorer(str(classifier))
    turns = [
        [Message(role="user", content="is she old\n\n?"), Message(role="assistant", content=each["output"])]
        for each in rows
    ]
    expected = dict(zip(ids(rows), scorer.score(turns), strict=True))
    options = ["quality.scorer=classifier", f"quality.classifier={classifier}", *OPEN, "strategy=quality", "k=3"]
    artifact = select(tmp_path, rows, *options, "quality.threshold=-99", "quality.batch_size=2")
    scored = {each["id"]: each["scores"]["quality"] for each in read(artifact.folder, "selected.jsonl")}
    best = sorted((score for score in expected.values() if score is not None), reverse=True)[:3]
    assert sorted(scored.values(), reverse=True) == pytest.approx(best, abs=1e-5)
    assert scored == pytest.approx({id: expected[id] for id in scored}, abs=1e-5)
    assert reasons(artifact)["row-5"] == "no quality score"
    assert any(entry["key"] == "quality.classifier" for entry in artifact.inputs)


def test_a_classifier_that_gives_no_numbers(
    tmp_path: Path, classifier: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = torch.nn.Linear.forward
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, given: forward(self, given) * float("nan"))
    options = ["quality.scorer=classifier", f"quality.classifier={classifier}", *OPEN]
    said = refused(tmp_path, short_rows(3), options, capsys)
    assert "none of 3 rows has a quality" in said
    for each in read(tmp_path / "select", "dropped.jsonl"):
        assert (each["reason"], each["detail"]) == ("no quality score", "score is not a number")


HANGS_AT_THE_SECOND_BLOCK = """
import sys, time
from alignkit.core.app import run_command
from alignkit.scoring.classifier import ClassifierScorer

score, blocks = ClassifierScorer.score, []

def hanging(self, conversations):
    blocks.append(len(conversations))
    if len(blocks) == 2:
        print("second block", flush=True)
        time.sleep(60)
    return score(self, conversations)

ClassifierScorer.score = hanging
sys.exit(run_command("select", sys.argv[1:]))
"""


def test_after_kill_9_each_row_is_scored_once(
    tmp_path: Path, classifier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = short_rows(300)
    options = ["quality.scorer=classifier", f"quality.classifier={classifier}", *OPEN, "strategy=quality", "k=20"]
    options += ["quality.threshold=-99", "quality.batch_size=64"]
    whole = select(tmp_path / "whole", rows, *options)
    command = [sys.executable, "-c", HANGS_AT_THE_SECOND_BLOCK, *arguments(tmp_path, rows, *options)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        assert process.stdout is not None
        assert any(line == "second block\n" for line in process.stdout)
        process.kill()
    journal = (tmp_path / "select" / "unfinished" / "quality.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in journal[1:]] == [f"row-{number}" for number in range(256)]

    score, asked = ClassifierScorer.score, list[int]()

    def counted(self: ClassifierScorer, conversations: Sequence[list[Message]]) -> list[float | None]:
        asked.append(len(conversations))
        return score(self, conversations)

    monkeypatch.setattr(ClassifierScorer, "score", counted)
    resumed = select(tmp_path, rows, *options)
    assert asked == [44]
    assert read(resumed.folder, "selected.jsonl") == read(whole.folder, "selected.jsonl")
    assert read(resumed.folder, "dropped.jsonl") == read(whole.folder, "dropped.jsonl")
    assert not (tmp_path / "select" / "unfinished").exists()
