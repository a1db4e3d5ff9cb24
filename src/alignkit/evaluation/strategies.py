"""Does a way of selecting rows pay? Train on what each one selects, as many rows each, and examine the adapters."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignkit.core.artifact import read_manifest
from alignkit.core.config import RowsConfig
from alignkit.core.records import QAExample
from alignkit.core.steps import Step, connect, describe, execute, hand_over, make_step_in, settings
from alignkit.data.jsonl import read_records
from alignkit.evaluation.comparison import HELPED, verdict
from alignkit.evaluation.predictions import SCORES, Prediction, compare, summarise

LOG = logging.getLogger("alignkit")


@dataclass(frozen=True)
class Trial:
    """Strategies to select by, seeds to repeat everything with, and the settings of the stages that do it."""

    home: Path
    """Holds pool.jsonl, the scored rows to select from; the steps' run folders go to seed<number>/ in it."""
    strategies: Sequence[str]
    seeds: Sequence[int]
    k: int
    held_out: str
    judge: bool
    shared: Mapping[str, Any]
    selecting: Mapping[str, Any]
    training: Mapping[str, Any]
    answering: Mapping[str, Any]
    teaching: Mapping[str, Any]


def run_trial(trial: Trial, pool: Sequence[QAExample], workers: int) -> dict[str, Any]:
    """Select, train and examine with every strategy and seed, and compare; what is done already is not done again."""
    hand_over(trial.home / "pool.jsonl", pool)
    steps = steps_of(trial)
    for number, (step, _) in enumerate(execute(steps, workers, trial.home), start=1):
        LOG.info("[%d/%d] %s", number, len(steps), describe(step))
    return read_trials(trial)


def steps_of(trial: Trial) -> list[Step]:
    """For each seed: select by each strategy, train an adapter from the base on each selection, examine them all."""
    selecting = [*_all(trial.shared), *_all(trial.selecting), *_all(trial.training), *_all(trial.answering)]
    steps: list[Step] = []
    for seed in trial.seeds:
        home = trial.home / f"seed{seed}"
        adapters = ["models.base=null"]
        for strategy in trial.strategies:
            pool = [*settings("data.path", str(trial.home / "pool.jsonl")), *_all(trial.teaching)]
            choice = [f"seed={seed}", f"strategy={strategy}", f"k={trial.k}"]
            steps.append(make_step_in(home, strategy, "select", [*pool, *choice, *selecting]))
            rows = settings("data.path", str(home / strategy / "selected.jsonl"))
            training = [f"seed={seed}", *rows, *_all(trial.shared), *_all(trial.training)]
            steps.append(make_step_in(home, f"{strategy}-sft", "sft", training))
            adapters += settings(f"models.{strategy}", str(home / f"{strategy}-sft" / "adapter"))
        examining = [f"seed={seed}", *settings("data.path", trial.held_out), *settings("judge", trial.judge), *adapters]
        examining += [*_all(trial.shared), *_all(trial.answering), *_all(trial.teaching)]
        steps.append(make_step_in(home, "evaluate", "evaluate", examining))
    connect(steps)
    return steps


def read_trials(trial: Trial) -> dict[str, Any]:
    """Each strategy's scores over all seeds and by seed, and each one's difference from each that stands before it.

    Intervals are bootstrapped over statements, all seeds of a question together. They say how sure the difference is
    for other questions; how much the seeds differ is told beside it.
    """
    by_seed = [
        read_records(RowsConfig(path=str(trial.home / f"seed{seed}" / "evaluate" / "predictions.jsonl")), Prediction)
        for seed in trial.seeds
    ]
    pooled = [row for rows in by_seed for row in rows]
    strategies = [
        {
            "name": name,
            "rows": [_rows(trial.home / f"seed{seed}" / name) for seed in trial.seeds],
            "scores": _scores(pooled, name),
            "by_seed": [_scores(rows, name) for rows in by_seed],
        }
        for name in trial.strategies
    ]
    differences = [
        _difference(pooled, by_seed, new, old)
        for place, new in enumerate(trial.strategies)
        for old in trial.strategies[:place]
    ]
    return {"budget": trial.k, "strategies": strategies, "differences": differences}


def _scores(rows: Sequence[Prediction], name: str) -> dict[str, Any]:
    summary = summarise(rows, name)
    return {score: summary[score] for score in SCORES if score in summary}


def _difference(
    pooled: Sequence[Prediction], by_seed: Sequence[Sequence[Prediction]], new: str, old: str
) -> dict[str, Any]:
    found = compare(pooled, new, old)
    scores = {score: found[score] | {"helped": verdict(found[score]) == HELPED} for score in SCORES if score in found}
    each = [{score: compare(rows, new, old)[score] for score in scores} for rows in by_seed]
    return {"name": f"{new} - {old}", **scores, "by_seed": each}


def _rows(folder: Path) -> int:
    return int((read_manifest(folder) or {})["metrics"]["rows_selected"])


def _all(values: Mapping[str, Any]) -> list[str]:
    return [override for key, value in values.items() for override in settings(key, value)]
