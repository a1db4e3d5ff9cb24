"""Which text of a row is embedded, and by what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Optional

import numpy as np
import numpy.typing as npt

from alignkit.core.config import MISSING
from alignkit.core.errors import UserError
from alignkit.core.records import Dropped, QAExample

# ruff: noqa: UP045

Vectors = npt.NDArray[np.float32]

CHARACTERS = "characters"


class EmbeddedText(Enum):
    """The text of a row that a selection is to cover."""

    instruction = "instruction"
    input = "input"
    output = "output"
    all = "all"


@dataclass
class EmbeddingConfig:
    """How rows become vectors."""

    text: EmbeddedText = EmbeddedText.all
    """What to embed: statement, question, answer, or all three together."""
    model: str = CHARACTERS
    """`characters` (character n-grams, no model needed), or folder or hub name of a sentence-transformers model."""
    revision: Optional[str] = None
    pooling: Optional[str] = None
    """How a model's token vectors become one: cls, mean, ...; none: as its files say."""
    prompt: Optional[str] = None
    """Text that the model wants before every other, if it does."""
    batch_size: int = 32
    cache: str = MISSING
    """Where a model's vectors are kept: no text is embedded twice."""
    held_out_similarity: Optional[float] = None
    """Drop rows whose statement and question are at least this similar (cosine) to those of an evaluation row."""

    def __post_init__(self) -> None:
        """Raise `UserError` for a batch of nothing, and for a similarity that no two texts have."""
        if self.batch_size < 1:
            raise UserError(f"embedding.batch_size={self.batch_size}: must be at least 1")
        if self.held_out_similarity is not None and not 0 < self.held_out_similarity <= 1:
            raise UserError(f"embedding.held_out_similarity={self.held_out_similarity}: must lie above 0, up to 1")


def embed_rows(rows: Sequence[QAExample], config: EmbeddingConfig) -> Vectors:
    """The chosen text of each row as a vector: float32 [len(rows), dimensions]."""
    return embed_texts([text_of(row, config.text) for row in rows], config)


def embed_texts(texts: Sequence[str], config: EmbeddingConfig) -> Vectors:
    """Texts as vectors, float32 [len(texts), dimensions]; those of a model are looked up in, and go to, the cache.

    Character n-grams are weighted by how rare they are among these texts: only vectors of one call can be compared.
    """
    from alignkit.scoring.embedding import CharacterEmbedder, SentenceTransformerEmbedder, embed_all
    from alignkit.scoring.embedding_cache import EmbeddingCache

    if config.model == CHARACTERS:
        return embed_all(CharacterEmbedder(texts), texts)
    embedder = SentenceTransformerEmbedder(
        config.model, config.batch_size, config.prompt, pooling=config.pooling, revision=config.revision
    )
    with EmbeddingCache(Path(config.cache)) as cache:
        return embed_all(embedder, texts, cache)


def drop_look_alikes(
    rows: Sequence[QAExample], held_out: Sequence[QAExample], config: EmbeddingConfig
) -> tuple[list[QAExample], list[Dropped]]:
    """The rows whose statement and question are not too similar to an evaluation row's, and the others."""
    from alignkit.scoring.embedding import contaminated_by_embedding

    assert config.held_out_similarity is not None
    vectors = embed_texts([f"{row.instruction}\n{row.input}" for row in (*rows, *held_out)], config)
    matches = contaminated_by_embedding(vectors[: len(rows)], vectors[len(rows) :], config.held_out_similarity)
    kept, dropped = [], []
    for row, match in zip(rows, matches, strict=True):
        if match is None:
            kept.append(row)
        else:
            detail = f"{held_out[match.row].id}: cosine {match.similarity:.3f}"
            fields = row.model_dump(exclude_none=True)
            dropped.append(Dropped(reason="similar to the evaluation data", row=fields, detail=detail))
    return kept, dropped


def text_of(row: QAExample, which: EmbeddedText) -> str:
    """The text of a row that is embedded."""
    if which is EmbeddedText.all:
        return "\n".join((row.instruction, row.input, row.output))
    return str(getattr(row, which.name))
