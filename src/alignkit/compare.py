"""compare: put the jobs of a sweep side by side, as a table and a plot.

A sweep (`alignkit <stage> -m ...`) runs this stage when its jobs are done; run it by hand to refresh the comparison.

Reads:   folder                    the jobs of a sweep: a folder each, with job.json and a manifest
Writes:  comparison.md             what varies x status, seconds and every metric that is a number; a terminal shows
                                   of these the held-out ones and those that differ, as far as they fit
         comparison.svg            one panel for each metric that differs, one bar for each job

Overrides people use:
  folder=runs/demo/sft-sweep/jobs     which sweep
  metrics=[loss,exact_match]          only these metrics (default: all)
  name=comparison                     another output folder

Examples:
  python -m alignkit.compare folder=runs/default/sft-sweep/jobs
  python -m alignkit.sft -m +model=tiny train.learning_rate=1e-4,2e-4     # ends with this comparison
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from alignkit.core.artifact import Artifact, read_manifest
from alignkit.core.config import MISSING, StageConfig
from alignkit.core.errors import UserError

LOG = logging.getLogger("alignkit")

TERMINAL_COLUMNS = 8
"""A table of more columns is not read on a terminal."""
GAP = 2
"""Blanks between two columns there."""


@dataclass
class CompareConfig(StageConfig):
    """Which jobs to compare, by which metrics."""

    inputs: ClassVar[tuple[str, ...]] = ("folder",)

    folder: str = MISSING
    """The folder that holds a sweep's job folders."""
    metrics: list[str] = field(default_factory=list)
    """Metrics to show; empty: all that are numbers."""


@dataclass(frozen=True)
class JobResult:
    """One job of a sweep: what varied, how it ended, what it measured."""

    varied: dict[str, str]
    status: str
    seconds: float | None
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    """Metric -> low and high, for metrics that are estimates."""

    @property
    def label(self) -> str:
        """What varied, in one line."""
        return ", ".join(f"{key}={value}" for key, value in self.varied.items()) or "job"


def run(config: CompareConfig) -> Artifact:
    """Read the jobs, write the table, draw the plot."""
    with Artifact.open("compare", config) as artifact:
        if artifact.up_to_date:
            return artifact
        jobs = read_jobs(Path(config.folder))
        names = metric_names(jobs, config.metrics)
        table = markdown_table(jobs, names)
        path = artifact.write_text("comparison.md", table)
        shown = config.metrics or telling(jobs, names)
        LOG.info("%s", terminal_table(jobs, shown, shutil.get_terminal_size((120, 24)).columns))
        artifact.summary = f"{len(jobs)} jobs compared in {path}"
        if names:
            with artifact.output("comparison.svg") as figure:
                draw(jobs, [name for name in names if differs(jobs, name)] or names, figure)
            artifact.summary += " and comparison.svg"
        failed = sum(job.status != "complete" for job in jobs)
        artifact.metrics = {"jobs": len(jobs), "not_complete": failed}
    return artifact


def read_jobs(folder: Path) -> list[JobResult]:
    """The jobs of a sweep, ordered by what varies. Raises `UserError` when the folder holds none."""
    jobs = [_read_job(path) for path in sorted(folder.glob("*/job.json"))]
    if not jobs:
        raise UserError(f"folder={folder}: no jobs of a sweep here (no */job.json). A sweep is run with -m.")
    return sorted(jobs, key=lambda job: [_natural(value) for value in job.varied.values()])


def _read_job(path: Path) -> JobResult:
    from alignkit.reporting.runs import numbers

    job = json.loads(path.read_text(encoding="utf-8"))
    manifest = read_manifest(path.parent) if job["exit_code"] == 0 else None
    flat = dict(numbers((manifest or {}).get("metrics", {})))
    return JobResult(
        varied=job["overrides"],
        status="complete" if manifest else f"failed: {job['error'] or 'see log.txt'}",
        seconds=manifest["seconds"] if manifest else None,
        metrics={name: value for name, (value, _) in flat.items()},
        intervals={name: interval for name, (_, interval) in flat.items() if interval},
    )


def metric_names(jobs: Sequence[JobResult], wanted: Sequence[str]) -> list[str]:
    """The metrics to show. Raises `UserError` for a wanted one that no job has."""
    known = list(dict.fromkeys(name for job in jobs for name in job.metrics))
    for name in wanted:
        if name not in known:
            raise UserError(f"metrics: no job has '{name}'. There are: {', '.join(known) or 'none'}")
    return list(wanted) or known


