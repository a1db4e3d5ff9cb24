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
    """One model's answer to one question, scored. A score that could not be taken is not there, rather than 0."""

    model_config = ConfigDict(extra="forbid", strict=True)

    text: str
    finished: bool
    """False when the length limit cut the text before an end-of-turn token."""
    scores: dict[str, float]
    contexts: list[str] = []
    """What the model was given to read, where that was not the row's own statement."""
    queries: list[str] = []
    """What the model searched for, where it searched for itself."""


class Prediction(Row):
    """A held-out question with its reference answer and all models' answers.

    Questions about one `document` are correlated; where a row names none, its statement is taken for it.
    """

    instruction: str
    input: str
    reference: str
    document: str | None = None
    source: str | None = None
    kind: str | None = None
    form: str | None = None
    level: str | None = None
    held_out_name: bool | None = None
    answers: dict[str, ModelAnswer]

    @property
    def cluster(self) -> str:
        """What correlated questions have in common: their document, or else their statement."""
        return self.document if self.document is not None else self.instruction

    def score(self, model: str, name: str) -> float | None:
        """One score of one model's answer; None when the model did not answer or the score could not be taken."""
        answer = self.answers.get(model)
        return None if answer is None else answer.scores.get(name)


def read_predictions(path: Path) -> list[Prediction]:
    """The predictions that an `evaluate` step wrote. Raises `UserError` for a file that is not one."""
    try:
        with path.open(encoding="utf-8") as file:
            return [Prediction.model_validate_json(line) for line in file if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not the predictions of alignkit evaluate ({str(error).splitlines()[0]})") from error


def score_answer(text: str, reference: str, *, finished: bool, judge: float | None = None) -> ModelAnswer:
    """An answer with every score that two texts suffice for, and the judge's."""
    scores = {"exact_match": float(exact_match(text, reference)), "token_f1": token_f1(text, reference)}
    right = verdict_is_right(text, reference)
    if right is not None:
        scores["verdict_right"] = float(right)
    if judge is not None:
        scores["judge"] = judge
    return ModelAnswer(text=text, finished=finished, scores=scores)


def summarise(rows: Sequence[Prediction], model: str, seed: int = 0) -> dict[str, Any]:
    """A model's scores over all rows, each an `Estimate`; one that no row has is left out.

    Rows that it has no answer to do not count. Means have a bootstrap interval over statements, since questions about
    the same one go together; so has exact match where statements repeat. Where all are different it has Wilson's, as
    the share of finished answers always has.
    """
    rows = [row for row in rows if model in row.answers]
    answers = [row.answers[model] for row in rows]
    clusters = [row.cluster for row in rows]
    summary: dict[str, Any] = {
        "exact_match": proportion([answer.scores["exact_match"] for answer in answers], clusters, seed)
    }
    summary["token_f1"] = bootstrap_mean([answer.scores["token_f1"] for answer in answers], clusters, seed)
    judged = [(grade, row.cluster) for row in rows if (grade := row.score(model, "judge")) is not None]
    if judged:
        summary["judge"] = bootstrap_mean([grade for grade, _ in judged], [cluster for _, cluster in judged], seed)
    right = {wanted: _right_verdicts(rows, model, wanted) for wanted in ("yes", "no")}
    if right["yes"] and right["no"]:
        summary["balanced_verdict_accuracy"] = balanced_accuracy(right["yes"], right["no"], seed)
    summary["words"] = bootstrap_mean([len(words(answer.text)) for answer in answers], clusters, seed)
    summary["finished"] = wilson(sum(answer.finished for answer in answers), len(answers))
    summary["exact_match_by"] = breakdown(rows, model, seed)
    return summary


def breakdown(rows: Sequence[Prediction], model: str, seed: int = 0) -> dict[str, dict[str, Estimate]]:
    """Exact match by each value of each tag that the rows have: tag -> value -> `Estimate`."""
    table: dict[str, dict[str, Estimate]] = {}
    for tag in TAGS:
        matches: dict[str, list[tuple[float, str]]] = {}
        for row in rows:
            if (value := getattr(row, tag)) is not None and model in row.answers:
                matches.setdefault(str(value), []).append((row.answers[model].scores["exact_match"], row.cluster))
        if matches:
            table[tag] = {
                value: proportion([right for right, _ in found], [cluster for _, cluster in found], seed)
                for value, found in matches.items()
            }
    return table


def compare(rows: Sequence[Prediction], new: str, old: str, seed: int = 0) -> dict[str, Any]:
    """Score by score what `new` has over `old` on the same rows: mean difference with a paired bootstrap interval.

    For exact match also how many rows were gained and lost, and McNemar's exact p. A row that one of the two has no
    answer to, or no grade for, is left out of that comparison. `rows` may hold several seeds' predictions: rows with
    one statement go together, so that asking the same questions again does not count as more evidence about other
    questions.
    """
    rows = [row for row in rows if new in row.answers and old in row.answers]
    comparison: dict[str, Any] = {"new": new, "old": old}
    for score in SCORES:
        pairs = [(row.score(new, score), row.score(old, score), row.cluster) for row in rows]
        known = [
            (after - before, cluster) for after, before, cluster in pairs if after is not None and before is not None
        ]
        if known:
            differences, groups = zip(*known, strict=True)
            comparison[score] = bootstrap_mean(differences, groups, seed)
    changes = [row.answers[new].scores["exact_match"] - row.answers[old].scores["exact_match"] for row in rows]
    comparison["gained"], comparison["lost"] = changes.count(1), changes.count(-1)
    comparison["mcnemar_p"] = mcnemar_p(comparison["gained"], comparison["lost"])
    return comparison


def _right_verdicts(rows: Sequence[Prediction], model: str, wanted: str) -> list[float]:
    """1 for a right verdict and 0 for a wrong or missing one, over the rows whose true verdict is `wanted`."""
    return [row.score(model, "verdict_right") or 0.0 for row in rows if read_verdict(row.reference) == wanted]
