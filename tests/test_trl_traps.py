"""What TRL, PEFT and transformers do silently and alignkit must not: a test for each trap, named after it.

Traps that are the subject of other files: labels (test_chat.py), packing across rows (test_packing.py), scores that
depend on padding (test_reward_model.py), the reference of a DPO run (test_dpo.py).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from small_preference import PAIRS, encoded_pairs, write_adapter
from small_training import TRAIN, encoded, open_artifact, policy_for, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_interruption import signalled_at
from tiny_random import conversation, save_random_base, tokenizer
from transformers import TrainingArguments
from trl import DPOConfig as TRLDPOConfig
from trl import SFTConfig as TRLSFTConfig
from trl.trainer import base_trainer

from alignkit import dpo
from alignkit.core.artifact import Artifact
from alignkit.core.config import LoraConfig, ModelConfig, Quantization, RowsConfig, TrainConfig
from alignkit.core.errors import UserError
from alignkit.generation.hf import merge_adapter
from alignkit.models.loading import load_base, load_policy, new_adapter, save_adapter
from alignkit.models.reward_model import RewardModel
from alignkit.models.value_head import ValueHeadModel
from alignkit.training import preference, supervised
from alignkit.training.arguments import trainer_arguments
from alignkit.training.batches import StepTrainer
from alignkit.training.fit import fit, trainable_in_float32
from alignkit.training.preference_losses import Objective
from alignkit.training.reference import check_reference, set_reference

ROOT = Path(__file__).resolve().parents[1]
SLOW = TrainConfig(learning_rate=1e-6, scheduler="constant", warmup_share=0.0, batch_size=4, max_steps=5, save_steps=9)


@pytest.fixture
def model(tmp_path: Path) -> ModelConfig:
    return save_random_base(tmp_path / "base")


def dpo_config(model: ModelConfig, folder: Path, **changes: Any) -> dpo.DPOConfig:
    rows = []
    for number, (question, chosen, rejected) in enumerate(PAIRS):
        turns = [[message.model_dump() for message in conversation(question, text)] for text in (chosen, rejected)]
        rows.append({"id": f"p{number}", "prompt": turns[0][:1], "chosen": turns[0][1:], "rejected": turns[1][1:]})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = dpo.DPOConfig(
        name="dpo",
        output_dir=str(folder / "dpo"),
        data=RowsConfig(path=str(folder / "pairs.jsonl")),
        init_adapter=write_adapter(model, folder / "sft", seed=1),
        model=model,
        train=replace(SLOW, learning_rate=5e-3, max_steps=4, batch_size=2, logging_steps=1, save_steps=2),
    )
    return replace(config, **changes)


def dpo_trainer(config: dpo.DPOConfig, artifact: Artifact) -> tuple[Any, Any]:
    policy = load_policy(config.model, config.init_adapter, trainable=True)
    objective = Objective(config.reference, config.beta)
    built = preference.build_trainer(policy, tokenizer(), encoded_pairs(), objective, config.train, 1, artifact)
    return policy, built


# -- 1, 2: training that trains nothing --------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_bf16_adapters_over_a_4bit_base_do_not_move_at_small_learning_rates(
    model: ModelConfig, tmp_path: Path, stage: str
) -> None:
    """With TRL's cast 3 % of a continued adapter's weights ever change at 1e-6; here all that have a gradient do."""
    model = replace(model, quantization=Quantization.nf4)
    config = dpo_config(model, tmp_path, train=SLOW)
    before = load_policy(model, config.init_adapter)
    if stage == "dpo":
        dpo.run(config)
        after = load_policy(model, config.output_dir + "/adapter")
    else:
        after = load_policy(model, config.init_adapter, trainable=True)
        train(tmp_path / "run", after, SLOW)
    pairs = zip(before.named_parameters(), after.named_parameters(), strict=True)
    changed = [(old != new).float().mean() for (name, old), (_, new) in pairs if "lora_" in name]
    assert min(changed) > 0.9


def test_a_frozen_adapter_trains_to_the_end_without_an_error(model: ModelConfig, tmp_path: Path) -> None:
    config = dpo_config(model, tmp_path)
    frozen = load_policy(model, config.init_adapter)
    message = "check 'trainable_parameters' failed: none: the adapter is frozen"
    with pytest.raises(UserError, match=message):
        train(tmp_path / "run", frozen, TRAIN)
    with Artifact.open("dpo", config) as artifact, pytest.raises(UserError, match=message):
        objective = Objective("base", 0.1)
        preference.build_trainer(frozen, tokenizer(), encoded_pairs(), objective, config.train, 1, artifact)


# -- 3 to 7: DPO -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", ["sft_adapter", "base"])
def test_the_reference_is_reloaded_from_the_base_behind_a_merged_policy(
    model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: str
) -> None:
    """Here the base is loaded once, the policy is never merged, and the reference is an adapter or its absence."""
    config = dpo_config(model, tmp_path, reference=reference)
    original, loaded = transformers.AutoModelForCausalLM.from_pretrained, []

    def from_pretrained(source: str, **keywords: Any) -> Any:
        loaded.append(source)
        return original(source, **keywords)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    with Artifact.open("dpo", config) as artifact:
        policy, trainer = dpo_trainer(config, artifact)
        set_reference(policy, reference)
        pairs = preference.pairs_dataset(encoded_pairs())
        check_reference(trainer, policy, reference, pairs, artifact)
    assert loaded == [model.path]
    assert trainer.ref_model is None
    assert set(policy.peft_config) == ({"default", "ref"} if reference == "sft_adapter" else {"default"})


def test_an_adapter_not_named_default_is_a_key_error(model: ModelConfig, tmp_path: Path) -> None:
    """PEFT keeps another name in a folder of that name; loaded from there, it is "default" like any other."""
    policy = policy_for(model)
    policy.add_adapter("other", policy.peft_config["default"])
    policy.save_pretrained(str(tmp_path / "peft"), selected_adapters=["other"])
    loaded = load_policy(model, str(tmp_path / "peft" / "other"), trainable=True)
    assert list(loaded.peft_config) == ["default"]
    config = dpo_config(model, tmp_path, init_adapter=str(tmp_path / "peft" / "other"))
    assert dpo.run(config).status == "complete"


def test_the_reference_adapter_is_saved_in_checkpoints_and_exports(
    model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sealed: list[list[str]] = []
    original = fit

    def noting(*args: Any, **keywords: Any) -> Any:
        losses = original(*args, **keywords)
        checkpoints = (tmp_path / "dpo" / "unfinished" / "checkpoints").glob("checkpoint-*")
        sealed.extend(sorted(str(file.relative_to(folder)) for file in folder.rglob("*")) for folder in checkpoints)
        return losses

    monkeypatch.setattr(preference, "fit", noting)
    dpo.run(dpo_config(model, tmp_path))
    assert len(sealed) == 1
    assert "adapter_model.safetensors" in sealed[0]
    assert not any(name.startswith("ref") for name in sealed[0])
    files = sorted(path.name for path in (tmp_path / "dpo" / "adapter").iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors", "base.json"]


def test_a_stale_cache_of_precomputed_reference_log_probs(model: ModelConfig, tmp_path: Path) -> None:
    """TRL's is never made. Ours is keyed by what decides its numbers (test_reference_store.py)."""
    config = dpo_config(model, tmp_path)
    with Artifact.open("dpo", config) as artifact:
        _, trainer = dpo_trainer(config, artifact)
    assert trainer.precompute_ref_logps is False
    assert not [name for name in trainer.train_dataset.column_names if "ref" in name]


