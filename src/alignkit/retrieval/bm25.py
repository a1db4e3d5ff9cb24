"""BM25 on `bm25s`, with an order of the hits that is always the same. Texts are read once and not held."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy
    import numpy.typing

from alignkit.core.errors import UserError

K1, B = 1.5, 0.75
"""BM25's free parameters in every engine: how soon a repeated word says no more, how much a text's length counts."""

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
    runs: list[str] = _TOKEN.findall(unicodedata.normalize("NFKC", text).casefold())
    if text.isascii():
        return runs
    found: list[str] = []
    for run in runs:
        if _CJK_RUN.match(run):
            found += [*run, *(run[at : at + 2] for at in range(len(run) - 1))]
        else:
            found.append(run)
    return found


class BM25Index:
    """An index of texts, by BM25 (Robertson and Zaragoza, 2009) as Lucene computes it, without the factor (k1 + 1):

        score(q, d) = sum over the tokens t of q:  idf(t) * f / (f + k1 * (1 - b + b * |d| / average |d|))
        idf(t)      = ln(1 + (N - n_t + 0.5) / (n_t + 0.5))

    with f the frequency of t in d, and n_t the number of the N texts that hold t. A token that a query repeats counts
    as often. `bm25s` alone also returns texts that share no token with the query, and orders equal scores as it
    happens; here the former are left out, and the latter stand in the order of the texts.
    """

    def __init__(self, texts: Iterable[str], *, k1: float = K1, b: float = B) -> None:
        vocabulary: dict[str, int] = {}
        # One number object a token of the vocabulary, shared by all texts: a million texts stay below a gigabyte.
        corpus = [[vocabulary.setdefault(token, len(vocabulary)) for token in tokens(text)] for text in texts]
        self._index: Any = None
        if vocabulary:
            self._index = _bm25s().BM25(method="lucene", k1=k1, b=b)
            self._index.index((corpus, vocabulary), create_empty_token=False, show_progress=False)

    def save(self, folder: Path) -> None:
        """Write the index as `bm25s`' own files: arrays and JSON, no pickle. An index without a word is no file."""
        folder.mkdir(parents=True, exist_ok=True)
        if self._index is not None:
            self._index.save(folder, show_progress=False)

    @classmethod
    def load(cls, folder: Path) -> BM25Index:
        """What `save` wrote; its arrays stay on disk until they are read."""
        loaded = cls(())
        if (folder / "params.index.json").is_file():
            loaded._index = _bm25s().BM25.load(folder, mmap=True, show_progress=False)
        return loaded

    def search(
        self, queries: Sequence[str], k: int, among: numpy.typing.NDArray[numpy.bool_] | None = None
    ) -> list[list[Hit]]:
        """For each query its at most `k` best texts, best first, equal scores by lowest position; none scores zero.

        `among` tells for each text whether it may be found; none: each may.
        """
        return [self._search(query, k, among) for query in queries]

    def _search(self, query: str, k: int, among: Any) -> list[Hit]:
        import numpy

        known = self._index.get_tokens_ids(tokens(query)) if self._index is not None else []
        if not known or k < 1:
            return []
        scores = self._index.get_scores_from_ids(known)
        hits = numpy.flatnonzero(scores > 0 if among is None else (scores > 0) & among)
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
