"""Texts as sets of word pairs: what near-duplicates are compared by.

A text may have parts, like the question and the answer of a row; the same pair of words in two parts is two different
things. Every pair is one exact number, so nothing here depends on a hash.
"""

from __future__ import annotations

import re
import unicodedata
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from alignkit.data.words import words

Text = str | Sequence[str]
"""A text, or its parts."""
Integers = NDArray[np.int64]

_SYMBOL = re.compile(r"[+*/=<>^%$|&~#@\\×÷−√≤≥≠≈€£¥]|-(?=\s?\d)")
_CODE_BITS = 28
"""A word's number has at most so many bits: two of them and the number of the part fit into 64."""
_END = ""
"""Stands behind a text of one word, so that it makes a pair too."""


def parts_of(text: Text) -> Sequence[str]:
    """The parts of a text; one without any is its own only part."""
    return (text,) if isinstance(text, str) else text


def normalise(text: str) -> str:
    """The text with the width of characters (NFKC) and case folded, and each run of spaces made one."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


class Numbers(dict[str, int]):
    """Words -> numbers, from 0 in the order in which words are first looked up."""

    def __missing__(self, word: str) -> int:
        self[word] = number = len(self)
        return number


@dataclass(frozen=True)
class Shingles:
    """The word pairs of `n` texts with up to `p` parts, numbered from the rarest to the most frequent.

    `pairs[starts[i] : starts[i + 1]]` are those of text i, in rising order; `part_of` has the part of each pair, and
    `sizes` [n, p] how many pairs each part holds.
    """

    pairs: NDArray[np.uint32]
    starts: Integers
    part_of: NDArray[np.uint8]
    sizes: Integers


def shingles(texts: Sequence[Text]) -> Shingles:
    """The sets of word pairs of texts. A part of one word, or of none, is one pair.

    Signs like + and < are no words, yet "3 + 4" is not "3 - 4": the row of all signs in a part counts as one more pair.
    """
    numbers, codes = Numbers({_END: 0}), array("q")
    last, segment_texts, segment_parts = array("q"), array("q"), array("q")
    for row, text in enumerate(texts):
        for number, part in enumerate(parts_of(text)):
            for segment in _segments(part):
                codes.extend(map(numbers.__getitem__, segment))
                last.append(len(codes) - 1)
                segment_texts.append(row)
                segment_parts.append(number)
    if len(numbers) >= 1 << _CODE_BITS:
        raise ValueError(f"{len(numbers)} different words are more than can be numbered")
    code = np.frombuffer(codes, np.int64)
    ends = np.frombuffer(last, np.int64)
    lengths = np.diff(ends, prepend=-1) - 1  # pairs in each segment
    first = np.ones(len(code), dtype=bool)
    first[ends] = False
    begins = np.flatnonzero(first)
    owner = np.repeat(np.frombuffer(segment_parts, np.int64), lengths)
    keys = (owner << 2 * _CODE_BITS) | (code[begins] << _CODE_BITS) | code[begins + 1]
    rows = np.repeat(np.frombuffer(segment_texts, np.int64), lengths)
    return _number(keys, rows, len(texts), 1 + max(segment_parts, default=0))


def distinct(values: Integers) -> Integers:
    """The values in rising order, each once. `np.unique` hashes them first, which takes much longer."""
    ordered = np.sort(values)
    once: Integers = ordered[np.diff(ordered, prepend=ordered[:1] - 1) != 0]
    return once


def ragged_range(starts: Integers, counts: Integers) -> Integers:
    """starts[0], starts[0] + 1, ... (counts[0] of them), then those of the next, and so on."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    offsets: Integers = np.arange(total) + np.repeat(starts - ends + counts, counts)
    return offsets


def _segments(part: str) -> list[list[str]]:
    """Runs of at least two words, of which each neighbouring two make a pair."""
    found = words(part)
    segments = [found if len(found) > 1 else [found[0], _END]] if found else []
    if signs := _SYMBOL.findall(part):
        segments.append(["signs " + "".join(signs), _END])
    return segments or [["text " + normalise(part), _END]]


def _number(keys: Integers, rows: Integers, text_count: int, part_count: int) -> Shingles:
    """Number the pairs by how often they occur, and sort those of each text, each once."""
    different, inverse, times = np.unique(keys, return_inverse=True, return_counts=True)
    by_rarity = np.argsort(times, kind="stable")
    rank = np.empty(len(different), dtype=np.int64)
    rank[by_rarity] = np.arange(len(different))
    part_of = (different[by_rarity] >> 2 * _CODE_BITS).astype(np.uint8)
    held = distinct((rows << 32) | rank[inverse])
    pairs = (held & 0xFFFFFFFF).astype(np.uint32)
    cells = np.bincount((held >> 32) * part_count + part_of[pairs], minlength=text_count * part_count)
    sizes = cells.reshape(text_count, part_count)
    return Shingles(pairs, np.concatenate([[0], np.cumsum(sizes.sum(axis=1))]), part_of, sizes)
