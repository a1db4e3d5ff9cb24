"""What every model answered to every held-out question, and the scores that follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from alignkit.core.errors import UserError
from alignkit.core.records import Row
from alignkit.data.words import words
from alignkit.evaluation.metrics import exact_match, token_f1, verdict_is_right
from alignkit.evaluation.statistics import Estimate, balanced_accuracy, bootstrap_mean, mcnemar_p, proportion, wilson
from alignkit.scoring.rules import read_verdict

TAGS = ("form", "level", "kind", "held_out_name")
"""Fields of a held-out row by which accuracy is broken down, where the rows have them."""

SCORES = ("exact_match", "token_f1", "judge")
"""Scores of an answer that models are compared by; higher is better."""


class ModelAnswer(BaseModel):
    """One model's answer to one question, scored. `judge` is the teacher's 0-10, if one was asked and could say."""

    model_config = ConfigDict(extra="forbid", strict=True)

    text: str
    finished: bool
    exact_match: bool
    token_f1: float
    verdict_right: bool | None = None
    judge: float | None = None


class Prediction(Row):
    """A held-out question with its reference answer and all models' answers."""

    instruction: str
    input: str
    reference: str
    kind: str | None = None
    form: str | None = None
    level: str | None = None
    held_out_name: bool | None = None
    answers: dict[str, ModelAnswer]


def read_predictions(path: Path) -> list[Prediction]:
    """The predictions that an `evaluate` step wrote. Raises `UserError` for a file that is not one."""
    try:
        with path.open(encoding="utf-8") as file:
            return [Prediction.model_validate_json(line) for line in file if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not the predictions of alignkit evaluate ({str(error).splitlines()[0]})") from error


def score_answer(text: str, reference: str, *, finished: bool, judge: float | None = None) -> ModelAnswer:
    """An answer with every score that two texts suffice for, and the judge's."""
    return ModelAnswer(
        text=text,
        finished=finished,
        exact_match=exact_match(text, reference),
        token_f1=token_f1(text, reference),
        verdict_right=verdict_is_right(text, reference),
        judge=judge,
    )


def summarise(rows: Sequence[Prediction], model: str, seed: int = 0) -> dict[str, Any]:
    """A model's scores over all rows, each an `Estimate`; one that no row has is left out.

    Means have a bootstrap interval over statements, since questions about the same one go together; so has exact match
    where statements repeat. Where all are different it has Wilson's, as the share of finished answers always has.
    """
    answers = [row.answers[model] for row in rows]
    statements = [row.instruction for row in rows]
    summary: dict[str, Any] = {"exact_match": proportion([answer.exact_match for answer in answers], statements, seed)}
    summary["token_f1"] = bootstrap_mean([answer.token_f1 for answer in answers], statements, seed)
    judged = [
        (answer.judge, row.instruction) for answer, row in zip(answers, rows, strict=True) if answer.judge is not None
    ]
    if judged:
        summary["judge"] = bootstrap_mean([score for score, _ in judged], [statement for _, statement in judged], seed)
    right = {wanted: _right_verdicts(rows, model, wanted) for wanted in ("yes", "no")}
    if right["yes"] and right["no"]:
        summary["balanced_verdict_accuracy"] = balanced_accuracy(right["yes"], right["no"], seed)
    summary["words"] = bootstrap_mean([len(words(answer.text)) for answer in answers], statements, seed)
    summary["finished"] = wilson(sum(answer.finished for answer in answers), len(answers))
    summary["exact_match_by"] = breakdown(rows, model, seed)
    return summary


def breakdown(rows: Sequence[Prediction], model: str, seed: int = 0) -> dict[str, dict[str, Estimate]]:
    """Exact match by each value of each tag that the rows have: tag -> value -> `Estimate`."""
    table: dict[str, dict[str, Estimate]] = {}
    for tag in TAGS:
        matches: dict[str, list[tuple[bool, str]]] = {}
        for row in rows:
            if (value := getattr(row, tag)) is not None:
                matches.setdefault(str(value), []).append((row.answers[model].exact_match, row.instruction))
        if matches:
            table[tag] = {
                value: proportion([right for right, _ in found], [statement for _, statement in found], seed)
                for value, found in matches.items()
            }
    return table


def compare(rows: Sequence[Prediction], new: str, old: str, seed: int = 0) -> dict[str, Any]:
    """Score by score what `new` has over `old` on the same rows: mean difference with a paired bootstrap interval.

    For exact match also how many rows were gained and lost, and McNemar's exact p. A row that one of the two has no
    grade for is left out of that comparison. `rows` may hold several seeds' predictions: rows with one statement go
    together, so that asking the same questions again does not count as more evidence about other questions.
    """
    comparison: dict[str, Any] = {"new": new, "old": old}
    for score in SCORES:
        pairs = [(getattr(row.answers[new], score), getattr(row.answers[old], score), row.instruction) for row in rows]
        known = [(float(after) - float(before), group) for after, before, group in pairs if None not in (after, before)]
        if known:
            differences, groups = zip(*known, strict=True)
            comparison[score] = bootstrap_mean(differences, groups, seed)
    changes = [int(row.answers[new].exact_match) - int(row.answers[old].exact_match) for row in rows]
    comparison["gained"], comparison["lost"] = changes.count(1), changes.count(-1)
    comparison["mcnemar_p"] = mcnemar_p(comparison["gained"], comparison["lost"])
    return comparison


def _right_verdicts(rows: Sequence[Prediction], model: str, wanted: str) -> list[float]:
    """1 for a right verdict and 0 for a wrong or missing one, over the rows whose true verdict is `wanted`."""
    return [float(row.answers[model].verdict_right or False) for row in rows if read_verdict(row.reference) == wanted]
