"""The index in a folder: its parts by hand, what is on disk, kills, and memory that does not grow with the passages."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("bm25s")

from alignkit.core.errors import UserError
from alignkit.core.retrieval_config import RetrievalConfig, SearchEngine, SearchMode
from alignkit.retrieval import ingest
from alignkit.retrieval.base import Passage
from alignkit.retrieval.dense import nearest
from alignkit.retrieval.embedded import EmbeddedIndex
from alignkit.retrieval.embedder import RetrievalEmbedder, open_embedder
from alignkit.retrieval.fusion import reciprocal_rank_fusion
from alignkit.retrieval.open import open_retriever
from alignkit.scoring.embedding import Vectors


class Table:
    """An embedder that looks vectors up; texts that it does not know are zeros."""

    dimensions = 2
    key = "table"

    def __init__(self, **vectors: tuple[float, float]) -> None:
        self.vectors = vectors

    def embed(self, texts: Sequence[str]) -> Vectors:
        return np.array([self.vectors.get(text, (0, 0)) for text in texts], np.float32).reshape(-1, 2)

    def too_long(self, texts: Sequence[str]) -> int:
        return sum(text.startswith("long") for text in texts)


def table(**vectors: tuple[float, float]) -> RetrievalEmbedder:
    embedder = Table(**vectors)
    return RetrievalEmbedder("table", embedder, embedder)


def ids(index: EmbeddedIndex, query: str, k: int = 9) -> list[str]:
    return [hit.passage.id for hit in index.search([query], k)[0]]


def test_fusion_adds_reciprocal_ranks() -> None:
    fused = reciprocal_rank_fusion([["a", "b", "c"], ["c", "b"]], rrf_k=60)
    assert fused == [("c", 1 / 63 + 1 / 61), ("b", 1 / 62 + 1 / 62), ("a", 1 / 61)]
    assert reciprocal_rank_fusion([["b"], ["a"]]) == [("a", 1 / 61), ("b", 1 / 61)]
    assert reciprocal_rank_fusion([[], []]) == []


@pytest.mark.parametrize(("rows", "k"), [(1, 1), (5, 9), (700, 10), (700, 699)])
def test_nearest_is_what_sorting_all_products_finds(monkeypatch: pytest.MonkeyPatch, rows: int, k: int) -> None:
    monkeypatch.setattr("alignkit.retrieval.dense._BLOCK_NUMBERS", 64 * 40)  # many blocks
    random = np.random.default_rng(rows + k)
    vectors = random.integers(-2, 3, (rows, 3)).astype(np.float32)  # many equal products
    queries = random.integers(-2, 3, (40, 3)).astype(np.float32)
    order, among = random.permutation(rows).astype(np.int64), random.random(rows) < 0.8
    found = nearest(queries, vectors.astype(np.float16), k, order, among)
    for query, hits in zip(queries, found, strict=True):
        products = vectors @ query
        expected = sorted((row for row in range(rows) if among[row]), key=lambda row: (-products[row], order[row]))
        assert hits == [(row, products[row]) for row in expected[:k]]


def test_vectors_are_compared_by_their_angle(tmp_path: Path) -> None:
    embedder = table(a=(3, 4), b=(0.1, 0), c=(-1, 0), query=(10, 0))
    index = EmbeddedIndex(tmp_path / "index", embedder, SearchMode.dense)
    index.index([Passage(id=id, text=id) for id in "abcd"])
    (hits,) = index.search(["query"], 9)
    assert [(hit.passage.id, hit.score) for hit in hits] == [("b", 1.0), ("a", 0.6), ("c", -1.0)]


@pytest.mark.parametrize("half", [False, True])
def test_places_of_vectors_are_used_again(tmp_path: Path, half: bool) -> None:
    embedder = table(**{f"t{number}": (number, 1) for number in range(9)}, query=(1, 0))
    folder = tmp_path / "index"
    index = EmbeddedIndex(folder, embedder, SearchMode.dense, half=half)
    index.index([Passage(id=f"t{number}", text=f"t{number}") for number in range(6)])
    assert (folder / "vectors.bin").stat().st_size == 6 * 2 * (2 if half else 4)
    index.delete(["t1", "t2", "t3"])
    index.add([Passage(id=f"t{number}", text=f"t{number}") for number in (7, 8)])
    assert (folder / "vectors.bin").stat().st_size == 6 * 2 * (2 if half else 4)
    assert ids(index, "query") == ["t8", "t7", "t5", "t4", "t0"]
    reader = EmbeddedIndex(folder, embedder, SearchMode.dense)
    assert ids(reader, "query", 1) == ["t8"]
    index.delete(["t8"])
    assert ids(reader, "query", 1) == ["t7"]  # which sees what another has changed


def test_bm25_is_read_from_disk_until_something_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "index"
    index = EmbeddedIndex(folder, mode=SearchMode.bm25)
    index.index([Passage(id="a", text="one"), Passage(id="b", text="two")])
    (saved,) = folder.glob("bm25-*")
    assert {file.suffix for file in folder.rglob("*.*")} == {".json", ".npy", ".sqlite"}  # nothing pickled
    with monkeypatch.context() as patched:
        patched.setattr(EmbeddedIndex, "_texts", lambda self: pytest.fail("was built again"))
        assert ids(EmbeddedIndex(folder, mode=SearchMode.bm25), "two") == ["b"]
    index.add([Passage(id="c", text="two")])
    assert ids(index, "two") == ["b", "c"]
    (renewed,) = folder.glob("bm25-*")
    assert renewed.name != saved.name


def test_a_folder_of_passages_without_words_can_be_searched(tmp_path: Path) -> None:
    index = EmbeddedIndex(tmp_path / "index", mode=SearchMode.bm25)
    index.index([Passage(id="a", text="?!")])
    assert index.search(["a", ""], 3) == [[], []]
    assert ids(EmbeddedIndex(tmp_path / "index", mode=SearchMode.bm25), "a") == []


def test_numbers_that_are_not_finite_and_texts_that_are_cut_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    embedder = table(bad=(float("nan"), 1))
    index = EmbeddedIndex(tmp_path / "index", embedder)
    with pytest.raises(UserError, match="passage p7: the embedder makes it numbers that are not finite"):
        index.add([Passage(id="p7", text="bad")])
    index.add([Passage(id="a", text="long"), Passage(id="b", text="longer")])
    assert "2 passages are too long for table: their ends are not embedded" in caplog.text


def test_a_damaged_folder_says_what_to_do(tmp_path: Path) -> None:
    folder = tmp_path / "index"
    embedder = table(a=(1, 0))
    EmbeddedIndex(folder, embedder).index([Passage(id="a", text="a")])
    (folder / "vectors.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"vectors are missing. Delete .*index again"):
        EmbeddedIndex(folder, embedder).search(["a"], 1)
    (folder / "passages.sqlite").write_bytes(b"not a database" * 99)
    with pytest.raises(UserError, match=r"file is not a database.*delete the folder and index again"):
        EmbeddedIndex(folder, embedder).search(["a"], 1)


def ingest_in_blocks(folder: Path, hang_at: int = 0) -> None:
    """Index 200 passages in blocks of 20, say how large each is before it is embedded, and hang at one of them."""
    embedder = open_embedder(RetrievalConfig(embedder="characters"))
    embed = embedder.passages.embed

    begun: list[int] = []

    def counted(texts: Sequence[str]) -> Vectors:
        begun.append(len(texts))
        print(len(texts), flush=True)
        if len(begun) == hang_at:
            time.sleep(600)
        return embed(texts)

    embedder.passages.embed = counted  # type: ignore[method-assign]
    passages = (Passage(id=f"p{number:03d}", text=f"passage number {number % 90}") for number in range(200))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ingest.blocks, "__defaults__", (20,))
        EmbeddedIndex(folder, embedder).index(passages)


def test_a_killed_ingest_goes_on_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = "import sys, pathlib, test_embedded_index as t; t.ingest_in_blocks(pathlib.Path(sys.argv[1]), 4)"
    command = [sys.executable, "-c", program, str(tmp_path / "killed")]
    process = subprocess.Popen(command, cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(4):  # the first three blocks are in the index now, and the fourth is under way
        process.stdout.readline()
    process.kill()
    process.wait()
    ingest_in_blocks(tmp_path / "killed")
    assert sum(map(int, capsys.readouterr().out.split())) == 200 - 3 * 20
    ingest_in_blocks(tmp_path / "whole")
    embedder = open_embedder(RetrievalConfig(embedder="characters"))
    killed, whole = (EmbeddedIndex(tmp_path / name, embedder) for name in ("killed", "whole"))
    queries = ["passage number 7", "number 89", "nothing"]
    assert len(killed) == 200
    assert killed.search(queries, 30) == whole.search(queries, 30)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"path": None}, "needs a folder"),
        ({"engine": SearchEngine.postgres}, "needs the URL of its server"),
        ({"engine": SearchEngine.postgres, "url": "http://host"}, "it begins with postgresql://"),
        ({"engine": SearchEngine.elasticsearch, "url": "https://me:secret@host:1"}, "must hold no password"),
        ({"engine": SearchEngine.elasticsearch, "url": "http://far.org:1", "api_key_env": "K"}, "in the clear"),
        ({"engine": SearchEngine.elasticsearch, "url": "https://a:1", "api_key_env": "NOT_SET"}, "NOT_SET.*not set"),
        ({"engine": SearchEngine.elasticsearch, "url": "https://a:1", "api_key_env": "a b"}, "NAME of an env"),
        ({"engine": SearchEngine.elasticsearch, "url": "http://", "mode": SearchMode.bm25}, "https://host:9200"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(settings: dict[str, object], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        open_retriever(RetrievalConfig(**settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "postgresql://me@127.0.0.1:9/db"])
def test_a_server_that_does_not_answer_is_named(url: str) -> None:
    engine = SearchEngine.elasticsearch if url.startswith("http") else SearchEngine.postgres
    with pytest.raises(UserError, match=r"retrieval\.url.*answer.*the same command then continues"):
        open_retriever(RetrievalConfig(engine=engine, url=url, mode=SearchMode.bm25))
