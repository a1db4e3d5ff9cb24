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
from alignkit.evaluation.comparison import Paired, compare_paired, in_words
from alignkit.evaluation.metrics.catalogue import DEFAULT, METRICS, SHARE
from alignkit.evaluation.metrics.content import refused, verdict_is_right
from alignkit.evaluation.metrics.corpus import CorpusScore, corpus_bleu, corpus_chrf
from alignkit.evaluation.metrics.overlap import exact_match, token_f1
from alignkit.evaluation.statistics import (
    Estimate,
    balanced_accuracy,
    bootstrap_together,
    proportion,
    wilson,
)
from alignkit.scoring.rules import read_verdict

TAGS = ("form", "level", "kind", "source", "held_out_name")
"""Fields of a held-out row by which scores are broken down, where the rows have them."""

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
    unanswerable: bool | None = None
    """Whether the question has no answer; None: see `cannot_be_answered`."""
    keywords: list[str] = Field(default_factory=list)
    """What an answer should hold."""
    answers: dict[str, ModelAnswer]
    preferences: dict[str, float] = Field(default_factory=dict)
    """"new>old" -> what the judge says of the two answers: 1 new is better, 0.5 a tie, 0 old is; absent: not known."""

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
        raise UserError(
            f"{path}: not the predictions of this version's evaluate ({str(error).splitlines()[0]}); run it again"
        ) from error


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
    together: dict[str, tuple[list[float], list[str]]] = {}
    estimates: dict[str, Estimate] = {}
    for name in names:
        clusters = [cluster for cluster, scores in taken if name in scores]
        values = [scores[name] for _, scores in taken if name in scores]
        if name in METRICS and METRICS[name].scale == SHARE and set(values) <= {0, 1}:
            estimates[name] = proportion(values, clusters, seed)
        else:
            together[name] = (values, clusters)
    estimates |= bootstrap_together(together, seed)
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


def scores_to_compare(metrics: Sequence[str]) -> list[str]:
    """`SCORES`, and those of `metrics` that were asked for beyond the defaults and are better when higher."""
    return [
        *SCORES,
        *(
            name
            for name in METRICS
            if name in metrics and name not in (*SCORES, *DEFAULT) and METRICS[name].higher_is_better
        ),
    ]


def compare(
    rows: Sequence[Prediction], new: str, old: str, seed: int = 0, scores: Sequence[str] = SCORES
) -> dict[str, Any]:
    """Each of `scores`, what `new` has over `old` in it on the rows that both answered, each a `comparison.Difference`.

    A row that one of the two has no grade for is left out of that score alone. `preference` is the judge's, where it
    was asked which of the two answers is better. For exact match also how many rows were gained and lost. `rows` may
    hold several seeds' predictions: rows about one document go together, so that asking the same questions again does
    not count as more evidence about other questions.
    """
    both = [row for row in rows if new in row.answers and old in row.answers]
    paired = {}
    for score in (*scores, PREFERENCE):
        found = [(row.gain(new, old, score), row.cluster) for row in both]
        known = [(gain, cluster) for gain, cluster in found if gain is not None]
        if known:
            paired[score] = Paired([gain for gain, _ in known], [cluster for _, cluster in known])
    differences = compare_paired(paired, seed)
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
