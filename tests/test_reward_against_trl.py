"""The losses of reward training are those of TRL's RewardTrainer, on the same weights and the same batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from test_reward_stage import BAD, GOOD
from tiny_random import random_model, tokenizer, user
from transformers import AutoModelForSequenceClassification, TrainingArguments
from trl import RewardConfig, RewardTrainer

from alignkit.models.value_head import ValueHeadModel
from alignkit.training.reward import EncodedGroup, Objective, _Collator, _Trainer, encode_group
from alignkit.training.reward_data import AnswerGroup, Comparison

PAIRS = ((GOOD, BAD, 2.0), ("Anna.", "The home of Anna is Oslo.", 7.5), ("no", "yes", 0.25))


def rows() -> list[EncodedGroup]:
    """A prompt of another length for each pair."""
    found = []
    for number, (chosen, rejected, margin) in enumerate(PAIRS):
        prompt = tuple(user("Is it so? " * (number + 1)))
        group = AnswerGroup(str(number), "a", prompt, (chosen, rejected), (None, None), (Comparison(0, 1, margin),))
        row, _ = encode_group(tokenizer(), group, 256)
        assert row is not None
        found.append(row)
    return found


def of_trl(folder: Path, model: Any, groups: Sequence[EncodedGroup], center: float | None, with_margin: bool) -> Any:
    """TRL's trainer over the conversations of these rows, each read alone."""
    columns: dict[str, list[Any]] = {
        name: [list(row.tokens.prompt + row.tokens.answers[place]) for row in groups]
        for place, name in enumerate(("chosen_ids", "rejected_ids"))
    }
    if with_margin:
        columns["margin"] = [row.comparisons[0].margin for row in groups]
    arguments = RewardConfig(
        str(folder), bf16=False, use_cpu=True, report_to="none", center_rewards_coefficient=center, max_length=None
    )
    data = Dataset.from_dict(columns)
    return RewardTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer())


@pytest.mark.parametrize(("margin_weight", "center_weight"), [(0.0, 0.0), (1.0, 0.0), (0.0, 0.01), (1.0, 0.1)])
def test_loss_and_gradients_are_those_of_trl(tmp_path: Path, margin_weight: float, center_weight: float) -> None:
    groups = rows()
    module = ValueHeadModel(random_model())
    objective = Objective(margin_weight=margin_weight, center_weight=center_weight)
    arguments = TrainingArguments(str(tmp_path / "ours"), use_cpu=True, report_to="none")
    collator = _Collator(tokenizer().pad_token_id, 256)
    trainer = _Trainer(module, groups, objective, args=arguments, data_collator=collator)
    ours = trainer.compute_loss(module.eval(), collator(groups))
    ours.backward()

    config = random_model().config
    config.num_labels = 1
    classifier: Any = AutoModelForSequenceClassification.from_config(config)
    classifier.model.load_state_dict(module.backbone.state_dict())
    classifier.score.weight.data.copy_(module.value_head.weight.data)
    other = of_trl(tmp_path / "theirs", classifier, groups, center_weight or None, with_margin=margin_weight > 0)
    batch = other.data_collator([other.train_dataset[place] for place in range(len(groups))])
    assert batch["input_ids"].shape[0] == 2 * len(groups)
    theirs = other.compute_loss(classifier.eval(), batch)
    theirs.backward()
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-6)
    gradient = module.value_head.weight.grad
    assert gradient is not None
    assert torch.allclose(gradient, classifier.score.weight.grad, atol=1e-6)
