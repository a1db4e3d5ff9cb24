"""The embedded engine: a folder with the passages, their vectors and a BM25 index.

    passages.sqlite     passages, each with the row of its vector; settings: the embedder and a count of changes
    vectors.bin         float32 or float16 [rows, dimensions]; a row that no passage names is free
    bm25-<change>/      bm25s' own files for one state of the passages, made anew when they have changed

SQLite decides what is there: vectors are on disk before the transaction that names them commits, so a kill leaves all
of a block or nothing. One process writes at a time; others see its blocks with their next search.
"""

from __future__ import annotations

import itertools
import os
import shutil
import sqlite3
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from alignkit.core.errors import UserError
from alignkit.core.retrieval_config import SearchMode
from alignkit.retrieval.base import Found, Passage
from alignkit.retrieval.bm25 import BM25Index
from alignkit.retrieval.dense import nearest
from alignkit.retrieval.embedder import RetrievalEmbedder, require_embedder, searched_text
from alignkit.retrieval.fusion import Ranking, search_rankings
from alignkit.retrieval.ingest import blocks, digest, some_at_a_time, without_repeats
from alignkit.scoring.embedding import Vectors

FORMAT = "1"
DATABASE = "passages.sqlite"
_VECTORS = "vectors.bin"
_TABLES = """
CREATE TABLE IF NOT EXISTS settings (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS passages (
    number INTEGER PRIMARY KEY, id TEXT UNIQUE NOT NULL, digest TEXT NOT NULL, row INTEGER UNIQUE,
    text TEXT NOT NULL, title TEXT NOT NULL, document TEXT, page INTEGER
);
CREATE INDEX IF NOT EXISTS documents ON passages (document);
"""


