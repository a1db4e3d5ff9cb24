"""Which of many rows a selection takes: by chance, by quality, for coverage, and for what a model still needs.

Rows are known by their places here, and nothing is written down: a `Choice` says which were taken and why the others
were not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from alignkit.scoring.row_embedding import Vectors

_SAME = 1e-6
"""Distance below which two rows of length 1 are copies."""


@dataclass(frozen=True)
class Choice:
    """Places of the rows taken, in the order of choice, and place -> (reason, detail) of those that were left out.

    `kinds` says of a row taken for a reason of its own which: "seed" or "necessary". The order means nothing where all
    rows are taken: then they are not `ranked`.
    """

    order: Sequence[int]
    left_out: Mapping[int, tuple[str, str]] = field(default_factory=dict)
    kinds: Mapping[int, str] = field(default_factory=dict)
    ranked: bool = True


@dataclass(frozen=True)
class Coverage:
    """Centres in the order of choice, and the coverage radius after each."""

    centres: list[int]
    radii: list[float]


@dataclass(frozen=True)
class Extension:
    """Seeds, after them the rows needed besides, and after these the rows that fill what is left of k."""

    order: list[int]
    seeds: int
    needed: int

    @property
    def kinds(self) -> dict[int, str]:
        """Place -> "seed" or "necessary"; places that were filled up count as seeds, too."""
        necessary = self.order[self.seeds : self.seeds + self.needed]
        return dict.fromkeys(self.order, "seed") | dict.fromkeys(necessary, "necessary")


def draw(rows: int, k: int, seed: int) -> Choice:
    """k of `rows` rows at random."""
    drawn = Random(f"{seed}-select").sample(range(rows), min(k, rows))
    return Choice(drawn, dict.fromkeys(sorted(set(range(rows)) - set(drawn)), ("not drawn", "")))


def take_best(quality: Sequence[float], k: int, seed: int) -> Choice:
    """The k rows of the highest quality; rows of equal quality are taken in random order."""
    order = Random(f"{seed}-select").sample(range(len(quality)), len(quality))
    order.sort(key=lambda place: -quality[place])
    return Choice(order[:k], dict.fromkeys(order[k:], ("others have a higher or equal quality", "")))


def cover(vectors: Vectors, quality: Sequence[float], k: int | None, radius: float | None) -> Coverage:
    """Rows by k-center, beginning with the best (the first of equals), until there are k or `radius` is reached."""
    from alignkit.scoring.diversity import k_center

    best = max(range(len(quality)), key=quality.__getitem__)
    found = k_center(vectors, k=k, radius=radius, first=best)
    return Coverage(found.centres.tolist(), found.radii.tolist())


def extend(vectors: Vectors, seeds: list[int], necessary: Sequence[int], k: int) -> Extension:
    """Fill up to k rows: with `necessary` ones by k-center, then with any by k-center.

    This second k-center (MoDS, Du et al., 2023, section 2.3) knows the seeds, so that no row is chosen for what one of
    them covers already; rows chosen once cannot be chosen again.
    """
    from alignkit.scoring.diversity import extend_cover

    needed = extend_cover(vectors, seeds, necessary, k)
    order = extend_cover(vectors, needed, range(len(vectors)), k)
    return Extension(order, len(seeds), len(needed) - len(seeds))


def explain(
    vectors: Vectors, order: Sequence[int], ids: Sequence[str], spared: Mapping[int, float]
) -> tuple[dict[int, tuple[str, str]], float]:
    """Why each row outside `order` is not needed, place -> (reason, detail); and the coverage radius.

    `ids` are the rows' names for the details; `spared` are rows that a model answers well enough, with the scores.
    """
    from alignkit.scoring.diversity import nearest_centres

    nearest, distances = nearest_centres(vectors, np.array(order))
    left_out = {}
    for place in sorted(set(range(len(ids))) - set(order)):
        detail = f"nearest is {ids[order[nearest[place]]]}, at distance {distances[place]:.3f}"
        if distances[place] < _SAME:
            left_out[place] = ("copy of a selected row", detail)
        elif place in spared:
            left_out[place] = ("not necessary", f"initial answer scores {spared[place]:g}; {detail}")
        else:
            left_out[place] = ("covered by a selected row", detail)
    return left_out, float(distances.max())
