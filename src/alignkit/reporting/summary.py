"""The report's figures as data: report.json, whose shape docs/report.md describes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from alignkit.reporting import charts, costs, tables
from alignkit.reporting.answer_lengths import answer_lengths, training_lengths
from alignkit.reporting.figures import Curve
from alignkit.reporting.held_out import Gain, HeldOut
from alignkit.reporting.page import divergences, headline
from alignkit.reporting.retrieval import retrieval_tables, retriever_gains
from alignkit.reporting.rewards import best_of_n_gains
from alignkit.reporting.rounds import Rounds
from alignkit.reporting.runs import Run

FORMAT = 1
"""Raised when a key of report.json is renamed, removed or means something else; new keys do not raise it."""


def summarise_run(runs: Sequence[Run], held_out: HeldOut | None, rounds: Rounds | None = None) -> dict[str, Any]:
    """Everything that the page of a run shows in numbers, but for the samples, which are in predictions.jsonl."""
    run = runs[0]
    lines = costs.costs(run)
    return {
        "format": FORMAT,
        "kind": "run",
        "run": run.folder.name,
        "seeds": [each.seed for each in runs],
        "verdict": headline(held_out) if held_out else None,
        "questions": len(held_out.predictions[0]) if held_out else 0,
        "models": _models(held_out) if held_out else [],
        "comparisons": [_comparison(gain) for gain in held_out.gains] if held_out else [],
        "breakdown": _breakdown(held_out) if held_out else {},
        "rounds": [{"title": title, "gain": gain, "by_seed": each} for title, each, gain in rounds.lines()]
        if rounds
        else [],
        "stages": [{**line, "outputs": [list(each) for each in line["outputs"]]} for line in tables.stage_table(run)],
        "missing": run.missing,
        "curves": [
            *({"of": f"{name}: loss", **_curve(each)} for name, found in charts.loss_curves(runs) for each in found),
            *({"of": name, **_curve(each)} for name, found in charts.preference_curves(runs) for each in found),
        ],
        "divergences": [{"step": name, "by_seed": each} for name, each in divergences(runs)],
        "reward": [_reward(runs, step.name) for step in run.of_stage("reward", "evaluate_reward")],
        "best_of_n": [
            {"step": step.name, "curves": [_metrics(each, step.name).get("best_of_n") for each in runs]}
            for step in run.of_stage("rejection_sampling")
        ],
        "best_of_n_gains": [
            {"of": of, "comparison": name, "by_seed": each}
            for of, found in best_of_n_gains(runs)
            for name, each in found
        ],
        "retrieval": [_retrieval(each) for each in retrieval_tables(runs)],
        "retriever_gains": retriever_gains(runs),
        "lengths": {
            "answers": answer_lengths(held_out) if held_out else [],
            "training": training_lengths(run),
        },
        "checks": tables.check_table(runs),
        "cost": {"steps": [asdict(line) for line in lines], "total": costs.totals(lines)},
        "memory": costs.memory(run),
        "preflights": costs.preflights(run),
        "lineage": tables.lineage(run),
        "facts": tables.facts(run),
        "teacher": tables.teacher_statement(run),
    }


def _models(held_out: HeldOut) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "title": held_out.title(name),
            "on_ladder": name in held_out.ladder,
            "scores": {score: held_out.by_seed(name, score) for score in held_out.scores},
            "all_seeds": held_out.pooled(name, held_out.main),
        }
        for name in held_out.models
    ]


def _comparison(gain: Gain) -> dict[str, Any]:
    return {
        "title": gain.title,
        "new": gain.new,
        "old": gain.old,
        "role": gain.role,
        "decided_by": gain.score,
        "verdict": gain.verdict,
        "left_out": gain.left_out,
        "all_seeds": gain.pooled,
        "by_seed": gain.by_seed,
    }


def _breakdown(held_out: HeldOut) -> dict[str, Any]:
    return {
        tag: [
            {"value": value, "questions": number, "models": dict(zip(held_out.models, estimates, strict=True))}
            for value, number, estimates in lines
        ]
        for tag, lines in held_out.breakdown.items()
    }


def _curve(curve: Curve) -> dict[str, Any]:
    return {"title": curve.title, "step": list(curve.x), "value": list(curve.y)}


def _retrieval(found: Mapping[str, Any]) -> dict[str, Any]:
    named = {
        kind: [{"title": title, **dict(zip(found["columns"], cells, strict=True))} for title, cells in found[kind]]
        for kind in ("scores", "differences")
    }
    return {key: found[key] for key in ("step", "queries", "passages")} | named


def _reward(runs: Sequence[Run], name: str) -> dict[str, Any]:
    keys = ("held_out_accuracy", "train_accuracy", "held_out")
    found = [_metrics(run, name) for run in runs]
    return {"step": name, "by_seed": [{key: each.get(key) for key in keys} for each in found]}


def _metrics(run: Run, name: str) -> Mapping[str, Any]:
    step = run.step(name)
    return step.metrics if step else {}