def test_group_by_length_fails_without_input_ids(model: ModelConfig, tmp_path: Path) -> None:
    """Grouping is ours, over the lengths of whole pairs; TRL's strategy is not asked for."""
    config = dpo_config(model, tmp_path)
    with Artifact.open("dpo", config) as artifact:
        _, trainer = dpo_trainer(config, artifact)
    assert trainer.args.train_sampling_strategy == "random"
    assert isinstance(trainer, StepTrainer)
    assert list(trainer.sampler.lengths) == [len(pair) for pair in encoded_pairs()]


# -- 8: the reward model's head ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", Quantization)
def test_the_reward_head_is_cast_to_bf16_and_scores_come_in_steps(
    model: ModelConfig, tmp_path: Path, quantization: Quantization
) -> None:
    """And an adapter of a causal model fits the reward model although its task is another."""
    model = replace(model, dtype="bfloat16", quantization=quantization)
    policy = load_policy(model, write_adapter(model, tmp_path / "sft", seed=1), trainable=True)
    reward_model = RewardModel(ValueHeadModel(policy), tokenizer(), model)
    with open_artifact(tmp_path / "run") as artifact, trainable_in_float32(reward_model.module, artifact):
        for weight in reward_model.module.parameters():
            if weight.requires_grad:
                weight.data = weight.data.to(torch.bfloat16)
    assert {weight.dtype for weight in reward_model.module.value_head.parameters()} == {torch.float32}
    scores = reward_model.scores_or_reasons([conversation(question, answer) for question, answer, _ in PAIRS])
    values = torch.tensor([score for score in scores if isinstance(score, float)])
    assert len(values) == len(PAIRS)
    assert not torch.equal(values, values.to(torch.bfloat16).float())


# -- 9: dtypes and CPUs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [TRLSFTConfig, TRLDPOConfig, TrainingArguments])
def test_bf16_is_the_default_and_refused_on_a_cpu(tmp_path: Path, kind: Any) -> None:
    """The base's dtype decides, and a machine without a GPU is told so."""
    for dtype in (torch.float32, torch.bfloat16):
        made = trainer_arguments(kind, TRAIN, tmp_path / "run" / "checkpoints", rows=4, seed=1, dtype=dtype)
        assert made.bf16 == (dtype == torch.bfloat16)
        assert made.use_cpu == (not torch.cuda.is_available())
        assert not made.fp16


