"""How far a judge agrees with people who graded, or compared, the same answers.

Labels are rows of a file, each of either form:

    {"id": "q7", "system": "dpo", "grade": 8}                     a grade from 0 to 10 of a system's answer
    {"id": "q7", "text": "It closes at six.", "grade": 8}         the same, the answer told by its text
    {"id": "q7", "systems": ["dpo", "sft"], "better": "first"}    which answer is better: first, second or tie
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator

from alignkit.core.errors import UserError
from alignkit.data.jsonl import read_rows, to_record
from alignkit.evaluation.predictions import PREFERENCE, Prediction
from alignkit.evaluation.statistics import Estimate, bootstrap_mean, number_groups, proportion
from alignkit.teacher.recipes.judge import HIGHEST_SCORE

Floats = npt.NDArray[np.floating[Any]]
Pairs = Sequence[tuple[float, float, str]]
"""The judge's value, the person's, and the cluster of the question."""

LOG = logging.getLogger("alignkit")

RESAMPLES = 1000
_TAIL = 0.025


class HumanLabel(BaseModel):
    """What a person said of one answer, or of two."""

    model_config = ConfigDict(extra="ignore", strict=True)

    id: str
    system: str | None = None
    text: str | None = None
    grade: float | None = Field(default=None, ge=0, le=HIGHEST_SCORE, allow_inf_nan=False)
    systems: list[str] | None = Field(default=None, min_length=2, max_length=2)
    better: Literal["first", "second", "tie"] | None = None

    @model_validator(mode="after")
    def _is_one_form(self) -> HumanLabel:
        if (self.grade is None) == (self.better is None):
            raise ValueError("a label has either a grade from 0 to 10 or better: first, second or tie")
        if self.grade is not None and (self.system is None) == (self.text is None):
            raise ValueError("a grade needs the system whose answer it is of, or else the answer's text")
        if self.better is not None and (self.systems is None or self.systems[0] == self.systems[1]):
            raise ValueError("better needs systems, the two whose answers were compared")
        return self

    @property
    def about(self) -> tuple[str, ...]:
        """What must not be labelled twice."""
        return (self.id, *sorted(self.systems)) if self.systems else (self.id, "", self.system or "", self.text or "")


def read_labels(path: str, systems: Sequence[str]) -> dict[str, HumanLabel]:
    """The labels of a file by their place, `file:line`.

    Raises `UserError` with the place of one that is none, names no system, or repeats.
    """
    labels: dict[str, HumanLabel] = {}
    seen: dict[tuple[str, ...], str] = {}
    for place, row in read_rows(path):
        label = to_record(place, row, HumanLabel)
        named = label.systems or ([label.system] if label.system else [])
        if unknown := [name for name in named if name not in systems]:
            raise UserError(f"{place}: no system is called {unknown[0]!r}; there are {', '.join(systems)}")
        if label.about in seen:
            raise UserError(f"{place}: labels again what {seen[label.about]} labels; keep one of them")
        seen[label.about] = place
        labels[place] = label
    return labels


def agreement(rows: Sequence[Prediction], labels: Mapping[str, HumanLabel], seed: int = 0) -> dict[str, Any]:
    """Cohen's kappa and plain agreement of the judge with the labels, for grades and for preferences.

    Labels of a question or text that was not answered here, and those of an answer that the judge has no word on, are
    counted, told and left out. Raises `UserError` when none is left.
    """
    by_id = {row.id: row for row in rows}
    grades: list[tuple[float, float, str]] = []
    preferences: list[tuple[float, float, str]] = []
    unmatched: list[str] = []
    unjudged: list[str] = []
    for place, label in labels.items():
        row = by_id.get(label.id)
        if row is None or not _answered(row, label):
            unmatched.append(place)
        elif (said := _judged(row, label)) is None:
            unjudged.append(place)
        elif label.grade is not None:
            grades.append((said, label.grade, row.cluster))
        else:  # whichever system a label names first, "first" must mean the same one for kappa
            sign = 1.0 if label.systems == sorted(label.systems or []) else -1.0
            preferences.append((sign * said, sign * _PLACES[str(label.better)], row.cluster))
    if not grades and not preferences:
        raise UserError(
            f"human_labels: none of {len(labels)} labels is of an answer that the judge has judged: {len(unmatched)} "
            f"are of questions or answers that are not here; of {len(unjudged)} the judge has no word (grades need "
            "judge=true, preferences pairwise=true and that comparison)"
        )
    for places, what in ((unmatched, "of a question or answer that is not here"), (unjudged, "not judged")):
        if places:
            LOG.warning(
                "human_labels: %d of %d are %s, and left out; the first: %s", len(places), len(labels), what, places[0]
            )
    found: dict[str, Any] = {"labels": len(labels), "unmatched": len(unmatched), "without_judgement": len(unjudged)}
    if grades:
        found["grades"] = _of_grades(grades, seed)
    if preferences:
        found["preferences"] = _of_preferences(preferences, seed)
    for what in ("grades", "preferences"):
        if kappa := found.get(what, {}).get("kappa"):
            numbers = (what, kappa["n"], kappa["mean"], kappa["low"], kappa["high"])
            LOG.info("the judge and people on %s of %d answers: kappa %.2f [%.2f, %.2f]", *numbers)
        elif no_kappa := found.get(what, {}).get("no_kappa"):
            LOG.warning("the judge and people on %s: no kappa, since %s", what, no_kappa)
    return found


_PLACES = {"first": 1.0, "tie": 0.0, "second": -1.0}


def _answered(row: Prediction, label: HumanLabel) -> bool:
    if label.text is not None:
        return any(answer.text == label.text for answer in row.answers.values())
    return all(name in row.answers for name in label.systems or [str(label.system)])


def _judged(row: Prediction, label: HumanLabel) -> float | None:
    """The judge's grade, or 1, 0 or -1 for its preference of the first; None where there is none."""
    if label.systems is not None:
        gain = row.gain(label.systems[0], label.systems[1], PREFERENCE)
        return None if gain is None else float(np.sign(gain))
    if label.system is not None:
        return row.score(label.system, "judge")
    same = [answer.scores.get("judge") for answer in row.answers.values() if answer.text == label.text]
    return next((grade for grade in same if grade is not None), None)


