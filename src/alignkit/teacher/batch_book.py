"""Which batches were begun and are not collected yet; it lies in the file of the response store."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from alignkit.core.database import open_database
from alignkit.core.errors import UserError

_TABLES = """
CREATE TABLE IF NOT EXISTS batches (mark TEXT PRIMARY KEY, server TEXT NOT NULL, id TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS batch_requests (
    mark TEXT NOT NULL, key TEXT NOT NULL, parts TEXT NOT NULL, PRIMARY KEY (mark, key)
) WITHOUT ROWID;
"""


@dataclass(frozen=True)
class BookedBatch:
    """A batch by its mark. `id` is the server's name for it, and None while it is not known to have begun."""

    mark: str
    id: str | None
    requests: Mapping[str, Mapping[str, Any]]
    """By key: everything that decides the reply (`wire.request_parts`)."""


class BatchBook:
    """Batches in flight. Use as a context manager; raises `UserError` when the file cannot be used."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> BatchBook:
        with self._explained():
            self._database = open_database(self.path)
            self._database.execute("PRAGMA synchronous=FULL")  # a batch that began is not to be forgotten
            self._database.executescript(_TABLES)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._database.close()

    def add(self, server: str, mark: str, requests: Mapping[str, Mapping[str, Any]]) -> BookedBatch:
        """Write down a batch that is about to begin."""
        rows = [(mark, key, json.dumps(parts)) for key, parts in requests.items()]
        with self._explained(), self._transaction():
            self._database.execute("INSERT INTO batches VALUES (?, ?, NULL)", (mark, server))
            self._database.executemany("INSERT INTO batch_requests VALUES (?, ?, ?)", rows)
        return BookedBatch(mark, None, requests)

    def name(self, batch: BookedBatch, id: str) -> BookedBatch:
        """Note what the server calls a batch."""
        with self._explained():
            self._database.execute("UPDATE batches SET id = ? WHERE mark = ?", (id, batch.mark))
        return replace(batch, id=id)

    def remove(self, mark: str) -> None:
        """Forget a batch: it is collected, or never began."""
        with self._explained(), self._transaction():
            self._database.execute("DELETE FROM batches WHERE mark = ?", (mark,))
            self._database.execute("DELETE FROM batch_requests WHERE mark = ?", (mark,))

    def batches(self, server: str) -> list[BookedBatch]:
        """All that are in flight at a server."""
        with self._explained():
            found = self._database.execute("SELECT mark, id FROM batches WHERE server = ?", (server,)).fetchall()
            return [BookedBatch(mark, id, self._requests(mark)) for mark, id in found]

    def _requests(self, mark: str) -> dict[str, Mapping[str, Any]]:
        rows = self._database.execute("SELECT key, parts FROM batch_requests WHERE mark = ?", (mark,))
        return {key: json.loads(parts) for key, parts in rows}

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._database.execute("BEGIN")
        try:
            yield
        except BaseException:
            self._database.execute("ROLLBACK")
            raise
        self._database.execute("COMMIT")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise UserError(f"teacher.store={self.path}: {error}. Free space, or name another file.") from error
