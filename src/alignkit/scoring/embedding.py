"""Texts as vectors whose distances mean something: by character n-grams without a model, or by a sentence encoder."""

from __future__ import annotations

import hashlib
import json
import logging
import unicodedata
from collections.abc import Iterator, Sequence
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from alignkit.core.errors import UserError
from alignkit.core.hashing import hash_path, hash_text
from alignkit.core.progress import progress
from alignkit.data.hygiene import Match
from alignkit.scoring.embedding_cache import EmbeddingCache

LOG = logging.getLogger("alignkit")
Vectors = npt.NDArray[np.float32]

_NGRAM_LENGTHS = (2, 3, 4)
_BUCKETS = 1 << 18
_NONZEROS = 8
_BLOCK_CHARACTERS = 1 << 16
"""Characters that are counted at once: their n-grams stay in the processor's cache."""
_TEXT_CHARACTERS = 32
"""What a text counts for besides its own characters, so that a block of very short ones is not too many rows."""

_BLOCK_TEXTS = 512
"""Texts that are embedded, and then written to the cache, at once: what a kill can cost."""
_BLOCK_NUMBERS = 1 << 24


class Embedder(Protocol):
    """Makes texts into vectors that can be compared with all others of the same `key`."""

    dimensions: int

    @property
    def key(self) -> str:
        """Hexadecimal; names the model and every setting that changes a vector."""
        ...

    def embed(self, texts: Sequence[str]) -> Vectors:
        """One row a text: float32 [len(texts), dimensions]."""
        ...

    def too_long(self, texts: Sequence[str]) -> int:
        """How many of the texts have an end that `embed` does not see."""
        ...


class CharacterEmbedder:
    """Embeds texts by their character n-grams; no model, no download, the same on every machine.

    Counts of 2- to 4-grams (case and Unicode width folded) are hashed into 2^18 buckets, weighted by
    (1 + log count) * (1 + log((1 + texts) / (1 + texts with it))), and brought down by a sparse random projection (Kane
    and Nelson, 2014, arXiv 1012.1577) whose entries are hashes. Cosines of the weighted counts are kept to within about
    1 / sqrt(dimensions). Vectors have length 1; a text without characters is all zeros. The surprise: the rarity of an
    n-gram is counted in the texts given here, so what is to be compared must come from one embedder.
    """

    def __init__(self, texts: Sequence[str], dimensions: int = 256) -> None:
        self.dimensions = dimensions
        texts_with = np.zeros(_BUCKETS, np.int64)
        for start, end in _blocks(texts):
            texts_with += np.diff(_ngram_counts(texts[start:end]).indptr)
        self._rarity = np.log((1 + len(texts)) / (1 + texts_with)) + 1

    @cached_property
    def key(self) -> str:
        """Hexadecimal; names the settings and the n-grams' rarities."""
        settings = f"characters {_NGRAM_LENGTHS} {_BUCKETS} {_NONZEROS} {self.dimensions} "
        return hashlib.sha256(settings.encode() + self._rarity.tobytes()).hexdigest()

    def embed(self, texts: Sequence[str]) -> Vectors:
        """One row a text: float32 [len(texts), dimensions], of length 1 or all zeros."""
        vectors = np.empty((len(texts), self.dimensions), np.float32)
        for start, end in _blocks(texts):
            counts = _ngram_counts(texts[start:end]).tocsr()
            counts.data = (1 + np.log(counts.data)) * self._rarity[counts.indices]
            projected = (counts @ self._projection).toarray()
            vectors[start:end] = unit_rows(projected)
        return vectors

    def too_long(self, texts: Sequence[str]) -> int:
        """None: every character counts."""
        return 0

    @cached_property
    def _projection(self) -> Any:
        """Sparse [2^18, dimensions]: eight entries of +-1 / sqrt(8) a row, at places hashed from the bucket."""
        from scipy.sparse import csr_matrix

        hashed = _scramble(np.arange(1, _BUCKETS * _NONZEROS + 1, dtype=np.uint64))
        places = (hashed % np.uint64(self.dimensions)).astype(np.int64)
        signs = np.where(hashed >> np.uint64(63) == 1, 1.0, -1.0) / np.sqrt(_NONZEROS)
        buckets = np.repeat(np.arange(_BUCKETS), _NONZEROS)
        return csr_matrix((signs, (buckets, places)), shape=(_BUCKETS, self.dimensions))


