"""An id-keyed, append-only journal: what makes row-wise work resumable.

Each finished row is appended as one line and flushed; after a kill the journal holds every finished row, and at most
the last line is torn (it is then ignored and its row done again). The journal belongs to one piece of work, named by a
fingerprint in its first line: another fingerprint starts a new journal.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO


class Journal:
    """Finished rows by id, on disk as they finish.

    Use as a context manager; `journal.done` maps id -> value of all rows finished so far, this time or before.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path = path
        self.fingerprint = fingerprint
        self.done: dict[str, Any] = {}
        self._file: TextIO | None = None

    def __enter__(self) -> Journal:
        intact = self._load()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a" if intact else "w", encoding="utf-8")
        if not intact:
            self._write({"fingerprint": self.fingerprint})
        elif _is_torn(self.path):
            self._file.write("\n")  # a torn last line must not swallow the next one
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, id: str, value: Any) -> None:
        """Record that the row `id` is finished; `value` is JSON-serialisable."""
        self.done[id] = value
        self._write({"id": id, "value": value})

    def _write(self, entry: dict[str, Any]) -> None:
        assert self._file is not None, "use the journal as a context manager"
        self._file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        self._file.flush()

    def _load(self) -> bool:
        """Read finished rows; False when there is no journal of this fingerprint."""
        if not self.path.exists() or self.path.stat().st_size == 0:  # empty: killed before its first line was flushed
            return False
        with self.path.open(encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file):
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:
                    if number == 0:
                        return False
                    continue  # torn by a kill: its row is done again
                if number == 0:
                    if entry.get("fingerprint") != self.fingerprint:
                        return False
                else:
                    self.done[entry["id"]] = entry["value"]
        return True


def _is_torn(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"
