"""What a ranking is worth: values derived by hand, and intervals that follow the queries."""

from __future__ import annotations

from math import log2

import pytest

from alignkit.evaluation.retrieval_metrics import (
    RankedQuery,
    compare,
    names,
    ndcg,
    precision,
    recall,
    reciprocal_rank,
    scores_of,
    summarise,
)
from alignkit.reporting.retrieval import headline, retrieval_text

FOUND, RELEVANT = ("a", "b", "c", "d"), {"b", "d", "z"}


def ranked(id: str, found: str, relevant: str, task: str = "qa", holds: tuple[bool, ...] | None = None) -> RankedQuery:
    return RankedQuery(id, task, tuple(found), frozenset(relevant), holds)


def test_values_by_hand() -> None:
    assert [reciprocal_rank(FOUND, RELEVANT, k) for k in (1, 2, 4)] == [0, 0.5, 0.5]
    assert [recall(FOUND, RELEVANT, k) for k in (1, 2, 4, 9)] == pytest.approx([0, 1 / 3, 2 / 3, 2 / 3])
    assert [precision(FOUND, RELEVANT, k) for k in (1, 2, 4, 8)] == [0, 0.5, 0.5, 0.25]
    ideal = 1 + 1 / log2(3) + 1 / log2(4)
    assert ndcg(FOUND, RELEVANT, 4) == pytest.approx((1 / log2(3) + 1 / log2(5)) / ideal)
    assert ndcg(FOUND, RELEVANT, 4) == pytest.approx(0.498, abs=5e-4)
    assert ndcg(FOUND, {"a", "b"}, 1) == 1  # one place cannot hold two: the best ranking has no more, either
    assert ndcg((), RELEVANT, 3) == recall((), RELEVANT, 3) == reciprocal_rank((), RELEVANT, 3) == 0


def test_a_hit_is_an_answer_within_the_cut_off_and_unknown_where_no_answer_can_be_looked_for() -> None:
    scores = scores_of(ranked("1", "ab", "a", holds=(False, True)), [1, 2])
    assert (scores["hit@1"], scores["hit@2"]) == (0, 1)
    assert "hit@1" not in scores_of(ranked("1", "ab", "a"), [1])


def test_the_best_ranking_scores_one_and_scores_rise_with_the_cut_off() -> None:
    best = scores_of(ranked("1", "ab", "ab", holds=(True, True)), [2])
    assert set(best.values()) == {1.0}
    for metric in (recall, reciprocal_rank):
        values = [metric(FOUND, RELEVANT, k) for k in range(1, 6)]
        assert values == sorted(values)


def test_figures_are_by_task_and_over_all() -> None:
    queries = [ranked("1", "ab", "a"), ranked("2", "ab", "b"), ranked("3", "ab", "c", task="icl")]
    found = summarise(queries, [1, 2])
    assert list(found) == ["all", "icl", "qa"]
    assert found["qa"]["mrr@2"]["mean"] == 0.75
    assert found["icl"]["mrr@2"]["mean"] == 0
    assert found["all"]["mrr@2"]["mean"] == pytest.approx(0.5)
    assert found["all"]["mrr@2"]["n"] == 3
    assert found["all"]["mrr@2"]["low"] <= 0.5 <= found["all"]["mrr@2"]["high"]
    assert not any(name.startswith("hit") for name in found["all"])
    assert [name for name in names([1, 2]) if name in found["all"]] == list(found["all"])


def test_a_comparison_is_paired() -> None:
    old = [ranked(str(n), "xa" if n % 2 else "xy", "a") for n in range(40)]
    new = [ranked(str(n), "ax" if n % 2 else "xy", "a") for n in range(40)]
    same_passage = compare(new, old, [2])["all"]["mrr@2"]
    assert same_passage["mean"] == pytest.approx(0.25)
    assert same_passage["low"] == same_passage["high"]  # all ask for one passage: one independent observation
    after, before = [
        [ranked(q.id, "".join(q.found).replace("a", q.id[-1]), q.id[-1]) for q in side] for side in (new, old)
    ]
    difference = compare(after, before, [2])["qa"]["mrr@2"]
    assert difference["mean"] == pytest.approx(0.25)
    assert difference["low"] < 0.25 < difference["high"]
    with pytest.raises(ValueError, match="same queries"):
        compare(new[1:], old, [2])


def test_the_table_says_all_of_it() -> None:
    queries = [ranked("1", "ab", "a"), ranked("2", "ab", "b")]
    metrics = {
        "cutoffs": [1, 2],
        "retrievers": {"bm25": summarise(queries, [1, 2])},
        "retrieval_comparisons": [{"new": "bm25", "old": "bm25", **compare(queries, queries, [1, 2])}],
    }
    text = retrieval_text(metrics)
    assert "qa, 2 queries, %" in text and "all, 2" not in text  # of a single task there is one table
    assert "bm25 over bm25" in text and "mrr@2" in text and "75.0 [50.0, 100.0]" in text and "+0.0" in text
    assert headline(metrics) == "nDCG@2 bm25 0.815"
