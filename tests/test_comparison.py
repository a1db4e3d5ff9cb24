"""Tests of paired differences by document, with values derived by hand, and a simulation of what they promise."""

from __future__ import annotations

import json
import math
from statistics import NormalDist

import numpy as np
import pytest
from scipy.stats import t as student
from scipy.stats import ttest_1samp

from alignkit.evaluation.comparison import (
    Paired,
    compare_paired,
    holm,
    minimum_detectable_difference,
    permutation_p,
    win_rate,
)
from alignkit.evaluation.predictions import ModelAnswer, Prediction, compare
from alignkit.evaluation.statistics import bootstrap_mean, wilson


def singles(differences: list[float]) -> list[str]:
    return [f"d{place}" for place in range(len(differences))]


# -- the permutation test --------------------------------------------------------------------------------------------


def test_permutation_by_hand() -> None:
    """Totals 1, 2, 3: of the eight sums -6 -4 -2 0 0 2 4 6 two are at least as far from 0 as 6, four as 4 is."""
    assert permutation_p([1, 2, 3], singles([1, 2, 3])) == 2 / 8
    assert permutation_p([-1, 2, 3], singles([1, 2, 3])) == 4 / 8
    assert permutation_p([0, 0], singles([0, 0])) == 1


def test_signs_of_whole_clusters_are_flipped() -> None:
    """Six questions about two documents with totals 3 and 3: two of the four sums 6, 0, 0, -6 are as extreme."""
    assert permutation_p([1.0] * 6, ["a", "b"] * 3) == 2 / 4
    assert permutation_p([1.0] * 6, singles([1.0] * 6)) == 2 / 64
    assert permutation_p([1.0, -1.0, 0.5, -0.5], ["a", "a", "b", "b"]) == 1  # both totals are 0


@pytest.mark.parametrize(("gained", "lost"), [(5, 1), (1, 5), (10, 0), (3, 3)])
def test_with_one_question_a_document_it_is_mcnemars_exact_test(gained: int, lost: int) -> None:
    both = gained + lost
    mcnemar = min(1.0, 2 * sum(math.comb(both, k) for k in range(min(gained, lost) + 1)) / 2**both)
    differences = [1.0] * gained + [-1.0] * lost + [0.0] * 30
    assert permutation_p(differences, singles(differences)) == pytest.approx(mcnemar)


def test_many_clusters_are_sampled_near_the_exact_value_and_never_to_zero() -> None:
    differences = [1.0] * 15 + [-1.0] * 5
    exact = 2 * sum(math.comb(20, k) for k in range(6)) / 2**20  # 0.0414
    assert permutation_p(differences, singles(differences)) == pytest.approx(exact, abs=4 * math.sqrt(0.04 / 10_000))
    assert permutation_p([1.0] * 200, singles([1.0] * 200)) == 1 / 10_001
    assert permutation_p(differences, singles(differences), seed=1) == permutation_p(
        differences, singles(differences), seed=1
    )


def test_rounding_does_not_hide_an_equal_pattern() -> None:
    """Ten differences of 0.1 and one of -0.1: their sums, taken in other orders, differ in the last digit."""
    differences = [0.1] * 10 + [-0.1]
    assert permutation_p(differences, singles(differences)) == pytest.approx(2 * (1 + 11) / 2**11)


def test_per_question_tests_reject_a_true_null_far_too_often_and_ours_holds() -> None:
    """20 documents with ten questions each and no difference; 0.3 of the variance belongs to the document.

    200 rounds: a rate of 0.05 has a standard error of 0.015, so that 0.1 lies three of them away.
    """
    generator = np.random.default_rng(7)
    documents = [f"d{place // 10}" for place in range(200)]
    rejected = {"t test by question": 0, "flips by question": 0, "flips by document": 0, "bootstrap by document": 0}
    rounds = 200
    for number in range(rounds):
        shared = np.repeat(generator.normal(scale=math.sqrt(0.3), size=20), 10)
        differences = list(shared + generator.normal(scale=math.sqrt(0.7), size=200))
        rejected["t test by question"] += ttest_1samp(differences, 0).pvalue < 0.05
        rejected["flips by document"] += permutation_p(differences, documents, number) < 0.05
        interval = bootstrap_mean(differences, documents, number)
        rejected["bootstrap by document"] += not interval["low"] < 0 < interval["high"]
        if number < 50:
            rejected["flips by question"] += permutation_p(differences, singles(differences), number) < 0.05
    assert rejected["t test by question"] / rounds > 0.2
    assert rejected["flips by question"] / 50 > 0.15
    assert rejected["flips by document"] / rounds < 0.1
    assert rejected["bootstrap by document"] / rounds < 0.13  # percentiles of 20 clusters are a little narrow