class SentenceTransformerEmbedder:
    """Embeds texts by a sentence-transformers model, or by any plain encoder with a `pooling` of its tokens.

    `path` is a folder or a hub name. `pooling` (cls, mean, lasttoken, ...) overrides what the model's files say; a
    plain encoder has nothing to say and gets mean. `prompt` is put before every text, in place of the model's default
    prompt if it has one. Weights are read from safetensors, held in float32, and no remote code is run. The surprise:
    a model reads `max_seq_length` tokens and no more, often 256 or 512; `too_long` counts the texts that it concerns.
    """

    def __init__(
        self,
        path: str,
        batch_size: int = 32,
        prompt: str | None = None,
        *,
        pooling: str | None = None,
        revision: str | None = None,
    ) -> None:
        self.path = path
        self.batch_size = batch_size
        self.prompt = prompt
        self._pooling = pooling
        self._model = load_sentence_transformer(path, pooling, revision)
        self.dimensions = int(self._model.get_embedding_dimension())

    def with_prompt(self, prompt: str | None) -> SentenceTransformerEmbedder:
        """The same model, not loaded again, with another prompt."""
        other = copy(self)
        other.__dict__.pop("key", None)  # which is cached
        other.prompt = prompt
        return other

    def own_prompt(self, purpose: str) -> str | None:
        """The prompt that the model's files hold for a purpose, `query` or `document`; None when they hold none."""
        return self._model.prompts.get(purpose) or None

    @cached_property
    def key(self) -> str:
        """Hexadecimal; names the model's files or commit, the pooling, the prompt and the limit of length."""
        commit = getattr(getattr(self._model[0], "config", None), "_commit_hash", None)
        files = hash_path(Path(self.path)) if Path(self.path).is_dir() else [self.path, commit]
        return hash_text(json.dumps([files, self._pooling, self.prompt, str(self._model.max_seq_length)]))

    def embed(self, texts: Sequence[str]) -> Vectors:
        """One row a text: float32 [len(texts), dimensions]. Texts of similar length share a batch."""
        if not texts:
            return np.empty((0, self.dimensions), np.float32)
        vectors = self._model.encode(
            list(texts), prompt=self.prompt, batch_size=self.batch_size, show_progress_bar=False
        )
        return np.asarray(vectors, dtype=np.float32)

    def too_long(self, texts: Sequence[str]) -> int:
        """How many of the texts, with the prompt, have more tokens than the model reads."""
        limit = self._model.max_seq_length
        if limit is None or limit == float("inf"):
            return 0
        prompt = self._model.prompts.get(self._model.default_prompt_name, "") if self.prompt is None else self.prompt
        count = 0
        for start in range(0, len(texts), _BLOCK_TEXTS):
            block = [prompt + text for text in texts[start : start + _BLOCK_TEXTS]]
            tokens = self._model.tokenizer(block, truncation=False, verbose=False)["input_ids"]
            count += sum(len(ids) > limit for ids in tokens)
        return count


def embed_all(embedder: Embedder, texts: Sequence[str], cache: EmbeddingCache | None = None) -> Vectors:
    """Embed many texts: float32 [len(texts), dimensions]; equal texts are embedded once.

    With a cache, what it holds is not embedded again, and every finished block is in it before the next one begins:
    after a kill the same call goes on where it was, with the same blocks and so with the same vectors. Warns of texts
    that are too long for the model; raises `UserError` for a text whose vector has numbers that are not finite.
    """
    rows: dict[str, list[int]] = {}
    for row, text in enumerate(texts):
        rows.setdefault(text, []).append(row)
    different = list(rows)
    if cut := embedder.too_long(different):
        LOG.warning("%d of %d texts are too long for the model: their ends are not embedded", cut, len(different))
    vectors = np.empty((len(texts), embedder.dimensions), np.float32)
    found = _embed_blocks(embedder, different, cache)
    for text, vector in zip(different, progress(found, "embed texts", len(different)), strict=True):
        if not np.isfinite(vector).all():
            raise UserError(
                f"text {rows[text][0]} is embedded as numbers that are not finite: {text[:80]!r}. Remove it."
            )
        vectors[rows[text]] = vector
    return vectors


