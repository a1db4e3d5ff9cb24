"""How good a reward model is, as pure functions of its scores: right pairs, probabilities, length, the grader.

`groups` are prompts with their answers and the comparisons between them; `scores` hold a list a group, in the order of
its answers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from alignkit.evaluation.correlation import correlation, kendall, pearson, spearman
from alignkit.evaluation.statistics import Estimate, bootstrap_mean, proportion
from alignkit.training.reward import EncodedGroup, ranked_right

BINS = 10
"""Of predicted probabilities between 1/2 and 1."""

_GRADED = "worse answer graded "

Scores = Sequence[Sequence[float]]


def accuracy(groups: Sequence[EncodedGroup], scores: Scores) -> dict[str, Estimate]:
    """Share of pairs whose better answer scores higher: under "all", by source, and by the grade of the worse answer.

    The last tells which mistakes the reward model sees, since a rubric grades a kind of mistake alike.
    """
    outcomes: dict[str, list[tuple[str, float]]] = {"all": []}
    for group, right in zip(groups, ranked_right(groups, scores), strict=True):
        for comparison, is_right in zip(group.comparisons, right, strict=True):
            grade = group.grades[comparison.worse]
            names = ["all", group.source, *([] if grade is None else [f"{_GRADED}{round(grade)}"])]
            for name in names:
                outcomes.setdefault(name, []).append((group.prompt_key, float(is_right)))
    by_grade = sorted(
        (name for name in outcomes if name.startswith(_GRADED)), key=lambda name: int(name[len(_GRADED) :])
    )
    order = [name for name in outcomes if name not in by_grade] + by_grade
    return {name: _share(outcomes[name]) for name in order if outcomes[name]}


def calibration(groups: Sequence[EncodedGroup], scores: Scores, logits_per_score: float = 1.0) -> dict[str, Any]:
    """Does the better answer win as often as the model says? (Guo et al., 2017, arXiv 1706.04599, equations 2 and 3.)

    Of a pair whose scores differ by d the model says that the higher one is better with the probability
    p = sigmoid(|d| * `logits_per_score`), from 1/2 to 1. Pairs fall into ten bins of p; each has the mean `predicted` p
    and the share that is `right`. `expected_calibration_error` is the mean distance of the two, weighted by the number
    of pairs; `log_loss` the mean of -log p(better), where a coin has ln 2. Equal scores (p = 1/2) are half right.
    """
    in_bin: dict[int, list[tuple[str, float, float]]] = {}
    losses: list[tuple[str, float]] = []
    for prompt, difference in _differences(groups, scores):
        logit = difference * logits_per_score
        probability = 1 / (1 + math.exp(-abs(logit)))
        right = 0.5 if logit == 0 else float(logit > 0)
        place = min(int((probability - 0.5) * 2 * BINS), BINS - 1)
        in_bin.setdefault(place, []).append((prompt, probability, right))
        losses.append((prompt, max(-logit, 0.0) + math.log1p(math.exp(-abs(logit)))))
    if not losses:
        return {}
    bins: list[dict[str, Any]] = [
        {
            "low": 0.5 + place / (2 * BINS),
            "high": 0.5 + (place + 1) / (2 * BINS),
            "predicted": sum(probability for _, probability, _ in pairs) / len(pairs),
            "right": _share([(prompt, right) for prompt, _, right in pairs]),
        }
        for place, pairs in sorted(in_bin.items())
    ]
    error = sum(each["right"]["n"] * abs(each["right"]["mean"] - each["predicted"]) for each in bins) / len(losses)
    return {
        "bins": bins,
        "expected_calibration_error": error,
        "log_loss": bootstrap_mean([loss for _, loss in losses], [prompt for prompt, _ in losses]),
    }


def length_bias(groups: Sequence[EncodedGroup], scores: Scores) -> dict[str, Any]:
    """Does it reward length? Correlation of score and length in tokens, and right pairs by which answer is longer.

    Lengths count the answer and its end-of-turn token. Where the better answers really are longer a correlation is no
    fault; a model that goes by length gives itself away where the better answer is the shorter one.
    """
    lengths = [len(answer) for group in groups for answer in group.tokens.answers]
    flat, prompts = _flat(groups, scores)
    outcomes: dict[str, list[tuple[str, float]]] = {}
    for group, right in zip(groups, ranked_right(groups, scores), strict=True):
        for comparison, is_right in zip(group.comparisons, right, strict=True):
            better, worse = (len(group.tokens.answers[place]) for place in (comparison.better, comparison.worse))
            kind = "longer" if better > worse else "shorter" if better < worse else "as_long"
            outcomes.setdefault(kind, []).append((group.prompt_key, float(is_right)))
    return {
        "pearson": correlation(pearson, flat, lengths, prompts),
        "spearman": correlation(spearman, flat, lengths, prompts),
        "accuracy_where_better_is": {
            kind: _share(outcomes[kind]) for kind in ("longer", "as_long", "shorter") if kind in outcomes
        },
    }


def agreement(groups: Sequence[EncodedGroup], scores: Scores) -> dict[str, Any]:
    """Rank correlation with the grader's grades; nothing where nothing was graded."""
    flat, prompts = _flat(groups, scores)
    grades = [grade for group in groups for grade in group.grades]
    known = [place for place, grade in enumerate(grades) if grade is not None]
    if not known:
        return {}
    graded = [float(grades[place] or 0.0) for place in known]
    some, their = [flat[place] for place in known], [prompts[place] for place in known]
    return {
        "spearman": correlation(spearman, some, graded, their),
        "kendall": correlation(kendall, some, graded, their),
    }


def _share(outcomes: Sequence[tuple[str, float]]) -> Estimate:
    """A share of pairs, given as (prompt, 1 or 0) each: those of a prompt share answers, so they go together."""
    return proportion([value for _, value in outcomes], [prompt for prompt, _ in outcomes])


def _differences(groups: Sequence[EncodedGroup], scores: Scores) -> Iterator[tuple[str, float]]:
    """The prompt and the better answer's score less the worse one's, of every comparison."""
    for group, row in zip(groups, scores, strict=True):
        for each in group.comparisons:
            yield group.prompt_key, row[each.better] - row[each.worse]


def _flat(groups: Sequence[EncodedGroup], scores: Scores) -> tuple[list[float], list[str]]:
    """The score and the prompt of every answer."""
    flat = [score for row in scores for score in row]
    return flat, [group.prompt_key for group, row in zip(groups, scores, strict=True) for _ in row]
