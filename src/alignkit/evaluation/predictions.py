"""What every model answered to every held-out question, and the scores that follow from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from alignkit.core.errors import UserError
from alignkit.core.records import Row
from alignkit.data.words import words
from alignkit.evaluation.metrics.catalogue import METRICS, SHARE
from alignkit.evaluation.metrics.content import refused, verdict_is_right
from alignkit.evaluation.metrics.corpus import CorpusScore, corpus_bleu, corpus_chrf
from alignkit.evaluation.metrics.overlap import exact_match, token_f1
from alignkit.evaluation.statistics import (
    Estimate,
    balanced_accuracy,
    bootstrap_mean,
    bootstrap_means,
    mcnemar_p,
    proportion,
    wilson,
)
from alignkit.scoring.rules import read_verdict

TAGS = ("form", "level", "kind", "source", "held_out_name")
"""Fields of a held-out row by which scores are broken down, where the rows have them."""

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
    unanswerable: bool | None = None
    """Whether the question has no answer; None: see `cannot_be_answered`."""
    keywords: list[str] = Field(default_factory=list)
    """What an answer should hold."""
    answers: dict[str, ModelAnswer]

    @property
    def cluster(self) -> str:
        """What correlated questions have in common: their document, or else their statement."""
        return self.document if self.document is not None else self.instruction

    @property
    def cannot_be_answered(self) -> bool:
        """Whether to refuse is right: what the row says, or else whether its reference refuses."""
        return refused(self.reference) if self.unanswerable is None else self.unanswerable

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
    """An answer with the scores that are always taken, and the judge's."""
    scores = {
        "exact_match": float(exact_match(text, reference)),
        "token_f1": token_f1(text, reference),
        "words": float(len(words(text))),
    }
    right = verdict_is_right(text, reference)
    if right is not None:
        scores["verdict_right"] = float(right)
    if judge is not None:
        scores["judge"] = judge
    return ModelAnswer(text=text, finished=finished, scores=scores)


def summarise(rows: Sequence[Prediction], model: str, seed: int = 0) -> dict[str, Any]:
    """A model's scores over the rows that it answered, each an `Estimate`; one that no row has is left out.

    Rows that it has no answer to do not count. Means have a bootstrap interval over documents, since questions about
    the same one go together; so have shares of right answers where documents repeat. Where all are different these have
    Wilson's, as the share of finished answers always has. Besides: `balanced_verdict_accuracy`; `perplexity`, e to the
    power of the mean log-perplexity; `corpus`, BLEU and chrF of all answers together; `by`, the `breakdown`. Empty when
    the model answered nothing.
    """
    rows = [row for row in rows if model in row.answers]
    answers = [row.answers[model] for row in rows]
    if not rows:
        return {}
    summary: dict[str, Any] = _estimates(rows, model, seed)
    right = {wanted: _right_verdicts(rows, model, wanted) for wanted in ("yes", "no")}
    if right["yes"] and right["no"]:
        summary["balanced_verdict_accuracy"] = balanced_accuracy(right["yes"], right["no"], seed)
    if (nats := summary.get("log_perplexity")) is not None:
        summary["perplexity"] = {key: math.exp(nats[key]) for key in ("mean", "low", "high")} | {"n": nats["n"]}
    summary["finished"] = wilson(sum(answer.finished for answer in answers), len(answers))
    if together := _corpus_scores(rows, model):
        summary["corpus"] = together
    summary["by"] = breakdown(rows, model, seed)
    return summary


def breakdown(rows: Sequence[Prediction], model: str, seed: int = 0) -> dict[str, dict[str, dict[str, Estimate]]]:
    """Scores by each value of each tag that the answered rows have several values of: tag -> value -> score."""
    table: dict[str, dict[str, dict[str, Estimate]]] = {}
    for tag in TAGS:
        by_value: dict[str, list[Prediction]] = {}
        for row in rows:
            if (value := getattr(row, tag)) is not None and model in row.answers:
                by_value.setdefault(str(value), []).append(row)
        if len(by_value) > 1:
            table[tag] = {value: _estimates(some, model, seed) for value, some in by_value.items()}
    return table


def _estimates(rows: Sequence[Prediction], model: str, seed: int) -> dict[str, Estimate]:
    """Each score that the rows have, in the order of `METRICS`, over the rows that have it."""
    taken = [(row.cluster, row.answers[model].scores) for row in rows]
    names = list(dict.fromkeys(name for _, scores in taken for name in scores))
    together: dict[tuple[str, ...], dict[str, list[float]]] = {}  # clusters of the rows that have a score -> its values
    estimates: dict[str, Estimate] = {}
    for name in names:
        clusters = tuple(cluster for cluster, scores in taken if name in scores)
        values = [scores[name] for _, scores in taken if name in scores]
        if name in METRICS and METRICS[name].scale == SHARE and set(values) <= {0, 1}:
            estimates[name] = proportion(values, clusters, seed)
        else:
            together.setdefault(clusters, {})[name] = values
    for clusters, scores in together.items():
        estimates |= zip(scores, bootstrap_means(list(scores.values()), clusters, seed), strict=True)
    order = [*METRICS, *names]
    return dict(sorted(estimates.items(), key=lambda item: order.index(item[0])))


def _corpus_scores(rows: Sequence[Prediction], model: str) -> dict[str, CorpusScore]:
    """BLEU and chrF of all answers together, where single answers have them."""
    scores: dict[str, CorpusScore] = {}
    for name, take in (("bleu", corpus_bleu), ("chrf", corpus_chrf)):
        scored = [row for row in rows if row.score(model, name) is not None]
        if scored:
            scores[name] = take([row.answers[model].text for row in scored], [row.reference for row in scored])
    return scores


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
