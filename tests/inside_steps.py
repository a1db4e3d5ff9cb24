"""Steps without processes: most of a step's time is the import of torch, and a test has imported it already.

The stage and its overrides are those of the process; the tests of kills and of the command line start real ones.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from alignkit.core import steps
from alignkit.core.app import load_config, run_stage
from alignkit.core.errors import UserError
from alignkit.core.steps import Step


class Inside:
    """A step that has been run in this process, as `execute` sees a finished process."""

    pid = os.getpid()

    def __init__(self, step: Step, log: Path) -> None:
        self.returncode = 0
        try:
            run_stage(step.stage, load_config(step.stage, step.overrides))
            log.write_text("done\n", encoding="utf-8")
        except UserError as error:
            self.returncode = 2
            log.write_text(f"error: {error}\n", encoding="utf-8")

    def poll(self) -> int:
        return self.returncode


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Run steps in this process. Returns the labels of those that were started, as they are."""
    started: list[str] = []

    def start(step: Step, workers: int, logs: Path) -> Inside:
        started.append(step.label)
        logs.mkdir(parents=True, exist_ok=True)
        return Inside(step, logs / f"{step.label.replace('/', '-')}.log")

    monkeypatch.setattr(steps, "_start", start)
    return started
