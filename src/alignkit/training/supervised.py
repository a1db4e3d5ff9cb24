"""Supervised fine-tuning: next-token loss on the tokens that `data.chat` marked as learned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from alignkit.core.artifact import Artifact
from alignkit.core.config import DistributedConfig, TrainConfig
from alignkit.data.chat import EncodedExample
from alignkit.training.arguments import trainer_arguments
from alignkit.training.batches import StepTrainer, parts
from alignkit.training.checkpoints import checkpoint_folder
from alignkit.training.fit import fit, trainable_in_float32
from alignkit.training.held_out import HeldOut
from alignkit.training.packing import check_rows_apart, pack, rows_dataset

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


def train_supervised(
    policy: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Sequence[EncodedExample],
    train: TrainConfig,
    seed: int,
    artifact: Artifact,
    *,
    held_out: Sequence[EncodedExample] = (),
    max_length: int = 0,
    distributed: DistributedConfig | None = None,
) -> list[dict[str, float]]:
    """Train the policy's adapter in place on encoded examples; returns the rows of loss.jsonl.

    The loss of an optimizer step is the mean over all its learned tokens, however they are spread over micro-batches
    and packed sequences of `max_length` tokens. With `held_out` rows their loss is measured beside it; answers to their
    prompts, if any are asked for, become samples.jsonl.
    """
    if train.packing or train.padding_free:
        check_rows_apart(policy, encoded, artifact)
    rows = pack(encoded, max_length, artifact) if train.packing else rows_dataset(encoded)
    arguments = trainer_arguments(
        SFTConfig,
        train,
        checkpoint_folder(artifact),
        rows=len(rows),
        seed=seed,
        dtype=policy.dtype,
        distributed=distributed,
        max_length=None,
        packing=train.packing,
        padding_free=train.padding_free,
        neftune_noise_alpha=train.neftune_alpha,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    with trainable_in_float32(policy, artifact):
        trainer = _Trainer(model=policy, args=arguments, train_dataset=rows, processing_class=tokenizer)
    if arguments.world_size == 1:  # else numbers of parts would differ, and processes wait for each other in each
        trainer.max_batch_tokens = train.max_batch_tokens
    if not held_out:
        return fit(trainer, artifact, train, "sft")
    watch = HeldOut(trainer, tokenizer, held_out, train, artifact)
    losses = fit(trainer, artifact, train, "sft", held_out=watch)
    samples = watch.finish()
    if samples:
        artifact.write_rows("samples.jsonl", samples)
    return losses


class _Trainer(StepTrainer, SFTTrainer):
    """TRL's trainer with our batches, and without its telemetry."""

    def _send_telemetry(self) -> None:
        pass

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Forward and backward over a batch, in parts of at most `max_batch_tokens`; returns its loss.

        The loss is a sum over tokens, divided by the learned tokens of the whole optimizer step, so parts add up.
        """
        step: Callable[..., torch.Tensor] = super().training_step  # without annotations in TRL
        if self.padding_free:
            return step(model, inputs, num_items_in_batch)
        lengths = inputs["attention_mask"].sum(dim=1).tolist()
        loss = torch.zeros((), device=self.args.device)
        for rows in parts(lengths, self.max_batch_tokens):
            part = {name: value[rows, : max(lengths[rows])] for name, value in inputs.items()}
            loss += step(model, part, num_items_in_batch)
        return loss

    def row_lengths(self) -> list[int]:
        """Tokens of each row, or of each packed sequence."""
        assert isinstance(self.train_dataset, Dataset)
        return [len(ids) for ids in self.train_dataset["input_ids"]]
