"""A loopback server that keeps the part of Elasticsearch's contract that alignkit relies on; it is not Elasticsearch.

Written after the reference of Elasticsearch 9: mappings and templates are kept and enforced, a document is searchable
only after a refresh but can be fetched at once, bulk requests may fail in part, and whatever alignkit does not send is
refused rather than guessed. BM25 is computed with exact text lengths, where Lucene keeps them in one byte.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from math import log
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np

_MEDIA = "application/vnd.elasticsearch+json; compatible-with=9"
_COSINE = "(1.0 + cosineSimilarity(params.query, 'vector')) / 2"


class ContractError(Exception):
    """An answer that is no success."""

    def __init__(self, status: int, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.status, self.kind, self.reason = status, kind, reason

    def body(self) -> dict[str, Any]:
        return {"error": {"type": self.kind, "reason": self.reason}, "status": self.status}


@dataclass
class Index:
    """An index: what it was made with, what it holds, and what a search sees of it."""

    settings: dict[str, Any]
    mappings: dict[str, Any]
    documents: dict[str, dict[str, Any]] = field(default_factory=dict)
    visible: dict[str, dict[str, Any]] = field(default_factory=dict)

    def put(self, id: str, source: dict[str, Any]) -> None:
        """Keep a document. Raises where it does not fit the mapping."""
        properties = self.mappings["properties"]
        for name, value in source.items():
            if name not in properties:
                raise ContractError(400, "strict_dynamic_mapping_exception", f"[{name}] is not allowed")
            if properties[name]["type"] == "dense_vector" and len(value) != properties[name]["dims"]:
                raise ContractError(400, "document_parsing_exception", f"[{name}] has another number of dimensions")
        if len(id.encode()) > 512:
            raise ContractError(400, "illegal_argument_exception", "id is too long, must be no longer than 512 bytes")
        self.documents[id] = source

    def scores(self, query: dict[str, Any]) -> dict[str, float]:
        """The documents that a query finds, with their scores."""
        ((kind, body),) = query.items()
        if kind == "bool":
            assert body.keys() <= {"must", "filter"}
            found = dict.fromkeys(self.visible, 0.0)
            for inner in body.get("must", []):
                scores = self.scores(inner)
                found = {id: score + scores[id] for id, score in found.items() if id in scores}
            return self._filtered(found, body.get("filter", []))
        if kind == "terms":
            ((name, values),) = body.items()
            assert self.mappings["properties"][name]["type"] == "keyword", "terms are for keyword fields"
            return {id: 1.0 for id, source in self.visible.items() if source.get(name) in values}
        if kind == "exists":
            return {id: 1.0 for id, source in self.visible.items() if body["field"] in source}
        if kind == "ids":
            return {id: 1.0 for id in body["values"] if id in self.visible}
        if kind == "match":
            ((name, wanted),) = body.items()
            assert self.mappings["properties"][name] == {"type": "text", "analyzer": "whitespace"}
            return self._bm25(name, wanted["query"].split())
        if kind == "script_score":
            assert body["script"]["source"] == _COSINE
            return self._cosines(self.scores(body["query"]), body["script"]["params"]["query"])
        if kind == "knn":
            assert self.mappings["properties"][body["field"]]["index"], "the field has no graph"
            assert body["num_candidates"] >= body["k"]
            scores = self._cosines(
                self._filtered(dict.fromkeys(self.visible, 0.0), body["filter"]), body["query_vector"]
            )
            return dict(sorted(scores.items(), key=lambda entry: -entry[1])[: body["k"]])
        raise ContractError(400, "parsing_exception", f"unknown query [{kind}]")

    def _filtered(self, found: dict[str, float], filters: list[dict[str, Any]]) -> dict[str, float]:
        for inner in filters:
            allowed = self.scores(inner)
            found = {id: score for id, score in found.items() if id in allowed}
        return found

    def _cosines(self, among: dict[str, float], query: list[float]) -> dict[str, float]:
        wanted = np.asarray(query)
        found = {}
        for id in among:
            vector = np.asarray(self.visible[id]["vector"])
            cosine = wanted @ vector / (np.linalg.norm(wanted) * np.linalg.norm(vector))
            found[id] = float(np.float32((1 + np.round(cosine, 6)) / 2))
        return found

    def _bm25(self, name: str, wanted: list[str]) -> dict[str, float]:
        similarity = self.settings["index"]["similarity"]["default"]
        assert similarity["type"] == "BM25"
        counts = {id: Counter(source[name].split()) for id, source in self.visible.items()}
        average = sum(count.total() for count in counts.values()) / max(1, len(counts))
        found: dict[str, float] = {}
        for token in wanted:
            holders = {id: count for id, count in counts.items() if token in count}
            idf = log(1 + (len(counts) - len(holders) + 0.5) / (len(holders) + 0.5))
            for id, count in holders.items():
                length = 1 - similarity["b"] + similarity["b"] * count.total() / average
                weight = idf * count[token] / (count[token] + similarity["k1"] * length)
                found[id] = found.get(id, 0.0) + weight
        return {id: float(np.float32(score)) for id, score in found.items()}

    def search(self, body: dict[str, Any]) -> dict[str, Any]:
        """The answer to a search."""
        known = {"query", "size", "sort", "_source", "track_scores", "track_total_hits", "search_after"}
        assert body.keys() <= known, f"this server does not know {body.keys() - known}"
        scores = self.scores(body["query"]) if "query" in body else dict.fromkeys(self.visible, 1.0)
        by_score, by_id = body["sort"] == [{"_score": "desc"}, {"id": "asc"}], body["sort"] == [{"id": "asc"}]
        assert by_score or by_id
        ordered = sorted(scores, key=lambda id: (-scores[id] if by_score else 0.0, id))
        if "search_after" in body:
            (after,) = body["search_after"]
            ordered = [id for id in ordered if id > after]
        hits = [
            {
                "_id": id,
                "_score": scores[id] if body.get("track_scores") else None,
                "sort": [scores[id], id] if by_score else [id],
            }
            for id in ordered[: body["size"]]
        ]
        return {"hits": {"hits": hits}, "timed_out": False, "status": 200}


@dataclass
class Contract:
    """The state of the server, and the faults to commit."""

    indices: dict[str, Index] = field(default_factory=dict)
    templates: dict[str, dict[str, Any]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    busy: dict[str, int] = field(default_factory=dict)
    """How often a document is answered with 429 before it is taken."""
    documents_left: int | None = None
    """How many more documents are taken before the server stops answering; none: any number."""
    url: str = ""

    def answer(self, method: str, path: list[str], query: dict[str, list[str]], content: bytes) -> Any:
        """The body of the answer; None for an empty one. Raises `ContractError`."""
        action = "/".join(part if part.startswith("_") else "*" for part in path)
        lines = [json.loads(line) for line in content.splitlines()] if action in ("_bulk", "*/_msearch") else []
        body = json.loads(content) if content and not lines else {}
        if method == "PUT" and action == "_index_template/*":
            self.templates[path[1]] = body
            return {"acknowledged": True}
        if method == "PUT" and action == "_bulk":
            return self._bulk(lines)
        name = path[0]
        if method == "PUT" and action == "*":
            return self._create(name)
        if name not in self.indices:
            raise ContractError(404, "index_not_found_exception", f"no such index [{name}]")
        index = self.indices[name]
        if method == "HEAD" and action == "*":
            return None
        if method == "GET" and action == "*/_mapping":
            return {name: {"mappings": index.mappings}}
        if method == "POST" and action == "*/_refresh":
            index.visible = dict(index.documents)
            return {}
        if method == "POST" and action == "*/_count":
            return {"count": len(index.visible)}
        if method == "POST" and action == "*/_mget":
            fields = query["_source_includes"][0].split(",")
            return {"docs": [self._get(index, id, fields) for id in body["ids"]]}
        if method == "POST" and action == "*/_search":
            return index.search(body)
        if method == "POST" and action == "*/_msearch":
            return {"responses": [index.search(each) for each in lines[1::2]]}
        if method == "POST" and action == "*/_delete_by_query":
            for id in index.scores(body["query"]):
                index.documents.pop(id, None)
            if query.get("refresh") == ["true"]:
                index.visible = dict(index.documents)
            return {"failures": []}
        raise ContractError(405, "contract", f"{method} {action} is not part of this server")

    def _create(self, name: str) -> Any:
        if name in self.indices:
            raise ContractError(400, "resource_already_exists_exception", f"index [{name}] already exists")
        fitting = [each for each in self.templates.values() if name in each["index_patterns"]]
        template = max(fitting, key=lambda each: each["priority"])["template"]
        self.indices[name] = Index(template["settings"], template["mappings"])
        return {"acknowledged": True, "index": name}

    def _get(self, index: Index, id: str, fields: list[str]) -> Any:
        if id not in index.documents:
            return {"_id": id, "found": False}
        source = index.documents[id]
        return {"_id": id, "found": True, "_source": {key: source[key] for key in fields if key in source}}

    def _bulk(self, lines: list[dict[str, Any]]) -> Any:
        items = []
        for action, source in zip(lines[::2], lines[1::2], strict=True):
            target = action["index"]
            outcome: dict[str, Any] = {"_id": target["_id"], "status": 201}
            try:
                if self.documents_left is not None:
                    self.documents_left -= 1
                    if self.documents_left < 0:
                        raise ConnectionAbortedError
                if self.busy.get(target["_id"], 0) > 0:
                    self.busy[target["_id"]] -= 1
                    raise ContractError(429, "es_rejected_execution_exception", "the queue is full")
                self.indices[target["_index"]].put(target["_id"], source)
            except ContractError as error:
                outcome |= error.body()
            items.append({"index": outcome})
        return {"errors": any(item["index"]["status"] >= 400 for item in items), "items": items, "took": 1}


@contextmanager
def elasticsearch_contract() -> Iterator[Contract]:
    """The server, on a port of its own until the block ends."""
    contract = Contract()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            url = urlsplit(self.path)
            content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            contract.requests.append(f"{self.command} {url.path}")
            assert "compatible-with=9" in self.headers["Accept"]
            try:
                path = [unquote(part) for part in url.path.strip("/").split("/")]
                if contract.documents_left is not None and contract.documents_left < 0:
                    raise ConnectionAbortedError
                status, body = 200, contract.answer(self.command, path, parse_qs(url.query), content)
            except ContractError as error:
                status, body = error.status, error.body()
            except ConnectionAbortedError:
                self.close_connection = True
                return
            written = b"" if body is None or self.command == "HEAD" else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("X-Elastic-Product", "Elasticsearch")
            self.send_header("Content-Type", _MEDIA)
            self.send_header("Content-Length", str(len(written)))
            self.end_headers()
            self.wfile.write(written)

        do_GET = do_HEAD = do_POST = do_PUT = _serve  # noqa: N815

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    contract.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield contract
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
