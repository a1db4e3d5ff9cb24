"""Vectors that were computed once, on disk: the same text is not sent through the same model a second time."""

from __future__ import annotations

import hashlib
import logging
import sqlite3
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from alignkit.core.database import open_database
from alignkit.core.errors import UserError

LOG = logging.getLogger("alignkit")
Vectors = npt.NDArray[np.float32]

_QUERY_KEYS = 500
_CHECK_BYTES = 4


class EmbeddingCache:
    """Vectors by the key of their embedder and by their text. Use as a context manager.

    One SQLite file in write-ahead mode, which several processes may use at once. What is put is on disk when `put`
    returns; a kill leaves all of a put or nothing. Each vector is kept with a checksum over it and its key: one that is
    damaged, or of another size, is never returned. Texts are kept as hashes only. Raises `UserError` when the file
    cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> EmbeddingCache:
        with self._explained():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._database = open_database(self.path)
            self._database.execute("CREATE TABLE IF NOT EXISTS vectors (key BLOB PRIMARY KEY, vector BLOB NOT NULL)")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._database.close()

    def get(self, embedder_key: str, texts: Sequence[str], dimensions: int) -> dict[str, Vectors]:
        """The vectors that are there and sound, by text, each float32 [dimensions]. Warns of those that are not."""
        by_key = {_key(embedder_key, text): text for text in texts}
        keys = list(by_key)
        found, damaged = {}, 0
        for start in range(0, len(keys), _QUERY_KEYS):
            some = keys[start : start + _QUERY_KEYS]
            places = ", ".join("?" * len(some))
            with self._explained():
                rows = self._database.execute(f"SELECT key, vector FROM vectors WHERE key IN ({places})", some)
                for key, content in rows:
                    vector = _unpack(key, content, dimensions)
                    if vector is None:
                        damaged += 1
                    else:
                        found[by_key[key]] = vector
        if damaged:
            LOG.warning("%s: %d vectors are damaged or of another size and are computed again", self.path, damaged)
        return found

    def put(self, embedder_key: str, vectors: Mapping[str, Vectors]) -> None:
        """Keep vectors by text, in the place of older ones: all of them or, after a kill, none."""
        keyed = ((_key(embedder_key, text), vector) for text, vector in vectors.items())
        rows = [(key, _pack(key, vector)) for key, vector in keyed]
        with self._explained(), self._database:  # which commits, or rolls back
            self._database.execute("BEGIN IMMEDIATE")
            self._database.executemany("INSERT OR REPLACE INTO vectors VALUES (?, ?)", rows)

    def count(self) -> int:
        """Vectors kept, of all embedders."""
        with self._explained():
            return int(self._database.execute("SELECT count(*) FROM vectors").fetchone()[0])

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise UserError(
                f"the embedding cache {self.path}: {error}. Free space, or delete the file: it only saves time."
            ) from error


def _key(embedder_key: str, text: str) -> bytes:
    return hashlib.sha256(f"{embedder_key}\0{text}".encode(errors="surrogatepass")).digest()


def _pack(key: bytes, vector: Vectors) -> bytes:
    content = np.asarray(vector, dtype="<f4").tobytes()
    return content + zlib.crc32(key + content).to_bytes(_CHECK_BYTES, "little")


def _unpack(key: bytes, content: Any, dimensions: int) -> Vectors | None:
    """The vector, or None when it is not the one that was put under this key, or has another size."""
    if not isinstance(content, bytes) or len(content) != 4 * dimensions + _CHECK_BYTES:
        return None
    numbers, check = content[:-_CHECK_BYTES], content[-_CHECK_BYTES:]
    if zlib.crc32(key + numbers).to_bytes(_CHECK_BYTES, "little") != check:
        return None
    return np.frombuffer(numbers, dtype="<f4").astype(np.float32)
