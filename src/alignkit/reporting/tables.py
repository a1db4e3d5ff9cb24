"""The report's tables about the run itself: its stages, checks, commands, and who taught and graded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alignkit.reporting.runs import Run, Step

_NOT_ROWS = ("dropped.jsonl", "loss.jsonl", "samples.jsonl")
"""Outputs that are not what a stage hands on."""


def stage_table(run: Run) -> list[dict[str, Any]]:
    """A line for each step of a run: what it did, with how many rows, at what cost, and whether its checks passed."""
    return [
        {
            "name": step.name,
            "stage": step.stage,
            "status": step.manifest["status"],
            "error": step.manifest.get("error"),
            "summary": step.manifest.get("summary", ""),
            "rows_in": _rows_in(step),
            "outputs": _outputs(step),
            "dropped": step.manifest.get("dropped", {}),
            "seconds": step.manifest.get("seconds", 0),
            "memory": step.manifest.get("peak_memory_bytes", 0),
            "gpu_memory": step.manifest.get("peak_gpu_memory_bytes", 0),
            "passed": sum(check["passed"] for check in step.manifest["checks"]),
            "checks": len(step.manifest["checks"]),
        }
        for step in run.steps
    ]


def check_table(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A line for each check of each step: its result for every run (None where it was not made) and its detail."""
    lines: dict[tuple[str, str], dict[str, Any]] = {}
    for place, run in enumerate(runs):
        for step in run.steps:
            for check in step.manifest["checks"]:
                blank = {
                    "step": step.name,
                    "name": check["name"],
                    "detail": check["detail"],
                    "passed": [None] * len(runs),
                }
                line = lines.setdefault((step.name, check["name"]), blank)
                line["passed"][place] = check["passed"] and line["passed"][place] is not False
                if not check["passed"]:
                    line["detail"] = check["detail"]
    return list(lines.values())


def lineage(run: Run) -> list[dict[str, Any]]:
    """A line for each step: the steps it read from, the files from outside the run, and the command that ran it."""
    home = run.folder.resolve()
    lines = []
    for step in run.steps:
        outside = [entry for entry in step.manifest["inputs"] if home not in Path(entry["path"]).resolve().parents]
        lines.append(
            {
                "name": step.name,
                "parents": [parent.name for parent in run.parents(step)],
                "outside": [_from_outside(entry) for entry in outside],
                "command": step.manifest["command"],
            }
        )
    return lines


def teacher_statement(run: Run) -> str:
    """Who wrote and graded in this run, in plain words; empty when nobody did."""
    steps = [step for step in run.steps if asks_teacher(step)]
    modes = {str(step.config["teacher"].get("mode")) for step in steps}
    if modes == {"scripted"}:
        return (
            "Teacher and grader of this run are scripted: fixed rules inside an invented closed world, not a language "
            f"model. The training answers and the grades come from these rules{_on_purpose(steps)}. The figures show "
            "whether the stages do their work; they say nothing about other texts or about a language model as teacher."
        )
    models = sorted({str(step.config["teacher"].get("model")) for step in steps})
    if "scripted" in modes:
        return f"Part of this run was taught by a scripted, rule-based teacher, part by {', '.join(models)}."
    return f"Teacher and grader: {', '.join(models)}." if models else ""


def facts(run: Run) -> dict[str, str]:
    """The base model, the seed, the machine's versions: what identifies the run beside its commands."""
    models = {
        step.config["model"]["name"]: step.config["model"].get("path", "")
        for step in run.steps
        if "model" in step.config
    }
    versions: Mapping[str, str] = run.steps[-1].manifest.get("versions", {})
    return {
        "base model": ", ".join(f"{name} ({path})" for name, path in models.items()),
        "started": min(step.manifest["started"] for step in run.steps).replace("T", " ")[:16] + " UTC",
        **{name: version for name, version in versions.items() if version != "not installed"},
    }


def _rows_in(step: Step) -> int | None:
    """Rows that a step read, as far as its inputs are row files: all but what `skip` and `limit` leave out."""
    counts = []
    for entry in step.manifest["inputs"]:
        if entry["rows"] is not None:
            limits: Any = step.config.get(entry.get("key", "").split(".")[0])
            limits = limits if isinstance(limits, dict) else {}
            rest = max(0, entry["rows"] - (limits.get("skip") or 0))
            limit = limits.get("limit")
            counts.append(rest if limit is None else min(rest, limit))
    return sum(counts) if counts else None


def _outputs(step: Step) -> list[tuple[str, int | None]]:
    """What a step handed on: (file or folder, its rows if it has rows)."""
    return [(entry["path"], entry["rows"]) for entry in step.manifest["outputs"] if entry["path"] not in _NOT_ROWS]


def _from_outside(entry: Mapping[str, Any]) -> str:
    """A short name for an input from outside the run folder: its last two parts and the beginning of its hash."""
    digest = f" ({entry['sha256'][:8]})" if entry.get("sha256") else ""
    return "/".join(Path(entry["path"]).parts[-2:]) + digest


def _on_purpose(steps: Sequence[Step]) -> str:
    """What to add when the scripted teacher was told to write wrong answers, too."""
    rates = [step.config["teacher"].get("mistake_rate", 0) for step in steps if step.stage == "expand"]
    return f" ({100 * max(rates):.0f} % of the training answers are wrong on purpose)" if any(rates) else ""


def asks_teacher(step: Step) -> bool:
    """Whether a step's configuration makes it ask the teacher, rather than merely hold one."""
    config = step.config
    asked = {
        "expand": True,
        "judge": True,
        "sample": config.get("generator") == "openai",
        "select": config.get("quality", {}).get("mode") == "judge",
        "rejection_sampling": config.get("scorer") == "judge" or config.get("grade") is True,
        "evaluate": config.get("judge") is True,
    }
    return "teacher" in config and asked.get(step.stage, False)
