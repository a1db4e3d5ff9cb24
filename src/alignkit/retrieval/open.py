"""From a configuration to a retriever."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from alignkit.core.errors import UserError
from alignkit.core.retrieval_config import RetrievalConfig, SearchEngine, SearchMode
from alignkit.retrieval.base import Found, Retriever
from alignkit.teacher.address import is_loopback


class FilteringRetriever(Retriever, Protocol):
    """A retriever that can look among some documents only. All engines here can."""

    def search(self, queries: Sequence[str], k: int, documents: Collection[str] | None = None) -> list[list[Found]]:
        """For each query its at most `k` best passages; `documents` leaves only passages of these documents."""

    def close(self) -> None:
        """Let go of files and connections."""


def open_retriever(config: RetrievalConfig) -> FilteringRetriever:
    """The retriever that a configuration names; unless words alone are searched its embedder is loaded.

    Raises `UserError` for settings that do not fit together, a secret in a URL, an embedder that cannot be loaded, and
    a server that does not answer.
    """
    _check(config)
    from alignkit.retrieval.embedder import open_embedder

    mode = config.searches_by
    embedder = open_embedder(config) if mode is not SearchMode.bm25 else None
    if config.engine is SearchEngine.embedded:
        from alignkit.retrieval.embedded import EmbeddedIndex

        assert config.path is not None
        return EmbeddedIndex(
            Path(config.path),
            embedder,
            mode,
            candidates=config.candidates,
            rrf_k=config.rrf_k,
            half=config.half,
        )
    assert config.url is not None
    secret = _read_secret(config.api_key_env)
    if config.engine is SearchEngine.elasticsearch:
        from alignkit.retrieval.elasticsearch import ElasticsearchIndex

        return ElasticsearchIndex(
            config.url,
            config.name,
            embedder,
            mode,
            api_key=secret,
            candidates=config.candidates,
            rrf_k=config.rrf_k,
            approximate=config.approximate,
        )
    from alignkit.retrieval.postgres import PostgresIndex

    return PostgresIndex(
        config.url,
        config.name,
        embedder,
        mode,
        password=secret,
        candidates=config.candidates,
        rrf_k=config.rrf_k,
        approximate=config.approximate,
    )


def _check(config: RetrievalConfig) -> None:
    if config.engine is SearchEngine.embedded:
        if not config.path:
            raise UserError("retrieval.path: the embedded engine needs a folder")
        return
    if not config.url:
        raise UserError(
            f"retrieval.url: {config.engine.name} needs the URL of its server. docs/retrieval.md starts one"
        )
    parts = urlsplit(config.url)
    if parts.password:
        raise UserError(
            "retrieval.url must hold no password: it comes from the variable that retrieval.api_key_env names"
        )
    schemes = ("http", "https") if config.engine is SearchEngine.elasticsearch else ("postgresql", "postgres")
    if parts.scheme not in schemes:
        raise UserError(f"retrieval.url={config.url}: for {config.engine.name} it begins with {schemes[0]}://")
    if config.api_key_env and parts.scheme == "http" and not is_loopback(parts.hostname or ""):
        raise UserError(f"retrieval.url={config.url}: the key would cross the network in the clear. Use https.")


def _read_secret(variable: str) -> str | None:
    if not variable:
        return None
    if not variable.isidentifier():
        raise UserError("retrieval.api_key_env must be the NAME of an environment variable, e.g. ELASTIC_API_KEY")
    if not (secret := os.environ.get(variable, "").strip()):
        raise UserError(f"retrieval.api_key_env={variable}: that environment variable is not set. Export it.")
    return secret
