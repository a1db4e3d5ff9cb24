"""How good a reward model is: the arithmetic by hand, and what the probes do to an answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from tiny_random import tokenizer, user

from alignkit.core.records import Message
from alignkit.evaluation.correlation import correlation, kendall, pearson, spearman
from alignkit.evaluation.reward_bench import SECTIONS, sections
from alignkit.evaluation.reward_probes import (
    FILLERS,
    FLATTERIES,
    PROBES,
    REFUSALS,
    NotRun,
    Target,
    readable,
    run_probes,
    targets,
)
from alignkit.evaluation.rewards import accuracy, agreement, calibration, length_bias
from alignkit.evaluation.statistics import wilson
from alignkit.training.reward import EncodedGroup, encode_group
from alignkit.training.reward_data import AnswerGroup, Comparison, compare


def graded(prompt: str, *answers: tuple[str, float], source: str = "graded") -> AnswerGroup:
    texts, grades = zip(*answers, strict=True)
    return AnswerGroup(prompt, source, tuple(user(prompt)), texts, grades, tuple(compare(grades, 1.0)))


def preferred(prompt: str, better: str, worse: str, source: str = "hh-rlhf") -> AnswerGroup:
    return AnswerGroup(prompt, source, tuple(user(prompt)), (better, worse), (None, None), (Comparison(0, 1),))


def encoded(*groups: AnswerGroup) -> list[EncodedGroup]:
    rows = [encode_group(tokenizer(), group, 256)[0] for group in groups]
    assert all(rows)
    return [row for row in rows if row is not None]


# -- pairs -------------------------------------------------------------------------------------------------------------


def test_accuracy_by_source_and_grade_resamples_prompts_not_pairs() -> None:
    apart = encoded(graded("a", ("yes", 9), ("no", 1)), preferred("b", "yes", "no"))
    scores = [[1.0, 0.0], [0.0, 1.0]]
    found = accuracy(apart, scores)
    assert found["all"] == wilson(1, 2)
    assert found["graded"] == found["worse answer graded 1"] == wilson(1, 1)
    assert found["hh-rlhf"] == wilson(0, 1)
    together = encoded(graded("a", ("yes", 9), ("no", 1)), graded("a", ("yes", 9), ("no", 1)))
    assert accuracy(together, scores)["all"] == {"mean": 0.5, "low": 0.5, "high": 0.5, "n": 2}
    assert accuracy(together, [[1.0, 1.0], [0.0, 0.0]])["all"]["mean"] == 0.0  # equal scores rank nothing
    assert accuracy([], []) == {}


def test_calibration_by_hand() -> None:
    groups = encoded(*(preferred(str(n), "yes", "no") for n in range(5)))
    third = math.log(3)  # sigmoid(ln 3) = 3/4
    scores = [[third, 0.0], [third, 0.0], [third, 0.0], [0.0, third], [2.0, 2.0]]
    found = calibration(groups, scores)
    tie, sure = found["bins"]
    assert (sure["low"], sure["high"]) == (0.75, 0.8)
    assert sure["predicted"] == pytest.approx(0.75)
    assert sure["right"] == wilson(3, 4)  # exactly as often as it says
    assert (tie["predicted"], tie["right"]["mean"]) == (0.5, 0.5)
    assert found["expected_calibration_error"] == pytest.approx(0.0)
    # -log p: three times log 4/3, once log 4, once log 2
    assert found["log_loss"]["mean"] == pytest.approx((3 * math.log(4 / 3) + math.log(4) + math.log(2)) / 5)

    # Twice as sure: sigmoid(2 ln 3) = 9/10, and of those four pairs three are right: |0.75 - 0.9| * 4/5 = 0.12
    surer = calibration(groups, scores, logits_per_score=2.0)
    assert surer["expected_calibration_error"] == pytest.approx(0.12)
    assert calibration([], []) == {}


def test_a_certain_mistake_costs_its_logit() -> None:
    found = calibration(encoded(preferred("a", "yes", "no")), [[0.0, 2000.0]])
    assert found["log_loss"]["mean"] == 2000.0
    assert found["bins"][0]["predicted"] == 1.0
    assert found["expected_calibration_error"] == 1.0


def test_length_by_hand() -> None:
    rows = encoded(
        graded("a", ("Hello Hello Hello", 9), ("Hello", 1)),
        graded("b", ("Hello", 9), ("Hello Hello", 1)),
        graded("c", ("Hello", 9), ("Thank", 1)),
    )
    assert [[len(answer) for answer in row.tokens.answers] for row in rows] == [[4, 2], [2, 3], [2, 2]]
    by_length = [[float(len(answer)) for answer in row.tokens.answers] for row in rows]
    found = length_bias(rows, by_length)
    assert found["pearson"]["over"]["mean"] == pytest.approx(1.0)
    within = found["spearman"]["within"]
    assert (within["mean"], within["n"]) == (pytest.approx(1.0), 2)  # in c all are as long
    assert found["accuracy_where_better_is"] == {
        "longer": wilson(1, 1),
        "as_long": wilson(0, 1),
        "shorter": wilson(0, 1),
    }


def test_agreement_by_hand_and_only_with_graded_answers() -> None:
    rows = encoded(graded("a", ("yes", 9), ("no", 1)), graded("b", ("yes", 5), ("no", 2)), preferred("c", "yes", "no"))
    # Grades 9 1 5 2 and scores 4 1 2 3, as ranks 4 1 3 2 and 4 1 2 3: 1 - 6 * 2 / (4 * 15) = 0.8; of six pairs one is
    # discordant (5 > 2, but 2 < 3): (5 - 1) / 6
    found = agreement(rows, [[4.0, 1.0], [2.0, 3.0], [100.0, -100.0]])
    assert found["spearman"]["over"]["mean"] == pytest.approx(0.8)
    assert found["kendall"]["over"]["mean"] == pytest.approx(4 / 6)
    assert found["kendall"]["over"]["n"] == 4
    assert found["kendall"]["within"]["mean"] == 0.0  # right in a, wrong in b
    assert agreement(rows[2:], [[1.0, 0.0]]) == {}


# -- correlation -------------------------------------------------------------------------------------------------------


def test_coefficients_by_hand() -> None:
    x, y = np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.0, 30.0])
    # deviations -1 0 1 and -10 -9 19: 29 / sqrt(2 * 542)
    assert pearson(x, y) == pytest.approx(29 / math.sqrt(1084))
    assert spearman(x, y) == pytest.approx(1.0)
    # a tie in y: 2 concordant pairs of 3, and y tells 2 pairs apart: 2 / sqrt(3 * 2)
    assert kendall(x, np.array([1.0, 5.0, 5.0])) == pytest.approx(2 / math.sqrt(6))
    for coefficient in (pearson, spearman, kendall):
        assert math.isnan(coefficient(x, np.ones(3)))


def test_within_prompts_what_prompts_share_does_not_count() -> None:
    """Prompts differ by 100 in both numbers; among the answers to a prompt one falls where the other rises."""
    prompts = [str(n) for n in range(10) for _ in range(3)]
    x = [100.0 * n + k for n in range(10) for k in range(3)]
    y = [100.0 * n - k for n in range(10) for k in range(3)]
    found = correlation(pearson, x, y, prompts)
    assert found["over"] is not None and found["over"]["mean"] > 0.99
    assert found["within"] == {"mean": -1.0, "low": -1.0, "high": -1.0, "n": 10}
    constant = correlation(pearson, x, [0.0] * 30, prompts)
    assert constant == {"over": None, "within": None}


def test_the_interval_grows_when_answers_are_copied_within_prompts_only_by_what_prompts_say() -> None:
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=40), generator.normal(size=40)
    once = correlation(pearson, list(x), list(y), [str(n) for n in range(40)])["over"]
    copied = correlation(
        pearson, list(np.repeat(x, 5)), list(np.repeat(y, 5)), [str(n) for n in range(40) for _ in "12345"]
    )
    over = copied["over"]
    assert once is not None and over is not None
    assert (over["low"], over["high"]) == pytest.approx((once["low"], once["high"]))  # 200 rows are 40 prompts


# -- RewardBench -------------------------------------------------------------------------------------------------------


def test_the_sections_weight_subsets_by_size_and_mathematics_like_all_code() -> None:
    found = {f"rewardbench/{subset}": wilson(6, 10) for subsets in SECTIONS.values() for subset in subsets}
    found["rewardbench/alpacaeval-easy"] = wilson(30, 30)
    found["rewardbench/math-prm"] = wilson(2, 5)
    figures = sections(found)
    assert figures["Chat"] == pytest.approx((30 + 4 * 6) / 70)
    assert figures["Reasoning"] == pytest.approx((0.4 + 0.6) / 2)
    assert figures["score"] == pytest.approx((54 / 70 + 0.6 + 0.6 + 0.5) / 4)
    del found["rewardbench/math-prm"]
    assert set(sections(found)) == {"Chat", "Chat Hard", "Safety"}  # without a subset neither its section nor the score
    assert sections({"hh-rlhf": wilson(1, 2)}) == {}


# -- probes ------------------------------------------------------------------------------------------------------------


class Scorer:
    """Scores an answer by a rule; refuses the ones it is told to."""

    def __init__(self, rule: Any) -> None:
        self.rule = rule
        self.tokenizer = tokenizer()

    def scores_or_reasons(self, conversations: Sequence[Sequence[Message]]) -> list[float | str]:
        return [self.rule(conversation[-1].content) for conversation in conversations]


TARGET = Target(tuple(user("Notes: Anna lives in Oslo.\n\nWhere does Anna live?")), "The home of Anna is Oslo.")


def test_what_the_probes_make_of_an_answer() -> None:
    made = {name: probe(TARGET, tokenizer()) for name, probe in PROBES.items()}
    assert made == {
        "repeated twice": "The home of Anna is Oslo. The home of Anna is Oslo.",
        "repeated four times": " ".join(["The home of Anna is Oslo."] * 4),
        "filler behind": f"The home of Anna is Oslo. {FILLERS[1]}",
        "flattery in front": f"{FLATTERIES[1]} The home of Anna is Oslo.",
        "the prompt's words behind": "The home of Anna is Oslo. Notes Anna lives Oslo Where does live",
        "refusal instead": REFUSALS[1],
        "nothing instead": "",
    }


def test_the_closed_world_can_read_a_wording_of_each_probe_and_no_plain_english() -> None:
    for plain, closed in (FILLERS, FLATTERIES, REFUSALS):
        assert readable([closed], tokenizer()) == closed
        with pytest.raises(NotRun, match="letter by letter"):
            readable([plain], tokenizer())


def test_probes_count_who_is_fooled_and_what_was_not_run() -> None:
    by_length = run_probes(Scorer(lambda text: float(len(text))), [TARGET, TARGET])  # type: ignore[arg-type]
    assert by_length["repeated twice"]["rises"] == wilson(2, 2)
    assert by_length["repeated twice"]["change"]["mean"] == len(" The home of Anna is Oslo.")
    assert by_length["nothing instead"]["rises"] == wilson(0, 2)
    assert by_length["nothing instead"]["change"]["mean"] == -len("The home of Anna is Oslo.")
    assert all(found["not_run"] == {} for found in by_length.values())

    open_ended = Target(tuple(user("Why is it so?")), "The statement does not say.")
    limited = run_probes(
        Scorer(lambda text: "longer than max_length (99 of 9 tokens)" if len(text) > 60 else 0.0),  # type: ignore[arg-type]
        [open_ended],
    )
    assert limited["repeated four times"] == {"not_run": {"longer than max_length": 1}}
    assert limited["refusal instead"] == {"not_run": {"the best answer leaves the question open, too": 1}}
    assert limited["the prompt's words behind"] == {"not_run": {"the prompt has no words to repeat": 1}}
    assert limited["repeated twice"]["rises"] == wilson(0, 1)  # as good as before is not better


def test_the_best_answer_of_each_prompt_is_probed_once() -> None:
    groups = [
        graded("a", ("no", 1), ("yes", 9), ("Oslo", 5)),
        graded("a", ("no", 1), ("again", 9)),
        preferred("b", "better", "worse"),
    ]
    assert [target.answer for target in targets(groups, 10, seed=0)] == ["yes", "better"]
    assert len(targets(groups, 1, seed=0)) == 1
    assert targets(groups, 0, seed=0) == []
