"""What retrievers find, as plain text and in the report: scores by cut-off, and what one has over another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from alignkit.evaluation.statistics import Estimate
from alignkit.reporting.runs import Run

_COLUMN = 22
Line = tuple[str, list[list[Estimate | None]]]
"""A title, and for each column its estimates by seed."""


def retrieval_text(metrics: Mapping[str, Any]) -> str:
    """A table for each task, scores in % with their 95 % intervals, and one of differences in percentage points."""
    retrievers, comparisons = metrics["retrievers"], metrics["retrieval_comparisons"]
    columns = [*retrievers, *(f"{each['new']} over {each['old']}" for each in comparisons)]
    width = max(_COLUMN, 2 + max(map(len, columns)))
    tasks = list(next(iter(retrievers.values())))
    if len(tasks) == 2:  # "all" is the one task
        tasks = tasks[1:]
    lines: list[str] = []
    for task in tasks:
        scores = next(iter(retrievers.values()))[task]
        queries = next(iter(scores.values()))["n"]
        title = f"{task}, {queries} queries, %"
        lines.append(f"{title:24s}" + "".join(f"{column:>{width}s}" for column in columns))
        for name in scores:
            cells = [_cell(each[task][name], "") for each in retrievers.values()]
            cells += [_cell(each[task][name], "+") for each in comparisons]
            lines.append(f"{name:24s}" + "".join(f"{cell:>{width}s}" for cell in cells))
        lines.append("")
    return "\n".join(line.rstrip() for line in lines)


def headline(metrics: Mapping[str, Any]) -> str:
    """nDCG at 10, or at the largest cut-off below, of every retriever."""
    k = main_cutoff(metrics["cutoffs"])
    scores = {name: each["all"][f"ndcg@{k}"]["mean"] for name, each in metrics["retrievers"].items()}
    return f"nDCG@{k} " + ", ".join(f"{name} {score:.3f}" for name, score in scores.items())


def main_cutoff(cutoffs: Sequence[int]) -> int:
    """10, or the largest below, or else the smallest there is."""
    return max([each for each in cutoffs if each <= 10] or [min(cutoffs)])


def retrieval_tables(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """For each evaluation of retrievers in the first run: its main scores and differences over all queries, by seed."""
    tables = []
    for step in runs[0].of_stage("evaluate_retriever"):
        metrics = [other.metrics if (other := run.step(step.name)) else None for run in runs]
        first, k = step.metrics, main_cutoff(step.metrics["cutoffs"])
        known = next(iter(first["retrievers"].values()))["all"]
        wanted = [f"ndcg@{k}", f"mrr@{k}", f"recall@{k}", f"recall@{min(first['cutoffs'])}", f"hit@{k}"]
        columns = [name for name in dict.fromkeys(wanted) if name in known]
        pairs = [_pairs(each) for each in metrics]
        tables.append(
            {
                "step": step.name,
                "queries": first["queries"],
                "passages": first["passages"],
                "columns": columns,
                "scores": _lines(
                    first["retrievers"], [each["retrievers"] if each else {} for each in metrics], columns
                ),
                "differences": _lines(pairs[0], pairs, columns),
            }
        )
    return tables


def retriever_gains(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """For each retriever that was trained: nDCG@10 of its held-out queries before and after, and the gain, by seed."""
    gains = []
    for step in runs[0].of_stage("retriever"):
        metrics = [other.metrics if (other := run.step(step.name)) else {} for run in runs]
        found = [each.get("held_out_ndcg_at_10") or {} for each in metrics]
        whole = [each.get("all") or next(iter(each.values()), None) for each in found]
        if whole[0]:
            sides = {side: [each[side] if each else None for each in whole] for side in ("before", "after", "gain")}
            gains.append({"step": step.name, **sides})
    return gains


def _pairs(metrics: Mapping[str, Any] | None) -> dict[str, Any]:
    compared = metrics["retrieval_comparisons"] if metrics else []
    return {f"{each['new']} over {each['old']}": each for each in compared}


def _lines(titles: Mapping[str, Any], found: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> list[Line]:
    """A line for each title, over the queries of all tasks."""
    return [
        (title, [[each[title]["all"].get(column) if title in each else None for each in found] for column in columns])
        for title in titles
    ]


def _cell(estimate: Mapping[str, float], sign: str) -> str:
    mean, low, high = (f"{100 * estimate[key]:{sign}.1f}" for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"
