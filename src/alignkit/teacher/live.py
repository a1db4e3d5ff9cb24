"""The line that shows how asking goes on: how much is done, how fast, what failed, what it costs, and what is left."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

from alignkit.core.config import PricesConfig
from alignkit.teacher.client import Usage
from alignkit.teacher.prices import show_cost

if TYPE_CHECKING:
    from rich.progress import Progress

LOG = logging.getLogger("alignkit")
SECONDS_BETWEEN_LINES = 15.0
"""In a log; a terminal has one line that changes."""
SECONDS_BETWEEN_CHANGES = 0.2


class LiveLine:
    """Shows the state of one `ask`. Use as a context manager; `update` is cheap and may be called at every answer."""

    def __init__(self, total: int, usage: Usage, prices: PricesConfig, who: str = "teacher") -> None:
        self.total, self.who = total, who
        self.usage, self.prices = usage, prices
        self.done = self.failed = 0
        self.repeated = 0
        """Attempts that were not the first."""
        self._began = self._shown = time.monotonic()
        self._progress: Progress | None = None

    def __enter__(self) -> LiveLine:
        if sys.stdout.isatty():
            from rich.progress import Progress, TextColumn

            self._progress = Progress(TextColumn("{task.description}"), transient=True, auto_refresh=False)
            self._progress.add_task(self.line(), total=self.total)
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress:
            self._progress.stop()

    def update(self, *, failed: bool) -> None:
        """Count one more request as done with, and show it when it is time to."""
        self.done += 1
        self.failed += failed
        now = time.monotonic()
        pause = SECONDS_BETWEEN_CHANGES if self._progress else SECONDS_BETWEEN_LINES
        if now - self._shown < pause:
            return
        self._shown = now
        if self._progress:
            self._progress.update(self._progress.task_ids[0], description=self.line(), refresh=True)
        else:
            LOG.info("%s", self.line())

    def line(self) -> str:
        """The state in one line."""
        seconds = time.monotonic() - self._began
        rate = self.done / seconds if seconds > 0 else 0.0
        left = f"{_clock((self.total - self.done) / rate)} left" if rate else "time left unknown"
        return (
            f"{self.who}: {self.done:,} of {self.total:,} answered, {rate:.1f}/s, {self.failed:,} failed, "
            f"{self.repeated:,} attempts repeated, cost {show_cost(self.usage.paid_now, self.prices)}, {left}"
        )


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