def contaminated_by_embedding(
    embeddings: Vectors, evaluation_embeddings: Vectors, threshold: float
) -> list[Match | None]:
    """For each row the evaluation row of the highest cosine, where that reaches `threshold`; None where it does not.

    The lowest row wins among equals. A vector of zeros, a text without characters, is similar to nothing.
    """
    matches: list[Match | None] = []
    if not len(evaluation_embeddings):
        return [None] * len(embeddings)
    evaluation = unit_rows(evaluation_embeddings).T
    block = max(1, _BLOCK_NUMBERS // evaluation.shape[1])
    for start in range(0, len(embeddings), block):
        cosines = unit_rows(embeddings[start : start + block]) @ evaluation
        nearest = cosines.argmax(axis=1)
        for row, cosine in zip(nearest.tolist(), cosines[np.arange(len(nearest)), nearest].tolist(), strict=True):
            matches.append(Match(row, min(cosine, 1.0)) if cosine >= threshold else None)
    return matches


def _embed_blocks(embedder: Embedder, texts: Sequence[str], cache: EmbeddingCache | None) -> Iterator[Vectors]:
    """The vector of each text. Blocks begin at the same texts in every run, whatever the cache holds."""
    for start in range(0, len(texts), _BLOCK_TEXTS):
        block = texts[start : start + _BLOCK_TEXTS]
        known = cache.get(embedder.key, block, embedder.dimensions) if cache else {}
        missing = [text for text in block if text not in known]
        if missing:
            new = dict(zip(missing, embedder.embed(missing), strict=True))
            if cache:
                cache.put(embedder.key, new)
            known |= new
        yield from (known[text] for text in block)


def unit_rows(vectors: npt.NDArray[np.floating[Any]]) -> Vectors:
    """float32, rows of length 1, or all zeros where there is nothing."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.where(lengths > 0, lengths, 1), dtype=np.float32)


def load_sentence_transformer(path: str, pooling: str | None, revision: str | None) -> Any:
    """A sentence-transformers model, or a plain encoder with a pooling, in float32, from safetensors alone."""
    from transformers.utils import logging as transformers_logging

    try:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import Pooling
    except ImportError as error:
        raise UserError(
            "embedding by a model needs sentence-transformers: pip install 'alignkit[retrieval]'"
        ) from error
    transformers_logging.disable_progress_bar()
    try:
        model = SentenceTransformer(
            path,
            revision=revision,
            trust_remote_code=False,
            model_kwargs={"use_safetensors": True, "dtype": "float32"},
        )
    except (OSError, ValueError) as error:
        raise UserError(f"the embedding model {path} could not be loaded: {str(error).splitlines()[0]}") from error
    if pooling is not None:
        places = [place for place, module in enumerate(model) if isinstance(module, Pooling)]
        if not places or pooling not in Pooling.POOLING_MODES:
            raise UserError(
                f"pooling={pooling}: choose {', '.join(Pooling.POOLING_MODES)}, of a model that has pooling"
            )
        model[places[0]] = Pooling(model[places[0]].embedding_dimension, pooling)
    return model


def _blocks(texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Start and end of consecutive runs of texts, each run as long as fits into a block, and of one text at least."""
    start = size = 0
    for position, text in enumerate(texts):
        cost = _TEXT_CHARACTERS + len(text)
        if size and size + cost > _BLOCK_CHARACTERS:
            yield start, position
            start, size = position, 0
        size += cost
    if start < len(texts):
        yield start, len(texts)


def _ngram_counts(texts: Sequence[str]) -> Any:
    """Sparse float64 [len(texts), 2^18], by columns: how often each text has an n-gram of each bucket.

    Spaces are squeezed and added at both ends of a text.
    """
    from scipy.sparse import coo_matrix

    folded = [" ".join(unicodedata.normalize("NFKC", text).casefold().split()) for text in texts]
    padded = [f" {text} " if text else "" for text in folded]
    codes = np.frombuffer("".join(padded).encode("utf-32-le", "surrogatepass"), dtype="<u4").astype(np.uint64)
    owners = np.repeat(np.arange(len(texts), dtype=np.int32), [len(text) for text in padded])
    rows, buckets = [], []
    for length in _NGRAM_LENGTHS:
        windows = max(len(codes) - length + 1, 0)
        value = np.full(windows, length, np.uint64)
        for offset in range(length):
            value = _scramble(value * np.uint64(1_000_003) + codes[offset : offset + windows])
        first, last = owners[:windows], owners[length - 1 : length - 1 + windows]
        rows.append(first[first == last])
        buckets.append((value[first == last] % np.uint64(_BUCKETS)).astype(np.int32))
    places = np.concatenate(rows), np.concatenate(buckets)
    return coo_matrix((np.ones(len(places[0])), places), shape=(len(texts), _BUCKETS)).tocsc()


def _scramble(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Mix the bits of 64-bit numbers (SplitMix64; Steele et al., 2014)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(values ^ (values >> np.uint64(31)))
