"""sft: supervised fine-tuning. Teach the base model to answer like the examples, with a LoRA adapter.

Of conversations the completions are learned, each turn with its end-of-turn token; prompts, tools and users are not.
Documents are learned whole. With model.quantization=nf4 the frozen base is held in 4 bits (QLoRA) and the adapter stays
in float32. A run that was interrupted continues with the same command from its last checkpoint, and gives the result
that an uninterrupted run gives. Held-out rows show during training whether it still helps. docs/labels.md and
docs/training.md have the rest.

Reads:   data.path: rows with prompt and answer (QA examples, prompt/completion, messages, ShareGPT, Alpaca, HotpotQA,
         QA-Expert, RAFT), with tool calls and tools or without; or documents (pages, rows with a text)
         held_out.path: rows of the same kind that are not trained on (optional)
         init_adapter: an adapter to continue from, with a new optimizer (optional)
Writes:  adapter/, loss.jsonl, dropped.jsonl with the reason for each row that was not used
         samples.jsonl: with train.sample_prompts, answers to held-out prompts while it trained
         tensorboard/: the figures as they come, for tensorboard --logdir

Overrides people use:
  data.path=mine.jsonl                     other rows
  train.learning_rate=1e-4 train.epochs=2  how long and how fast
  init_adapter=runs/demo/sft/adapter       staged continuation: start from this adapter
  held_out_share=0.05 train.eval_steps=50 train.keep=best    stop looking at the training loss
  train.packing=true                       several rows in one sequence: less padding
  model.quantization=nf4                   4-bit base
  learn=assistant                          every assistant turn of a conversation, not only the completion
  overlong=split                           cut long documents into pieces instead of dropping them
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
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Optional

from alignkit.core.artifact import Artifact
from alignkit.core.config import (
    DistributedConfig,
    HardwareConfig,
    Keep,
    LoraConfig,
    LoraInit,
    ModelConfig,
    RowsConfig,
    StageConfig,
    TrainConfig,
)
from alignkit.core.errors import UserError
from alignkit.core.ranks import world_size
from alignkit.core.records import ChatExample, TextExample

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from alignkit.data.chat import EncodedExample
    from alignkit.models.jobs import Job

LOG = logging.getLogger("alignkit")

NONE = "none"


class Learn(Enum):
    """Which turns of a conversation are learned: the completion's assistant turns, or the prompt's, too."""

    completion = "completion"
    assistant = "assistant"


class Overlong(Enum):
    """What becomes of a document that is longer than the model's max_length. Conversations are always dropped."""

    drop = "drop"
    split = "split"


@dataclass
class SFTConfig(StageConfig):
    """What to learn, from which model, and how."""

    inputs: ClassVar[tuple[str, ...]] = ("data.path", "held_out.path", "init_adapter", "model.path")
    incidental: ClassVar[tuple[str, ...]] = (*StageConfig.incidental, "preview")

    data: RowsConfig = field(default_factory=RowsConfig)
    learn: Learn = Learn.completion
    """`completion`: its assistant turns; `assistant`: all assistant turns of the conversation (`messages` rows)."""
    overlong: Overlong = Overlong.drop
    """Documents longer than model.max_length: `drop` them with a reason, or `split` them into pieces of that length."""
    held_out: RowsConfig = field(default_factory=lambda: RowsConfig(path=NONE))
    """Rows whose loss is measured during training (see train.eval_steps); none: no such file."""
    held_out_share: float = 0.0
    """Instead: hold out the rows of this share of the prompts (or documents) of data.path."""
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
    distributed: DistributedConfig = field(default_factory=DistributedConfig)


def run(config: SFTConfig) -> Artifact:
    """Read, encode and audit the examples; train an adapter on them; save it."""
    _check(config)
    artifact = Artifact.open("sft", config)
    if config.preview:
        return _show(config, artifact)

    from alignkit.training.checkpoints import require_checkpoint

    if config.resume:
        require_checkpoint(artifact)
    with artifact:
        if artifact.up_to_date:
            return artifact
        from alignkit.data.labels import audit_labels, count_learned, preview
        from alignkit.models.headroom import require_memory
        from alignkit.models.loading import load_tokenizer, save_adapter
        from alignkit.training.distributed import require_possible
        from alignkit.training.supervised import train_supervised

        require_possible("sft", config.model, config.train, config.distributed, _needs_whole_weights(config))
        tokenizer = load_tokenizer(config.model)
        encoded, held_out = _encode(config, tokenizer, artifact.drop)
        for name, passed, detail in audit_labels(tokenizer, encoded):
            artifact.check(name, passed, detail)
        print(preview(tokenizer, encoded, count=3, colour=sys.stdout.isatty()))
        require_memory(_job(config, encoded), config.hardware, artifact)

        policy, initial = _starting_policy(config, artifact)
        losses = train_supervised(
            policy,
            tokenizer,
            encoded,
            config.train,
            config.seed,
            artifact,
            held_out=held_out,
            max_length=config.model.max_length,
            distributed=config.distributed,
        )
        if not artifact.writes:
            return artifact

        with artifact.output("adapter") as folder:
            save_adapter(policy, folder, config.model, initial)
        artifact.write_rows("loss.jsonl", losses)
        artifact.metrics.update(count_learned(encoded))
        artifact.summary = f"{len(encoded)} rows, loss {losses[0]['loss']:.3f} -> {losses[-1]['loss']:.3f}"
    return artifact


