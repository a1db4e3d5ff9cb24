"""Best of n: the estimator and its cost by hand, and what is reported of scores, grades and greedy answers."""

from __future__ import annotations

import math
from itertools import combinations
from statistics import mean

import pytest
from choosing import completion, row

from alignkit.evaluation.best_of_n import (
    Judged,
    by_grade,
    by_score,
    describe_best_of_n,
    describe_scores,
    latest_over_previous,
)
from alignkit.scoring.best_of_n import expected_best, kl_bound, powers_of_two, ranked

# -- arithmetic --------------------------------------------------------------------------------------------------------


def test_expected_best_by_hand() -> None:
    scores = [3.0, 1.0, 2.0, 4.0]
    # Best of 2 among {1, 2, 3, 4}: the pairs' maxima are 2 3 4 3 4 4, mean 20/6.
    assert expected_best(scores, 1) == 2.5
    assert expected_best(scores, 2) == pytest.approx(20 / 6)
    assert expected_best(scores, 3) == pytest.approx((3 + 4 + 4 + 4) / 4)
    assert expected_best(scores, 4) == 4.0
    assert expected_best(scores, 9) == 4.0  # no more than there are


def test_expected_best_equals_the_mean_over_all_subsets() -> None:
    scores = [0.3, -1.0, 2.5, 0.1, 0.7, 1.9]
    grades = [5.0, 1.0, 2.0, 9.0, 7.0, 4.0]
    for k in range(1, 7):
        subsets = list(combinations(range(6), k))
        assert expected_best(scores, k) == pytest.approx(mean(max(scores[i] for i in subset) for subset in subsets))
        chosen = [max(subset, key=lambda i: scores[i]) for subset in subsets]
        assert expected_best(scores, k, grades) == pytest.approx(mean(grades[i] for i in chosen))


def test_equal_scores_count_with_their_mean_value() -> None:
    # Both completions score 1; one of them is chosen at random, whatever their order.
    assert expected_best([1.0, 1.0], 2, [10.0, 0.0]) == expected_best([1.0, 1.0], 2, [0.0, 10.0]) == 5.0
    # With a third one below, two of three pairs hold exactly one of the equals and one pair holds both.
    assert expected_best([1.0, 1.0, 0.0], 2, [10.0, 0.0, 3.0]) == pytest.approx((10 + 0 + 5) / 3)


def test_powers_of_two_end_with_the_number_itself() -> None:
    assert powers_of_two(8) == [1, 2, 4, 8]
    assert powers_of_two(6) == [1, 2, 4, 6]
    assert powers_of_two(1) == [1]


def test_the_cost_of_best_of_n_by_hand() -> None:
    assert kl_bound(1) == 0
    assert kl_bound(2) == pytest.approx(math.log(2) - 0.5)
    # A policy that draws a and b with 1/2 each: best of 2 is a with 3/4. 3/4 log 3/2 + 1/4 log 1/2 is below the bound.
    assert 0.75 * math.log(1.5) + 0.25 * math.log(0.5) == pytest.approx(0.1308, abs=1e-4)
    assert kl_bound(2) == pytest.approx(0.1931, abs=1e-4)
    # Without equals the best of n has density n F^(n-1); with many values the sum over them comes near the bound.
    values, n = 20_000, 4
    shares = [(place / values) ** n - ((place - 1) / values) ** n for place in range(1, values + 1)]
    divergence = sum(share * math.log(share * values) for share in shares if share)
    assert divergence < kl_bound(n)
    assert divergence == pytest.approx(kl_bound(n), abs=1e-4)


def test_texts_are_ranked_once_the_first_of_equals_first() -> None:
    drawn = [
        completion("cut", 9.0, finished=False),
        completion("none", None),
        completion("a", 2.0),
        completion("b", 3.0),
        completion("c", 3.0),
        completion("b", 3.0),
        completion("d", 2.0),
        completion("cut low", -9.0, finished=False),
    ]
    assert [(each.text, each.score) for each in ranked(drawn)] == [("b", 3.0), ("c", 3.0), ("a", 2.0), ("d", 2.0)]
    assert ranked(drawn[:2]) == []


