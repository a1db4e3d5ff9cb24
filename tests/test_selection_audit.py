"""The account of a selection: decisions, histograms, the curve and the map, and what the report makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from selecting import audit_of, ids, make_rows, read, select
from test_report import make_run

from alignkit.core.app import run_command
from alignkit.core.records import QAExample
from alignkit.reporting.selection import read_audit
from alignkit.reporting.selection_audit import (
    MOST_POINTS,
    choose_points,
    map_points,
    project,
    score_histogram,
    thinned,
    with_scores,
)


def example(id: str, **others: Any) -> QAExample:
    return QAExample.model_validate({"id": id, "instruction": f"statement {id}", **others})


# -- the parts --------------------------------------------------------------------------------------------------------


def test_scores_are_added_to_a_copy() -> None:
    row = example("a", scores={"novelty": 0.5})
    assert with_scores(row, quality=9, rank=1).scores == {"novelty": 0.5, "quality": 9.0, "rank": 1.0}
    assert row.scores == {"novelty": 0.5}


def test_a_histogram_by_hand() -> None:
    found = score_histogram([0.0, 0.5, 0.5, 10.0], [10.0, 0.0], 7.0, "rules")
    assert found["edges"] == pytest.approx([0.5 * number for number in range(21)])
    assert found["counts"] == [1, 2, *[0] * 17, 1]  # the upper end belongs to the last bin
    assert found["selected"] == [1, *[0] * 18, 1]
    assert (found["scorer"], found["threshold"]) == ("rules", 7.0)


@pytest.mark.parametrize("scores", [[5.0], [5.0] * 4, [-3.0, -3.0], [0.0]])
def test_equal_scores_have_a_histogram(scores: list[float]) -> None:
    found = score_histogram(scores, [], 0.0, "rules")
    assert sum(found["counts"]) == len(scores)
    assert sum(found["selected"]) == 0
    assert found["edges"] == sorted(set(found["edges"]))


def test_scores_that_differ_in_their_last_digit_have_a_histogram() -> None:
    assert sum(score_histogram([1.0, float(np.nextafter(1.0, 2.0))], [], 0.0, "rules")["counts"]) == 2


def test_the_curve_keeps_its_ends_and_its_values() -> None:
    radii = [1 / k for k in range(1, 5001)]
    curve = thinned(radii)
    assert 100 < len(curve) <= 200
    assert (curve[0], curve[-1]) == ([1, 1.0], [5000, 1 / 5000])
    assert all(radius == 1 / k for k, radius in curve)
    assert [k for k, _ in curve] == sorted({k for k, _ in curve})
    assert thinned([0.5]) == [[1, 0.5]]


@pytest.mark.parametrize("length", [6, 40, 200])
def test_a_short_curve_is_kept_whole(length: int) -> None:
    assert [k for k, _ in thinned([1 / k for k in range(1, length + 1)])] == list(range(1, length + 1))


def test_principal_components_by_hand() -> None:
    """Points on a line: the first axis is the line, in the direction of its largest component; nothing is left."""
    vectors = np.array([[0, 0, 0], [3, 4, 0], [6, 8, 0]], dtype=np.float32)
    coordinates, explained = project(vectors)
    assert coordinates[:, 0] == pytest.approx([-5, 0, 5])
    assert coordinates[:, 1] == pytest.approx([0, 0, 0], abs=1e-9)
    assert explained == pytest.approx([1, 0], abs=1e-9)


@pytest.mark.parametrize("vectors", [np.ones((4, 3)), np.ones((1, 3)), np.zeros((2, 3)), np.ones((3, 1))])
def test_equal_vectors_have_a_map(vectors: Any) -> None:
    coordinates, explained = project(vectors.astype(np.float32))
    assert coordinates.tolist() == [[0, 0]] * len(vectors)
    assert explained == [0, 0]


def test_the_map_keeps_distances_within_the_plane() -> None:
    rng = np.random.default_rng(3)
    flat = np.zeros((20, 6), np.float32)
    flat[:, [1, 4]] = rng.normal(size=(20, 2))
    coordinates, explained = project(flat)
    expected = np.linalg.norm(flat[:, None] - flat[None], axis=2)
    assert np.linalg.norm(coordinates[:, None] - coordinates[None], axis=2) == pytest.approx(expected, abs=1e-5)
    assert sum(explained) == pytest.approx(1)
    rows = [example(str(number)) for number in range(20)]
    points = map_points(rows, flat, {"3": "seed"})["points"]
    assert [point[3] for point in points] == ids([row.model_dump() for row in rows])
    assert [point[2] for point in points] == ["seed" if number == 3 else "covered" for number in range(20)]


@pytest.mark.parametrize(
    ("chosen", "others", "shown_chosen", "shown_others"),
    [(10, 20, 10, 20), (3000, 3000, 2000, 2000), (100, 9000, 100, 3900), (9000, 100, 3900, 100)],
)
def test_which_points_are_shown(chosen: int, others: int, shown_chosen: int, shown_others: int) -> None:
    rows = [example(f"c{number}") for number in range(chosen)] + [example(f"o{number}") for number in range(others)]
    by_row = {row.id: "necessary" if row.id[0] == "c" else "poor quality" for row in rows}
    shown = [row.id for row in choose_points(rows, by_row, 1)]
    assert len(shown) == len(set(shown)) <= MOST_POINTS
    assert sum(id[0] == "c" for id in shown) == shown_chosen
    assert sum(id[0] == "o" for id in shown) == shown_others
    assert shown == [row.id for row in choose_points(rows, by_row, 1)]
    assert chosen < 3000 or shown != [row.id for row in choose_points(rows, by_row, 2)]


# -- the whole --------------------------------------------------------------------------------------------------------


def test_the_audit_is_the_story_of_the_files(tmp_path: Path) -> None:
    rows = make_rows(12)
    rows[1]["output"] = rows[2]["output"] = rows[3]["output"] = rows[4]["output"] = " "
    rows[5] |= {"kind": "judgmental", "output": "It is <b>blue</b>."}
    artifact = select(tmp_path, rows, "k=4")
    audit = read_audit(artifact.folder / "selection.json")
    assert {each["reason"]: each["rows"] for each in audit["reasons"]} == dict(artifact.dropped)
    assert [each["rows"] for each in audit["reasons"]] == [4, 3, 1]
    examples = {each["reason"]: [one["id"] for one in each["examples"]] for each in audit["reasons"]}
    assert examples["empty answer"] == ["row-1", "row-2", "row-3"]
    decided = {point[3]: point[2] for point in audit["map"]["points"]}
    assert set(decided) == {row["id"] for row in rows}
    selected = ids(read(artifact.folder, "selected.jsonl"))
    assert sorted(id for id, decision in decided.items() if decision == "selected") == sorted(selected)
    assert decided["row-1"] == "unclean"
    assert decided["row-5"] == "poor quality"
    assert (audit["rows_read"], audit["rows_selected"], audit["k"], audit["strategy"]) == (12, 4, 4, "coverage")
    page = (artifact.folder / "selection.html").read_text(encoding="utf-8")
    assert "<b>blue</b>" not in page
    assert "&lt;b&gt;blue&lt;/b&gt;" in page


def test_the_audit_has_what_the_strategy_looks_at(tmp_path: Path) -> None:
    by_quality = audit_of(select(tmp_path / "quality", make_rows(6), "strategy=quality", "k=2"))
    assert (sum(by_quality["quality"]["counts"]), sum(by_quality["quality"]["selected"])) == (6, 2)
    assert by_quality["coverage"] is None
    drawn = audit_of(select(tmp_path / "random", make_rows(6), "strategy=random", "k=2"))
    assert drawn["quality"] is None
    assert drawn["coverage"] is None


def damaged(audit: dict[str, Any], how: str) -> str:
    text = json.dumps(audit)
    if how == "cut off":
        return text[: len(text) // 2]
    if how == "lacks the funnel":
        return json.dumps({key: value for key, value in audit.items() if key != "funnel"})
    return json.dumps(audit | {"funnel": [{"rows": "many"}], "map": {"points": [[1]]}})


@pytest.mark.parametrize("how", ["cut off", "lacks the funnel", "has another form"])
def test_a_damaged_audit_stops_the_report_with_a_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    folder = make_run(tmp_path / "demo", stages=4)
    audit = audit_of(select(tmp_path, make_rows(4), "k=2"))
    (folder / "select" / "selection.json").write_text(damaged(audit, how), encoding="utf-8")
    assert run_command("report", [f"run_dir={folder}", f"output_dir={tmp_path / 'report'}"]) == 2
    said = capsys.readouterr().err
    assert "selection.json: not the audit of alignkit select" in said
    assert "Traceback" not in said
