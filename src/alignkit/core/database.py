"""SQLite files that several processes use at once."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path


def open_database(path: Path, timeout: float = 60.0) -> sqlite3.Connection:
    """A connection in write-ahead mode, in which every statement commits by itself.

    It waits up to `timeout` seconds for other processes. SQLite does so with every statement but the one that turns
    the mode on, which fails at once where two processes open a new file at the same moment.
    """
    database = sqlite3.connect(path, isolation_level=None, timeout=timeout)
    given_up = time.monotonic() + timeout
    while True:
        try:
            database.execute("PRAGMA journal_mode=WAL")
            database.execute("PRAGMA synchronous=NORMAL")
            return database
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > given_up:
                database.close()
                raise
            time.sleep(0.01)
