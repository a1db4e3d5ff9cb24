"""Configuration dataclasses of training a retriever: its encoder, and what is learned for each task."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import Optional

from alignkit.core.config import MISSING
from alignkit.core.errors import UserError

# All configurations write Optional[...]; omegaconf takes `... | None` just as well.
# ruff: noqa: UP045

NEW = "new"
"""The path of an encoder that is made from nothing."""


class Positives(Enum):
    """Which passage of a row is its positive, at each reading of the row.

    `first` of `pos`; a `random` one of `pos`; `teacher`: the passage with the highest teacher score of all, which may
    stand in `neg`; `teacher_positives`: the one with the highest teacher score in `pos`.
    """

    first = "first"
    random = "random"
    teacher = "teacher"
    teacher_positives = "teacher_positives"


class Negatives(Enum):
    """Which passages of `neg` are a row's negatives: drawn anew at each reading, the first, or by teacher score."""

    random = "random"
    first = "first"
    teacher_lowest = "teacher_lowest"
    teacher_highest = "teacher_highest"


class Distill(Enum):
    """How teacher scores are learned: as a distribution over a row's passages, or rank by rank (`stable`)."""

    kl = "kl"
    stable = "stable"


@dataclass
class TaskConfig:
    """What is learned for one task."""

    query_instruction: str = ""
    """Put before every query, and saved with the encoder as the prompt `<task>_query`."""
    passage_instruction: str = ""
    """Put before every passage: the prompt `<task>_passage`."""
    positives: Positives = Positives.first
    negatives: Negatives = Negatives.random
    contrastive_weight: float = 1.0
    """Weight of: the positive before all other passages of the batch."""
    distill_weight: float = 0.0
    """Weight of learning the teacher scores; needs rows with `teacher_scores`."""
    distill: Distill = Distill.kl
    teacher_temperature: float = 1.0
    """Teacher scores are divided by this: below 1 only the best passages count."""
    student_temperature: float = 1.0
    """The encoder's scores, divided by `temperature` already, are divided by this in the KL."""
    min_teacher_margin: float = 0.0
    """Leave out rows whose highest and lowest teacher scores are nearer than this."""
    min_teacher_score: Optional[float] = None
    """Leave out rows whose highest teacher score is below this."""
    max_rows: Optional[int] = None
    """Use at most this many rows of the task, drawn by the seed."""

    def __post_init__(self) -> None:
        """Raise `UserError` for numbers that mean nothing."""
        for name in ("contrastive_weight", "distill_weight", "min_teacher_margin"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name}={getattr(self, name)}: must be 0 or more")
        for name in ("teacher_temperature", "student_temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{name}={getattr(self, name)}: must be above 0")
        if not self.contrastive_weight and not self.distill_weight:
            raise UserError("contrastive_weight=0 and distill_weight=0: nothing would be learned; set one of them")
        if self.max_rows is not None and self.max_rows < 1:
            raise UserError(f"max_rows={self.max_rows}: must be at least 1, or null")

    @property
    def needs_teacher(self) -> bool:
        """Whether a row without teacher scores is of no use."""
        by_teacher = (
            Positives.teacher,
            Positives.teacher_positives,
            Negatives.teacher_lowest,
            Negatives.teacher_highest,
        )
        filters = self.min_teacher_margin > 0 or self.min_teacher_score is not None
        return self.distill_weight > 0 or filters or self.positives in by_teacher or self.negatives in by_teacher


@dataclass
class EncoderConfig:
    """The encoder that is trained, and how it reads texts."""

    name: str = MISSING
    path: str = MISSING
    """A folder or hub name of a sentence-transformers model or a plain encoder; `new`: made from nothing, a vector for
    each word piece of the training texts, and their mean for a text."""
    revision: Optional[str] = None
    pooling: Optional[str] = None
    """cls, mean, lasttoken, ...: in place of what the model's files say; a plain encoder gets mean."""
    query_max_length: Optional[int] = None
    """Tokens of a query that are read while training; none: as many as of a passage."""
    passage_max_length: Optional[int] = None
    """Tokens of a text that are read, also by the saved encoder; none: what the model's files say."""
    vocabulary: int = 8000
    """Word pieces of a new encoder."""
    dimensions: int = 256
    """Of a new encoder's vectors."""

    def __post_init__(self) -> None:
        """Raise `UserError` for numbers that mean nothing."""
        for name in ("query_max_length", "passage_max_length", "vocabulary", "dimensions"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"encoder.{name}={value}: must be at least 1")
        if self.path == NEW and (self.query_max_length or self.passage_max_length or self.pooling):
            raise UserError("encoder.path=new reads texts whole, and takes their mean: leave out pooling and lengths")
