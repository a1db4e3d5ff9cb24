"""What came of a run of a recipe: the yield table, and a look at ten of its rows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from alignkit.core.config import PricesConfig
from alignkit.core.records import Row
from alignkit.reporting.plain import code, one_line
from alignkit.teacher.client import Usage
from alignkit.teacher.prices import show_cost
from alignkit.teacher.recipes.asking import Step

if TYPE_CHECKING:
    from rich.console import Console

HEADER = ("step", "asked", "parsed", "from store", "not usable because")
_NOT_SHOWN = ("id", "parents", "source", "scores")


@dataclass(frozen=True)
class Yields:
    """The account of a recipe: by step what was asked and could be read, what was kept and dropped, what it took."""

    steps: Mapping[str, Step]
    kept: int
    dropped: Mapping[str, int]
    """Dropped rows by reason; they include the answers that could not be read."""
    usage: Usage
    prices: PricesConfig

    def text(self) -> str:
        """The table for a terminal."""
        rows = [HEADER, *self._rows()]
        width = max(len(name) for name, *_ in (*rows, *self._sums()))
        lines = [f"{row[0]:{width}s}{row[1]:>10s}{row[2]:>10s}{row[3]:>12s}  {row[4]}".rstrip() for row in rows]
        return "\n".join([*lines, *(f"{name:{width}s}  {one_line(value)}" for name, value in self._sums())]) + "\n"

    def markdown(self) -> str:
        """The table for a datasheet."""
        header, line = " | ".join(HEADER), "--- | ---: | ---: | ---: | ---"
        rows = [" | ".join((code(name), *counts, code(why))) for name, *counts, why in self._rows()]
        table = "\n".join(f"| {row} |" for row in (header, line, *rows))
        return table + "\n\n" + "\n".join(f"- {name}: {code(value)}" for name, value in self._sums()) + "\n"

    @property
    def cost(self) -> str:
        """Of every answer, stored ones too, in words, with currency and the day of the prices."""
        return show_cost(self.usage.cost, self.prices)

    def _rows(self) -> list[tuple[str, ...]]:
        return [
            (name, f"{step.asked:,}", f"{step.usable:,}", f"{step.stored:,}", _reasons(step.refused))
            for name, step in self.steps.items()
        ]

    def _sums(self) -> list[tuple[str, str]]:
        """What is said below the table, by name."""
        total = sum(self.dropped.values())
        return [
            ("kept", f"{self.kept:,}"),
            ("dropped", f"{total:,}" + (f": {_reasons(self.dropped)}" if total else "")),
            *what_it_took(self.usage, self.prices),
        ]


def what_it_took(usage: Usage, prices: PricesConfig) -> list[tuple[str, str]]:
    """Tokens and cost of every answer, stored ones too, by name."""
    tokens = f"{usage.prompt_tokens:,} in prompts, {usage.completion_tokens:,} in answers"
    if usage.unreported:
        tokens += f"; {usage.unreported:,} replies came without a count and are missing here"
    return [("tokens", tokens), ("cost", show_cost(usage.cost, prices))]


def print_ten_rows(rows: Sequence[Row], console: Console | None = None) -> None:
    """Show ten rows, evenly spread over all, a line for each of their fields, cut at the width of the terminal.

    Their text is only text: neither rich's markup nor control characters of a terminal work in it.
    """
    from rich.console import Console
    from rich.text import Text

    console = console or Console(highlight=False, emoji=False, markup=False)
    for place in spread(len(rows), 10):
        row = rows[place]
        console.print(Text(one_line(row.id), style="bold"), no_wrap=True, overflow="ellipsis")
        for name, value in row.model_dump(mode="json", exclude_none=True).items():
            if name not in _NOT_SHOWN and value not in ("", [], {}):
                line = Text(f"  {one_line(name, 20):12s} ", style="dim") + Text(one_line(as_text(value)))
                console.print(line, no_wrap=True, overflow="ellipsis")


def spread(count: int, most: int) -> list[int]:
    """At most so many of the positions 0 .. count - 1, evenly spread, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return [step * (count - 1) // (most - 1) for step in range(most)]


def as_text(value: Any) -> str:
    """A field of a row in words: conversations turn by turn, other structures as JSON."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(turn, dict) and "role" in turn for turn in value):
        return " ".join(f"{turn['role']}: {turn.get('content', '')}" for turn in value)
    return json.dumps(value, ensure_ascii=False)


def _reasons(counts: Mapping[str, int]) -> str:
    """Reasons and how often, the most frequent first."""
    return ", ".join(f"{reason} {count:,}" for reason, count in sorted(counts.items(), key=lambda each: -each[1]))