# -- several tests -----------------------------------------------------------------------------------------------------


def test_holm_by_hand() -> None:
    """0.01 * 4, then 0.015 * 3 = 0.045, then 0.03 * 2 = 0.06, and 0.04 * 1 is below the one before it."""
    assert holm([0.03, 0.01, 0.04, 0.015]) == pytest.approx([0.06, 0.04, 0.06, 0.045])
    assert holm([0.9, 0.8]) == [1, 1]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


def test_all_scores_of_a_comparison_are_one_family() -> None:
    clusters = singles([0.0] * 8)
    scores = {"a": Paired([1.0] * 8, clusters), "b": Paired([1.0] * 7 + [-1.0], clusters)}
    found = compare_paired(scores)
    assert (found["a"]["p"], found["b"]["p"]) == (2 / 256, 18 / 256)
    assert (found["a"]["p_holm"], found["b"]["p_holm"]) == (4 / 256, 18 / 256)
    assert compare_paired({"a": scores["a"]})["a"]["p_holm"] == 2 / 256


# -- win rates and the size of a set -----------------------------------------------------------------------------------


def test_win_rate_by_hand() -> None:
    """Six won, two tied, two lost: 7 of 10. Ties count half, as in Wilson's interval for 7 of 10, whose lower end is
    (0.7 + 3.841459 / 20 - 1.959964 * sqrt(0.7 * 0.3 / 10 + 3.841459 / 400)) / (1 + 3.841459 / 10)."""
    differences = [2.0] * 6 + [0.0] * 2 + [-1.0] * 2
    found = win_rate(differences, singles(differences))
    assert (found["wins"], found["ties"], found["losses"], found["n"]) == (6, 2, 2, 10)
    assert (found["mean"], found["low"], found["high"]) == (0.7, wilson(7, 10)["low"], wilson(7, 10)["high"])
    assert found["low"] == pytest.approx(0.39678, abs=1e-5)
    halves = win_rate([1.0, 0.0, 0.0], singles([1.0, 0.0, 0.0]))
    assert halves["mean"] == pytest.approx(2 / 3)


def test_win_rate_goes_by_document_where_questions_share_one() -> None:
    differences = ([1.0] * 10 + [-1.0] * 10) * 3
    documents = [f"d{place // 10}" for place in range(60)]
    found = win_rate(differences, documents)
    assert found["high"] - found["low"] > 0.6  # six documents
    assert wilson(30, 60)["high"] - wilson(30, 60)["low"] < 0.25
    always = win_rate([1.0] * 60, documents)
    assert (always["low"], always["n"]) == (wilson(6, 6)["low"], 60)


def test_minimum_detectable_difference_by_hand() -> None:
    """Cluster means 0, 0.2, 0.4, 0.6 of five questions each: standard deviation sqrt(0.2 / 3), over sqrt(4) it is
    0.1290994; t at 3 degrees of freedom is 3.1824463 for 0.975 and 0.9784723 for 0.8."""
    differences = [value for value in (0.0, 0.2, 0.4, 0.6) for _ in range(5)]
    clusters = [name for name in "abcd" for _ in range(5)]
    found = minimum_detectable_difference(differences, clusters)
    assert found == pytest.approx((3.1824463 + 0.9784723) * 0.1290994, abs=1e-6)
    assert minimum_detectable_difference([0.1, 0.2], ["a", "a"]) is None
    assert minimum_detectable_difference([0.1, 0.1], ["a", "b"]) is None


def test_of_many_single_questions_it_is_the_textbooks_formula() -> None:
    """(1.96 + 0.84) * sd / sqrt(n): 400 differences of +-0.5 can show 0.07."""
    differences = [0.5, -0.5] * 200
    z = NormalDist()
    found = minimum_detectable_difference(differences, singles(differences))
    assert found == pytest.approx((z.inv_cdf(0.975) + z.inv_cdf(0.8)) * 0.5 / 20, rel=0.01)


