"""One search of a whole corpus for many queries: what mining and the evaluation of retrievers begin with.

The corpus is in memory, and passages are read as they are for training a retriever, with the instructions of each task;
only an encoder's vectors are kept. An index that is kept and searched again is what `retrieval.open` opens.

A retriever is named by a word: `bm25`, `characters` (cosines of character n-grams, no model needed), or the folder or
hub name of a sentence-transformers encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from alignkit.core.progress import progress
from alignkit.retrieval.base import Found, Passage
from alignkit.retrieval.corpus import Corpus, passage_text
from alignkit.scoring.embedding import Vectors, unit_rows
from alignkit.scoring.row_embedding import CHARACTERS

BM25 = "bm25"


class Query(NamedTuple):
    """What is looked for. An encoder that was trained with an instruction for its task reads it with that."""

    task: str
    text: str


def search_corpus(
    name: str, corpus: Corpus, queries: Sequence[Query], k: int, cache: str | None = None
) -> list[list[Found]]:
    """For each query its at most `k` best passages, best first, equal scores by id.

    `cache` is the file that keeps an encoder's vectors of passages.
    """
    if name == BM25:
        return _by_words(corpus.passages, queries, k)
    if name == CHARACTERS:
        return _by_characters(corpus.passages, queries, k)
    return _by_encoder(name, corpus.passages, queries, k, cache)


def _by_words(passages: Sequence[Passage], queries: Sequence[Query], k: int) -> list[list[Found]]:
    from alignkit.retrieval.bm25 import BM25Index

    index = BM25Index([passage_text(passage) for passage in passages])
    return [
        [Found(passages[hit.index], hit.score) for hit in index.search([query.text], k)[0]]
        for query in progress(queries, "search by bm25")
    ]


def _by_characters(passages: Sequence[Passage], queries: Sequence[Query], k: int) -> list[list[Found]]:
    from alignkit.scoring.embedding import CharacterEmbedder

    texts = [passage_text(passage) for passage in passages]
    embedder = CharacterEmbedder(texts)
    return _nearest(passages, embedder.embed([query.text for query in queries]), embedder.embed(texts), k)


def _by_encoder(
    path: str, passages: Sequence[Passage], queries: Sequence[Query], k: int, cache: str | None
) -> list[list[Found]]:
    """By cosine. Queries whose task has an instruction for passages of its own look among passages read with that."""
    from alignkit.scoring.embedding import SentenceTransformerEmbedder, embed_all
    from alignkit.scoring.embedding_cache import EmbeddingCache

    model = SentenceTransformerEmbedder(path)
    texts = [passage_text(passage) for passage in passages]
    places: dict[tuple[str | None, str | None], list[int]] = {}
    for place, query in enumerate(queries):
        for_query = model.own_prompt(f"{query.task}_query") or model.own_prompt("query")
        for_passage = model.own_prompt(f"{query.task}_passage") or model.own_prompt("document")
        places.setdefault((for_passage, for_query), []).append(place)
    found: list[list[Found]] = [[] for _ in queries]
    vectors: dict[str | None, Vectors] = {}
    for (for_passage, for_query), own in places.items():
        asked = model.with_prompt(for_query).embed([queries[place].text for place in own])
        if for_passage not in vectors:
            reader = model.with_prompt(for_passage)
            if cache is None:
                vectors[for_passage] = embed_all(reader, texts)
            else:
                with EmbeddingCache(Path(cache)) as kept:
                    vectors[for_passage] = embed_all(reader, texts, kept)
        for place, hits in zip(own, _nearest(passages, asked, vectors[for_passage], k), strict=True):
            found[place] = hits
    return found


def _nearest(passages: Sequence[Passage], queries: Vectors, vectors: Vectors, k: int) -> list[list[Found]]:
    from alignkit.retrieval.dense import nearest

    order, among = np.arange(len(passages)), np.ones(len(passages), bool)
    return [
        [Found(passages[row], score) for row, score in hits]
        for hits in nearest(unit_rows(queries), unit_rows(vectors), k, order, among)
    ]
