"""A tiny random BERT and rows of letters, for trainings of the stage retriever."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tiny_encoders import encoder_settings, save_encoder, word_tokenizer

from alignkit.core.manifest import read_manifest

LETTERS = "a b c d e f g h".split()
STEPS = ["train.batch_size=8", "train.warmup_share=0", "train.learning_rate=1e-3", "train.logging_steps=1"]
TASKS = (
    "tasks={qa: {query_instruction: 'what ', passage_instruction: 'is ', distill_weight: 1, distill: stable}, "
    "tool: {positives: random}}"
)


def write_queries(folder: Path) -> Path:
    """Rows of two tasks, and a random encoder without dropout."""
    from transformers import BertConfig, BertModel

    settings = encoder_settings(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    save_encoder(folder / "bert", BertModel, BertConfig(**settings), word_tokenizer(max_length=12))
    rows: list[dict[str, Any]] = []
    for number, letter in enumerate(LETTERS * 3):
        others = [each for each in LETTERS if each != letter]
        negatives = [f"the mayor {each}" for each in others[number % 5 : number % 5 + 3]]
        row = {"query": f"who is {letter} ?", "query_id": number, "pos": [f"she was {letter}"], "neg": negatives}
        rows.append({**row, "task": "tool" if number % 3 == 0 else "qa", "teacher_scores": [0.5, 0.1, 0.4, 0.2]})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "queries.jsonl").write_text(text, encoding="utf-8")
    return folder


def command(name: str, *more: str) -> list[str]:
    model = ["encoder.path=bert", "encoder.name=bert", "encoder.passage_max_length=12", f"run={name}"]
    return [*model, "data.path=queries.jsonl", "negatives=2", TASKS, *STEPS, *more]


def weights(folder: Path, run: str) -> dict[str, torch.Tensor]:
    return load_file(folder / "runs" / run / "retriever" / "model" / "model.safetensors")


def losses(folder: Path, run: str) -> list[dict[str, float]]:
    path = folder / "runs" / run / "retriever" / "loss.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def manifest(folder: Path, run: str) -> dict[str, Any]:
    found = read_manifest(folder / "runs" / run / "retriever")
    assert found is not None
    return found


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Of all weights but the keys' biases: no embedding depends on them, and Adam makes steps of their rounding."""
    assert one.keys() == other.keys()
    names = [name for name in one if not name.endswith("key.bias")]
    return max(float((one[name] - other[name]).abs().max()) for name in names)
