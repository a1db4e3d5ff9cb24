"""The stage `dpo`: the loss by hand, the reference that is named and checked, and what is written."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_preference import (
    BETA,
    PAIRS,
    TRAIN,
    encoded_pairs,
    expected_loss,
    log_prob,
    losses,
    small_config,
    trainer_for,
    write_adapter,
)
from tiny_random import save_random_base

from alignkit.core.app import run_command
from alignkit.core.artifact import Artifact
from alignkit.core.config import Quantization
from alignkit.core.errors import UserError
from alignkit.dpo import DPOConfig, run
from alignkit.models.loading import load_policy
from alignkit.training.callbacks import StepReport
from alignkit.training.preference import pairs_dataset
from alignkit.training.preference_metrics import preference_metrics
from alignkit.training.reference import LN_2, check_reference, set_reference


@pytest.fixture
def config(tmp_path: Path) -> DPOConfig:
    return small_config(tmp_path)


# -- the reference -----------------------------------------------------------------------------------------------------


def test_the_first_loss_against_the_sft_adapter_is_ln_2(config: DPOConfig) -> None:
    artifact = run(config)
    first = losses(config)[0]
    assert first["loss"] == pytest.approx(LN_2, abs=1e-7)
    assert first["chosen_reward"] == first["rejected_reward"] == 0.0
    reference = next(check for check in artifact.checks if check.name == "reference")
    assert reference.detail.startswith("sft_adapter: loss 0.6931472 (ln 2 = 0.6931472)")


@pytest.mark.parametrize(
    ("kind", "rank"),  # the rank is that of the other adapter, which the base has none of
    [("base", 4), ("path", 4), ("path", 8)],
)
def test_another_reference_is_the_one_that_is_named(config: DPOConfig, tmp_path: Path, kind: str, rank: int) -> None:
    """The check passes, and the first loss is what the definition gives with that reference."""
    other = write_adapter(config.model, tmp_path / "other", seed=2, rank=rank)
    config = replace(config, reference="base" if kind == "base" else other, train=replace(TRAIN, batch_size=4))
    artifact = run(config)
    policy = load_policy(config.model, config.init_adapter)
    expected = expected_loss(policy, load_policy(config.model, None if kind == "base" else other))
    assert abs(expected - LN_2) > 1e-3
    assert losses(config)[0]["loss"] == pytest.approx(expected, abs=1e-5)
    assert artifact.metrics["preference_loss_before"] == pytest.approx(expected, abs=1e-5)
    assert "reference" in {check.name for check in artifact.checks if check.passed}


@pytest.mark.parametrize(
    (
        "kind",
        "quantization",
    ),  # each reference and each kind of base in its turn; the other pairs add nothing of their own
    [
        ("sft_adapter", Quantization.nf4),
        ("base", Quantization.none),
        ("path", Quantization.none),
        pytest.param("sft_adapter", Quantization.none, marks=pytest.mark.slow),
        pytest.param("base", Quantization.nf4, marks=pytest.mark.slow),
        pytest.param("path", Quantization.nf4, marks=pytest.mark.slow),
    ],
)
def test_a_dora_policy_has_the_reference_that_is_named(
    config: DPOConfig, tmp_path: Path, kind: str, quantization: Quantization
) -> None:
    """DoRA's magnitudes change outputs even when B = 0."""
    model = replace(config.model, quantization=quantization)
    policy = write_adapter(model, tmp_path / "dora", seed=1, dora=True)
    named = write_adapter(model, tmp_path / "other", seed=2, dora=True) if kind == "path" else kind
    config = replace(config, model=model, init_adapter=policy, reference=named, train=replace(TRAIN, batch_size=4))
    run(config)
    reference = {"sft_adapter": policy, "base": None}.get(kind, named)
    expected = expected_loss(load_policy(model, policy), load_policy(model, reference))
    assert (abs(expected - LN_2) > 1e-3) == (kind != "sft_adapter")
    assert losses(config)[0]["loss"] == pytest.approx(expected, abs=1e-5)


