"""Have a judge say which of two systems' answers is better, in both orders; warn where it judges its own writing."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from alignkit.core.artifact import Artifact
from alignkit.core.config import TeacherConfig, TeacherMode
from alignkit.core.errors import UserError
from alignkit.core.records import QAExample
from alignkit.data.chat import qa_prompt
from alignkit.evaluation.predictions import Prediction
from alignkit.evaluation.statistics import proportion
from alignkit.scoring.judge import JudgeScorer, PairVerdict
from alignkit.scoring.self_preference import short_name, teachers_behind
from alignkit.teacher.client import open_teacher, sum_usage

LOG = logging.getLogger("alignkit")

FILE = "preferences.jsonl"
LEAST_JUDGED = 0.95
"""Share of the pairs that must have a verdict."""

Pair = tuple[int, str, str]
"""A row's place, and the two systems whose answers are compared, the new one first."""


def add_preferences(
    rows: Sequence[Prediction], comparisons: Sequence[tuple[str, str]], teacher: TeacherConfig, artifact: Artifact
) -> list[Prediction]:
    """The rows with the judge's preference for each comparison (new, old); every verdict goes to preferences.jsonl.

    Each pair is shown in both orders; where these disagree it is a tie, and how often they do is in the metrics. Equal
    answers are a tie that nobody is asked about. A pair without two legible verdicts has no preference. Verdicts are in
    the response store, so that a killed run pays for none twice.
    """
    pairs = [
        (place, new, old)
        for new, old in comparisons
        for place, row in enumerate(rows)
        if new in row.answers and old in row.answers
    ]
    if not pairs:
        raise UserError("pairwise=true: no question was answered by both systems of a comparison")
    texts = {pair: (rows[pair[0]].answers[pair[1]].text, rows[pair[0]].answers[pair[2]].text) for pair in pairs}
    asked = [pair for pair in pairs if texts[pair][0] != texts[pair][1]]
    scorer = JudgeScorer(open_teacher(teacher))
    LOG.info("pairwise: %d pairs in both orders, %d others are equal answers", len(asked), len(pairs) - len(asked))
    (found,) = scorer.compare([(qa_prompt(_question(rows[pair[0]])), *texts[pair]) for pair in asked])
    verdicts = {pair: drawn[0] for pair, drawn in zip(asked, found, strict=True)}
    artifact.write_rows(FILE, [_row(rows[pair[0]].id, pair, verdicts.get(pair)) for pair in pairs])
    artifact.metrics["pairwise"] = _describe(rows, pairs, verdicts) | {"teacher": teacher.model}
    usage = asdict(scorer.teacher.usage)
    artifact.metrics["pairwise"]["usage"] = usage
    artifact.metrics["usage"] = sum_usage(
        [usage, *([artifact.metrics["usage"]] if "usage" in artifact.metrics else [])]
    )
    missing = Counter(str(each.missing).partition(": ")[0] for each in verdicts.values() if each.missing)
    detail = f"{missing.total()} of {len(pairs)} pairs without a verdict"
    detail += f", most of them: {missing.most_common(1)[0][0]}" if missing else ""
    artifact.check("pairs judged", missing.total() <= (1 - LEAST_JUDGED) * len(pairs), detail)
    preferences: dict[int, dict[str, float]] = {}
    for pair in pairs:
        if (share := _share(verdicts.get(pair))) is not None:
            preferences.setdefault(pair[0], {})[f"{pair[1]}>{pair[2]}"] = share
    return [row.model_copy(update={"preferences": preferences.get(place, {})}) for place, row in enumerate(rows)]


def warn_of_self_preference(
    teacher: TeacherConfig, adapters: Mapping[str, str], data_path: str, artifact: Artifact
) -> None:
    """Say so when the judge also wrote what a system was trained on, or the held-out rows.

    The scripted teacher goes by rules, and has no writing of its own to prefer.
    """
    if teacher.mode is TeacherMode.scripted:
        return
    judge = short_name(teacher.model)
    wrote = [
        name
        for name, adapter in adapters.items()
        if adapter and judge in map(short_name, teachers_behind(Path(adapter)))
    ]
    held_out = judge in map(short_name, teachers_behind(Path(data_path)))
    artifact.metrics["self_preference"] = {"judge": teacher.model, "systems": wrote, "held_out": held_out}
    if wrote or held_out:
        what = [f"the training data of {', '.join(wrote)}"] * bool(wrote) + ["the held-out rows"] * held_out
        LOG.warning(
            "evaluate: the judge %s also wrote %s, and judges favour their own writing; another judge is safer",
            teacher.model,
            " and ".join(what),
        )


def _question(row: Prediction) -> QAExample:
    return QAExample(id=row.id, instruction=row.instruction, input=row.input)


def _share(verdict: PairVerdict | None) -> float | None:
    """What the new answer won; equal answers, of which there is no verdict, are a tie."""
    return 0.5 if verdict is None else verdict.share


def _row(id: str, pair: Pair, verdict: PairVerdict | None) -> dict[str, Any]:
    row: dict[str, Any] = {"id": id, "new": pair[1], "old": pair[2], "preference": _share(verdict)}
    if verdict is None:
        return row | {"equal": True}
    return row | {"new_first": verdict.forward, "old_first": verdict.backward, "missing": verdict.missing}


def _describe(
    rows: Sequence[Prediction], pairs: Sequence[Pair], verdicts: Mapping[Pair, PairVerdict]
) -> dict[str, Any]:
    """How many pairs there were, and how far the judge went by their order rather than by what they say."""
    judged = {pair: each for pair, each in verdicts.items() if each.share is not None}
    described: dict[str, Any] = {
        "pairs": len(pairs),
        "equal_answers": len(pairs) - len(verdicts),
        "missing": len(verdicts) - len(judged),
        "favoured_first": sum(each.swayed_to == "first" for each in judged.values()),
        "favoured_second": sum(each.swayed_to == "second" for each in judged.values()),
    }
    if judged:
        disagreed = [float(not each.consistent) for each in judged.values()]
        described["disagreed_with_itself"] = proportion(disagreed, [rows[pair[0]].cluster for pair in judged])
    return described
