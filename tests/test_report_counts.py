"""Scores over different rows, and verdicts that p does not bear out: the tables must tell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import pytest
from test_report import make_run, report

from alignkit.core.artifact import Artifact
from alignkit.evaluate import headline
from alignkit.evaluation.comparison import Difference, verdict
from alignkit.evaluation.predictions import compare, read_predictions, summarise
from alignkit.reporting.measures import heading, rows_behind


def estimate(n: int) -> dict[str, float]:
    return {"mean": 0.5, "low": 0.4, "high": 0.6, "n": n}


@pytest.mark.parametrize(
    ("counts", "behind", "called"),
    [
        ([60, 60], False, "Exact match"),
        ([40, 40], 40, "Exact match (n 40)"),
        ([1, 1], 1, "Exact match (n 1)"),
        ([60, 40], True, "Exact match"),
        ([], False, "Exact match"),
    ],
)
def test_a_column_says_what_it_stands_on(counts: list[int], behind: int | bool, called: str) -> None:
    found = rows_behind([*(estimate(n) for n in counts), None], 60)  # type: ignore[list-item]
    assert found is behind or (type(found), found) == (type(behind), behind)
    assert heading("exact_match", found) == called


def uneven(folder: Path) -> Artifact:
    """A report of 60 questions, of which `sft` left 10 unanswered; 5 answers of `base` have no grade."""
    make_run(folder, rates={"base": 0.4, "sft": 0.7}, questions=60)
    path = folder / "evaluate" / "predictions.jsonl"
    rows = read_predictions(path)
    for row in rows[:10]:
        del row.answers["sft"]
    for row in rows[:5]:
        del row.answers["base"].scores["judge"]
    path.write_text("".join(row.model_dump_json() + "\n" for row in rows), encoding="utf-8")
    manifest = json.loads((folder / "evaluate" / "manifest.json").read_text(encoding="utf-8"))
    manifest["metrics"]["models"] = {name: summarise(rows, name) for name in ("base", "sft")}
    manifest["metrics"]["comparisons"] = [compare(rows, "sft", "base")]
    (folder / "evaluate" / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return report(folder, folder.parent / "out")


def test_scores_over_different_rows_say_how_many(tmp_path: Path) -> None:
    artifact = uneven(tmp_path / "run")
    text = (artifact.folder / "report.md").read_text(encoding="utf-8")
    assert "(n 60)" in text and "(n 50)" in text and "(n 55)" in text
    assert "two models are compared on no others" not in text  # all gains stand on 50, which the heading says
    assert "| Comparison | `Exact match (n 50)` |" in text
    page = (artifact.folder / "report.html").read_text(encoding="utf-8")
    assert ", n 60</small>" in page and ", n 50</small>" in page and ", n 55</small>" in page
    assert "Scores over different questions are not to be compared by eye" in page
    figures = (artifact.folder / "figures.txt").read_text(encoding="utf-8").splitlines()
    assert figures[0].startswith("exact match, % of at most 60 questions")
    assert figures[1].endswith("n 60") and figures[2].endswith("n 50")
    assert figures[3].startswith("gain, percentage points, on the questions that both have")
    assert figures[4].endswith("helped, n 50")


def test_scores_over_the_same_rows_say_nothing_of_it(tmp_path: Path) -> None:
    make_run(tmp_path / "run", rates={"base": 0.4, "sft": 0.7}, questions=60)
    artifact = report(tmp_path / "run", tmp_path / "out")
    figures = (artifact.folder / "figures.txt").read_text(encoding="utf-8")
    assert "n 60" not in figures and figures.startswith("exact match, % of 60 questions")
    assert "(n 60)" not in (artifact.folder / "report.md").read_text(encoding="utf-8")
    assert ", n 60</small>" not in (artifact.folder / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("low", "high", "p", "said"),
    [
        (0.01, 0.1, 0.05, "helped"),
        (0.01, 0.1, 0.06, "was not shown to help"),
        (-0.01, 0.1, 0.01, "did not help"),
        (-0.1, -0.01, 0.01, "hurt"),
        (-0.1, -0.01, 0.06, "did not help"),
        (0.0, 0.0, 1.0, "did not help"),
    ],
)
def test_a_verdict_needs_interval_and_p(low: float, high: float, p: float, said: str) -> None:
    found = {"mean": (low + high) / 2, "low": low, "high": high, "n": 60, "clusters": 60, "p": p, "p_holm": p}
    assert verdict(cast(Difference, found)) == said


def test_what_p_does_not_bear_out_is_called_so_everywhere(tmp_path: Path) -> None:
    """Five statements, all won: the interval is above zero, and p cannot fall below 1/16."""
    make_run(tmp_path / "run", rates={"base": 0.0, "sft": 1.5}, questions=5)
    artifact = report(tmp_path / "run", tmp_path / "out")
    said = "was not shown to help"
    assert said in (artifact.folder / "figures.txt").read_text(encoding="utf-8").splitlines()[4]
    text = (artifact.folder / "report.md").read_text(encoding="utf-8")
    assert f"; it {said}.**" in text and f"| stage | {said} |" in text
    page = (artifact.folder / "report.html").read_text(encoding="utf-8")
    assert (
        "Training was not shown to help" in page
        and f'<span class="verdict was-not-shown-to-help">{said}</span>' in page
    )
    assert json.loads((artifact.folder / "report.json").read_text(encoding="utf-8"))["verdict"]["verdict"] == said


def test_the_stage_says_in_its_headline_on_how_many() -> None:
    both = {"base": {"exact_match": estimate(60)}, "sft": {"exact_match": estimate(60)}}
    assert headline(both) == "exact match base 0.500, sft 0.500"
    assert headline(both | {"sft": {"exact_match": estimate(50)}}) == "exact match base 0.500 (n 60), sft 0.500 (n 50)"
