"""select: keep rows of good quality, and of these a subset that covers them all.

Each row first gets a quality from 0 to 10: by rule (the answer is not empty, has a sensible length, does not repeat
itself, is not the question, and carries a verdict where one is asked for), or from the teacher as a judge. Rows below
`quality.min_quality` are dropped. Of the rest, `k` rows are chosen by greedy k-center on embeddings of the text,
starting from the best row: each next one is the row farthest from all chosen so far. The embedding counts character
n-grams and needs no model.

Reads:   data.path                 question-answer rows with answers
Writes:  selected.jsonl            the rows kept, in input order, with scores.quality and scores.coverage_rank (from 1)
         dropped.jsonl             every other row and why

Overrides people use:
  k=300                          how many rows to keep (k=null: all of good quality, without coverage)
  quality.mode=judge             let the teacher grade each row instead of the rules
  quality.min_quality=8          the lowest quality that passes
  embedded_field=input           what to cover: instruction, input, output, or all three together
  data.path=mine.jsonl           other rows

Examples:
  python -m alignkit.select run=demo k=300
  python -m alignkit.select data.path=mine.jsonl k=1000 quality.mode=judge
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import ClassVar, Optional

from alignkit.core.artifact import Artifact
from alignkit.core.config import RowsConfig, StageConfig, TeacherConfig
from alignkit.core.errors import UserError
from alignkit.core.records import QAExample

# ruff: noqa: UP045

LOG = logging.getLogger("alignkit")


class QualityMode(Enum):
    """Who says how good a row is."""

    rules = "rules"
    judge = "judge"


class EmbeddedField(Enum):
    """The text of a row that the selection is to cover."""

    instruction = "instruction"
    input = "input"
    output = "output"
    all = "all"


@dataclass
class QualityConfig:
    """What passes as a good row."""

    mode: QualityMode = QualityMode.rules
    min_quality: float = 7.0
    """From 0 to 10. By rules a row has 10 when it breaks none, 5 when it breaks one; a judge gives any number."""
    min_words: int = 1
    max_words: int = 400
    max_repetition: float = 0.3
    """Largest share of the answer's three-word runs that may occur a second time."""


