"""Steps: stages that are run by another stage, each as the command a user would type, in a process of its own.

A step waits for the steps whose folders it reads from; one that is up to date is not started. So a stage made of steps
resumes after a kill where its steps do.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from alignkit.core.app import load_config
from alignkit.core.artifact import Artifact, input_paths, read_manifest
from alignkit.core.config import StageConfig
from alignkit.core.errors import UserError
from alignkit.core.fork_server import ForkedProcess, can_fork
from alignkit.core.manifest import is_hub_name, replace_text
from alignkit.core.process import PARENT


@dataclass
class Step:
    """A stage to run: its overrides, its composed configuration, and the steps it waits for."""

    name: str
    stage: str
    overrides: list[str]
    config: StageConfig
    needs: set[Path] = field(default_factory=set)

    @property
    def folder(self) -> Path:
        """Its run folder, which also identifies it."""
        return Path(self.config.output_dir)

    @property
    def label(self) -> str:
        """`<folder above>/<step>`."""
        return f"{self.folder.parent.name}/{self.name}"


def make_step(name: str, stage: str, overrides: Sequence[str]) -> Step:
    """A step with its configuration composed, so that no mistake in it is found after hours of work."""
    return Step(name, stage, list(overrides), load_config(stage, overrides))


def make_step_in(home: Path, name: str, stage: str, overrides: Sequence[str]) -> Step:
    """A step of another stage, with its run folder inside that stage's."""
    place = [*settings("name", name), *settings("output_dir", str(home / name))]
    return make_step(name, stage, [*place, *overrides])


def connect(steps: Sequence[Step]) -> None:
    """Let each step need the others whose folder one of its inputs lies in."""
    folders = {step.folder for step in steps}
    for step in steps:
        paths = [Path(path) for _, path in input_paths(step.config)]
        step.needs = {folder for folder in folders for path in paths if path == folder or folder in path.parents}
        step.needs.discard(step.folder)


def require_sources(steps: Sequence[Step]) -> None:
    """Raise `UserError` for an input that neither exists nor will be written by one of the steps."""
    folders = {step.folder for step in steps}
    for step in steps:
        for key, path in input_paths(step.config):
            written = folders & {Path(path), *Path(path).parents}
            if not written and not Path(path).exists() and not is_hub_name(path):
                raise UserError(f"step {step.label}: {key}={path}: no such file or folder")


def settings(key: str, value: Any) -> list[str]:
    """Overrides that give the key of another stage this value; a dataclass becomes one override for each field."""
    if is_dataclass(value):
        return [each for part in fields(value) for each in settings(f"{key}.{part.name}", getattr(value, part.name))]
    return [f"{key}={_literal(value)}"]


def quoted(text: str) -> str:
    """A text as a quoted value of Hydra's override grammar.

    There backslashes stand for themselves, but for those before a quotation mark; `${` would be looked up, unless a
    backslash stands before it.
    """
    text = re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + "\\${", text)
    text = re.sub(r'(\\*)"', lambda found: found[1] * 2 + '\\"', text)
    return '"' + re.sub(r"\\+\Z", lambda found: found[0] * 2, text) + '"'


def hand_over(path: Path, rows: Iterable[BaseModel]) -> None:
    """Write rows for a step to read; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, "".join(row.model_dump_json(exclude_none=True) + "\n" for row in rows))


def execute(steps: Sequence[Step], workers: int, logs: Path) -> Iterator[tuple[Step, int]]:
    """Run the steps in dependency order, yielding each with the peak memory of all processes so far, in bytes.

    The console output of each goes to a file in `logs`. Raises `UserError` when a step fails, after the steps beside it
    have been stopped.
    """
    if workers < 1:
        raise UserError(f"workers={workers}: must be at least 1")
    waiting, running, done = (
        list(steps),
        dict[Path, tuple[Step, subprocess.Popen[bytes] | ForkedProcess]](),
        set[Path](),
    )
    peak = 0
    try:
        while waiting or running:
            for step in [s for s in waiting if s.needs <= done]:
                if len(running) >= workers:
                    break
                waiting.remove(step)
                if Artifact.open(step.stage, step.config).up_to_date:
                    done.add(step.folder)
                    yield step, peak
                else:
                    running[step.folder] = (step, _start(step, workers, logs))
            if not running and waiting and not any(s.needs <= done for s in waiting):
                raise UserError(f"steps wait for each other: {', '.join(step.label for step in waiting)}")
            time.sleep(0.1)
            peak = max(peak, _resident_bytes())
            for folder, (step, process) in list(running.items()):
                code = process.poll()
                if code is None:
                    continue
                del running[folder]
                if code != 0:
                    raise UserError(_failure(step, logs, code))
                done.add(folder)
                yield step, peak
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.wait()


def describe(step: Step) -> str:
    """One line: the step, its key metric, its time."""
    manifest: Mapping[str, Any] = read_manifest(step.folder) or {}
    return f"{step.label:34s} {manifest.get('seconds', 0):6.1f} s  {manifest.get('summary', '')}"


def _start(step: Step, workers: int, logs: Path) -> subprocess.Popen[bytes] | ForkedProcess:
    """Start a step as the command a user would type; its output goes to a file in `logs`."""
    threads = max(1, int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1) // workers)
    environment = {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    logs.mkdir(parents=True, exist_ok=True)
    if can_fork():
        return ForkedProcess(f"alignkit.{step.stage}", step.overrides, environment, _log_file(step, logs))
    with _log_file(step, logs).open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", f"alignkit.{step.stage}", *step.overrides],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=os.environ | environment | {PARENT: str(os.getpid())},
        )


def _log_file(step: Step, logs: Path) -> Path:
    """Where the step's console output goes."""
    return logs / f"{step.label.replace('/', '-')}.log"


def _failure(step: Step, logs: Path, code: int) -> str:
    """What to tell about a failed step: its own error message, and where the rest is."""
    log = _log_file(step, logs)
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    said = next((line for line in reversed(lines) if line.startswith("error:")), lines[-1] if lines else "no output")
    return f"step {step.label} failed (exit {code}): {said.removeprefix('error: ')} -- whole output: {log}"


def _resident_bytes() -> int:
    """Resident memory of this process and of all below it, together; pages that forks share count for each."""
    import psutil

    total = 0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            total += process.memory_info().rss
    return total


def _literal(value: Any) -> str:
    """A value as Hydra's override grammar writes it."""
    if value is None:
        return "null"
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list):
        return "[" + ", ".join(_literal(each) for each in value) + "]"
    return quoted(str(value))
