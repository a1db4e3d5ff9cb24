"""How long the texts of a run are: answers by model, and the rows that were trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from alignkit.data.lengths import summarise
from alignkit.data.words import words
from alignkit.reporting.held_out import HeldOut
from alignkit.reporting.runs import Run, read_aside


def answer_lengths(held_out: HeldOut) -> list[dict[str, Any]]:
    """A line for the references and for each model: words of its answers over all seeds, and how many were cut off."""
    rows = [row for rows in held_out.predictions for row in rows]
    lines = [_line("reference", "Reference", "muted", [row.reference for row in rows], 0)]
    for name in held_out.models:
        answers = [row.answers[name] for row in rows if name in row.answers]
        if answers:
            texts = [answer.text for answer in answers]
            unfinished = sum(not answer.finished for answer in answers)
            lines.append(_line(name, held_out.title(name), held_out.colour(name), texts, unfinished))
    return lines


def training_lengths(run: Run) -> list[dict[str, Any]]:
    """A line for each training step and each `lengths` step, as far as they counted tokens."""
    lines = []
    for step in run.of_stage("sft", "reward", "dpo"):
        found = step.metrics
        if found.get("rows") and found.get("tokens"):
            lines.append(
                {
                    "name": step.name,
                    "rows": found["rows"],
                    "tokens": found["tokens"],
                    "mean": found["tokens"] / found["rows"],
                    "learned": found["learned_tokens"] / found["tokens"] if "learned_tokens" in found else None,
                }
            )
    for step in read_aside(run.folder, "lengths"):
        if step.complete:
            found = step.metrics
            kept = {key: found[key] for key in ("rows", "tokens", "mean", "median", "p90", "p99", "longest")}
            lines.append({"name": step.name, **kept, "learned": None})
    return lines


def _line(name: str, title: str, colour: str, texts: Sequence[str], unfinished: int) -> dict[str, Any]:
    counted = [len(words(text)) for text in texts]
    longest = max(len(text) for text in texts)
    found = asdict(summarise(counted))
    return {
        "name": name,
        "title": title,
        "colour": colour,
        "answers": found["rows"],
        **{key: found[key] for key in ("mean", "median", "p90", "p99", "longest")},
        "longest_characters": longest,
        "unfinished": unfinished,
    }
