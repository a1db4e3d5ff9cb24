"""The samples of the report: questions with every model's answer side by side, as data for the page and its script."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from alignkit.evaluation.predictions import ModelAnswer, Prediction
from alignkit.reporting.differences import word_differences
from alignkit.reporting.held_out import GROUPS, HeldOut, in_turn
from alignkit.reporting.measures import FULL_MARKS, title
from alignkit.reporting.plain import visible
from alignkit.reporting.templating import as_data

MOST_CHARACTERS = 1200
"""Of one text on the page; the whole text is in predictions.jsonl."""
MOST_PASSAGES, PASSAGE_CHARACTERS = 4, 240
MOST_VALUES = 40
"""A tag with more values than that is no choice to filter by."""
AT_ONCE = {"better": 4, "worse": 4, "wrong": 2, "right": 2}
"""How many of each group are in the page itself, to be read without its script."""

_TAGS = ("kind", "form", "level", "held_out_name", "source")


@dataclass(frozen=True)
class Samples:
    """What the page shows of the first run's questions. `data` is what the script reads, and so its format."""

    data: dict[str, Any]
    first: list[dict[str, Any]]
    """The rows that are in the page itself."""
    counts: dict[str, int]
    """All questions by what became of them, from the first model of the ladder to the last."""
    total: int

    @property
    def shown(self) -> int:
        """How many questions the page holds."""
        return len(self.data["rows"])


def read_samples(held_out: HeldOut, most_bytes: int = 4_000_000) -> Samples:
    """As many questions as `most_bytes` hold, those of one group and form after those of another, in file order."""
    predictions = held_out.predictions[0]
    models = [*held_out.ladder, *(name for name in held_out.models if name not in held_out.ladder)]
    measures = held_out.measures
    statements = _Numbered()
    write = _writer(held_out, models, measures, statements)
    written: dict[int, dict[str, Any]] = {}
    room = most_bytes
    at_once = _at_once(held_out, predictions)
    for row in _by_group(held_out, predictions, at_once):
        entry = write(row)
        room -= _size(entry)
        if room - statements.size < 0 and written:
            break
        written[id(row)] = entry
    kept = [written[id(row)] for row in predictions if id(row) in written]
    data = {
        "systems": [
            {"name": visible(name, 80), "title": visible(held_out.title(name), 80), "colour": held_out.colour(name)}
            for name in models
        ],
        "measures": [{"name": name, "title": title(name), "full": FULL_MARKS.get(name, 1.0)} for name in measures],
        "from": 0,
        "to": len(held_out.ladder) - 1,
        "tags": _tags(kept),
        "statements": statements.texts,
        "total": len(predictions),
        "rows": kept,
    }
    counts = Counter(held_out.group(row) for row in predictions)
    first = [written[id(row)] for row in at_once if id(row) in written]
    return Samples(data, first, {group: counts[group] for group in GROUPS}, len(predictions))


class _Numbered:
    """Texts by number, each once: many questions are about the same statement."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.size = 0
        self._numbers: dict[str, int] = {}

    def __call__(self, text: str) -> int:
        if text not in self._numbers:
            self._numbers[text] = len(self.texts)
            self.texts.append(visible(text, MOST_CHARACTERS))
            self.size += _size(self.texts[-1])
        return self._numbers[text]


def _writer(
    held_out: HeldOut, models: Sequence[str], measures: Sequence[str], statements: _Numbered
) -> Callable[[Prediction], dict[str, Any]]:
    """From a question to its entry; equal answers of several models stand together."""

    def write(row: Prediction) -> dict[str, Any]:
        told: dict[tuple[str, bool, tuple[str, ...]], dict[str, Any]] = {}
        for number, name in enumerate(models):
            if (answer := row.answers.get(name)) is not None:
                key = (answer.text, answer.finished, tuple(answer.contexts))
                told.setdefault(key, {"by": [], **_answer(answer, row.reference)})["by"].append(number)
        values = [[_rounded(row.score(name, measure)) for name in models] for measure in measures]
        tags = {tag: _value(value) for tag in _TAGS if (value := getattr(row, tag)) is not None}
        return {
            "id": visible(row.id, 80),
            "s": statements(row.instruction),
            "q": visible(row.input, MOST_CHARACTERS),
            "r": visible(row.reference, MOST_CHARACTERS),
            "t": tags,
            "g": held_out.group(row),
            "a": list(told.values()),
            "v": values,
        }

    return write


def _answer(answer: ModelAnswer, reference: str) -> dict[str, Any]:
    """An answer: its pieces against the reference, and what there is to say about it."""
    text, cut = answer.text, len(answer.text) > MOST_CHARACTERS
    entry: dict[str, Any] = {
        "d": word_differences(visible(text, MOST_CHARACTERS), visible(reference, MOST_CHARACTERS), cut=cut)
    }
    if cut:
        entry["n"] = len(text)
    if not answer.finished:
        entry["u"] = 1
    if answer.contexts:
        entry["c"] = [visible(each, PASSAGE_CHARACTERS) for each in answer.contexts[:MOST_PASSAGES]]
        entry["m"] = len(answer.contexts)
    return entry


def _by_group(held_out: HeldOut, rows: Sequence[Prediction], at_once: Sequence[Prediction]) -> Iterator[Prediction]:
    """First those that are in the page itself, then one of each group and form after the other."""
    yield from at_once
    there = {id(row) for row in at_once}
    yield from (row for row in in_turn(rows, held_out.group) if id(row) not in there)


def _at_once(held_out: HeldOut, rows: Sequence[Prediction]) -> list[Prediction]:
    """The rows that are in the page itself, group after group."""
    by_group: dict[str, list[Prediction]] = {group: [] for group in GROUPS}
    for row in rows:
        by_group[held_out.group(row)].append(row)
    return [row for group, found in by_group.items() for row in in_turn(found)[: AT_ONCE.get(group, 0)]]


def _tags(rows: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """The tags that can be filtered by, with their values in order of appearance."""
    found = {tag: list(dict.fromkeys(row["t"][tag] for row in rows if tag in row["t"])) for tag in _TAGS}
    return {tag: values for tag, values in found.items() if 2 <= len(values) <= MOST_VALUES}


def _value(value: Any) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else visible(str(value), 80)


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.3g}")


def _size(entry: Any) -> int:
    return len(as_data(entry).encode("utf-8", "replace")) + 1
