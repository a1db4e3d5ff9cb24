"""The public names: all there, imported when used, and none of them imports torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

import alignkit
from alignkit.__main__ import COMMANDS, main, overview
from alignkit.core.stages import stages

HEAVY = "torch transformers trl peft datasets accelerate bitsandbytes matplotlib"


def imported_by(statement: str) -> set[str]:
    """The heavy packages that are loaded after a statement in a fresh process; "hydra" is reported, too."""
    program = f"{statement}\nimport sys\nprint(*[name for name in {HEAVY + ' hydra'!r}.split() if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "statement",
    ["import alignkit", "from alignkit import RewardModel, PreferencePair", "import alignkit; dir(alignkit)"],
)
def test_imports_are_light(statement: str) -> None:
    assert imported_by(statement) == set()


def test_import_alone_loads_no_room() -> None:
    program = "import alignkit, sys; print(*[name for name in sys.modules if name.startswith('alignkit')])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["alignkit"]


@pytest.mark.parametrize("name", alignkit.__all__)
def test_every_public_name_is_there_and_explained(name: str) -> None:
    value = getattr(alignkit, name)
    assert value.__doc__
    assert value.__module__.startswith("alignkit.")
    assert name in dir(alignkit)


def test_the_names_are_those_of_the_lazy_table() -> None:
    assert sorted(alignkit.__all__) == alignkit.__all__ == sorted(alignkit._HOME)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'RewardModell'"):
        _ = alignkit.RewardModell
    with pytest.raises(ImportError):
        exec("from alignkit import RewardModell")


def test_a_version_is_known() -> None:
    assert isinstance(alignkit.__version__, str)


def test_alignkit_alone_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    text = capsys.readouterr().out
    assert text == overview() + "\n"
    listed = [line.split()[0] for line in text.splitlines() if line.startswith("  ")]
    assert sorted(listed) == sorted([*stages(), *COMMANDS])
    assert all(len(line) <= 140 for line in text.splitlines())


@pytest.mark.parametrize(
    ("typed", "meant"), [("stf", "sft"), ("linage", "lineage"), ("teacher_server", "teacher-server")]
)
def test_an_unknown_command_is_named_with_the_nearest(
    capsys: pytest.CaptureFixture[str], typed: str, meant: str
) -> None:
    assert main([typed]) == 2
    assert f"unknown command '{typed}' (did you mean '{meant}'?)" in capsys.readouterr().err


def test_a_stage_s_help_is_the_same_by_both_roads(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--help"]) == 0
    text = capsys.readouterr().out
    done = subprocess.run(
        [sys.executable, "-m", "alignkit.compare", "--help"], capture_output=True, text=True, check=True
    )
    assert text == done.stdout


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"alignkit {alignkit.__version__}\n"
