"""The official Elasticsearch client against a server with faults: too busy, gone in the middle, refusing."""

from __future__ import annotations

from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import Any

import pytest

pytest.importorskip("bm25s")
pytest.importorskip("elasticsearch")

from elasticsearch_server import Contract, elasticsearch_contract

from alignkit.core.errors import UserError
from alignkit.core.retrieval_config import SearchMode
from alignkit.retrieval.base import Passage
from alignkit.retrieval.elasticsearch import ElasticsearchIndex

PASSAGES = [Passage(id=f"p{number}", text=f"number {number}") for number in range(8)]


@pytest.fixture
def contract() -> Iterator[Contract]:
    with elasticsearch_contract() as running:
        yield running


def opened(contract: Contract, **settings: Any) -> ElasticsearchIndex:
    return ElasticsearchIndex(contract.url, "test", mode=SearchMode.bm25, retry_seconds=0.01, **settings)


def test_what_the_server_is_too_busy_for_is_sent_again_alone(contract: Contract) -> None:
    contract.busy = {"p3": 2, "p5": 1}
    index = opened(contract)
    index.index(PASSAGES)
    assert len(index) == 8
    assert contract.requests.count("PUT /_bulk") == 3  # all, then p3 and p5, then p3


def test_what_is_refused_is_named_and_the_rest_is_there(contract: Contract) -> None:
    index = opened(contract, retries=1)
    contract.busy = {"p3": 9}
    with pytest.raises(UserError, match=r"refused 2 passages, the first because of x+: id is too long"):
        index.index([Passage(id="x" * 600, text="x"), *PASSAGES])
    contract.busy = {}
    before = contract.requests.count("PUT /_bulk")
    index.index(PASSAGES)
    assert len(index) == 8 and contract.requests.count("PUT /_bulk") == before + 1  # which sends p3


def test_a_server_that_goes_away_is_named_and_the_same_call_continues(contract: Contract) -> None:
    contract.documents_left = 5
    with pytest.raises(UserError, match=r"no answer from Elasticsearch.*the same command then continues"):
        opened(contract).index(PASSAGES)
    contract.documents_left = 3  # as many as are missing: were one sent again, the server would go away again
    index = opened(contract)
    index.index(PASSAGES)
    assert len(index) == 8
    assert [hit.passage.id for hit in index.search(["number 6"], 1)[0]] == ["p6"]


def test_more_ids_than_a_page_are_compared_when_an_index_is_built_again(contract: Contract) -> None:
    index = opened(contract)
    index.index(Passage(id=f"n{number:04d}", text="same") for number in range(2100))
    index.index(Passage(id=f"n{number:04d}", text="same") for number in range(0, 2100, 3))
    assert len(index) == 700


def test_settings_come_from_a_template_that_can_be_overruled(contract: Contract) -> None:
    contract.templates["mine"] = {
        "index_patterns": ["test"],
        "priority": 500,
        "template": {
            "settings": {"index": {"similarity": {"default": {"type": "BM25", "k1": 0.9, "b": 0.4}}}},
            "mappings": {"properties": {name: {"type": "keyword"} for name in ("id", "title", "text", "digest")}},
        },
    }
    contract.templates["mine"]["template"]["mappings"]["properties"]["tokens"] = {
        "type": "text",
        "analyzer": "whitespace",
    }
    opened(contract).index(PASSAGES)
    assert contract.indices["test"].settings["index"]["similarity"]["default"]["k1"] == 0.9
    assert contract.templates["test-template"]["index_patterns"] == ["test"]


def test_a_server_that_is_not_elasticsearch_is_told_apart() -> None:
    class Other(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Other)
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    with pytest.raises(UserError, match="this is no Elasticsearch server"):
        ElasticsearchIndex(f"http://127.0.0.1:{server.server_address[1]}", "test", mode=SearchMode.bm25)
    server.shutdown()
    server.server_close()
