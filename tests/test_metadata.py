"""Metadata of documents: from a CSV file or by SQL, matched by name, and never by formatted SQL."""

from __future__ import annotations

import logging
import os
import sqlite3
from pathlib import Path

import pytest

from alignkit.core.errors import UserError
from alignkit.core.records import DocumentPage
from alignkit.data.metadata import MetadataConfig, Unmatched, join_metadata

POSTGRES = "ALIGNKIT_TEST_POSTGRES_URL"
TABLE = [("press.pdf", "Press", 7, "north"), ("LATHE.pdf", "Lathe", None, "north"), ("saw.pdf", "Säge", 9, "south")]
CSV = "filename,machine_name,machine_code\npress.pdf,Press,M-7\nLATHE.PDF,Lathe,M-8\n"


def pages(*documents: str) -> list[DocumentPage]:
    return [DocumentPage(document=name, page=number, text="Text.") for name in documents for number in (1, 2)]


def found(config: MetadataConfig, *documents: str) -> dict[str, dict[str, str]]:
    return {page.document: page.metadata for page in join_metadata(pages(*documents), config)[0]}


@pytest.fixture
def table(tmp_path: Path) -> MetadataConfig:
    file = tmp_path / "info_files.csv"
    file.write_text(CSV, encoding="utf-8")
    return MetadataConfig(path=str(file))


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "plant.db"
    with sqlite3.connect(file) as connection:
        connection.execute("create table machines (filename text, machine_name text, machine_code integer, plant text)")
        connection.executemany("insert into machines values (?, ?, ?, ?)", TABLE)
    connection.close()
    monkeypatch.setenv("ALIGNKIT_METADATA_URL", f"sqlite:///{file}")
    return file


QUERY = "select filename, machine_name, machine_code from machines"

# -- CSV ---------------------------------------------------------------------------------------------------------------


def test_every_page_gets_the_columns_of_its_document(table: MetadataConfig) -> None:
    joined, dropped = join_metadata(pages("manuals/press.json", "lathe.pdf"), table)
    assert [page.metadata["machine_code"] for page in joined] == ["M-7", "M-7", "M-8", "M-8"]
    assert joined[0].metadata == {"machine_name": "Press", "machine_code": "M-7"}
    assert not dropped


def test_the_whole_path_goes_before_the_name_and_the_name_before_its_stem(tmp_path: Path) -> None:
    file = tmp_path / "m.csv"
    file.write_text("filename,code\na/x.pdf,1\nx.pdf,2\nx.txt,3\nold/y.pdf,4\nnew/y.pdf,5\n", encoding="utf-8")
    config = MetadataConfig(path=str(file))
    codes = {name: metadata.get("code") for name, metadata in found(config, "a/x.pdf", "b/x.txt").items()}
    assert codes == {"a/x.pdf": "1", "b/x.txt": "3"}
    config.unmatched = Unmatched.drop
    _, dropped = join_metadata(pages("z/y.pdf", "x.json", "q.md"), config)
    assert [(each.row["document"], each.reason) for each in dropped] == [
        ("z/y.pdf", "metadata ambiguous"),
        ("x.json", "metadata ambiguous"),
        ("q.md", "no metadata"),
    ]


def test_documents_without_a_row_are_kept_and_counted_or_dropped(
    table: MetadataConfig, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "alignkit"):
        joined, dropped = join_metadata(pages("press.pdf", "mill.pdf"), table)
    assert len(joined) == 4 and not dropped
    assert "none for 1 of 2 documents: mill.pdf" in caplog.text
    table.unmatched = Unmatched.drop
    joined, dropped = join_metadata(pages("press.pdf", "mill.pdf"), table)
    assert [page.document for page in joined] == ["press.pdf", "press.pdf"]
    assert [(each.reason, each.row) for each in dropped] == [("no metadata", {"document": "mill.pdf", "pages": 2})]


def test_no_source_leaves_the_pages_as_they_are() -> None:
    given = pages("a")
    assert join_metadata(given, MetadataConfig()) == (given, [])


