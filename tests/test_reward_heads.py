"""Several heads: what they say together, how much they disagree, what each learns from, and what is saved of them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from statistics import mean, pstdev

import pytest
import torch
from test_reward_stage import GOOD, TRAIN, configure, encoded, group, new_model, open_artifact
from tiny_random import conversation, save_random_base, tokenizer

from alignkit import reward
from alignkit.core.config import LoraConfig, ModelConfig
from alignkit.core.errors import UserError
from alignkit.models.loading import load_base, new_adapter
from alignkit.models.merging import classifier_of, classifier_offset
from alignkit.models.reward_model import RewardModel
from alignkit.models.value_head import ValueHeadModel
from alignkit.training.reward import Objective, _Collator, train_reward_model
from alignkit.training.reward_data import bootstrap_weights

CONVERSATIONS = [conversation(question, answer) for question in ("Hello", "Is it?") for answer in ("no", GOOD, "Oslo")]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return save_random_base(tmp_path_factory.mktemp("base"))


def ensemble(base: ModelConfig, heads: int) -> RewardModel:
    torch.manual_seed(4)
    policy = new_adapter(load_base(base), LoraConfig(rank=4, dropout=0.0), ["all-linear"])
    return RewardModel(ValueHeadModel(policy, heads), tokenizer(), base)


def test_the_score_is_the_mean_of_the_heads_and_the_disagreement_their_deviation(base: ModelConfig) -> None:
    model = ensemble(base, 3)
    weight = model.module.value_head.weight.data
    assert len({tuple(row) for row in weight.tolist()}) == 3  # each begins elsewhere
    weight[1] = 3 * weight[0]  # another unit for the same opinion: no reason to disagree
    weight[2] = -weight[0]
    said = [heads for heads in model._say(CONVERSATIONS, None) if not isinstance(heads, str)]
    first = [heads[0] for heads in said]
    assert [heads[1] for heads in said] == pytest.approx([3 * value for value in first], rel=1e-5)
    model.balance_heads(said)
    model.centre([mean(heads) for heads in model._say(CONVERSATIONS, None) if not isinstance(heads, str)])

    # Balanced, the heads say z, z and -z, where z has mean 0 and deviation 1 over these answers: on average z / 3,
    # which centring makes z again; their deviation is |z| sqrt(8) / 3, in the unit of the score |z| sqrt(8).
    z = [(value - mean(first)) / pstdev(first) for value in first]
    found = model.scores_and_disagreements([*CONVERSATIONS, conversation("Hello " * 300, "no")])
    for pair, expected in zip(found[:-1], z, strict=True):
        assert pair == pytest.approx((expected, abs(expected) * 8**0.5), abs=1e-3)
    assert str(found[-1]).startswith("longer than max_length")
    assert [pair[0] for pair in found[:-1]] == model.scores_or_reasons(CONVERSATIONS)


def test_balanced_heads_still_say_the_logits_they_were_trained_to(base: ModelConfig) -> None:
    """Calibration takes differences of raw scores for logits: heads of one opinion keep them on average."""
    model = ensemble(base, 2)
    weight = model.module.value_head.weight.data
    weight[1] = 3 * weight[0]
    said = [heads for heads in model._say(CONVERSATIONS, None) if not isinstance(heads, str)]
    model.balance_heads(said)
    balanced = [heads for heads in model._say(CONVERSATIONS, None) if not isinstance(heads, str)]
    assert [heads[0] for heads in balanced] == pytest.approx([mean(heads) for heads in said], rel=1e-4)
    assert [heads[1] for heads in balanced] == pytest.approx([mean(heads) for heads in said], rel=1e-4)


def test_one_head_does_not_disagree_and_is_left_as_it_is(base: ModelConfig) -> None:
    model = new_model(base)
    before = model.module.value_head.weight.detach().clone()
    model.balance_heads([[1.0], [2.0]])
    assert torch.equal(model.module.value_head.weight, before)
    with pytest.raises(UserError, match="one head, and so no disagreement: train one with several"):
        model.scores_and_disagreements(CONVERSATIONS)


def test_saved_loaded_and_exported_heads_say_the_same(base: ModelConfig, tmp_path: Path) -> None:
    model = ensemble(base, 3)
    model.balance_heads([heads for heads in model._say(CONVERSATIONS, None) if not isinstance(heads, str)])
    model.centre([0.5, -0.5, 3.0])
    model.save_pretrained(tmp_path)
    loaded = RewardModel.from_pretrained(tmp_path)
    assert loaded.scores_and_disagreements(CONVERSATIONS) == model.scores_and_disagreements(CONVERSATIONS)
    assert loaded.head_offsets == model.head_offsets
    scores = [score for score in loaded.scores_or_reasons(CONVERSATIONS) if not isinstance(score, str)]

    classifier = classifier_of(loaded, torch.float32)
    for turns, score in zip(CONVERSATIONS, scores, strict=True):
        messages = [turn.model_dump() for turn in turns]
        text = tokenizer().apply_chat_template(messages, tokenize=False).rstrip()
        with torch.inference_mode():
            logit = float(classifier(**tokenizer()(text, return_tensors="pt", add_special_tokens=False)).logits)
        assert logit - classifier_offset(loaded) == pytest.approx(score, abs=1e-4)

    config = tmp_path / "reward_config.json"
    entries = json.loads(config.read_text())
    config.write_text(json.dumps({**entries, "head_offsets": entries["head_offsets"][:2]}))
    with pytest.raises(UserError, match=r"holds 3 heads for 32 hidden values, but .* want 2 for 32"):
        RewardModel.from_pretrained(tmp_path)


def test_each_head_learns_from_its_own_resample_of_the_prompts(base: ModelConfig) -> None:
    drawn = [bootstrap_weights(f"prompt {number}", 4, seed=1) for number in range(2000)]
    assert drawn[0] == bootstrap_weights("prompt 0", 4, seed=1) != bootstrap_weights("prompt 0", 4, seed=2)
    for head in zip(*drawn, strict=True):  # exponential with mean 1: so is its deviation
        assert mean(head) == pytest.approx(1, abs=0.08)
        assert pstdev(head) == pytest.approx(1, abs=0.12)
    assert abs(torch.corrcoef(torch.tensor(drawn).T)[0, 1]) < 0.08
    assert bootstrap_weights("prompt 0", 1, seed=1) == (1.0,)

    rows = [replace(row, weights=(0.5, 2.0)) for row in encoded(base, [group(0), group(1)])]
    inputs = _Collator(0, base.max_length)(rows)
    # two prompts of one pair each, two heads: a weight of 1 would be a quarter
    assert inputs["pair_weights"].tolist() == [[0.125, 0.5], [0.125, 0.5]]


def test_a_head_that_a_prompt_does_not_count_for_learns_nothing_from_it(base: ModelConfig, tmp_path: Path) -> None:
    rows = [replace(row, weights=(1.0, 0.0)) for row in encoded(base, [group(number) for number in range(4)])]
    model = ensemble(base, 2)
    before = model.module.value_head.weight.detach().clone()
    said = [[heads[0] for heads in answers] for answers in model.head_scores([row.tokens for row in rows])]
    train = replace(TRAIN, max_steps=2, logging_steps=1)
    with open_artifact(tmp_path / "run") as artifact:
        losses = train_reward_model(model, rows, Objective(), train, 1, artifact)
    moved = (model.module.value_head.weight.detach() - before).abs().sum(dim=1)
    assert moved[0] > 0.01
    assert moved[1] == 0
    expected = mean(math.log(1 + math.exp(worse - better)) for better, worse in said)
    assert losses[0]["loss"] == pytest.approx(expected / 2, abs=1e-5)  # the mean over heads, of which one has 0


def test_the_stage_trains_an_ensemble(base: ModelConfig, tmp_path: Path) -> None:
    artifact = reward.run(configure(base, tmp_path, heads=3))
    found = artifact.metrics["held_out_accuracy_of_heads"]
    assert len(found) == 3
    assert min(found) > 0.8
    model = RewardModel.from_pretrained(tmp_path / "reward")
    rows = [conversation(f"question row-{number}", text) for number in range(20) for text in (GOOD, "no")]
    scored = [each for each in model.scores_and_disagreements(rows) if not isinstance(each, str)]
    assert all(disagreement > 0 for _, disagreement in scored)
    one = json.loads((tmp_path / "reward" / "reward_config.json").read_text())
    assert len(one["head_offsets"]) == 3
