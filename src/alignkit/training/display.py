"""Progress of a training: a bar with its figures on a terminal, a line now and then in a log."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

from alignkit.core.manifest import peak_gpu_memory_bytes, peak_memory_bytes

LOG = logging.getLogger("alignkit")

LINE_SECONDS = 60.0
"""A log that is no terminal gets a line at most this often."""


class Display:
    """Shows steps done, loss, tokens a second, peak memory and the time that is left."""

    def __init__(self, description: str, first: int, last: int) -> None:
        self._description = description
        self._first = first
        self._last = last
        self._loss = ""
        self._began = self._lined = time.monotonic()
        self._bar: Any = _bar(description, first, last) if sys.stdout.isatty() else None
        if self._bar is None:
            LOG.info("%s: %d steps to do", description, last - first)

    def note_loss(self, loss: float) -> None:
        """Show this loss from now on."""
        self._loss = f"loss {loss:.4f}"

    def advance(self, step: int, tokens_per_second: float) -> None:
        """Show that `step` is done."""
        figures = ", ".join(part for part in (self._loss, f"{tokens_per_second:,.0f} tokens/s", _peak()) if part)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, figures=figures)
            return
        now = time.monotonic()
        if now - self._lined >= LINE_SECONDS and step < self._last:
            self._lined = now
            left = (now - self._began) / (step - self._first) * (self._last - step)
            LOG.info("%s: step %d of %d, %s, %s left", self._description, step, self._last, figures, _duration(left))

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()


def _bar(description: str, first: int, last: int) -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
        transient=True,
    )
    bar.add_task(description, total=last, completed=first, figures="")
    bar.start()
    return bar


def _peak() -> str:
    gpu = peak_gpu_memory_bytes()
    return f"peak {gpu / 2**30:.1f} GiB on the GPU" if gpu else f"peak {peak_memory_bytes() / 2**30:.1f} GiB"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
