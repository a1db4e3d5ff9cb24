"""judge: let the teacher grade completions from 0 to 10.

Each completion is graded on its own, at temperature 0, by a rubric of parts: is the conclusion right, is the evidence
stated, is the form plain. An answer of the teacher that holds no grade is no grade: the completion is dropped with the
reason, and too many of them fail the stage. Answers are stored, so that a killed or repeated run pays for none twice.

Reads:   data.path                 prompts with completions
Writes:  scored.jsonl              the same rows with a score for every completion
         dropped.jsonl             completions without a grade, and why

Overrides people use:
  data.path=runs/mine/sample/completions.jsonl   what to grade
  teacher=openai teacher.model=...               a real teacher instead of the scripted one
  max_failure_rate=0.05                          how many completions may go without a grade
  data.limit=100                                 the first rows only

Examples:
  python -m alignkit.judge run=demo
  python -m alignkit.judge run=mine teacher=openai teacher.model=<model> teacher.concurrency=16
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, ClassVar

from alignkit.core.artifact import Artifact
from alignkit.core.config import RowsConfig, StageConfig, TeacherConfig
from alignkit.core.errors import UserError
from alignkit.core.records import CompletionSet, Message

if TYPE_CHECKING:
    from alignkit.scoring.judge import JudgeScorer

ROWS_AT_ONCE = 100


@dataclass
class JudgeConfig(StageConfig):
    """Configuration of `judge`."""

    inputs: ClassVar[tuple[str, ...]] = ("data.path",)

    data: RowsConfig = field(default_factory=RowsConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    max_failure_rate: float = 0.2
    """Share of completions that may go without a grade; above it everything is written down and the stage fails."""


def run(config: JudgeConfig) -> Artifact:
    """Grade every completion; set aside those without a grade."""
    from alignkit.core.progress import progress
    from alignkit.data.sources import read_completions
    from alignkit.scoring.judge import JudgeScorer
    from alignkit.teacher.client import open_teacher

    if not 0 <= config.max_failure_rate <= 1:
        raise UserError(f"max_failure_rate={config.max_failure_rate}: must lie between 0 and 1")
    with Artifact.open("judge", config) as artifact:
        if artifact.up_to_date:
            return artifact
        rows, unusable = read_completions(config.data)
        for dropped in unusable:
            artifact.drop(dropped.row, dropped.reason, dropped.detail)
        scorer = JudgeScorer(open_teacher(config.teacher))
        chunks = [rows[start : start + ROWS_AT_ONCE] for start in range(0, len(rows), ROWS_AT_ONCE)]
        failures: Counter[str] = Counter()
        scored: list[CompletionSet] = []
        for chunk in progress(chunks, f"judge, {ROWS_AT_ONCE} rows at a time"):
            scored += grade(chunk, scorer, artifact, failures)
        artifact.write_rows("scored.jsonl", scored)
        artifact.metrics |= {"teacher": config.teacher.model, "usage": asdict(scorer.usage)}
        record(artifact, scored, failures, config.max_failure_rate)
    return artifact


def grade(
    rows: Sequence[CompletionSet], scorer: JudgeScorer, artifact: Artifact, failures: Counter[str]
) -> list[CompletionSet]:
    """Rows with their completions scored, without the completions that got no grade (dropped) and rows left empty."""
    conversations = [
        [*row.prompt, Message(role="assistant", content=completion.text)]
        for row in rows
        for completion in row.completions
    ]
    scores = scorer.score(conversations)
    graded = iter(zip(scores, scorer.reasons, strict=True))
    kept = []
    for row in rows:
        completions = []
        for completion in row.completions:
            score, failure = next(graded)
            if score is not None:
                completions.append(completion.model_copy(update={"score": score}))
                continue
            reason, _, detail = str(failure).partition(": ")
            failures[reason] += 1
            artifact.drop(row.model_copy(update={"completions": [completion]}), reason, detail)
        if completions:
            kept.append(row.model_copy(update={"completions": completions}))
    return kept


def record(
    artifact: Artifact, scored: Sequence[CompletionSet], failures: Counter[str], max_failure_rate: float
) -> None:
    """Write down what came of it, and stop when too many completions have no grade."""
    scores = [completion.score for row in scored for completion in row.completions if completion.score is not None]
    total, failed = len(scores) + failures.total(), failures.total()
    histogram = sorted(Counter(round(score) for score in scores).items())
    artifact.metrics |= {"rows": len(scored), "completions": len(scores), "without_grade": failed}
    artifact.metrics["scores"] = {str(score): count for score, count in histogram}
    if scores:
        artifact.metrics["mean_score"] = sum(scores) / len(scores)
        artifact.summary = f"{len(scores)} completions, mean score {sum(scores) / len(scores):.2f} of 10"
    detail = f"{failed} of {total} completions without a grade"
    if failures:
        detail += f", most of them: {failures.most_common(1)[0][0]}; dropped.jsonl has them all"
    artifact.check("grades readable", failed <= max_failure_rate * total, detail)


if __name__ == "__main__":
    from alignkit.core.app import stage_main

    stage_main("judge")
