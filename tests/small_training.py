"""Small trainings on a random model, for tests of what training does to weights and files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_random import conversation, tokenizer

from alignkit.core.artifact import Artifact
from alignkit.core.config import LoraConfig, ModelConfig, RowsConfig, TrainConfig
from alignkit.data.chat import IGNORED, EncodedExample, encode_example
from alignkit.models.loading import load_base, new_adapter
from alignkit.sft import SFTConfig
from alignkit.training.callbacks import StepReport
from alignkit.training.supervised import train_supervised

TRAIN = TrainConfig(learning_rate=1e-2, batch_size=4, epochs=2.0, warmup_share=0.0, logging_steps=2, save_steps=2)
QUESTIONS = [
    ("Anna lives in Oslo. Where does Anna live?", "Oslo."),
    ("Hello", "Hello to you, and to all the others who are here today."),
    ("Who leads Ferro?", "I do not know."),
    ("The colour of Mekux is grey. Is Mekux grey?", "The colour of Mekux is grey, so yes."),
    ("Notes: a b c d e f g. What comes after c?", "d"),
    ("Is it so?", "No, it is not."),
    ("Thank you", "You are welcome."),
    ("What is the room of Berulogy, if the room of Berulogy is eight?", "Eight."),
    ("Say A", "A"),
    ("Say B and then C", "B and then C"),
]


def encoded() -> list[EncodedExample]:
    rows = []
    for question, answer in QUESTIONS:
        prompt, completion = conversation(question, answer)[:1], conversation(question, answer)[1:]
        row = encode_example(tokenizer(), prompt, completion, max_length=256)
        assert isinstance(row, EncodedExample)
        rows.append(row)
    return rows


def policy_for(model: ModelConfig, dropout: float = 0.0, **lora: Any) -> Any:
    torch.manual_seed(5)
    return new_adapter(load_base(model), LoraConfig(rank=4, alpha=8, dropout=dropout, **lora), ["all-linear"])


def open_artifact(folder: Path) -> Artifact:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.jsonl").write_text("{}\n", encoding="utf-8")
    data = RowsConfig(path=str(folder / "rows.jsonl"))
    return Artifact.open(
        "sft",
        SFTConfig(
            name="sft", output_dir=str(folder / "sft"), data=data, model=ModelConfig(name="tiny", path="embedded")
        ),
    )


def train(folder: Path, policy: Any, settings: TrainConfig, rows: Sequence[EncodedExample] = (), **more: Any) -> Any:
    """Train; returns the rows of loss.jsonl."""
    with open_artifact(folder) as artifact:
        return train_supervised(
            policy, tokenizer(), list(rows) or encoded(), settings, seed=3, artifact=artifact, max_length=128, **more
        )


def adapter_weights(policy: Any) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in policy.named_parameters() if weight.requires_grad}


def mean_loss(policy: Any, rows: Sequence[EncodedExample]) -> float:
    """Mean of -log p over the learned tokens of all rows, one row at a time, by the definition."""
    losses = []
    for row in rows:
        with torch.no_grad():
            log_probs = policy(torch.tensor([row.input_ids])).logits[0].log_softmax(-1)
        for position, label in enumerate(row.labels):
            if label != IGNORED:
                losses.append(-float(log_probs[position - 1, label]))
    return math.fsum(losses) / len(losses)


def interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the training be interrupted at the end of a step, before that step's checkpoint."""
    original = StepReport.on_step_end

    def on_step_end(self: StepReport, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        if state.global_step == step:
            raise KeyboardInterrupt
        original(self, args, state, control, **keywords)

    monkeypatch.setattr(StepReport, "on_step_end", on_step_end)
