"""Kinds of adapters: each trains, comes back with equal logits on the base as it was, and is continued."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from small_training import TRAIN, adapter_weights, encoded, mean_loss, open_artifact, policy_for, train
from test_sft import write_questions
from tiny_random import save_random_base, tokenizer

from alignkit.core.app import run_command
from alignkit.core.config import LoraConfig, LoraInit, ModelConfig, Quantization
from alignkit.core.errors import UserError
from alignkit.models.loading import load_base, load_policy, save_adapter
from alignkit.models.pissa import FOLDER, check_init, keep_initial
from alignkit.training.supervised import train_supervised

KINDS: dict[str, dict[str, Any]] = {
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "rslora+dora": {"rslora": True, "dora": True},
    "pissa": {"init": LoraInit.pissa},
    "pissa+rslora": {"init": LoraInit.pissa, "rslora": True},
}
STEPS = replace(TRAIN, max_steps=3)


@pytest.fixture
def model(tmp_path: Path) -> ModelConfig:
    return save_random_base(tmp_path / "base")


def logits(policy: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = policy.eval()(torch.tensor([encoded()[1].input_ids])).logits
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_trains_and_comes_back_on_the_original_base(model: ModelConfig, tmp_path: Path, kind: str) -> None:
    policy, initial = policy_for(model, **KINDS[kind]), None
    untrained, base = logits(policy), logits(load_base(model))
    assert torch.allclose(untrained, base, atol=1e-4)  # whatever it starts as, it starts by changing nothing
    if "pissa" in kind:
        initial = tmp_path / FOLDER
        keep_initial(policy, initial)
    with open_artifact(tmp_path / "run") as artifact:
        train_supervised(policy, tokenizer(), encoded(), STEPS, seed=3, artifact=artifact)
    assert {"adapter_moved", "trainable_in_float32"} <= {check.name for check in artifact.checks if check.passed}
    trained = logits(policy)
    assert (trained - base).abs().max() > 0.05

    save_adapter(policy, tmp_path / "adapter", model, initial)
    loaded = load_policy(model, str(tmp_path / "adapter"))
    assert torch.allclose(logits(loaded), trained, atol=1e-4)
    if "pissa" not in kind:
        assert torch.equal(logits(loaded), trained)
    assert torch.allclose(logits(loaded.merge_and_unload()), trained, atol=1e-4)


@pytest.mark.parametrize("kind", ["dora", "pissa"])
def test_an_adapter_is_continued_from_where_it_stands(model: ModelConfig, tmp_path: Path, kind: str) -> None:
    policy = policy_for(model, **KINDS[kind])
    initial = tmp_path / FOLDER if kind == "pissa" else None
    if initial:
        keep_initial(policy, initial)
    train(tmp_path / "first", policy, STEPS)
    save_adapter(policy, tmp_path / "adapter", model, initial)
    continued = load_policy(model, str(tmp_path / "adapter"), trainable=True)
    expected = mean_loss(continued, encoded())
    losses = train(tmp_path / "second", continued, replace(STEPS, batch_size=16, logging_steps=1))
    assert losses[0]["loss"] == pytest.approx(expected, abs=1e-5)
    assert losses[-1]["loss"] < losses[0]["loss"]
    if kind == "pissa":
        assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 2 * 4


def test_rslora_scales_by_the_root_of_the_rank(model: ModelConfig) -> None:
    def scaling(policy: Any) -> float:
        return float(next(m.scaling["default"] for m in policy.modules() if isinstance(m, LoraLayer)))

    assert scaling(policy_for(model)) == 8 / 4
    assert scaling(policy_for(model, rslora=True)) == 8 / math.sqrt(4)


def test_pissa_takes_the_largest_directions_out_of_the_base(model: ModelConfig) -> None:
    """By the definition: what is left of a weight has lost its largest singular values, and A and B hold them."""
    whole: Any = load_base(model).get_submodule("model.layers.0.mlp.up_proj").weight
    values = torch.linalg.svdvals(whole)
    layer = policy_for(model, init=LoraInit.pissa).base_model.model.model.layers[0].mlp.up_proj
    rest, added = layer.base_layer.weight, layer.get_delta_weight("default")
    assert torch.allclose(torch.linalg.svdvals(rest)[: len(values) - 4], values[4:], atol=1e-4)
    assert torch.allclose(torch.linalg.svdvals(added)[:4], values[:4], atol=1e-4)
    assert torch.allclose(rest + added, whole, atol=1e-5)


def test_dora_over_a_4bit_base_keeps_magnitudes_and_matrices_in_float32(model: ModelConfig, tmp_path: Path) -> None:
    policy = policy_for(replace(model, quantization=Quantization.nf4), dora=True)
    before = adapter_weights(policy)
    assert any("lora_magnitude_vector" in name for name in before)
    train(tmp_path / "run", policy, STEPS)
    for name, weight in adapter_weights(policy).items():
        assert weight.dtype == torch.float32, name
        assert not torch.equal(weight, before[name]), name


@pytest.mark.parametrize(
    ("lora", "quantization", "message"),
    [
        (LoraConfig(init=LoraInit.pissa), Quantization.nf4, "give model.quantization=none or lora.init=default"),
        (LoraConfig(init=LoraInit.pissa, dora=True), Quantization.none, "lora.dora=true is not: give one of them"),
    ],
)
def test_pissa_is_refused_where_it_cannot_be_saved(lora: LoraConfig, quantization: Quantization, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_init(lora, ModelConfig(name="m", path="m", quantization=quantization))


def test_a_pissa_run_continues_only_with_the_base_split_the_same_way(model: ModelConfig, tmp_path: Path) -> None:
    policy = policy_for(model, init=LoraInit.pissa)
    keep_initial(policy, tmp_path / FOLDER)
    keep_initial(policy_for(model, init=LoraInit.pissa), tmp_path / FOLDER)  # the same machine does it again
    with torch.no_grad():
        next(weight for name, weight in policy.named_parameters() if "lora_A" in name).mul_(1.001)
    with pytest.raises(UserError, match="splits the base differently"):
        keep_initial(policy, tmp_path / FOLDER)


def test_a_pissa_adapter_that_was_not_converted_is_refused(model: ModelConfig, tmp_path: Path) -> None:
    policy_for(model, init=LoraInit.pissa).save_pretrained(str(tmp_path / "raw"))
    with pytest.raises(UserError, match="raw holds PiSSA's directions"):
        load_policy(model, str(tmp_path / "raw"))


def test_the_commands_train_each_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_questions(tmp_path / "questions.jsonl", 8)
    common = ["model=tiny", f"data.path={data}", "train.max_steps=1", "train.warmup_share=0", "train.tracker=none"]
    for number, kind in enumerate(("lora.dora=true", "lora.init=pissa")):
        assert run_command("sft", [*common, kind, f"output_dir={tmp_path / str(number)}"]) == 0
    assert run_command("sft", [*common, "lora.init=pissa", "model.quantization=nf4", f"output_dir={tmp_path}/x"]) == 2
    assert "error: lora.init=pissa changes the base's weights, which model.quantization=nf4" in capsys.readouterr().err
