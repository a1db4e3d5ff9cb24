"""How good question-answer rows are: by rule, by the teacher, by a reward model or by any classifier."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING, Optional

from alignkit.core.config import TeacherConfig
from alignkit.core.errors import UserError
from alignkit.core.records import Message, QAExample
from alignkit.scoring.resumable import NOT_A_NUMBER, Score, score_all
from alignkit.scoring.rules import broken_rules, rule_quality

if TYPE_CHECKING:
    from alignkit.core.journal import Journal
    from alignkit.scoring.base import Scorer
    from alignkit.teacher.client import Usage

# ruff: noqa: UP045


class QualityScorer(Enum):
    """Who says how good a row is: rules, the teacher, a reward model, or a classifier."""

    rules = "rules"
    judge = "judge"
    reward = "reward"
    classifier = "classifier"


_BLOCK = 256
"""Rows that a model scores before they are in the journal; what a kill can cost."""

_THRESHOLDS = {
    QualityScorer.rules: 7.0,
    QualityScorer.judge: 7.0,
    QualityScorer.reward: 0.0,
    QualityScorer.classifier: 0.0,
}
"""Rules and judge score from 0 to 10; 0 is the mean of a reward model's training data, and a classifier's even odds."""


@dataclass
class QualityConfig:
    """What passes as a good row."""

    scorer: QualityScorer = QualityScorer.rules
    threshold: Optional[float] = None
    """Rows must score above it; none: 7 with rules and judge (of 10), 0 with a reward model or a classifier."""
    quantile: Optional[float] = None
    """Instead of a threshold: leave out this share of the rows, the lowest (rows exactly at the border stay)."""
    reuse: bool = False
    """Take the scores.quality that rows have already, from an earlier selection, instead of scoring them again."""
    reward: str = "none"
    """Run folder of a reward model (scorer=reward)."""
    classifier: str = "none"
    """Folder or hub name of a sequence-classification checkpoint (scorer=classifier)."""
    revision: Optional[str] = None
    """Of the classifier."""
    label: Optional[str] = None
    """Label of the classifier that means good, where it has several."""
    batch_size: int = 16
    """Rows that the classifier reads at once."""
    min_words: int = 1
    max_words: int = 400
    max_repetition: float = 0.3
    """Rules: the largest share of the answer's three-word runs that may occur a second time."""

    def __post_init__(self) -> None:
        """A value that can do nothing is refused, and a model that is not asked need not exist."""
        if self.threshold is not None and self.quantile is not None:
            raise UserError("quality.threshold and quality.quantile: give one of them")
        if self.batch_size < 1:
            raise UserError(f"quality.batch_size={self.batch_size}: must be at least 1")
        if self.reuse and self.threshold is None and self.quantile is None:
            raise UserError("quality.reuse=true: nothing tells on what scale the scores are; add quality.threshold=...")
        if self.quantile is not None and not 0 <= self.quantile < 1:
            raise UserError(f"quality.quantile={self.quantile}: must lie between 0 and 1 (0.25 leaves out a quarter)")
        for scorer, key in ((QualityScorer.reward, "reward"), (QualityScorer.classifier, "classifier")):
            if self.scorer is not scorer:
                setattr(self, key, "none")
            elif getattr(self, key) == "none":
                raise UserError(f"quality.{key}: name the model, since quality.scorer={scorer.name}")

    @property
    def source(self) -> str:
        """Whose scores they are, for a reason."""
        return "earlier" if self.reuse else self.scorer.name

    def resolve_threshold(self, scores: Sequence[float]) -> float:
        """The threshold that applies to these scores."""
        if self.quantile is not None:
            import numpy as np

            return float(np.quantile(scores, self.quantile, method="higher"))
        return self.threshold if self.threshold is not None else _THRESHOLDS[self.scorer]

    def passes(self, score: float, threshold: float) -> bool:
        """Whether a score is good: above the threshold, or at least at the quantile."""
        return score >= threshold if self.quantile is not None else score > threshold


class RowScorer:
    """Says how good rows are, as a `QualityConfig` wants it; a model or teacher is opened when first asked."""

    def __init__(self, config: QualityConfig, teacher: TeacherConfig) -> None:
        self.config = config
        self._teacher = teacher

    def score(self, rows: Sequence[QAExample], journal: Journal) -> list[Score]:
        """Each row's quality, higher is better, and what speaks against it; None where it has none, and why.

        Rules say from 0 to 10, by how many of them the answer breaks; the teacher from 0 to 10; models what they say.
        Rows whose score is in the journal are not scored again.
        """
        if self.config.reuse:
            known = {row.id: _given(row) for row in rows if "quality" in row.scores}
            rest = iter(self._score([row for row in rows if row.id not in known], journal))
            return [known[row.id] if row.id in known else next(rest) for row in rows]
        return self._score(rows, journal)

    def _score(self, rows: Sequence[QAExample], journal: Journal) -> list[Score]:
        if self.config.scorer is QualityScorer.rules:
            broken = [_broken(row, self.config) for row in rows]
            return [(rule_quality(each), ", ".join(each) or None) for each in broken]
        from alignkit.data.chat import qa_prompt

        answered = [row for row in rows if row.output.strip()]
        conversations = [(row.id, [*qa_prompt(row), Message(role="assistant", content=row.output)]) for row in answered]
        # A teacher is asked all at once: its response store resumes, and a batch is waited for only once.
        block = len(answered) if self.config.scorer is QualityScorer.judge else _BLOCK
        scores = score_all(self._scorer, conversations, journal, block) if answered else []
        found = dict(zip((row.id for row in answered), scores, strict=True))
        return [found.get(row.id, (None, "empty answer")) for row in rows]

    @property
    def usage(self) -> Usage | None:
        """What the teacher was asked; None when none is."""
        from alignkit.scoring.judge import JudgeScorer

        if self.config.scorer is not QualityScorer.judge or "_scorer" not in self.__dict__:
            return None
        assert isinstance(self._scorer, JudgeScorer)
        return self._scorer.teacher.usage

    @cached_property
    def _scorer(self) -> Scorer:
        if self.config.scorer is QualityScorer.judge:
            from alignkit.scoring.judge import JudgeScorer
            from alignkit.teacher.client import open_teacher

            return JudgeScorer(open_teacher(self._teacher))
        if self.config.scorer is QualityScorer.reward:
            from alignkit.scoring.reward import RewardScorer

            return RewardScorer(self.config.reward)
        from alignkit.scoring.classifier import ClassifierScorer

        return ClassifierScorer(self.config.classifier, self.config.revision, self.config.batch_size, self.config.label)


def broken_by(row: QAExample, config: QualityConfig) -> list[str]:
    """The rules that a row breaks, the gravest first; none where no rules are asked."""
    return _broken(row, config) if config.scorer is QualityScorer.rules and not config.reuse else []


def _broken(row: QAExample, config: QualityConfig) -> list[str]:
    return broken_rules(
        row, min_words=config.min_words, max_words=config.max_words, max_repetition=config.max_repetition
    )


def _given(row: QAExample) -> Score:
    score = row.scores["quality"]
    return (score, None) if math.isfinite(score) else (None, NOT_A_NUMBER)
