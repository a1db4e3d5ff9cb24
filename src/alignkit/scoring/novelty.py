"""How new a text is: ROUGE-L against everything accepted before, as in Self-Instruct, for text of any script.

The original compares words of [a-z0-9] only: two equal Chinese texts have no words in common there, and its filter
never fires. `data.words` has the words of every script, and on English those of `rouge_score`, so that decisions on
English are the same.

What makes it fast: the longest common subsequence of two texts is at most the number of words that they share. An index
from words to the texts that hold them counts, for a new text, how many of its words each old text has, and only those
are compared whose count allows an F above what is asked for, or above the best one found so far.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rapidfuzz import process
from rapidfuzz.distance import Indel, LCSseq

from alignkit.data.words import words

_FIRST_CODE, _SURROGATES, _SURROGATE_COUNT = 1, 0xD800, 0x800
_UNKNOWN = "\0"
"""Stands for every word that no text in the filter has."""
_MARGIN = 1e-5
"""By how much less than wanted a text may seem to reach and still be compared exactly. Counts are divided in single
precision, and rapidfuzz loses texts that are less than some 1e-8 above its cutoff."""
_STEP = 0.8
"""Texts are compared in groups of falling bounds, each down to this share of the highest bound in it."""
_COMMON_SHARE = 1 / 32
"""An occurrence of a word that more of the texts hold is common."""
_FIRST_CAPACITY = 1024


@dataclass(frozen=True)
class Match:
    """A text in the filter, by its label, and how similar it is (ROUGE-L F, 0 to 1)."""

    label: str
    similarity: float


def rouge_l_f(a: Sequence[str], b: Sequence[str]) -> float:
    """ROUGE-L F of two word sequences (Lin, 2004, equation 4 with beta = 1): F = 2PR / (P + R), P = L/|b|, R = L/|a|.

    L is the length of the longest common subsequence. Equal to 2L / (|a| + |b|) but for the last digit, which decides
    at the threshold: it is computed in this order because `rouge_score` does.
    """
    common = LCSseq.similarity(a, b)
    if not common:
        return 0.0
    precision, recall = common / len(b), common / len(a)
    return 2 * precision * recall / (precision + recall)


def word_code(number: int) -> str:
    """The character that stands for the word of this number, from 0, so that a text is a string and comparing is fast.

    Surrogates and "\\0" are left out.
    """
    code = _FIRST_CODE + number
    return chr(code if code < _SURROGATES else code + _SURROGATE_COUNT)


_Occurrence = tuple[str, int]
"""A word and its how-manieth occurrence in a text it is: as many of them are shared as words, repetitions counted."""


def _occurrences(encoded: str) -> list[_Occurrence]:
    times: Counter[str] = Counter()
    found = []
    for word in encoded:
        times[word] += 1
        found.append((word, times[word]))
    return found


class NoveltyFilter:
    """Texts accepted so far. A text is not new when its ROUGE-L F with one of them exceeds `threshold`.

    Self-Instruct uses 0.7. The surprise: an exact repetition is never new, whatever the threshold, and even if it holds
    no word.
    """

    def __init__(self, threshold: float = 0.7) -> None:
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold={threshold} must lie above 0 and not above 1")
        self.threshold = threshold
        self._labels: list[str] = []
        self._exact: dict[str, int] = {}
        self._codes: dict[str, str] = {}
        """Word -> its `word_code`."""
        self._encoded: list[str] = []
        self._lengths = np.zeros(_FIRST_CAPACITY, dtype=np.float32)
        self._holders: dict[_Occurrence, array[int]] = {}
        """Positions of the texts that hold an occurrence."""
        self._common: dict[_Occurrence, int] = {}
        """Occurrence that many texts hold -> its row in `_held`, where it is counted faster."""
        self._held = np.zeros((0, _FIRST_CAPACITY), dtype=np.uint8)
        """1 where a text (column) holds a common occurrence (row)."""

    def __len__(self) -> int:
        return len(self._labels)

    def add(self, text: str, label: str | None = None) -> None:
        """Accept a text under a label by which matches name it; without one its number, from 0."""
        position = len(self)
        if position == len(self._lengths):
            self._grow()
        encoded = "".join(self._codes.get(word) or self._new_code(word) for word in words(text))
        self._exact.setdefault(text.strip(), position)
        self._labels.append(str(position) if label is None else label)
        self._encoded.append(encoded)
        self._lengths[position] = len(encoded)
        for occurrence in _occurrences(encoded):
            if (row := self._common.get(occurrence)) is not None:
                self._held[row, position] = 1
            else:
                self._holders.setdefault(occurrence, array("q")).append(position)

    def most_similar(self, text: str) -> Match | None:
        """The text that blocks `text`, the most similar one if there are several; None when `text` is new."""
        if (exact := self._exact.get(text.strip())) is not None:
            return Match(self._labels[exact], 1.0)
        position, similarity = self._nearest(text, self.threshold)
        return Match(self._labels[position], similarity) if similarity > self.threshold else None

    def max_similarity(self, text: str) -> float:
        """The highest ROUGE-L F of `text` with any text accepted, exact below the threshold too; 0 when there is none.

        `most_similar` is faster where it only matters whether the threshold is exceeded.
        """
        return 1.0 if text.strip() in self._exact else self._nearest(text, 0.0)[1]

    def _nearest(self, text: str, floor: float) -> tuple[int, float]:
        """Position and F of the most similar text, if its F reaches `floor`; else those of any text, or (-1, 0)."""
        query = "".join(self._codes.get(word, _UNKNOWN) for word in words(text))
        nearest, best = -1, 0.0
        if not query or not self._encoded:
            return nearest, best
        bounds = self._bounds(query)
        compared = float(bounds.max()) + _MARGIN
        while compared > max(best, floor, _MARGIN):
            reach = max(best, floor, _STEP * compared) - _MARGIN
            positions = np.flatnonzero((bounds >= reach) & (bounds < compared)).tolist()
            texts = [self._encoded[position] for position in positions]
            # Indel similarity is 2L / (m + n), and the highest come first: the last digit decides between equal ones.
            cutoff = max(best, floor, _MARGIN) - _MARGIN
            near = process.extract(query, texts, scorer=Indel.normalized_similarity, score_cutoff=cutoff, limit=None)
            for encoded, rounded, index in near:
                if rounded < best - _MARGIN:
                    break
                if (similarity := rouge_l_f(query, encoded)) > best:
                    nearest, best = positions[index], similarity
            compared = reach
        return nearest, best

    def _bounds(self, query: str) -> NDArray[np.float32]:
        """An upper bound of the F of `query` with each text: 2S / (m + n), where S >= L counts the words they share."""
        occurrences = _occurrences(query)
        holders = [self._holders[each] for each in occurrences if each in self._holders]
        positions = np.concatenate([np.frombuffer(each, np.int64) for each in holders] or [np.empty(0, np.int64)])
        count_type: Any = np.uint8 if len(query) < 256 else np.uint32
        shared: NDArray[Any] = np.bincount(positions, minlength=len(self)).astype(count_type)
        held = self._held[:, : len(self)]
        for occurrence in occurrences:
            if (row := self._common.get(occurrence)) is not None:
                shared += held[row]
        bounds: NDArray[np.float32] = shared / ((self._lengths[: len(self)] + np.float32(len(query))) / np.float32(2))
        return bounds

    def _grow(self) -> None:
        """Make room for as many texts again, and see which occurrences have become common."""
        capacity = 2 * len(self._lengths)
        found = [each for each, holders in self._holders.items() if len(holders) > _COMMON_SHARE * len(self)]
        held = np.zeros((len(self._common) + len(found), capacity), dtype=np.uint8)
        held[: len(self._common), : len(self)] = self._held
        for occurrence in found:
            self._common[occurrence] = row = len(self._common)
            held[row, np.frombuffer(self._holders.pop(occurrence), dtype=np.int64)] = 1
        self._held = held
        self._lengths = np.resize(self._lengths, capacity)

    def _new_code(self, word: str) -> str:
        return self._codes.setdefault(word, word_code(len(self._codes)))
