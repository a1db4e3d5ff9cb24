"""report: one HTML page about a run, made from its manifests; it asks for nothing, light and dark, any screen.

It says what the held-out scores allow to be said, and no more: a stage whose gain has an interval that contains zero
did not help. Stages that were not run are named as missing.

Reads:   run_dir                   a run folder: the manifests, loss curves and predictions of its steps
         replicates                run folders of the same pipeline with other seeds
         runs                      or several different runs, to be put side by side
Writes:  report.html               the page
         report.md, report.json    the same figures, for a code host and for programs
         figures.txt               its held-out figures as plain text (where there is an evaluation)

Overrides people use:
  replicates=[runs/demo-seed2]     other seeds, shown beside and pooled
  run_dir=runs/mine                another run folder
  runs=[runs/a,runs/b]             compare different runs with the first of them, or the jobs of a sweep
  controls=[sft_control]           models that are controls, not stages (upper_bounds likewise)
  titles.dpo="DPO, beta 0.1"       what to call a model

Examples:
  python -m alignkit.report run=demo
  python -m alignkit.report run=demo 'replicates=[runs/demo-seed2]'
  python -m alignkit.report run=both 'runs=[runs/demo,runs/other]'
"""

from __future__ import annotations

import glob
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from alignkit.core.artifact import Artifact
from alignkit.core.config import StageConfig
from alignkit.core.errors import UserError

if TYPE_CHECKING:
    from alignkit.reporting.held_out import Roles

LOG = logging.getLogger("alignkit")


@dataclass
class ReportConfig(StageConfig):
    """Configuration of `report`."""

    inputs: ClassVar[tuple[str, ...]] = ("manifests",)

    run_dir: str = "runs/${run}"
    replicates: list[str] = field(default_factory=list)
    runs: list[str] = field(default_factory=list)
    """Run folders, or the folder of a sweep's jobs, to compare; then run_dir and replicates are not read."""
    evaluation: str = "evaluate"
    """Name of the step whose models the page compares."""
    controls: list[str] = field(default_factory=list)
    """Models of the evaluation that got equally many steps of ordinary training."""
    upper_bounds: list[str] = field(default_factory=list)
    """Models of the evaluation made with help that a real run does not have."""
    titles: dict[str, str] = field(default_factory=dict)
    """What to call a model; its own name when it has no entry."""

    @property
    def manifests(self) -> dict[str, str]:
        """The manifests of all complete steps: the page is out of date when one of them has changed."""
        from alignkit.core.manifest import read_manifest
        from alignkit.reporting.runs import compared_folders, manifests

        folders = [str(each) for each in compared_folders(self.runs)] or [self.run_dir, *self.replicates]
        paths = [path for folder in folders for path in manifests(Path(folder))]
        return {str(path): str(path) for path in paths if (read_manifest(path.parent) or {})["status"] == "complete"}


def run(config: ReportConfig) -> Artifact:
    """Read the runs, pool their evaluations, write the page and the figures."""
    from alignkit.reporting.held_out import Roles

    roles = Roles(config.evaluation, config.titles, config.controls, config.upper_bounds)
    with Artifact.open("report", config) as artifact:
        if artifact.up_to_date:
            return artifact
        if config.runs:
            _compare(config, roles, artifact)
        else:
            _report(config, roles, artifact)
    return artifact


def _no_evaluation(name: str, others: Sequence[str]) -> None:
    """Say which evaluations a run has instead. Raises `UserError` when the user has asked for one that it has not."""
    has = f"it has {', '.join(others)}: name one in evaluation=" if others else "nor any other"
    message = f"evaluation={name}: this run has no finished evaluation of that name, {has}"
    if name != ReportConfig.evaluation:
        raise UserError(message)
    if others:
        LOG.warning("%s", message)


def _report(config: ReportConfig, roles: Roles, artifact: Artifact) -> None:
    """One run with its replicates."""
    from alignkit.reporting.held_out import read_held_out
    from alignkit.reporting.markdown import render_markdown
    from alignkit.reporting.page import render_page
    from alignkit.reporting.rounds import read_rounds
    from alignkit.reporting.runs import read_run
    from alignkit.reporting.summary import summarise_run
    from alignkit.reporting.text import render_text

    runs = [read_run(Path(folder)) for folder in (config.run_dir, *config.replicates)]
    held_out, rounds = read_held_out(runs, roles), read_rounds(runs)
    if held_out is None:
        _no_evaluation(roles.evaluation, [step.name for step in runs[0].of_stage("evaluate")])
    summary = summarise_run(runs, held_out, rounds)
    artifact.write_text("report.html", render_page(runs, held_out, rounds))
    artifact.write_text("report.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    artifact.write_text("report.md", render_markdown(summary))
    if held_out:
        artifact.write_text("figures.txt", render_text(held_out, rounds))
    steps = sum(len(each.steps) for each in runs)
    artifact.metrics = {"runs": len(runs), "steps": steps, "missing": runs[0].missing}
    artifact.summary = f"{steps} steps of {len(runs)} run{'s' * (len(runs) > 1)}"
    left_out = seeds_left_out(config)
    if left_out and not config.replicates:
        listed = ", ".join(left_out)
        LOG.warning("not in this report: %s. To see all seeds: 'replicates=[%s]'", listed, listed)


def _compare(config: ReportConfig, roles: Roles, artifact: Artifact) -> None:
    """Different runs side by side."""
    from alignkit.reporting.comparison import compare_runs, markdown, render_comparison
    from alignkit.reporting.runs import compared_folders, read_run

    runs = [read_run(folder) for folder in compared_folders(config.runs)]
    found = compare_runs(runs, roles)
    artifact.write_text("report.html", render_comparison(found))
    artifact.write_text("report.json", json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    artifact.write_text("report.md", markdown(found))
    artifact.metrics = {"runs": len(runs), "settings_that_differ": len(found["settings"])}
    artifact.summary = f"{len(runs)} runs compared"


def seeds_left_out(config: ReportConfig) -> list[str]:
    """Runs of other seeds, as a pipeline with replicates names them, beside this one."""
    folder = Path(config.run_dir)
    return sorted(str(each) for each in folder.parent.glob(f"{glob.escape(folder.name)}-seed*") if each.is_dir())


if __name__ == "__main__":
    from alignkit.core.app import stage_main

    stage_main("report")
