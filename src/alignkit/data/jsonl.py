"""Rows from files: JSON Lines, JSON arrays, Parquet, Arrow, or a `datasets` name.

Every error is a `UserError` that names the file, the line and what to do. Whether a text file holds JSON Lines or one
array is seen from its first character, not from its name; Parquet and Arrow are told by their suffix.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError

from alignkit.core.config import RowsConfig
from alignkit.core.errors import UserError, first_line
from alignkit.core.manifest import is_hub_name
from alignkit.core.records import Row

Placed = tuple[str, dict[str, Any]]
"""A row and where it stands: `file:line`, or `file:row` in a Parquet or Arrow file."""

AnyModel = TypeVar("AnyModel", bound=BaseModel)
AnyRow = TypeVar("AnyRow", bound=Row)

READABLE = "alignkit reads JSON Lines, JSON arrays, Parquet (.parquet) and Arrow (.arrow)"
_SUFFIXES = (".jsonl", ".json", ".parquet", ".arrow")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_OTHER_FORMATS = {
    b"PAR1": "a Parquet file; name it .parquet",
    b"ARROW1": "an Arrow file; name it .arrow",
    b"\x1f\x8b": "compressed with gzip; unpack it first",
    b"PK\x03\x04": "a zip archive; unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; unpack it first",
    b"%PDF": f"a PDF; {READABLE}",
    b"\x89PNG": f"a PNG image; {READABLE}",
}
_SPACE = re.compile(r"[ \t\r\n]*")


def read_rows(path: str, skip: int = 0, limit: int | None = None) -> Iterator[Placed]:
    """Yield the rows of a file, each with its place, leaving out the first `skip` and all after `limit`.

    JSON Lines, Parquet and Arrow are streamed; a JSON array is read whole. Raises `UserError` for a file that is
    missing, empty, damaged or of another format, and when `skip` leaves nothing.
    """
    if skip < 0 or (limit is not None and limit < 1):
        raise UserError(f"{path}: skip={skip} must not be negative, and limit={limit} must be at least 1 or null")
    rows = _all_rows(path)
    skipped = sum(1 for _ in islice(rows, skip))
    first = next(rows, None)
    if first is None and skipped:
        raise UserError(f"{path}: skip={skip} leaves no row, the file has only {skipped}. Choose a smaller skip.")
    if first is None:
        raise _empty(path)
    yield first
    yield from islice(rows, None if limit is None else limit - 1)


def read_records(rows: RowsConfig, kind: type[AnyRow]) -> list[AnyRow]:
    """Read rows of one type, validated. Raises `UserError` for the first row that is not one, and for a repeated id."""
    records: list[AnyRow] = []
    seen: dict[str, str] = {}
    for place, row in read_rows(rows.path, rows.skip, rows.limit):
        record = to_record(place, row, kind)
        note_id(seen, record.id, place)
        records.append(record)
    return records


def to_record(place: str, row: Mapping[str, Any], kind: type[AnyModel]) -> AnyModel:
    """Validate one row. Raises `UserError` that says where it stands, which field is wrong, and what was expected."""
    try:
        return kind.model_validate(row)
    except ValidationError as error:
        raise UserError(f"{place}: {_explain(error, row, kind)}") from error


def note_id(seen: dict[str, str], id: str, place: str) -> None:
    """Remember in `seen` where an id stands. Raises `UserError` when it stands there twice."""
    if id in seen:
        raise UserError(f"{place}: id '{id}' stands already at {seen[id]}; give every row an id of its own")
    seen[id] = place


def _explain(error: ValidationError, row: Mapping[str, Any], kind: type[BaseModel]) -> str:
    name = kind.__name__.lstrip("_")
    problems = error.errors(include_url=False)
    missing = [_field(problem["loc"]) for problem in problems if problem["type"] == "missing"]
    if missing:
        needed = [field.alias or key for key, field in kind.model_fields.items() if field.is_required()]
        return (
            f"{', '.join(missing)}: missing. The row has the fields {', '.join(row) or '(none)'}; {name} rows need "
            f"{', '.join(needed)}. Add what is missing, or give the file of the stage that writes such rows."
        )
    first = problems[0]
    field = _field(first["loc"])
    where = f"{field}: " if field else ""
    found = f" (found {_shorten(first['input'])})" if field else ""
    return f"{where}{first['msg'].removeprefix('Value error, ')}{found}. Correct the row of type {name} or remove it."


def _field(location: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in location)


def _shorten(value: Any, width: int = 60) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= width else text[: width - 1] + "…"


# -- formats -----------------------------------------------------------------------------------------------------------


def _all_rows(path: str) -> Iterator[Placed]:
    """All rows of a file or data set, whatever its format."""
    file = Path(path)
    if file.is_dir():
        inside = sorted(child.name for child in file.iterdir() if child.suffix in _SUFFIXES)
        hint = f"name one of its files: {', '.join(inside[:8])}" if inside else "it holds no file that could be read"
        raise UserError(f"{path}: is a folder, not a file; {hint}")
    if not file.exists():
        if is_hub_name(path.partition(":")[0]):
            return _hub_rows(path)
        raise UserError(f"{path}: no such file. Run the stage that writes it, or correct the path.")
    try:
        with file.open("rb") as opened:
            head = opened.read(4096)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Check its permissions.") from error
    if not head:
        raise _empty(path)
    if file.suffix == ".parquet":
        return _parquet_rows(path)
    if file.suffix == ".arrow":
        return _arrow_rows(path)
    for magic, what in _OTHER_FORMATS.items():
        if head.startswith(magic):
            raise UserError(f"{path}: is {what}")
    if b"\0" in head:
        raise UserError(f"{path}: is a binary file, or text that is not UTF-8; {READABLE}")
    is_array = head.removeprefix(_BYTE_ORDER_MARK).lstrip().startswith(b"[")
    return _array_rows(path) if is_array else _line_rows(path)


def _empty(path: str) -> UserError:
    return UserError(f"{path}: is empty. Run the stage that writes it again, or give another file.")


def _line_rows(path: str) -> Iterator[Placed]:
    """Rows of a JSON Lines file; blank lines are allowed."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            place = f"{path}:{number}"
            text = _decode(path, line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line, first_line=number)
            if text.strip():
                yield place, _object(place, _parse(place, text))


