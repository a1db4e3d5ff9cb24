"""Which of a run's processes this is. A launcher (torchrun, accelerate, DeepSpeed) starts several and says so by
environment variables; all of them train, and the first one, the main process, writes and speaks for them all.
"""

from __future__ import annotations

import math
import os

from alignkit.core.config import TrainConfig
from alignkit.core.errors import UserError


def world_size() -> int:
    """How many processes the launcher has started for this run; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def rank() -> int:
    """The number of this process among them, from 0."""
    return int(os.environ.get("RANK") or 0) if world_size() > 1 else 0


def local_rank() -> int:
    """The number of this process among those on this machine, which is the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK") or 0)


def local_world_size() -> int:
    """How many of them run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or 1) if world_size() > 1 else 1


def is_main() -> bool:
    """Whether this is the process that writes and prints."""
    return rank() == 0


def batches_of_process(train: TrainConfig, processes: int) -> tuple[int, int]:
    """Rows that each of these processes reads at once, at most `batch_size`, and how many times in an optimizer step.

    The step keeps its batch_size * gradient_accumulation rows however many processes share it, so that their number
    changes nothing but the time. Raises `UserError` when they cannot have equally many.
    """
    rows = train.batch_size * train.gradient_accumulation
    own, rest = divmod(rows, processes)
    if rest:
        fitting = " or ".join(str(each) for each in (rows - rest, rows - rest + processes) if each)
        raise UserError(
            f"train.batch_size * train.gradient_accumulation = {rows} rows make an optimizer step, which {processes} "
            f"processes cannot share equally: set them to make {fitting} rows"
        )
    times = next(times for times in range(math.ceil(own / train.batch_size), own + 1) if own % times == 0)
    return own // times, times
