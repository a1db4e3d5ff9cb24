"""Running a trainer to its end: the part that is the same for every objective."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from alignkit.core.artifact import Artifact
from alignkit.core.errors import UserError
from alignkit.core.ranks import is_main, rank, world_size
from alignkit.training.callbacks import AdapterMoved, ProcessesAgree, SealCheckpoints, StepReport
from alignkit.training.checkpoints import newest_intact
from alignkit.training.distributed import make_whole, trained_weights

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

LOG = logging.getLogger("alignkit")

_LOSS_FIELDS = {
    "loss": "loss",
    "learning_rate": "learning_rate",
    "grad_norm": "gradient_norm",
    "mean_token_accuracy": "token_accuracy",
    "rewards/chosen": "chosen_reward",
    "rewards/rejected": "rejected_reward",
    "rewards/accuracies": "reward_accuracy",
    "logps/chosen": "chosen_log_prob",
    "logps/rejected": "rejected_log_prob",
}
"""What a trainer logs -> what a row of loss.jsonl calls it."""


@contextmanager
def trainable_in_float32(policy: torch.nn.Module, artifact: Artifact) -> Iterator[None]:
    """Build a trainer inside this block: trainable weights come out of it as they went in, and that is checked.

    TRL casts them to bfloat16 over a 4-bit base. Steps of 1e-6 on weights of 5e-3 are below bfloat16's resolution:
    hardly any weight would ever change, and a continued adapter would be rounded before its first step.
    """
    weights = {name: weight.data for name, weight in policy.named_parameters() if weight.requires_grad}
    count = sum(weight.numel() for weight in weights.values())
    detail = f"{count:,} in {len(weights)} matrices" if count else "none: the adapter is frozen"
    artifact.check("trainable_parameters", count > 0, detail)
    yield
    for name, weight in policy.named_parameters():
        if name in weights:
            weight.data = weights[name].to(weight.device, torch.float32)
    dtypes = sorted({str(weight.dtype) for weight in policy.parameters() if weight.requires_grad})
    artifact.check("trainable_in_float32", dtypes == ["torch.float32"], ", ".join(dtypes))
    artifact.metrics["trainable_parameters"] = count


def fit(trainer: Trainer, artifact: Artifact, description: str) -> list[dict[str, float]]:
    """Train to the end and return the rows of loss.jsonl: `step`, `epoch`, `loss` and what else the objective logs.

    Continues from the newest intact checkpoint in the trainer's output folder, if there is one, with optimizer, random
    state and data order, so that the result is that of an uninterrupted run.
    """
    from transformers import PrinterCallback

    policy = trainer.model
    assert policy is not None
    trainer.remove_callback(PrinterCallback)
    divided = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    before = trained_weights(policy) if divided else {}
    watching = [] if divided else [AdapterMoved(policy, artifact.check), ProcessesAgree(policy, artifact.check)]
    for callback in (*watching, StepReport(description, artifact.check), SealCheckpoints()):
        trainer.add_callback(callback)
    checkpoint = _checkpoint(Path(str(trainer.args.output_dir)))
    continued_from = 0 if checkpoint is None else int(checkpoint.name.removeprefix("checkpoint-"))
    if continued_from:
        LOG.info("%s: continues from step %d", description, continued_from)
    if world_size() > 1:
        LOG.info("%s: %s", description, _division(trainer.args))
        torch.manual_seed(trainer.args.seed + rank())  # each drops out other parts of its rows
        # a model that was evaluated counts as prepared, and its processes would train without exchanging gradients
        vars(policy).pop("_is_accelerate_prepared", None)
    started = time.monotonic()
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    policy.eval()
    if divided:
        make_whole(policy)
        unmoved = [name for name, weight in trained_weights(policy).items() if torch.equal(weight, before[name])]
        detail = f"{len(unmoved)} of {len(before)} matrices have not moved by step {trainer.state.global_step}"
        artifact.check("adapter_moved", not unmoved, detail)
    losses = [_loss_row(entry) for entry in trainer.state.log_history if "loss" in entry]
    artifact.metrics.update(
        steps=trainer.state.global_step,
        processes=world_size(),
        continued_from_step=continued_from,
        first_loss=losses[0]["loss"],
        last_loss=losses[-1]["loss"],
        training_seconds=round(time.monotonic() - started, 2),
    )
    LOG.info(
        "%s: %d steps, loss %.4f -> %.4f", description, trainer.state.global_step, losses[0]["loss"], losses[-1]["loss"]
    )
    return losses


def _checkpoint(folder: Path) -> Path | None:
    """The checkpoint to continue from; the main process chooses it for all.

    Raises `UserError` when another number of processes wrote it: each continues with its own random state.
    """
    from accelerate.utils import broadcast_object_list

    found = [newest_intact(folder) if is_main() else None]
    broadcast_object_list(found)
    checkpoint = found[0]
    if checkpoint is not None and (wrote := len(list(checkpoint.glob("rng_state*.pth")))) != world_size():
        raise UserError(
            f"{checkpoint} is of a run of {wrote} process(es), and this one has {world_size()}: start as many as "
            "before to continue, or give force=true to begin anew"
        )
    return checkpoint


def _division(arguments: TrainingArguments) -> str:
    """How the processes share an optimizer step, for the log."""
    own = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    return (
        f"{world_size()} processes share each optimizer step of {own * world_size()} rows: {own} each, "
        f"{arguments.per_device_train_batch_size} at once"
    )


def _loss_row(entry: dict[str, Any]) -> dict[str, float]:
    row = {"step": entry["step"], "epoch": round(entry["epoch"], 4)}
    return row | {ours: entry[theirs] for theirs, ours in _LOSS_FIELDS.items() if theirs in entry}