class EmbeddedIndex:
    """A `Retriever` in a folder, without a server. `embedder` is needed for every mode but bm25.

    The folder is made by `index` and `add`; everything else raises `UserError` where there is none, and so does an
    embedder that is not the one whose vectors the folder holds. Vectors are compared with all others, exactly, and BM25
    is built anew by the first search after a change (by `index` itself): 200,000 passages are a good size, a million
    take seconds a query by vectors and minutes to build.
    """

    def __init__(
        self,
        folder: Path,
        embedder: RetrievalEmbedder | None = None,
        mode: SearchMode = SearchMode.hybrid,
        *,
        candidates: int = 100,
        rrf_k: int = 60,
        half: bool = False,
    ) -> None:
        if embedder is None and mode is not SearchMode.bm25:
            raise ValueError(f"mode {mode.name} needs an embedder")
        self.folder, self.mode, self.candidates, self.rrf_k = folder, mode, candidates, rrf_k
        self.embedder = embedder
        self._type = "<f2" if half else "<f4"
        self._lock = threading.RLock()
        self._opened: sqlite3.Connection | None = None
        self._state = -1
        """The change that the arrays in memory belong to."""
        self._free_state = -1
        """The change that `_free` belongs to."""

    def close(self) -> None:
        """Let go of the files."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    def __len__(self) -> int:
        with self._explained():
            return int(self._database().execute("SELECT count(*) FROM passages").fetchone()[0])

    # -- changing ---------------------------------------------------------------------------------------------------

    def index(self, passages: Iterable[Passage]) -> None:
        """Hold these passages and no others; those that are there already, unchanged, cost next to nothing."""
        seen: set[str] = set()
        self.add(without_repeats(passages, seen))
        with self._explained():
            held = [id for (id,) in self._database().execute("SELECT id FROM passages") if id not in seen]
        del seen
        self.delete(held)
        if self.mode is not SearchMode.dense:
            with self._lock, self._explained():
                self._refresh()

    def add(self, passages: Iterable[Passage]) -> None:
        """Hold these as well, block by block; what a kill leaves undone, the same call does later."""
        with self._lock, self._explained():
            self._create()
            for block in blocks(passages):
                self._add(block)
        if self.embedder is not None:
            self.embedder.warn_of_cut()

    def delete(self, ids: Iterable[str]) -> None:
        """Hold these no longer. Their vectors' places are used again."""
        with self._lock, self._explained():
            database = self._database()
            for block in some_at_a_time(ids):
                with self._transaction(database):
                    database.execute(f"DELETE FROM passages WHERE id IN ({_marks(block)})", block)

    def _add(self, block: Sequence[Passage]) -> None:
        database = self._database()
        ids = [passage.id for passage in block]
        query = f"SELECT id, digest FROM passages WHERE id IN ({_marks(ids)})"
        held = dict(database.execute(query, ids))
        digests = {passage.id: digest(passage) for passage in block}
        new = [passage for passage in block if held.get(passage.id) != digests[passage.id]]
        if not new:
            return
        rows: list[int | None] = [None] * len(new)
        vectors = self.embedder.embed_passages(new) if self._setting("embedder") and self.embedder else None
        with self._transaction(database):
            changed = [passage.id for passage in new if passage.id in held]
            if vectors is not None:
                self._find_free_rows()
                rows = self._write(vectors)
            database.execute(f"DELETE FROM passages WHERE id IN ({_marks(changed)})", changed)
            database.executemany(
                "INSERT INTO passages (id, digest, row, text, title, document, page) VALUES (?, ?, ?, ?, ?, ?, ?)",
                (
                    (each.id, digests[each.id], row, each.text, each.title, each.document, each.page)
                    for each, row in zip(new, rows, strict=True)
                ),
            )

    def _write(self, vectors: Vectors) -> list[int | None]:
        """Put vectors into free rows of the file, and say which; one of zeros is similar to nothing and has no row."""
        path = self.folder / _VECTORS
        rows = [next(self._free) if vector.any() else None for vector in vectors]
        path.touch()
        with path.open("r+b") as file:
            for row, vector in zip(rows, vectors.astype(self._type), strict=True):
                if row is not None:
                    file.seek(row * vector.nbytes)
                    file.write(vector.tobytes())
            file.flush()
            os.fsync(file.fileno())
        return rows

    def _find_free_rows(self) -> None:
        """Rows that no passage names, unless nobody else has written since they were last looked for."""
        state = int(self._setting("changes"))
        if state != self._free_state:
            used = {row for (row,) in self._database().execute("SELECT row FROM passages WHERE row IS NOT NULL")}
            self._free: Iterator[int] = (row for row in itertools.count() if row not in used)
        self._free_state = state + 1  # after the transaction that is under way

    # -- searching --------------------------------------------------------------------------------------------------

    def search(self, queries: Sequence[str], k: int, documents: Collection[str] | None = None) -> list[list[Found]]:
        """For each query its at most `k` best passages; `documents` leaves only passages of these documents."""
        with self._lock, self._explained():
            self._refresh()
            return search_rankings(
                self, queries, k, self.mode, candidates=self.candidates, rrf_k=self.rrf_k, documents=documents
            )

    def by_words(self, queries: Sequence[str], k: int, documents: Collection[str] | None) -> list[Ranking]:
        """By BM25, as of the last refresh."""
        among = None if documents is None else np.isin(self._numbers, self._numbers_of(documents))
        hits = self._bm25.search(queries, k, among)
        ids = self._ids({int(self._numbers[hit.index]) for some in hits for hit in some})
        return [[(ids[int(self._numbers[hit.index])], hit.score) for hit in some] for some in hits]

    def by_vectors(self, queries: Sequence[str], k: int, documents: Collection[str] | None) -> list[Ranking]:
        """By cosine, as of the last refresh. A query of zeros is similar to nothing."""
        assert self.embedder is not None
        among = self._owners >= 0
        if documents is not None:
            among &= np.isin(self._owners, self._numbers_of(documents))
        embedded = self.embedder.embed_queries(queries)
        hits = nearest(embedded, self._vectors, k, self._order, among)
        hits = [some if vector.any() else [] for some, vector in zip(hits, embedded, strict=True)]
        ids = self._ids({int(self._owners[row]) for some in hits for row, _ in some})
        return [[(ids[int(self._owners[row])], score) for row, score in some] for some in hits]

    def passages(self, ids: Collection[str]) -> Mapping[str, Passage]:
        """The passages of these ids that are there."""
        found: dict[str, Passage] = {}
        for block in some_at_a_time(ids):
            query = f"SELECT id, text, title, document, page FROM passages WHERE id IN ({_marks(block)})"
            for id, text, title, document, page in self._database().execute(query, block):
                found[id] = Passage(id=id, text=text, title=title, document=document, page=page)
        return found

    def _ids(self, numbers: set[int]) -> dict[int, str]:
        found: dict[int, str] = {}
        for block in some_at_a_time(numbers):
            query = f"SELECT number, id FROM passages WHERE number IN ({_marks(block)})"
            found |= dict(self._database().execute(query, block))
        return found

    def _numbers_of(self, documents: Collection[str]) -> list[int]:
        query = "SELECT number FROM passages WHERE document IN (%s)"
        return [
            number
            for block in some_at_a_time(documents)
            for (number,) in self._database().execute(query % _marks(block), block)
        ]

    # -- what is in memory ------------------------------------------------------------------------------------------

    def _refresh(self) -> None:
        """Bring the arrays up to the last change: of each passage, in the order of ids, its number and its row."""
        state = int(self._setting("changes"))
        if state == self._state:
            return
        entries = self._database().execute("SELECT number, coalesce(row, -1) FROM passages ORDER BY id")
        ordered = np.fromiter((entry for both in entries for entry in both), np.int64).reshape(-1, 2)
        self._numbers = ordered[:, 0].copy()
        if self.mode is not SearchMode.dense:
            self._bm25 = self._open_bm25(state)
        if self.mode is not SearchMode.bm25:
            self._open_vectors(ordered)
        self._state = state

    def _open_vectors(self, ordered: npt.NDArray[np.int64]) -> None:
        assert self.embedder is not None
        path, dimensions = self.folder / _VECTORS, self.embedder.dimensions
        kind = np.dtype(self._setting("type"))
        rows = path.stat().st_size // (dimensions * kind.itemsize) if path.exists() else 0
        if len(ordered) and ordered[:, 1].max() >= rows:
            raise UserError(f"{path}: vectors are missing. Delete {self.folder} and index again.")
        self._vectors: npt.NDArray[Any] = np.empty((0, dimensions), kind)
        if rows:
            self._vectors = np.memmap(path, kind, "r", shape=(rows, dimensions))
        self._owners, self._order = np.full(rows, -1, np.int64), np.zeros(rows, np.int64)
        has_row = ordered[:, 1] >= 0
        self._owners[ordered[has_row, 1]] = ordered[has_row, 0]
        self._order[ordered[has_row, 1]] = np.flatnonzero(has_row)

    def _open_bm25(self, state: int) -> BM25Index:
        """The BM25 index of this state, from disk, or else built and put there. Its texts stand in the order of ids."""
        folder = self.folder / f"bm25-{state}"
        if not folder.is_dir():
            partial = self.folder / f".bm25-{state}.{os.getpid()}"
            shutil.rmtree(partial, ignore_errors=True)
            BM25Index(self._texts()).save(partial)
            for old in self.folder.glob("bm25-*"):
                shutil.rmtree(old, ignore_errors=True)
            with suppress(FileExistsError):  # another process was faster, or is: the files are the same
                partial.rename(folder)
            shutil.rmtree(partial, ignore_errors=True)
        return BM25Index.load(folder)

    def _texts(self) -> Iterator[str]:
        rows = self._database().execute("SELECT id, text, title FROM passages ORDER BY id")
        return (searched_text(Passage(id=id, text=text, title=title)) for id, text, title in rows)

    # -- the database -----------------------------------------------------------------------------------------------

    def _create(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / DATABASE).exists():
            partial = self.folder / f".{DATABASE}.{os.getpid()}"
            partial.unlink(missing_ok=True)
            embedder = self.embedder if self.mode is not SearchMode.bm25 else None
            settings = {
                "format": FORMAT,
                "changes": "0",
                "embedder": embedder.key if embedder else "",
                "embedder_name": embedder.name if embedder else "",
                "type": self._type,
            }
            database = sqlite3.connect(partial)
            database.executescript(_TABLES)
            database.executemany("INSERT INTO settings VALUES (?, ?)", settings.items())
            database.commit()
            database.close()
            partial.rename(self.folder / DATABASE)
        self._database()
        if self._setting("embedder") and self.mode is SearchMode.bm25:
            raise UserError(
                f"{self.folder} holds vectors, which passages that are added need as well: set retrieval.embedder"
            )

    def _database(self) -> sqlite3.Connection:
        if self._opened is None:
            path = self.folder / DATABASE
            if not path.is_file():
                raise UserError(f"{self.folder}: there is no index. Make one with python -m alignkit.index")
            self._opened = sqlite3.connect(path, isolation_level=None, timeout=60, check_same_thread=False)
            try:
                self._check_settings()
            except BaseException:
                self.close()
                raise
        return self._opened

    def _check_settings(self) -> None:
        if (found := self._setting("format")) != FORMAT:
            raise UserError(f"{self.folder}: an index of format {found}, and this is {FORMAT}. Index again.")
        self._type = self._setting("type")
        if self.mode is SearchMode.bm25:
            return
        assert self.embedder is not None
        require_embedder(str(self.folder), self._setting("embedder"), self._setting("embedder_name"), self.embedder)

    def _setting(self, key: str) -> str:
        found = self._database().execute("SELECT value FROM settings WHERE key = ?", [key]).fetchone()
        return str(found[0])

    @contextmanager
    def _transaction(self, database: sqlite3.Connection) -> Iterator[None]:
        database.execute("BEGIN IMMEDIATE")
        try:
            yield
            database.execute("UPDATE settings SET value = value + 1 WHERE key = 'changes'")
            database.execute("COMMIT")
        except BaseException:
            database.execute("ROLLBACK")
            raise

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise UserError(
                f"the index {self.folder}: {error}. Free space, or delete the folder and index again."
            ) from error


def _marks(values: Collection[object]) -> str:
    return ", ".join("?" * len(values))
