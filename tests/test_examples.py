"""Every example runs, in a folder where the pipeline has run in small."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from smoke import command

EXAMPLES = sorted((Path(__file__).resolve().parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_and_prints(smoke_run: Path, example: Path) -> None:
    done = command([sys.executable, str(example)], smoke_run)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 3


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 2
