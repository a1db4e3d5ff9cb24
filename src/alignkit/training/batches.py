"""Which rows go together: batches of similar length, the same on every machine and after every interruption."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch.utils.data import Sampler

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

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next iteration belongs to (called by the data loader)."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        steps: list[list[int]] = []
        for start in range(0, len(order), WINDOW * self.rows_per_step):
            window = sorted(order[start : start + WINDOW * self.rows_per_step], key=lambda row: self.lengths[row])
            steps += [window[first : first + self.rows_per_step] for first in range(0, len(window), self.rows_per_step)]
        full = [step for step in steps if len(step) == self.rows_per_step]
        smaller = [step for step in steps if len(step) < self.rows_per_step]
        for index in torch.randperm(len(full), generator=generator).tolist():
            yield from full[index]
        for step in smaller:
            yield from step


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
    plan = LengthGroupedSampler(sampler.lengths, sampler.rows_per_step, sampler.seed)
    while steps > 0:
        order = list(plan)
        for first in range(0, len(order), plan.rows_per_step)[:steps]:
            yield order[first : first + plan.rows_per_step]
            steps -= 1
        plan.set_epoch(plan.epoch + 1)
