"""Preference losses: TRL's own, unchanged by our batches, and three of them by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from small_preference import BETA, PAIRS, TRAIN, encoded_pairs, log_prob, losses, small_config, trainer_for
from tiny_random import conversation, tokenizer
from trl import DPOConfig as TRLConfig
from trl import DPOTrainer

from alignkit.core.app import run_command
from alignkit.core.artifact import Artifact
from alignkit.core.errors import UserError
from alignkit.data.chat import encode_prompt
from alignkit.dpo import DPOConfig, run
from alignkit.models.loading import load_policy
from alignkit.training.preference_losses import LOSSES, SMOOTHED, Objective

SMOOTHING = 0.1


@pytest.fixture
def config(tmp_path: Path) -> DPOConfig:
    return small_config(tmp_path)


def moved(policy: Any) -> Any:
    """The policy as if it had been trained: no longer its reference."""
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B.default" in name:
                weight.mul_(1.5)
    return policy


def first_batch(trainer: Any) -> Any:
    rows = trainer._remove_unused_columns(trainer.train_dataset, description="training")
    return trainer._prepare_inputs(trainer.data_collator(list(rows)))


@pytest.fixture(scope="module")
def trainers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any, Any]]:
    """Ours, TRL's on the same pairs as plain texts, and the moved policy of the first."""
    folder = tmp_path_factory.mktemp("losses")
    settings = small_config(folder)
    with Artifact.open("dpo", settings) as artifact:
        policy, ours = trainer_for(settings, artifact)
    rows = []
    for question, chosen, rejected in PAIRS:
        prompt = tokenizer().decode(encode_prompt(tokenizer(), conversation(question, "")[:1]))
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})  # TRL adds the end of turn
    plain = DPOTrainer(
        model=load_policy(settings.model, settings.init_adapter, trainable=True),
        args=TRLConfig(output_dir=str(folder / "trl"), beta=BETA, use_cpu=True, bf16=False, report_to="none"),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
    )
    ours.label_smoothing = plain.label_smoothing = SMOOTHING
    moved(plain.model)
    yield ours, plain, moved(policy)


@pytest.mark.parametrize("loss", LOSSES)
def test_our_trainer_has_the_loss_of_trls_on_the_same_pairs(trainers: tuple[Any, Any, Any], loss: str) -> None:
    found, gradients = [], []
    for trainer in trainers[:2]:
        trainer.loss_types, trainer.loss_weights = [loss], [1.0]
        trainer.model.zero_grad()
        value = trainer.compute_loss(trainer.model, first_batch(trainer))
        value.backward()
        found.append(value.item())
        gradients.append(
            torch.cat([weight.grad.flatten() for weight in trainer.model.parameters() if weight.grad is not None])
        )
    assert found[0] == pytest.approx(found[1], rel=1e-6, abs=1e-6)
    assert torch.allclose(gradients[0], gradients[1], atol=1e-5, rtol=1e-4)
    assert float(gradients[0].abs().max()) > 1e-6


BY_HAND: dict[str, Callable[[float, float, int, int], float]] = {
    "sigmoid": lambda chosen, rejected, m, n: math.log1p(math.exp(-BETA * (chosen - rejected))),
    "hinge": lambda chosen, rejected, m, n: max(0.0, 1 - BETA * (chosen - rejected)),
    "ipo": lambda chosen, rejected, m, n: (chosen / m - rejected / n - 1 / (2 * BETA)) ** 2,
    "robust": lambda chosen, rejected, m, n: (
        (
            (1 - SMOOTHING) * math.log1p(math.exp(-BETA * (chosen - rejected)))
            - SMOOTHING * math.log1p(math.exp(BETA * (chosen - rejected)))
        )
        / (1 - 2 * SMOOTHING)
    ),
}
"""Loss of one pair from its log-ratios and its answers' lengths."""


@pytest.mark.parametrize("loss", BY_HAND)
def test_a_loss_is_what_its_equation_says(trainers: tuple[Any, Any, Any], config: DPOConfig, loss: str) -> None:
    ours, _, policy = trainers
    ours.loss_types, ours.loss_weights = [loss], [1.0]
    found = ours.compute_loss(policy, first_batch(ours)).item()
    reference = load_policy(config.model, config.init_adapter)
    changed = moved(load_policy(config.model, config.init_adapter))
    terms = []
    for (question, chosen, rejected), pair in zip(PAIRS, encoded_pairs(), strict=True):
        answers = (chosen, rejected)
        better, worse = (log_prob(changed, question, text) - log_prob(reference, question, text) for text in answers)
        terms.append(BY_HAND[loss](better, worse, len(pair.chosen_ids), len(pair.rejected_ids)))
    assert found == pytest.approx(math.fsum(terms) / len(terms), rel=1e-5)


def test_every_check_of_the_reference_is_that_of_the_sigmoid_loss(config: DPOConfig) -> None:
    """Other losses have other values when policy and reference are one; the check does not depend on the choice."""
    artifact = run(replace(config, loss="ipo", train=replace(TRAIN, max_steps=1, batch_size=4)))
    assert losses(config)[0]["loss"] == pytest.approx((1 / (2 * BETA)) ** 2, rel=1e-5)
    assert artifact.metrics["preference_loss_before"] == pytest.approx(math.log(2), abs=1e-6)
    assert {check.name for check in artifact.checks if check.passed} >= {"reference"}


def test_an_unknown_loss_names_the_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("dpo", ["loss=sigmoyd", f"output_dir={tmp_path}"]) == 2
    said = capsys.readouterr().err
    assert "loss=sigmoyd: no such loss (did you mean 'sigmoid'?). There are sigmoid, sigmoid_norm, hinge" in said


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_smoothing": 0.1}, "loss=sigmoid has no such thing. For noisy preferences choose loss=robust"),
        ({"loss": "robust", "label_smoothing": 0.5}, "must be from 0 up to, but not, 0.5"),
        ({"loss": "exo_pair"}, "needs label_smoothing above 0"),
        ({"beta": 0.0}, "beta=0.0: must be above 0"),
        ({"sft_weight": -1.0}, "sft_weight=-1.0: must be 0 or more"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    keywords: dict[str, Any] = {"reference": "base", "beta": 0.1} | settings
    with pytest.raises(UserError, match=message):
        Objective(**keywords)


def test_the_losses_that_smoothing_changes_are_those_we_allow_it_for(trainers: tuple[Any, Any, Any]) -> None:
    ours, _, policy = trainers
    batch = first_batch(ours)
    changed = set()
    for loss in LOSSES:
        ours.loss_types, ours.loss_weights = [loss], [1.0]
        values = []
        for ours.label_smoothing in (0.05, 0.2):
            with torch.no_grad():
                values.append(float(ours.compute_loss(policy, batch)))
        changed |= {loss} if values[0] != values[1] else set()
    ours.label_smoothing = SMOOTHING
    assert changed == set(SMOOTHED)
