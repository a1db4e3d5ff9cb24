"""The response store: every answer that was paid for, so that it is never paid for again.

One SQLite file in write-ahead mode. An answer is on disk before anybody sees it, so a killed run loses at most what was
in flight. It holds prompts and answers in the clear, and no key.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from alignkit.core.errors import UserError
from alignkit.core.hashing import hash_text
from alignkit.teacher.client import Answer

_TABLE = """
CREATE TABLE IF NOT EXISTS answers (
    key TEXT PRIMARY KEY, request TEXT NOT NULL, text TEXT, error TEXT, prompt_tokens INTEGER, completion_tokens INTEGER
) WITHOUT ROWID
"""


def store_key(request: Mapping[str, Any]) -> str:
    """The key of a request: a hash of everything that decides its answer (host, model, messages, sampling, sample)."""
    return hash_text(json.dumps(request, sort_keys=True, ensure_ascii=False))


class ResponseStore:
    """Answers by request key. Use as a context manager; raises `UserError` when the file cannot be used."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> ResponseStore:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._explained():
            self._database = sqlite3.connect(self.path, isolation_level=None, timeout=30)
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=NORMAL")
            self._database.execute(_TABLE)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._database.close()

    def get(self, key: str) -> Answer | None:
        """The stored answer, or None."""
        with self._explained():
            query = "SELECT text, error, prompt_tokens, completion_tokens FROM answers WHERE key = ?"
            row = self._database.execute(query, (key,)).fetchone()
        if row is None:
            return None
        text, error, prompt_tokens, completion_tokens = row
        return Answer(text, error, prompt_tokens, completion_tokens, stored=True)

    def put(self, request: Mapping[str, Any], answer: Answer) -> None:
        """Keep an answer."""
        plain = json.dumps(request, sort_keys=True, ensure_ascii=False)
        row = (store_key(request), plain, answer.text, answer.error, answer.prompt_tokens, answer.completion_tokens)
        with self._explained():
            self._database.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?, ?)", row)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise UserError(f"teacher.store={self.path}: {error}. Free space, or name another file.") from error
