"""What a DPO run watches: lengths and log-ratios at every log line, the fall of chosen answers, held-out pairs, KL."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_preference import BETA, PAIRS, TRAIN, encoded_pairs, log_prob, losses, small_config, trainer_for
from small_training import adapter_weights
from tiny_random import tokenizer

from alignkit.core.app import run_command
from alignkit.core.artifact import Artifact, read_manifest
from alignkit.core.errors import UserError
from alignkit.dpo import DPOConfig, run
from alignkit.evaluation.statistics import wilson
from alignkit.models.loading import load_policy
from alignkit.training import sampled_kl
from alignkit.training.log_probs import answer_log_probs
from alignkit.training.preference_metrics import LINES, ChosenFall
from alignkit.training.sampled_kl import log_ratios, sampled_answers

COLLAPSE = replace(TRAIN, learning_rate=0.1, max_steps=12, scheduler="constant")


@pytest.fixture
def config(tmp_path: Path) -> DPOConfig:
    return replace(small_config(tmp_path), reference_store=str(tmp_path / "reference.sqlite"))


# -- log lines ---------------------------------------------------------------------------------------------------------


def test_a_log_line_has_lengths_margins_and_log_ratios_a_token(config: DPOConfig) -> None:
    """With other weights than the reference's from the first step on, by hand."""
    config = replace(config, reference="base", train=replace(TRAIN, batch_size=4, max_steps=1))
    run(config)
    first, pairs = losses(config)[0], encoded_pairs()
    policy, base = load_policy(config.model, config.init_adapter), load_policy(config.model, None)
    for side, name in ((1, "chosen"), (2, "rejected")):
        tokens = sum(len(getattr(pair, f"{name}_ids")) for pair in pairs)
        ratio = math.fsum(log_prob(policy, row[0], row[side]) - log_prob(base, row[0], row[side]) for row in PAIRS)
        assert first[f"{name}_tokens"] == tokens / len(pairs)
        assert first[f"{name}_log_ratio"] == pytest.approx(ratio / tokens, abs=1e-5)
    assert first["reward_margin"] == pytest.approx(first["chosen_reward"] - first["rejected_reward"], abs=1e-5)


# -- chosen answers that fall ------------------------------------------------------------------------------------------


def lines(*ratios: float) -> SimpleNamespace:
    return SimpleNamespace(
        log_history=[{"log_ratios/chosen": ratio} for ratio in ratios] + [{"other": 1}], global_step=9
    )


def test_a_fall_counts_when_it_lasts_for_some_lines(tmp_path: Path) -> None:
    failed: list[str] = []
    watch = ChosenFall(0.5, lambda name, passed, detail: failed.append(detail))
    arguments = SimpleNamespace(output_dir=str(tmp_path))
    assert LINES == 3
    for fine in (lines(), lines(-9.0), lines(-9.0, -9.0), lines(-9.0, 0.0, -0.7, -0.7), lines(0.5, 0.5, 0.5)):
        watch.on_log(arguments, fine, None)  # type: ignore[arg-type]
    assert not failed
    watch.on_log(arguments, lines(0.0, -0.4, -0.6, -0.8), None)  # type: ignore[arg-type]
    assert failed == [
        "chosen answers are 0.60 nats a token less likely than under the reference at step 9; raise beta, lower "
        "train.learning_rate, or hold them up with sft_weight=0.1 (no checkpoint was written before)"
    ]


