"""The response store: every reply that was paid for, so that it is never paid for again.

One SQLite file in write-ahead mode. A reply is on disk before anybody sees it, so a killed run loses at most what was
in flight. It holds prompts and replies in the clear, and no key. Besides, it remembers what each server understands.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any

from alignkit.core.database import open_database
from alignkit.core.errors import UserError

_TABLES = """
CREATE TABLE IF NOT EXISTS replies (
    key TEXT PRIMARY KEY, request TEXT NOT NULL, text TEXT, finish_reason TEXT, prompt_tokens INTEGER,
    completion_tokens INTEGER, model TEXT, attempts INTEGER NOT NULL, reason TEXT, detail TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS servers (server TEXT PRIMARY KEY, dialect TEXT NOT NULL);
"""


@dataclass(frozen=True)
class Reply:
    """What a server made of one request, once and for all: a text, or the reason why there will be none.

    Whether the text is usable is not decided here: that is read from it each time (`reading.read_reply`).
    """

    text: str | None
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    """Of all attempts that reported them; None when none did."""
    completion_tokens: int | None = None
    model: str | None = None
    """What the server calls the model."""
    attempts: int = 1
    reason: str | None = None
    """Why the text cannot be used whatever it says, in words to count by; None when it can be read."""
    detail: str = ""


_COLUMNS = ", ".join(field.name for field in fields(Reply))


class ResponseStore:
    """Replies by request key. Use as a context manager; raises `UserError` when the file cannot be used."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> ResponseStore:
        with self._explained():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch(mode=0o600)  # prompts may hold what is not everybody's to read
            self._database = open_database(self.path)
            self._database.executescript(_TABLES)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._database.close()

    def get(self, key: str) -> Reply | None:
        """The stored reply, or None."""
        with self._explained():
            row = self._database.execute(f"SELECT {_COLUMNS} FROM replies WHERE key = ?", (key,)).fetchone()
        return None if row is None else Reply(*row)

    def put(self, key: str, parts: Mapping[str, Any], reply: Reply) -> None:
        """Keep a reply, in the place of an older one. `parts` is what the key was made of (`wire.request_parts`)."""
        row = (key, json.dumps(parts, ensure_ascii=False), *astuple(reply))
        with self._explained():
            self._database.execute(f"INSERT OR REPLACE INTO replies VALUES (?{', ?' * (len(row) - 1)})", row)

    def remove(self, keys: Iterable[str]) -> None:
        """Forget replies, so that they are asked for again."""
        with self._explained():
            self._database.executemany("DELETE FROM replies WHERE key = ?", [(key,) for key in keys])

    def get_dialect(self, server: str) -> str | None:
        """What was remembered about a server's model (`dialect.Dialect`), or None."""
        with self._explained():
            row = self._database.execute("SELECT dialect FROM servers WHERE server = ?", (server,)).fetchone()
        return None if row is None else str(row[0])

    def put_dialect(self, server: str, dialect: str) -> None:
        """Remember something about a server's model."""
        with self._explained():
            self._database.execute("INSERT OR REPLACE INTO servers VALUES (?, ?)", (server, dialect))

    def count(self) -> int:
        """Replies stored."""
        with self._explained():
            return int(self._database.execute("SELECT count(*) FROM replies").fetchone()[0])

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise UserError(f"teacher.store={self.path}: {error}. Free space, or name another file.") from error
