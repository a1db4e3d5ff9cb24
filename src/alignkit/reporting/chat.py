"""Answers in a terminal while they are written, one below the question or several side by side.

What a model wrote is never markup and never steers the terminal: it is shown as text without control characters.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import TracebackType

from rich.console import Console, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from alignkit.reporting.plain import visible

REFRESH_SECONDS = 0.1


class AnswerView:
    """A block in which `texts`, by model, grow. Where there is no terminal, the finished texts are printed once."""

    def __init__(self, console: Console, models: Sequence[str]) -> None:
        self.console = console
        self.texts = dict.fromkeys(models, "")
        self.notes = dict.fromkeys(models, "")
        """What is said beside an answer: that it was cut, its reward."""
        self._live = Live(console=console, auto_refresh=False, vertical_overflow="visible")
        self._shown = 0.0

    def __enter__(self) -> AnswerView:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self._live.update(columns(self.texts, self.notes), refresh=True)
            self._live.stop()
            return
        for model, text in self.texts.items():
            note = f" [{self.notes[model]}]" if self.notes[model] else ""
            self.console.print(Text(visible(f"{model}> {text}{note}")), soft_wrap=True)

    def add(self, model: str, text: str) -> None:
        """More of an answer."""
        self.texts[model] += text
        now = time.monotonic()
        if self.console.is_terminal and now - self._shown > REFRESH_SECONDS:
            self._shown = now
            self._live.update(columns(self.texts, self.notes), refresh=True)


def columns(texts: Mapping[str, str], notes: Mapping[str, str]) -> RenderableType:
    """Each model's text in a panel under its name, side by side."""
    table = Table.grid(expand=True)
    for _ in texts:
        table.add_column(ratio=1)
    table.add_row(
        *(
            Panel(Text(visible(text)), title=Text(model), subtitle=Text(visible(notes[model])), title_align="left")
            for model, text in texts.items()
        )
    )
    return table
