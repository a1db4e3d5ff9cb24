"""What a table knows about documents (a machine's name and code), joined to their pages from a CSV file or by SQL."""

from __future__ import annotations

import csv
import logging
import os
import sqlite3
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import Any, Optional

from alignkit.core.errors import UserError
from alignkit.core.records import DocumentPage, Dropped

# All configurations write Optional[...]; omegaconf takes `... | None` just as well.
# ruff: noqa: UP045

LOG = logging.getLogger("alignkit")

Record = dict[str, str]


class Unmatched(Enum):
    """What becomes of a document of which the table knows nothing."""

    keep = "keep"
    drop = "drop"


@dataclass
class MetadataConfig:
    """Where the metadata of documents comes from: a file, or a query, or nowhere."""

    path: Optional[str] = None
    """A CSV file with a header; cells between commas, semicolons or tabs."""
    query: Optional[str] = None
    """SQL whose rows are used instead. Its parameters are written `:name` in SQLite, `%(name)s` in PostgreSQL."""
    parameters: dict[str, str] = field(default_factory=dict)
    """Values of the query's parameters. The database binds them: they are never part of the SQL."""
    url_env: str = "ALIGNKIT_METADATA_URL"
    """NAME of the environment variable with the database: `sqlite:///file.db` or `postgresql://user:...@host/name`."""
    key: str = "filename"
    """Column with the document's file name."""
    unmatched: Unmatched = Unmatched.keep
    """Keep the documents without a row (their number is logged), or drop them."""

    def check(self) -> None:
        """Raise `UserError` for settings that contradict each other."""
        if self.path and self.query:
            raise UserError("metadata: path and query are both given; choose one")
        if "://" in self.url_env:
            raise UserError("metadata.url_env: name the environment variable; the address itself goes there")


def join_metadata(pages: Sequence[DocumentPage], config: MetadataConfig) -> tuple[list[DocumentPage], list[Dropped]]:
    """The pages with the columns of their document's row as `metadata`, and the dropped documents.

    A row fits the document whose path is in its key column, or else the one with that file name, or else with that
    name up to the last dot, since the table may name the PDF that a text was made from; capitals do not matter.
    Where two rows that differ fit equally, the document counts as unmatched, with that reason.
    """
    if not (config.path or config.query):
        return list(pages), []
    records = _read_csv(Path(config.path), config.key) if config.path else _query(config)
    lookups = [_Lookup(records, config.key, shorten) for shorten in (str.casefold, _file_name, _stem)]
    count = Counter(page.document for page in pages)
    found = {document: _find(document, lookups) for document in count}
    missing = {document: reason for document, reason in found.items() if isinstance(reason, str)}
    if missing and config.unmatched is Unmatched.keep:
        LOG.warning("metadata: none for %d of %d documents: %s", len(missing), len(found), ", ".join([*missing][:5]))
    joined, dropped = [], []
    for page in pages:
        record = found[page.document]
        if isinstance(record, dict):
            columns = {key: value for key, value in record.items() if key != config.key}
            joined.append(page.model_copy(update={"metadata": {**page.metadata, **columns}}))
        elif config.unmatched is Unmatched.keep:
            joined.append(page)
    if config.unmatched is Unmatched.drop:
        dropped = [
            Dropped(reason=reason, row={"document": document, "pages": count[document]}, detail=f"key {config.key}")
            for document, reason in missing.items()
        ]
    return joined, dropped


class _Lookup:
    """Records by one form of their key."""

    def __init__(self, records: Sequence[Record], key: str, shorten: Callable[[str], str]) -> None:
        self.shorten = shorten
        self.records: dict[str, list[Record]] = {}
        for record in records:
            same = self.records.setdefault(shorten(record[key].strip()), [])
            if not any(_rest(record, key) == _rest(other, key) for other in same):
                same.append(record)

    def find(self, document: str) -> list[Record]:
        """The records that differ, of those that fit."""
        return self.records.get(self.shorten(document), [])


def _rest(record: Record, key: str) -> Record:
    return {column: value for column, value in record.items() if column != key}


