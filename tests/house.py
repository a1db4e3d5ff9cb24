"""A small house for tests of the command line: the real core and `conf` groups, and one toy stage without torch."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from alignkit.core import hashing, help, stages
from alignkit.core.app import run_command

ROOT = Path(__file__).resolve().parents[1]

TOY = '''"""toy: shout every row; the smallest stage there can be.

Reads:   data.path        rows with an id and a text
Writes:  shouted.jsonl    the same rows in capitals

Overrides people use:
  factor=2                what every length is multiplied by
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import ClassVar, Optional

from omegaconf import MISSING

from alignkit.core.artifact import Artifact
from alignkit.core.config import HardwareConfig, ModelConfig, RowsConfig, StageConfig, TrainConfig
from alignkit.core.errors import UserError
from alignkit.core.journal import Journal


@dataclass
class ToyConfig(StageConfig):
    """What the toy does."""

    inputs: ClassVar[tuple[str, ...]] = ("data.path",)

    data: RowsConfig = field(default_factory=RowsConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    factor: float = 1.0
    """Lengths are multiplied by this. It has a second sentence."""
    pause_seconds: float = 0.0
    fail: str = ""
    repeat: int = 1
    needed: Optional[str] = None
    names: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.repeat == 13:
            raise UserError("repeat=13 brings bad luck")


def run(config: ToyConfig) -> Artifact:
    with Artifact.open("toy", config) as artifact:
        if artifact.up_to_date:
            return artifact
        with open(config.data.path, encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        with Journal(artifact.work_folder / "journal.jsonl", artifact.fingerprint) as journal:
            found = len(journal.done)
            for row in rows:
                if row["id"] not in journal.done:
                    time.sleep(config.pause_seconds)
                    journal.add(row["id"], row["text"].upper() * config.repeat)
            shouted = [{"id": id, "text": text} for id, text in journal.done.items()]
        if config.fail == "user":
            raise UserError("the toy cannot do that")
        if config.fail == "bug":
            raise RuntimeError("the toy is broken")
        artifact.write_rows("shouted.jsonl", shouted)
        artifact.metrics = {"length": config.factor * sum(len(row["text"]) for row in shouted), "found": found}
        artifact.summary = f"{len(shouted)} rows"
    return artifact


if __name__ == "__main__":
    from alignkit.core.app import stage_main

    stage_main("toy")
'''

TOY_YAML = """# python -m alignkit.toy data.path=rows.jsonl
defaults:
  - toy_schema
  - model: tiny
  - _self_
  - hardware: null

name: toy
data:
  path: rows.jsonl
names:
  a: one
"""


@dataclass
class Result:
    """How a command ended."""

    code: int
    out: str
    err: str


@dataclass
class House:
    """A folder to run commands in."""

    folder: Path
    capsys: pytest.CaptureFixture[str]

    def run(self, *arguments: str, stage: str = "toy") -> Result:
        """Run a stage in this process."""
        self.capsys.readouterr()
        code = run_command(stage, list(arguments))
        return Result(code, *self.capsys.readouterr())

    def start(
        self, *command: str, environment: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[str]:
        """Start a Python command, as in `python -m alignkit.toy`, in a process of its own."""
        return subprocess.Popen(
            [sys.executable, *command],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(self.folder / "src"), **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )

    def call(self, *command: str, **options: Any) -> Result:
        """Run a Python command in a process of its own, to its end."""
        process = self.start(*command, **options)
        out, err = process.communicate(timeout=120)
        return Result(process.returncode, out, err)

    def manifest(self, folder: str = "runs/default/toy") -> dict[str, Any]:
        """The manifest of a run folder."""
        content: dict[str, Any] = json.loads((self.folder / folder / "manifest.json").read_text(encoding="utf-8"))
        return content

    def write_rows(self, *texts: str, name: str = "rows.jsonl") -> Path:
        """Write rows for the toy, with ids r1, r2, ..."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"id": f"r{number}", "text": text} for number, text in enumerate(texts, start=1)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    def shouted(self, folder: str = "runs/default/toy") -> list[str]:
        """The texts of the toy's output."""
        lines = (self.folder / folder / "shouted.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["text"] for line in lines]


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[House]:
    """A clone that has the core, `compare` and the toy as its only stages; the working directory is in it."""
    package = tmp_path / "src" / "alignkit"
    shutil.copytree(ROOT / "src/alignkit/core", package / "core", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("__init__.py", "__main__.py", "compare.py"):
        shutil.copy(ROOT / "src/alignkit" / name, package / name)
    for group in ("model", "hardware", "teacher", "experiment"):
        shutil.copytree(ROOT / "conf" / group, tmp_path / "conf" / group)
    shutil.copy(ROOT / "conf/compare.yaml", tmp_path / "conf/compare.yaml")
    (tmp_path / "dataset_optimization/prompts").mkdir(parents=True)
    (package / "toy.py").write_text(TOY, encoding="utf-8")
    (tmp_path / "conf/toy.yaml").write_text(TOY_YAML, encoding="utf-8")

    spec = importlib.util.spec_from_file_location("alignkit.toy", package / "toy.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "alignkit.toy", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(stages, "PACKAGE", package)
    monkeypatch.chdir(tmp_path)
    _clear_caches()
    built = House(tmp_path, capsys)
    built.write_rows("one", "two", "three")
    yield built
    _clear_caches()


def _clear_caches() -> None:
    stages.default_groups.cache_clear()
    help.stage_keys.cache_clear()
    hashing.code_hash.cache_clear()
