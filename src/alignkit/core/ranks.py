"""Which of a run's processes this is. A launcher (torchrun, accelerate, DeepSpeed) starts several and says so by
environment variables; all of them train, and the first one, the main process, writes and speaks for them all.
"""

from __future__ import annotations

import os


def world_size() -> int:
    """How many processes the launcher has started for this run; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def rank() -> int:
    """The number of this process among them, from 0."""
    return int(os.environ.get("RANK") or 0) if world_size() > 1 else 0


def local_rank() -> int:
    """The number of this process among those on this machine, which is the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK") or 0)


def is_main() -> bool:
    """Whether this is the process that writes and prints."""
    return rank() == 0
