"""Run folders as the report sees them: the steps that wrote them, in the order in which one needed the other."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignkit.core.errors import UserError
from alignkit.core.manifest import MANIFEST, read_manifest

SPINE = ("expand", "select", "sft", "sample", "judge", "reward", "rejection_sampling", "dpo", "evaluate")
"""Stages from the seeds to the examined model; the report says which of them a run lacks."""

_WITHOUT_A_PLACE = ("report", "pipeline", "compare", "preflight", "lengths", "serve", "chat", "dataset_card")
"""Stages that tell about the others and make nothing themselves."""


@dataclass(frozen=True)
class Step:
    """One stage's run folder: its manifest and its resolved configuration."""

    name: str
    folder: Path
    manifest: dict[str, Any]
    config: dict[str, Any]

    @property
    def stage(self) -> str:
        """The stage that ran; steps of the same stage have different names."""
        return str(self.manifest["stage"])

    @property
    def complete(self) -> bool:
        """Whether the stage ran to its end."""
        return bool(self.manifest["status"] == "complete")

    @property
    def metrics(self) -> dict[str, Any]:
        """What the stage measured."""
        return dict(self.manifest.get("metrics", {}))

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The rows of one of the step's JSON Lines files; none when it has no such file."""
        path = self.folder / name
        if not path.is_file():
            return []
        with path.open(encoding="utf-8") as file:
            return [json.loads(line) for line in file if line.strip()]


@dataclass(frozen=True)
class Run:
    """All steps of one run folder, each after those whose outputs it reads."""

    folder: Path
    steps: list[Step] = field(default_factory=list)

    def step(self, name: str) -> Step | None:
        """The complete step of that name, if there is one."""
        return next((step for step in self.steps if step.name == name and step.complete), None)

    def any_step(self, name: str) -> Step | None:
        """The step of that name, complete or not, if there is one."""
        return next((step for step in self.steps if step.name == name), None)

    @property
    def job(self) -> Step | None:
        """The complete step that is all of this run, as a job of a sweep is."""
        return next((step for step in self.steps if step.folder == self.folder and step.complete), None)

    def of_stage(self, *stages: str) -> list[Step]:
        """The complete steps of these stages."""
        return [step for step in self.steps if step.stage in stages and step.complete]

    @property
    def missing(self) -> list[str]:
        """Stages of the spine that no complete step of this run belongs to."""
        done = {step.stage for step in self.steps if step.complete}
        return [stage for stage in SPINE if stage not in done]

    @property
    def seed(self) -> str:
        """The seed of the run, as its evaluation (or else its first step) was configured; "?" when none tells."""
        configured = [step.config["seed"] for step in self.of_stage("evaluate") or self.steps if "seed" in step.config]
        return str(configured[0]) if configured else "?"

    def parents(self, step: Step) -> list[Step]:
        """The steps of this run whose folders a step read from."""
        read = [Path(entry["path"]).resolve() for entry in step.manifest["inputs"]]
        folders = {folder for path in read for folder in (path, *path.parents)}
        return [other for other in self.steps if other.folder.resolve() in folders and other.name != step.name]


def manifests(folder: Path) -> list[Path]:
    """The manifests of the run folder's steps, by name; those of stages that only tell about others are left out.

    The folder of a single step, such as a job of a sweep, is a run of that step.
    """
    found = sorted(folder.glob(f"*/{MANIFEST}")) or sorted(folder.glob(MANIFEST))
    return [path for path in found if (read_manifest(path.parent) or {})["stage"] not in _WITHOUT_A_PLACE]


def compared_folders(folders: Sequence[str]) -> list[Path]:
    """The folders of the runs to compare: the jobs, finished or not, of a folder that holds those of a sweep."""
    jobs = [(Path(folder), sorted(path.parent for path in Path(folder).glob("*/job.json"))) for folder in folders]
    return [each for folder, found in jobs for each in (found or [folder])]


def read_run(folder: Path) -> Run:
    """Read every step of a run folder. Raises `UserError` when there is no such folder or nothing was run in it."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run folder; give the folder that holds the steps' folders, e.g. runs/demo")
    steps = [_read_step(path.parent) for path in manifests(folder)]
    if not steps:
        raise UserError(f"{folder}: no stage has been run here yet (no */{MANIFEST}), so there is nothing to report")
    return Run(folder, _in_order(Run(folder, sorted(steps, key=lambda step: step.manifest["started"]))))


def numbers(
    metrics: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, tuple[float, tuple[float, float] | None]]]:
    """Dotted name, value and interval of every number in a manifest's metrics."""
    for name, value in metrics.items():
        if isinstance(value, bool):
            continue
        if isinstance(value, int | float):
            yield f"{prefix}{name}", (value, None)
        elif isinstance(value, Mapping) and {"mean", "low", "high"} <= value.keys():
            yield f"{prefix}{name}", (value["mean"], (value["low"], value["high"]))
        elif isinstance(value, Mapping):
            yield from numbers(value, f"{prefix}{name}.")


def read_aside(folder: Path, stage: str) -> list[Step]:
    """The steps of a stage that tells about the others and is no step of the run itself, such as `preflight`."""
    found = sorted(folder.glob(f"*/{MANIFEST}"))
    return [_read_step(path.parent) for path in found if (read_manifest(path.parent) or {})["stage"] == stage]


def _read_step(folder: Path) -> Step:
    import yaml

    manifest = read_manifest(folder)
    assert manifest is not None
    config = folder / "config.yaml"
    resolved = yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else {}
    return Step(folder.name, folder, manifest, resolved or {})


def _in_order(run: Run) -> list[Step]:
    """Steps in the order in which they started, but each behind those it read from, whatever was run again."""
    parents = {step.name: run.parents(step) for step in run.steps}
    ordered: list[Step] = []
    waiting: Sequence[Step] = run.steps
    while waiting:
        ready = [step for step in waiting if all(parent in ordered for parent in parents[step.name])]
        following = ready[0] if ready else waiting[0]
        ordered.append(following)
        waiting = [step for step in waiting if step is not following]
    return ordered
