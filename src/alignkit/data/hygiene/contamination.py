"""Rows that give away what the evaluation asks: runs of words that stand in both.

The n-grams of GPT-3 (Brown et al., 2020, arXiv 2005.14165, appendix C: 13 words, fewer in short texts), with two
differences. One shared n-gram is no evidence when it belongs to a template, so n-grams that stand in several evaluation
texts do not count, and of the others a share must be found. And a statement about which many questions are asked does
not give one of them away, so every part of an evaluation row must be found in the same text.
"""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from alignkit.data.hygiene import Match
from alignkit.data.hygiene.shingles import Integers, Numbers, Text, distinct, parts_of
from alignkit.data.words import words

SHORTEST = 8
"""An evaluation text of fewer words in all is not looked for inside others: "Write a poem" is no secret."""

_BLOCK = 20_000
"""Texts that are looked up at a time."""
_UNKNOWN = 0
"""The number of all words that no evaluation text has."""
_Hashes = NDArray[np.uint64]


def contaminated(
    texts: Sequence[Text], evaluation_texts: Sequence[Text], length: int = 13, share: float = 0.5
) -> list[Match | None]:
    """For each text the evaluation text that it holds most of, and how much; None when it holds too little of any.

    An evaluation text may have parts, as in `(statement, question)`, which must all be found in the text, wherever
    that is split itself. A part is found when the text holds at least `share` of its n-grams of `length` words; a
    shorter part is one n-gram. Evaluation texts of fewer than `SHORTEST` words, and parts without an n-gram of their
    own, must be equal to a part of the text. The share of the part found least is the similarity.
    """
    if length < 1 or not 0 < share <= 1:
        raise ValueError(f"length={length} must be at least 1, and share={share} above 0 and not above 1")
    evaluation = _Evaluation(evaluation_texts, length)
    matches: list[Match | None] = []
    for start in range(0, len(texts), _BLOCK):
        matches += evaluation.look_up(texts[start : start + _BLOCK], share)
    return matches


@dataclass(frozen=True)
class _Grams:
    """N-grams of one length that stand in one evaluation part only, by rising hash, and the part of each."""

    hashes: _Hashes
    parts: Integers


