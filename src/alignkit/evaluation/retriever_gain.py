"""How well an encoder finds held-out queries' positives, before and after training, in the passages of these rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from alignkit.core.records import RetrievalExample
from alignkit.core.retriever_config import TaskConfig
from alignkit.evaluation.statistics import bootstrap_mean

CUT_OFF = 10
_QUERIES_AT_ONCE = 256


def ndcg(ranked: Sequence[int], relevant: set[int], cut_off: int = CUT_OFF) -> float:
    """Sum over ranks r <= cut_off of rel_r / log2(r + 1), divided by that of the best order (Järvelin and Kekäläinen,
    2002); rel_r is 1 for a relevant passage."""
    found = sum(1 / math.log2(place + 2) for place, passage in enumerate(ranked[:cut_off]) if passage in relevant)
    return found / sum(1 / math.log2(place + 2) for place in range(min(cut_off, len(relevant))))


def ndcg_of_each(
    encoder: Any, examples: Sequence[RetrievalExample], tasks: Mapping[str, TaskConfig]
) -> dict[str, dict[int, float]]:
    """Task -> place of a row -> its nDCG@10; rows without positive are left out.

    Each task's queries are searched in all passages of the task's rows, exactly.
    """
    found = {}
    for name, task in tasks.items():
        own = [place for place, example in enumerate(examples) if example.task == name and example.pos]
        texts = dict.fromkeys(text for example in examples if example.task == name for text in _passages(example))
        if not own:
            continue
        numbers = {text: number for number, text in enumerate(texts)}
        passages = _embed(encoder, [task.passage_instruction + text for text in texts])
        queries = _embed(encoder, [task.query_instruction + examples[place].query for place in own])
        scores: dict[int, float] = {}
        for start in range(0, len(own), _QUERIES_AT_ONCE):
            order = np.argsort(-(queries[start : start + _QUERIES_AT_ONCE] @ passages.T), axis=1, kind="stable")
            for place, ranked in zip(own[start:], order[:, :CUT_OFF].tolist(), strict=False):
                scores[place] = ndcg(ranked, {numbers[text] for text in examples[place].pos})
        found[name] = scores
    return found


def gains(
    before: Mapping[str, Mapping[int, float]],
    after: Mapping[str, Mapping[int, float]],
    examples: Sequence[RetrievalExample],
    seed: int,
) -> dict[str, Any]:
    """Task (and `all`) -> nDCG@10 `before` and `after`, and the paired `gain`, each with its 95 % interval.

    Rows of one query are drawn together.
    """
    found: dict[str, Any] = {}
    pooled = {"all": list(before)} if len(before) > 1 else {}
    for name, members in {**pooled, **{task: [task] for task in before}}.items():
        places = [(task, place) for task in members for place in before[task]]
        queries = [f"{task} {examples[place].query_id}" for task, place in places]
        sides = {side: [scores[task][place] for task, place in places] for side, scores in (
            ("before", before), ("after", after)
        )}  # fmt: skip
        differences = [new - old for old, new in zip(sides["before"], sides["after"], strict=True)]
        values = {**sides, "gain": differences}
        found[name] = {side: bootstrap_mean(each, queries, seed) for side, each in values.items()}
    return found


def _passages(example: RetrievalExample) -> list[str]:
    return [*example.pos, *example.neg]


def _embed(encoder: Any, texts: list[str]) -> Any:
    cosine = encoder.similarity_fn_name == "cosine"
    return encoder.encode(texts, prompt="", normalize_embeddings=cosine, show_progress_bar=False)
