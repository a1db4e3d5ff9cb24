"""What retrievers find, as plain text: scores by task and cut-off, and what one has over another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_COLUMN = 22


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
    k = max([each for each in metrics["cutoffs"] if each <= 10] or [min(metrics["cutoffs"])])
    scores = {name: each["all"][f"ndcg@{k}"]["mean"] for name, each in metrics["retrievers"].items()}
    return f"nDCG@{k} " + ", ".join(f"{name} {score:.3f}" for name, score in scores.items())


def _cell(estimate: Mapping[str, float], sign: str) -> str:
    mean, low, high = (f"{100 * estimate[key]:{sign}.1f}" for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"
