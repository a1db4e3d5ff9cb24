"""Grades of several judges, each with habits of its own, on one scale of scores."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean, pstdev

import torch
from torch import Tensor


@dataclass(frozen=True)
class GradeStatistics:
    """Mean and standard deviation of a judge's grades; the latter is 1 where all grades are equal."""

    mean: float
    deviation: float
    count: int


def grade_statistics(grades: Iterable[tuple[str, float]]) -> dict[str, GradeStatistics]:
    """Statistics of (judge, grade) pairs by judge, judges in order of appearance."""
    by_judge: dict[str, list[float]] = defaultdict(list)
    for judge, grade in grades:
        by_judge[judge].append(grade)
    return {
        judge: GradeStatistics(fmean(values), pstdev(values) or 1.0, len(values)) for judge, values in by_judge.items()
    }


class JudgeScales(torch.nn.Module):
    """How each judge's grades follow from scores: grade = scale * score + offset.

    One judge is stricter than another, or uses half of the scale; what a score means must not depend on who graded it.
    Scale and offset are learned along with the scores. They start as the deviation and the mean of the judge's grades,
    and are held as what is added to that, `adjustments` [judges, 2] in units of the deviation, so that judges who grade
    from 0 to 10 and from 0 to 1 learn alike.
    """

    def __init__(self, statistics: Mapping[str, GradeStatistics], device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.statistics = dict(statistics)
        self.places = {judge: place for place, judge in enumerate(statistics)}
        self.adjustments = torch.nn.Parameter(torch.zeros(len(self.statistics), 2, device=device))

    def standardised(self, judge: str, grade: float) -> float:
        """A grade in deviations of its judge from the judge's mean: what `forward` is to come to."""
        of = self.statistics[judge]
        return (grade - of.mean) / of.deviation

    def forward(self, scores: Tensor, judges: Tensor) -> Tensor:
        """The standardised grades [answers, heads] that scores [answers, heads] stand for, from `judges` [answers]."""
        of_answer = self.adjustments[judges]
        return (1 + of_answer[:, :1]) * scores + of_answer[:, 1:]

    def describe(self) -> dict[str, dict[str, float]]:
        """Scale and offset by judge, in the judge's own units."""
        return {
            judge: {
                "scale": of.deviation * (1 + adjustment[0]),
                "offset": of.mean + of.deviation * adjustment[1],
                "grades": of.count,
            }
            for (judge, of), adjustment in zip(self.statistics.items(), self.adjustments.tolist(), strict=True)
        }


def regression_loss(predicted: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    """Sum of weight * (predicted - target)^2; a target that is NaN is not known, and pulls nowhere.

    `predicted` and `weight` are [answers, heads], `targets` [answers, 1].
    """
    known = torch.where(targets.isnan(), predicted.detach(), targets)
    return (weight * (predicted - known).square()).sum()