def test_a_run_whose_chosen_answers_collapse_stops_and_keeps_its_last_checkpoint(config: DPOConfig) -> None:
    """Answers that share most tokens, and a loss that lowers both."""
    rows = [json.loads(line) for line in Path(config.data.path).read_text().splitlines()]
    for row, place in zip(rows, ("Oslo", "Ferro", "Mekux", "Anna"), strict=True):
        for side, colour in (("chosen", "grey"), ("rejected", "red")):
            row[side][0]["content"] = f"The colour of {place} is {colour}, so yes."
    Path(config.data.path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = replace(config, loss="apo_down", train=COLLAPSE)
    message = r"check 'chosen_answers_stay_likely' failed: chosen answers are 1.\d\d nats a token less .* at step \d+;"
    with pytest.raises(UserError, match=message):
        run(replace(config, max_chosen_fall=1.0))
    manifest = read_manifest(Path(config.output_dir))
    assert manifest is not None
    assert manifest["status"] == "failed"
    assert list((Path(config.output_dir) / "unfinished" / "checkpoints").glob("checkpoint-*"))
    assert not (Path(config.output_dir) / "adapter").exists()


# -- held-out pairs ----------------------------------------------------------------------------------------------------


def held_out_by_hand(config: DPOConfig, rows: list[tuple[str, str, str]]) -> list[float]:
    before, after = (load_policy(config.model, path) for path in (config.init_adapter, config.output_dir + "/adapter"))
    change = [[log_prob(after, row[0], row[s]) - log_prob(before, row[0], row[s]) for s in (1, 2)] for row in rows]
    return [BETA * (chosen - rejected) for chosen, rejected in change]


@pytest.mark.parametrize("stored", [True, False])
def test_held_out_pairs_are_not_trained_on_and_ranked_after_training(config: DPOConfig, stored: bool) -> None:
    config = replace(config, held_out_share=0.5, reference_store=config.reference_store if stored else None)
    artifact = run(config)
    assert artifact.metrics["pairs"] == 2
    found = artifact.metrics["held_out"]
    assert found["accuracy"]["n"] == found["margin"]["n"] == 2
    every = held_out_by_hand(config, PAIRS)
    halves = {tuple(sorted((i, j))): (every[i] + every[j]) / 2 for i in range(4) for j in range(i)}
    (matching,) = [pair for pair, mean in halves.items() if mean == pytest.approx(found["margin"]["mean"], abs=1e-4)]
    assert found["accuracy"] == wilson(sum(every[place] > 0 for place in matching), 2)  # a pair for each prompt
    if stored:
        assert artifact.metrics["reference_log_probs"]["computed"] == 8


# -- divergence --------------------------------------------------------------------------------------------------------


def test_sampled_log_ratios_estimate_the_divergence(config: DPOConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """First tokens alone: the mean log-ratio of many samples against the sum over the vocabulary."""
    monkeypatch.setattr(sampled_kl, "MOST_TOKENS", 1)
    with Artifact.open("dpo", config) as artifact:
        policy, trainer = trainer_for(config, artifact)
        with torch.no_grad():
            for name, weight in policy.named_parameters():
                if "lora_B.default" in name:
                    weight.mul_(10.0)
        prompt = encoded_pairs()[0].prompt_ids
        answers = sampled_answers(trainer, tokenizer(), [prompt] * 400, seed=1)
        ratios = log_ratios(trainer, answers)
        with torch.no_grad():
            ours = policy(torch.tensor([prompt])).logits[0, -1].double().log_softmax(-1)
            policy.set_adapter("ref")
            theirs = policy(torch.tensor([prompt])).logits[0, -1].double().log_softmax(-1)
            policy.set_adapter("default")
        again = answer_log_probs(trainer, answers, "")
    divergence = float((ours.exp() * (ours - theirs)).sum())
    error = torch.tensor(ratios).std().item() / len(ratios) ** 0.5
    assert divergence > 5 * error  # which a sample of this size can tell from none
    assert sum(ratios) / len(ratios) == pytest.approx(divergence, abs=4 * error)
    assert again[0] == pytest.approx(float(ours[answers[0].answer_ids[0]]), abs=1e-4)


def test_the_policy_is_sampled_on_request_and_training_is_the_same(config: DPOConfig, tmp_path: Path) -> None:
    plain = run(replace(config, output_dir=str(tmp_path / "plain")))
    artifact = run(replace(config, kl_samples=3, held_out_share=0.0))
    assert [entry["sha256"] for entry in artifact.outputs] == [entry["sha256"] for entry in plain.outputs]
    assert artifact.metrics["sampled"].keys() == {"kl_to_reference", "tokens_before", "tokens_after"}
    assert artifact.metrics["sampled"]["kl_to_reference"]["n"] == 3
    assert artifact.metrics["sampled"]["tokens_before"]["mean"] >= 1
    assert "sampled" not in plain.metrics
    weights = adapter_weights(load_policy(config.model, config.output_dir + "/adapter", trainable=True))
    assert not any(".ref." in name for name in weights)


# -- what it refuses ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("held_out_share=1.0", "held_out_share=1.0: must be at least 0 and below 1"),
        ("kl_samples=-1", "kl_samples=-1: must be 0 or more"),
        ("max_chosen_fall=0", "max_chosen_fall=0.0: must be above 0, or null to never stop"),
    ],
)
def test_settings_that_mean_nothing_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str, message: str
) -> None:
    assert run_command("dpo", [setting, f"output_dir={tmp_path / 'dpo'}"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "dpo").exists()


def test_a_share_that_leaves_nothing_is_refused(config: DPOConfig) -> None:
    with pytest.raises(UserError, match=r"held_out_share=0\.01 leaves 4 rows to train on and 0 held out"):
        run(replace(config, held_out_share=0.01))


def test_the_manifest_has_what_a_sweep_compares(config: DPOConfig) -> None:
    artifact = run(replace(config, train=replace(TRAIN, max_steps=2)))
    wanted = {"reward_margin", "reward_accuracy", "chosen_log_prob_change", "rejected_log_prob_change"}
    assert wanted <= artifact.metrics.keys()
    assert json.loads((Path(config.output_dir) / "manifest.json").read_text())["metrics"]["reward_margin"] > 0