@dataclass
class SelectConfig(StageConfig):
    """Configuration of `select`."""

    inputs: ClassVar[tuple[str, ...]] = ("data.path",)

    data: RowsConfig = field(default_factory=RowsConfig)
    quality: QualityConfig = field(default_factory=QualityConfig)
    k: Optional[int] = None
    """How many rows to choose for coverage; null keeps every row of good quality."""
    embedded_field: EmbeddedField = EmbeddedField.all
    """The text that the chosen rows are to cover."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)


def run(config: SelectConfig) -> Artifact:
    """Score every row, drop the poor ones, choose a covering subset of the rest."""
    from alignkit.data.sources import read_questions

    if config.k is not None and config.k < 1:
        raise UserError(f"k={config.k}: must be at least 1, or null to keep every row of good quality")
    with Artifact.open("select", config) as artifact:
        if artifact.up_to_date:
            return artifact
        examples, unusable = read_questions(config.data)
        for dropped in unusable:
            artifact.drop(dropped.row, dropped.reason, dropped.detail)
        judged = config.quality.mode is QualityMode.judge
        scored = _judged(examples, config, artifact) if judged else _ruled(examples, config)
        good = [example for example in scored if _passes(example, config, artifact)]
        if not good:
            raise UserError(
                f"select: none of {len(examples)} rows reaches quality.min_quality={config.quality.min_quality:g}; "
                f"{artifact.folder / 'dropped.jsonl'} says why"
            )
        selected = good if config.k is None else _cover(good, config, artifact)
        artifact.write_rows("selected.jsonl", selected)
        artifact.metrics |= {"rows_read": len(examples) + len(unusable), "rows_selected": len(selected)}
        artifact.metrics["quality"] = _distribution([example.scores["quality"] for example in scored])
        artifact.summary = f"{len(selected)} of {artifact.metrics['rows_read']} rows"
        accounted = len(selected) + sum(artifact.dropped.values())
        artifact.check("every row accounted for", accounted == artifact.metrics["rows_read"], f"{accounted} rows")
    return artifact


def _ruled(examples: list[QAExample], config: SelectConfig) -> list[QAExample]:
    """Give each row its quality by rule."""
    from alignkit.scoring.rules import rule_quality

    return [_with_scores(example, quality=rule_quality(_broken(example, config))) for example in examples]


def _broken(example: QAExample, config: SelectConfig) -> list[str]:
    from alignkit.scoring.rules import broken_rules

    limits = config.quality
    return broken_rules(
        example, min_words=limits.min_words, max_words=limits.max_words, max_repetition=limits.max_repetition
    )


def _judged(examples: list[QAExample], config: SelectConfig, artifact: Artifact) -> list[QAExample]:
    """Give each row its quality by the teacher; rows without an answer, or that it could not grade, are dropped."""
    from alignkit.core.records import Message
    from alignkit.data.chat import qa_prompt
    from alignkit.scoring.judge import JudgeScorer
    from alignkit.teacher.client import open_teacher

    answered = [example for example in examples if example.output.strip()]
    for example in examples:
        if not example.output.strip():
            artifact.drop(example, "empty answer")
    scorer = JudgeScorer(open_teacher(config.teacher))
    scores = scorer.score([[*qa_prompt(row), Message(role="assistant", content=row.output)] for row in answered])
    artifact.metrics |= {"teacher": config.teacher.model, "usage": asdict(scorer.teacher.usage)}
    graded = []
    for example, score, reason in zip(answered, scores, scorer.reasons, strict=True):
        if score is None:
            artifact.drop(example, "judge gave no score", str(reason))
        else:
            graded.append(_with_scores(example, quality=score))
    return graded


def _passes(example: QAExample, config: SelectConfig, artifact: Artifact) -> bool:
    """Whether a row's quality suffices; drops it with the first broken rule, or the judge's score, when not."""
    quality, needed = example.scores["quality"], config.quality.min_quality
    if quality >= needed:
        return True
    if config.quality.mode is QualityMode.judge:
        artifact.drop(example, "judge score too low", f"{quality:g} < {needed:g}")
    else:
        broken = _broken(example, config)
        artifact.drop(
            example, broken[0] if broken else "quality too low", f"{quality:g} < {needed:g}: {', '.join(broken)}"
        )
    return False


def _cover(good: list[QAExample], config: SelectConfig, artifact: Artifact) -> list[QAExample]:
    """Choose up to k rows that cover all good ones, in input order; record how far the farthest row is from them."""
    from alignkit.scoring.diversity import character_embeddings, k_center_greedy, nearest_centres

    assert config.k is not None
    embeddings = character_embeddings([_text(example, config.embedded_field) for example in good])
    best = max(range(len(good)), key=lambda row: good[row].scores["quality"])
    centres = k_center_greedy(embeddings, min(config.k, len(good)), first=best)
    nearest, distances = nearest_centres(embeddings, centres)
    rank = {int(row): position for position, row in enumerate(centres, start=1)}
    for row, example in enumerate(good):
        if row not in rank:
            other = good[centres[nearest[row]]].id
            reason = "copy of a selected row" if distances[row] < 1e-6 else "covered by a selected row"
            artifact.drop(example, reason, f"nearest is {other}, at distance {distances[row]:.3f}")
    if len(centres) < config.k:
        LOG.warning("select: k=%d, but only %d different rows passed the quality threshold", config.k, len(centres))
    artifact.metrics["coverage_radius"] = round(float(distances.max()), 4)
    return [_with_scores(good[row], coverage_rank=rank[row]) for row in sorted(rank)]


def _text(example: QAExample, embedded_field: EmbeddedField) -> str:
    if embedded_field is EmbeddedField.all:
        return "\n".join((example.instruction, example.input, example.output))
    return str(getattr(example, embedded_field.name))


def _with_scores(example: QAExample, **scores: float) -> QAExample:
    return example.model_copy(
        update={"scores": {**example.scores, **{name: float(value) for name, value in scores.items()}}}
    )


def _distribution(qualities: list[float]) -> dict[str, float | dict[str, int]]:
    """Mean, median, and the number of rows at each whole score from 0 to 10 (rounded down)."""
    import numpy as np

    if not qualities:
        return {}
    counts = np.bincount(np.floor(qualities).astype(int).clip(0, 10), minlength=11)
    histogram = {str(score): int(count) for score, count in enumerate(counts)}
    return {"mean": float(np.mean(qualities)), "median": float(np.median(qualities)), "histogram": histogram}


if __name__ == "__main__":
    from alignkit.core.app import stage_main

    stage_main("select")
