"""sft: supervised fine-tuning. Teach the base model to answer like the examples, with a LoRA adapter.

Only completions are learned, end-of-turn token included; the prompt is not. With model.quantization=nf4 the frozen base
is held in 4 bits (QLoRA) and the adapter stays in float32. A run that was interrupted continues with the same command
from its last checkpoint, and gives the result that an uninterrupted run gives.

Reads:   data.path: rows with prompt and answer (QA examples, prompt/completion, messages, Alpaca, HotpotQA)
         init_adapter: an adapter to continue from, with a new optimizer (optional)
Writes:  adapter/, loss.jsonl, dropped.jsonl with the reason for each row that was not used

Overrides people use:
  data.path=mine.jsonl                     other rows
  train.learning_rate=1e-4 train.epochs=2  how long and how fast
  init_adapter=runs/demo/sft/adapter       staged continuation: start from this adapter
  model.quantization=nf4                   4-bit base
  preview=true                             show rows with what is learned, and stop
  resume=true                              continue an interrupted run, and refuse to begin a new one

Examples:
  python -m alignkit.sft +model=tiny data.path=mine.jsonl
  python -m alignkit.sft +model=qwen7b hardware=rtx4090_24gb
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Optional

from alignkit.core.artifact import Artifact
from alignkit.core.config import HardwareConfig, LoraConfig, ModelConfig, RowsConfig, StageConfig, TrainConfig
from alignkit.core.errors import UserError
from alignkit.core.records import ChatExample

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from alignkit.data.chat import EncodedExample
    from alignkit.models.jobs import Job

LOG = logging.getLogger("alignkit")


@dataclass
class SFTConfig(StageConfig):
    """What to learn, from which model, and how."""

    inputs: ClassVar[tuple[str, ...]] = ("data.path", "init_adapter", "model.path")
    incidental: ClassVar[tuple[str, ...]] = (*StageConfig.incidental, "preview")

    data: RowsConfig = field(default_factory=RowsConfig)
    init_adapter: Optional[str] = None  # noqa: UP045
    """Continue from this adapter with a new optimizer; its rank and dropout then count, not those of `lora`."""
    resume: bool = False
    """Continue an interrupted run of exactly this configuration; an error when there is none."""
    preview: bool = False
    """Show rows with their learned tokens marked, then stop without training or writing anything."""
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)


def run(config: SFTConfig) -> Artifact:
    """Read, encode and audit the examples; train an adapter on them; save it."""
    artifact = Artifact.open("sft", config)
    if config.preview:
        return _show(config, artifact)

    from alignkit.training.checkpoints import require_checkpoint

    if config.resume:
        require_checkpoint(artifact)
    with artifact:
        if artifact.up_to_date:
            return artifact
        from alignkit.data.chat import audit_labels, preview
        from alignkit.models.headroom import require_memory
        from alignkit.models.loading import load_tokenizer, save_adapter
        from alignkit.training.supervised import train_supervised

        tokenizer = load_tokenizer(config.model)
        encoded = _encode(config, tokenizer, artifact.drop)
        for name, passed, detail in audit_labels(tokenizer, encoded):
            artifact.check(name, passed, detail)
        print(preview(tokenizer, encoded, count=3, colour=sys.stdout.isatty()))
        require_memory(_job(config, encoded), config.hardware, artifact)

        policy = _starting_policy(config)
        losses = train_supervised(policy, tokenizer, encoded, config.train, config.seed, artifact)

        with artifact.output("adapter") as folder:
            save_adapter(policy, folder, config.model)
        artifact.write_rows("loss.jsonl", losses)
        artifact.metrics.update(rows=len(encoded), tokens=sum(len(row.input_ids) for row in encoded))
        artifact.summary = f"{len(encoded)} rows, loss {losses[0]['loss']:.3f} -> {losses[-1]['loss']:.3f}"
    return artifact


def _encode(
    config: SFTConfig,
    tokenizer: PreTrainedTokenizerBase,
    drop: Callable[[ChatExample | dict[str, object], str, str], None],
) -> Sequence[EncodedExample]:
    """Examples as tokens and labels; those that cannot be used are dropped with a reason."""
    from alignkit.data.chat import encode_example
    from alignkit.data.sources import read_examples

    examples, unusable = read_examples(config.data)
    for dropped in unusable:
        drop(dropped.row, dropped.reason, dropped.detail)
    encoded = []
    for example in examples:
        row = encode_example(tokenizer, example.prompt, example.completion, config.model.max_length)
        if isinstance(row, str):
            drop(example, row, "")
        else:
            encoded.append(row)
    if not encoded:
        raise UserError(f"{config.data.path}: no row can be used; dropped.jsonl says why")
    return encoded


def _job(config: SFTConfig, encoded: Sequence[EncodedExample]) -> Job:
    """What training takes: batches of the longest rows, or of packed sequences."""
    from alignkit.models.jobs import Job

    longest = config.model.max_length if config.train.packing else max(len(row.input_ids) for row in encoded)
    return Job("sft", config.model, longest, lora=config.lora, train=config.train, adapter=config.init_adapter)


def _starting_policy(config: SFTConfig) -> PeftModel:
    """The base with a new adapter, or with the one to continue."""
    import torch

    from alignkit.models.loading import load_base, load_policy, new_adapter

    if config.init_adapter is None:
        base = load_base(config.model)
        torch.manual_seed(config.seed)
        return new_adapter(base, config.lora, config.model.lora_targets)
    policy = load_policy(config.model, config.init_adapter, trainable=True)
    LOG.info("continues %s, with its rank, alpha and dropout rather than those of lora.*", config.init_adapter)
    return policy


def _show(config: SFTConfig, artifact: Artifact) -> Artifact:
    """Print rows with their learned tokens marked; nothing is trained or written."""
    from alignkit.data.chat import audit_labels, preview
    from alignkit.models.loading import load_tokenizer

    reasons: list[str] = []
    tokenizer = load_tokenizer(config.model)
    encoded = _encode(config, tokenizer, lambda row, reason, detail: reasons.append(reason))
    print(preview(tokenizer, encoded, count=10, colour=sys.stdout.isatty()))
    for name, passed, detail in audit_labels(tokenizer, encoded):
        print(f"check {name:28s} {'pass' if passed else 'FAIL'}  {detail}")
    for reason in sorted(set(reasons)):
        print(f"would drop {reasons.count(reason)} rows: {reason}")
    artifact.status = "preview"
    return artifact


if __name__ == "__main__":
    from alignkit.core.app import stage_main

    stage_main("sft")