def test_a_text_with_several_scores_counts_with_their_mean() -> None:
    drawn = [completion("a", 3.0), completion("b", 2.5), completion("a", 1.0)]
    assert [(each.text, each.score) for each in ranked(drawn)] == [("b", 2.5), ("a", 2.0)]
    third = 0.1 + 0.2  # not to be changed by a sum of seven and its division
    assert ranked([completion("a", third)] * 7)[0].score == third


# -- what is reported --------------------------------------------------------------------------------------------------

ROWS = [
    row("one", completion("good", 2.0), completion("bad", 0.0)),
    row("two", completion("good", 1.0), completion("fair", 1.0), completion("cut", None, finished=False)),
    row("none", completion("cut", None, finished=False)),
]
GREEDY = [row("one", completion("good", 2.0)), row("two", completion("fair", 0.0))]


def test_curves_and_gains_by_hand() -> None:
    found = describe_best_of_n({"score": by_score(ROWS, GREEDY)}, 2)
    curve, gains = found["best_of_n"]["score"], found["gains"]["score"]
    assert [curve[k]["mean"] for k in ("1", "2")] == [1.0, 1.5]  # best of two: 2 and 1
    assert curve["2"]["n"] == 2
    assert gains["best_over_single"]["mean"] == 0.5
    assert gains["best_over_greedy"]["mean"] == 0.5  # (2 - 2 + 1 - 0) / 2
    assert gains["single_over_greedy"]["mean"] == 0.0  # (1 - 2 + 1 - 0) / 2
    assert found["greedy"]["score"]["mean"] == 1.0
    assert (
        "greedy" not in gains and "best_over_greedy" not in describe_best_of_n({"s": by_score(ROWS)}, 2)["gains"]["s"]
    )


def test_gains_are_paired_by_question() -> None:
    # Questions differ by far more than answers do, but the gain is 1 for each of them: its interval is a point.
    questions = [Judged([height, height + 2.0], [height, height + 2.0], height) for height in (0.0, 100.0, -50.0)]
    gain = describe_best_of_n({"score": questions}, 2)["gains"]["score"]["best_over_single"]
    assert (gain["low"], gain["mean"], gain["high"]) == (1.0, 1.0, 1.0)


def test_a_question_with_an_ungraded_answer_is_left_out_of_the_grade_curve() -> None:
    graded = [
        row("one", completion("good", 9.0), completion("bad", 1.0)),
        row("two", completion("good", 9.0), completion("fair", None)),
        row("none"),
    ]
    questions, without = by_grade(ROWS, graded, [row("one", completion("good", 7.0))])
    assert without == 1
    assert questions == [Judged([2.0, 0.0], [9.0, 1.0], 7.0)]
    found = describe_best_of_n({"score": by_score(ROWS), "grade": questions, "nothing": []}, 2)
    assert found["best_of_n"]["grade"]["2"]["mean"] == 9.0
    assert found["gains"]["grade"]["best_over_greedy"]["mean"] == 2.0
    assert set(found["best_of_n"]) == {"score", "grade"}


def test_the_latest_version_is_compared_by_question() -> None:
    unscored = row("two", completion("old", None))
    previous = [row("one", completion("old", 0.5)), unscored, row("three", completion("x", 9.0))]
    found = latest_over_previous(ROWS, previous)
    assert found is not None
    assert (found["mean"], found["n"]) == (0.5, 1)  # (2 + 0) / 2 - 0.5, and nothing to compare elsewhere
    assert latest_over_previous(ROWS, previous[1:]) is None


def test_scores_are_described_by_hand() -> None:
    found = describe_scores(ROWS, 4)
    assert found["mean_score"] == 1.0
    assert found["mean_best_score"] == 1.5
    alike = describe_scores([row("a", completion("one", 1.0), completion("three", 1.0))], 2)
    assert alike["score_length_correlation"] is None  # all scores are equal
    assert found["score_length_correlation"] == pytest.approx(1 / math.sqrt(1.5))  # lengths 4 3 4 4, scores 2 0 1 1
    assert found["kl_bound"] == {"1": 0.0, "2": kl_bound(2), "4": kl_bound(4)}
