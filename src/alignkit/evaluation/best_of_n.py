"""What choosing the best of n is worth: by the score that chooses, by another judge, and against greedy decoding."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import numpy as np

from alignkit.core.records import CompletionSet
from alignkit.evaluation.correlation import pearson
from alignkit.evaluation.statistics import Estimate, bootstrap_mean
from alignkit.scoring.best_of_n import expected_best, kl_bound, powers_of_two, scored


@dataclass(frozen=True)
class Judged:
    """A question's scored answers: their scores, and what a judge gives them; the same of the greedy answer."""

    scores: list[float]
    values: list[float]
    greedy: float | None = None


def describe_scores(rows: Sequence[CompletionSet], n: int) -> dict[str, Any]:
    """The mean score, that of the best answers, and whether longer answers score higher."""
    kept = [candidates for row in rows if (candidates := scored(row.completions))]
    scores = [[each.score or 0.0 for each in candidates] for candidates in kept]
    flat = [value for row in scores for value in row]
    lengths = [len(each.text) for candidates in kept for each in candidates]
    with_length = pearson(np.asarray(flat, dtype=np.float64), np.asarray(lengths, dtype=np.float64))
    return {
        "mean_score": mean(flat),
        "mean_best_score": mean(max(row) for row in scores),
        "score_length_correlation": None if math.isnan(with_length) else with_length,
        "kl_bound": {str(k): kl_bound(k) for k in powers_of_two(n)},
    }


def by_score(rows: Sequence[CompletionSet], greedy: Sequence[CompletionSet] = ()) -> list[Judged]:
    """Questions with any scored answer, each valued by its own score."""
    of_greedy = _greedy(greedy)
    return [
        Judged(scores, scores, of_greedy.get(row.id))
        for row in rows
        if (scores := [each.score or 0.0 for each in scored(row.completions)])
    ]


def by_grade(
    rows: Sequence[CompletionSet], graded: Sequence[CompletionSet], greedy: Sequence[CompletionSet] = ()
) -> tuple[list[Judged], int]:
    """Questions whose scored answers all have a grade, valued by their grades; and how many others there are.

    `graded` are the rows again, with only their scored completions and grades in place of scores; `greedy` is graded.
    """
    of_greedy, found, without = _greedy(greedy), [], 0
    for row, same in zip(rows, graded, strict=True):
        scores = [each.score or 0.0 for each in scored(row.completions)]
        grades = [each.score for each in same.completions if each.score is not None]
        if scores and len(grades) == len(scores):
            found.append(Judged(scores, grades, of_greedy.get(row.id)))
        else:
            without += bool(scores)
    return found, without


def describe_best_of_n(measures: Mapping[str, Sequence[Judged]], n: int) -> dict[str, Any]:
    """For each measure the value of the best of 1, 2, 4, ... n, what that gains, and what greedy answers have."""
    known = {name: questions for name, questions in measures.items() if questions}
    greedy = {name: [each.greedy for each in known[name] if each.greedy is not None] for name in known}
    return {
        "best_of_n": {
            name: {
                str(k): bootstrap_mean([expected_best(each.scores, k, each.values) for each in questions])
                for k in powers_of_two(n)
            }
            for name, questions in known.items()
        },
        "gains": {name: gains(questions, n) for name, questions in known.items()},
        "greedy": {name: bootstrap_mean(values) for name, values in greedy.items() if values},
    }


def gains(questions: Sequence[Judged], n: int) -> dict[str, Estimate]:
    """Differences by question: the best of n, a single draw (its mean) and, where there is one, the greedy answer."""
    best = [expected_best(each.scores, n, each.values) for each in questions]
    single = [expected_best(each.scores, 1, each.values) for each in questions]
    found = {"best_over_single": bootstrap_mean([b - s for b, s in zip(best, single, strict=True)])}
    greedy = [each.greedy for each in questions]
    against = [(b, s, g) for b, s, g in zip(best, single, greedy, strict=True) if g is not None]
    if against:
        found["best_over_greedy"] = bootstrap_mean([b - g for b, _, g in against])
        found["single_over_greedy"] = bootstrap_mean([s - g for _, s, g in against])
    return found


def latest_over_previous(latest: Sequence[CompletionSet], previous: Sequence[CompletionSet]) -> Estimate | None:
    """By how much the latest version's answers score higher, the mean over questions; None without a common one."""
    means = [
        {row.id: mean(each.score or 0.0 for each in answers) for row in rows if (answers := scored(row.completions))}
        for rows in (latest, previous)
    ]
    differences = [score - means[1][id] for id, score in means[0].items() if id in means[1]]
    return bootstrap_mean(differences) if differences else None


def _greedy(rows: Sequence[CompletionSet]) -> dict[str, float]:
    return {row.id: found[0].score or 0.0 for row in rows if (found := scored(row.completions))}