def test_a_reference_that_is_not_the_named_one_stops_the_stage(config: DPOConfig, tmp_path: Path) -> None:
    other = write_adapter(config.model, tmp_path / "other", seed=2)
    pairs = pairs_dataset(encoded_pairs())
    with Artifact.open("dpo", config) as artifact:
        policy, trainer = trainer_for(config, artifact)
        for named in ("base", other):  # the trainer still compares with its copy of the SFT adapter
            with pytest.raises(UserError, match=r"dpo: check 'reference' failed: .*: loss"):
                check_reference(trainer, policy, named, pairs, artifact)
        with torch.no_grad():  # a copy that has been disturbed
            next(weight for name, weight in policy.named_parameters() if "lora_B.ref" in name).add_(0.1)
        with pytest.raises(UserError, match="check 'reference' failed: sft_adapter"):
            check_reference(trainer, policy, "sft_adapter", pairs, artifact)


def test_checking_leaves_the_policy_as_it_was(config: DPOConfig, tmp_path: Path) -> None:
    other = write_adapter(config.model, tmp_path / "other", seed=2)
    for named in ("base", other):
        with Artifact.open("dpo", replace(config, reference=named)) as artifact:
            policy, trainer = trainer_for(config, artifact)
            set_reference(policy, named)
            before = {name: weight.detach().clone() for name, weight in policy.named_parameters()}
            check_reference(trainer, policy, named, pairs_dataset(encoded_pairs()), artifact)
            after = dict(policy.named_parameters())
            assert before.keys() == after.keys()
            assert all(torch.equal(before[name], after[name]) for name in before)
            trained = {name for name, weight in after.items() if weight.requires_grad}
            assert trained == {name for name in after if ".default." in name}
            assert policy.active_adapter == "default"


def test_no_dropout_is_left_in_policy_or_reference(config: DPOConfig, tmp_path: Path) -> None:
    """A reference with dropout would be another model at every step."""
    with Artifact.open("dpo", config) as artifact:
        policy, _ = trainer_for(config, artifact)
    set_reference(policy, write_adapter(config.model, tmp_path / "other", seed=2))
    dropouts = [module.p for module in policy.modules() if isinstance(module, torch.nn.Dropout)]
    assert dropouts
    assert set(dropouts) == {0.0}


# -- the objective -----------------------------------------------------------------------------------------------------


def test_the_measured_loss_is_the_definition(config: DPOConfig) -> None:
    """The policy moved, the reference did not: rewards and loss by hand."""
    with Artifact.open("dpo", config) as artifact:
        policy, trainer = trainer_for(config, artifact)
        with torch.no_grad():
            for name, weight in policy.named_parameters():
                if "lora_B.default" in name:
                    weight.mul_(1.5)
        found = preference_metrics(trainer, pairs_dataset(encoded_pairs()))
    policy.set_adapter("default")
    reference = load_policy(config.model, config.init_adapter)
    assert found["loss"] == pytest.approx(expected_loss(policy, reference), abs=1e-5)
    ratios = [log_prob(policy, q, chosen) - log_prob(reference, q, chosen) for q, chosen, _ in PAIRS]
    assert found["chosen_reward"] == pytest.approx(BETA * math.fsum(ratios) / len(ratios), abs=1e-4)


def test_the_likelihood_term_adds_its_weight_times_the_mean_token_loss(config: DPOConfig) -> None:
    config = replace(config, sft_weight=0.5, train=replace(TRAIN, batch_size=4))
    artifact = run(config)
    policy = load_policy(config.model, config.init_adapter)
    tokens = sum(len(pair.chosen_ids) for pair in encoded_pairs())
    likelihood = -math.fsum(log_prob(policy, question, chosen) for question, chosen, _ in PAIRS) / tokens
    assert losses(config)[0]["loss"] == pytest.approx(LN_2 + 0.5 * likelihood, abs=1e-4)
    assert artifact.metrics["preference_loss_before"] == pytest.approx(LN_2, abs=1e-6)  # the preference term alone


# -- what it writes ----------------------------------------------------------------------------------------------------


