"""Ctrl-C and SIGTERM during training: finish the step, write its checkpoint, and stop."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

from alignkit.core.ranks import world_size

LOG = logging.getLogger("alignkit")


class StopAtStepEnd(TrainerCallback):
    """Turns the first signal into a checkpoint and a stop at the end of the step; the same signal again stops at once.

    Another signal is part of the first: at Ctrl-C a terminal interrupts a pipeline and its stages, and then the
    pipeline terminates its stages.

    The stop also closes the log line that is under way, since a line's means are not part of a checkpoint: loss.jsonl
    then has one line more than that of a run in one piece. The weights are the same.
    """

    def __init__(self) -> None:
        self._signals: set[int] = set()
        self.requested = False
        """Whether a signal has come, to this process or another of the same training."""
        self.stopped = False
        """Whether the training was stopped by it: one that comes at the last step has nothing to stop."""

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals in this block. Outside the main thread, where Python gives none, it does nothing.

        When one of several processes fails, torchrun signals the others, which then lose their connection to it: that
        is an interruption, too, and the first one tells why. Raises `KeyboardInterrupt` for it.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        except Exception as error:
            if self.requested and not self.stopped and world_size() > 1:
                raise KeyboardInterrupt from error
            raise
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number in self._signals:
            raise KeyboardInterrupt
        self._signals.add(number)
        self.requested = True
        LOG.info("interrupted: a checkpoint follows at the end of this step (the same signal again stops at once)")

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for a log line, a checkpoint and the end when a signal has come, to whichever process it came."""
        if args.world_size > 1:
            flag = torch.tensor(float(self.requested), device=args.device)
            torch.distributed.all_reduce(flag)
            self.requested = bool(flag)
        if self.requested and not control.should_training_stop:
            self.stopped = True
            control.should_log = control.should_save = control.should_training_stop = True
