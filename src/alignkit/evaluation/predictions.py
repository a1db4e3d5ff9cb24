"""What every model answered to every held-out question, and the scores that follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from alignkit.core.errors import UserError
from alignkit.core.records import Row
from alignkit.data.words import words
from alignkit.evaluation.comparison import Paired, compare_paired, in_words
from alignkit.evaluation.metrics import exact_match, token_f1, verdict_is_right
from alignkit.evaluation.statistics import Estimate, balanced_accuracy, bootstrap_mean, proportion, wilson
from alignkit.scoring.rules import read_verdict

TAGS = ("form", "level", "kind", "held_out_name")
"""Fields of a held-out row by which accuracy is broken down, where the rows have them."""

SCORES = ("exact_match", "token_f1", "judge")
"""Scores of an answer that models are compared by; higher is better."""

PREFERENCE = "preference"
"""What comparisons call the judge's choice between two answers: 0.5 where the new one won, 0 a tie, -0.5 lost."""


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
    preferences: dict[str, float] = Field(default_factory=dict)
    """"new>old" -> what the judge says of the two answers: 1 new is better, 0.5 a tie, 0 old is; absent: not known."""

    @property
    def cluster(self) -> str:
        """What correlated questions have in common: their document, or else their statement."""
        return self.document if self.document is not None else self.instruction

    def score(self, model: str, name: str) -> float | None:
        """One score of one model's answer; None when the model did not answer or the score could not be taken."""
        answer = self.answers.get(model)
        return None if answer is None else answer.scores.get(name)

    def gain(self, new: str, old: str, name: str) -> float | None:
        """What `new` has over `old` here in one score, or in the judge's preference; None where it is not known."""
        if name == PREFERENCE:
            won, lost = self.preferences.get(f"{new}>{old}"), self.preferences.get(f"{old}>{new}")
            return won - 0.5 if won is not None else 0.5 - lost if lost is not None else None
        after, before = self.score(new, name), self.score(old, name)
        return None if after is None or before is None else after - before


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
    """Score by score what `new` has over `old` on the rows that both answered, each a `comparison.Difference`.

    A row that one of the two has no grade for is left out of that score alone. `preference` is the judge's, where it
    was asked which of the two answers is better. For exact match also how many rows were gained and lost. `rows` may
    hold several seeds' predictions: rows about one document go together, so that asking the same questions again does
    not count as more evidence about other questions.
    """
    both = [row for row in rows if new in row.answers and old in row.answers]
    scores = {}
    for score in (*SCORES, PREFERENCE):
        found = [(row.gain(new, old, score), row.cluster) for row in both]
        known = [(gain, cluster) for gain, cluster in found if gain is not None]
        if known:
            scores[score] = Paired([gain for gain, _ in known], [cluster for _, cluster in known])
    differences = compare_paired(scores, seed)
    left_out = sum((new in row.answers) != (old in row.answers) for row in rows)
    of = "documents" if all(row.document is not None for row in both) else "statements"
    shown, warnings = in_words(f"{new} over {old}", differences, of, left_out)
    changes = [row.gain(new, old, "exact_match") for row in both]
    return {
        "new": new,
        "old": old,
        **differences,
        "gained": changes.count(1),
        "lost": changes.count(-1),
        "questions": len(both),
        "clusters": len({row.cluster for row in both}),
        "left_out": left_out,
        "in_words": shown,
        "warnings": warnings,
    }


def _right_verdicts(rows: Sequence[Prediction], model: str, wanted: str) -> list[float]:
    """1 for a right verdict and 0 for a wrong or missing one, over the rows whose true verdict is `wanted`."""
    return [row.score(model, "verdict_right") or 0.0 for row in rows if read_verdict(row.reference) == wanted]
