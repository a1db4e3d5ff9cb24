"""Small preference trainings on a random model: pairs, adapters, configurations, and losses by the definition."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from tiny_random import conversation, save_random_base, tokenizer
from trl import DPOTrainer

from alignkit.core.artifact import Artifact
from alignkit.core.config import LoraConfig, ModelConfig, RowsConfig, TrainConfig
from alignkit.data.chat import encode_conversation, encode_prompt
from alignkit.dpo import DPOConfig
from alignkit.models.loading import load_base, load_policy, new_adapter, save_adapter
from alignkit.training.preference import EncodedPair, build_trainer
from alignkit.training.preference_losses import Objective

BETA = 0.2
TRAIN = TrainConfig(learning_rate=5e-3, batch_size=2, max_steps=4, warmup_share=0.0, logging_steps=1, save_steps=2)
PAIRS = [
    ("Anna lives in Oslo. Where does Anna live?", "Anna lives in Oslo.", "No."),
    ("Who leads Ferro?", "I do not know.", "Anna leads Ferro, so yes."),
    ("Is it so?", "Yes, it is.", "Perhaps it is and perhaps it is not."),
    ("The colour of Mekux is grey. Is Mekux grey?", "The colour of Mekux is grey, so yes.", "So no."),
]


def write_adapter(model: ModelConfig, folder: Path, seed: int, rank: int = 4, *, dora: bool = False) -> str:
    """An adapter that changes the base noticeably, saved with dropout 0.3."""
    torch.manual_seed(seed)
    lora = LoraConfig(rank=rank, alpha=2 * rank, dropout=0.3, dora=dora)
    policy = new_adapter(load_base(model), lora, ["q_proj", "down_proj"])
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.05)
            if "lora_magnitude_vector" in name:
                weight.mul_(1.2)
    save_adapter(policy, folder, model)
    return str(folder)


def small_config(folder: Path) -> DPOConfig:
    """A run of four pairs and four steps in `folder`, with a base and a first adapter of its own."""
    model = save_random_base(folder / "base")
    rows = []
    for number, (question, chosen, rejected) in enumerate(PAIRS):
        turns = [[message.model_dump() for message in conversation(question, text)] for text in (chosen, rejected)]
        rows.append({"id": f"p{number}", "prompt": turns[0][:1], "chosen": turns[0][1:], "rejected": turns[1][1:]})
    data = folder / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return DPOConfig(
        name="dpo",
        output_dir=str(folder / "dpo"),
        data=RowsConfig(path=str(data)),
        init_adapter=write_adapter(model, folder / "sft", seed=1),
        beta=BETA,
        model=model,
        train=TRAIN,
    )


def losses(config: DPOConfig) -> list[dict[str, float]]:
    return [json.loads(line) for line in (Path(config.output_dir) / "loss.jsonl").read_text().splitlines()]


def log_prob(policy: Any, question: str, text: str) -> float:
    """log p(text and end of turn | question), by the definition."""
    turns = conversation(question, text)
    ids, start = encode_conversation(tokenizer(), turns), len(encode_prompt(tokenizer(), turns[:1]))
    with torch.no_grad():
        log_probs = policy(torch.tensor([ids])).logits[0].log_softmax(-1)
    return math.fsum(float(log_probs[place - 1, ids[place]]) for place in range(start, len(ids)))


def expected_loss(policy: Any, reference: Any) -> float:
    """Mean over the pairs of -log sigmoid(beta * (chosen log-ratio - rejected log-ratio))."""
    terms = []
    for question, chosen, rejected in PAIRS:
        ratio = {
            text: log_prob(policy, question, text) - log_prob(reference, question, text) for text in (chosen, rejected)
        }
        terms.append(math.log1p(math.exp(-BETA * (ratio[chosen] - ratio[rejected]))))
    return math.fsum(terms) / len(terms)


def encoded_pairs() -> list[EncodedPair]:
    pairs = []
    for question, chosen, rejected in PAIRS:
        prompt = encode_prompt(tokenizer(), conversation(question, "")[:1])
        answers = [encode_conversation(tokenizer(), conversation(question, text)) for text in (chosen, rejected)]
        pairs.append(EncodedPair(prompt, *(ids[len(prompt) :] for ids in answers)))
    return pairs


def trainer_for(config: DPOConfig, artifact: Artifact) -> tuple[Any, DPOTrainer]:
    policy = load_policy(config.model, config.init_adapter, trainable=True)
    objective = Objective(config.reference, config.beta)
    return policy, build_trainer(policy, tokenizer(), encoded_pairs(), objective, config.train, 1, artifact)
