"""From a `TrainConfig` to the arguments that every trainer of transformers and TRL shares."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from alignkit.core.config import DistributedConfig, Keep, Strategy, TrainConfig
from alignkit.core.errors import UserError
from alignkit.core.ranks import batches_of_process, world_size
from alignkit.training.distributed import sharding_arguments

if TYPE_CHECKING:
    from transformers import TrainingArguments

A = TypeVar("A", bound="TrainingArguments")


def optimizer_steps(rows: int, train: TrainConfig) -> int:
    """How many optimizer steps training on `rows` rows takes."""
    if train.max_steps > 0:
        return train.max_steps
    return math.ceil(train.epochs * math.ceil(rows / (train.batch_size * train.gradient_accumulation)))


def refuse_what_only_sft_has(train: TrainConfig) -> None:
    """Raise `UserError` for settings that stages with other objectives would otherwise ignore."""
    given = {
        "packing": train.packing,
        "padding_free": train.padding_free,
        "neftune_alpha": train.neftune_alpha is not None,
        "eval_steps": train.eval_steps > 0,
        "keep": train.keep is not Keep.last,
        "patience": train.patience > 0,
        "sample_prompts": train.sample_prompts > 0,
    }
    for name, is_given in given.items():
        if is_given:
            raise UserError(f"train.{name}: only sft has it, leave it out here")


def trainer_arguments(
    kind: type[A],
    train: TrainConfig,
    folder: Path,
    *,
    rows: int,
    seed: int,
    dtype: torch.dtype,
    distributed: DistributedConfig | None = None,
    **special: Any,
) -> A:
    """Arguments of class `kind` (SFTConfig, DPOConfig, TrainingArguments, ...) for training on `rows` rows.

    `dtype` is the base model's, and, if it is bfloat16, or float16 on a GPU, that of autocast. `special` are the
    arguments of `kind` alone. Checkpoints go to `folder` every `save_steps` steps, rounded up to a multiple of
    `logging_steps`: logged values are means since the last line, so only between lines can a run be cut in two and give
    the same lines. The last steps are not saved, the finished model is.
    Raises `UserError` for values that the trainer refuses.
    """
    on_gpu = torch.cuda.is_available()
    distributed = distributed or DistributedConfig()
    batch_size, accumulation = batches_of_process(train, world_size())
    try:
        arguments = kind(
            output_dir=str(folder),
            seed=seed,
            data_seed=seed,
            learning_rate=train.learning_rate,
            num_train_epochs=train.epochs,
            max_steps=train.max_steps,
            per_device_train_batch_size=batch_size,
            per_device_eval_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            warmup_steps=int(train.warmup_share * optimizer_steps(rows, train)),
            lr_scheduler_type=train.scheduler,
            weight_decay=train.weight_decay,
            max_grad_norm=train.max_grad_norm,
            optim=train.optimizer,
            activation_checkpointing=train.gradient_checkpointing and distributed.strategy is not Strategy.fsdp,
            logging_steps=train.logging_steps,
            logging_first_step=True,
            logging_nan_inf_filter=False,
            save_steps=math.ceil(train.save_steps / train.logging_steps) * train.logging_steps,
            save_total_limit=2,
            eval_strategy="no",
            report_to="none",  # trackers are callbacks of ours
            project="alignkit",
            run_name=str(folder.parents[1]),
            disable_tqdm=True,
            use_cpu=not on_gpu,
            bf16=dtype == torch.bfloat16,
            fp16=on_gpu and dtype == torch.float16,
            dataloader_pin_memory=on_gpu,
            ddp_find_unused_parameters=False,
            **sharding_arguments(distributed, train),
            **special,
        )
    except ValueError as error:
        raise UserError(f"train: {str(error).splitlines()[0]}") from error
    if arguments.world_size != world_size():
        raise UserError(
            f"WORLD_SIZE says {world_size()} processes, but {arguments.world_size} found each other: start training "
            "with torchrun (accelerate launch --cpu starts a single one)"
        )
    return arguments
