"""What the report shows of a reward model: figures, tables, probes, and the pairs that it gets most wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from test_report import Page, make_run, report
from test_rewards import encoded, preferred

from alignkit.evaluation.rewards import calibration, length_bias
from alignkit.evaluation.statistics import bootstrap_mean, wilson
from alignkit.reporting.rewards import worst_mistakes

EVIL = '</style><script>alert(1)</script>"$x^2$&'
SCORES = [[2.0, 0.0], [1.0, 0.0], [0.0, 3.0], [0.5, 0.0]]


def row(id: str, better: float, worse: float, question: str = "Who?") -> dict[str, Any]:
    answers = [{"text": "Anna.", "score": better, "tokens": 3}, {"text": "Oslo, no.", "score": worse, "tokens": 5}]
    prompt = [{"role": "user", "content": question}]
    return {"id": id, "source": "hh-rlhf", "prompt": prompt, "answers": answers, "comparisons": [[0, 1]]}


def examine(folder: Path, name: str = "reward") -> None:
    """Let the run's reward step have examined its model, as the stage leaves it."""
    groups = encoded(*(preferred(str(n), "Hello Hello", "Hello") for n in range(4)))
    path = folder / name / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["metrics"]["held_out"] = {
        "calibration": calibration(groups, SCORES),
        "length": length_bias(groups, SCORES),
        "agreement": {},
        "probes": {
            "repeated twice": {"not_run": {}, "rises": wilson(9, 10), "change": bootstrap_mean([1.0, 2.0, 1.5])},
            "filler behind": {"not_run": {"longer than max_length": 10}},
        },
        "rewardbench": {"Chat": 0.625},
    }
    path.write_text(json.dumps(manifest))
    path = folder / "rejection_sampling" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["metrics"]["gains"] = {"grade": {"best_over_greedy": bootstrap_mean([0.5, 0.5, 0.5])}}
    path.write_text(json.dumps(manifest))
    rows = [row(f"row-{n}", better, worse) for n, (better, worse) in enumerate(SCORES)]
    rows[2]["prompt"][-1]["content"] = EVIL
    (folder / name / "held_out_scores.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("runs")
    for number, seed in enumerate((1, 2)):
        examine(make_run(folder / f"demo{number}", seed=seed, questions=40))
    report(folder / "demo0", folder / "out", f"replicates=[{folder / 'demo1'}]")
    return (folder / "out/report.html").read_text(encoding="utf-8")


def test_the_section_has_its_figures_and_nothing_breaks_the_page(page: str) -> None:
    found = Page(page)
    assert found.open == []
    assert len(found.ids) == len(set(found.ids))
    section = re.search(r'<section id="reward">.*?</section>', page, re.DOTALL)
    assert section is not None
    svgs = re.findall(r"<svg.*?</svg>", section[0], re.DOTALL)
    assert len(svgs) == 1 + 2 + 2  # accuracy; reliability and length; best of n by score and by grade
    assert not any(re.search(r"(fill|stroke): #", svg) for svg in svgs), "a fixed colour would not follow dark mode"
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in section[0]


def test_the_numbers_are_there_with_their_intervals(page: str) -> None:
    assert "88 % said, 100 % right" in page  # sigmoid(2) = 0.881
    assert "Expected calibration error (seed 2)" in page
    assert "<b>90.0\u00a0%</b>" in page
    assert '<strong class="fail">rewarded</strong>' in page  # three changes above zero
    assert "<b>10</b> longer than max_length" in page
    assert "62.5\u00a0%" in page
    assert "score 0.00" in page and "score 3.00" in page  # the one mistake


def test_the_worst_mistakes_come_first_and_right_pairs_not_at_all() -> None:
    rows = [row("right", 2.0, 1.0), row("bad", 0.0, 1.0), row("worst", 0.0, 5.0), row("equal", 1.0, 1.0)]
    assert [mistake.worse_score for mistake in worst_mistakes(rows)] == [5.0, 1.0]


def test_best_of_n_is_compared_with_the_greedy_answer_for_each_seed(page: str) -> None:
    line = re.search(r"<tr><th scope=\"row\">best of n over the greedy answer</th>.*?</tr>", page)
    assert line is not None
    assert "<td>rejection_sampling: grade</td>" in line[0]
    assert line[0].count("+0.50 [+0.50, +0.50]") == 2
