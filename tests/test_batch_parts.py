"""Batches that go through the model in parts: how they are cut, and that nothing but memory changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_training import TRAIN, adapter_weights, encoded, policy_for, train
from tiny_random import save_random_base
from trl import SFTTrainer

from alignkit.training.batches import parts


@pytest.mark.parametrize(
    ("lengths", "max_tokens", "expected"),
    [
        ([3, 4, 5], 15, [(0, 3)]),
        ([3, 4, 5], 14, [(0, 2), (2, 3)]),  # 3 rows of 5 would be 15 tokens
        ([2, 2, 9, 2], 9, [(0, 2), (2, 3), (3, 4)]),
        ([50, 60], 10, [(0, 1), (1, 2)]),  # a row is never cut
        ([7], 100, [(0, 1)]),
    ],
)
def test_parts_hold_at_most_so_many_tokens(
    lengths: list[int], max_tokens: int, expected: list[tuple[int, int]]
) -> None:
    assert [(part.start, part.stop) for part in parts(lengths, max_tokens)] == expected


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_batch_in_parts_learns_the_same(tmp_path: Path, accumulation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_random_base(tmp_path / "base")
    settings = replace(
        TRAIN, batch_size=8 // accumulation, gradient_accumulation=accumulation, max_steps=2, logging_steps=1
    )
    longest = max(len(row.input_ids) for row in encoded()[:8])
    shapes: list[torch.Size] = []
    original: Any = SFTTrainer.training_step

    def training_step(self: Any, model: Any, inputs: Any, number: Any = None) -> Any:
        shapes.append(inputs["input_ids"].shape)
        return original(self, model, inputs, number)

    monkeypatch.setattr(SFTTrainer, "training_step", training_step)
    whole, cut = policy_for(model), policy_for(model)
    rows = encoded()[:8]
    expected = train(tmp_path / "whole", whole, settings, rows)
    of_whole = len(shapes)
    found = train(tmp_path / "cut", cut, replace(settings, max_batch_tokens=2 * longest), rows)
    in_parts = shapes[of_whole:]
    assert len(in_parts) > of_whole == 2 * accumulation
    assert max(shape.numel() for shape in in_parts) <= 2 * longest < max(s.numel() for s in shapes[:of_whole])
    for key in ("loss", "gradient_norm"):
        assert [row[key] for row in found] == pytest.approx([row[key] for row in expected], rel=1e-4)
    for name, weight in adapter_weights(whole).items():
        assert torch.allclose(weight, adapter_weights(cut)[name], atol=1e-4), name
