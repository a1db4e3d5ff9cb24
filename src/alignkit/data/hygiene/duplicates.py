"""Texts that say what an earlier text says: word for word, or nearly.

Near-duplicates are found without a sketch such as MinHash, and so without its errors: two sets of which the Jaccard
similarity reaches a threshold t share one of their rarest members. If x has n members, and y shares at least t n of
them, then one of the n - ceil(t n) + 1 rarest in x is also one of the rarest in y (the prefix filter of Bayardo, Ma and
Srikant, 2007, "Scaling up all pairs similarity search"). Most texts have a few word pairs of their own, so hardly any
candidates are left; a 64-bit signature (Sandes, Teodoro and Melo, 2020, "Bitmap filter") rejects most of these, and the
rest are compared member by member.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from alignkit.data.hygiene import Match
from alignkit.data.hygiene.shingles import (
    Integers,
    Shingles,
    Text,
    distinct,
    normalise,
    parts_of,
    ragged_range,
    shingles,
)

_BLOCK = 1024
"""Texts that are looked up at a time."""
_AT_ONCE = 1 << 20
"""Candidates, or members of their sets, that are held in memory at a time."""
_ROUNDING = 1e-9


def exact_duplicates(texts: Sequence[Text]) -> list[int | None]:
    """For each text the first one that is equal to it after `normalise`, part by part; None for the first itself."""
    first: dict[str, int] = {}
    found = (first.setdefault("\n".join(map(normalise, parts_of(text))), row) for row, text in enumerate(texts))
    return [None if earlier == row else earlier for row, earlier in enumerate(found)]


def near_duplicates(texts: Sequence[Text], threshold: float = 0.8) -> list[Match | None]:
    """For each text the first one kept before it that is similar to it; None if it is kept.

    Similarity is the Jaccard index |x ∩ y| / |x ∪ y| of the sets of neighbouring words, or of neighbouring characters
    in scripts without spaces. Of texts in parts (as in `[(question, answer), ...]`) it is that of the least similar
    part, so that two questions about one long statement are no near-duplicates.

    Greedy: a text is compared only with those kept before it, so every dropped one is similar to one that stays. The
    surprise: of a short text, one changed word is much. At 0.8 texts of 20 words may differ in one.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold={threshold} must lie above 0 and not above 1")
    index = _Index(shingles(texts), threshold)
    matches: list[Match | None] = [None] * len(texts)
    for start in range(0, len(texts), _BLOCK):
        for row, match in index.look_up_and_add(start, min(start + _BLOCK, len(texts))):
            matches[row] = match
    return matches


class _Index:
    """From each rare pair to the texts kept so far that hold it."""

    def __init__(self, sets: Shingles, threshold: float) -> None:
        self.sets, self.threshold = sets, threshold
        self.signatures = _signatures(sets)
        self.buckets, self.rows, counts = _rare_pairs(sets, threshold)
        self.entry_starts = np.searchsorted(self.rows, np.arange(len(sets.sizes) + 1))
        """Where the rare pairs of a text begin in `buckets` and `rows`."""
        self.bucket_starts = np.cumsum(counts) - counts
        self.filled = np.zeros_like(counts)
        self.held = np.zeros(len(self.rows), dtype=np.int64)
        """The texts kept so far, bucket by bucket: each has room for all that may come."""

    def look_up_and_add(self, start: int, stop: int) -> list[tuple[int, Match]]:
        """Match the texts from `start` to `stop` with earlier ones, and add those without a match."""
        entries = slice(self.entry_starts[start], self.entry_starts[stop])
        buckets, rows = self.buckets[entries], self.rows[entries]
        matches: dict[int, Match] = {}
        for row, other, similarity in self._similar(rows, self.held, self.bucket_starts[buckets], self.filled[buckets]):
            matches.setdefault(row, Match(other, similarity))

        left = ~np.isin(rows, list(matches))
        by_bucket = np.argsort(buckets[left], kind="stable")
        buckets, rows = buckets[left][by_bucket], rows[left][by_bucket]
        begins = np.searchsorted(buckets, buckets)  # where the bucket of each entry begins
        before = np.arange(len(rows)) - begins
        for row, other, similarity in self._similar(rows, rows, begins, before):
            if other not in matches:
                matches.setdefault(row, Match(other, similarity))

        kept = ~np.isin(rows, list(matches))
        buckets, rows = buckets[kept], rows[kept]
        place = np.arange(len(rows)) - np.searchsorted(buckets, buckets)
        self.held[self.bucket_starts[buckets] + self.filled[buckets] + place] = rows
        np.add.at(self.filled, buckets, 1)
        return list(matches.items())

    def _similar(
        self, rows: Integers, held: Integers, starts: Integers, counts: Integers
    ) -> list[tuple[int, int, float]]:
        """Similar pairs (row, other, similarity), sorted, of each of `rows` with `held` from its start on."""
        near = [self._candidates(rows[cut], held, starts[cut], counts[cut]) for cut in _cuts(counts)]
        candidates = distinct(np.concatenate([np.empty(0, np.int64), *near]))
        found: list[tuple[int, int, float]] = []
        sizes = self.sets.sizes.sum(axis=1)
        for cut in _cuts(sizes[candidates >> 32] + sizes[candidates & 0xFFFFFFFF]):
            a, b = candidates[cut] >> 32, candidates[cut] & 0xFFFFFFFF
            similarities = _jaccard(self.sets, a, b)
            good = similarities >= self.threshold
            found += zip(a[good].tolist(), b[good].tolist(), similarities[good].tolist(), strict=True)
        return found

    def _candidates(self, rows: Integers, held: Integers, starts: Integers, counts: Integers) -> Integers:
        """Pairs (a << 32 | b) that may reach the threshold, judged by the sizes and signatures of their parts.

        J >= t means |x Δ y| <= (1 - t) / (1 + t) (|x| + |y|), and signatures differ in at most |x Δ y| bits.
        """
        a, b = np.repeat(rows, counts), held[ragged_range(starts, counts)]
        allowed = (1 - self.threshold) / (1 + self.threshold)
        for part in range(self.sets.sizes.shape[1]):
            size_a, size_b = self.sets.sizes[a, part], self.sets.sizes[b, part]
            bits = np.bitwise_count(self.signatures[a, part] ^ self.signatures[b, part])
            differing = np.maximum(bits, np.abs(size_a - size_b))
            near = differing <= allowed * (size_a + size_b) + _ROUNDING
            a, b = a[near], b[near]
        return distinct((a << 32) | b)


