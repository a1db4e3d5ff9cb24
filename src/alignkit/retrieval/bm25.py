"""BM25 over texts held in memory, on `bm25s`, with an order of the hits that is always the same."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from alignkit.core.errors import UserError

_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
_TOKEN = re.compile(rf"[{_CJK}]+|[^\W_{_CJK}]+")
_CJK_RUN = re.compile(rf"[{_CJK}]")


@dataclass(frozen=True)
class Hit:
    """A text by its position, and its score, above zero."""

    index: int
    score: float


def tokens(text: str) -> list[str]:
    """The words of a text, case and Unicode width folded; punctuation is left out.

    Chinese and Japanese have no spaces between words: a run of their characters gives each character and each pair.
    """
    found: list[str] = []
    for run in _TOKEN.findall(unicodedata.normalize("NFKC", text).casefold()):
        if _CJK_RUN.match(run):
            found += [*run, *(run[at : at + 2] for at in range(len(run) - 1))]
        else:
            found.append(run)
    return found


class BM25Index:
    """An index of `texts`, by BM25 (Robertson and Zaragoza, 2009) as Lucene computes it, without the factor (k1 + 1):

        score(q, d) = sum over the tokens t of q:  idf(t) * f / (f + k1 * (1 - b + b * |d| / average |d|))
        idf(t)      = ln(1 + (N - n_t + 0.5) / (n_t + 0.5))

    with f the frequency of t in d, and n_t the number of the N texts that hold t. A token that a query repeats counts
    as often. `bm25s` alone also returns texts that share no token with the query, and orders equal scores as it
    happens; here the former are left out, and the latter stand in the order of the texts.
    """

    def __init__(self, texts: Sequence[str], *, k1: float = 1.5, b: float = 0.75) -> None:
        corpus = [tokens(text) for text in texts]
        self._vocabulary = {token for text in corpus for token in text}
        self._index: Any = None
        if self._vocabulary:
            self._index = _bm25s().BM25(method="lucene", k1=k1, b=b)
            self._index.index(corpus, create_empty_token=False, show_progress=False)

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """For each query its at most `k` best texts, best first, equal scores by lowest position; none scores zero."""
        return [self._search(query, k) for query in queries]

    def _search(self, query: str, k: int) -> list[Hit]:
        import numpy

        known = [token for token in tokens(query) if token in self._vocabulary]
        if not known or k < 1:
            return []
        scores = self._index.get_scores(known)
        hits = numpy.flatnonzero(scores > 0)
        if len(hits) > k:  # all that reach the k-th score, so that those with equal scores are chosen by position
            least = numpy.partition(scores[hits], len(hits) - k)[len(hits) - k]
            hits = hits[scores[hits] >= least]
        best = hits[numpy.argsort(-scores[hits], kind="stable")][:k]
        return [Hit(int(index), float(scores[index])) for index in best]


def _bm25s() -> Any:
    try:
        import bm25s
    except ImportError as error:
        raise UserError("BM25 needs bm25s: pip install 'alignkit[retrieval]'") from error
    return bm25s
