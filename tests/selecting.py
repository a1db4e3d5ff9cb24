"""What the tests of `select` share: a small pool of the closed world, the stage on it, and what it writes."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from smoke import ENVIRONMENT

from alignkit.core.app import load_config, run_command, run_stage
from alignkit.core.artifact import Artifact
from alignkit.data.closed_world import World, answer

Rows = list[dict[str, Any]]

QUICK = (
    "train.max_steps=2",
    "train.save_steps=1",
    "train.batch_size=2",
    "sampling.max_new_tokens=12",
    "sampling.batch_size=16",
)
"""Settings of a training and of answers that take as little time as possible."""


def make_rows(count: int, seed: int = 5) -> Rows:
    """Different questions of the closed world with their right answers."""
    world, rows = World(seed), []
    for number in range(count):
        passage = world.passage()
        question = world.ask(passage)
        output = answer(passage.facts, question)
        fields = {"instruction": passage.statement, "input": question.text, "output": output, "kind": question.kind}
        rows.append({"id": f"row-{number}", **fields})
    return rows


def with_qualities(rows: Rows, qualities: list[float]) -> Rows:
    """The rows as an earlier selection left them, for `quality.reuse=true`."""
    return [row | {"scores": {"quality": score}} for row, score in zip(rows, qualities, strict=True)]


def write(path: Path, rows: Rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def arguments(folder: Path, rows: Rows, *overrides: str) -> list[str]:
    """Overrides of a `select` in `folder` that reads `rows`."""
    path = write(folder / "rows.jsonl", rows)
    return [f"data.path={path}", f"output_dir={folder / 'select'}", *overrides]


def select(folder: Path, rows: Rows, *overrides: str) -> Artifact:
    return run_stage("select", load_config("select", arguments(folder, rows, *overrides)))


def refused(folder: Path, rows: Rows, overrides: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one message that ends the command with exit code 2."""
    capsys.readouterr()
    assert run_command("select", arguments(folder, rows, *overrides)) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    messages = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(messages) == 1, said
    return messages[0]


def read(folder: Path, name: str) -> Rows:
    """The rows of a file; numbers that are not finite are no JSON."""

    def refuse(constant: str) -> float:
        raise ValueError(f"{name} holds {constant}, which is no JSON")

    path = folder / name
    if not path.exists():
        return []
    return [json.loads(line, parse_constant=refuse) for line in path.read_text(encoding="utf-8").splitlines()]


def ids(rows: Rows) -> list[str]:
    return [row["id"] for row in rows]


def in_order_of_rank(artifact: Artifact) -> list[str]:
    """Ids of the selected rows by rank, after checking that the ranks are 1 to k and the file is in input order."""
    selected = read(artifact.folder, "selected.jsonl")
    assert sorted(row["scores"]["rank"] for row in selected) == list(range(1, len(selected) + 1))
    assert ids(selected) == sorted(ids(selected), key=lambda id: int(re.findall(r"\d+", id)[-1]))
    return [row["id"] for row in sorted(selected, key=lambda row: row["scores"]["rank"])]


def reasons(artifact: Artifact) -> dict[str, str]:
    """Id -> reason of every dropped row, after checking that each row has one fate."""
    dropped = read(artifact.folder, "dropped.jsonl")
    found = {each["row"]["id"]: each["reason"] for each in dropped}
    assert len(found) == len(dropped) == artifact.dropped.total()
    assert not found.keys() & set(ids(read(artifact.folder, "selected.jsonl")))
    return found


def audit_of(artifact: Artifact) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((artifact.folder / "selection.json").read_text(encoding="utf-8"))
    return found


@contextmanager
def warnings() -> Iterator[list[str]]:
    """What alignkit warns of; unlike caplog, also after a command has set up its console."""
    said: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    log, handler = logging.getLogger("alignkit"), Kept(level=logging.WARNING)
    log.addHandler(handler)
    try:
        yield said
    finally:
        log.removeHandler(handler)


def start_command(folder: Path, arguments: list[str]) -> subprocess.Popen[bytes]:
    """`alignkit select` as a process that leads its own group, so that it can be killed with its steps."""
    command = [sys.executable, "-m", "alignkit.select", *arguments]
    with (folder / "console.txt").open("wb") as console:
        return subprocess.Popen(
            command, cwd=folder, env=ENVIRONMENT, stdout=console, stderr=subprocess.STDOUT, start_new_session=True
        )