def _rare_pairs(sets: Shingles, threshold: float) -> tuple[Integers, Integers, Integers]:
    """(bucket, text) of each rare pair of each text, and the number of texts in each bucket.

    A bucket is a pair that is a rare one of several texts; text by text in rising order.
    """
    sizes = np.diff(sets.starts)
    rare = np.where(sizes, sizes - np.ceil(threshold * sizes - _ROUNDING).astype(np.int64) + 1, 0)
    pairs = sets.pairs[ragged_range(sets.starts[:-1], rare)]
    rows = np.repeat(np.arange(len(sizes)), rare)
    times = np.bincount(pairs, minlength=len(sets.part_of))
    shared = times[pairs] > 1
    bucket_of = np.cumsum(times > 1) - 1
    return bucket_of[pairs[shared]], rows[shared], times[times > 1]


def _signatures(sets: Shingles) -> NDArray[np.uint64]:
    """[n, p] 64 bits for each part of each text: bit b says whether the number of its pairs with hash b is odd."""
    signatures = np.zeros(sets.sizes.shape, dtype=np.uint64)
    rows = np.repeat(np.arange(len(sets.sizes)), np.diff(sets.starts))
    spread = (sets.pairs.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(58)
    np.bitwise_xor.at(signatures, (rows, sets.part_of[sets.pairs]), np.uint64(1) << spread)
    return signatures


def _jaccard(sets: Shingles, a: Integers, b: Integers) -> NDArray[np.float64]:
    """Jaccard similarity of the least similar part, for each pair of texts (a[i], b[i])."""
    members = []
    for rows in (a, b):
        counts = np.diff(sets.starts)[rows]
        owner = np.repeat(np.arange(len(rows)), counts)
        members.append((owner << 32) | sets.pairs[ragged_range(sets.starts[rows], counts)])
    every = np.sort(np.concatenate(members), kind="stable")  # merges the two, which are in order
    both = every[1:][every[1:] == every[:-1]]
    part_count = sets.sizes.shape[1]
    cells = (both >> 32) * part_count + sets.part_of[both & 0xFFFFFFFF]
    shared = np.bincount(cells, minlength=len(a) * part_count).reshape(len(a), part_count)
    union = sets.sizes[a] + sets.sizes[b] - shared
    similarities: NDArray[np.float64] = np.where(union, shared / np.maximum(union, 1), 1.0).min(axis=1)
    return similarities


def _cuts(counts: Integers) -> Iterator[slice]:
    """Consecutive slices of which the counts sum up to `_AT_ONCE` or just above."""
    ends = np.cumsum(counts)
    start = 0
    while start < len(ends):
        limit = (ends[start - 1] if start else 0) + _AT_ONCE
        stop = min(int(np.searchsorted(ends, limit)) + 1, len(ends))
        yield slice(start, stop)
        start = stop
