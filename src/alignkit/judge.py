"""judge: let the teacher grade completions from 0 to 10.

Each completion is graded on its own, by a rubric of criteria with weights. With more_judges the score is the mean of
several judges. mode=pairwise compares the completions of a prompt with each other instead, n (n - 1) requests a prompt:
every pair is shown in both orders, a verdict that changes with the order counts as a tie, and the score is the share of
wins times 10; a completion to whose prompt there is no other is dropped. An answer that holds no grade is missing,
never 0: a completion without any is dropped with the reason, and too many of them fail the stage. Answers are stored,
so that a killed or repeated run pays for none twice.

Reads:   data.path                 prompts with completions
         rubric                    criteria to grade by (optional)
Writes:  scored.jsonl              the same rows with a score for every completion
         grades.jsonl              for each completion its score, the spread, and every single grade with its reason
         dropped.jsonl             completions without a grade, and why

Overrides people use:
  data.path=runs/mine/sample/completions.jsonl   what to grade
  teacher=openai teacher.model=...               a real teacher instead of the scripted one
  rubric=mine.yaml                               your own criteria: name, weight and text of each
  more_judges=[<model>]                          average over more models of the same server
  samples=3 temperature=0.7                      ask each judge several times
  mode=pairwise                                  compare completions with each other
  max_failure_rate=0.05                          how many completions may go without a grade

Examples:
  python -m alignkit.judge run=demo
  python -m alignkit.judge run=demo mode=pairwise
  python -m alignkit.judge run=mine teacher=openai teacher.model=<model> teacher.concurrency=16
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar, Optional

from alignkit.core.artifact import Artifact
from alignkit.core.config import RowsConfig, TeacherMode, TeacherStageConfig
from alignkit.core.errors import UserError
from alignkit.core.records import CompletionSet, Message

# ruff: noqa: UP045

if TYPE_CHECKING:
    from alignkit.scoring.judge import JudgeScorer
    from alignkit.teacher.client import Teacher

LOG = logging.getLogger("alignkit")


class JudgeMode(Enum):
    """How completions are graded: each on its own, or each against the others of its prompt."""

    pointwise = "pointwise"
    pairwise = "pairwise"


@dataclass
class JudgeConfig(TeacherStageConfig):
    """Configuration of `judge`."""

    inputs: ClassVar[tuple[str, ...]] = ("data.path", "rubric")

    data: RowsConfig = field(default_factory=RowsConfig)
    mode: JudgeMode = JudgeMode.pointwise
    """Grade each completion on its own, or compare those of a prompt with each other."""
    rubric: Optional[str] = None
    """A YAML or JSON file of criteria with weights; none: the shipped rubric, for questions about a statement."""
    more_judges: list[str] = field(default_factory=list)
    """Models of the same server that grade besides teacher.model; the score is the mean. teacher.max_cost holds for
    each judge."""
    samples: int = 1
    """Grades asked of each judge; more than one need a temperature."""
    temperature: float = 0.0
    """Of the grading; teacher.temperature is for writing."""


def run(config: JudgeConfig) -> Artifact:
    """Grade every completion; set aside those without a grade."""
    from alignkit.data.sources import read_completions
    from alignkit.teacher.client import open_teacher

    check_config(config)
    if config.dry_run:
        return estimate(config)
    with Artifact.open("judge", config, always=config.teacher.retry_failed) as artifact:
        if artifact.up_to_date:
            return artifact
        rows, unusable = read_completions(config.data)
        artifact.drop_all(unusable)
        judges = [config.teacher.model, *config.more_judges]
        if config.teacher.mode is not TeacherMode.scripted:  # rules have no writing of their own to prefer
            warn_of_self_preference(rows, judges, config, artifact)

        scorer = open_scorer(config, [open_teacher(replace(config.teacher, model=judge)) for judge in judges])
        scores = scorer.score(conversations(rows))
        scored = with_scores(rows, scores, scorer.reasons, artifact)
        artifact.write_rows("scored.jsonl", scored)
        artifact.write_rows("grades.jsonl", grade_rows(rows, scorer, judges))
        record(artifact, scored, scorer, judges, config)
    return artifact


def check_config(config: JudgeConfig) -> None:
    """Raise `UserError` for settings that make no sense."""
    if not 0 <= config.max_failure_rate <= 1:
        raise UserError(f"max_failure_rate={config.max_failure_rate}: must lie between 0 and 1")
    if config.samples < 1 or config.temperature < 0:
        raise UserError("samples must be at least 1, and temperature not negative")
    if config.samples > 1 and config.temperature == 0:
        raise UserError(
            f"samples={config.samples} with temperature=0: a judge that does not draw gives the same grade each time. "
            "Set a temperature above 0, or samples=1."
        )
    judges = [config.teacher.model, *config.more_judges]
    if len(set(judges)) < len(judges):
        raise UserError(f"more_judges={config.more_judges}: name each judge once, and teacher.model not again")
    if config.more_judges and config.teacher.mode is TeacherMode.scripted:
        raise UserError("more_judges: the scripted teacher is a single judge; models have to be served (teacher=...)")


def open_scorer(config: JudgeConfig, judges: Sequence[Teacher]) -> JudgeScorer:
    """The judges, with the rubric."""
    from alignkit.scoring.judge import JudgeScorer
    from alignkit.teacher.recipes.judge import read_rubric

    if config.rubric and config.teacher.mode is TeacherMode.scripted:
        LOG.warning("rubric=%s: the scripted teacher grades by rules of its own, whatever a rubric says", config.rubric)
    return JudgeScorer(
        *judges,
        rubric=read_rubric(config.rubric),
        samples=config.samples,
        temperature=config.temperature,
        pairwise=config.mode is JudgeMode.pairwise,
    )


def estimate(config: JudgeConfig) -> Artifact:
    """Say what would be asked of each judge, and what that would cost."""
    from alignkit.data.sources import read_completions
    from alignkit.teacher.dry_run import DryRunTeacher

    artifact = Artifact.open("judge", config, always=True)
    rows, _ = read_completions(config.data)
    judges = [
        DryRunTeacher(replace(config.teacher, model=judge)) for judge in (config.teacher.model, *config.more_judges)
    ]
    open_scorer(config, judges).score(conversations(rows))
    for judge in judges:
        LOG.info("%s: %s", judge.config.model, judge.report())
    artifact.summary = "dry run, nothing was sent"
    return artifact


def conversations(rows: Sequence[CompletionSet]) -> list[list[Message]]:
    """Every completion as the last turn of its prompt."""
    return [
        [*row.prompt, Message(role="assistant", content=completion.text)]
        for row in rows
        for completion in row.completions
    ]


def grade_rows(rows: Sequence[CompletionSet], scorer: JudgeScorer, judges: Sequence[str]) -> Iterator[dict[str, Any]]:
    """For each completion, by row id and place, all its grades and why others are missing."""
    grades = iter(scorer.grades)
    for row in rows:
        for place in range(len(row.completions)):
            each = next(grades)
            given = [{"judge": judges[one.judge], "score": one.score, "reason": one.reason} for one in each.given]
            fields = {"id": row.id, "completion": place, "score": each.score, "spread": each.spread}
            yield fields | {"grades": given, "missing": each.missing}


def with_scores(
    rows: Sequence[CompletionSet],
    scores: Sequence[float | None],
    reasons: Sequence[str | None],
    artifact: Artifact,
) -> list[CompletionSet]:
    """Rows with their completions scored, without the completions that have no grade (dropped) and rows left empty."""
    found = iter(zip(scores, reasons, strict=True))
    kept = []
    for row in rows:
        completions = []
        for completion in row.completions:
            score, missing = next(found)
            if score is not None:
                completions.append(completion.model_copy(update={"score": score}))
                continue
            reason, _, detail = str(missing).partition(": ")
            artifact.drop(row.model_copy(update={"completions": [completion]}), reason, detail)
        if completions:
            kept.append(row.model_copy(update={"completions": completions}))
    return kept


def record(
    artifact: Artifact,
    scored: Sequence[CompletionSet],
    scorer: JudgeScorer,
    judges: Sequence[str],
    config: JudgeConfig,
) -> None:
    """Write down what came of it, and stop when too many completions have no grade, or all of them.

    A completion that there is nothing to compare with has none either, but no answer was missing.
    """
    from alignkit.reporting.yields import what_it_took
    from alignkit.scoring.judge import NOTHING_TO_COMPARE
    from alignkit.teacher.client import Usage, sum_usage

    scores = [completion.score for row in scored for completion in row.completions if completion.score is not None]
    failures = Counter(str(reason).partition(": ")[0] for reason in scorer.reasons if reason is not None)
    alone = failures.pop(NOTHING_TO_COMPARE, 0)
    total, failed = len(scorer.reasons) - alone, failures.total()
    usage = sum_usage([asdict(judge.usage) for judge in scorer.judges])
    for name, value in what_it_took(Usage(**usage), config.teacher.prices):
        LOG.info("%-7s %s", name, value)
    spreads = [each.spread for each in scorer.grades if each.spread is not None]
    artifact.metrics |= {"teacher": ", ".join(judges), "usage": usage}
    artifact.metrics |= {"rows": len(scored), "completions": len(scores), "without_grade": failed + alone}
    artifact.metrics["grades"] = sum(len(each.given) for each in scorer.grades)
    artifact.metrics["missing_grades"] = sum(len(each.missing) for each in scorer.grades)
    artifact.metrics["scores"] = {
        str(score): count for score, count in sorted(Counter(round(score) for score in scores).items())
    }
    if spreads:
        artifact.metrics["mean_spread"] = fmean(spreads)
    if scorer.pairwise:
        artifact.metrics |= {"comparisons": scorer.compared, "decided_by_order": scorer.swayed}
    if scores:
        artifact.metrics["mean_score"] = fmean(scores)
        artifact.summary = f"{len(scores)} completions, mean score {fmean(scores):.2f} of 10"
    if scores and scorer.pairwise:
        artifact.summary = f"{len(scores)} completions, {scorer.swayed} of {scorer.compared} verdicts hung on the order"
    detail = f"{failed} of {total} completions without a grade"
    if failures:
        detail += f", most of them: {failures.most_common(1)[0][0]}; dropped.jsonl has them all"
    if alone:
        detail += f"; {alone} others, the only ones to their prompt, had nothing to be compared with"
    artifact.check("grades readable", failed <= config.max_failure_rate * total, detail)
    if not scores:
        raise UserError(f"judge: no completion has a grade; {artifact.folder / 'dropped.jsonl'} has the reasons")


def warn_of_self_preference(
    rows: Sequence[CompletionSet], judges: Sequence[str], config: JudgeConfig, artifact: Artifact
) -> None:
    """Count what a judge wrote itself, since judges favour their own writing, and say so."""
    from alignkit.scoring.self_preference import short_name, teachers_behind

    written = Counter(short_name(completion.model) for row in rows for completion in row.completions)
    wrote_data = {short_name(teacher) for teacher in teachers_behind(Path(config.data.path))}
    found: dict[str, Any] = {}
    for judge in judges:
        own, data = written[short_name(judge)], short_name(judge) in wrote_data
        if own or data:
            found[judge] = {"completions": own, "data": data}
            what = [f"{own} of the {written.total()} completions"] * (own > 0) + ["the data behind them"] * data
            LOG.warning(
                "judge: %s also wrote %s, and judges favour their own writing; another judge is safer",
                judge,
                " and ".join(what),
            )
    artifact.metrics["self_preference"] = found


if __name__ == "__main__":
    from alignkit.core.app import stage_main

    stage_main("judge")
