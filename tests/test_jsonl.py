"""Reading rows: every format gives the same rows, and every bad file gives one clear message with its place."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest

from alignkit.core.config import RowsConfig
from alignkit.core.errors import UserError
from alignkit.core.records import ChatExample, CompletionSet, PreferencePair, QAExample
from alignkit.data.jsonl import read_records, read_rows

ROWS: list[dict[str, Any]] = [
    {"id": "a", "instruction": "Anna lives in Rome.", "input": "Where does Anna live?", "output": "In Rome."},
    {
        "id": "b",
        "instruction": "安娜住在罗马。",
        "input": "安娜住在哪里？",
        "output": "line\u2028separator",
        "scores": {"x": 1.5},
    },
    {"id": "c", "instruction": "Ünïcödé \U0001f600", "input": "", "output": '"quoted"\n', "parents": ["a", "b"]},
]


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def message_of(action: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        action()
    return str(caught.value)


# -- formats ----------------------------------------------------------------------------------------------------------


def _table(rows: list[dict[str, Any]]) -> Any:
    """An Arrow table of rows that need not have the same fields."""
    import pyarrow  # type: ignore[import-untyped]

    names = dict.fromkeys(name for row in rows for name in row)
    return pyarrow.Table.from_pylist([{name: row.get(name) for name in names} for row in rows])


def _parquet(path: Path, rows: list[dict[str, Any]] = ROWS) -> None:
    from pyarrow import parquet

    parquet.write_table(_table(rows), path)


def _arrow(path: Path, form: str) -> None:
    import pyarrow

    table = _table(ROWS)
    with getattr(pyarrow.ipc, f"new_{form}")(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def _text(text: str, encoding: str = "utf-8") -> Callable[[Path], object]:
    return lambda path: path.write_bytes(text.encode(encoding))


LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("rows.jsonl", _text(LINES)),
        ("rows.jsonl", _text(LINES.replace("\n", "\r\n"))),
        ("rows.jsonl", _text("\n" + LINES.replace("\n", "\n\n").rstrip("\n"))),
        ("rows.jsonl", _text(LINES, "utf-8-sig")),
        ("rows.jsonl", _text(json.dumps(ROWS))),
        ("rows.json", _text(LINES)),
        ("rows.json", _text(json.dumps(ROWS, indent=4, ensure_ascii=False), "utf-8-sig")),
        ("rows.parquet", _parquet),
        ("rows.arrow", partial(_arrow, form="file")),
        ("rows.arrow", partial(_arrow, form="stream")),
    ],
)
def test_every_format_gives_the_same_records(tmp_path: Path, name: str, write: Callable[[Path], object]) -> None:
    path = tmp_path / name
    write(path)
    read = read_records(RowsConfig(path=str(path)), QAExample)
    assert read == [QAExample(**row) for row in ROWS]


def test_a_row_says_where_it_stands(tmp_path: Path) -> None:
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"n": 1}\n\n{"n": 2}\n')
    array = tmp_path / "b.json"
    array.write_text('\n[\n {"n":\n 1}, {"n": 2},\n\n {"n": 3}\n]\n')
    assert list(read_rows(str(lines))) == [(f"{lines}:1", {"n": 1}), (f"{lines}:3", {"n": 2})]
    assert [place.rpartition(":")[2] for place, _ in read_rows(str(array))] == ["3", "4", "6"]


def test_skip_and_limit_cut_a_window(tmp_path: Path) -> None:
    path = str(write_lines(tmp_path / "a.jsonl", [{"n": n} for n in range(6)]))

    def window(skip: int, limit: int | None) -> list[int]:
        return [row["n"] for _, row in read_rows(path, skip, limit)]

    assert window(0, None) == [0, 1, 2, 3, 4, 5]
    assert window(2, 3) == [2, 3, 4]
    assert window(4, 9) == [4, 5]
    assert "skip=6 leaves no row, the file has only 6" in message_of(lambda: window(6, None))
    assert "limit=0 must be at least 1" in message_of(lambda: window(0, 0))
    assert "skip=-1 must not be negative" in message_of(lambda: window(-1, None))


def test_lines_are_streamed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"n": 0}\n{"n": 1}\nnot JSON\n')
    assert len(list(read_rows(str(path), limit=2))) == 2
    with pytest.raises(UserError):
        list(read_rows(str(path)))


def test_null_in_a_table_means_absent(tmp_path: Path) -> None:
    """A table has every column in every row; JSON that says null means it."""
    row = {"id": "a", "prompt": [{"role": "user", "content": "Hi"}], "completions": [{"text": "Ho", "model": "m"}]}
    rows: list[dict[str, Any]] = [row, {**row, "id": "b", "reference": "Ho", "parents": ["a"]}]
    _parquet(tmp_path / "a.parquet", rows)
    assert read_records(RowsConfig(path=str(tmp_path / "a.parquet")), CompletionSet) == [
        CompletionSet.model_validate(each) for each in rows
    ]
    path = write_lines(tmp_path / "a.jsonl", [{**row, "parents": None}])
    message = message_of(lambda: read_records(RowsConfig(path=str(path)), CompletionSet))
    assert f"{path}:1: parents: " in message
    assert "found null" in message


def test_a_data_set_name_is_loaded_with_its_split(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[tuple[str, str]] = []

    def load_dataset(name: str, split: str) -> datasets.Dataset:
        asked.append((name, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in ("owner/name", "owner/name:test"):
        read = read_records(RowsConfig(path=name), QAExample)
        assert [row.id for row in read] == ["a", "b", "c"]
        assert read[0] == QAExample(**ROWS[0], scores={})
    assert asked == [("owner/name", "train"), ("owner/name", "test")]


# -- bad input --------------------------------------------------------------------------------------------------------

GOOD = '{"id": "a", "instruction": "x"}\n'


BAD_FILES: dict[str, tuple[bytes, int | None, str]] = {
    "empty.jsonl": (b"", None, "is empty"),
    "blank.jsonl": (b"\n \n", None, "is empty"),
    "empty.json": (b"[ ]\n", None, "is empty"),
    "empty.parquet": (b"", None, "is empty"),
    "cut.jsonl": ((GOOD + '{"id": "b", "instr').encode(), 2, "the file ends in the middle of this row"),
    "cut.json": (b'[{"id": "a"},\n{"id": "b', 2, "the row that begins here is not JSON"),
    "cut2.json": (b'[{"id": "a"},\n{"id": "b"}', 2, "a comma or the closing bracket is missing"),
    "cut3.json": (b'[{"id": "a"},\n', 2, "not JSON"),
    "more.json": (b'[{"id": "a"}]\n]', 2, "text follows the closing bracket"),
    "text.jsonl": ((GOOD + "hello\n").encode(), 2, "not JSON (Expecting value)"),
    "table.csv": (b"id,instruction\na,x\n", 1, "Every line must hold one JSON object"),
    "pretty.json": (b'{\n "data": []\n}\n', 1, "not JSON"),
    "number.jsonl": ((GOOD + "7\n").encode(), 2, "must be a JSON object, found 7"),
    "list.json": (b'["a"]', 1, 'must be a JSON object, found "a"'),
    "latin.jsonl": ((GOOD + '{"id": "\xe9"}\n').encode("latin-1"), 2, "0xe9 is not UTF-8"),
    "latin.json": ('[{"id": "a"},\n{"id": "\xe9"}]'.encode("latin-1"), 2, "0xe9 is not UTF-8"),
    "wide.jsonl": (GOOD.encode("utf-16"), None, "not UTF-8"),
    "half.jsonl": (b'{"id": "\\ud800"}\n', 1, "surrogate"),
    "nan.jsonl": (b'{"id": "a", "margin": NaN}\n', 1, "NaN is not a JSON value"),
    "huge.jsonl": (b'{"id": "a", "margin": 1e999}\n', 1, "value that JSON does not know"),
    "deep.jsonl": (b'{"a":' + b"[" * 200_000 + b"\n", 1, "nested too deeply"),
    "image.jsonl": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", None, "is a PNG image"),
    "renamed.jsonl": (b"PAR1\x15\x04\x15", None, "is a Parquet file; name it .parquet"),
    "packed.jsonl": (b"\x1f\x8b\x08\0\0", None, "compressed with gzip; unpack it first"),
    "bytes.jsonl": (b"\x7fELF\0\0\0", None, "is a binary file"),
    "text.parquet": (GOOD.encode(), None, "not a readable Parquet file"),
    "text.arrow": (GOOD.encode(), None, "not a readable Arrow file"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_one_clear_message(tmp_path: Path, name: str) -> None:
    content, line, problem = BAD_FILES[name]
    path = tmp_path / name
    path.write_bytes(content)
    message = message_of(lambda: list(read_rows(str(path))))
    assert message.startswith(f"{path}:{line}: " if line else f"{path}: ")
    assert problem in message
    assert "\n" not in message


def test_a_truncated_parquet_file_is_one_clear_message(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    _parquet(path)
    path.write_bytes(path.read_bytes()[:-20])
    assert message_of(lambda: list(read_rows(str(path)))).startswith(f"{path}: not a readable Parquet file")


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "stream.arrow"])
def test_a_damaged_table_never_does_worse_than_a_message(tmp_path: Path, name: str) -> None:
    """Bytes overwritten anywhere: the rows can still be read, or one clear message comes."""
    path, rng = tmp_path / name, Random(1)
    if name == "a.parquet":
        _parquet(path)
    else:
        _arrow(path, "stream" if name == "stream.arrow" else "file")
    whole, refused = path.read_bytes(), 0
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(4):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            list(read_rows(str(path)))
        except UserError as error:
            assert str(error).startswith(str(path))
            refused += 1
    assert refused > 20


def test_a_column_that_is_not_json_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    _parquet(path, [{"id": "a"}, {"id": "b", "image": b"\xff"}])
    message = message_of(lambda: list(read_rows(str(path))))
    assert message.startswith(f"{path}:2: ")
    assert "bytes is not JSON serializable" in message


def test_a_folder_is_not_a_file(tmp_path: Path) -> None:
    assert "it holds no file that could be read" in message_of(lambda: list(read_rows(str(tmp_path))))
    write_lines(tmp_path / "selected.jsonl", ROWS)
    message = message_of(lambda: list(read_rows(str(tmp_path))))
    assert message == f"{tmp_path}: is a folder, not a file; name one of its files: selected.jsonl"


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    missing = str(tmp_path / "none.jsonl")
    assert message_of(lambda: list(read_rows(missing))).startswith(f"{missing}: no such file. Run the stage")
    message = message_of(lambda: list(read_rows("nobody/no-such-data-set")))
    assert message.startswith("nobody/no-such-data-set: no such file, and no data set of that name could be loaded (")


PAIR = {"id": "a", "prompt": [{"role": "user", "content": "q"}], "chosen": [], "rejected": []}


@pytest.mark.parametrize(
    ("kind", "row", "problem"),
    [
        (QAExample, {"id": "a", "input": "x"}, "instruction: missing. The row has the fields id, input"),
        (QAExample, {"id": "a", "instruction": 7}, "instruction: Input should be a valid string (found 7)"),
        (QAExample, {"id": "a", "instruction": None}, "instruction: Input should be a valid string (found null)"),
        (QAExample, {"id": "", "instruction": "x"}, "id: String should have at least 1 character"),
        (QAExample, {"id": "a", "instruction": "x", "kind": "yes/no"}, "kind: Input should be 'judgmental'"),
        (
            QAExample,
            {"id": "a", "instruction": "x", "scores": {"f": "high"}},
            "scores.f: Input should be a valid number",
        ),
        (QAExample, {"id": 1, "instruction": "x" * 100, "input": {}}, "id: Input should be a valid string (found 1)"),
        (ChatExample, {"id": "a", "prompt": "q", "completion": []}, "prompt: Input should be a valid list"),
        (
            ChatExample,
            {"id": "a", "prompt": [{"role": "human", "content": "q"}], "completion": [{"role": "user"}]},
            "completion.0.content: missing",
        ),
        (PreferencePair, PAIR, "chosen: List should have at least 1 item"),
        (
            PreferencePair,
            {**PAIR, "chosen": PAIR["prompt"], "rejected": PAIR["prompt"]},
            "chosen and rejected are the same text. Correct the row of type PreferencePair",
        ),
        (
            PreferencePair,
            {"id": "a", "prompt": [], "completions": []},
            "chosen, rejected: missing. The row has the fields id, prompt, completions; PreferencePair rows need id, "
            "prompt, chosen, rejected. Add what is missing, or give the file of the stage that writes such rows.",
        ),
    ],
)
def test_a_wrong_row_is_named_with_its_field(
    tmp_path: Path, kind: type[Any], row: dict[str, Any], problem: str
) -> None:
    path = write_lines(tmp_path / "a.jsonl", [row])
    message = message_of(lambda: read_records(RowsConfig(path=str(path)), kind))
    assert message.startswith(f"{path}:1: ")
    assert problem in message
    assert len(message) < 400 + len(str(path))


def test_a_repeated_id_is_named_with_both_places(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [ROWS[0], ROWS[1], ROWS[0]])
    message = message_of(lambda: read_records(RowsConfig(path=str(path)), QAExample))
    assert message.startswith(f"{path}:3: id 'a' stands already at {path}:1; ")


def test_unknown_fields_are_kept(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{**ROWS[0], "licence": "CC0"}])
    (row,) = read_records(RowsConfig(path=str(path)), QAExample)
    assert row.model_dump()["licence"] == "CC0"