def _check(config: SFTConfig) -> None:
    """Raise `UserError` for settings that contradict each other, before anything big is loaded."""
    from alignkit.models.pissa import check_init
    from alignkit.training.tracking import require_tracker

    require_tracker(config.train.tracker)
    if config.init_adapter is None:
        check_init(config.lora, config.model)
    if not 0 <= config.held_out_share < 1:
        raise UserError(f"held_out_share={config.held_out_share}: must be at least 0 and below 1")
    has_held_out = config.held_out.path != NONE
    if has_held_out and config.held_out_share:
        raise UserError("held_out.path names held-out rows and held_out_share takes them from data.path: give one")
    train = config.train
    wants = {
        "eval_steps": train.eval_steps,
        "keep": train.keep is Keep.best,
        "patience": train.patience,
        "sample_prompts": train.sample_prompts,
    }
    for name, wanted in wants.items():
        if wanted and not (has_held_out or config.held_out_share):
            raise UserError(f"train.{name} needs held-out rows: give held_out.path=... or held_out_share=0.05")
    if (train.patience or train.keep is Keep.best) and not train.eval_steps:
        raise UserError("train.keep=best and train.patience need train.eval_steps=... to measure more than once")
    if train.neftune_alpha is not None and (train.packing or train.padding_free):
        raise UserError(
            "train.neftune_alpha adds noise by the length of a row, which is not the length of a sequence with "
            "train.packing or train.padding_free: give one of them"
        )


def _encode(
    config: SFTConfig,
    tokenizer: PreTrainedTokenizerBase,
    drop: Callable[[ChatExample | TextExample | dict[str, object], str, str], None],
) -> tuple[Sequence[EncodedExample], Sequence[EncodedExample]]:
    """Rows to train on and held-out rows as tokens and labels; those that cannot be used are dropped with a reason."""
    from alignkit.data.sources import read_examples
    from alignkit.training.held_out import split_by_prompt

    def read(rows: RowsConfig) -> Sequence[ChatExample | TextExample]:
        examples, unusable = read_examples(rows)
        for dropped in unusable:
            drop(dropped.row, dropped.reason, dropped.detail)
        return examples

    examples = read(config.data)
    if config.held_out.path != NONE:
        held_out, where = read(config.held_out), config.held_out.path
    else:
        (examples, held_out), where = split_by_prompt(examples, config.held_out_share, config.seed), config.data.path
    rows = _rows(config, tokenizer, examples, drop, config.data.path)
    return rows, _rows(config, tokenizer, held_out, drop, where) if held_out else []


def _rows(
    config: SFTConfig,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[ChatExample | TextExample],
    drop: Callable[[ChatExample | TextExample | dict[str, object], str, str], None],
    where: str,
) -> list[EncodedExample]:
    from alignkit.data.chat import encode_row

    encoded: list[EncodedExample] = []
    reasons = set()
    for example in examples:
        rows = encode_row(
            tokenizer,
            example,
            config.model,
            whole=config.learn is Learn.assistant,
            split=config.overlong is Overlong.split,
        )
        if isinstance(rows, str):
            drop(example, rows, "")
            reasons.add(rows)
        else:
            encoded += rows
    if not encoded:
        raise UserError(f"{where}: no row can be used ({'; '.join(sorted(reasons))})")
    return encoded


def _needs_whole_weights(config: SFTConfig) -> str:
    """What of this configuration works with whole weights in each process, before training or between its steps."""
    if config.held_out.path != NONE or config.held_out_share:
        return "measuring held-out rows"
    return "lora.init=pissa" if config.lora.init is LoraInit.pissa and config.init_adapter is None else ""


def _job(config: SFTConfig, encoded: Sequence[EncodedExample]) -> Job:
    """What training takes: batches of the longest rows, or of packed sequences."""
    from alignkit.models.jobs import Job

    return Job(
        "sft",
        config.model,
        config.model.max_length if config.train.packing else max(len(row.input_ids) for row in encoded),
        lora=config.lora,
        train=config.train,
        adapter=config.init_adapter,
        processes=world_size(),
        strategy=config.distributed.strategy,
    )


def _starting_policy(config: SFTConfig, artifact: Artifact) -> tuple[PeftModel, Path | None]:
    """The base with a new adapter, or with the one to continue; and where a PiSSA adapter's beginning is kept."""
    import torch

    from alignkit.models.loading import load_base, load_policy, new_adapter
    from alignkit.models.pissa import FOLDER, keep_initial

    if config.init_adapter is not None:
        policy = load_policy(config.model, config.init_adapter, trainable=True)
        LOG.info("continues %s, with its rank, alpha and dropout rather than those of lora.*", config.init_adapter)
        return policy, None
    base = load_base(config.model)
    torch.manual_seed(config.seed)
    policy = new_adapter(base, config.lora, config.model.lora_targets)
    if config.lora.init is not LoraInit.pissa:
        return policy, None
    initial = artifact.work_folder / FOLDER
    if artifact.writes:
        keep_initial(policy, initial)
    return policy, initial


def _show(config: SFTConfig, artifact: Artifact) -> Artifact:
    """Print rows with their learned tokens marked; nothing is trained or written."""
    from alignkit.data.labels import audit_labels, count_learned, preview
    from alignkit.models.loading import load_tokenizer

    reasons: list[str] = []
    tokenizer = load_tokenizer(config.model)
    encoded, _ = _encode(config, tokenizer, lambda row, reason, detail: reasons.append(reason))
    print(preview(tokenizer, encoded, count=10, colour=sys.stdout.isatty()))
    for name, passed, detail in audit_labels(tokenizer, encoded):
        print(f"check {name:28s} {'pass' if passed else 'FAIL'}  {detail}")
    print(", ".join(f"{name} {count}" for name, count in count_learned(encoded).items()))
    for reason in sorted(set(reasons)):
        print(f"would drop {reasons.count(reason)} rows: {reason}")
    artifact.status = "preview"
    return artifact


if __name__ == "__main__":
    from alignkit.core.app import stage_main

    stage_main("sft")
