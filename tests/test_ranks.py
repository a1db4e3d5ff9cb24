"""What a process does that a launcher has started beside others: only the first writes and speaks."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from house import House, house  # noqa: F401  (a fixture)

from alignkit.core import process
from alignkit.core.artifact import Artifact
from alignkit.core.config import StageConfig
from alignkit.core.errors import UserError
from alignkit.core.process import BUG, DONE, INTERRUPTED, USER_ERROR, guarded
from alignkit.core.ranks import is_main, local_rank, rank, world_size


@pytest.fixture
def second(monkeypatch: pytest.MonkeyPatch) -> None:
    """Be the second of two processes, on the first GPU of another machine, and not patient."""
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(process, "PATIENCE_SECONDS", 0.0)


def test_without_a_launcher_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert (world_size(), rank(), local_rank(), is_main()) == (1, 0, 0, True)
    monkeypatch.setenv("RANK", "3")  # left over from something else
    assert is_main()


@pytest.mark.usefixtures("second")
def test_the_launcher_says_which_process_this_is() -> None:
    assert (world_size(), rank(), local_rank(), is_main()) == (2, 1, 0, False)


@pytest.mark.usefixtures("second")
def test_the_second_process_writes_nothing(tmp_path: Path) -> None:
    with Artifact.open("sft", StageConfig(name="sft", output_dir=str(tmp_path / "sft"))) as artifact:
        artifact.drop({"id": "a"}, "too long")
        artifact.check("something", True, "fine")
        assert artifact.dropped == {"too long": 1}
        with pytest.raises(AssertionError, match="only the main process writes outputs"):
            artifact.write_rows("rows.jsonl", [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("second")
def test_the_second_process_stops_at_a_failed_check(tmp_path: Path) -> None:
    config = StageConfig(name="sft", output_dir=str(tmp_path / "sft"))
    with pytest.raises(UserError, match="check 'sum' failed"), Artifact.open("sft", config) as artifact:
        artifact.check("sum", False, "2 is not 3")


@pytest.mark.usefixtures("second")
def test_both_see_what_is_up_to_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = StageConfig(name="sft", output_dir=str(tmp_path / "sft"))
    monkeypatch.setenv("RANK", "0")
    with Artifact.open("sft", config):
        pass
    assert Artifact.open("sft", config).up_to_date
    monkeypatch.setenv("RANK", "1")
    assert Artifact.open("sft", config).up_to_date


@pytest.mark.usefixtures("second")
def test_the_second_process_prints_errors_only(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> int:
        print("loss 1.0")
        return DONE

    def user_error() -> int:
        raise UserError("no GPU here")

    def bug() -> int:
        raise RuntimeError("broken")

    def interrupt() -> int:
        raise KeyboardInterrupt

    assert guarded("sft", work) == DONE
    assert guarded("sft", interrupt) == INTERRUPTED
    assert capsys.readouterr() == ("", "")
    assert guarded("sft", user_error) == USER_ERROR
    assert capsys.readouterr() == ("", "error: process 1 of 2: no GPU here\n")
    assert guarded("sft", bug) == BUG
    assert "error: process 1 of 2: sft stopped by a bug" in capsys.readouterr().err


@pytest.mark.parametrize("at", [0, 1])
def test_a_process_that_is_stopped_after_its_error_was_not_the_first_to_fail(
    at: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It lost its connection to the one that failed, and the launcher ends it before it can complain of that."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", str(at))
    monkeypatch.setattr(time, "sleep", lambda seconds: os.kill(os.getpid(), 15))

    def lose() -> int:
        raise RuntimeError("Connection closed by peer")

    assert guarded("sft", lose) == INTERRUPTED
    err = capsys.readouterr().err
    assert "Connection closed" not in err
    assert ("interrupted" in err) == (at == 0)


@pytest.mark.usefixtures("second")
def test_only_training_is_for_several_processes(house: House) -> None:  # noqa: F811
    found = house.run("data.path=rows.jsonl")
    assert found.code == 2
    assert "toy is the work of one process: start it without torchrun" in found.err
    found = house.run("-m", "factor=1,2")
    assert found.code == 2
    assert "-m runs one job after the other in one process" in found.err
    assert not (house.folder / "runs").exists()
