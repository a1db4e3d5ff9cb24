"""Sweeps (`-m`): each job in its own folder, finished jobs skipped, a comparison table and plot at the end.

The jobs of `alignkit sft -m model=qwen7b,tiny` go to runs/<run>/sft-sweep/jobs/model-qwen7b/ and .../model-tiny/. The
name says which job it is, so the same command, or one with further values, finds what is done already.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from alignkit.core.app import hydra_main, job_overrides, run_command, run_stage, to_dataclass
from alignkit.core.artifact import recorded_command
from alignkit.core.config import StageConfig
from alignkit.core.errors import UserError
from alignkit.core.hashing import hash_text
from alignkit.core.manifest import replace_text
from alignkit.core.process import BUG, DONE, guarded

JOB_FILE = "job.json"
"""In each job's folder: the overrides that vary in the sweep, and how the job ended."""


@dataclass(frozen=True)
class Job:
    """One job of a sweep: its overrides and its validated configuration."""

    overrides: dict[str, str]
    config: StageConfig


def run_sweep(stage: str, overrides: Sequence[str]) -> int:
    """Run all jobs of a sweep, then compare them; returns the worst exit code. An error ends its job, not the sweep."""
    jobs = plan(stage, overrides)
    varied = [key for key in jobs[0].overrides if len({job.overrides[key] for job in jobs}) > 1]
    home = Path(jobs[0].config.output_dir + "-sweep")
    folders = [home / "jobs" / job_name(job.overrides, varied) for job in jobs]
    for folder in folders:
        (folder / JOB_FILE).unlink(missing_ok=True)
    hydra_main(stage, ["-m", *overrides], partial(run_job, stage, overrides, home, varied), sweep_dir=home)
    codes = [_exit_code(folder / JOB_FILE) for folder in folders]
    print(f"{len(jobs)} jobs, {sum(code != DONE for code in codes)} failed", flush=True)
    codes.append(compare_jobs(home / "jobs", home))
    return max(codes)


def compare_jobs(jobs: Path, folder: Path) -> int:
    """Put the jobs side by side, as a table and a plot in `folder`; returns the exit code."""
    return run_command("compare", [f"folder={_quoted(jobs)}", f"output_dir={_quoted(folder)}", "force=true"])


def plan(stage: str, overrides: Sequence[str]) -> list[Job]:
    """Compose and validate every job, so that no mistake is found after hours of work."""
    jobs: list[Job] = []

    def collect(composed: Any) -> None:
        jobs.append(Job(job_overrides(), to_dataclass(stage, composed)))

    elsewhere = ("hydra/launcher=", "hydra.launcher.")
    here = [override for override in overrides if not override.lstrip("+").startswith(elsewhere)]
    with tempfile.TemporaryDirectory() as folder:
        hydra_main(stage, ["-m", *here], collect, sweep_dir=Path(folder))
    return jobs


def run_job(stage: str, arguments: Sequence[str], home: Path, varied: Sequence[str], composed: Any) -> None:
    """Run one job in its folder, and write down there how it ended."""
    overrides = {key: value for key, value in job_overrides().items() if key in varied}
    fixed = [argument for argument in arguments if argument.lstrip("+").split("=", 1)[0] not in varied]
    folder = home / "jobs" / job_name(overrides, varied)
    composed["output_dir"] = str(folder)
    command = shlex.join(["alignkit", stage, *fixed, *(f"{key}={value}" for key, value in overrides.items())])
    run_one(stage, folder, overrides, lambda: to_dataclass(stage, composed), command)


def run_one(
    stage: str, folder: Path, overrides: dict[str, str], configure: Callable[[], StageConfig], command: str
) -> int:
    """Run a stage in its folder, write down there how it ended, and return the exit code; an error ends it alone."""
    message = ""

    def work() -> int:
        nonlocal message
        try:
            run_stage(stage, configure())
        except UserError as error:
            message = str(error)
            raise
        return DONE

    print(f"--- {stage} {folder.name}", flush=True)
    with recorded_command(command):
        code = guarded(stage, work)
    if code == 130:
        raise KeyboardInterrupt
    folder.mkdir(parents=True, exist_ok=True)
    outcome = {"overrides": overrides, "exit_code": code, "error": message}
    replace_text(folder / JOB_FILE, json.dumps(outcome, indent=1, ensure_ascii=False) + "\n")
    sys.stdout.flush()
    return code


def job_name(overrides: dict[str, str], varied: Sequence[str]) -> str:
    """The folder name of a job: the overrides that vary, in characters that need no quoting in a later override."""
    label = "--".join(f"{key}-{overrides[key]}" for key in varied) or "job"
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", label)
    return plain if plain == label else f"{plain}-{hash_text(label)[:8]}"


def _exit_code(path: Path) -> int:
    return int(json.loads(path.read_text(encoding="utf-8"))["exit_code"]) if path.exists() else BUG


def _quoted(path: Path) -> str:
    """A path as a Hydra override value: quoted, since it may hold `=` and `,`."""
    return "'" + str(path).replace("'", "\\'") + "'"