def _array_rows(path: str) -> Iterator[Placed]:
    """Rows of a file that is one JSON array, each placed at the line where it begins."""
    text = _decode(path, Path(path).read_bytes().removeprefix(_BYTE_ORDER_MARK), first_line=1)
    decoder = json.JSONDecoder(parse_constant=_refuse_constant)
    position = _after_space(text, text.index("[") + 1)
    line = 1 + text.count("\n", 0, position)
    closed = text.startswith("]", position)
    position += closed
    while not closed:
        place = f"{path}:{line}"
        try:
            value, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{place}: the row that begins here is not JSON ({error}). Was it cut off?") from error
        yield place, _object(place, value)
        mark = _after_space(text, end)
        closed = text.startswith("]", mark)
        if not closed and not text.startswith(",", mark):
            raise UserError(f"{place}: after this row a comma or the closing bracket is missing. Was the file cut off?")
        following = _after_space(text, mark + 1)
        line += text.count("\n", position, following)
        position = following
    if text[position:].strip():
        raise UserError(f"{path}:{line}: text follows the closing bracket; a file holds one array or one object a line")


def _parquet_rows(path: str) -> Iterator[Placed]:
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            yield from _columnar_rows(path, _batch_rows(file.iter_batches()))
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: not a readable Parquet file ({first_line(error)}). Write it again.") from error


def _arrow_rows(path: str) -> Iterator[Placed]:
    """Rows of an Arrow file, in the file format or, as `datasets` writes its cache, in the stream format."""
    import pyarrow

    try:
        with pyarrow.memory_map(path) as source:
            try:
                file = pyarrow.ipc.open_file(source)
                batches = (file.get_batch(index) for index in range(file.num_record_batches))
            except pyarrow.ArrowInvalid:
                source.seek(0)
                batches = iter(pyarrow.ipc.open_stream(source))
            yield from _columnar_rows(path, _batch_rows(batches))
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: not a readable Arrow file ({first_line(error)}). Write it again.") from error


def _batch_rows(batches: Iterable[Any]) -> Iterator[dict[str, Any]]:
    """Rows of Arrow record batches, each batch validated first: reading a damaged one could end the process."""
    for batch in batches:
        batch.validate(full=True)
        yield from batch.to_pylist()


def _hub_rows(name: str) -> Iterator[Placed]:
    """Rows of a data set, `owner/name` or `owner/name:split`; the split is train when none is given."""
    import datasets

    repository, _, split = name.partition(":")
    try:
        rows = datasets.load_dataset(repository, split=split or "train")
    except Exception as error:  # a dozen unrelated types, depending on what the network and the hub say
        raise UserError(
            f"{name}: no such file, and no data set of that name could be loaded ({first_line(error)}). "
            "Correct the path, or check the name, the split and the network."
        ) from error
    return _columnar_rows(name, rows)


def _columnar_rows(path: str, rows: Iterable[Any]) -> Iterator[Placed]:
    """Rows of a columnar table. It cannot leave a field out, so a null there means that the field is absent."""
    for number, row in enumerate(rows, 1):
        place = f"{path}:{number}"
        plain = _without_nulls(row)
        _refuse_unwritable(place, plain)
        yield place, plain


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_nulls(inner) for inner in value]
    return value


# -- JSON --------------------------------------------------------------------------------------------------------------


def _decode(path: str, raw: bytes, *, first_line: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + raw.count(b"\n", 0, error.start)
        byte = f"0x{raw[error.start]:02x}"
        raise UserError(f"{path}:{line}: the byte {byte} is not UTF-8. Save the file in UTF-8.") from error


def _parse(place: str, line: str) -> Any:
    try:
        return json.loads(line, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise UserError(f"{place}: nested too deeply. Remove the row.") from error
    except ValueError as error:
        problem = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        if line.startswith("{") and not line.endswith("\n"):
            raise UserError(
                f"{place}: the file ends in the middle of this row ({problem}). It was cut off while it was written: "
                "write it again, or delete this line."
            ) from error
        raise UserError(
            f"{place}: not JSON ({problem}). Every line must hold one JSON object, or the whole file one array of them."
        ) from error


def _object(place: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{place}: a row must be a JSON object, found {_shorten(value)}. Correct or remove it.")
    _refuse_unwritable(place, value)
    return value


def _refuse_unwritable(place: str, row: dict[str, Any]) -> None:
    """Refuse what could be read but never written again: bytes, dates, NaN, halves of a surrogate pair."""
    try:
        json.dumps(row, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{place}: holds half of a surrogate pair (\\ud800-\\udfff). Remove the row.") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{place}: holds a value that JSON does not know ({error}). Remove that column.") from error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")


def _after_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position
