"""Which rows go together: batches of similar length, the same on every machine and after every interruption."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import Trainer

WINDOW = 16
"""Optimizer steps whose rows are sorted together: wide enough to save padding, narrow enough to keep steps varied."""


class LengthGroupedSampler(Sampler[int]):
    """Row numbers in an order that puts rows of similar length into the same optimizer step.

    Rows are shuffled, cut into windows of `WINDOW` steps, sorted by length within each window and cut into steps, and
    the steps are shuffled; a last, smaller step stays last. The order depends on seed and epoch alone, never on the
    state of a random generator, so a resumed run sees the same batches as an uninterrupted one.
    """

    def __init__(self, lengths: Sequence[int], rows_per_step: int, seed: int) -> None:
        self.lengths = lengths
        self.rows_per_step = rows_per_step
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def sizes(self) -> list[int]:
        """Rows of each optimizer step of an epoch, in no particular order."""
        full, rest = divmod(len(self.lengths), self.rows_per_step)
        return [self.rows_per_step] * full + [rest] * (rest > 0)

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next iteration belongs to (called by the data loader)."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        for step in self.steps():
            yield from step

    def steps(self) -> Iterator[list[int]]:
        """The rows of one optimizer step after the other."""
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        steps: list[list[int]] = []
        for start in range(0, len(order), WINDOW * self.rows_per_step):
            window = sorted(order[start : start + WINDOW * self.rows_per_step], key=lambda row: self.lengths[row])
            steps += [window[first : first + self.rows_per_step] for first in range(0, len(window), self.rows_per_step)]
        full = [step for step in steps if len(step) == self.rows_per_step]
        for index in torch.randperm(len(full), generator=generator).tolist():
            yield full[index]
        yield from (step for step in steps if len(step) < self.rows_per_step)


class OwnBatches(Sampler[list[int]]):
    """The batches of one process: its share of every optimizer step, in batches of at most `batch_size` rows.

    The processes take turns through a step's rows, which are sorted by length, so that all have about the same to do.
    `even`: see `share`.
    """

    drop_last = False

    def __init__(
        self, sampler: LengthGroupedSampler, batch_size: int, rank: int, world_size: int, even: bool = False
    ) -> None:
        self.sampler = sampler
        self.even = even
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        return sum(_batches(size, self.batch_size, self.world_size) for size in self.sampler.sizes())

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.sampler.steps():
            yield from share(step, self.batch_size, self.rank, self.world_size, self.even)


def share(step: Sequence[int], batch_size: int, rank: int, world_size: int, even: bool = False) -> list[list[int]]:
    """The batches of process `rank` out of the rows of an optimizer step; every process gets equally many.

    No row is given twice, unless the last step of an epoch has fewer rows than would make a batch for each process:
    they wait for each other's gradients, so that none can go without. Then rows are repeated. With `even`, for trainers
    that want as many rows from each process, so is one row of every process that has one fewer than the first.
    """
    own = list(step[rank::world_size]) or [step[rank % len(step)]]
    if even and len(own) * world_size < len(step):
        own.append(own[-1])
    batches = [own[first : first + batch_size] for first in range(0, len(own), batch_size)]
    if len(batches) < _batches(len(step), batch_size, world_size):  # the first processes have one row more
        last = batches.pop()
        batches += [last[:-1] or last, last[-1:]]
    return batches


def _batches(rows: int, batch_size: int, world_size: int) -> int:
    """How many batches each process makes of a step's rows."""
    return math.ceil(math.ceil(rows / world_size) / batch_size)


def parts(lengths: Sequence[int], max_tokens: float) -> list[slice]:
    """A batch cut into runs of rows that, padded to the longest of the run, have at most `max_tokens` tokens.

    A row that alone has more is a part of its own.
    """
    cuts, longest = [0], 0
    for row, length in enumerate(lengths):
        longest = max(longest, length)
        if row > cuts[-1] and longest * (row + 1 - cuts[-1]) > max_tokens:
            cuts.append(row)
            longest = length
    return [slice(first, last) for first, last in pairwise([*cuts, len(lengths)])]


def planned_steps(sampler: LengthGroupedSampler, steps: int) -> Iterator[list[int]]:
    """The row numbers of each of a run's first `steps` optimizer steps, in order."""
    plan = copy.copy(sampler)
    plan.set_epoch(0)
    while steps > 0:
        epoch = list(plan.steps())[:steps]
        yield from epoch
        steps -= len(epoch)
        plan.set_epoch(plan.epoch + 1)


class StepTrainer(Trainer):
    """A trainer whose optimizer steps are those of a `LengthGroupedSampler`; its processes share each of them.

    Stands before the trainer of an objective in the bases of a class.
    """

    even = False
    """See `share`."""
    max_batch_tokens = math.inf
    """Tokens, padding included, that go through the model at once: see `parts`."""

    def row_lengths(self) -> Sequence[int]:
        """Tokens of each row."""
        raise NotImplementedError

    @cached_property
    def sampler(self) -> LengthGroupedSampler:
        """The order of the rows, the same in every process."""
        arguments = self.args
        rows_per_step = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
        return LengthGroupedSampler(self.row_lengths(), rows_per_step, arguments.seed)

    def own_batches(self, step: Sequence[int]) -> list[list[int]]:
        """This process's batches of an optimizer step."""
        arguments = self.args
        return share(step, arguments.train_batch_size, arguments.process_index, arguments.world_size, self.even)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The rows as this process reads them: batches by length, its share of each step.

        transformers' own loader would deal out whole batches and, for the last step, repeat rows of the first.
        """
        from accelerate.data_loader import prepare_data_loader

        arguments = self.args
        batches = OwnBatches(
            self.sampler, arguments.train_batch_size, arguments.process_index, arguments.world_size, self.even
        )
        rows: Dataset[Any] = self._remove_unused_columns(self.train_dataset, description="training")
        loader = DataLoader(
            rows, batch_sampler=batches, collate_fn=self.data_collator, pin_memory=arguments.dataloader_pin_memory
        )
        device = self.accelerator.device
        ready: DataLoader[Any] = prepare_data_loader(
            loader, device, num_processes=1, process_index=0, put_on_device=True
        )
        return ready
