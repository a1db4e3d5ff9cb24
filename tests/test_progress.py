"""Progress: nothing is lost or added, a log gets two lines, a terminal gets a bar that goes away."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator

import pytest

from alignkit.core.progress import progress


def test_a_log_gets_a_line_at_the_start_and_one_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="alignkit"):
        assert list(progress([3, 1, 2], "asking")) == [3, 1, 2]
        assert list(progress(iter("ab"), "reading")) == ["a", "b"]
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "asking: 3 to do"
    assert lines[1].startswith("asking: 3 done in ")
    assert lines[2] == "reading: begins"
    assert len(lines) == 4


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    with caplog.at_level(logging.INFO, logger="alignkit"):
        assert list(progress(range(5), "asking", total=5)) == list(range(5))
    assert caplog.records == []
    assert "asking" in terminal.getvalue()


def test_items_are_taken_one_at_a_time() -> None:
    taken = []

    def source() -> Iterator[int]:
        for number in range(3):
            taken.append(number)
            yield number

    items = progress(source(), "reading")
    next(items)
    assert taken == [0]
