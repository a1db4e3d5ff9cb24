"""Step 0: which batch it takes, that training does not notice it, and what it says when memory does not suffice."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_training import TRAIN, adapter_weights, encoded, open_artifact, policy_for, train
from tiny_random import save_random_base, tokenizer

from alignkit.core.config import ModelConfig
from alignkit.core.errors import UserError
from alignkit.training import step_zero, supervised
from alignkit.training.batches import LengthGroupedSampler, planned_steps, share
from alignkit.training.step_zero import StepZero, largest_batch


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return save_random_base(tmp_path_factory.mktemp("base"))


def batches_read(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The batches on which a loss is computed, in order."""
    original: Any = supervised._Trainer.compute_loss
    seen: list[dict[str, Any]] = []

    def compute_loss(self: Any, model: Any, inputs: Any, *args: Any, **keywords: Any) -> Any:
        seen.append(dict(inputs))
        return original(self, model, inputs, *args, **keywords)

    monkeypatch.setattr(supervised._Trainer, "compute_loss", compute_loss)
    return seen


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_batch_with_the_most_padded_tokens_comes_first(
    model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulation: int
) -> None:
    seen = batches_read(monkeypatch)
    settings = replace(TRAIN, batch_size=2, gradient_accumulation=accumulation, epochs=2.0)
    train(tmp_path, policy_for(model), settings)
    first, rest = seen[0], seen[1:]
    assert first["input_ids"].numel() == max(batch["input_ids"].numel() for batch in rest)
    assert any(torch.equal(first["input_ids"], batch["input_ids"]) for batch in rest)


def test_the_plan_is_what_is_trained_on(model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row for row, over epochs, with accumulation and a smaller last step; tokens a second are counted by it."""
    seen = batches_read(monkeypatch)
    train(tmp_path, policy_for(model), replace(TRAIN, batch_size=2, gradient_accumulation=2, epochs=2.0))
    rows = encoded()
    batches = [(batch["input_ids"], batch["attention_mask"].bool()) for batch in seen[1:]]
    read = [row[mask].tolist() for ids, masks in batches for row, mask in zip(ids, masks, strict=True)]
    sampler = LengthGroupedSampler([len(row.input_ids) for row in rows], 4, seed=3)
    planned = list(planned_steps(sampler, 6))
    assert [len(step) for step in planned] == [4, 4, 2, 4, 4, 2]
    assert read == [rows[row].input_ids for step in planned for row in step]
    assert sampler.epoch == 0


def test_the_largest_batch_by_hand() -> None:
    lengths = [10, 1, 1, 1, 6, 6, 6, 5]

    fours, twos = [[0, 1, 2, 3], [4, 5, 6, 7]], [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert largest_batch(fours, lengths, math.inf) == [0, 1, 2, 3]  # 4 x 10 > 4 x 6
    assert largest_batch(fours, lengths, None) == [4, 5, 6, 7]  # 23 > 13
    assert largest_batch(twos, lengths, math.inf) == [0, 1]  # 2 x 10 > 2 x 6
    assert largest_batch(twos, lengths, None) == [4, 5]
    assert largest_batch(fours, lengths, 20) == [0, 1]  # in parts: 2 x 10 > 3 x 6
    assert largest_batch(fours, lengths, 19) == [4, 5, 6]  # 3 x 6 > 1 x 10


def test_training_is_the_same_with_and_without_it(
    model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and log lines, although it runs with dropout and noise."""
    settings = replace(TRAIN, neftune_alpha=5.0)
    with_it, without = policy_for(model, dropout=0.2), policy_for(model, dropout=0.2)
    found = train(tmp_path / "with", with_it, settings)
    monkeypatch.setattr(StepZero, "on_train_begin", lambda self, *args, **keywords: None)
    assert train(tmp_path / "without", without, settings) == found
    for name, weight in adapter_weights(without).items():
        assert torch.equal(weight, adapter_weights(with_it)[name]), name


@pytest.mark.parametrize("enabled", ["is_deepspeed_enabled", "is_fsdp_enabled"])
def test_where_weights_are_divided_it_says_that_it_is_left_out(enabled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(step_zero.LOG, "info", lines.append)
    trainer: Any = SimpleNamespace(**{"is_deepspeed_enabled": False, "is_fsdp_enabled": False, enabled: True})
    anything: Any = None
    StepZero(trainer, anything).on_train_begin(anything, anything, anything)
    assert lines == ["the largest batch is not tried before the first step: DeepSpeed and FSDP allow no such trial"]


@pytest.mark.parametrize(("rank", "expected"), [(0, [2, 0]), (1, [1])])
def test_each_process_tries_the_largest_batch_of_its_own(rank: int, expected: list[int]) -> None:
    """Steps of [0, 1, 2] and [3, 4, 5]: the turns are 0, 2 and 3, 5 for the first of two, 1 and 4 for the second."""
    lengths = [7, 9, 8, 1, 2, 3]
    batches = [batch for step in ([2, 1, 0], [3, 4, 5]) for batch in share(step, 4, rank, 2)]
    assert largest_batch(batches, lengths, math.inf) == expected


def test_too_little_memory_is_the_users_to_mend(
    model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **keywords: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(supervised._Trainer, "compute_loss", full)
    message = r"out of GPU memory with the largest batch, 4 rows of up to \d+ tokens, .*Lower train.batch_size"
    with pytest.raises(UserError, match=message):
        train(tmp_path, policy_for(model), TRAIN)


def test_its_peak_memory_is_recorded_on_a_gpu(
    model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_zero, "peak_gpu_memory_bytes", lambda: 123)
    with open_artifact(tmp_path) as artifact:
        supervised.train_supervised(policy_for(model), tokenizer(), encoded(), TRAIN, 3, artifact)
    assert artifact.metrics["step_0_peak_gpu_memory_bytes"] == 123
