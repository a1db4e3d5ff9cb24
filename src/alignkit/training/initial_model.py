"""The initial model of MoDS: trained on a few rows, through the stages themselves, to see which others are needed."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alignkit.core.config import RowsConfig
from alignkit.core.journal import Journal
from alignkit.core.records import CompletionSet, QAExample
from alignkit.core.steps import connect, describe, execute, hand_over, make_step_in, settings
from alignkit.data.jsonl import read_records
from alignkit.scoring.quality import RowScorer

LOG = logging.getLogger("alignkit")


def answer_by_initial_model(
    home: Path,
    seeds: Sequence[QAExample],
    rows: Sequence[QAExample],
    shared: Mapping[str, Any],
    training: Mapping[str, Any],
    sampling: Any,
) -> dict[str, str]:
    """Train a model on the seeds, from the base, and let it answer every row: id -> answer.

    `sft` and `sample` run in `home`, each in a process of its own; what they finished before a kill is not done again.
    `shared`, `training` and `sampling` are settings for them. An answer that did not come to its end is empty; a row
    that is too long for the model has none.
    """
    hand_over(home / "seeds.jsonl", seeds)
    hand_over(home / "rows.jsonl", rows)
    common = [override for key, value in shared.items() for override in settings(key, value)]
    fitting = [override for key, value in training.items() for override in settings(key, value)]
    answering = [*settings("adapter", str(home / "sft" / "adapter")), *settings("sampling", sampling)]
    steps = [
        make_step_in(home, "sft", "sft", [*settings("data.path", str(home / "seeds.jsonl")), *common, *fitting]),
        make_step_in(home, "sample", "sample", [*settings("data.path", str(home / "rows.jsonl")), *common, *answering]),
    ]
    connect(steps)
    for step, _ in execute(steps, 1, home):
        LOG.info("%s", describe(step))
    answered = read_records(RowsConfig(path=str(home / "sample" / "completions.jsonl")), CompletionSet)
    return {row.id: row.completions[0].text if row.completions[0].finished else "" for row in answered}


def score_answers(
    rows: Sequence[QAExample], answers: Mapping[str, str], scorer: RowScorer, journal: Journal
) -> dict[int, float | None]:
    """Place of each answered row -> how good the initial model's answer is; None for an empty one, or without score."""
    answered = [place for place, row in enumerate(rows) if row.id in answers]
    changed = [rows[place].model_copy(update={"output": answers[rows[place].id], "scores": {}}) for place in answered]
    return {place: score for place, (score, _) in zip(answered, scorer.score(changed, journal), strict=True)}
