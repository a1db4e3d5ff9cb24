"""SQLite files that several processes open at once."""

from __future__ import annotations

import sqlite3
import threading
from contextlib import closing
from pathlib import Path

import pytest

from alignkit.core.database import open_database


def test_a_new_file_that_another_process_is_opening_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "new.sqlite"
    with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as other:
        other.execute("BEGIN IMMEDIATE")  # where SQLite itself does not wait, whatever its timeout
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            open_database(path, timeout=0.05)
        threading.Timer(0.2, lambda: other.execute("COMMIT")).start()
        with closing(open_database(path)) as database:
            assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_file_that_is_no_database_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "text.sqlite"
    path.write_text("This is a text and no database.\n" * 10, encoding="utf-8")
    with pytest.raises(sqlite3.DatabaseError, match="not a database"):
        open_database(path)
