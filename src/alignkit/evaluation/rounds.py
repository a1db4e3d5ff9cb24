"""Which of several policies, each trained from the one before it, to keep: by paired gains on the same questions.

A round helped when the 95 % interval of its gain over the round before lies above zero. The policies are looked at in
turn up to the first that did not help, and the last that did is kept: of those looked at until then it has the highest
score, since each mean gain was above zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from alignkit.core.config import Score
from alignkit.core.errors import UserError
from alignkit.evaluation.predictions import Prediction, compare, read_predictions, summarise
from alignkit.evaluation.statistics import Estimate


@dataclass(frozen=True)
class PolicyResult:
    """A policy's score, and its gain over the one before it; the first has none."""

    name: str
    score: Estimate
    before: str | None = None
    gain: Estimate | None = None

    @property
    def helped(self) -> bool | None:
        """Whether the gain's interval lies above zero; None for the first policy."""
        return None if self.gain is None else self.gain["low"] > 0


@dataclass(frozen=True)
class Decision:
    """Which policy is kept, and why no later one."""

    kept: str
    reason: str


def join_predictions(files: Sequence[Path]) -> list[Prediction]:
    """The predictions of several evaluations, joined by question. Raises `UserError` where their questions differ."""
    joined: dict[str, Prediction] = {}
    for place, file in enumerate(files):
        rows = {row.id: row for row in read_predictions(file)}
        if place and rows.keys() != joined.keys():
            raise UserError(f"{file}: not the questions of {files[0]}; paired gains need the same ones")
        for key, row in rows.items():
            answers = {**joined[key].answers, **row.answers} if place else row.answers
            joined[key] = row.model_copy(update={"answers": answers})
    return list(joined.values())


def compare_policies(rows: Sequence[Prediction], names: Sequence[str], score: Score, seed: int) -> list[PolicyResult]:
    """Each policy's score, and what it has over the one before, paired and resampled by statement.

    Raises `UserError` when a policy has no answers among the rows, or none with that score.
    """
    for name in names:
        if not any(name in row.answers for row in rows):
            raise UserError(f"policies: no evaluation has answers of {name!r}")
    found = []
    for before, name in zip([None, *names], names, strict=False):
        scores = summarise(rows, name, seed)
        gains = compare(rows, name, before, seed) if before else {}
        if score.name not in scores or (before and score.name not in gains):
            raise UserError(f"score={score.name}: the evaluation of {name} has none; it needs judge=true")
        found.append(PolicyResult(name, scores[score.name], before, gains.get(score.name)))
    return found


def decide(results: Sequence[PolicyResult], score: Score) -> Decision:
    """The last policy before the first that did not help."""
    kept = results[0].name
    for result in results[1:]:
        if not result.helped:
            return Decision(kept, f"{in_words(result, score)}, so the rounds ended there")
        kept = result.name
    return Decision(kept, "every round helped, and no more were asked for")


def in_words(result: PolicyResult, score: Score) -> str:
    """A policy's score and gain in a sentence: in percent and points, or in grades."""
    scale = 1 if score is Score.judge else 100
    said = f"{result.name} has {score.name.replace('_', ' ')} {scale * result.score['mean']:.{_digits(score)}f}"
    if result.gain is None:
        return said
    mean, low, high = (f"{scale * result.gain[key]:+.{_digits(score)}f}" for key in ("mean", "low", "high"))
    verdict = "helped" if result.helped else "hurt" if result.gain["high"] < 0 else "did not help"
    return f"{said}, {mean} [{low}, {high}] over {result.before}: it {verdict}"


def _digits(score: Score) -> int:
    return 2 if score is Score.judge else 1
