"""Rejection sampling: the estimator by hand, what is chosen and what is paired, and resumption."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from test_sample import SAMPLING, TINY, questions

from alignkit import rejection_sampling
from alignkit.core.app import load_config
from alignkit.core.config import LoraConfig, RowsConfig, TeacherConfig
from alignkit.core.errors import UserError
from alignkit.core.records import ChatExample, Completion, CompletionSet, Message, PreferencePair
from alignkit.generation import hf
from alignkit.models.loading import load_base, load_tokenizer, new_adapter, save_adapter
from alignkit.models.reward_model import RewardModel
from alignkit.models.value_head import ValueHeadModel
from alignkit.rejection_sampling import RejectionSamplingConfig, ScorerKind
from alignkit.scoring.best_of_n import best, correlation, expected_best, powers_of_two, worst
from alignkit.scoring.judge import JudgeScorer

# -- arithmetic ------------------------------------------------------------------------------------------------------


def test_expected_best_by_hand() -> None:
    scores = [3.0, 1.0, 2.0, 4.0]
    # Best of 2 among {1, 2, 3, 4}: the pairs' maxima are 2 3 4 3 4 4, mean 20/6.
    assert expected_best(scores, 1) == 2.5
    assert expected_best(scores, 2) == pytest.approx(20 / 6)
    assert expected_best(scores, 3) == pytest.approx((3 + 4 + 4 + 4) / 4)
    assert expected_best(scores, 4) == 4.0
    assert expected_best(scores, 9) == 4.0  # no more than there are


def test_expected_best_equals_the_mean_over_all_subsets() -> None:
    scores = [0.3, -1.0, 2.5, 0.1, 0.7, 1.9]
    grades = [5.0, 1.0, 2.0, 9.0, 7.0, 4.0]
    for k in range(1, 7):
        subsets = list(combinations(range(6), k))
        assert expected_best(scores, k) == pytest.approx(mean(max(scores[i] for i in subset) for subset in subsets))
        chosen = [max(subset, key=lambda i: scores[i]) for subset in subsets]
        assert expected_best(scores, k, grades) == pytest.approx(mean(grades[i] for i in chosen))


def test_equal_scores_count_with_their_mean_value() -> None:
    # Both completions score 1; one of them is chosen at random, whatever their order.
    assert expected_best([1.0, 1.0], 2, [10.0, 0.0]) == expected_best([1.0, 1.0], 2, [0.0, 10.0]) == 5.0
    # With a third one below, two of three pairs hold exactly one of the equals and one pair holds both.
    assert expected_best([1.0, 1.0, 0.0], 2, [10.0, 0.0, 3.0]) == pytest.approx((10 + 0 + 5) / 3)


def test_small_helpers() -> None:
    assert powers_of_two(8) == [1, 2, 4, 8]
    assert powers_of_two(6) == [1, 2, 4, 6]
    assert powers_of_two(1) == [1]
    assert correlation([1, 2, 3], [2, 4, 6]) == pytest.approx(1.0)
    assert correlation([1, 1, 1], [2, 4, 6]) is None
    assert correlation([1], [2]) is None


def completion(text: str, score: float | None, *, finished: bool = True) -> Completion:
    return Completion(text=text, model="m", score=score, finished=finished)


def test_best_and_worst_are_finished_and_the_first_of_equals() -> None:
    drawn = [
        completion("cut", 9.0, finished=False),
        completion("none", None),
        completion("a", 2.0),
        completion("b", 3.0),
        completion("c", 3.0),
        completion("d", 2.0),
        completion("cut low", -9.0, finished=False),
    ]
    chosen, rejected = best(drawn), worst(drawn)
    assert chosen is not None
    assert rejected is not None
    assert (chosen.text, rejected.text) == ("b", "a")
    assert best(drawn[:2]) is None
    assert worst([]) is None


# -- choosing and pairing --------------------------------------------------------------------------------------------


class Drops:
    """Remembers what was dropped."""

    def __init__(self) -> None:
        self.reasons: list[tuple[str, str]] = []

    def drop(self, row: CompletionSet | PreferencePair, reason: str, detail: str = "") -> None:
        self.reasons.append((row.id, reason))


def row(id: str, *completions: Completion) -> CompletionSet:
    return CompletionSet(
        id=id, parents=["p"], prompt=[Message(role="user", content=f"question {id}")], completions=list(completions)
    )


ROWS = [
    row("clear", completion("good", 2.0), completion("bad", -1.0), completion("middle", 0.0)),
    row("close", completion("good", 1.0), completion("as good", 0.95)),
    row("same", completion("good", 1.0), completion("good", 1.0)),
    row("cut", completion("good", None, finished=False)),
]


def test_best_examples_keep_ids_and_say_what_was_left_out() -> None:
    drops: Any = Drops()
    examples = rejection_sampling.choose(RejectionSamplingConfig(name="x"), ROWS, drops)
    assert [(example.id, example.completion[0].content) for example in examples] == [
        ("clear", "good"),
        ("close", "good"),
        ("same", "good"),
    ]
    assert examples[0].parents == ["p"]
    assert drops.reasons == [("cut", "no finished completion with a score")]
    drops = Drops()
    chosen = rejection_sampling.choose(RejectionSamplingConfig(name="x", min_score=1.5), ROWS, drops)
    assert [example.id for example in chosen] == ["clear"]
    assert ("close", "best completion scores below min_score") in drops.reasons
    with pytest.raises(UserError, match="no question has a best completion"):
        rejection_sampling.choose(RejectionSamplingConfig(name="x"), ROWS[3:], drops)


def test_pairs_need_a_margin_and_two_texts() -> None:
    drops: Any = Drops()
    config = RejectionSamplingConfig(name="x", min_margin=0.1)
    pairs = rejection_sampling.pair(config, ROWS, {each.id: each.completions for each in ROWS}, drops)
    assert [(each.id, each.chosen[0].content, each.rejected[0].content, each.margin) for each in pairs] == [
        ("clear", "good", "bad", 3.0)
    ]
    assert [id for id, _ in drops.reasons] == ["close", "same"]  # and "cut" was set aside with the best ones
    lenient = replace(config, min_margin=0.0)
    pairs = rejection_sampling.pair(lenient, ROWS[:3], {each.id: each.completions for each in ROWS}, drops)
    assert [each.id for each in pairs] == ["clear", "close"]
    drops = Drops()
    most = replace(lenient, max_pairs=1)
    pairs = rejection_sampling.pair(most, ROWS[1::-1], {each.id: each.completions for each in ROWS}, drops)
    assert [each.id for each in pairs] == ["clear"]
    assert drops.reasons == [("close", "no pair: max_pairs others have a larger margin")]


def test_the_previous_version_supplies_the_rejected_answer() -> None:
    previous = {"clear": [completion("old", 1.0), completion("older", 0.5)], "close": [completion("better", 3.0)]}
    drops: Any = Drops()
    pairs = rejection_sampling.pair(RejectionSamplingConfig(name="x"), ROWS[:2], previous, drops)
    assert [(each.id, each.rejected[0].content, each.margin) for each in pairs] == [("clear", "older", 1.5)]
    assert drops.reasons[0][0] == "close"  # the previous version was better: no pair


# -- the stage -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model over the embedded base, untrained: the stage only needs its order."""
    folder = tmp_path_factory.mktemp("reward")
    torch.manual_seed(3)
    policy = new_adapter(load_base(TINY), LoraConfig(rank=2, dropout=0.0), ["all-linear"])
    model = RewardModel(ValueHeadModel(policy), load_tokenizer(TINY), TINY)
    model.centre([0.0, 1.0])
    model.save_pretrained(folder)
    return folder


