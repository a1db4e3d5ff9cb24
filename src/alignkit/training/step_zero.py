"""Step 0: before training, one forward and backward pass over the batch that needs the most memory.

A run that is too large for the GPU then says so in its first seconds, and not hours later when the longest rows come
by. The gradients are thrown away and the random state is put back: training is the same with it and without it.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

from alignkit.core.artifact import Artifact
from alignkit.core.errors import UserError
from alignkit.core.manifest import peak_gpu_memory_bytes
from alignkit.training.batches import StepTrainer, parts, planned_steps
from alignkit.training.randomness import random_state_kept

LOG = logging.getLogger("alignkit")

_COUNTERS = ("_metrics", "_total_train_tokens", "right", "pairs")
"""What trainers count while they compute a loss."""


class StepZero(TrainerCallback):
    """Try the largest batch when training begins, with everything in place as in a real step."""

    def __init__(self, trainer: StepTrainer, artifact: Artifact) -> None:
        self._trainer = trainer
        self._artifact = artifact

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Run it, and record the peak memory on a GPU. Raises `UserError` when the batch does not fit.

        Each of several processes tries the largest batch of its own share, and they exchange these gradients, too. Not
        where DeepSpeed or FSDP hold the weights: they count on every backward pass being a step's.
        """
        trainer = self._trainer
        if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
            LOG.info("the largest batch is not tried before the first step: DeepSpeed and FSDP allow no such trial")
            return
        max_tokens = None if getattr(trainer, "padding_free", False) else trainer.max_batch_tokens
        steps, lengths = planned_steps(trainer.sampler, state.max_steps), trainer.sampler.lengths
        rows = largest_batch((batch for step in steps for batch in trainer.own_batches(step)), lengths, max_tokens)
        try:
            _rehearse(trainer, rows)
        except torch.OutOfMemoryError as error:
            longest = max(lengths[row] for row in rows)
            raise UserError(
                f"out of GPU memory with the largest batch, {len(rows)} rows of up to {longest} tokens, before the "
                "first step. Lower train.batch_size and raise train.gradient_accumulation by the same factor, or set "
                "train.gradient_checkpointing=true, or lower model.max_length."
            ) from error
        if peak := peak_gpu_memory_bytes():
            self._artifact.metrics["step_0_peak_gpu_memory_bytes"] = peak


def largest_batch(batches: Iterable[list[int]], lengths: Sequence[int], max_tokens: float | None) -> list[int]:
    """The rows of the batch with the most tokens, padding included, of all batches of a run.

    Of batches that go through the model in parts of `max_tokens` it is a part. None: rows are laid end to end.
    """

    def size(rows: Sequence[int]) -> int:
        tokens = [lengths[row] for row in rows]
        return sum(tokens) if max_tokens is None else len(tokens) * max(tokens)

    if max_tokens is None:
        return max(batches, key=size)
    cut = (batch[part] for batch in batches for part in parts([lengths[row] for row in batch], max_tokens))
    return max(cut, key=size)


def _rehearse(trainer: StepTrainer, rows: Sequence[int]) -> None:
    """Forward and backward over these rows; afterwards only the memory's peak tells that it has happened."""
    model, data = trainer.model_wrapped, trainer.train_dataset
    assert model is not None
    assert data is not None
    with random_state_kept(), _counters_kept(trainer):
        model.train()
        batch = trainer.data_collator([data[row] for row in rows])
        loss = trainer.compute_loss(model, trainer._prepare_inputs(batch))
        assert isinstance(loss, torch.Tensor)
        loss.backward()
        model.zero_grad()


@contextmanager
def _counters_kept(trainer: StepTrainer) -> Iterator[None]:
    counted = {name: copy.deepcopy(value) for name, value in vars(trainer).items() if name in _COUNTERS}
    yield
    vars(trainer).update(counted)