class _Evaluation:
    """The different parts of the evaluation texts, and where to find them."""

    def __init__(self, texts: Sequence[Text], length: int) -> None:
        self.part_of: dict[str, int] = {}
        """Words of a part, with spaces between -> its number."""
        self.rows = [self._add_parts(text) for text in texts]
        """For each evaluation text the numbers of its parts that have words."""
        self.word_counts = [part.count(" ") + 1 for part in self.part_of]
        self.numbers = Numbers({"": _UNKNOWN})
        self.grams = self._number_grams(length)
        self.gram_counts = np.zeros(len(self.part_of), dtype=np.int64)
        for grams in self.grams.values():
            np.add.at(self.gram_counts, grams.parts, 1)
        self.rows_by_part = self._key_parts()

    def look_up(self, texts: Sequence[Text], share: float) -> list[Match | None]:
        """Match each text with the evaluation text that it holds most of."""
        numbers, starts = array("q"), [0]
        whole: list[set[int]] = []
        for text in texts:
            found = [words(part) for part in parts_of(text)]
            for part in found:
                numbers.extend(self.numbers.get(word, _UNKNOWN) for word in part)
            starts.append(len(numbers))
            equal = (self.part_of.get(" ".join(part)) for part in found)
            whole.append({part for part in equal if part is not None})
        shares = self._shares(np.frombuffer(numbers, np.int64), np.array(starts), share)
        return [self._best(shares.get(row, {}), parts) for row, parts in enumerate(whole)]

    def _add_parts(self, text: Text) -> tuple[int, ...]:
        found = (" ".join(words(part)) for part in parts_of(text))
        return tuple({self.part_of.setdefault(part, len(self.part_of)): None for part in found if part})

    def _number_grams(self, length: int) -> dict[int, _Grams]:
        """The n-grams of all parts by n, without those that stand in several."""
        parts: dict[int, list[int]] = defaultdict(list)
        hashes: dict[int, list[_Hashes]] = defaultdict(list)
        for number, part in enumerate(self.part_of):
            coded = np.array([self.numbers[word] for word in part.split(" ")])
            n = min(length, len(coded))
            found = np.unique(_gram_hashes(coded, n))
            hashes[n].append(found)
            parts[n] += [number] * len(found)
        return {n: _only_once(np.concatenate(hashes[n]), np.array(parts[n])) for n in hashes}

    def _key_parts(self) -> Mapping[int, list[int]]:
        """Part -> the evaluation texts that are looked at when it is found: it is the rarest of their parts."""
        times = Counter(part for row in self.rows for part in row)
        rows_by_part: dict[int, list[int]] = defaultdict(list)
        for row, parts in enumerate(self.rows):
            if parts:
                rows_by_part[min(parts, key=lambda part: (times[part], -self.word_counts[part]))].append(row)
        return rows_by_part

    def _shares(self, numbers: Integers, starts: Integers, least: float) -> dict[int, dict[int, float]]:
        """Text -> evaluation part -> share of its n-grams in the text, if at least `least`."""
        row_of = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
        hits = [np.empty((0, 2), np.int64)]
        for n, grams in self.grams.items():
            if len(grams.hashes) and len(numbers) >= n:
                hits.append(_found(numbers, row_of, n, grams))
        rows, parts = np.concatenate(hits).T
        pairs, counts = np.unique((rows << 32) | parts, return_counts=True)
        shares = counts / self.gram_counts[pairs & 0xFFFFFFFF]
        by_row: dict[int, dict[int, float]] = defaultdict(dict)
        for pair, part_share in zip(pairs[shares >= least].tolist(), shares[shares >= least].tolist(), strict=True):
            by_row[pair >> 32][pair & 0xFFFFFFFF] = part_share
        return by_row

    def _best(self, shares: Mapping[int, float], whole: Iterable[int]) -> Match | None:
        """The evaluation text of which all parts are found, the most of it if there are several."""
        equal = dict.fromkeys(whole, 1.0)
        best: Match | None = None
        for key in sorted({*shares, *equal}):
            for row in self.rows_by_part.get(key, ()):
                parts = self.rows[row]
                short = sum(self.word_counts[part] for part in parts) < SHORTEST
                found = equal if short else {**shares, **equal}
                similarity = min(found.get(part, 0.0) for part in parts)
                if similarity and (best is None or (similarity, -row) > (best.similarity, -best.row)):
                    best = Match(row, similarity)
        return best


def _gram_hashes(numbers: Integers, n: int) -> _Hashes:
    """A 64-bit hash of every run of n numbers: polynomial, over numbers that were spread by a multiplication first."""
    spread = (numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    spread ^= spread >> np.uint64(29)
    count = len(numbers) - n + 1
    hashes = np.zeros(count, dtype=np.uint64)
    for offset in range(n):
        hashes = hashes * np.uint64(0xBF58476D1CE4E5B9) + spread[offset : offset + count]
    return hashes


def _only_once(hashes: _Hashes, parts: Integers) -> _Grams:
    different, first, times = np.unique(hashes, return_index=True, return_counts=True)
    return _Grams(different[times == 1], parts[first[times == 1]])


def _found(numbers: Integers, row_of: Integers, n: int, grams: _Grams) -> Integers:
    """[h, 2] the text, and the evaluation part, of each different n-gram in it that stands in one."""
    unknown = np.concatenate([[0], np.cumsum(numbers == _UNKNOWN)])
    inside = (unknown[n:] == unknown[:-n]) & (row_of[n - 1 :] == row_of[: len(row_of) - n + 1])
    starts = np.flatnonzero(inside)
    hashes = _gram_hashes(numbers, n)[starts]
    place = np.minimum(np.searchsorted(grams.hashes, hashes), len(grams.hashes) - 1)
    known = grams.hashes[place] == hashes
    pairs = distinct((row_of[starts[known]] << 32) | place[known])
    return np.stack([pairs >> 32, grams.parts[pairs & 0xFFFFFFFF]], axis=1)
