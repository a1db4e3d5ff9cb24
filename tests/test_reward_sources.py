"""What a reward model learns from: several judges and files, how much each counts, and grades that teach nothing."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_reward_stage import (
    BAD,
    GOOD,
    TRAIN,
    configure,
    graded,
    group,
    hh_rows,
    new_model,
    open_artifact,
    scored_rows,
    write,
)
from tiny_random import save_random_base, tokenizer

from alignkit import reward
from alignkit.core.config import ModelConfig, RowsConfig
from alignkit.core.errors import UserError
from alignkit.models.reward_model import RewardModel
from alignkit.training.judges import GradeStatistics, JudgeScales, grade_statistics
from alignkit.training.reward import Objective, _Collator, encode_group, train_reward_model
from alignkit.training.reward_data import LeftOut, groups_from_grades, source_weights


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return save_random_base(tmp_path_factory.mktemp("base"))


def test_each_judge_has_its_own_scale() -> None:
    statistics = grade_statistics([("strict", 1.0), ("kind", 9.0), ("strict", 3.0), ("kind", 9.0)])
    assert statistics == {"strict": GradeStatistics(2.0, 1.0, 2), "kind": GradeStatistics(9.0, 1.0, 2)}
    judges = JudgeScales(statistics | {"wide": GradeStatistics(5.0, 4.0, 7)})
    assert (judges.standardised("strict", 3.0), judges.standardised("wide", 3.0)) == (1.0, -0.5)
    scores, of = torch.tensor([[1.0, -2.0], [0.5, 0.0]]), torch.tensor([2, 0])
    assert torch.equal(judges(scores, of), scores)  # untrained: a score is a standardised grade
    judges.adjustments.data = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.5, -0.25]])
    assert judges(scores, of).tolist() == [[1.25, -3.25], [0.5, 0.0]]
    found = judges.describe()
    assert found["wide"] == {"scale": 4 * 1.5, "offset": 5 - 4 * 0.25, "grades": 7}
    # the two ways of saying it agree: a score of 1 is a grade of 6 + 4 = 10, which is (10 - 5) / 4 standardised
    assert judges.standardised("wide", found["wide"]["scale"] * 1.0 + found["wide"]["offset"]) == 1.25


def test_a_regression_learns_from_prompts_that_make_no_pair(base: ModelConfig, tmp_path: Path) -> None:
    rows = [graded(f"row-{n}", *([(GOOD, 9.0)] if n % 2 else [(BAD, 1.0)])) for n in range(8)]
    groups, dropped = groups_from_grades(
        [*rows, graded("none", (GOOD, None))],
        min_margin=1.0,
        pairs_per_prompt=4,
        seed=1,
        left_out=LeftOut(),
        pointwise=True,
    )
    assert (len(groups), [each.reason for each in dropped]) == (8, ["no graded completion"])
    assert encode_group(tokenizer(), groups[0], base.max_length)[0] is None
    found = [encode_group(tokenizer(), each, base.max_length, pointwise=True)[0] for each in groups]
    inputs = _Collator(0, base.max_length)([each for each in found if each is not None])
    assert (inputs["pairs"].shape, inputs["pair_weights"].shape) == ((0, 2), (0, 1))
    model = new_model(base)
    with open_artifact(tmp_path / "run") as artifact:
        train = replace(TRAIN, epochs=12.0)
        encoded_rows = [each for each in found if each is not None]
        losses = train_reward_model(model, encoded_rows, Objective(regress_weight=1.0), train, 1, artifact)
    assert losses[-1]["loss"] < 0.1
    assert "reward_accuracy" not in losses[-1]
    raw = [score for (score,) in model.raw_scores([each.tokens for each in encoded_rows])]
    assert min(raw[1::2]) > max(raw[::2])


def test_sources_by_name_with_their_weights(base: ModelConfig, tmp_path: Path) -> None:
    half = [
        {**row, "completions": [{**each, "score": each["score"] / 2} for each in row["completions"]]}
        for row in scored_rows(20)[:-1]
    ]
    sources = {"other": write(tmp_path / "other.jsonl", half), "human": write(tmp_path / "human.jsonl", hh_rows(5))}
    weights = {"graded": 0.5, "graded judgmental": 0.25, "human": 2.0}
    config = configure(base, tmp_path, sources=sources, weights=weights, regress_weight=0.5, min_margin=0.5)
    artifact = reward.run(config)
    graded = {f"{judge} {kind}" for judge in ("graded", "other") for kind in ("judgmental", "non_judgmental")}
    assert graded | {"hh-rlhf", "human"} < set(artifact.metrics["train_accuracy"])
    # Both judges grade the same answers, one in half the numbers: 9, 5, 1 have mean 5 and deviation sqrt(32 / 3).
    judges = artifact.metrics["judges"]
    assert set(judges) == {"graded", "other"}
    assert judges["graded"]["scale"] / judges["other"]["scale"] == pytest.approx(2, abs=0.2)
    assert judges["graded"]["scale"] == pytest.approx((32 / 3) ** 0.5, rel=0.3)
    assert judges["graded"]["offset"] - judges["other"]["offset"] == pytest.approx(2.5, abs=0.5)
    assert {path["key"] for path in artifact.inputs} > {"sources.other", "sources.human"}
    model = RewardModel.from_pretrained(tmp_path / "reward")
    assert not [name for name, _ in model.module.named_parameters() if "judges" in name]

    with pytest.raises(
        UserError, match=r"weights\.grades: no source of that name; there are graded, .*, hh-rlhf, human"
    ):
        reward.run(replace(config, weights={"grades": 1.0}))
    with pytest.raises(UserError, match=r"weights\.human=0\.0: must be above 0"):
        reward.run(replace(config, weights={"human": 0.0}))


def test_a_source_counts_as_its_weight_says(base: ModelConfig) -> None:
    groups = [group(0), group(1, "b"), group(2, "rewardbench/chat")]
    weights = source_weights(groups, {"a": 0.5, "rewardbench": 3.0})
    assert weights == {"a": 0.5, "b": 1.0, "rewardbench/chat": 3.0}
    rows = [encode_group(tokenizer(), each, base.max_length, (weights[each.source],))[0] for each in groups]
    inputs = _Collator(0, base.max_length)([row for row in rows if row is not None])
    assert inputs["pair_weights"][:, 0].tolist() == pytest.approx([0.5 / 3, 1 / 3, 3 / 3])


@pytest.mark.parametrize(
    ("grades", "message"),
    [
        ([(GOOD, 9.0)], r"2 x one graded completion, .* \(sample several a prompt: sampling\.n=4\)"),
        ([(GOOD, 9.0), (GOOD, 3.0)], r"2 x all graded completions are the same text \(sample more freely"),
        ([(GOOD, 5.0), (BAD, 5.0)], r"2 x all completions have the same grade \(a judge that says the same"),
        ([(GOOD, 5.0), (BAD, 5.5)], r"2 x no two completions differ by min_margin \(lower min_margin=1\)"),
        ([(GOOD, None), (BAD, None)], r"2 x no graded completion \(run judge on them first\)"),
        ([], r"none of its 2 rows can be used \(no completions\)"),
    ],
)
def test_grades_that_make_no_pair_are_told_by_their_reason(
    base: ModelConfig, tmp_path: Path, grades: list[tuple[str, float | None]], message: str
) -> None:
    rows = [graded(id, *grades).model_dump() for id in ("a", "b")]
    data = RowsConfig(path=write(tmp_path / "rows.jsonl", rows))
    with pytest.raises(UserError, match=message) as caught:
        reward.run(configure(base, tmp_path, data=data))  # although there are other pairs, too
    assert "rows.jsonl: " in str(caught.value)


def test_a_regression_needs_grades(base: ModelConfig, tmp_path: Path) -> None:
    nothing = RowsConfig(path="none")
    with pytest.raises(UserError, match=r"regress_weight=0\.5: no answer has a grade"):
        reward.run(configure(base, tmp_path, data=nothing, regress_weight=0.5))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("center_weight", -1.0, "must be 0 or more"),
        ("regress_weight", math.nan, "must be 0 or more"),
        ("heads", 0, "must be at least 1"),
        ("head_learning_rate", 0.0, "must be above 0"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(
    base: ModelConfig, tmp_path: Path, key: str, value: Any, message: str
) -> None:
    with pytest.raises(UserError, match=f"{key}={value}: {message}"):
        configure(base, tmp_path, **{key: value})


def test_a_source_has_no_name_that_is_taken(base: ModelConfig, tmp_path: Path) -> None:
    """Else two judges would share a scale, and a weight."""
    with pytest.raises(UserError, match=r"sources\.graded: the grades of data\.path have this name"):
        configure(base, tmp_path, sources={"graded": "other.jsonl"})
