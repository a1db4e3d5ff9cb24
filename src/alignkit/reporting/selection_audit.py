"""What a selection decided, row by row, as it goes; at the end the audit that the selection page is made from."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from statistics import fmean, median
from typing import Any

import numpy as np
import numpy.typing as npt

from alignkit.core.artifact import Artifact
from alignkit.core.records import Dropped, QAExample
from alignkit.reporting.plain import one_line
from alignkit.reporting.selection import AUDIT, selection_page
from alignkit.scoring.choice import Choice

LOG = logging.getLogger("alignkit")

PAGE = "selection.html"

MOST_POINTS = 4000
_EXAMPLES = 3
_BINS = 20
_CURVE_POINTS = 200
_LONGEST_TEXT = 400


class Decisions:
    """The account of a selection: what was decided about each row, why rows were dropped, how many each step left."""

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact
        self.by_row: dict[str, str] = {}
        """Id -> what was decided: one of the kinds of points on the page's map."""
        self.funnel: list[dict[str, Any]] = []
        self._examples: dict[str, list[dict[str, str]]] = {}

    def drop(self, row: QAExample, reason: str, detail: str, decision: str) -> None:
        """Set a row aside, with the reason and the kind of decision that it was."""
        self.set_aside(Dropped(reason=reason, row=row.model_dump(exclude_none=True), detail=detail), decision)

    def set_aside(self, dropped: Dropped, decision: str = "unclean") -> None:
        """Set a row aside as it was read."""
        row = dropped.row
        self.artifact.drop(row, dropped.reason, dropped.detail)
        self.by_row[str(row.get("id", ""))] = decision
        examples = self._examples.setdefault(dropped.reason, [])
        if len(examples) < _EXAMPLES:
            texts = {
                key: one_line(str(row.get(key) or ""), _LONGEST_TEXT) for key in ("instruction", "input", "output")
            }
            examples.append({"id": str(row.get("id", "")), **texts, "detail": dropped.detail})

    def step(self, name: str, rows: int) -> None:
        """Record, and say, how many rows are left after a step."""
        LOG.info("%-10s %d rows", name, rows)
        self.funnel.append({"step": name, "rows": rows})

    def settle(self, rows: Sequence[QAExample], choice: Choice) -> list[QAExample]:
        """The rows chosen, in input order, with their ranks in the order of choice (from 1); others are set aside."""
        for place, (reason, detail) in choice.left_out.items():
            self.drop(rows[place], reason, detail, "covered")
        rank = {place: number for number, place in enumerate(choice.order, start=1)}
        for place in rank:
            self.by_row[rows[place].id] = choice.kinds.get(place, "selected")
        return [with_scores(rows[place], rank=rank[place]) if choice.ranked else rows[place] for place in sorted(rank)]

    def quality(
        self, scored: Sequence[QAExample], selected: Sequence[QAExample], threshold: float, scorer: str
    ) -> dict[str, Any]:
        """How all rows scored, and those selected; mean and median go to the manifest."""
        qualities = [row.scores["quality"] for row in scored]
        self.artifact.metrics["quality"] = {
            "mean": fmean(qualities),
            "median": median(qualities),
            "threshold": threshold,
        }
        return score_histogram(qualities, [row.scores["quality"] for row in selected], threshold, scorer)

    def publish(self, audit: Mapping[str, Any], title: str) -> Path:
        """Write the audit, completed by what was recorded here, and the page that shows it; returns the page."""
        whole = {"quality": None, "coverage": None, "necessity": None, "map": None, **audit}
        whole |= {"rows_read": self.funnel[0]["rows"], "funnel": self.funnel, "reasons": self.reasons()}
        self.artifact.write_text(AUDIT, json.dumps(whole, ensure_ascii=False, allow_nan=False) + "\n")
        return self.artifact.write_text(PAGE, selection_page(whole, title))

    def reasons(self) -> list[dict[str, Any]]:
        """Every reason with its number of rows and up to three examples, the most frequent first."""
        counted = self.artifact.dropped.most_common()
        return [{"reason": reason, "rows": n, "examples": self._examples.get(reason, [])} for reason, n in counted]


def with_scores(row: QAExample, **scores: float) -> QAExample:
    """A copy of a row with further scores."""
    return row.model_copy(update={"scores": {**row.scores, **{name: float(value) for name, value in scores.items()}}})


def without_scores(row: QAExample, names: Sequence[str]) -> QAExample:
    """A copy of a row without some of its scores."""
    return row.model_copy(update={"scores": {name: row.scores[name] for name in row.scores if name not in names}})


def score_histogram(
    scores: Sequence[float], selected: Sequence[float], threshold: float, scorer: str
) -> dict[str, Any]:
    """How often each range of scores occurs, among all rows and among those selected."""
    low, high = min(scores), max(scores)
    wide = high - low > 1e-6 * max(1.0, abs(low), abs(high))
    edges = np.linspace(low, high, _BINS + 1) if wide else np.linspace(low - 0.5, high + 0.5, _BINS + 1)
    return {
        "scorer": scorer,
        "threshold": threshold,
        "edges": edges.tolist(),
        "counts": np.histogram(scores, edges)[0].tolist(),
        "selected": np.histogram(selected, edges)[0].tolist(),
    }


def thinned(radii: Sequence[float]) -> list[list[float]]:
    """[centres, coverage radius] at about 200 of the numbers of centres, first and last among them."""
    if len(radii) <= _CURVE_POINTS:
        return [[k, float(radius)] for k, radius in enumerate(radii, start=1)]
    picked = np.unique(np.geomspace(1, len(radii), _CURVE_POINTS).round().astype(int))
    return [[int(k), float(radii[k - 1])] for k in picked]


def choose_points(rows: Sequence[QAExample], by_row: Mapping[str, str], seed: int) -> list[QAExample]:
    """Rows to be shown on the map, at most 4,000: half of the places are for rows that were left out."""
    out = ("covered", "poor quality", "unclean")
    chosen = [row for row in rows if by_row.get(row.id) not in out]
    others = [row for row in rows if by_row.get(row.id) in out]
    random = Random(f"{seed}-map")
    for_others = max(MOST_POINTS // 2, MOST_POINTS - len(chosen))
    others = random.sample(others, min(len(others), for_others))
    return [*others, *random.sample(chosen, min(len(chosen), MOST_POINTS - len(others)))]


def project(vectors: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float64], list[float]]:
    """The two first principal components: coordinates [n, 2], and the share of the variance that each explains.

    Signs are fixed, so that the map is the same on every machine.
    """
    centred = vectors.astype(np.float64) - vectors.mean(axis=0, dtype=np.float64)
    values, axes = np.linalg.eigh(centred.T @ centred)
    total = float(values.sum())
    if total <= 0 or len(values) < 2:
        return np.zeros((len(vectors), 2)), [0.0, 0.0]
    first_two = axes[:, [-1, -2]]
    first_two = first_two * np.sign(first_two[np.abs(first_two).argmax(axis=0), [0, 1]])
    return centred @ first_two, [max(0.0, float(value)) / total for value in (values[-1], values[-2])]


def map_points(
    rows: Sequence[QAExample], vectors: npt.NDArray[np.float32], by_row: Mapping[str, str]
) -> dict[str, Any]:
    """The rows on a plane, each with what was decided about it."""
    coordinates, explained = project(vectors)
    points = [
        [round(float(x), 4), round(float(y), 4), by_row.get(row.id, "covered"), row.id]
        for row, (x, y) in zip(rows, coordinates, strict=True)
    ]
    return {"method": "PCA", "explained": explained, "points": points}
