"""Every block of the README runs, in a folder where the pipeline has run in small."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from smoke import ENVIRONMENT

from alignkit.__main__ import main

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def shell_lines() -> list[str]:
    return [line for kind, block in BLOCKS if kind == "sh" for line in block.splitlines() if line.strip()]


def test_the_readme_has_only_blocks_that_are_run_or_that_show_output() -> None:
    assert {kind for kind, _ in BLOCKS} <= {"sh", "python", "text"}
    assert len(shell_lines()) >= 8


@pytest.mark.parametrize("line", [line for line in shell_lines() if line.startswith("make ")])
def test_make_targets_exist(line: str) -> None:
    """`make demo` and `make test` are what the continuous integration runs; here only that the targets are there."""
    target = line.split("#")[0].split()
    assert subprocess.run([*target, "-n"], cwd=ROOT, capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("line", [line for line in shell_lines() if not line.startswith("make ")])
def test_shell_lines_run(smoke_run: Path, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(smoke_run)
    for command in line.split(" && "):
        words = shlex.split(command, comments=True)
        if len(words) == 1 or words[-1] == "--help":  # by the shell: that both names of the program are there
            done = subprocess.run(["bash", "-c", command], env=ENVIRONMENT, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
            continue
        if words[:2] == ["python", "-m"]:  # most of a command's time is the import of torch, done in this process
            words = words[2].split(".") + words[3:]
        assert words[0] == "alignkit"
        assert main(words[1:]) == 0


@pytest.mark.parametrize("block", [block for kind, block in BLOCKS if kind == "python"])
def test_python_blocks_run(smoke_run: Path, block: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(smoke_run)
    exec(block, {"__name__": "__main__"})


def test_the_command_that_needs_a_teacher_and_a_gpu_is_planned() -> None:
    """What it would run is composed and checked to the last key; running it takes a key and a GPU."""
    from alignkit.core.app import load_config
    from alignkit.pipeline import plan

    blocks = [block for kind, block in BLOCKS if kind == "text" and "alignkit.pipeline" in block]
    assert len(blocks) == 1
    words = shlex.split(blocks[0].replace("\\\n", " ").replace("<model>", "some-model"))
    overrides = words[words.index("alignkit.pipeline") + 1 :]
    steps = {step.name: step.config for part in plan(load_config("pipeline", overrides)) for step in part}
    assert steps["expand"].data.path == "my_seeds.jsonl"  # type: ignore[attr-defined]
    assert steps["judge"].teacher.model == "some-model"  # type: ignore[attr-defined]
    assert steps["dpo"].model.name == "qwen7b"  # type: ignore[attr-defined]
