"""Metrics, intervals and tests of differences, with values derived by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from alignkit.core.records import QAExample
from alignkit.data.chat import qa_prompt
from alignkit.evaluation.comparison import in_units
from alignkit.evaluation.leakage import find_leakage
from alignkit.evaluation.metrics.content import verdict_is_right
from alignkit.evaluation.metrics.overlap import exact_match, token_f1
from alignkit.evaluation.predictions import Prediction, breakdown, compare, score_answer, scores_to_compare, summarise
from alignkit.evaluation.statistics import balanced_accuracy, bootstrap_mean, proportion, wilson

# -- one answer ------------------------------------------------------------------------------------------------------


def test_exact_match_squeezes_white_space_and_nothing_else() -> None:
    assert exact_match(" The day is\n Monday. ", "The day is Monday.")
    assert not exact_match("the day is Monday.", "The day is Monday.")
    assert not exact_match("The day is Monday", "The day is Monday.")


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("a b c", "a b c", 1),
        ("A, b; c!", "a b c", 1),
        ("a b", "a b c d", 2 * 2 / 6),  # precision 1, recall 1/2
        ("a a a", "a b", 2 * 1 / 5),  # the second and third a have no partner
        ("x", "y", 0),
        ("", "", 1),
        ("", "y", 0),
        ("会议在周一", "会议在周二", 2 * 4 / 10),  # by character
        ("der größere Hund", "der GRÖSSERE Hund", 1),
        ("größer", "großer", 0),
    ],
)
def test_token_f1_by_hand(answer: str, reference: str, expected: float) -> None:
    assert token_f1(answer, reference) == pytest.approx(expected)
    assert token_f1(reference, answer) == pytest.approx(expected)


def test_verdicts_count_only_where_the_reference_has_one() -> None:
    assert verdict_is_right("It is Ferro, so no.", "It is Zudico, so no.") is True
    assert verdict_is_right("It is Ferro, so yes.", "It is Zudico, so no.") is False
    assert verdict_is_right("The statement does not say.", "It is Zudico, so no.") is False
    assert verdict_is_right("so yes.", "The statement does not say.") is None
    assert verdict_is_right("so yes.", "The seat of Fikico is Padera.") is None


# -- intervals -------------------------------------------------------------------------------------------------------


def test_wilson_by_hand() -> None:
    """27 of 30 with z = 1.959964: centre 0.9 + 3.841459 / 60 = 0.9640243, half width 1.959964 * sqrt(0.09 / 30 +
    3.841459 / 3600) = 0.1249941, both over 1 + 3.841459 / 30 = 1.1280486."""
    estimate = wilson(27, 30)
    assert (estimate["mean"], estimate["n"]) == (0.9, 30)
    assert estimate["low"] == pytest.approx((0.9640243 - 0.1249941) / 1.1280486, abs=1e-5)
    assert estimate["high"] == pytest.approx((0.9640243 + 0.1249941) / 1.1280486, abs=1e-5)


def test_wilson_at_the_ends() -> None:
    assert wilson(0, 20)["low"] == 0
    assert wilson(20, 20)["high"] == 1
    assert wilson(0, 20)["high"] == pytest.approx(1 - wilson(20, 20)["low"])
    assert wilson(0, 20)["high"] > 0.1  # twenty failures do not prove that it never succeeds
    for impossible in ((0, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="no proportion"):
            wilson(*impossible)


def test_bootstrap_agrees_with_the_normal_interval_of_a_large_sample() -> None:
    values = np.random.default_rng(0).normal(3, 2, size=900)
    estimate = bootstrap_mean(list(values))
    half = 1.96 * values.std() / 30
    assert estimate["mean"] == pytest.approx(values.mean())
    assert estimate["low"] == pytest.approx(values.mean() - half, abs=0.02)
    assert estimate["high"] == pytest.approx(values.mean() + half, abs=0.02)


def test_bootstrap_is_seeded_and_draws_groups_whole() -> None:
    values = list(np.random.default_rng(1).normal(size=20))
    assert bootstrap_mean(values, seed=4) == bootstrap_mean(values, seed=4) != bootstrap_mean(values, seed=5)
    repeated = [value for value in values for _ in range(10)]
    groups = [f"statement {i:02d}" for i in range(20) for _ in range(10)]
    grouped, alone = bootstrap_mean(repeated, groups, seed=4), bootstrap_mean(values, seed=4)
    assert (grouped["low"], grouped["high"]) == pytest.approx((alone["low"], alone["high"]))  # ten copies add nothing
    assert bootstrap_mean(repeated, seed=4)["low"] > alone["low"] + 0.1  # taken one by one they would seem to
    with pytest.raises(ValueError, match="no values"):
        bootstrap_mean([])


def test_a_proportion_without_variation_is_as_uncertain_as_its_clusters() -> None:
    """Forty right answers about four statements prove what four right answers do: no resample differs from another."""
    groups = [f"s{i % 4}" for i in range(40)]
    found = proportion([1.0] * 40, groups)
    assert (found["mean"], found["n"]) == (1, 40)
    assert (found["low"], found["high"]) == (wilson(4, 4)["low"], 1)
    assert proportion([0.0] * 40, groups)["high"] == wilson(0, 4)["high"]


def test_balanced_accuracy_sees_through_always_yes() -> None:
    """Always "yes" on 90 true yes and 10 true no is right 90 times in 100 and balanced 0.5."""
    assert balanced_accuracy([1.0] * 90, [0.0] * 10)["mean"] == 0.5
    estimate = balanced_accuracy([1, 1, 1, 0], [1, 0])
    assert estimate["mean"] == pytest.approx((0.75 + 0.5) / 2)
    assert estimate["n"] == 6
    assert estimate["low"] < 0.5 < 0.7 < estimate["high"]


# -- many answers ----------------------------------------------------------------------------------------------------


def prediction(number: int, reference: str, old: str, new: str, **tags: str | bool) -> Prediction:
    answers = {
        "old": score_answer(old, reference, finished=True, judge=4.0),
        "new": score_answer(new, reference, finished=False, judge=None if number == 0 else 9.0),
    }
    fields = {"id": f"q{number}", "instruction": f"s{number}", "input": "?", "reference": reference, "answers": answers}
    return Prediction.model_validate({**fields, **tags})


ROWS = [
    prediction(0, "It is red, so yes.", "It is red, so no.", "It is red, so yes.", form="yes", held_out_name=True),
    prediction(1, "It is red, so no.", "It is red, so no.", "It is red, so no.", form="no", held_out_name=False),
    prediction(2, "It is red, so no.", "It is red, so no.", "It is red, so yes.", form="no", held_out_name=False),
    prediction(3, "The colour is red.", "The colour is blue.", "The colour is red.", form="value", held_out_name=False),
]


def test_summary_of_a_model() -> None:
    summary = summarise(ROWS, "new")
    assert summary["exact_match"] == wilson(3, 4)
    assert summary["finished"] == wilson(0, 4)
    assert summary["balanced_verdict_accuracy"]["mean"] == (1 + 0.5) / 2
    assert (summary["judge"]["mean"], summary["judge"]["n"]) == (9, 3)  # one row has no grade: it is not a zero
    assert summary["words"]["mean"] == (5 + 5 + 5 + 4) / 4
    assert summary["by"]["form"]["no"]["exact_match"] == wilson(1, 2)
    assert "kind" not in summary["by"]


def test_where_statements_repeat_exact_match_is_resampled_by_statement() -> None:
    copies = [row.model_copy(update={"id": f"{row.id}-{copy}"}) for row in ROWS for copy in range(10)]
    statements = [row.instruction for row in copies]
    right = [row.answers["new"].scores["exact_match"] for row in copies]
    found = summarise(copies, "new", seed=3)
    assert found["exact_match"] == bootstrap_mean(right, statements, 3)
    assert found["exact_match"]["high"] - found["exact_match"]["low"] > 0.5  # four statements, not forty rows
    assert found["by"]["form"]["no"]["exact_match"] == bootstrap_mean(right[10:30], statements[10:30], 3)


def test_breakdown_adds_up() -> None:
    table = breakdown(ROWS, "old")
    matches = {value: scores["exact_match"] for value, scores in table["held_out_name"].items()}
    assert matches == {"True": wilson(0, 1), "False": wilson(2, 3)}
    assert sum(scores["exact_match"]["n"] for scores in table["form"].values()) == 4
    assert table["form"]["no"]["token_f1"]["mean"] == 1


def test_a_tag_with_one_value_is_not_broken_down() -> None:
    rows = [row.model_copy(update={"source": "wiki", "kind": "judgmental"}) for row in ROWS]
    assert "source" not in breakdown(rows, "old")
    rows[0] = rows[0].model_copy(update={"source": "manual"})
    assert {value: scores["words"]["n"] for value, scores in breakdown(rows, "old")["source"].items()} == {
        "wiki": 3,
        "manual": 1,
    }


def test_rows_without_an_answer_do_not_count() -> None:
    rows = [ROWS[0].model_copy(update={"answers": {"old": ROWS[0].answers["old"]}}), *ROWS[1:]]
    summary = summarise(rows, "new")
    assert summary["exact_match"] == wilson(2, 3)
    assert "True" not in summary["by"].get("held_out_name", {})
    assert summarise(rows[:1], "new") == {}


def test_comparison_is_paired() -> None:
    comparison = compare(ROWS, "new", "old")
    assert (comparison["gained"], comparison["lost"]) == (2, 1)
    assert comparison["exact_match"]["p"] == 1
    assert comparison["exact_match"]["mean"] == pytest.approx(1 / 4)
    assert (comparison["judge"]["mean"], comparison["judge"]["n"]) == (5, 3)
    swapped = compare(ROWS, "old", "new")
    assert swapped["exact_match"]["mean"] == pytest.approx(-1 / 4)
    assert swapped["exact_match"]["low"] == pytest.approx(-comparison["exact_match"]["high"], abs=0.26)


def test_a_model_against_itself_has_gained_exactly_nothing() -> None:
    comparison = compare(ROWS, "old", "old")
    found = comparison["exact_match"]
    assert (found["mean"], found["low"], found["high"], found["n"], found["p"]) == (0, 0, 0, 4, 1)
    assert "mde" not in found  # of questions that do not differ nothing follows about how small a difference they show
    assert found["win_rate"]["ties"] == 4


def test_predictions_survive_their_file() -> None:
    assert [Prediction.model_validate_json(row.model_dump_json()) for row in ROWS] == ROWS


# -- leakage ---------------------------------------------------------------------------------------------------------


def write_step(folder: Path, inputs: list[Path]) -> Path:
    """A run folder with an adapter that was trained on these inputs."""
    (folder / "adapter").mkdir(parents=True)
    entries = [{"key": "data.path", "path": str(path), "rows": None if path.is_dir() else 1} for path in inputs]
    manifest = {"stage": "sft", "status": "complete", "fingerprint": "", "inputs": entries, "outputs": []}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder / "adapter"


def test_leakage_is_found_in_every_kind_of_training_row_and_every_ancestor(tmp_path: Path) -> None:
    examples = [QAExample(id=f"t{i}", instruction=f"Statement {i}.", input="Who?", output="X") for i in range(5)]
    turns = [[message.model_dump() for message in qa_prompt(example)] for example in examples]
    answer = {"role": "assistant", "content": "X"}
    rows = {
        "qa": {"id": "a", "instruction": "Statement 0.", "input": "Who?", "output": "Y"},
        "chat": {"id": "b", "prompt": turns[1], "completion": [answer]},
        "messages": {"id": "c", "messages": [*turns[2], answer]},
        "clean": {"id": "d", "instruction": "Statement 3.", "input": "Where?", "output": "X"},
    }
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    first = write_step(tmp_path / "sft", [tmp_path / "qa.jsonl", tmp_path / "clean.jsonl"])
    second = write_step(tmp_path / "dpo", [tmp_path / "chat.jsonl", tmp_path / "messages.jsonl", first])

    assert find_leakage(examples, [str(first)]).rows == {"t0"}
    leakage = find_leakage(examples, [str(second), str(first)])
    assert leakage.rows == {"t0", "t1", "t2"}
    assert len(leakage.files) == 4
    assert leakage.unknown == set()


UNREADABLE = {
    "hotpotqa": {"question": "Who?", "answer": "X", "context": [], "supporting_facts": []},
    "texts": {"prompt": "Statement. Who?", "completion": "X"},
    "seed_task": {"instruction": "Statement.", "instances": [{"input": "Who?", "output": "X"}]},
    "hh_rlhf": {"chosen": "Human: Who?", "rejected": "Human: Who?"},
    "empty": {"prompt": [], "completion": []},
}


@pytest.mark.parametrize("row", UNREADABLE.values(), ids=UNREADABLE)
def test_a_file_with_a_row_whose_question_cannot_be_told_is_unknown(row: object, tmp_path: Path) -> None:
    example = QAExample(id="t", instruction="Statement.", input="Who?", output="X")
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in (example.model_dump(), row)), encoding="utf-8")
    leakage = find_leakage([example], [str(write_step(tmp_path / "sft", [path]))])
    assert (leakage.files, leakage.unknown) == (set(), {str(path)})
    assert leakage.rows == {"t"}  # what can be read counts


def test_an_adapter_of_unknown_origin_is_said_to_be_one(tmp_path: Path) -> None:
    example = QAExample(id="t", instruction="Statement.", input="Who?", output="X")
    adapter = str(tmp_path / "adapter")
    gone = write_step(tmp_path / "sft", [tmp_path / "gone.jsonl"])
    leakage = find_leakage([example], [adapter, str(gone)])
    assert leakage.rows == set()
    assert leakage.unknown == {adapter, str(tmp_path / "gone.jsonl")}


def test_metrics_beyond_the_defaults_are_compared_where_higher_is_better() -> None:
    wanted = scores_to_compare(["rouge_l", "chrf", "log_perplexity", "exact_match", "reward"])
    assert wanted == ["exact_match", "token_f1", "judge", "chrf", "reward"]  # rouge_l is a default
    rows = [row.model_copy(deep=True) for row in ROWS]
    for row in rows:
        row.answers["old"].scores["chrf"], row.answers["new"].scores["chrf"] = 40.0, 60.0
    found = compare(rows, "new", "old", scores=wanted)
    assert (found["chrf"]["mean"], "reward" in found) == (20, False)
    assert "chrf" not in compare(rows, "new", "old")
    assert in_units("chrf", 20) == "20.00"
    assert in_units("token_f1", 0.2) == in_units("preference", 0.2) == "20.0 points"
