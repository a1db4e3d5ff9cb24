"""Packed rows and rows without padding: the same loss and gradients as padded ones, and no row sees another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_training import TRAIN, adapter_weights, encoded, mean_loss, open_artifact, policy_for, train
from tiny_random import save_random_base
from transformers import AttentionInterface
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from alignkit.core.config import ModelConfig, TrainConfig
from alignkit.core.errors import UserError
from alignkit.data.chat import EncodedExample
from alignkit.training.arguments import refuse_what_only_sft_has
from alignkit.training.packing import check_rows_apart, pack

ONE_STEP = replace(TRAIN, batch_size=16, max_steps=1)
LENGTH = 128


@pytest.fixture(params=["sdpa", "eager"])
def model(tmp_path: Path, request: pytest.FixtureRequest) -> ModelConfig:
    return replace(save_random_base(tmp_path / "base"), attn=request.param)


@pytest.fixture
def sdpa(tmp_path: Path) -> ModelConfig:
    return save_random_base(tmp_path / "base")


@pytest.mark.parametrize("kind", ["packing", "padding_free"])
def test_the_loss_and_the_step_are_those_of_padded_rows(model: ModelConfig, tmp_path: Path, kind: str) -> None:
    padded, apart = policy_for(model), policy_for(model)
    expected = train(tmp_path / "padded", padded, ONE_STEP)
    settings = replace(ONE_STEP, packing=kind == "packing", padding_free=kind == "padding_free")
    found = train(tmp_path / "apart", apart, settings)
    assert found[0]["loss"] == pytest.approx(mean_loss(policy_for(model), encoded()), abs=1e-5)
    assert found[0]["gradient_norm"] == pytest.approx(expected[0]["gradient_norm"], rel=1e-4)
    for name, weight in adapter_weights(padded).items():
        assert torch.allclose(weight, adapter_weights(apart)[name], atol=1e-4), name


def gradients(policy: Any, batches: list[dict[str, Any]], learned: int) -> dict[str, torch.Tensor]:
    """Of the summed loss of some batches over the number of learned tokens."""
    for batch in batches:
        labels = batch.pop("labels")
        log_probs = policy.train()(**batch, use_cache=False).logits[:, :-1].log_softmax(-1)
        place = labels[:, 1:] != -100
        (-log_probs[place].gather(1, labels[:, 1:][place][:, None]).sum() / learned).backward()
    return {name: weight.grad for name, weight in policy.named_parameters() if weight.grad is not None}


def test_every_gradient_is_that_of_the_rows_one_by_one(model: ModelConfig, tmp_path: Path) -> None:
    rows = encoded()
    learned = sum(label != -100 for row in rows for label in row.labels)
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    with open_artifact(tmp_path / "run") as artifact:
        packs = [collate([row]) for row in pack(rows, LENGTH, artifact)]
    assert 1 < len(packs) < len(rows)
    single = [{"input_ids": torch.tensor([row.input_ids]), "labels": torch.tensor([row.labels])} for row in rows]
    expected, found = gradients(policy_for(model), single, learned), gradients(policy_for(model), packs, learned)
    assert expected.keys() == found.keys()
    assert any(gradient.abs().max() > 1e-3 for gradient in expected.values())
    for name, gradient in expected.items():
        assert torch.allclose(gradient, found[name], atol=1e-6), name


def test_a_packs_positions_begin_again_with_each_row_and_hold_every_row(tmp_path: Path) -> None:
    rows = encoded()
    with open_artifact(tmp_path) as artifact:
        packs = pack(rows, LENGTH, artifact)
    collate, found = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True), []
    for packed in packs:
        batch = collate([packed])
        assert batch["position_ids"].tolist() == [[p for length in packed["seq_lengths"] for p in range(length)]]
        assert batch["input_ids"].shape[1] <= LENGTH
        ends = torch.tensor(packed["seq_lengths"]).cumsum(0).tolist()
        found += [packed["input_ids"][a:b] for a, b in zip([0, *ends], ends, strict=False)]
    assert sorted(found) == sorted(row.input_ids for row in rows)
    tokens = sum(len(row.input_ids) for row in rows)
    expected = {"sequences": len(packs), "efficiency": round(tokens / (len(packs) * LENGTH), 4)}
    assert artifact.metrics["packing"] == expected


def test_a_row_that_packing_would_cut_stops_the_run(tmp_path: Path) -> None:
    with open_artifact(tmp_path) as artifact, pytest.raises(UserError, match="'packing_keeps_every_token' failed"):
        pack([EncodedExample(list(range(LENGTH + 1)), list(range(LENGTH + 1)))], LENGTH, artifact)


def test_the_whole_data_set_is_packed_at_once(tmp_path: Path) -> None:
    """1,500 long rows before 1,500 short ones: a thousand at a time, no long row would meet its short one."""
    rows = [EncodedExample([1] * size, [1] * size) for size in (100, 28) for _ in range(1500)]
    with open_artifact(tmp_path) as artifact:
        assert len(pack(rows, LENGTH, artifact)) == 1500
    assert artifact.metrics["packing"]["efficiency"] == 1.0


def test_rows_do_not_see_each_other(model: ModelConfig, tmp_path: Path) -> None:
    with open_artifact(tmp_path / "run") as artifact:
        check_rows_apart(policy_for(model), encoded(), artifact)
    assert artifact.checks[0].name == "packed_rows_apart"


def test_an_attention_that_lets_rows_see_each_other_is_refused(sdpa: ModelConfig, tmp_path: Path) -> None:
    """An implementation that transformers gives no mask: each row sees all that stands before it."""

    def leaky(module: Any, query: Any, key: Any, value: Any, *args: Any, scaling: float, **keywords: Any) -> Any:
        key, value = (part.repeat_interleave(module.num_key_value_groups, dim=1) for part in (key, value))
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(query, key, value, is_causal=True, scale=scaling).transpose(1, 2), None

    AttentionInterface.register("leaky", leaky)
    with pytest.raises(UserError, match=r"'packed_rows_apart' failed: leaky: .* choose model.attn=sdpa or no packing"):
        train(tmp_path / "run", policy_for(replace(sdpa, attn="leaky")), replace(ONE_STEP, packing=True))


def test_a_batch_counts_sequences_and_steps_are_those_of_sequences(sdpa: ModelConfig, tmp_path: Path) -> None:
    settings = replace(TRAIN, packing=True, batch_size=1, epochs=2.0, max_steps=-1)
    with open_artifact(tmp_path / "packs") as artifact:
        packs = len(pack(encoded(), LENGTH, artifact))
    assert train(tmp_path / "run", policy_for(sdpa), settings)[-1]["step"] == 2 * packs


@pytest.mark.parametrize(
    "given", [{"packing": True}, {"padding_free": True}, {"neftune_alpha": 5.0}, {"eval_steps": 5}, {"patience": 1}]
)
def test_other_objectives_refuse_what_only_sft_has(given: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"train.{next(iter(given))}: only sft has it, leave it out here"):
        refuse_what_only_sft_has(TrainConfig(**given))
    refuse_what_only_sft_has(TrainConfig())
