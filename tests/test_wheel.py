"""An installed wheel finds its configurations, prompts, seeds and weights, from any directory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built by the project's own build backend and unpacked where pip would put it."""
    folder = tmp_path_factory.mktemp("wheel")
    build = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", build, str(folder)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_holds_what_it_needs_and_no_tests(installed: Path) -> None:
    for name in ("conf/sft.yaml", "dataset_optimization/closed_world/seeds.jsonl", "models/tiny/weights/config.json",
                 "dataset_optimization/prompts/judge.jinja", "reporting/templates/style.css", "py.typed"):  # fmt: skip
        assert (installed / "alignkit" / name).is_file(), name
    assert not (installed / "tests").exists()


def test_a_stage_runs_from_the_wheel_in_any_directory(installed: Path, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(installed)}
    show = "import alignkit; print(alignkit.__file__)"
    where = subprocess.run(
        [sys.executable, "-c", show], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert where.stdout.startswith(str(installed))
    for arguments in (["expand", "count=3"], ["select", "k=2"]):
        command = [sys.executable, "-m", "alignkit", *arguments, "run=wheel"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    rows = (tmp_path / "runs/wheel/select/selected.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 2
    assert json.loads(rows[0])["source"] == "teacher:scripted"