def test_what_is_not_quantised_of_a_4bit_base_is_held_in_float32(model: ModelConfig) -> None:
    """Embeddings and output layer of a 7B model would take 2.5 GB more."""
    base = load_base(replace(model, quantization=Quantization.nf4, dtype="bfloat16"))
    assert base.get_input_embeddings().weight.dtype == torch.bfloat16
    assert base.get_output_embeddings().weight.dtype == torch.bfloat16
    assert base.config.quantization_config.bnb_4bit_compute_dtype == torch.bfloat16


# -- 10, 11: quantised models ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [{"quantization": Quantization.nf4}, {"dtype": "bfloat16"}])
def test_merging_into_4_bits_rounds_again(model: ModelConfig, tmp_path: Path, change: dict[str, Any]) -> None:
    """Decoding merges where nothing is rounded; besides it only models/merging.py may, which dequantises first."""
    policy = load_policy(replace(model, **change), write_adapter(model, tmp_path / "sft", seed=1))
    assert merge_adapter(policy) is policy
    sources = (ROOT / "src/alignkit").rglob("*.py")
    merging = {path.name for path in sources if "merge_and_unload" in path.read_text(encoding="utf-8")}
    assert merging <= {"hf.py", "merging.py", "encoder.py"}  # an encoder is never held in 4 bits


def test_a_quantisation_config_beside_a_model_instance_is_ignored(model: ModelConfig, tmp_path: Path) -> None:
    """Trainers get models that are loaded already, and no words about how to load them."""
    kinds: Any = (TRLSFTConfig, TRLDPOConfig)
    for kind in kinds:
        made = trainer_arguments(kind, TRAIN, tmp_path / "run" / "ckpt", rows=4, seed=1, dtype=torch.float32)
        assert made.model_init_kwargs is None
    policy = policy_for(replace(model, quantization=Quantization.nf4))
    assert policy.get_base_model().config.quantization_config.bnb_4bit_quant_type == "nf4"


# -- 12 to 14 ----------------------------------------------------------------------------------------------------------


def test_several_visible_gpus_without_a_launcher_split_the_batch(
    model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer of transformers does so silently, TRL's stop with a traceback; here one sentence says what to do."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=r"one process sees 2 GPUs and can train on one: .*CUDA_VISIBLE_DEVICES=0"):
        dpo.run(dpo_config(model, tmp_path))


@pytest.mark.parametrize("stage", ["sft", pytest.param("dpo", marks=pytest.mark.slow)])  # one callback of ours for both
def test_the_count_of_tokens_begins_again_at_0_after_a_resume(
    model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    def work(name: str) -> Path:
        if stage == "sft":
            train(tmp_path / name, policy_for(model), TRAIN)
            return tmp_path / name / "sft"
        (tmp_path / name).mkdir(exist_ok=True)
        dpo.run(dpo_config(model, tmp_path / name))
        return tmp_path / name / "dpo"

    def tokens(folder: Path) -> list[tuple[int, float]]:
        events = EventAccumulator(str(folder / "tensorboard"))
        events.Reload()
        return [(event.step, event.value) for event in events.Scalars("train/num_tokens")]

    whole = tokens(work("whole"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        signalled_at(2, patch)
        work("cut")
    resumed = tokens(work("cut"))
    assert resumed == whole
    if stage == "sft":
        assert whole[-1][1] == TRAIN.epochs * sum(len(row.input_ids) for row in encoded())


@pytest.mark.parametrize("trainer", [supervised._Trainer, preference._Trainer])
def test_trainers_send_telemetry(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """From Python too, where no command has switched it off."""

    def send(*args: Any, **keywords: Any) -> None:
        raise AssertionError("telemetry")

    monkeypatch.setattr(base_trainer, "send_telemetry", send)
    trainer._send_telemetry(SimpleNamespace())


def test_commands_leave_the_telemetry_of_the_hub_on() -> None:
    code = (
        "from alignkit.core.app import guarded\n"
        "def work():\n"
        "    from huggingface_hub import constants\n"
        "    return 0 if constants.HF_HUB_DISABLE_TELEMETRY else 7\n"
        "raise SystemExit(guarded('sft', work))\n"
    )
    kept = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_DISABLE_TELEMETRY", "CI")}
    environment = {**kept, "PYTHONPATH": str(ROOT / "src")}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False, timeout=60).returncode == 0


def test_a_continued_adapter_is_saved_as_it_was_trained(model: ModelConfig, tmp_path: Path) -> None:
    """In float32, so that the rounding of a bf16 file does not undo the last steps."""
    torch.manual_seed(1)
    policy = new_adapter(load_base(replace(model, dtype="bfloat16")), LoraConfig(rank=4), ["all-linear"])
    save_adapter(policy, tmp_path / "adapter", model)
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