def differs(jobs: Sequence[JobResult], name: str) -> bool:
    """Whether a metric has more than one value among the jobs that have it."""
    return len({job.metrics[name] for job in jobs if name in job.metrics}) > 1


def telling(jobs: Sequence[JobResult], names: Sequence[str]) -> list[str]:
    """What to look at first: the held-out metrics, then others that differ; all where there are none of these."""
    held_out = [name for name in names if name.startswith(("held_out.", "held_out_ndcg"))]
    return [*held_out, *(name for name in names if name not in held_out and differs(jobs, name))] or list(names)


def terminal_table(jobs: Sequence[JobResult], names: Sequence[str], width: int) -> str:
    """What varies, how each job ended, and the first metrics, as many as have room but at least one."""
    varied = list(dict.fromkeys(key for job in jobs for key in job.varied))
    columns = [[key, *(job.varied.get(key, "") for job in jobs)] for key in varied]
    columns.append(["status", *(job.status.split(":")[0] for job in jobs)])
    room = width + GAP - sum(_width(column) for column in columns)
    fitting = 0
    for name in names:
        column = [name, *(_cell(job, name) for job in jobs)]
        room -= _width(column)
        if fitting and (room < 0 or len(columns) >= TERMINAL_COLUMNS):
            break
        columns.append(column)
        fitting += 1
    padded = [[cell.ljust(_width(column)) for cell in column] for column in columns]
    lines = ["".join(cells).rstrip() for cells in zip(*padded, strict=True)]
    if fitting < len(names):
        lines.append(f"({len(names) - fitting} more metrics in comparison.md)")
    return "\n".join(lines)


def _width(column: Sequence[str]) -> int:
    return max(map(len, column)) + GAP


def markdown_table(jobs: Sequence[JobResult], names: Sequence[str]) -> str:
    """A row for each job: what varies, status, seconds, and each metric, with its interval if it has one."""
    varied = list(dict.fromkeys(key for job in jobs for key in job.varied))
    header = [*varied, "status", "seconds", *names]
    lines = [header, ["---"] * len(header)]
    for job in jobs:
        seconds = "" if job.seconds is None else f"{job.seconds:.1f}"
        lines.append(
            [*(job.varied.get(key, "") for key in varied), job.status, seconds, *(_cell(job, n) for n in names)]
        )
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def _cell(job: JobResult, name: str) -> str:
    if name not in job.metrics:
        return ""
    low_high = job.intervals.get(name)
    return _short(job.metrics[name]) + (f" ({_short(low_high[0])} to {_short(low_high[1])})" if low_high else "")


def _short(value: float) -> str:
    """Four significant digits; whole numbers in full."""
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def draw(jobs: Sequence[JobResult], names: Sequence[str], path: Path) -> None:
    """A panel for each metric with a bar for each job; whiskers where the metric has an interval."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.6 + len(names) * (0.7 + 0.28 * len(jobs))), layout="constrained")
    panels = figure.subplots(len(names), 1, squeeze=False)[:, 0]
    labels = [job.label for job in jobs]
    for panel, name in zip(panels, names, strict=True):
        values = [job.metrics.get(name, 0.0) for job in jobs]
        panel.barh(labels, values, color="#4c78a8")
        for row, job in enumerate(jobs):
            if name in job.intervals:
                panel.plot(job.intervals[name], [row, row], color="black", linewidth=1.5)
            note = f" {_short(job.metrics[name])}" if name in job.metrics else f" {job.status.split(':')[0]}"
            end = job.intervals.get(name, (0.0, values[row]))[1]
            panel.annotate(note, (max(end, 0.0), row), va="center", fontsize=8)
        panel.set_title(name, fontsize=9, loc="left")
        panel.invert_yaxis()
        panel.margins(x=0.15)
    figure.savefig(path, format="svg", metadata={"Date": None})


def _natural(value: str) -> tuple[float, str]:
    """Sort key: numbers by size, everything else after them by name."""
    try:
        return float(value), ""
    except ValueError:
        return float("inf"), value


if __name__ == "__main__":
    from alignkit.core.app import stage_main

    stage_main("compare")
