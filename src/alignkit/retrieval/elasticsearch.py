"""Passages in Elasticsearch, through its official client: BM25 and vectors there, fusion here.

The server's own fusion needs a licence, so it is not used. Words are made as everywhere in alignkit and sent with
spaces between them, so that Chinese is found without a plugin; BM25 has the k1 and b of the other engines, and
scores that differ only because Lucene keeps a text's length in one byte.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from alignkit.core.errors import UserError, first_line
from alignkit.core.retrieval_config import SearchMode
from alignkit.retrieval.base import Passage
from alignkit.retrieval.bm25 import K1, B, tokens
from alignkit.retrieval.embedder import RetrievalEmbedder, searched_text
from alignkit.retrieval.fusion import Ranking
from alignkit.retrieval.ingest import some_at_a_time
from alignkit.retrieval.server_index import ServerIndex, Vector

_QUERIES = 32
"""Queries of one request."""
_BULK_BYTES = 10 * 2**20
_RANKED = {
    "sort": [{"_score": "desc"}, {"id": "asc"}],
    "track_scores": True,
    "track_total_hits": False,
    "_source": False,
}


class ElasticsearchIndex(ServerIndex):
    """Passages in an index of an Elasticsearch server (9 or newer).

    A passage's id is the document's, so that what is sent twice is there once: after a kill or a lost server the same
    call goes on where it was. What the server is too busy for (429) is sent again, alone, with growing pauses.
    `approximate` lets its HNSW graph find neighbours; otherwise vectors are compared with all others.
    """

    NOUN = "index"

    def __init__(
        self,
        url: str,
        name: str,
        embedder: RetrievalEmbedder | None = None,
        mode: SearchMode = SearchMode.hybrid,
        *,
        api_key: str | None = None,
        candidates: int = 100,
        rrf_k: int = 60,
        approximate: bool = False,
        retry_seconds: float = 2.0,
        retries: int = 5,
    ) -> None:
        super().__init__(url, name, embedder, mode, candidates=candidates, rrf_k=rrf_k, approximate=approximate)
        self._retry_seconds, self._retries = retry_seconds, retries
        try:
            self._client = _elasticsearch().Elasticsearch(
                url, api_key=api_key, request_timeout=60, max_retries=3, retry_on_timeout=True
            )
        except ValueError as error:
            raise UserError(f"retrieval.url={url}: {first_line(error)}. Write it like https://host:9200") from error
        with self._explained():
            self._made = self._look()

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    # -- changing ---------------------------------------------------------------------------------------------------

    def _store(self, rows: Sequence[tuple[Passage, str, Vector | None]]) -> None:
        self._send(
            {
                "_op_type": "index",
                "_index": self.name,
                "_id": passage.id,
                **{key: value for key, value in passage.model_dump().items() if value is not None},
                "digest": digest,
                "tokens": " ".join(tokens(searched_text(passage))),
                **({"vector": vector.tolist()} if vector is not None else {}),
            }
            for passage, digest, vector in rows
        )

    def _remove(self, ids: Sequence[str]) -> None:
        query = {"ids": {"values": ids}}
        self._client.delete_by_query(index=self.name, query=query, refresh=True, conflicts="proceed")

    def _finish(self) -> None:
        self._client.indices.refresh(index=self.name)

    def _send(self, actions: Iterable[dict[str, Any]]) -> None:
        """Send documents in bulk. Those that the server is too busy for are sent again; those it refuses are named."""
        from elasticsearch.helpers import streaming_bulk

        refused: list[str] = []
        for done, answer in streaming_bulk(
            self._client,
            actions,
            max_chunk_bytes=_BULK_BYTES,
            raise_on_error=False,
            max_retries=self._retries,
            initial_backoff=self._retry_seconds,
            max_backoff=60,
        ):
            if not done:
                (outcome,) = answer.values()
                refused.append(f"{outcome['_id']}: {_reason(outcome)}")
        if refused:
            raise UserError(
                f"{self._place} refused {len(refused)} passages, the first because of {refused[0]}. The others are "
                "stored; the same command sends what is missing"
            )

    # -- searching --------------------------------------------------------------------------------------------------

    def by_words(self, queries: Sequence[str], k: int, documents: Collection[str] | None) -> list[Ranking]:
        """By the server's BM25."""
        texts = [" ".join(tokens(query)) for query in queries]
        wanted = [
            {"bool": {"must": [{"match": {"tokens": {"query": text}}}], "filter": _filters(documents)}}
            if text
            else None
            for text in texts
        ]
        return self._rankings(wanted, k, lambda score: score)

    def by_vectors(self, queries: Sequence[str], k: int, documents: Collection[str] | None) -> list[Ranking]:
        """By cosine; a query of zeros is similar to nothing."""
        assert self.embedder is not None
        filters = [*_filters(documents), {"exists": {"field": "vector"}}]
        wanted: list[dict[str, Any] | None] = []
        for vector in self.embedder.embed_queries(queries):
            numbers = vector.tolist()
            if not vector.any():
                wanted.append(None)
            elif self.approximate:
                graph = {
                    "field": "vector",
                    "query_vector": numbers,
                    "k": k,
                    "num_candidates": min(10_000, max(100, 2 * k)),
                }
                wanted.append({"knn": {**graph, "filter": filters}})
            else:
                cosine = "(1.0 + cosineSimilarity(params.query, 'vector')) / 2"
                script = {"source": cosine, "params": {"query": numbers}}
                wanted.append({"script_score": {"query": {"bool": {"filter": filters}}, "script": script}})
        return self._rankings(wanted, k, lambda score: 2 * score - 1)

    def _rankings(self, wanted: Sequence[dict[str, Any] | None], k: int, scale: Any) -> list[Ranking]:
        """Ids and scores for each query; none for a query that is None."""
        found: list[Ranking] = [[] for _ in wanted]
        asked = [number for number, query in enumerate(wanted) if query is not None]
        for start in range(0, len(asked), _QUERIES):
            some = asked[start : start + _QUERIES]
            searches: list[dict[str, Any]] = []
            for number in some:
                searches += [{}, {"query": wanted[number], "size": k, **_RANKED}]
            for number, answer in zip(
                some, self._client.msearch(index=self.name, searches=searches)["responses"], strict=True
            ):
                if "error" in answer:
                    raise UserError(f"{self._place} cannot search: {_reason(answer)}")
                found[number] = [(hit["_id"], scale(hit["_score"])) for hit in answer["hits"]["hits"]]
        return found

    def passages(self, ids: Collection[str]) -> Mapping[str, Passage]:
        """The passages of these ids that are there."""
        fields = ["text", "title", "document", "page"]
        return {id: Passage(id=id, **held) for id, held in self._held(ids, fields).items()}

    def _digests(self, ids: Sequence[str]) -> Mapping[str, Any]:
        return {id: held.get("digest") for id, held in self._held(ids, ["digest"]).items()}

    def _held(self, ids: Collection[str], fields: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Fields of the passages of these ids that are there."""
        found: dict[str, dict[str, Any]] = {}
        for block in some_at_a_time(ids):
            answer = self._client.mget(index=self.name, ids=block, source_includes=list(fields))
            found |= {each["_id"]: each["_source"] for each in answer["docs"] if each.get("found")}
        return found

    def _count(self) -> int:
        return int(self._client.count(index=self.name)["count"])

    def _all_ids(self) -> Iterator[str]:
        """The ids of all passages, page by page in their order."""
        after: list[str] | None = None
        while True:
            page = {"search_after": after} if after else {}
            answer = self._client.search(index=self.name, size=1000, sort=[{"id": "asc"}], source=False, **page)
            hits = answer["hits"]["hits"]
            yield from (hit["_id"] for hit in hits)
            if not hits:
                return
            after = hits[-1]["sort"]

    # -- the server -------------------------------------------------------------------------------------------------

    def _create(self) -> None:
        """Make the index from a template of its name, which a template of higher priority can change."""
        template = {"settings": _SETTINGS, "mappings": self._mappings()}
        self._client.indices.put_index_template(
            name=f"{self.name}-template", index_patterns=[self.name], template=template, priority=100
        )
        try:
            self._client.indices.create(index=self.name)
        except _elasticsearch().BadRequestError as error:
            if error.error != "resource_already_exists_exception":  # another process was faster
                raise

    def _mappings(self) -> dict[str, Any]:
        fields: dict[str, Any] = {
            "id": {"type": "keyword"},
            "digest": {"type": "keyword", "index": False},
            "document": {"type": "keyword"},
            "page": {"type": "integer"},
            "title": {"type": "text", "index": False},
            "text": {"type": "text", "index": False},
            "tokens": {"type": "text", "analyzer": "whitespace"},
        }
        meta = {}
        if self.embedder is not None:
            fields["vector"] = {
                "type": "dense_vector",
                "dims": self.embedder.dimensions,
                "similarity": "cosine",
                "index": self.approximate,
            }
            if not self.approximate:
                del fields["vector"]["similarity"]
            meta = {"embedder": self.embedder.key, "name": self.embedder.name}
        return {"dynamic": "strict", "_meta": meta, "_source": {"excludes": ["tokens"]}, "properties": fields}

    def _settings(self) -> dict[str, str]:
        (mapping,) = self._client.indices.get_mapping(index=self.name).values()
        return dict(mapping["mappings"].get("_meta", {}))

    def _exists(self) -> bool:
        return bool(self._client.indices.exists(index=self.name))

    @property
    def _place(self) -> str:
        return f"Elasticsearch at {self.url}"

    @contextmanager
    def _explained(self) -> Iterator[None]:
        from elastic_transport import TransportError
        from elasticsearch import ApiError, UnsupportedProductError

        try:
            yield
        except UnsupportedProductError as error:
            raise UserError(f"retrieval.url={self.url}: this is no Elasticsearch server. Correct it.") from error
        except TransportError as error:
            raise UserError(
                f"retrieval.url={self.url}: no answer from Elasticsearch ({first_line(error)}). Start a server "
                "(docs/retrieval.md says how) or correct retrieval.url; the same command then continues"
            ) from error
        except ApiError as error:
            hint = " Set retrieval.api_key_env." if error.status_code in (401, 403) else ""
            raise UserError(f"{self._place}, index {self.name}: {first_line(error)}.{hint}") from error


_SETTINGS = {"index": {"similarity": {"default": {"type": "BM25", "k1": K1, "b": B}}}}


def _filters(documents: Collection[str] | None) -> list[dict[str, Any]]:
    return [] if documents is None else [{"terms": {"document": sorted(documents)}}]


def _reason(outcome: Mapping[str, Any]) -> str:
    error = outcome.get("error", {})
    return str(error.get("reason", error)) if isinstance(error, Mapping) else str(error)


def _elasticsearch() -> Any:
    try:
        import elasticsearch
    except ImportError as error:
        raise UserError("Elasticsearch needs its client: pip install 'alignkit[elasticsearch]'") from error
    logging.getLogger("elastic_transport").setLevel(logging.ERROR)  # it prints a traceback for every retry
    return elasticsearch
