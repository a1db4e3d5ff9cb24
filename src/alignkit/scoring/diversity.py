"""Choose rows that cover a set of texts: greedy k-center selection on their embeddings, exact in every pick.

How it is fast (`_Search`). The distance of a row from its nearest centre only falls while centres are added, so a value
that has not been compared with the newest centres is an upper bound. Only rows with high bounds can be the next centre;
all others may wait, and when their turn comes they are compared with all centres they missed in one matrix product,
which a processor does several times faster than one centre at a time. The products are float32. How far they can be
wrong is known (Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 3.1); where that much could change
the choice, the few rows in question are compared by differences in float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]
Indices = npt.NDArray[np.intp]
_Float32 = npt.NDArray[np.float32]
_Float64 = npt.NDArray[np.float64]
_Int32 = npt.NDArray[np.int32]

_POOL_ROWS = 256
_REFRESHED_ROWS = 4096
_BLOCK_ROWS = 512
_BLOCK_CENTRES = 256
_BLOCK_PAIRS = 1024
"""Sizes at which all that one step works on fits the second-level cache; no result depends on them."""

_UNIT = 2.0**-24
"""Largest relative error of one rounding to float32."""

_LARGEST_SQUARE = 1e36
"""Squared length beyond which float32 distances may overflow."""


@dataclass(frozen=True)
class Cover:
    """Centres in the order of their choice, and how well the rows are covered after each.

    `radii[i]` is the largest distance of any row from its nearest centre, once the first i + 1 of `centres` have joined
    the rows that were centres already (as the last pick has it, with `compat`: to within float32). It never grows.
    """

    centres: Indices
    radii: _Float64


def k_center_greedy(embeddings: Floats, k: int, first: int = 0, *, compat: bool = False) -> Indices:
    """Row numbers of up to `k` centres, each the row farthest from all before it (Gonzalez, 1985); starts at `first`.

    `embeddings` is [n, d]; distances are Euclidean; ties go to the lowest row number. Every pick is that of the
    definition worked out in float64; see `k_center` for `compat`, errors, and the result that is shorter than `k`.
    """
    return k_center(embeddings, k=k, first=first, compat=compat).centres


def k_center(
    embeddings: Floats,
    *,
    k: int | None = None,
    radius: float | None = None,
    first: int = 0,
    chosen: Indices | None = None,
    compat: bool = False,
) -> Cover:
    """Add the row farthest from all centres, until there are `k` new ones or no row is farther away than `radius`.

    `embeddings` is [n, d], float16, float32 or float64, in memory or memory-mapped: it is read in blocks, and some 40
    bytes a row are needed beside it. `chosen` are rows that are centres already (`first` is not used then). `compat`
    compares distances as rounded to float32, which is how scikit-learn's `euclidean_distances` gives them for float32
    rows, and so makes the picks of the code released with MoDS. The number of threads changes nothing. Raises
    `ValueError` for numbers that are not finite, and for `k`, `radius`, `first` or `chosen` out of range. The
    surprise: there are fewer than `k` centres when every row left is a copy of one, since a copy covers nothing.
    """
    rows = _matrix(embeddings)
    known = [] if chosen is None else [int(row) for row in chosen]
    if k is None and radius is None:
        raise ValueError("k_center needs k, radius, or both")
    if any(not 0 <= row < len(rows) for row in (first, *known)) or (k is not None and not 1 <= k <= len(rows)):
        raise ValueError(f"k={k}, first={first} and all of chosen must lie within the {len(rows)} rows")
    if radius is not None and not radius >= 0:
        raise ValueError(f"radius={radius} must be 0 or more")
    search = _Search(rows, known or [first], (radius or 0.0) ** 2 * (1 + 4 * np.finfo(np.float64).eps), compat)
    picked, covered = [] if known else [first], False
    for row, squared in search.farthest_rows():
        picked.append(row)  # the last one is no centre: it says how far the centres reach
        covered = squared <= search.covered or len(picked) - 1 == k
        if covered:
            break
    squares = search.squares_when_picked(picked, len(known))
    radii = np.minimum.accumulate(np.sqrt(np.append(squares, 0.0))[1:])
    count = len(picked) - covered
    return Cover(np.array(picked[:count], dtype=np.intp), radii[:count])


def extend_cover(embeddings: Floats, chosen: Sequence[int], candidates: Sequence[int], k: int) -> list[int]:
    """`chosen`, and after them candidates by k-center until there are `k` or only copies are left.

    All are row numbers; a candidate that is chosen already is not chosen again.
    """
    rows = [*chosen, *sorted(set(candidates) - set(chosen))]
    room = min(k, len(rows)) - len(chosen)
    if room < 1:
        return list(chosen)
    found = k_center(np.asarray(embeddings)[rows], k=room, chosen=np.arange(len(chosen)))
    return [*chosen, *(rows[place] for place in found.centres)]


def nearest_centres(embeddings: Floats, centres: Indices) -> tuple[Indices, Floats]:
    """For each row the position in `centres` of its nearest centre (the first of equals), and its distance from it.

    The largest of the distances is the coverage radius. Distances are float64 and exact to rounding; rows are read in
    blocks, as by `k_center`.
    """
    if not len(centres):
        raise ValueError("there is no centre")
    search = _Search(_matrix(embeddings), [int(row) for row in centres])
    positions, squares = np.empty(len(search.rows), np.intp), np.empty(len(search.rows))
    for block in _blocks(np.arange(len(search.rows))):
        squares[block], positions[block] = search.nearest(block, 0, search.count)
    return positions, np.sqrt(squares)


class _Search:
    """Squared distances of all rows from their nearest centres while centres are added: as bounds, and exact."""

    def __init__(self, rows: Floats, centres: Sequence[int], covered: float = 0.0, compat: bool = False) -> None:
        self.rows, self.covered, self.compat = rows, covered, compat
        self.middle = _middle(rows)
        self.squares, largest = self._squared_lengths()
        count, dimensions = rows.shape
        self.error, self.tie = _error_bounds(dimensions, largest, compat)
        self.bounds: _Float32 = np.full(count, np.inf, np.float32)
        self.compared: _Int32 = np.zeros(count, np.int32)
        self.exact_squares: _Float64 = np.full(count, np.inf)
        self.exactly_compared: _Int32 = np.zeros(count, np.int32)
        self.count = 0
        self.centres: Indices = np.empty(64, np.intp)
        self.doubled: _Float32 = np.empty((64, dimensions), np.float32)
        self.centre_squares: _Float32 = np.empty(64, np.float32)
        for row in centres:
            self._add(row)

    def farthest_rows(self) -> Iterator[tuple[int, float]]:
        """The row farthest from all centres, and its squared distance; it becomes a centre when the next is asked for.

        The distance is exact where it is at most `covered`. Ends when all rows are centres.
        """
        while True:
            pool, outside = self._pool()
            if self.bounds[pool].max(initial=-np.inf) > outside + self.tie:
                yield from self._farthest_in_pool(pool, outside)
            elif self.bounds.max() > -np.inf:
                row, squared = self._decide(self._highest_rows())
                yield row, squared
                self._add(row)
            else:
                return

    def _pool(self) -> tuple[Indices, float]:
        """Rows up to date with all centres, in order, that have the highest bounds, and the bound of all others."""
        size = _REFRESHED_ROWS if np.isfinite(self.bounds.max()) else len(self.bounds)
        while True:
            size = min(size, len(self.bounds))
            order = np.argpartition(self.bounds, len(self.bounds) - size)
            top, others = np.sort(order[-size:]), order[:-size]
            outside = float(self.bounds[others].max(initial=-np.inf))
            level = self._refresh(top, outside, _POOL_ROWS)
            pool = top[self.bounds[top] > level]
            if len(pool) >= _POOL_ROWS // 2 or level > outside or not len(others):
                return pool, level
            size *= 4

    def _refresh(self, indices: Indices, level: float, enough: int) -> float:
        """Bring bounds up to date, but drop a row once its bound is `level` or less; `enough` rows up to date raise it.

        Returns the level at the end: each of `indices` with a higher bound is up to date.
        """
        best = self.bounds[indices[self.compared[indices] == self.count]]
        for start, block in self._behind(indices, self.compared):
            rows = self._read(block)
            while start < self.count and len(block):
                stop = min((start // _BLOCK_CENTRES + 1) * _BLOCK_CENTRES, self.count)
                products = rows @ self.doubled[start:stop].T
                products += self.centre_squares[start:stop]
                squared = np.maximum(products.min(axis=1) + self.squares[block], 0)
                self.bounds[block] = np.minimum(self.bounds[block], squared)
                self.compared[block] = start = stop
                high = self.bounds[block] > level
                if 2 * np.count_nonzero(high) < len(block):
                    rows, block = rows[high], block[high]
            best = np.concatenate([best, self.bounds[block]])
            if len(best) >= enough:
                best = np.partition(best, len(best) - enough)[len(best) - enough :]
                level = max(level, float(best[0]))
        return level

    def _farthest_in_pool(self, pool: Indices, outside: float) -> Iterator[tuple[int, float]]:
        """Ordinary greedy selection, one product with each new centre, while no row outside the pool can be next."""
        rows = np.concatenate([self._read(block) for block in _blocks(pool)])
        squares, bounds = self.squares[pool], self.bounds[pool]
        while (highest := float(bounds.max())) > outside + self.tie:
            tied = np.flatnonzero(bounds >= highest - self.tie)
            if len(tied) == 1 and highest > self.covered + self.error:
                row, squared = int(pool[tied[0]]), highest
            else:
                row, squared = self._decide(pool[tied])
            yield row, squared
            self._add(row)
            products = rows @ self.doubled[self.count - 1]
            products += self.centre_squares[self.count - 1] + squares
            np.minimum(bounds, np.maximum(products, 0, out=products), out=bounds)
            bounds[np.searchsorted(pool, row)] = -np.inf
        self.bounds[pool] = bounds
        self.compared[pool] = self.count

    def _highest_rows(self) -> Indices:
        """All rows, up to date, that may be the farthest: for when more of them tie than a pool holds."""
        while True:
            tied = np.flatnonzero(self.bounds >= self.bounds.max() - self.tie)
            if (self.compared[tied] == self.count).all():
                return tied
            self._refresh(tied, -np.inf, len(tied))

    def _decide(self, candidates: Indices) -> tuple[int, float]:
        """The farthest of rows that float32 cannot tell apart, and its squared distance: the lowest row of equals."""
        for start, block in self._behind(candidates, self.exactly_compared):
            squared, _ = self.nearest(block, start, self.count)
            self.exact_squares[block] = np.minimum(self.exact_squares[block], squared)
            self.exactly_compared[block] = self.count
        squares = self.exact_squares[candidates]
        keys = np.sqrt(squares.astype(np.float32)) if self.compat else squares
        best = int(np.where(squares > 0, keys, -1).argmax())
        return int(candidates[best]), float(squares.max())

    def nearest(self, block: Indices, start: int, stop: int, before: Indices | None = None) -> tuple[_Float64, Indices]:
        """Exact squared distances of a block of rows from the nearest of centres start to stop, and which those are.

        By differences in float64, for all centres that may be the nearest as far as float32 products can tell. With
        `before`, row i of the block is compared with the first `before[i]` centres only.
        """
        products = self.doubled[start:stop] @ self._read(block).T
        products += self.centre_squares[start:stop, None]
        if before is not None:
            products[np.arange(start, stop)[:, None] >= before] = np.inf
        centre, row = (products <= products.min(axis=0) + np.float32(2 * self.error)).nonzero()
        found = np.empty(len(row))
        for pairs in _blocks(np.arange(len(row)), _BLOCK_PAIRS):
            points = self.rows[block[row[pairs]]].astype(np.float64, order="C")
            points -= self.rows[self.centres[start + centre[pairs]]]
            found[pairs] = np.einsum("ij,ij->i", points, points)
        squared, position = np.full(len(block), np.inf), np.zeros(len(block), np.intp)
        np.minimum.at(squared, row, found)
        nearest = np.flatnonzero(found == squared[row])[::-1]
        position[row[nearest]] = start + centre[nearest]  # written last, the first of equals stays
        return squared, position

    def squares_when_picked(self, picked: Sequence[int], known: int) -> _Float64:
        """For each of the rows picked, its exact squared distance from the `known` centres and those picked before."""
        rows, before = np.array(picked, dtype=np.intp), known + np.arange(len(picked))
        squares = np.full(len(rows), np.inf)
        for block in _blocks(np.flatnonzero(before > 0)):
            squares[block], _ = self.nearest(rows[block], 0, int(before[block].max()), before[block])
        return squares

    def _add(self, row: int) -> None:
        """Make a row a centre."""
        if self.count == len(self.centres):
            self.centres = np.concatenate([self.centres, np.empty_like(self.centres)])
            self.doubled = np.concatenate([self.doubled, np.empty_like(self.doubled)])
            self.centre_squares = np.concatenate([self.centre_squares, np.empty_like(self.centre_squares)])
        self.centres[self.count] = row
        self.doubled[self.count] = -2 * self._read(np.array([row]))[0]
        self.centre_squares[self.count] = self.squares[row]
        self.bounds[row] = -np.inf
        self.count += 1

    def _behind(self, indices: Indices, compared: _Int32) -> Iterator[tuple[int, Indices]]:
        """Blocks of the rows that lack some centres, and the first centre they lack."""
        lacking = compared[indices]
        for start in np.unique(lacking[lacking < self.count]).tolist():
            for block in _blocks(indices[lacking == start]):
                yield start, block

    def _read(self, indices: Indices | slice) -> _Float32:
        """Rows as float32, moved so that the middle of all rows is near the origin: less is lost to rounding there."""
        rows = self.rows[indices]
        if self.middle is not None:
            rows = rows - self.middle
        return rows.astype(np.float32, order="C", copy=False)

    def _squared_lengths(self) -> tuple[_Float32, float]:
        """Squared length of each row as `_read` gives it, and the largest."""
        squares, largest = np.empty(len(self.rows), np.float32), 0.0
        for start in range(0, len(self.rows), _BLOCK_ROWS):
            rows = self._read(slice(start, start + _BLOCK_ROWS))
            found = np.einsum("ij,ij->i", rows, rows, dtype=np.float64)
            unusable = ~(found < _LARGEST_SQUARE)
            if unusable.any():
                row = start + int(unusable.argmax())
                raise ValueError(f"row {row} of the embeddings must be finite, and shorter than 1e18")
            squares[start : start + len(rows)] = found
            largest = max(largest, float(found.max()))
        return squares, largest


def _error_bounds(dimensions: int, largest: float, compat: bool) -> tuple[float, float]:
    """How far a float32 squared distance can be from the true one, and how close two must be for a closer look.

    With u = 2^-24, R^2 the largest squared length, and gamma = (d + 1) u / (1 - (d + 1) u): a product of two rows is
    off by at most gamma R^2 in whatever order it is summed, and counts twice. All other roundings together stay below
    40 u R^2 (reading rows 8, squared lengths 2, sums 8, comparisons 8). `compat` adds 24 u R^2: squares, at most 4 R^2,
    that differ by up to 6 u of themselves may have equal float32 roots. The last term stands for underflow.
    """
    gamma = (dimensions + 1) * _UNIT / (1 - (dimensions + 1) * _UNIT)
    error = (2 * gamma + 40 * _UNIT) * largest + (dimensions + 4) * 2.0**-120
    return error, 2 * error + (24 * _UNIT * largest if compat else 0.0)


def _middle(rows: Floats) -> Floats | None:
    """The mean of some rows spread over all, where it is far from the origin as compared with them, or None."""
    sample = np.asarray(rows[:: max(len(rows) // 256, 1)], dtype=np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        middle = sample.mean(axis=0)
        far = 2 * (middle**2).sum() > (sample**2).sum(axis=1).mean()
    usable = far and np.isfinite(middle).all()
    return middle.astype(np.promote_types(rows.dtype, np.float32)) if usable else None


def _matrix(embeddings: Floats) -> Floats:
    rows: Floats = np.asarray(embeddings)
    if rows.ndim != 2 or not rows.size:
        raise ValueError(f"embeddings must be a matrix [rows, dimensions], not of shape {rows.shape}")
    return rows if rows.dtype in (np.float16, np.float32, np.float64) else rows.astype(np.float64)


def _blocks(indices: Indices, size: int = _BLOCK_ROWS) -> Iterator[Indices]:
    for start in range(0, len(indices), size):
        yield indices[start : start + size]
