"""Reward training: the loss by hand, pairs and split, equality with plain pairwise training, resumption, the checks."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_random import conversation, save_random_base, tokenizer, user

from alignkit import reward
from alignkit.core.app import load_config
from alignkit.core.artifact import Artifact
from alignkit.core.config import LoraConfig, ModelConfig, Quantization, RowsConfig, TrainConfig
from alignkit.core.errors import UserError
from alignkit.core.manifest import read_manifest
from alignkit.core.records import Completion, CompletionSet, Message, PreferencePair
from alignkit.data.chat import encode_conversation
from alignkit.models.loading import load_base, load_policy, new_adapter
from alignkit.models.reward_model import RewardModel
from alignkit.models.value_head import ValueHeadModel
from alignkit.reward import RewardConfig
from alignkit.training.judges import regression_loss
from alignkit.training.reward import (
    EncodedGroup,
    Objective,
    _Collator,
    bradley_terry_loss,
    centering_loss,
    encode_group,
    ranked_right,
    train_reward_model,
)
from alignkit.training.reward_data import (
    AnswerGroup,
    Comparison,
    LeftOut,
    compare,
    groups_from_grades,
    groups_from_preferences,
    split_by_prompt,
)

TRAIN = TrainConfig(learning_rate=1e-2, batch_size=4, epochs=3.0, warmup_share=0.0, logging_steps=2, save_steps=2)
GOOD, BAD = "The statement does not say.", "Oslo, so yes."


# -- arithmetic ------------------------------------------------------------------------------------------------------


def test_bradley_terry_loss_by_hand() -> None:
    better, worse = torch.tensor([1.0, 0.5]), torch.tensor([0.0, 0.5])
    # -log sigmoid(1) = log(1 + 1/e) = 0.313262, -log sigmoid(0) = ln 2 = 0.693147
    half = torch.tensor([0.5, 0.5])
    assert float(bradley_terry_loss(better, worse, 0.0, half)) == pytest.approx((0.313262 + 0.693147) / 2, abs=1e-6)
    # a demanded difference of 1: sigmoid(0) and sigmoid(-1), and -log sigmoid(-1) = log(1 + e) = 1.313262
    assert float(bradley_terry_loss(better, worse, 1.0, half)) == pytest.approx((0.693147 + 1.313262) / 2, abs=1e-6)
    margins, uneven = torch.tensor([1.0, 1.0]), torch.tensor([0.25, 0.75])
    expected = 0.25 * math.log(2) + 0.75 * math.log(1 + math.e)
    assert float(bradley_terry_loss(better, worse, margins, uneven)) == pytest.approx(expected, abs=1e-6)


def test_centering_loss_by_hand() -> None:
    better, worse = torch.tensor([1.0, 0.5]), torch.tensor([0.0, -1.0])
    assert float(centering_loss(better, worse, torch.tensor([0.75, 0.25]))) == 0.75 * 1 + 0.25 * 0.25


def test_regression_loss_by_hand() -> None:
    scores, targets = torch.tensor([[1.0], [3.0], [9.0]], requires_grad=True), torch.tensor([[0.0], [5.0], [math.nan]])
    loss = regression_loss(scores, targets, torch.tensor([[0.5], [0.25], [0.25]]))
    assert loss.item() == 0.5 * 1 + 0.25 * 4
    loss.backward()
    assert scores.grad is not None
    assert scores.grad[:, 0].tolist() == [1.0, -1.0, 0.0]  # an answer without a grade pulls nowhere


def test_every_two_grades_far_enough_apart_make_a_comparison() -> None:
    assert compare([5.0, 7.0, None, 6.5], min_margin=1.0) == [Comparison(1, 0, 2.0), Comparison(3, 0, 1.5)]
    assert compare([5.0, 5.0], min_margin=0.0) == []


def graded(id: str, *grades: tuple[str, float | None], **fields: Any) -> CompletionSet:
    completions = [Completion(text=text, model="m", score=grade) for text, grade in grades]
    entries = {"id": id, "prompt": user(f"question {id}"), "completions": completions}
    return CompletionSet.model_validate(entries | fields)


def test_equal_texts_count_once_and_unfinished_ones_not_at_all() -> None:
    row = graded("a", ("x", 10.0), ("y", 2.0), ("x", 8.0), ("none", None), kind="judgmental")
    row.completions.append(Completion(text="cut", model="m", score=0.0, finished=False))
    left_out = LeftOut()
    (group,), dropped = groups_from_grades([row], min_margin=1.0, pairs_per_prompt=9, seed=1, left_out=left_out)
    assert (group.answers, group.grades) == (("x", "y"), (9.0, 2.0))
    assert group.comparisons == (Comparison(0, 1, 7.0),)
    assert (group.source, dropped) == ("graded judgmental", [])
    assert left_out == LeftOut(unfinished=1, ungraded=1, comparisons=0)


def test_rows_without_a_pair_are_dropped_and_pairs_are_capped() -> None:
    rows = [
        graded("same", ("x", 5.0), ("y", 5.5)),
        graded("none", ("x", None)),
        graded("many", *((str(n), float(n)) for n in range(6))),
    ]
    left_out = LeftOut()
    groups, dropped = groups_from_grades(rows, min_margin=1.0, pairs_per_prompt=4, seed=1, left_out=left_out)
    assert [(each.row["id"], each.reason) for each in dropped] == [
        ("same", "no two completions differ by min_margin"),
        ("none", "no graded completion"),
    ]
    assert len(groups[0].comparisons) == 4
    assert set(groups[0].comparisons) < set(compare([float(n) for n in range(6)], 1.0))
    assert left_out == LeftOut(unfinished=0, ungraded=1, comparisons=15 - 4)
    again, _ = groups_from_grades(rows, min_margin=1.0, pairs_per_prompt=4, seed=1, left_out=LeftOut())
    assert again == groups


def group(number: int, source: str = "a", prompt: str | None = None) -> AnswerGroup:
    turns = tuple(user(prompt or f"question {source} {number}"))
    return AnswerGroup(f"{source}-{number}", source, turns, (GOOD, BAD), (10.0, 0.0), (Comparison(0, 1, 10.0),))


def test_the_split_is_by_prompt_and_by_source() -> None:
    groups = [group(n) for n in range(40)] + [group(n, "b") for n in range(20)]
    groups += [group(100 + n, "a", "the same prompt") for n in range(10)]
    train, held_out = split_by_prompt(groups, 0.25, seed=1)
    assert {each.prompt_key for each in train} & {each.prompt_key for each in held_out} == set()
    assert len(train) + len(held_out) == len(groups)
    assert len({each.prompt_key for each in held_out if each.source == "a"}) == 10  # a quarter of 41 prompts
    assert len([each for each in held_out if each.source == "b"]) == 5
    assert split_by_prompt(groups, 0.25, seed=1) == (train, held_out)
    assert split_by_prompt(groups, 0.25, seed=2) != (train, held_out)
    assert split_by_prompt(groups, 0.0, seed=1) == (groups, [])


def test_preferences_become_groups_of_two() -> None:
    turn = conversation("q", "a")[1:]
    other = [Message(role="assistant", content="b")]
    good = PreferencePair(id="1", prompt=user("q"), chosen=turn, rejected=other, source="hh-rlhf")
    odd = PreferencePair(id="2", prompt=user("q"), chosen=[*turn, *turn], rejected=other)
    (found,), dropped = groups_from_preferences([good, odd])
    assert (found.answers, found.comparisons, found.source) == (("a", "b"), (Comparison(0, 1, None),), "hh-rlhf")
    assert [each.row["id"] for each in dropped] == ["2"]


def test_answers_that_cannot_be_read_leave_the_group() -> None:
    long = AnswerGroup(
        "x", "a", tuple(user("q")), ("no", "Oslo " * 300, "yes"), (5.0, 0.0, 7.0), tuple(compare([5.0, 0.0, 7.0], 1.0))
    )
    found, unreadable = encode_group(tokenizer(), long, 256)
    assert found is not None
    assert found.comparisons == (Comparison(1, 0, 2.0),)
    assert found.grades == (5.0, 7.0)
    assert [answer.split()[0] for answer in unreadable] == ["Oslo"]
    assert encode_group(tokenizer(), replace(long, comparisons=(Comparison(0, 1, 5.0),)), 256)[0] is None


# -- training --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return save_random_base(tmp_path_factory.mktemp("base"))


def new_model(base: ModelConfig) -> RewardModel:
    torch.manual_seed(4)
    policy = new_adapter(load_base(base), LoraConfig(rank=4, dropout=0.0), ["all-linear"])
    return RewardModel(ValueHeadModel(policy), tokenizer(), base)


def encoded(base: ModelConfig, groups: Sequence[AnswerGroup]) -> list[EncodedGroup]:
    found = [encode_group(tokenizer(), each, base.max_length)[0] for each in groups]
    return [each for each in found if each is not None]


def open_artifact(folder: Path) -> Artifact:
    model = ModelConfig(path="embedded")
    config = RewardConfig(data=RowsConfig(path="none"), model=model, name="reward", output_dir=str(folder))
    return Artifact.open("reward", config)


def test_one_pass_over_a_group_gives_the_loss_and_gradients_of_separate_pairs(base: ModelConfig) -> None:
    answers, grades = ("no", GOOD, BAD, "yes"), [1.0, 10.0, 0.0, 5.0]
    rows = [
        AnswerGroup(str(n), "a", tuple(user(f"question {n}")), answers, tuple(grades), tuple(compare(grades, 1.0)))
        for n in range(2)
    ]
    model = new_model(base)
    inputs = _Collator(tokenizer().pad_token_id, base.max_length)(encoded(base, rows))
    pairs = inputs.pop("pairs")
    assert len(pairs) == 12
    scores = model.module(**{name: inputs[name] for name in ("input_ids", "segments", "position_ids", "last")})
    assert scores.shape == (8, 1)
    bradley_terry_loss(scores[pairs[:, 0]], scores[pairs[:, 1]], 0.0, inputs["pair_weights"]).backward()
    shared = {name: weight.grad.clone() for name, weight in model.module.named_parameters() if weight.grad is not None}

    model.module.zero_grad()
    losses = []
    for each in rows:
        for comparison in each.comparisons:
            raw = []
            for place in (comparison.better, comparison.worse):
                ids = encode_conversation(
                    tokenizer(), [*each.prompt, Message(role="assistant", content=answers[place])]
                )
                hidden = model.module.backbone(input_ids=torch.tensor([ids])).last_hidden_state
                raw.append(model.module.value_head(hidden[0, -1]))
            losses.append(-torch.nn.functional.logsigmoid(raw[0] - raw[1]))
    torch.cat(losses).mean().backward()
    assert len(shared) > 10
    for name, weight in model.module.named_parameters():
        if name in shared:
            assert weight.grad is not None
            assert torch.allclose(weight.grad, shared[name], atol=1e-5)


def test_every_prompt_weighs_the_same_however_a_step_is_cut(base: ModelConfig, tmp_path: Path) -> None:
    rows = [
        group(0),
        *(
            replace(
                group(n),
                answers=("no", GOOD, BAD),
                grades=(1.0, 9.0, 5.0),
                comparisons=tuple(compare([1.0, 9.0, 5.0], 1.0)),
            )
            for n in range(1, 4)
        ),
    ]
    weights = _Collator(0, base.max_length)(encoded(base, rows))["pair_weights"]
    assert weights[:, 0].tolist() == pytest.approx([1 / 4] + [1 / 12] * 9)
    trained = []
    for batch_size in (1, 4):
        model = new_model(base)
        train = replace(TRAIN, batch_size=batch_size, gradient_accumulation=4 // batch_size)
        with open_artifact(tmp_path / str(batch_size)) as artifact:
            train_reward_model(model, encoded(base, rows), Objective(0.01, 0.1), train, 1, artifact)
        trained.append(model.module.value_head.weight.detach())
    assert torch.allclose(trained[0], trained[1], atol=1e-4)


def test_training_learns_what_is_better_and_checkpoints_hold_no_base(base: ModelConfig, tmp_path: Path) -> None:
    rows = encoded(base, [group(n) for n in range(12)])
    model = new_model(base)
    with open_artifact(tmp_path / "run") as artifact:
        losses = train_reward_model(model, rows, Objective(), TRAIN, 1, artifact)
        checkpoint = load_file(next(artifact.work_folder.rglob("model.safetensors")))
    assert losses[-1]["loss"] < 0.1 < losses[0]["loss"]
    assert losses[-1]["reward_accuracy"] == 1.0
    raw = model.raw_scores([each.tokens for each in rows])
    assert all(all(right) for right in ranked_right(rows, raw))
    model.centre([score for scores in raw for score in scores])
    assert all("lora_" in name or "value_head" in name for name in checkpoint)
    scored = [{"prompt": f"question a {n}", "completion": text} for n in range(12) for text in (GOOD, BAD)]
    scores = torch.tensor(model.score(scored))
    assert abs(float(scores.mean())) < 1e-4
    assert float(scores.std(correction=0)) == pytest.approx(1.0, abs=1e-3)


def test_the_head_can_learn_at_a_rate_of_its_own(base: ModelConfig, tmp_path: Path) -> None:
    rows = encoded(base, [group(n) for n in range(4)])
    moved = []
    for rate in (None, 1e-4):
        model = new_model(base)
        before = model.module.value_head.weight.detach().clone()
        with open_artifact(tmp_path / str(rate)) as artifact:
            train = replace(TRAIN, max_steps=1, logging_steps=1)
            losses = train_reward_model(model, rows, Objective(), train, 1, artifact, rate)
        moved.append(model.module.value_head.weight.detach() - before)
        assert losses[0]["learning_rate"] == TRAIN.learning_rate
    # AdamW's first step is the learning rate in the direction of each gradient's sign
    assert float(moved[0].abs().median()) == pytest.approx(1e-2, rel=1e-3)
    assert float(moved[1].abs().median()) == pytest.approx(1e-4, rel=1e-3)


def test_gradient_checkpointing_changes_nothing_but_memory(base: ModelConfig, tmp_path: Path) -> None:
    rows = encoded(base, [group(number) for number in range(8)])
    losses = []
    for checkpointing in (False, True):
        train = replace(TRAIN, max_steps=3, logging_steps=1, gradient_checkpointing=checkpointing)
        with open_artifact(tmp_path / str(checkpointing)) as artifact:
            found = train_reward_model(new_model(base), rows, Objective(), train, 1, artifact)
        losses.append([row["loss"] for row in found])
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def test_an_interrupted_training_ends_with_the_same_weights(
    base: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = encoded(base, [group(n) for n in range(12)])
    objective = Objective(0.01, 0.5, 0.01)  # a judge's scale is learned along and has to resume, too
    whole = new_model(base)
    with open_artifact(tmp_path / "whole") as artifact:
        expected = train_reward_model(whole, rows, objective, TRAIN, 1, artifact)

    forward, calls = ValueHeadModel.forward, 0

    def dies(self: ValueHeadModel, *arguments: Any, **keywords: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 7:  # step 0 is the first
            raise KeyboardInterrupt
        return forward(self, *arguments, **keywords)

    monkeypatch.setattr(ValueHeadModel, "forward", dies)
    with pytest.raises(KeyboardInterrupt), open_artifact(tmp_path / "cut") as artifact:
        train_reward_model(new_model(base), rows, objective, TRAIN, 1, artifact)
    calls = 100
    resumed = new_model(base)
    with open_artifact(tmp_path / "cut") as artifact:
        losses = train_reward_model(resumed, rows, objective, TRAIN, 1, artifact)
    assert calls == 106  # step 0, and the five of nine steps that were left
    assert [row["loss"] for row in losses] == [row["loss"] for row in expected]
    for (name, weight), (_, other) in zip(
        resumed.module.named_parameters(), whole.module.named_parameters(), strict=True
    ):
        assert torch.equal(weight, other), name


def test_regression_pulls_scores_to_the_grades(base: ModelConfig, tmp_path: Path) -> None:
    rows = encoded(base, [group(n) for n in range(8)])
    model = new_model(base)
    with open_artifact(tmp_path / "run") as artifact:
        train_reward_model(model, rows, Objective(regress_weight=5.0), replace(TRAIN, epochs=8.0), 1, artifact)
    raw = torch.tensor(model.raw_scores([each.tokens for each in rows]))
    assert float((raw - torch.tensor([1.0, -1.0])).abs().mean()) < 0.3


# -- the stage -------------------------------------------------------------------------------------------------------


def write(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def scored_rows(count: int) -> list[dict[str, Any]]:
    grades = ((GOOD, 9.0), (BAD, 1.0), ("no", 5.0))
    rows = [graded(f"row-{n}", *grades, kind=("judgmental", "non_judgmental")[n % 2]) for n in range(count)]
    rows.append(graded("flat", (GOOD, 5.0), (BAD, 5.0)))
    return [row.model_dump(exclude_none=True) for row in rows]


def hh_rows(count: int) -> list[dict[str, Any]]:
    return [
        {
            "chosen": f"\n\nHuman: Is it {n}?\n\nAssistant: I do not know.",
            "rejected": f"\n\nHuman: Is it {n}?\n\nAssistant: yes",
        }
        for n in range(count)
    ]


def configure(base: ModelConfig, folder: Path, **changes: Any) -> RewardConfig:
    values: dict[str, Any] = {
        "data": RowsConfig(path=write(folder / "scored.jsonl", scored_rows(20))),
        "preferences": RowsConfig(path=write(folder / "hh.jsonl", hh_rows(10))),
        "held_out_share": 0.2,
        "model": base,
        "train": TRAIN,
        "lora": LoraConfig(rank=4),
        "name": "reward",
        "output_dir": str(folder / "reward"),
    }
    return RewardConfig(**(values | changes))


def test_the_stage_trains_measures_saves_and_checks(base: ModelConfig, tmp_path: Path) -> None:
    artifact = reward.run(configure(base, tmp_path))
    assert [check.name for check in artifact.checks if check.passed] == [
        "trainable_parameters",
        "trainable_in_float32",
        "adapter_moved",
        "saved_scores_equal",
        "scores_need_no_neighbours",
        "scores_need_no_padding_side",
    ]
    metrics = artifact.metrics
    assert (metrics["train_prompts"], metrics["held_out_prompts"]) == (24, 6)
    assert (metrics["train_pairs"], metrics["held_out_pairs"]) == (16 * 3 + 8, 4 * 3 + 2)
    held_out = metrics["held_out_accuracy"]
    sources = {"graded judgmental", "graded non_judgmental", "hh-rlhf"}
    assert set(held_out) == {"all", *sources, "worse answer graded 1", "worse answer graded 5"}
    assert held_out["worse answer graded 1"]["n"] == 8  # below 5 and below 9, four times
    assert held_out["all"]["mean"] > 0.9
    assert held_out["all"]["n"] == 14
    assert held_out["hh-rlhf"]["low"] < held_out["hh-rlhf"]["mean"]  # two pairs prove little
    assert artifact.dropped == {"all completions have the same grade": 1}
    assert metrics["completions_left_out"] == {"unfinished": 0, "ungraded": 0}
    assert metrics["comparisons_left_out"] == 0
    files = (
        "adapter config.yaml dropped.jsonl held_out_scores.jsonl log.txt loss.jsonl manifest.json reward_config.json "
        "tensorboard train_prompts.jsonl value_head.safetensors"
    )
    assert [path.name for path in sorted((tmp_path / "reward").iterdir())] == files.split()
    model = RewardModel.from_pretrained(tmp_path / "reward")
    better, worse = model.score([{"prompt": "question new", "completion": text} for text in (GOOD, BAD)])
    assert better > worse
    assert reward.run(configure(base, tmp_path)).up_to_date


def test_a_4_bit_base_trains_saves_and_is_shared_with_the_policy(base: ModelConfig, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    in_4_bits = replace(base, quantization=Quantization.nf4)
    artifact = reward.run(configure(in_4_bits, tmp_path))  # the checks of the stage are the test
    assert artifact.metrics["held_out_accuracy"]["all"]["mean"] > 0.9
    rows = [{"prompt": f"question {n}", "completion": text} for n in range(5) for text in (GOOD, BAD)]
    expected = RewardModel.from_pretrained(tmp_path / "reward").score(rows)
    policy = load_policy(in_4_bits, str(tmp_path / "reward" / "adapter"))
    shared = RewardModel.from_pretrained(tmp_path / "reward", policy)
    assert shared.module.policy is policy
    assert shared.score(rows) == pytest.approx(expected, abs=1e-5)
    unquantised = load_policy(base, str(tmp_path / "reward" / "adapter"))
    assert RewardModel.from_pretrained(tmp_path / "reward", unquantised).module.policy is not unquantised


def test_preferences_alone_and_nothing_at_all(base: ModelConfig, tmp_path: Path) -> None:
    nothing = RowsConfig(path="none")
    artifact = reward.run(configure(base, tmp_path, data=nothing, held_out_share=0.0))
    assert set(artifact.metrics["train_accuracy"]) == {"all", "hh-rlhf"}
    assert artifact.metrics["held_out_accuracy"] == {}
    assert artifact.summary == "no held-out pairs"
    with pytest.raises(UserError, match=r"held_out_share=1\.0"):
        reward.run(configure(base, tmp_path, held_out_share=1.0))
    with pytest.raises(UserError, match="no pair to learn from"):
        reward.run(configure(base, tmp_path, data=nothing, preferences=nothing))
    manifest = read_manifest(tmp_path / "reward")
    assert manifest is not None
    assert manifest["status"] == "failed"


def test_a_saved_model_that_scores_differently_stops_the_stage(
    base: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = reward.save

    def saves_another_head(model: RewardModel, artifact: Artifact) -> None:
        save(model, artifact)
        torch.nn.init.normal_(model.module.value_head.weight)

    monkeypatch.setattr(reward, "save", saves_another_head)
    with pytest.raises(UserError, match="saved_scores_equal"):
        reward.run(configure(base, tmp_path))


def test_rows_that_are_too_long_for_the_model_are_dropped(base: ModelConfig, tmp_path: Path) -> None:
    rows = [*scored_rows(10), graded("long", (GOOD, 9.0), ("Oslo " * 300, 1.0)).model_dump(exclude_none=True)]
    artifact = reward.run(configure(base, tmp_path, data=RowsConfig(path=write(tmp_path / "long.jsonl", rows))))
    assert artifact.dropped["longer than max_length"] == artifact.dropped["no comparison left"] == 1
    entries = [json.loads(line) for line in (tmp_path / "reward" / "dropped.jsonl").read_text().splitlines()]
    assert [entry["row"]["id"] for entry in entries if entry["reason"] == "longer than max_length"] == ["long"]
    (group,) = (entry["row"] for entry in entries if entry["reason"] == "no comparison left")
    assert (group["id"], group["answers"]) == ("long", [GOOD, "Oslo " * 300])


def test_no_prompt_left_to_train_on_names_held_out_share(base: ModelConfig, tmp_path: Path) -> None:
    nothing = RowsConfig(path="none")
    one = RowsConfig(path=write(tmp_path / "one.jsonl", hh_rows(1)))
    with pytest.raises(UserError, match=r"held_out_share=0\.9 holds out every prompt"):
        reward.run(configure(base, tmp_path, data=nothing, preferences=one, held_out_share=0.9))
    long = [graded("long", (GOOD, 9.0), ("Oslo " * 300, 1.0)).model_dump(exclude_none=True)]
    rows = RowsConfig(path=write(tmp_path / "long.jsonl", long))
    with pytest.raises(UserError, match=r"no pair fits .* that held_out_share=0\.2 leaves for training"):
        reward.run(configure(base, tmp_path, data=rows, preferences=nothing))


def test_the_shipped_configuration_composes() -> None:
    more = ["sources={other: b.jsonl}", "weights={graded: 1, hh-rlhf: 0.5, rewardbench/hep-cpp: 2}", "heads=4"]
    config = load_config("reward", ["run=x", "+model=qwen7b", "preferences.path=hh.jsonl", *more])
    assert isinstance(config, RewardConfig)
    assert (config.sources, config.heads) == ({"other": "b.jsonl"}, 4)
    assert config.weights == {"graded": 1.0, "hh-rlhf": 0.5, "rewardbench/hep-cpp": 2.0}
    assert (config.data.path, config.preferences.limit) == ("runs/x/judge/scored.jsonl", 8000)
    assert config.adapter == "runs/x/sft/adapter"