def _of_grades(pairs: Pairs, seed: int) -> dict[str, Any]:
    clusters = [cluster for _, _, cluster in pairs]
    apart = [judge - person for judge, person, _ in pairs]
    found: dict[str, Any] = {
        "same": proportion([float(abs(each) < 0.5) for each in apart], clusters, seed),
        "within_one": proportion([float(abs(each) <= 1) for each in apart], clusters, seed),
        "judge_minus_person": bootstrap_mean(apart, clusters, seed),
    }
    return found | _kappa(weighted_kappa, pairs, seed)


def _of_preferences(pairs: Pairs, seed: int) -> dict[str, Any]:
    clusters = [cluster for _, _, cluster in pairs]
    found: dict[str, Any] = {"same": proportion([float(a == b) for a, b, _ in pairs], clusters, seed)}
    return found | _kappa(cohen_kappa, pairs, seed)


# -- kappa -------------------------------------------------------------------------------------------------------------


def cohen_kappa(one: Floats, other: Floats) -> float:
    """Agreement beyond chance of two raters' categories (Cohen, 1960): (p_o - p_e) / (1 - p_e), p_o the share of equal
    ratings and p_e = sum_k p_k q_k. NaN where both give everything the same one category."""
    categories = np.unique(np.concatenate([one, other]))
    by_chance = sum(float(np.mean(one == each)) * float(np.mean(other == each)) for each in categories)
    return (float(np.mean(one == other)) - by_chance) / (1 - by_chance) if by_chance < 1 - 1e-12 else float("nan")


def weighted_kappa(one: Floats, other: Floats) -> float:
    """Kappa with quadratic weights (Cohen, 1968): 1 - mean (x_i - y_i)^2 / mean over all i, j of (x_i - y_j)^2.

    The farther grades lie apart, the more they disagree; grades need not be whole. NaN where all are the same.
    """
    by_chance = float(np.var(one) + np.var(other) + (np.mean(one) - np.mean(other)) ** 2)
    return 1 - float(np.mean((one - other) ** 2)) / by_chance if by_chance > 1e-12 else float("nan")


def _kappa(kappa: Callable[[Floats, Floats], float], pairs: Pairs, seed: int) -> dict[str, Any]:
    """`kappa` with its bootstrap interval over whole clusters, or `no_kappa`, why it would say nothing.

    Where one of the two says the same of everything, it is 0 or not defined, whatever the other says.
    """
    one, other = (np.asarray([pair[side] for pair in pairs], dtype=np.float64) for side in (0, 1))
    for who, said in (("people say", other), ("the judge says", one)):
        if len(np.unique(said)) == 1:
            return {"no_kappa": f"{who} the same of all {len(said)} answers"}
    found = kappa(one, other)
    labels = number_groups([cluster for _, _, cluster in pairs])
    members = [np.flatnonzero(labels == place) for place in range(labels.max() + 1)]
    generator = np.random.default_rng(seed)
    resampled = []
    for _ in range(RESAMPLES):
        drawn = np.concatenate([members[place] for place in generator.integers(len(members), size=len(members))])
        resampled.append(kappa(one[drawn], other[drawn]))
    low, high = np.nanquantile(resampled, [_TAIL, 1 - _TAIL])
    return {"kappa": Estimate(mean=found, low=float(low), high=float(high), n=len(pairs))}
