"""The nearest vectors, exactly, block by block: memory does not grow with their number."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from alignkit.scoring.embedding import Vectors

_QUERIES = 256
_BLOCK_NUMBERS = 1 << 23
"""Numbers of a block of vectors, and of its scores: 32 MiB each."""
_DIGITS = 6
"""Cosines are compared up to here: what follows depends on the shape of the matrices that were multiplied."""


def nearest(
    queries: Vectors,
    vectors: npt.NDArray[np.floating],
    k: int,
    order: npt.NDArray[np.int64],
    among: npt.NDArray[np.bool_],
) -> list[list[tuple[int, float]]]:
    """For each query the rows of its at most `k` highest dot products, and these, best first.

    `queries` [q, d]; `vectors` [n, d], which may lie on disk and have 16 bits; `order` [n] says who is first among
    equals (lowest); `among` [n] which rows count.
    """
    found: list[list[tuple[int, float]]] = []
    for start in range(0, len(queries), _QUERIES):
        some = np.ascontiguousarray(queries[start : start + _QUERIES], dtype=np.float32)
        for rows, scores in _candidates(some, vectors, k, among):
            rounded = np.round(scores.astype(np.float64), _DIGITS)
            best = np.lexsort((order[rows], -rounded))[:k]
            found.append([(int(rows[place]), float(rounded[place])) for place in best])
    return found


def _candidates(
    queries: Vectors, vectors: npt.NDArray[np.floating], k: int, among: npt.NDArray[np.bool_]
) -> Iterator[tuple[npt.NDArray[np.int64], Vectors]]:
    """For each query all rows that may be among its best `k`, and their scores: the best, and what equals the last."""
    rows = [np.empty(0, np.int64) for _ in queries]
    scores = [np.empty(0, np.float32) for _ in queries]
    least = np.full(len(queries), np.finfo(np.float32).min, np.float32)
    size = max(1, _BLOCK_NUMBERS // max(vectors.shape[1], len(queries)))
    for start in range(0, len(vectors), size):
        counted = among[start : start + size]
        if not counted.any():
            continue
        block = queries @ np.asarray(vectors[start : start + size], dtype=np.float32).T
        block[:, ~counted] = -np.inf
        for query, products in enumerate(block):
            near = np.flatnonzero(products >= least[query])
            rows[query] = np.concatenate((rows[query], near + start))
            scores[query] = np.concatenate((scores[query], products[near]))
            if (more := len(scores[query]) - k) > 0:
                least[query] = np.partition(scores[query], more)[more] - 10.0**-_DIGITS
                kept = scores[query] >= least[query]
                rows[query], scores[query] = rows[query][kept], scores[query][kept]
    yield from zip(rows, scores, strict=True)
