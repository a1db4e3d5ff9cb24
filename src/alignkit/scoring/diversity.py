"""Choose rows that cover a set of texts: an embedding that needs no model, and greedy k-center selection on it."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]
Indices = npt.NDArray[np.intp]

_NGRAM_LENGTHS = (2, 3, 4)
_BUCKETS = 1 << 18
_NONZEROS = 8
_BLOCK_ROWS = 1024


def character_embeddings(texts: Sequence[str], dimensions: int = 256) -> npt.NDArray[np.float32]:
    """Embed texts by their character n-grams: float32 [len(texts), dimensions], rows of length 1.

    Counts of 2- to 4-grams (case and Unicode width folded) are hashed into 2^18 buckets, weighted by
    (1 + log count) * (1 + log((1 + texts) / (1 + texts with it))), and brought down by a sparse random projection (Kane
    and Nelson, 2014, arXiv 1012.1577) whose entries are hashes: no model, no download, the same on every machine.
    Cosines of the weighted counts are kept to within about 1 / sqrt(dimensions). A text without characters is all
    zeros. The surprise: a weight depends on all texts given, so embeddings of two calls cannot be compared.
    """
    counts = _ngram_counts(texts)
    rarity = np.log((1 + len(texts)) / (1 + np.bincount(counts.indices, minlength=_BUCKETS))) + 1
    counts.data = (1 + np.log(counts.data)) * rarity[counts.indices]
    used, counts.indices = np.unique(counts.indices, return_inverse=True)
    counts.resize((len(texts), max(len(used), 1)))
    projected = np.asarray((counts @ _projection(used, dimensions)).todense())
    lengths = np.linalg.norm(projected, axis=1, keepdims=True)
    return np.asarray(projected / np.where(lengths > 0, lengths, 1), dtype=np.float32)


def k_center_greedy(embeddings: Floats, k: int, first: int = 0) -> Indices:
    """Row numbers of up to `k` centres, each the row farthest from all before it (Gonzalez, 1985); starts at `first`.

    `embeddings` is [n, d]; distances are Euclidean, computed in float64; ties go to the lowest row number; O(n k d).
    Raises `ValueError` for numbers that are not finite and for `k` or `first` out of range. The surprise: the result
    is shorter than `k` when every row that is left is a copy of a chosen one, since a copy covers nothing.
    """
    rows = np.ascontiguousarray(embeddings, dtype=np.float64)
    if rows.ndim != 2 or not np.isfinite(rows).all():
        raise ValueError("embeddings must be a matrix of finite numbers")
    if not 1 <= k <= len(rows) or not 0 <= first < len(rows):
        raise ValueError(f"k={k} and first={first} must lie within the {len(rows)} rows")
    centres = [first]
    nearest = _squared_distances(rows, rows[first])
    while len(centres) < k:
        farthest = int(nearest.argmax())
        if nearest[farthest] == 0:
            break
        centres.append(farthest)
        np.minimum(nearest, _squared_distances(rows, rows[farthest]), out=nearest)
    return np.array(centres, dtype=np.intp)


def nearest_centres(embeddings: Floats, centres: Indices) -> tuple[Indices, Floats]:
    """For each row the position in `centres` of its nearest centre (the first of equals), and its distance from it.

    The largest of the distances is the coverage radius. Distances are exact to about 1e-7 for rows of length 1.
    """
    rows = np.asarray(embeddings, dtype=np.float64)
    chosen = rows[centres]
    squares = np.einsum("ij,ij->i", chosen, chosen)
    positions, distances = [], []
    for start in range(0, len(rows), _BLOCK_ROWS):
        block = rows[start : start + _BLOCK_ROWS]
        squared = np.einsum("ij,ij->i", block, block)[:, None] - 2 * block @ chosen.T + squares
        position = squared.argmin(axis=1)
        positions.append(position)
        distances.append(np.sqrt(np.maximum(squared[np.arange(len(block)), position], 0)))
    return np.concatenate(positions), np.concatenate(distances)


def _squared_distances(rows: Floats, point: Floats) -> Floats:
    """Squared distance of each row from `point`, by differences: a copy of the point is at exactly zero."""
    squared = np.empty(len(rows))
    buffer = np.empty((min(_BLOCK_ROWS, len(rows)), rows.shape[1]))
    for start in range(0, len(rows), _BLOCK_ROWS):
        block = rows[start : start + _BLOCK_ROWS]
        difference = np.subtract(block, point, out=buffer[: len(block)])
        squared[start : start + len(block)] = np.einsum("ij,ij->i", difference, difference)
    return squared


def _ngram_counts(texts: Sequence[str]) -> Any:
    """Sparse float64 matrix [len(texts), 2^18] of hashed n-gram counts."""
    from scipy.sparse import csr_matrix

    columns, values, ends = [], [], [0]
    for text in texts:
        found, count = np.unique(_ngram_buckets(text), return_counts=True)
        columns.append(found)
        values.append(count)
        ends.append(ends[-1] + len(found))
    data = np.concatenate([np.empty(0), *values]).astype(np.float64)
    indices = np.concatenate([np.empty(0, np.int64), *columns]).astype(np.int64)
    return csr_matrix((data, indices, np.array(ends)), shape=(len(texts), _BUCKETS))


def _ngram_buckets(text: str) -> npt.NDArray[np.int64]:
    """The bucket of each character n-gram of a text, spaces squeezed and added at both ends."""
    folded = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    if not folded:
        return np.empty(0, np.int64)
    codes = np.frombuffer(f" {folded} ".encode("utf-32-le", "surrogatepass"), dtype="<u4").astype(np.uint64)
    hashed = []
    for length in _NGRAM_LENGTHS:
        windows = np.lib.stride_tricks.sliding_window_view(codes, length) if len(codes) >= length else codes[:0, None]
        value = np.full(len(windows), length, np.uint64)
        for column in windows.T:
            value = _scramble(value * np.uint64(1_000_003) + column)
        hashed.append(value % np.uint64(_BUCKETS))
    return np.concatenate(hashed).astype(np.int64)


def _projection(buckets: npt.NDArray[np.int64], dimensions: int) -> Any:
    """Sparse matrix [buckets, dimensions]: eight entries of +-1 / sqrt(8) a row, at places hashed from the bucket."""
    from scipy.sparse import csr_matrix

    keys = buckets.astype(np.uint64)[:, None] * np.uint64(_NONZEROS) + np.arange(_NONZEROS, dtype=np.uint64)
    hashed = _scramble((keys + np.uint64(1)).astype(np.uint64))
    places = (hashed % np.uint64(dimensions)).astype(np.int64)
    signs = np.where(hashed >> np.uint64(63) == 1, 1.0, -1.0) / np.sqrt(_NONZEROS)
    shape = (max(len(buckets), 1), dimensions)
    rows = np.repeat(np.arange(len(buckets)), _NONZEROS)
    return csr_matrix((signs.ravel(), (rows, places.ravel())), shape=shape)


def _scramble(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Mix the bits of 64-bit numbers (SplitMix64; Steele et al., 2014)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(values ^ (values >> np.uint64(31)))