def test_excel_writes_semicolons_and_a_mark(tmp_path: Path) -> None:
    file = tmp_path / "m.csv"
    file.write_text('\ufefffilename;name\r\na.pdf;"Presse; groß"\r\n', encoding="utf-8", newline="")
    assert found(MetadataConfig(path=str(file)), "a.md") == {"a.md": {"name": "Presse; groß"}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"name,code\na,1\n", "no column 'filename', but name, code"),
        (b"filename,code\na.pdf,1\nb.pdf\n", r"m\.csv:3: has not as many cells"),
        (b"filename,code\na.pdf,1,2\n", r"m\.csv:2: has not as many cells"),
        (b"filename,code\na.pdf,\xe9\n", r"m\.csv:2: offset 20 is not UTF-8"),
        (b"filename,code\n", "has no row"),
        (b"", "no column 'filename', but none"),
        (b'filename,code\n"a.pdf,1\n', r"m\.csv:2: unexpected end"),
    ],
)
def test_a_broken_table_is_named_by_its_line(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "m.csv"
    file.write_bytes(content)
    with pytest.raises(UserError, match=message):
        join_metadata(pages("a.pdf"), MetadataConfig(path=str(file)))


# -- SQL ---------------------------------------------------------------------------------------------------------------


def test_a_query_is_bound_and_its_rows_are_joined(database: Path) -> None:
    config = MetadataConfig(query=f"{QUERY} where plant = :plant", parameters={"plant": "north"})
    assert found(config, "press.json", "lathe.json", "saw.json") == {
        "press.json": {"machine_name": "Press", "machine_code": "7"},
        "lathe.json": {"machine_name": "Lathe", "machine_code": ""},
        "saw.json": {},
    }


def test_a_parameter_is_never_sql(database: Path) -> None:
    injected = "north' or '1'='1'; drop table machines; --"
    config = MetadataConfig(query=f"{QUERY} where plant = :plant", parameters={"plant": injected})
    with pytest.raises(UserError, match="has no row"):
        found(config, "press.json")
    assert len(sqlite3.connect(database).execute("select * from machines").fetchall()) == 3


def test_the_database_is_only_read(database: Path) -> None:
    with pytest.raises(UserError, match="readonly"):
        found(MetadataConfig(query="delete from machines returning filename"), "press.json")


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("selec x", "syntax error"),
        (f"{QUERY} where plant = :plant", ":?plant"),
        (f"{QUERY}; {QUERY}", "one statement"),
        ("select machine_name from machines", "no column 'filename', but machine_name"),
    ],
)
def test_a_broken_query_is_an_error_of_the_user(database: Path, query: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        found(MetadataConfig(query=query), "press.json")


def test_the_address_comes_from_the_environment_and_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    config = MetadataConfig(query=QUERY, url_env="PLANT_URL")
    with pytest.raises(UserError, match="url_env=PLANT_URL: that environment variable is not set"):
        found(config, "a")
    for url in ("mysql://me:hunter2@host/db", "sqlite:///hunter2.db", "hunter2"):
        monkeypatch.setenv("PLANT_URL", url)
        with pytest.raises(UserError, match="PLANT_URL") as caught:
            found(config, "a")
        assert "hunter2" not in str(caught.value)


def test_an_unreachable_server_is_named_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("psycopg")
    monkeypatch.setenv("PLANT_URL", "postgresql://me:hunter2@127.0.0.1:1/db")
    with pytest.raises(UserError, match="PLANT_URL: the database cannot be reached") as caught:
        found(MetadataConfig(query=QUERY, url_env="PLANT_URL"), "a")
    assert "hunter2" not in str(caught.value)


@pytest.mark.skipif(POSTGRES not in os.environ, reason=f"{POSTGRES} names no server to test with")
def test_postgresql_is_asked_in_the_same_way() -> None:
    rows = "(values ('press.pdf', 'Press', 7, 'north'), ('saw.pdf', 'Säge', 9, 'south'))"
    query = f"select * from {rows} as machines (filename, machine_name, machine_code, plant)"
    config = MetadataConfig(query=f"{query} where plant = %(plant)s", parameters={"plant": "south"}, url_env=POSTGRES)
    assert found(config, "saw.md") == {"saw.md": {"machine_name": "Säge", "machine_code": "9", "plant": "south"}}
    config.parameters = {"plant": "south' or '1'='1"}
    with pytest.raises(UserError, match="has no row"):
        found(config, "saw.md")
    by_number = MetadataConfig(
        query=f"{query} where machine_code = %(code)s", parameters={"code": "7"}, url_env=POSTGRES
    )
    assert set(found(by_number, "press.md")["press.md"]) == {"machine_name", "machine_code", "plant"}
    with_percent = MetadataConfig(query=f"{query} where filename like '%ress.pdf'", url_env=POSTGRES)
    assert found(with_percent, "press.md")["press.md"]["machine_code"] == "7"
    with pytest.raises(UserError, match="read-only"):
        found(MetadataConfig(query="create table x (filename text)", url_env=POSTGRES), "a")


def test_contradicting_settings_are_refused() -> None:
    with pytest.raises(UserError, match="path and query"):
        MetadataConfig(path="a.csv", query="select 1").check()
    with pytest.raises(UserError, match="name the environment variable") as caught:
        MetadataConfig(query="select 1", url_env="postgresql://me:hunter2@host/db").check()
    assert "hunter2" not in str(caught.value)
