"""The commands `index` and `search`: from documents to an index that follows them, and to passages for a query."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("bm25s")

from elasticsearch_server import elasticsearch_contract

from alignkit.core.app import run_command
from alignkit.models.loading import embedded_model_dir
from alignkit.retrieval.embedded import EmbeddedIndex
from alignkit.scoring.embedding import CharacterEmbedder, Vectors

FLAT = "# Flat\n\nWelcome to the house.\n\n## Deposit\n\nThe deposit is kept for three months.\n"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a folder of documents."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/flat.md").write_text(FLAT, encoding="utf-8")
    (tmp_path / "docs/town.txt").write_text("Padera has a mayor.\f市长是安娜。", encoding="utf-8")
    (tmp_path / "docs/scan.txt").write_text(" ", encoding="utf-8")
    return tmp_path


def rows(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def manifest(name: str = "index") -> dict[str, Any]:
    content: dict[str, Any] = json.loads(Path(f"runs/r/{name}/manifest.json").read_text(encoding="utf-8"))
    return content


def held() -> list[str]:
    with sqlite3.connect("runs/r/index/index/passages.sqlite") as database:
        return [id for (id,) in database.execute("SELECT id FROM passages ORDER BY id")]


def index(*overrides: str) -> int:
    return run_command("index", ["run=r", *overrides])


def test_documents_become_passages_that_a_query_finds(capsys: pytest.CaptureFixture[str]) -> None:
    built = ["documents=docs", "chunk.size=60", "chunk.overlap=0", "retrieval.embedder=characters"]
    assert index(*built) == 0
    assert rows("runs/r/index/passages.jsonl")[1] == {
        "id": "flat.md#1.2",
        "text": "## Deposit\n\nThe deposit is kept for three months.",
        "title": "Flat > Deposit",
        "document": "flat.md",
        "page": 1,
    }
    assert manifest()["metrics"] == {"documents": 2, "pages": 3, "passages": 4}
    assert manifest()["dropped"] == {"no text": 1}
    query = "query=how long is the deposit kept"
    assert run_command("search", ["run=r", query, "retrieval.embedder=characters"]) == 0
    assert "1. 0.0328  [flat.md, page 1]  Flat > Deposit: ## Deposit The deposit is kept" in capsys.readouterr().out
    (found,) = rows("runs/r/search/found.jsonl")
    assert (found["query"], found["found"][0]["id"]) == ("how long is the deposit kept", "flat.md#1.2")
    assert index(*built) == 0
    assert "index is up to date" in capsys.readouterr().out


def test_a_file_of_queries_and_a_choice_of_documents() -> None:
    assert index("documents=docs") == 0
    Path("q.jsonl").write_text('{"id": "x", "question": "mayor deposit"}\n{"query": "市长"}\n', encoding="utf-8")
    search = ["run=r", "queries.path=q.jsonl", "retrieval.k=2"]
    assert run_command("search", search) == 0
    first, second = rows("runs/r/search/found.jsonl")
    assert (first["id"], {hit["document"] for hit in first["found"]}) == ("x", {"flat.md", "town.txt"})
    assert (second["id"], [hit["page"] for hit in second["found"]]) == ("queries-00002", [2])
    assert run_command("search", [*search, "within=town.txt"]) == 0
    assert [hit["id"] for hit in rows("runs/r/search/found.jsonl")[0]["found"]] == ["town.txt#1.1"]


def test_the_index_follows_the_documents_and_only_embeds_what_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    embedded: list[str] = []
    embed = CharacterEmbedder.embed

    def noting(self: CharacterEmbedder, texts: Sequence[str]) -> Vectors:
        embedded.extend(texts)
        return embed(self, texts)

    monkeypatch.setattr(CharacterEmbedder, "embed", noting)
    build = ["documents=docs", "retrieval.embedder=characters"]
    assert index(*build) == 0
    assert held() == ["flat.md#1.1", "town.txt#1.1", "town.txt#2.1"]
    embedded.clear()
    Path("docs/flat.md").unlink()
    Path("docs/new.md").write_text("New words.", encoding="utf-8")
    assert index(*build) == 0
    assert held() == ["new.md#1.1", "town.txt#1.1", "town.txt#2.1"]
    assert embedded == ["New words."]


def test_passages_are_added_and_deleted() -> None:
    Path("a.jsonl").write_text('{"id": "a", "text": "one"}\n{"id": "b", "text": "two"}\n', encoding="utf-8")
    Path("c.jsonl").write_text('{"id": "c.md#1.1", "text": "three", "title": "T"}\n', encoding="utf-8")
    assert index("passages.path=a.jsonl") == 0
    assert index("passages.path=c.jsonl", "action=add") == 0
    assert held() == ["a", "b", "c.md#1.1"]
    assert index("action=delete", 'ids=["a","c.md#1.1"]') == 0
    assert held() == ["b"]
    assert manifest()["metrics"] == {"passages": 1}


def test_a_run_that_fails_leaves_the_index_as_it_was_and_the_next_one_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("alignkit.retrieval.ingest.blocks.__defaults__", (1,))
    assert index("documents=docs") == 0
    Path("docs/town.txt").write_text("Other words.\fAnd more.\fThe end.", encoding="utf-8")
    add, calls = EmbeddedIndex._add, [0]

    def failing(self: EmbeddedIndex, block: Any) -> None:
        calls[0] += 1
        if calls[0] == 4:
            raise KeyboardInterrupt
        add(self, block)

    monkeypatch.setattr(EmbeddedIndex, "_add", failing)
    assert index("documents=docs") == 130
    assert held() == ["flat.md#1.1", "town.txt#1.1", "town.txt#2.1"]
    with sqlite3.connect("runs/r/index/unfinished/index/passages.sqlite") as database:
        assert database.execute("SELECT text FROM passages WHERE id = 'town.txt#2.1'").fetchone() == ("And more.",)
    assert run_command("search", ["run=r", "query=words"]) == 2
    assert "is failed, not complete" in capsys.readouterr().err
    assert index("documents=docs") == 0
    assert held() == ["flat.md#1.1", "town.txt#1.1", "town.txt#2.1", "town.txt#3.1"]


def test_passages_of_so_many_tokens() -> None:
    assert (
        index("documents=docs/flat.md", f"chunk.tokenizer={embedded_model_dir()}", "chunk.size=30", "chunk.overlap=0")
        == 0
    )
    assert [row["title"] for row in rows("runs/r/index/passages.jsonl")] == ["Flat", "Flat > Deposit"]


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        ([], "say what to index: documents="),
        (["documents=docs", "passages.path=a.jsonl"], "say what to index"),
        (["documents=docs", "ids=a"], "say what to index"),
        (["action=delete"], "action=delete takes 'ids=["),
        (["documents=nowhere"], "documents=nowhere: no such file"),
        (["documents=docs", "chunk.size=10", "chunk.overlap=10"], "chunk.overlap=10: must not be negative, and below"),
        (
            ["documents=docs", "retrieval.path=elsewhere"],
            "retrieval.path=elsewhere: index writes to runs/r/index/index",
        ),
        (["documents=docs", "retrieval.mode=dense"], "retrieval.mode=dense needs vectors: set retrieval.embedder"),
        (["documents=docs", "retrieval.k=0"], "retrieval.k=0: must be at least 1"),
        (["documents=docs", "retrieval=postgres", "retrieval.url=postgresql://a:b@c/d"], "a key must not stand"),
        (["passages.path=bad.jsonl"], "bad.jsonl:2: "),
        (["passages.path=twice.jsonl"], "two passages have the id 'a'"),
    ],
)
def test_mistakes_are_told(overrides: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.jsonl").write_text('{"id": "a", "text": "one"}\n', encoding="utf-8")
    Path("bad.jsonl").write_text('{"id": "a", "text": "one"}\n{"id": "b"}\n', encoding="utf-8")
    Path("twice.jsonl").write_text('{"id": "a", "text": "one"}\n' * 2, encoding="utf-8")
    assert index(*overrides) == 2
    assert problem in capsys.readouterr().err


def test_search_needs_one_sort_of_query_and_an_index(capsys: pytest.CaptureFixture[str]) -> None:
    for overrides, problem in [
        (["retrieval.path=null"], "say what to look for"),
        (["query=a"], "retrieval.path=runs/r/index/index: no such file or folder. Run the stage that writes it"),
        (["queries.path=q.jsonl", "retrieval.path=docs"], "q.jsonl:1: no query"),
        (["query=a", "retrieval.path=docs"], "docs: there is no index"),
    ]:
        Path("q.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
        assert run_command("search", ["run=r", *overrides]) == 2
        assert problem in capsys.readouterr().err


def test_a_server_holds_what_the_commands_send_it(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("elasticsearch")
    with elasticsearch_contract() as contract:
        there = ["retrieval=elasticsearch", f"retrieval.url={contract.url}"]
        assert index("documents=docs", *there) == 0
        assert not Path("runs/r/index/index").exists()
        assert index("documents=docs", *there) == 0  # never up to date without asking the server
        assert run_command("search", ["run=r", "query=mayor", *there]) == 0
        assert contract.requests.count("PUT /_bulk") == 1
    assert "[town.txt, page 1]" in capsys.readouterr().out
    assert index("documents=docs", *there) == 2
    error = capsys.readouterr().err
    assert "no answer from Elasticsearch" in error and "Traceback" not in error
