"""The page about a selection, on synthetic audits: its numbers, its texts, and that it needs nothing but itself."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_report import Page, make_run

from alignkit.core.app import load_config
from alignkit.core.errors import UserError
from alignkit.report import run as run_report
from alignkit.reporting.selection import AUDIT, histogram, radius_curve, read_audit, selection_page

EVIL = '</style><script>alert(1)</script>"$x^2$&\u202e'


def make_audit(*, rows: int = 50_000, k: int = 2_000, shown: int = 4_000) -> dict[str, Any]:
    """What a MoDS selection of `k` from `rows` rows writes, with invented numbers."""
    rng = np.random.default_rng(7)
    clean, good, seeds = int(rows * 0.93), int(rows * 0.58), k // 2
    edges = np.linspace(-6, 8, 29)
    scores = rng.normal(1.2, 2.2, clean)
    kept = rng.choice(scores[scores > 0], k)
    answers = rng.normal(2.5, 1.6, good)
    radii = 1.25 * np.arange(1, seeds + 1) ** -0.17
    return {
        "strategy": "mods",
        "rows_read": rows,
        "rows_selected": k,
        "k": k,
        "funnel": [
            {"step": step, "rows": left}
            for step, left in zip(
                ("read", "hygiene", "quality", "coverage", "necessity"), (rows, clean, good, seeds, k), strict=True
            )
        ],
        "reasons": [
            reason("covered by a selected row", good - k, "nearest is alpaca-00017, at distance 0.412"),
            reason("quality too low", clean - good, "-1.92 < 0"),
            reason("near duplicate", rows - clean, "similarity 0.91 with gpteacher-00113"),
        ],
        "quality": {
            "scorer": "OpenAssistant/reward-model-deberta-v3-large-v2",
            "threshold": 0.0,
            "edges": edges.tolist(),
            "counts": np.histogram(scores, edges)[0].tolist(),
            "selected": np.histogram(kept, edges)[0].tolist(),
        },
        "necessity": {
            "scorer": "OpenAssistant/reward-model-deberta-v3-large-v2",
            "model": "runs/demo/select/initial/adapter",
            "threshold": 1.0,
            "edges": edges.tolist(),
            "counts": np.histogram(answers, edges)[0].tolist(),
            "selected": np.histogram(answers[answers < 1][: k - seeds], edges)[0].tolist(),
        },
        "coverage": {
            "embedding": "character n-grams, 256 dimensions",
            "field": "all",
            "radius": float(radii[-1]),
            "curve": [[place + 1, float(radius)] for place, radius in enumerate(radii)],
            "chosen": [[seeds, float(radii[-1])]],
        },
        "map": {"method": "PCA", "explained": [0.117, 0.064], "points": _points(rng, shown)},
    }


def reason(name: str, rows: int, detail: str = "") -> dict[str, Any]:
    """A reason with two rows that it met."""
    examples = [
        {
            "id": "alpaca-04711",
            "instruction": "Summarise the passage in two sentences, and say which of its claims are not supported.",
            "input": "The lighthouse of Vell was built in 1871 by Anna Torv. " * 12,
            "output": "It was built in 1871. The passage does not say by which company.",
            "detail": detail,
        },
        {
            "id": "zh-00012",
            "instruction": "",
            "input": "埃菲尔铁塔是哪一年建成的？它有多高？",
            "output": "",
            "detail": detail,
        },
    ]
    return {"reason": name, "rows": rows, "examples": examples}


def _points(rng: np.random.Generator, shown: int) -> list[list[Any]]:
    """Points of six clusters, each row with a decision."""
    centres = rng.normal(0, 1, (6, 2))
    places = centres[rng.integers(0, 6, shown)] + rng.normal(0, 0.28, (shown, 2))
    decisions = rng.choice(
        ["seed", "necessary", "covered", "poor quality", "unclean"], shown, p=[0.05, 0.05, 0.48, 0.35, 0.07]
    )
    return [
        [float(x), float(y), str(decision), f"row-{number:05d}"]
        for number, ((x, y), decision) in enumerate(zip(places, decisions, strict=True))
    ]


def make_comparison() -> dict[str, Any]:
    """Three strategies under three seeds: quality hurts, MoDS helps in exact match but not in the grade."""

    def estimate(mean: float, half: float) -> dict[str, float]:
        return {"mean": mean, "low": mean - half, "high": mean + half}

    def scores(exact: float, grade: float, half: float = 1.0) -> dict[str, dict[str, float]]:
        return {"exact_match": estimate(exact, 0.02 * half), "judge": estimate(grade, 0.2 * half)}

    def strategy(name: str, exact: float, grade: float) -> dict[str, Any]:
        by_seed = [scores(exact + shift, grade, 1.7) for shift in (-0.012, 0.004, 0.008)]
        return {"name": name, "scores": scores(exact, grade), "by_seed": by_seed}

    return {
        "budget": 300,
        "strategies": [strategy("random", 0.612, 7.1), strategy("quality", 0.571, 7.0), strategy("mods", 0.655, 7.2)],
        "differences": [
            {
                "name": "quality - random",
                "exact_match": {**estimate(-0.041, 0.016), "helped": False, "p_holm": 0.01},
                "judge": {**estimate(-0.1, 0.2), "helped": False, "p_holm": 0.01},
            },
            {
                "name": "mods - random",
                "exact_match": {**estimate(0.043, 0.017), "helped": True, "p_holm": 0.01},
                "judge": {**estimate(0.1, 0.2), "helped": False, "p_holm": 0.01},
            },
        ],
    }


def sound(page: str) -> Page:
    """The page, after checking that it is whole, needs nothing but itself and refers only to what it holds."""
    found = Page(page)
    assert found.open == []
    assert not {"script", "link", "iframe", "img", "object", "embed", "form"} & set(found.tags)
    assert [id for id, number in Counter(found.ids).items() if number > 1] == []
    references = {target.removeprefix("#") for target in found.targets} | set(re.findall(r"url\(#([^)]+)\)", page))
    labels = {id for labels in re.findall(r'aria-labelledby="([^"]+)"', page) for id in labels.split()}
    assert references | labels <= set(found.ids)
    assert "nan" not in re.findall(r"[a-z]+", page.lower())
    return found


# -- tests -----------------------------------------------------------------------------------------------------------


def one_row() -> dict[str, Any]:
    """The audit of a single row, which is kept."""
    scores = {"scorer": "rules", "threshold": 7.0, "edges": [9.5, 10.0, 10.5], "counts": [0, 1], "selected": [0, 1]}
    return {
        "strategy": "quality",
        "rows_read": 1,
        "rows_selected": 1,
        "k": 1,
        "funnel": [{"step": step, "rows": 1} for step in ("read", "hygiene", "quality")],
        "reasons": [],
        "quality": scores,
        "necessity": None,
        "coverage": {"embedding": "e", "field": "input", "radius": 0.0, "curve": [[1, 0.0]], "chosen": [[1, 0.0]]},
        "map": {"method": "PCA", "explained": [0.0, 0.0], "points": [[0.5, 0.5, "selected", "only"]]},
    }


def test_the_whole_page_says_what_the_audit_holds() -> None:
    page = selection_page(make_audit() | {"comparison": make_comparison()}, "runs/demo/select")
    found = sound(page)
    anchors = ("funnel", "comparison", "map", "scores", "coverage", "reasons")
    assert {f"selection-{anchor}" for anchor in anchors} <= set(found.ids)
    assert " ways to select " in page
    assert "4,000 of the 50,000 rows are shown." in page
    assert re.findall(r"<b>([\d,]+)</b>\s*<span class=\"change\">(.*?)</span>", page) == [
        ("50,000", ""), ("46,500", "\u22123,500"), ("28,999", "\u221217,501"), ("1,000", "\u221227,999"),
        ("2,000", "+1,000"),
    ]  # fmt: skip
    assert "width: 58.0%" in page  # 28,999 of 50,000
    assert "12\u00a0% of the variance across, 6\u00a0% up" in page
    assert "埃菲尔铁塔是哪一年建成的？它有多高？" in page
    assert "(empty)" in page
    assert not re.search(r"(fill|stroke): #", page), "a fixed colour would not follow dark mode"


def test_every_point_is_drawn_once_in_the_mark_of_its_decision() -> None:
    audit = make_audit(shown=600)
    page = selection_page(audit, "t")
    drawn = re.findall(r'<use href="#selection-(\w+)" x="[\d.]+" y="[\d.]+"><title>(row-\d+)</title>', page)
    marks = {"seed": "round", "necessary": "diamond", "covered": "dot", "poor quality": "cross", "unclean": "plus"}
    assert sorted(drawn) == sorted((marks[decision], row) for _, _, decision, row in audit["map"]["points"])


def test_the_map_keeps_distances_and_its_frame() -> None:
    audit = one_row()
    audit["map"]["points"] = [[0, 0, "selected", "a"], [2, 1, "covered", "b"], [1, 0.5, "unclean", "c"]]
    # 560 - 2 * 10 across for a width of 2: 270 a unit, so 270 + 2 * 10 high; y grows upwards
    placed = re.findall(r'x="([\d.]+)" y="([\d.]+)"><title>(.)<', selection_page(audit, "t"))
    assert sorted(placed, key=lambda each: each[2]) == [
        ("10.0", "280.0", "a"), ("550.0", "10.0", "b"), ("280.0", "145.0", "c")
    ]  # fmt: skip


def test_equal_points_lie_in_the_middle_and_are_said_to() -> None:
    audit = make_audit(shown=40)
    for point in audit["map"]["points"]:
        point[:2] = [0.25, 0.25]
    page = selection_page(audit, "t")
    sound(page)
    assert set(re.findall(r'x="([\d.]+)" y="([\d.]+)"><title>', page)) == {("280.0", "80.0")}
    assert "All rows shown lie on one point." in page


def test_a_single_row() -> None:
    page = selection_page(one_row(), "t")
    sound(page)
    assert "1 of 1 row was selected." in page
    assert "No row was dropped." in page


def test_what_the_audit_lacks_is_left_out() -> None:
    audit = one_row() | {"quality": None, "coverage": None, "map": None, "k": None}
    page = selection_page(audit, "t")
    found = sound(page)
    assert {id for id in found.ids if id.startswith("selection-")} == {"selection-funnel", "selection-reasons"}
    assert "asked for" not in page


def test_fewer_rows_than_asked_for_are_said_to_be() -> None:
    assert "80 rows asked for; no more than 50 could be chosen" in selection_page(
        make_audit(rows=800, k=50) | {"k": 80}, "t"
    )


def test_no_scores_no_figure() -> None:
    audit = one_row()
    audit["quality"] |= {"counts": [0, 0], "selected": [0, 0]}
    assert "No row was scored." in selection_page(audit, "t")


def test_a_small_selection_can_be_seen_beside_a_large_pool() -> None:
    scores = {"threshold": None, "edges": [0.0, 1.0, 2.0], "counts": [999_990, 10], "selected": [0, 10]}
    svg = histogram("h", "quality", scores)
    assert ">1,000,000 scored<" in svg
    assert ">10 selected<" in svg
    assert ">100 %<" in svg  # all ten are in one bin
    assert "1 to 2: 10 scored, 10 selected" in svg
    assert "threshold" not in svg


def test_the_radius_curve_is_thinned_but_keeps_its_ends_and_marks_where_it_stopped() -> None:
    curve = [[k, 1 / k] for k in range(1, 20_001)]
    svg = radius_curve("r", {"curve": curve, "chosen": [[500, 0.002], [20_000, 0.00005]]})
    assert len(svg) < 30_000
    assert "k = 1: radius 1; k = 20,000: radius 5e-05; k = 500: radius 0.002" in svg
    assert ">k = 20,000: 5e-05<" in svg
    assert ">k = 500: 0.002<" in svg


def test_forty_reasons_each_with_its_examples() -> None:
    audit = make_audit() | {"reasons": [reason(f"reason {number}", 40 - number) for number in range(40)]}
    found = sound(selection_page(audit, "t"))
    assert found.tags["details"] == 40
    assert found.tags["dl"] == 80


def test_foreign_texts_stay_text_and_are_shortened_visibly() -> None:
    audit = make_audit(rows=300, k=20, shown=50) | {"strategy": EVIL, "reasons": [reason(EVIL, 9, EVIL)]}
    for row in audit["reasons"][0]["examples"]:
        row |= {"id": EVIL + "x" * 500, "instruction": EVIL + "y" * 5000, "input": EVIL, "output": EVIL}
    for part, key in (("quality", "scorer"), ("necessity", "model"), ("coverage", "embedding"), ("coverage", "field")):
        audit[part][key] = EVIL
    for point in audit["map"]["points"]:
        point[3] = EVIL
    comparison = make_comparison()
    comparison["strategies"][1]["name"] = comparison["differences"][1]["name"] = EVIL
    page = selection_page(audit | {"comparison": comparison}, EVIL)
    sound(page)
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(1)") > 60
    assert "\u202e" not in page
    assert "xxx…" in page
    assert "y" * 270 + "…" in page
    assert "y" * 321 not in page


def test_four_thousand_points_with_long_ids_fit_in_a_page_of_1500_kb() -> None:
    audit = make_audit() | {"comparison": make_comparison()}
    for point in audit["map"]["points"]:
        point[3] = "0123456789abcdef" * 8
    assert len(selection_page(audit, "t").encode()) < 1_500_000


def test_the_comparison_says_which_difference_helped_and_which_hurt() -> None:
    page = selection_page(one_row() | {"comparison": make_comparison()}, "t")
    told = re.findall(r'nowrap">([^<]*) <span class="verdict [a-z-]+">([a-z ]+)</span>', page)
    assert told == [
        ("\u22124.1 [\u22125.7, \u22122.5]", "hurt"), ("\u22120.10 [\u22120.30, +0.10]", "did not help"),
        ("+4.3 [+2.6, +6.0]", "helped"), ("+0.10 [\u22120.10, +0.30]", "did not help"),
    ]  # fmt: skip
    assert "Measured by exact match, these differences helped: mods \u2212 random." in page
    assert "60.0 / 61.6 / 62.0" in page  # random, by seed
    assert "65.5 [63.5, 67.5]" in page
    assert "Exact match, in percent. The vertical line stands at random." in page


def test_a_comparison_without_gain_is_no_gain() -> None:
    comparison = make_comparison()
    comparison["differences"] = comparison["differences"][:1]
    page = selection_page(one_row() | {"comparison": comparison}, "t")
    assert "no strategy was better than the one it is compared with" in page
    assert "these differences helped" not in page


def test_a_comparison_of_one_seed_and_of_a_score_that_is_no_share() -> None:
    comparison = make_comparison()
    for strategy in comparison["strategies"]:
        strategy["by_seed"] = []
    assert sound(selection_page(one_row() | {"comparison": comparison}, "t")).tags["figure"] == 4
    for line in (*(each["scores"] for each in comparison["strategies"]), *comparison["differences"]):
        del line["exact_match"]
    page = selection_page(one_row() | {"comparison": comparison}, "t")
    assert sound(page).tags["figure"] == 3  # map, quality, radius
    assert "Measured by grade, no strategy was better" in page


def test_the_report_has_a_section_for_every_selection_with_an_audit(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "demo", stages=4)
    assert "No selection has left an audit." in report(folder, tmp_path / "before")
    (folder / "select" / AUDIT).write_text(json.dumps(make_audit(shown=200)), encoding="utf-8")
    (folder / "select2").mkdir()
    for name in ("manifest.json", "config.yaml", AUDIT):
        (folder / "select2" / name).write_bytes((folder / "select" / name).read_bytes())
    page = report(folder, tmp_path / "after")
    found = sound(page)
    assert '<a href="#selection">Selection</a>' in page
    assert "No selection has left an audit." not in page
    assert {"selection-0-map", "selection-1-map"} <= set(found.ids)
    assert "<h3>Funnel</h3>" in page


def test_a_damaged_audit_is_a_clear_error(tmp_path: Path) -> None:
    path = tmp_path / AUDIT
    for text, problem in (("{", "not the audit"), ("[]", "not the audit"), ('{"strategy": "mods"}', "rows_read: ")):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=problem):
            read_audit(path)


def report(folder: Path, output: Path) -> str:
    run_report(load_config("report", [f"run_dir={folder}", f"output_dir={output}"]))
    return (output / "report.html").read_text(encoding="utf-8")