def _find(document: str, lookups: Sequence[_Lookup]) -> Record | str:
    for lookup in lookups:
        if fitting := lookup.find(document):
            return fitting[0] if len(fitting) == 1 else "metadata ambiguous"
    return "no metadata"


def _file_name(name: str) -> str:
    return PurePosixPath(name.replace("\\", "/")).name.casefold()


def _stem(name: str) -> str:
    return PurePosixPath(_file_name(name)).stem


def _read_csv(file: Path, key: str) -> list[Record]:
    """The rows of a CSV file. Raises `UserError` with `file:line`."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"{file}: no such file. Correct metadata.path.") from error
    except UnicodeDecodeError as error:
        line = 1 + error.object.count(b"\n", 0, error.start)
        raise UserError(f"{file}:{line}: offset {error.start} is not UTF-8. Save the file in UTF-8.") from error
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    header = text.partition("\n")[0]
    delimiter = max(",;\t", key=header.count)
    reader = csv.DictReader(text.splitlines(keepends=True), delimiter=delimiter, strict=True)
    records = []
    try:
        for row in reader:
            if None in row or None in row.values():
                raise UserError(f"{file}:{reader.line_num}: has not as many cells as the header. Correct the row.")
            records.append({column.strip(): cell.strip() for column, cell in row.items()})
    except csv.Error as error:
        raise UserError(f"{file}:{reader.reader.line_num}: {error}") from error
    columns = [column.strip() for column in reader.fieldnames or []]
    return _with_key(records, columns, key, str(file))


def _query(config: MetadataConfig) -> list[Record]:
    """The rows of the query. No message shows the address, which may hold a password."""
    url = os.environ.get(config.url_env, "")
    if not url:
        raise UserError(f"metadata.url_env={config.url_env}: that environment variable is not set")
    kind = url.partition("://")[0]
    run = {"sqlite": _sqlite, "postgresql": _postgres, "postgres": _postgres}.get(kind)
    if run is None:
        raise UserError(f"{config.url_env}: must begin with sqlite:/// or postgresql://")
    columns, rows = run(url, config)
    records = [
        {column: "" if cell is None else str(cell) for column, cell in zip(columns, row, strict=True)} for row in rows
    ]
    return _with_key(records, columns, config.key, "metadata.query")


def _sqlite(url: str, config: MetadataConfig) -> tuple[list[str], list[tuple[Any, ...]]]:
    file = Path(url.removeprefix("sqlite:///"))
    if not file.is_file():
        raise UserError(f"{config.url_env}: the database file does not exist")
    try:
        connection = sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True)
        try:
            cursor = connection.execute(str(config.query), config.parameters)
            return [column[0] for column in cursor.description or []], cursor.fetchall()
        finally:
            connection.close()
    except (sqlite3.Error, sqlite3.Warning) as error:
        raise UserError(f"metadata.query: {error}") from error


def _postgres(url: str, config: MetadataConfig) -> tuple[list[str], list[tuple[Any, ...]]]:
    try:
        import psycopg
    except ImportError as error:
        raise UserError("metadata: PostgreSQL needs psycopg: pip install 'alignkit[postgres]'") from error
    try:
        with psycopg.connect(url, connect_timeout=10) as connection:
            connection.read_only = True
            cursor = connection.execute(str(config.query).encode(), config.parameters or None)
            return [column.name for column in cursor.description or []], cursor.fetchall()
    except psycopg.OperationalError as error:
        raise UserError(f"{config.url_env}: the database cannot be reached ({_safe(error, url)})") from error
    except psycopg.Error as error:
        raise UserError(f"metadata.query: {_safe(error, url)}") from error


def _safe(error: Exception, url: str) -> str:
    """The first line of a database's complaint, unless it repeats the password."""
    from urllib.parse import unquote, urlsplit

    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    password = urlsplit(url).password
    return type(error).__name__ if password and (password in line or unquote(password) in line) else line


def _with_key(records: list[Record], columns: Sequence[str], key: str, place: str) -> list[Record]:
    if key not in columns:
        raise UserError(f"{place}: has no column '{key}', but {', '.join(columns) or 'none'}. Set metadata.key.")
    if not records:
        raise UserError(f"{place}: has no row")
    return records
