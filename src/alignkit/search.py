"""search: the passages of an index that answer a query, on the terminal and in a file.

Reads:   retrieval.path            the index that `index` made; with a server's engine it is there
         queries.path              rows with a query, and optionally an id (instead of query)
Writes:  found.jsonl               each query with its passages, best first, and their scores

Overrides people use:
  query="who is the mayor"                    one query; one with a comma is quoted twice: 'query="a, b"'
  queries.path=questions.jsonl                many: rows with `query`, `question` or `input`
  retrieval.k=10                              passages a query
  retrieval.embedder=<model>                  by words and by the vectors of the model that the index was built with
  within=manual.md,faq.md                     only passages of these documents

Examples:
  python -m alignkit.search run=mine query="how long is the deposit kept"
  python -m alignkit.search run=mine queries.path=questions.jsonl retrieval.k=20
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from alignkit.core.artifact import Artifact
from alignkit.core.config import RowsConfig, StageConfig
from alignkit.core.errors import UserError
from alignkit.core.progress import progress
from alignkit.core.retrieval_config import RetrievalConfig

if TYPE_CHECKING:
    from alignkit.retrieval.base import Found

LOG = logging.getLogger("alignkit")

_QUERY_KEYS = ("query", "question", "input")
_BLOCK = 256
_SHOWN_CHARACTERS = 100


@dataclass
class SearchConfig(StageConfig):
    """Configuration of `search`."""

    inputs: ClassVar[tuple[str, ...]] = ("retrieval.path", "queries.path")

    query: str = ""
    """What to look for."""
    queries: RowsConfig = field(default_factory=RowsConfig)
    within: list[str] = field(default_factory=list)
    """Documents to look in; empty: all."""
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)


def run(config: SearchConfig) -> Artifact:
    """Search for one query, or for those of a file."""
    if bool(config.query) == bool(config.queries.path):
        raise UserError('say what to look for: query="...", or else queries.path=<rows with a query>')
    with Artifact.open("search", config, always=True) as artifact:
        from alignkit.retrieval.open import open_retriever

        queries = read_queries(config)
        retriever = open_retriever(config.retrieval)
        try:
            found: list[list[Found]] = []
            blocks = [queries[start : start + _BLOCK] for start in range(0, len(queries), _BLOCK)]
            for block in progress(blocks, "search"):
                texts = [query for _, query in block]
                found += retriever.search(texts, config.retrieval.k, documents=config.within or None)
        finally:
            retriever.close()
        artifact.write_rows("found.jsonl", found_rows(queries, found))
        artifact.metrics = {"queries": len(queries), "without_passages": sum(not hits for hits in found)}
        artifact.summary = f"{len(queries)} queries, {artifact.metrics['without_passages']} without a passage"
        if config.query:
            show(found[0])
    return artifact


def read_queries(config: SearchConfig) -> list[tuple[str, str]]:
    """Ids and texts of the queries. Raises `UserError` for a row that has none."""
    from alignkit.data.jsonl import read_rows

    if config.query:
        return [("query", config.query)]
    queries: list[tuple[str, str]] = []
    rows = read_rows(config.queries.path, config.queries.skip, config.queries.limit)
    for number, (place, row) in enumerate(rows, 1):
        texts = [row[key] for key in _QUERY_KEYS if isinstance(row.get(key), str) and row[key].strip()]
        if not texts:
            raise UserError(f"{place}: no query. A row needs {', '.join(_QUERY_KEYS[:-1])} or {_QUERY_KEYS[-1]}")
        queries.append((str(row.get("id", f"queries-{number:05d}")), texts[0]))
    return queries


def found_rows(queries: Sequence[tuple[str, str]], found: Sequence[Sequence[Found]]) -> Iterator[dict[str, Any]]:
    """The queries with what was found."""
    for (id, query), hits in zip(queries, found, strict=True):
        passages = [{**hit.passage.model_dump(exclude_none=True), "score": round(hit.score, 6)} for hit in hits]
        yield {"id": id, "query": query, "found": passages}


def show(hits: Sequence[Found]) -> None:
    """Print what was found, one passage a line."""
    if not hits:
        LOG.info("nothing found")
    for rank, hit in enumerate(hits, 1):
        passage = hit.passage
        page = "" if passage.page is None else f", page {passage.page}"
        place = f"{passage.document}{page}" if passage.document else passage.id
        text = " ".join(f"{passage.title}: {passage.text}".split() if passage.title else passage.text.split())
        LOG.info("%d. %.4f  [%s]  %s", rank, hit.score, place, text[:_SHOWN_CHARACTERS])


if __name__ == "__main__":
    from alignkit.core.app import stage_main

    stage_main("search")
