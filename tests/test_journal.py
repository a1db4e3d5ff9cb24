"""The journal: finished rows survive a kill, torn lines do not count."""

from __future__ import annotations

from pathlib import Path

import pytest

from alignkit.core.journal import Journal


def fill(path: Path, *ids: str, fingerprint: str = "work") -> None:
    with Journal(path, fingerprint) as journal:
        for id in ids:
            journal.add(id, {"text": f"answer {id} é"})


def found(path: Path, fingerprint: str = "work") -> list[str]:
    with Journal(path, fingerprint) as journal:
        return list(journal.done)


def test_finished_rows_are_there_the_next_time(tmp_path: Path) -> None:
    path = tmp_path / "deep/journal.jsonl"
    fill(path, "a", "b")
    fill(path, "c")
    with Journal(path, "work") as journal:
        assert journal.done == {id: {"text": f"answer {id} é"} for id in "abc"}


def test_each_row_is_on_disk_as_soon_as_it_is_added(tmp_path: Path) -> None:
    with Journal(tmp_path / "journal.jsonl", "work") as journal:
        journal.add("a", 1)
        assert (tmp_path / "journal.jsonl").read_text(encoding="utf-8").count("\n") == 2


@pytest.mark.parametrize("cut", range(1, 40))
def test_wherever_a_kill_tears_the_last_line_only_its_row_is_lost(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "journal.jsonl"
    fill(path, "a", "b", "c")
    path.write_bytes(path.read_bytes()[:-cut])
    kept = found(path)
    assert kept == (["a", "b", "c"] if cut == 1 else ["a", "b"])
    fill(path, "c", "d")
    assert found(path) == ["a", "b", "c", "d"]


@pytest.mark.parametrize("size", [0, 1, 10, len('{"fingerprint": "work"}'), len('{"fingerprint": "work"}\n')])
def test_an_empty_journal_or_a_torn_first_line_starts_anew(tmp_path: Path, size: int) -> None:
    path = tmp_path / "journal.jsonl"
    fill(path, "a")
    path.write_bytes(path.read_bytes()[:size])
    assert found(path) == []
    fill(path, "b")
    assert found(path) == ["b"]


def test_another_piece_of_work_starts_anew(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    fill(path, "a", fingerprint="first")
    assert found(path, "second") == []
    assert found(path, "first") == []


def test_the_last_value_of_a_row_counts(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path, "work") as journal:
        journal.add("a", 1)
        journal.add("a", 2)
    with Journal(path, "work") as journal:
        assert journal.done == {"a": 2}