def test_what_is_called_detectable_is_detected_four_times_in_five() -> None:
    """30 documents with 4 questions: a true difference as large as the one named is found in 80 % of 200 draws."""
    generator = np.random.default_rng(3)
    clusters = [f"d{place // 4}" for place in range(120)]
    error = math.sqrt((0.25 + 0.75 / 4) / 30)
    true = error * float(student.ppf(0.975, 29) + student.ppf(0.8, 29))
    found = named = 0.0
    for number in range(200):
        shared = np.repeat(generator.normal(true, 0.5, size=30), 4)
        differences = list(shared + generator.normal(scale=math.sqrt(0.75), size=120))
        found += permutation_p(differences, clusters, number) < 0.05
        named += minimum_detectable_difference(differences, clusters) or 0
    assert found / 200 == pytest.approx(0.8, abs=0.09)  # three standard errors
    assert named / 200 == pytest.approx(true, rel=0.05)


# -- predictions -------------------------------------------------------------------------------------------------------


def prediction(number: int, document: str | None, preferences: dict[str, float], **scores: float) -> Prediction:
    answers = {
        name: ModelAnswer(text=name, finished=True, scores={"exact_match": score, "token_f1": score})
        for name, score in scores.items()
    }
    return Prediction(
        id=f"q{number}",
        instruction=f"s{number}",
        input="?",
        reference="x",
        document=document,
        answers=answers,
        preferences=preferences,
    )


def test_rows_that_only_one_system_answered_are_left_out_and_counted() -> None:
    rows = [prediction(n, f"d{n}", {}, new=float(n % 3 == 0), old=0.0) for n in range(20)]
    rows += [prediction(20, "d20", {}, new=1.0), prediction(21, "d21", {}, old=1.0), prediction(22, "d22", {})]
    found = compare(rows, "new", "old")
    assert (found["questions"], found["clusters"], found["left_out"]) == (20, 20, 2)
    assert found["exact_match"]["n"] == 20 and (found["gained"], found["lost"]) == (7, 0)
    assert found["warnings"][-1] == "new over old: 2 questions that only one of them answered are left out"
    json.dumps(found, allow_nan=False)


def test_systems_without_a_common_question_have_nothing_to_compare() -> None:
    found = compare([prediction(0, None, {}, new=1.0), prediction(1, None, {}, old=1.0)], "new", "old")
    assert "exact_match" not in found and (found["questions"], found["left_out"]) == (0, 2)


def test_the_size_of_the_set_is_told_in_words() -> None:
    """Ten of 50 differ, half of them either way but two: 2 / 50 is 4.0 points."""
    gains = [1.0] * 6 + [-1.0] * 4 + [0.0] * 40
    rows = [prediction(n, f"d{n % 25}", {}, new=max(gain, 0.0), old=max(-gain, 0.0)) for n, gain in enumerate(gains)]
    told = compare(rows, "new", "old")["warnings"]
    least = compare(rows, "new", "old")["exact_match"]["mde"]
    assert told[0] == (
        f"new over old: 50 questions about 25 documents can show a difference of {100 * least:.1f} points in exact "
        "match or more, not 4.0 points: neither that it is better nor that it is not"
    )
    few = compare([row.model_copy(update={"document": f"d{n % 5}"}) for n, row in enumerate(rows)], "new", "old")
    assert "only 5 documents: intervals from so few are too narrow" in few["warnings"][-1]


def test_a_clear_gain_is_told_with_its_p() -> None:
    rows = [prediction(n, None, {}, new=1.0, old=float(n % 4 == 0)) for n in range(40)]
    assert compare(rows, "new", "old")["in_words"][0].startswith("new over old: 40 questions about 40 statements can")
    assert compare(rows, "new", "old")["in_words"][0].endswith("this one is 75.0 points, p = 0.0002")


def test_the_judges_preference_is_one_more_score_in_either_direction() -> None:
    """Twelve questions: the judge prefers new in nine, finds two alike, and has no verdict of one."""
    verdicts = [1.0] * 9 + [0.5] * 2
    rows = [prediction(n, None, {"new>old": won}, new=1.0, old=1.0) for n, won in enumerate(verdicts)]
    rows.append(prediction(11, None, {}, new=1.0, old=1.0))
    found = compare(rows, "new", "old")["preference"]
    assert (found["n"], found["mean"], found["p"]) == (11, pytest.approx(4.5 / 11), 2 / 2**9)
    assert (found["win_rate"]["mean"], found["win_rate"]["ties"]) == (pytest.approx(10 / 11), 2)
    assert found["p_holm"] == 3 * 2 / 2**9  # beside exact match and word F1
    backwards = compare(rows, "old", "new")["preference"]
    assert (backwards["mean"], backwards["win_rate"]["losses"]) == (pytest.approx(-4.5 / 11), 9)
