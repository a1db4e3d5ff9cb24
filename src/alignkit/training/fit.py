"""Running a trainer to its end: the part that is the same for every objective."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from alignkit.core.artifact import Artifact
from alignkit.core.config import TrainConfig
from alignkit.core.errors import UserError
from alignkit.core.ranks import is_main, rank, world_size
from alignkit.training.arguments import optimizer_steps
from alignkit.training.batches import StepTrainer, planned_steps
from alignkit.training.callbacks import AdapterMoved, ProcessesAgree, SealCheckpoints, StepReport, require_finite
from alignkit.training.checkpoints import newest_intact, remove_newer
from alignkit.training.distributed import make_whole
from alignkit.training.held_out import LOSS, HeldOut, measurements
from alignkit.training.interruption import StopAtStepEnd
from alignkit.training.step_zero import StepZero
from alignkit.training.tracking import tracking_callbacks

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback

LOG = logging.getLogger("alignkit")

_LOSS_FIELDS = {
    "loss": "loss",
    "learning_rate": "learning_rate",
    "grad_norm": "gradient_norm",
    "mean_token_accuracy": "token_accuracy",
    "rewards/chosen": "chosen_reward",
    "rewards/rejected": "rejected_reward",
    "rewards/margins": "reward_margin",
    "rewards/accuracies": "reward_accuracy",
    "logps/chosen": "chosen_log_prob",
    "logps/rejected": "rejected_log_prob",
    "log_ratios/chosen": "chosen_log_ratio",
    "log_ratios/rejected": "rejected_log_ratio",
    "tokens/chosen": "chosen_tokens",
    "tokens/rejected": "rejected_tokens",
    "positives_on_top": "positives_on_top",
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


def fit(
    trainer: StepTrainer,
    artifact: Artifact,
    train: TrainConfig,
    description: str,
    row_tokens: Sequence[int] | None = None,
    held_out: HeldOut | None = None,
    base: str | None = None,
) -> list[dict[str, float]]:
    """Train to the end and return the rows of loss.jsonl: `step`, `epoch`, `loss` and what else the objective logs.

    Continues from the newest intact checkpoint in the trainer's output folder, if there is one, with optimizer, random
    state and data order, so that the result is that of an uninterrupted run. `row_tokens` are the tokens that are read
    for each row, where they are not the lengths that rows are grouped by. `base` is what a checkpoint's adapter says it
    belongs to; None: config.model.path. Raises `KeyboardInterrupt` after a signal,
    when the checkpoint of the step is written.
    """
    policy = trainer.model
    assert policy is not None
    checkpoint, continued_from = _checkpoint(Path(str(trainer.args.output_dir)), description)
    sampler = trainer.sampler
    rows = len(sampler.sizes()) * sampler.rows_per_step
    steps = planned_steps(sampler, optimizer_steps(rows, train))
    tokens = [sum((row_tokens or sampler.lengths)[row] for row in rows) for rows in steps]
    if hasattr(trainer, "_total_train_tokens"):
        trainer._total_train_tokens = sum(tokens[:continued_from])  # TRL would begin again at 0
    moved, stop = AdapterMoved(policy, artifact.check), StopAtStepEnd()
    report = StepReport(description, artifact.check, tokens, train.divergence)
    divided = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    _set_callbacks(
        trainer,
        StepZero(trainer, artifact),
        *([] if divided else [moved, ProcessesAgree(policy, artifact.check)]),
        report,
        *tracking_callbacks(train.tracker, artifact, continued_from),
        *([] if held_out is None else [held_out]),
        stop,
        SealCheckpoints(policy, artifact.check, base or artifact.config["model"]["path"]),
    )
    if world_size() > 1:
        _join(trainer, description)
    started = time.monotonic()
    try:
        with stop.listening():
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        report.close()
    if stop.stopped:
        LOG.info("%s: stopped after step %d, its checkpoint is saved", description, trainer.state.global_step)
        raise KeyboardInterrupt
    if divided:
        make_whole(policy)
    moved.judge(trainer.args, trainer.state)
    require_finite(policy, artifact.check, "the end")
    policy.eval()
    artifact.metrics.update(
        processes=world_size(),
        continued_from_step=continued_from,
        training_seconds=round(time.monotonic() - started, 2),
        tokens_per_second=round(report.tokens_per_second, 1),
    )
    return _summarise(trainer, artifact, description)


def _set_callbacks(trainer: Trainer, *callbacks: TrainerCallback) -> None:
    """Ours in this order, and none that prints log lines."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    for callback in callbacks:
        trainer.add_callback(callback)


def _checkpoint(folder: Path, description: str) -> tuple[Path | None, int]:
    """The checkpoint to continue from and its step, or None and 0; the main process chooses it for all.

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
    if is_main():
        remove_newer(folder, checkpoint)
    if checkpoint is None:
        return None, 0
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    LOG.info("%s: continues from step %d", description, step)
    return checkpoint, step


def _join(trainer: Trainer, description: str) -> None:
    """Say how the processes share an optimizer step, and make this one ready for it."""
    arguments, processes = trainer.args, world_size()
    own = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    LOG.info(
        "%s: %d processes share each optimizer step of %d rows: %d each, %d at once",
        description,
        processes,
        own * processes,
        own,
        arguments.per_device_train_batch_size,
    )
    torch.manual_seed(arguments.seed + rank())  # each drops out other parts of its rows
    # a model that was evaluated counts as prepared, and its processes would train without exchanging gradients
    vars(trainer.model).pop("_is_accelerate_prepared", None)


def _summarise(trainer: Trainer, artifact: Artifact, description: str) -> list[dict[str, float]]:
    """The rows of loss.jsonl, with their first and last loss in metrics and log."""
    losses = _loss_rows(trainer.state.log_history)
    first, last, steps = losses[0]["loss"], losses[-1]["loss"], trainer.state.global_step
    artifact.metrics.update(steps=steps, first_loss=first, last_loss=last)
    speed = artifact.metrics["tokens_per_second"]
    LOG.info("%s: %d steps, loss %.4f -> %.4f, %.0f tokens/s", description, steps, first, last, speed)
    return losses


def _loss_rows(history: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """A row for each log line with a loss; the held-out loss of its step stands beside it."""
    held_out = {each.step: each.loss for each in measurements(history)}
    rows = [_loss_row(entry) for entry in history if "loss" in entry]
    return [row | ({LOSS: held_out[int(row["step"])]} if row["step"] in held_out else {}) for row in rows]


def _loss_row(entry: Mapping[str, Any]) -> dict[str, float]:
    row = {"step": entry["step"], "epoch": round(entry["epoch"], 4)}
    return row | {ours: entry[theirs] for theirs, ours in _LOSS_FIELDS.items() if theirs in entry}
