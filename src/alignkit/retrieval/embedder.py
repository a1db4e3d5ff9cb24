"""Passages and queries as vectors of length 1, each with the prompt that the model wants for them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from alignkit.core.errors import UserError
from alignkit.core.retrieval_config import RetrievalConfig
from alignkit.retrieval.base import Passage
from alignkit.scoring.embedding import CharacterEmbedder, Embedder, SentenceTransformerEmbedder, Vectors, unit_rows
from alignkit.scoring.row_embedding import CHARACTERS

LOG = logging.getLogger("alignkit")


@dataclass
class RetrievalEmbedder:
    """One embedder for passages, and the same one, with another prompt, for queries.

    `name` is for messages; `key` names all that changes a passage's vector, and so says whether an index fits.
    """

    name: str
    passages: Embedder
    queries: Embedder
    cut: int = field(default=0, init=False)
    """Passages so far whose end the model did not see."""

    @property
    def key(self) -> str:
        """Hexadecimal."""
        return self.passages.key

    @property
    def dimensions(self) -> int:
        """Numbers of a vector."""
        return self.passages.dimensions

    def embed_passages(self, passages: Sequence[Passage]) -> Vectors:
        """float32 [len(passages), dimensions], rows of length 1, or all zeros where there is nothing to embed."""
        texts = [searched_text(passage) for passage in passages]
        self.cut += self.passages.too_long(texts)
        vectors = self.passages.embed(texts)
        for passage, vector in zip(passages, vectors, strict=True):
            if not np.isfinite(vector).all():
                raise UserError(f"passage {passage.id}: the embedder makes it numbers that are not finite. Remove it.")
        return unit_rows(vectors)

    def embed_queries(self, queries: Sequence[str]) -> Vectors:
        """float32 [len(queries), dimensions], rows of length 1 or all zeros."""
        return unit_rows(self.queries.embed(queries))

    def warn_of_cut(self) -> None:
        """Say how many passages are longer than the model reads, and count anew."""
        if self.cut:
            LOG.warning("%d passages are too long for %s: their ends are not embedded", self.cut, self.name)
        self.cut = 0


def searched_text(passage: Passage) -> str:
    """What of a passage is searched: its title and its text."""
    return f"{passage.title}\n{passage.text}" if passage.title else passage.text


def open_embedder(config: RetrievalConfig) -> RetrievalEmbedder:
    """The embedder that a configuration names. Raises `UserError` when a model cannot be loaded.

    Character n-grams all weigh the same here: how rare they are would change with every passage that is added.
    """
    assert config.embedder is not None
    if config.embedder == CHARACTERS:
        characters = CharacterEmbedder([])
        return RetrievalEmbedder(CHARACTERS, characters, characters)
    model = SentenceTransformerEmbedder(config.embedder, config.batch_size, revision=config.embedder_revision)
    prompts = [
        model.own_prompt(purpose) if given is None else given
        for purpose, given in (("document", config.passage_prompt), ("query", config.query_prompt))
    ]
    return RetrievalEmbedder(config.embedder, *(model.with_prompt(prompt) for prompt in prompts))


def require_embedder(place: str, key: str, name: str, embedder: RetrievalEmbedder) -> None:
    """Raise `UserError` unless the vectors at `place` were made by this embedder."""
    if not key:
        raise UserError(f"{place} was built without vectors: choose retrieval.mode=bm25, or index again")
    if key != embedder.key:
        raise UserError(
            f"{place} was built by the embedder {name} ({key[:8]}), and this is {embedder.name} ({embedder.key[:8]}): "
            "their vectors cannot be compared. Set retrieval.embedder and its prompts as they were, or index again."
        )