def configure(folder: Path, count: int = 12, **changes: Any) -> RejectionSamplingConfig:
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in questions(count)), encoding="utf-8")
    values: dict[str, Any] = {
        "model": TINY,
        "sampling": replace(SAMPLING, n=4, batch_size=8),
        "teacher": TeacherConfig(model="scripted"),
        "name": "rejection_sampling",
        "output_dir": str(folder / "out"),
        "min_margin": 0.0,
    }
    return RejectionSamplingConfig(data=RowsConfig(path=str(path)), **(values | changes))


def read(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out" / name).read_text(encoding="utf-8").splitlines()]


def test_the_stage_chooses_by_the_reward_model(tmp_path: Path, reward_folder: Path) -> None:
    artifact = rejection_sampling.run(configure(tmp_path, reward=str(reward_folder), grade=True))
    rows = [CompletionSet.model_validate(each) for each in read(tmp_path, "scored.jsonl")]
    examples = {each["id"]: ChatExample.model_validate(each) for each in read(tmp_path, "best.jsonl")}
    pairs = [PreferencePair.model_validate(each) for each in read(tmp_path, "pairs.jsonl")]
    assert len(rows) == 12
    model = RewardModel.from_pretrained(reward_folder)
    for row in rows:
        finished = [each for each in row.completions if each.finished]
        rescored = model.score(
            [{"messages": [*row.prompt, {"role": "assistant", "content": each.text}]} for each in finished]
        )
        assert [each.score for each in finished] == pytest.approx(rescored, abs=1e-4)
        assert all(each.score is None for each in row.completions if not each.finished)
        if finished:
            assert examples[row.id].completion[0].content == finished[rescored.index(max(rescored))].text
    assert pairs
    for pair in pairs:
        assert pair.margin is not None
        assert pair.margin > 0
        assert pair.chosen == examples[pair.id].completion
    curves = artifact.metrics["best_of_n"]
    means = [curves["score"][k]["mean"] for k in ("1", "2", "4")]
    assert means == sorted(means)
    assert means[0] < means[-1]
    assert means[-1] == pytest.approx(artifact.metrics["mean_best_score"])
    assert 0 <= curves["grade"]["1"]["mean"] <= 10
    assert len(read(tmp_path, "best.jsonl")) + artifact.dropped["no finished completion with a score"] == 12


def test_a_question_with_an_ungraded_answer_is_left_out_of_the_grade_curve(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    grades = {"good": 9.0, "bad": 1.0, "middle": 4.0, "as good": None}

    def score(self: JudgeScorer, conversations: Sequence[list[Message]]) -> list[float | None]:
        found = [grades[conversation[-1].content] for conversation in conversations]
        self.reasons = ["no number in it" if grade is None else None for grade in found]
        return found

    monkeypatch.setattr(JudgeScorer, "score", score)
    config = RejectionSamplingConfig(
        name="x", grade=True, sampling=replace(SAMPLING, n=2), teacher=TeacherConfig(model="scripted")
    )
    with caplog.at_level("WARNING", "alignkit"):
        metrics = rejection_sampling.describe_scores(ROWS[:2], config)
    curves = metrics["best_of_n"]
    assert metrics["ungraded_questions"] == 1
    assert (curves["score"]["1"]["n"], curves["grade"]["1"]["n"]) == (2, 1)
    assert curves["grade"]["1"]["mean"] == pytest.approx((9 + 1 + 4) / 3)
    assert "1 of 5 completions have no grade, the first because: no number in it; 1 of 2 questions" in caplog.text
    metrics = rejection_sampling.describe_scores(ROWS[1:2], config)
    assert set(metrics["best_of_n"]) == {"score"}  # no question is left


def test_the_teacher_is_the_upper_bound_and_needs_no_reward_model(tmp_path: Path) -> None:
    config = configure(tmp_path, scorer=ScorerKind.judge, reward="nowhere/at/all")
    artifact = rejection_sampling.run(config)
    for each in read(tmp_path, "scored.jsonl"):
        assert all(0 <= completion["score"] <= 10 for completion in each["completions"] if completion["finished"])
    assert [entry["key"] for entry in artifact.inputs] == ["data.path"]


def test_a_killed_run_ends_with_the_same_files(
    tmp_path: Path, reward_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    previous = tmp_path / "previous"
    torch.manual_seed(9)
    policy = new_adapter(load_base(TINY), LoraConfig(rank=2, dropout=0.0), ["all-linear"])
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    save_adapter(policy, previous, TINY)
    settings: dict[str, Any] = {"count": 40, "reward": str(reward_folder), "previous_adapter": str(previous)}
    (tmp_path / "whole").mkdir()
    rejection_sampling.run(configure(tmp_path / "whole", **settings))

    decode, calls = hf.decode, 0

    def dies(*arguments: Any, **keywords: Any) -> list[list[int]]:
        nonlocal calls
        calls += 1
        if calls == 30:  # the previous version is done (20 batches), the latest is not
            raise KeyboardInterrupt
        return decode(*arguments, **keywords)

    monkeypatch.setattr(hf, "decode", dies)
    (tmp_path / "cut").mkdir()
    with pytest.raises(KeyboardInterrupt):
        rejection_sampling.run(configure(tmp_path / "cut", **settings))
    calls = 100
    rejection_sampling.run(configure(tmp_path / "cut", **settings))
    assert calls == 112  # two of the latest version's five chunks were in the journal
    for name in ("scored.jsonl", "previous.jsonl", "best.jsonl", "pairs.jsonl"):
        assert read(tmp_path / "cut", name) == read(tmp_path / "whole", name)
    old = {
        each["id"]: {completion["text"] for completion in each["completions"]}
        for each in read(tmp_path / "cut", "previous.jsonl")
    }
    assert all(each["rejected"][0]["content"] in old[each["id"]] for each in read(tmp_path / "cut", "pairs.jsonl"))


def test_a_reward_model_must_be_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="scorer=judge"):
        rejection_sampling.run(configure(tmp_path))
    with pytest.raises(UserError, match=r"reward=.*nowhere: no such file or folder"):
        rejection_sampling.run(configure(tmp_path, reward=str(tmp_path / "nowhere")))


def test_completions_that_cannot_be_scored_keep_no_score() -> None:
    class Mute:
        reasons: Sequence[str | None] = ()

        def score(self, conversations: Sequence[list[Message]]) -> list[float | None]:
            self.reasons = ["no answer"] * len(conversations)
            return [None] * len(conversations)

    scored = rejection_sampling.score(Mute(), ROWS)  # type: ignore[arg-type]
    assert all(each.score is None for row in scored for each in row.completions)


def test_the_shipped_configuration_composes() -> None:
    config = load_config("rejection_sampling", ["run=x", "scorer=judge"])
    assert isinstance(config, RejectionSamplingConfig)
    assert (config.reward, config.sampling.n, config.adapter) == ("none", 8, "runs/x/sft/adapter")
    assert load_config("rejection_sampling", ["run=x"]).reward == "runs/x/reward"
