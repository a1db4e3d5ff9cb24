"""Supervised fine-tuning: next-token loss on the tokens that `data.chat` marked as learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from torch.utils.data import DataLoader
from trl import SFTConfig, SFTTrainer

from alignkit.core.artifact import Artifact
from alignkit.core.config import DistributedConfig, TrainConfig
from alignkit.data.chat import EncodedExample
from alignkit.training.arguments import trainer_arguments
from alignkit.training.batches import step_loader
from alignkit.training.checkpoints import checkpoint_folder
from alignkit.training.fit import fit, trainable_in_float32

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
    distributed: DistributedConfig | None = None,
) -> list[dict[str, float]]:
    """Train the policy's adapter in place on encoded examples; returns the rows of loss.jsonl.

    The loss of an optimizer step is the mean over all its learned tokens, however they are spread over micro-batches.
    """
    rows = Dataset.from_dict(
        {"input_ids": [row.input_ids for row in encoded], "labels": [row.labels for row in encoded]}
    )
    arguments = trainer_arguments(
        SFTConfig,
        train,
        checkpoint_folder(artifact),
        rows=len(encoded),
        seed=seed,
        dtype=policy.dtype,
        distributed=distributed,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    with trainable_in_float32(policy, artifact):
        trainer = _Trainer(model=policy, args=arguments, train_dataset=rows, processing_class=tokenizer)
    return fit(trainer, artifact, "sft")


class _Trainer(SFTTrainer):
    """TRL's trainer with our batches."""

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches by length, of this process."""
        assert isinstance(self.train_dataset, Dataset)
        return step_loader(self, [len(ids) for ids in self.train_dataset["input_ids"]])
