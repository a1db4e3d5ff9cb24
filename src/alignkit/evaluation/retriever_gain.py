"""How well an encoder finds held-out queries' positives, before and after training, in the passages of these rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from alignkit.core.records import RetrievalExample
from alignkit.core.retriever_config import TaskConfig
from alignkit.evaluation.retrieval_metrics import ndcg
from alignkit.evaluation.statistics import bootstrap_mean

CUT_OFF = 10
_QUERIES_AT_ONCE = 256


def ndcg_of_each(
    encoder: Any, examples: Sequence[RetrievalExample], tasks: Mapping[str, TaskConfig]
) -> dict[str, dict[int, float]]:
    """Task -> place of a row -> its nDCG@10; rows without positive are left out.

    Each task's queries are searched in all passages of the task's rows, exactly.
    """
    found = {}
    for name, task in tasks.items():
        own = [place for place, example in enumerate(examples) if example.task == name and example.pos]
        if not own:
            continue
        texts = list(dict.fromkeys(text for each in examples if each.task == name for text in (*each.pos, *each.neg)))
        passages = _embed(encoder, [task.passage_instruction + text for text in texts])
        queries = _embed(encoder, [task.query_instruction + examples[place].query for place in own])
        scores: dict[int, float] = {}
        for start in range(0, len(own), _QUERIES_AT_ONCE):
            order = np.argsort(-(queries[start : start + _QUERIES_AT_ONCE] @ passages.T), axis=1, kind="stable")
            for place, ranked in zip(own[start:], order[:, :CUT_OFF].tolist(), strict=False):
                scores[place] = ndcg([texts[number] for number in ranked], set(examples[place].pos), CUT_OFF)
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


def _embed(encoder: Any, texts: list[str]) -> Any:
    cosine = encoder.similarity_fn_name == "cosine"
    return encoder.encode(texts, prompt="", normalize_embeddings=cosine, show_progress_bar=False)
