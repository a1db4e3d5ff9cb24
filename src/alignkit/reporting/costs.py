"""What a run took: the teacher's tokens and money, and memory as predicted and as measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from alignkit.reporting.runs import Run, Step, read_aside
from alignkit.reporting.tables import asks_teacher

_COUNTS = ("requests", "from_store", "failed", "prompt_tokens", "completion_tokens", "unreported")


@dataclass(frozen=True)
class Cost:
    """What one step asked of a teacher; None where the step did not record it."""

    step: str
    teacher: str
    scripted: bool
    counts: dict[str, int] | None
    cost: float | None
    paid_now: float | None
    currency: str


def costs(run: Run) -> list[Cost]:
    """A line for each complete step that asked a teacher."""
    return [_cost(step) for step in run.steps if step.complete and ("usage" in step.metrics or asks_teacher(step))]


def totals(lines: Sequence[Cost]) -> dict[str, Any]:
    """All steps together: counts of those that recorded them; the cost is known only where that of each is."""
    known = [line.counts for line in lines if line.counts is not None]
    paid = [line.cost for line in lines]
    return {
        **{name: sum(each[name] for each in known) for name in _COUNTS},
        "cost": None if None in paid or not paid else sum(each for each in paid if each is not None),
        "currency": ", ".join(dict.fromkeys(line.currency for line in lines)),
        "not_recorded": [line.step for line in lines if line.counts is None],
    }


def memory(run: Run) -> list[dict[str, Any]]:
    """A line for each step: bytes predicted before it began, measured on a GPU, and at most held by its process.

    `ratio`, predicted over measured, is only there with a GPU: without one nothing comparable is measured.
    """
    lines = []
    for step in run.steps:
        predicted = step.metrics.get("predicted_memory_bytes")
        measured = step.manifest.get("peak_gpu_memory_bytes", 0) or None
        lines.append(
            {
                "name": step.name,
                "predicted": predicted,
                "measured": measured,
                "ratio": predicted / measured if predicted and measured else None,
                "process": step.manifest.get("peak_memory_bytes", 0) or None,
            }
        )
    return lines


def preflights(run: Run) -> list[dict[str, Any]]:
    """What each `preflight` in the run's folder estimated: machine, and for each stage bytes and whether it fits."""
    found = []
    for step in read_aside(run.folder, "preflight"):
        path = step.folder / "preflight.json"
        if path.is_file():
            report = json.loads(path.read_text(encoding="utf-8"))
            stages = [{key: each[key] for key in ("stage", "peak_bytes", "fits")} for each in report["stages"]]
            found.append({"name": step.name, "model": report["model"], "machine": report["machine"], "stages": stages})
    return found


def _cost(step: Step) -> Cost:
    teacher = step.config.get("teacher", {})
    usage = step.metrics.get("usage")
    return Cost(
        step.name,
        str(step.metrics.get("teacher") or teacher.get("model", "")),
        teacher.get("mode") == "scripted",
        {name: usage.get(name) or 0 for name in _COUNTS} if usage else None,
        usage.get("cost") if usage else None,
        usage.get("paid_now") if usage else None,
        str(teacher.get("prices", {}).get("currency", "")),
    )
