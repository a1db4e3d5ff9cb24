"""One suite for all engines: in a folder, in a real PostgreSQL, and by the official client against a contract server.

Elasticsearch itself is asked when ALIGNKIT_ES_URL is set; the contract server is what stands in for it otherwise.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest

pytest.importorskip("bm25s")

from elasticsearch_server import elasticsearch_contract

from alignkit.core.errors import UserError
from alignkit.core.retrieval_config import RetrievalConfig, SearchEngine, SearchMode
from alignkit.retrieval.base import Found, Passage
from alignkit.retrieval.bm25 import BM25Index
from alignkit.retrieval.open import FilteringRetriever, open_retriever
from alignkit.scoring.embedding import CharacterEmbedder

pytestmark = pytest.mark.xdist_group("retrievers")  # one PostgreSQL server is enough

Open = Callable[..., FilteringRetriever]

TEXTS = {
    "a": "The mayor of Padera is Ana Brell.",
    "b": "Padera lies on the river Sool. The river floods in spring.",
    "c": "帕德拉的市长是安娜。",
    "d": "",
    "e": "Every spring the council meets the mayor.",
}
PASSAGES = [Passage(id=id, text=text, document=f"{id}.md", page=1) for id, text in TEXTS.items()]


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """The URL of a PostgreSQL server of our own; not in pytest's folder, which the server's user may not enter."""
    pgserver = pytest.importorskip("pgserver")
    pytest.importorskip("psycopg")
    with TemporaryDirectory() as folder:
        server = pgserver.get_server(folder)
        yield server.get_uri().replace("postgres:@", "postgres@")
        server.cleanup()


@pytest.fixture(scope="module")
def elasticsearch() -> Iterator[str]:
    """The URL of the contract server, or of the one that ALIGNKIT_ES_URL names."""
    pytest.importorskip("elasticsearch")
    if url := os.environ.get("ALIGNKIT_ES_URL"):
        yield url
        return
    with elasticsearch_contract() as contract:
        yield contract.url


@pytest.fixture(params=["embedded", "postgres", "elasticsearch"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    """Opens the index of one engine, any number of times; it is empty at first."""
    engine, _, graph = request.param.partition("_")
    config = RetrievalConfig(
        engine=SearchEngine[engine],
        path=str(tmp_path / "index"),
        url=None if engine == "embedded" else request.getfixturevalue(engine),
        embedder="characters",
        name=f"test-{uuid.uuid4().hex[:12]}",
        approximate=bool(graph),
    )
    retrievers: list[FilteringRetriever] = []

    def open_it(mode: str | None, **settings: object) -> FilteringRetriever:
        fields = {**vars(config), "mode": SearchMode[mode] if mode else None, **settings}
        retrievers.append(open_retriever(RetrievalConfig(**fields)))
        return retrievers[-1]

    yield open_it
    for retriever in retrievers:
        retriever.close()


def ids(hits: list[Found]) -> list[str]:
    return [hit.passage.id for hit in hits]


def test_words_find_what_bm25_finds_with_its_scores(opened: Open) -> None:
    retriever = opened("bm25")
    retriever.index(PASSAGES)
    queries = ["the mayor of Padera", "river river spring", "市长是谁", "nothing like that", ""]
    expected = BM25Index(list(TEXTS.values())).search(queries, 10)
    found = retriever.search(queries, 10)
    names = list(TEXTS)
    for hits, known in zip(found, expected, strict=True):
        assert ids(hits) == [names[hit.index] for hit in known]
        # a live Elasticsearch keeps a text's length in one byte
        tolerance = 0.05 if "ALIGNKIT_ES_URL" in os.environ else 2e-5
        assert [hit.score for hit in hits] == pytest.approx([hit.score for hit in known], rel=tolerance, abs=1e-5)
    assert ids(found[2]) == ["c"] and found[3] == found[4] == []
    assert found[0][0].passage == PASSAGES[0]


def test_vectors_find_by_cosine(opened: Open) -> None:
    retriever = opened("dense")
    retriever.index(PASSAGES)
    embedder = CharacterEmbedder([])
    cosines = embedder.embed(list(TEXTS.values())) @ embedder.embed(["who is mayor of padera"])[0]
    expected = sorted((-round(float(cosine), 6), id) for id, cosine in zip(TEXTS, cosines, strict=True) if id != "d")
    (hits,) = retriever.search(["who is mayor of padera"], 10)
    assert ids(hits) == [id for _, id in expected]  # d, which is empty, is similar to nothing
    assert [hit.score for hit in hits] == pytest.approx([-score for score, _ in expected], abs=2e-6)
    assert retriever.search([""], 3) == [[]]


def test_both_are_fused_by_reciprocal_ranks(opened: Open) -> None:
    retriever = opened("hybrid")
    retriever.index(PASSAGES)
    query = "the mayor of Padera"
    by_words, by_vectors = (ids(opened(mode).search([query], 10)[0]) for mode in ("bm25", "dense"))
    expected = {
        id: sum(1 / (60 + 1 + ranking.index(id)) for ranking in (by_words, by_vectors) if id in ranking)
        for id in {*by_words, *by_vectors}
    }
    (hits,) = retriever.search([query], 10)
    assert {hit.passage.id: hit.score for hit in hits} == pytest.approx(expected)
    assert ids(hits) == sorted(expected, key=lambda id: (-expected[id], id))
    assert ids(retriever.search([query], 2)[0]) == ids(hits)[:2]
    assert opened(None).search([query], 10) == [hits]  # what is chosen where there is an embedder


@pytest.mark.parametrize("opened", ["postgres_graph", "elasticsearch_graph"], indirect=True)
def test_a_graph_finds_the_same_neighbours(opened: Open) -> None:
    graph, exact = opened("dense"), opened("dense", approximate=False)
    graph.index(PASSAGES)
    found = graph.search(["who is mayor of padera", "spring", ""], 2)
    assert found == exact.search(["who is mayor of padera", "spring", ""], 2)
    assert [len(hits) for hits in found] == [2, 2, 0]  # `exact` was opened before there was an index
    assert ids(graph.search(["mayor"], 9, documents=["b.md"])[0]) == ["b"]


@pytest.mark.parametrize("mode", ["bm25", "dense", "hybrid"])
def test_equal_passages_stand_by_id_also_at_the_cut(opened: Open, mode: str) -> None:
    retriever = opened(mode)
    names = [f"n{number:02d}" for number in range(12)]
    retriever.index(Passage(id=id, text="the same words") for id in reversed(names))
    assert ids(retriever.search(["the same words"], 5)[0]) == names[:5]
    assert ids(retriever.search(["the same words"], 99)[0]) == names


@pytest.mark.parametrize("mode", ["bm25", "hybrid"])
def test_what_is_added_is_found_and_what_is_deleted_is_not(opened: Open, mode: str) -> None:
    retriever = opened(mode)
    retriever.index(PASSAGES[:2])
    retriever.add([Passage(id="a", text="Nobody is mayor.", title="Padera"), *PASSAGES[2:]])
    assert len(retriever) == 5
    best = retriever.search(["nobody"], 1)[0][0].passage
    assert (best.text, best.title, best.document, best.page) == ("Nobody is mayor.", "Padera", None, None)
    assert "a" not in ids(opened("bm25").search(["Brell"], 9)[0])  # its old text is gone
    assert ids(opened("bm25").search(["Padera"], 9)[0]) == ["a", "b"]  # titles count
    retriever.delete(["a", "b", "not there"])
    assert len(retriever) == 3
    assert {"a", "b"}.isdisjoint(ids(retriever.search(["Padera mayor river nobody"], 9)[0]))
    retriever.index(PASSAGES[:1])
    assert len(retriever) == 1 and ids(retriever.search(["mayor"], 9)[0]) == ["a"]
    retriever.delete(["a"])
    assert retriever.search(["mayor"], 9) == [[]]


def test_of_one_call_the_last_passage_of_an_id_is_added(opened: Open) -> None:
    retriever = opened("bm25")
    retriever.add([Passage(id="x", text="old"), Passage(id="x", text="new")])
    assert (len(retriever), ids(retriever.search(["old"], 3)[0]), ids(retriever.search(["new"], 3)[0])) == (
        1,
        [],
        ["x"],
    )


def test_two_passages_with_one_id_are_refused(opened: Open) -> None:
    with pytest.raises(UserError, match="two passages have the id 'x'"):
        opened("bm25").index([Passage(id="x", text="one"), Passage(id="x", text="two")])


@pytest.mark.parametrize("mode", ["bm25", "dense", "hybrid"])
def test_a_search_can_be_held_to_some_documents(opened: Open, mode: str) -> None:
    retriever = opened(mode)
    retriever.index(PASSAGES)
    assert set(ids(retriever.search(["mayor Padera spring"], 9, documents=["b.md", "e.md"])[0])) == {"b", "e"}
    assert retriever.search(["mayor"], 9, documents=[]) == [[]]


def test_it_is_there_when_it_is_opened_again(opened: Open) -> None:
    first = opened("hybrid")
    first.index(PASSAGES)
    expected = first.search(["mayor of Padera", "市长"], 3)
    first.close()
    again = opened("hybrid")
    assert len(again) == 5
    assert again.search(["mayor of Padera", "市长"], 3) == expected


def test_what_is_held_already_is_not_embedded_again(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    embedded: list[str] = []
    embed = CharacterEmbedder.embed

    def counting(self: CharacterEmbedder, texts: list[str]) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
        embedded.extend(texts)
        return embed(self, texts)

    monkeypatch.setattr(CharacterEmbedder, "embed", counting)
    opened("hybrid").index(PASSAGES[:3])
    assert len(embedded) == 3
    changed = Passage(id="a", text="changed")
    opened("hybrid").index([changed, *PASSAGES[1:4]])
    assert embedded[3:] == ["changed", ""]
    assert len(opened("bm25")) == 4
    assert [ids(hits) for hits in opened("hybrid").search(["river Sool", "changed"], 1)] == [["b"], ["a"]]


def test_another_embedder_is_refused(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    opened("hybrid").index(PASSAGES)
    with pytest.raises(UserError, match=r"holds vectors.*set retrieval\.embedder"):
        opened("bm25").add([Passage(id="z", text="z")])
    monkeypatch.setattr(CharacterEmbedder, "key", "f" * 64)
    with pytest.raises(UserError, match=r"was built by the embedder characters .* and this is characters \(ffffffff\)"):
        opened("hybrid").search(["mayor"], 1)
    assert ids(opened("bm25").search(["mayor"], 1)[0])  # which needs no vectors


def test_an_index_without_vectors_has_none_to_search(opened: Open) -> None:
    opened("bm25").index(PASSAGES)
    with pytest.raises(UserError, match="built without vectors"):
        opened("dense").search(["mayor"], 1)


def test_no_index_is_an_error_that_says_what_to_do(opened: Open) -> None:
    retriever = opened("bm25")
    for use in (lambda: len(retriever), lambda: retriever.search(["a"], 1), lambda: retriever.delete(["a"])):
        with pytest.raises(UserError, match=r"no index.*python -m alignkit\.index"):
            use()


def test_no_queries_no_hits_and_nothing_indexed(opened: Open) -> None:
    retriever = opened("hybrid")
    retriever.index([])
    assert (len(retriever), retriever.search([], 3), retriever.search(["a"], 3)) == (0, [], [[]])
    retriever.index(PASSAGES)
    assert retriever.search(["mayor"], 0) == [[]]
