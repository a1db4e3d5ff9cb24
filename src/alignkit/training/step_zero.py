"""Step 0: before training, one forward and backward pass over the batch that needs the most memory.

A run that is too large for the GPU then says so in its first seconds, and not hours later when the longest rows come
by. The gradients are thrown away and the random state is put back: training is the same with it and without it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

from alignkit.core.artifact import Artifact
from alignkit.core.errors import UserError
from alignkit.core.manifest import peak_gpu_memory_bytes
from alignkit.training.batches import LengthGroupedSampler, parts, planned_steps
from alignkit.training.randomness import random_state_kept

if TYPE_CHECKING:
    from transformers import Trainer

_COUNTERS = ("_metrics", "_total_train_tokens", "right", "pairs")
"""What trainers count while they compute a loss."""


class StepZero(TrainerCallback):
    """Try the largest batch when training begins, with everything in place as in a real step."""

    def __init__(self, trainer: Trainer, sampler: LengthGroupedSampler, artifact: Artifact) -> None:
        self._trainer = trainer
        self._sampler = sampler
        self._artifact = artifact

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Run it, and record the peak memory on a GPU. Raises `UserError` when the batch does not fit."""
        end_to_end = bool(getattr(self._trainer, "padding_free", False))
        max_tokens = None if end_to_end else getattr(self._trainer, "max_batch_tokens", math.inf)
        steps = planned_steps(self._sampler, state.max_steps)
        rows = largest_batch(steps, self._sampler.lengths, args.train_batch_size, max_tokens)
        try:
            _rehearse(self._trainer, rows)
        except torch.OutOfMemoryError as error:
            longest = max(self._sampler.lengths[row] for row in rows)
            raise UserError(
                f"out of GPU memory with the largest batch, {len(rows)} rows of up to {longest} tokens, before the "
                "first step. Lower train.batch_size and raise train.gradient_accumulation by the same factor, or set "
                "train.gradient_checkpointing=true, or lower model.max_length."
            ) from error
        if peak := peak_gpu_memory_bytes():
            self._artifact.metrics["step_0_peak_gpu_memory_bytes"] = peak


def largest_batch(
    steps: Iterator[list[int]], lengths: Sequence[int], batch_size: int, max_tokens: float | None
) -> list[int]:
    """The rows of the batch with the most tokens, padding included, of all batches of a run.

    Of batches that go through the model in parts of `max_tokens` it is a part. None: rows are laid end to end.
    """

    def size(rows: Sequence[int]) -> int:
        tokens = [lengths[row] for row in rows]
        return sum(tokens) if max_tokens is None else len(tokens) * max(tokens)

    batches = (step[first : first + batch_size] for step in steps for first in range(0, len(step), batch_size))
    if max_tokens is None:
        return max(batches, key=size)
    cut = (batch[part] for batch in batches for part in parts([lengths[row] for row in batch], max_tokens))
    return max(cut, key=size)


def _rehearse(trainer: Trainer, rows: Sequence[int]) -> None:
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
def _counters_kept(trainer: Trainer) -> Iterator[None]:
    counted = {name: copy.deepcopy(value) for name, value in vars(trainer).items() if name in _COUNTERS}
    yield
    vars(trainer).update(counted)
