"""Configuration of retrieval: where passages are held, and how they are searched."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Optional

from alignkit.core.errors import UserError

# All configurations write Optional[...]; omegaconf takes `... | None` just as well.
# ruff: noqa: UP045


class SearchEngine(Enum):
    """Where passages are held: in a folder, by alignkit itself, or on a server."""

    embedded = "embedded"
    elasticsearch = "elasticsearch"
    postgres = "postgres"


class SearchMode(Enum):
    """What is compared: words (BM25), vectors (cosine), or both, their rankings fused."""

    bm25 = "bm25"
    dense = "dense"
    hybrid = "hybrid"


@dataclass
class RetrievalConfig:
    """Where passages are held, and how they are searched."""

    engine: SearchEngine = SearchEngine.embedded
    mode: Optional[SearchMode] = None
    """Words (bm25), vectors (dense), or both (hybrid); none: both with an embedder, words without."""
    path: Optional[str] = "runs/${run}/index/index"
    """Folder of the index, of the embedded engine."""
    url: Optional[str] = None
    """Of the server: https://host:9200, or postgresql://user@host/database; without a password."""
    name: str = "alignkit"
    """Name of the index on a server: of Elasticsearch's index, of PostgreSQL's schema."""
    api_key_env: str = ""
    """NAME of the environment variable that holds Elasticsearch's API key or PostgreSQL's password; empty: none."""
    k: int = 5
    """Passages a query."""
    embedder: Optional[str] = None
    """Folder or hub name of a sentence-transformers model; `characters`: n-grams, which only try things out; none:
    words alone."""
    embedder_revision: Optional[str] = None
    query_prompt: Optional[str] = None
    """Text that the model wants before a query; none: what the model's files say."""
    passage_prompt: Optional[str] = None
    """Likewise, before a passage."""
    batch_size: int = 32
    """Texts embedded at once."""
    candidates: int = 100
    """Hits of words and of vectors, each, that are fused."""
    rrf_k: int = 60
    """Fused score: the sum of 1 / (rrf_k + rank) (Cormack et al., 2009); a larger one lets low ranks count more."""
    half: bool = False
    """Keep vectors in 16 bits: half the disk, cosines to three digits (embedded engine)."""
    approximate: bool = False
    """Let a server find neighbours by its HNSW graph: faster from some 100,000 passages, and some are missed."""

    def __post_init__(self) -> None:
        """Raise `UserError` for numbers that mean nothing."""
        for name in ("k", "batch_size", "candidates", "rrf_k"):
            if (value := getattr(self, name)) < 1:
                raise UserError(f"retrieval.{name}={value}: must be at least 1")
        if self.embedder is None and self.mode in (SearchMode.dense, SearchMode.hybrid):
            raise UserError(f"retrieval.mode={self.mode.name} needs vectors: set retrieval.embedder, or choose bm25")

    @property
    def searches_by(self) -> SearchMode:
        """The mode, chosen if none is given."""
        return self.mode or (SearchMode.bm25 if self.embedder is None else SearchMode.hybrid)