def test_training_raises_chosen_over_rejected_and_saves_the_policy_alone(config: DPOConfig) -> None:
    artifact = run(replace(config, train=replace(TRAIN, max_steps=12)))
    assert losses(config)[-1]["loss"] < LN_2
    assert artifact.metrics["reward_accuracy"] == 1.0
    assert artifact.metrics["preference_loss_after"] < artifact.metrics["preference_loss_before"]
    names = sorted(path.name for path in (Path(config.output_dir) / "adapter").iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors", "base.json"]

    before, after = (load_policy(config.model, path) for path in (config.init_adapter, config.output_dir + "/adapter"))
    change = {
        side: math.fsum(log_prob(after, row[0], row[place]) - log_prob(before, row[0], row[place]) for row in PAIRS) / 4
        for place, side in ((1, "chosen"), (2, "rejected"))
    }
    assert artifact.metrics["chosen_log_prob_change"] == pytest.approx(change["chosen"], abs=1e-3)
    assert artifact.metrics["rejected_log_prob_change"] == pytest.approx(change["rejected"], abs=1e-3)
    assert change["chosen"] > change["rejected"]


@pytest.mark.parametrize(
    "reference",  # the log-probabilities of all are stored alike: one of them by default
    ["sft_adapter", pytest.param("base", marks=pytest.mark.slow), pytest.param("path", marks=pytest.mark.slow)],
)
def test_an_interrupted_run_continues_to_the_same_bytes(
    config: DPOConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: str
) -> None:
    if reference == "path":
        reference = write_adapter(config.model, tmp_path / "other", seed=2)
    config = replace(config, reference=reference)
    whole = run(replace(config, output_dir=str(tmp_path / "whole")))

    def on_step_end(self: StepReport, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StepReport, "on_step_end", on_step_end)
        run(config)
    artifact = run(replace(config, resume=True))
    assert artifact.metrics["continued_from_step"] == 2
    assert [entry["sha256"] for entry in artifact.outputs] == [entry["sha256"] for entry in whole.outputs]


def test_a_4bit_base_has_the_same_first_loss_and_float32_adapters(config: DPOConfig) -> None:
    config = replace(config, model=replace(config.model, quantization=Quantization.nf4))
    artifact = run(config)
    assert losses(config)[0]["loss"] == pytest.approx(LN_2, abs=1e-6)
    assert {check.name: check.detail for check in artifact.checks}["trainable_in_float32"] == "torch.float32"


def test_pairs_that_cannot_be_used_are_dropped_with_a_reason(config: DPOConfig) -> None:
    rows = [json.loads(line) for line in Path(config.data.path).read_text().splitlines()]
    rows[0]["chosen"][0]["content"] = "word " * 300
    rows[1]["rejected"][0]["content"] = "<|im_end|>"
    Path(config.data.path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    artifact = run(config)
    assert artifact.metrics["pairs"] == 2
    assert artifact.dropped == {
        "chosen: longer than max_length (256 tokens)": 1,
        "rejected: the text holds the special token <|im_end|>": 1,
    }


# -- what it refuses ---------------------------------------------------------------------------------------------------


def test_a_reference_adapter_that_is_missing_or_foreign_is_refused(config: DPOConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"reference=.*nowhere: no such file or folder"):
        run(replace(config, reference=str(tmp_path / "nowhere")))
    other_base = save_random_base(tmp_path / "other_base", seed=5)
    foreign = write_adapter(other_base, tmp_path / "foreign", seed=1)
    with pytest.raises(UserError, match=r"foreign was trained on the base '.*other_base', not on '.*base'"):
        run(replace(config, reference=foreign))


def test_resume_refuses_to_begin(config: DPOConfig) -> None:
    with pytest.raises(UserError, match="holds no checkpoint to resume from"):
        run(replace(config, resume=True))


def test_a_missing_policy_ends_with_one_message(config: DPOConfig, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [f"data.path={config.data.path}", f"output_dir={config.output_dir}", "run=nowhere"]
    assert run_command("dpo", arguments) == 2
    assert "init_adapter=runs/nowhere/sft/adapter: no such file or folder" in capsys.readouterr().err
