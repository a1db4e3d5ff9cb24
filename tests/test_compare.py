"""Sweeps: finished jobs are skipped, failed ones do not stop the rest, and a table and a plot come at the end."""

from __future__ import annotations

import json
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from alignkit.compare import JobResult, markdown_table, metric_names, read_jobs, telling, terminal_table
from alignkit.core.errors import UserError
from alignkit.core.sweep import job_name, plan

SWEEP = Path("runs/default/toy-sweep")

if TYPE_CHECKING:
    from house import House

pytest_plugins = ["house"]


def table(house: House) -> list[list[str]]:
    """The cells of a sweep's comparison table."""
    lines = (house.folder / SWEEP / "comparison.md").read_text(encoding="utf-8").splitlines()
    return [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines]


def test_a_sweep_runs_every_combination_and_compares(house: House) -> None:
    result = house.run("-m", "+model=qwen7b,tiny", "factor=1,2", "seed=5")
    assert result.code == 0, result.err
    assert "4 jobs, 0 failed" in result.out
    jobs = sorted(path.name for path in (house.folder / SWEEP / "jobs").iterdir())
    assert jobs == [f"model-{model}--factor-{factor}" for model in ("qwen7b", "tiny") for factor in (1, 2)]
    assert (
        house.manifest(f"{SWEEP}/jobs/model-qwen7b--factor-2")["command"] == "alignkit toy seed=5 model=qwen7b factor=2"
    )
    rows = table(house)
    assert rows[0] == ["model", "factor", "status", "seconds", "length", "found"]
    assert [(*row[:3], row[4]) for row in rows[2:]] == [
        ("qwen7b", "1", "complete", "11"),
        ("qwen7b", "2", "complete", "22"),
        ("tiny", "1", "complete", "11"),
        ("tiny", "2", "complete", "22"),
    ]
    plot = ElementTree.parse(house.folder / SWEEP / "comparison.svg").getroot()
    assert plot.tag.endswith("svg")
    assert house.manifest(str(SWEEP))["stage"] == "compare"
    assert (house.folder / SWEEP / "multirun.yaml").exists()


def test_finished_jobs_are_skipped_and_new_ones_join(house: House) -> None:
    house.run("-m", "factor=1,2")
    before = house.manifest(f"{SWEEP}/jobs/factor-1")
    result = house.run("-m", "factor=1,2,3")
    assert result.code == 0
    assert result.out.count("toy is up to date") == 2
    assert house.manifest(f"{SWEEP}/jobs/factor-1") == before
    assert [row[0] for row in table(house)[2:]] == ["1", "2", "3"]


def test_a_failed_job_stops_neither_the_others_nor_the_comparison(house: House) -> None:
    result = house.run("-m", "fail=user,'',bug")
    assert result.code == 2
    assert "error: the toy cannot do that" in result.err
    assert "RuntimeError" in result.err
    assert "3 jobs, 2 failed" in result.out
    statuses = {row[0]: row[1] for row in table(house)[2:]}
    assert statuses == {"user": "failed: the toy cannot do that", "''": "complete", "bug": "failed: see log.txt"}
    assert {("user", "failed"), ("bug", "failed")} <= {tuple(line.split()) for line in result.out.splitlines()}


def test_a_job_without_its_input_fails_alone(house: House) -> None:
    result = house.run("-m", "data.path=rows.jsonl,nowhere.jsonl")
    assert result.code == 2
    assert "data.path=nowhere.jsonl: no such file" in result.err
    assert sorted(row[1][:8] for row in table(house)[2:]) == ["complete", "failed: "]


def test_one_job_is_a_sweep_too(house: House) -> None:
    result = house.run("-m", "factor=2")
    assert result.code == 0, result.err
    assert house.manifest(f"{SWEEP}/jobs/job")["metrics"]["length"] == 22.0


def test_a_launcher_and_its_settings_are_for_the_run_and_not_for_the_plan(house: House) -> None:
    """Launchers are extras, so that a plan must not need them."""
    jobs = plan("toy", ["factor=1,2", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"])
    assert [job.overrides["factor"] for job in jobs] == ["1", "2"]


def test_nothing_starts_when_one_job_is_mistaken(house: House) -> None:
    result = house.run("-m", "factor=1,2", "train.epochs=1,many")
    assert result.code == 2
    assert "train.epochs: Value 'many'" in result.err
    assert not (house.folder / "runs").exists()


def test_an_interrupted_sweep_ends_with_130_and_goes_on_where_it_was(house: House) -> None:
    process = house.start("-m", "alignkit.toy", "-m", "factor=1,2", "pause_seconds=0.4")
    manifest = house.folder / SWEEP / "jobs/factor-2/manifest.json"
    while not manifest.exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    result = house.run("-m", "factor=1,2", "pause_seconds=0.4")
    assert result.code == 0
    assert result.out.count("toy is up to date") == 1


def test_job_names_are_safe_and_distinct() -> None:
    assert job_name(
        {"train.learning_rate": "1e-4", "model": "tiny", "seed": "1"}, ["model", "train.learning_rate"]
    ) == ("model-tiny--train.learning_rate-1e-4")
    names = {job_name({"data.path": path}, ["data.path"]) for path in ("/a/b", "/a_b", "/a,b", "a b")}
    assert len(names) == 4
    assert all("/" not in name and "=" not in name and "," not in name for name in names)


# -- the comparison by itself -----------------------------------------------------------------------------------------


def test_metrics_are_flattened_with_their_intervals(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    job = {"overrides": {"seed": "1"}, "exit_code": 0, "error": ""}
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    exact = {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 100}
    metrics = {"loss": 0.123456, "rows": 1234567, "exact": exact, "by": {"x": 1}, "ok": True}
    manifest = {"stage": "sft", "status": "complete", "fingerprint": "", "inputs": [], "outputs": []}
    (folder / "manifest.json").write_text(
        json.dumps({**manifest, "seconds": 61.25, "metrics": metrics}), encoding="utf-8"
    )
    (found,) = read_jobs(tmp_path)
    assert found.metrics == {"loss": 0.123456, "rows": 1234567, "exact": 0.5, "by.x": 1}
    assert found.intervals == {"exact": (0.4, 0.6)}
    assert markdown_table([found], ["loss", "rows", "exact"]) == (
        "| seed | status | seconds | loss | rows | exact |\n"
        "| --- | --- | --- | --- | --- | --- |\n"
        "| 1 | complete | 61.2 | 0.1235 | 1234567 | 0.5 (0.4 to 0.6) |\n"
    )


def test_a_terminal_shows_what_varies_held_out_metrics_and_those_that_differ() -> None:
    metrics = {"rows": 100, "loss": 0.5, "held_out.accuracy": 0.625, "seconds_a_step": 0.1}
    jobs = [
        JobResult({"beta": "0.1"}, "complete", 1.0, metrics, {"held_out.accuracy": (0.25, 0.75)}),
        JobResult({"beta": "0.3"}, "complete", 1.0, {**metrics, "loss": 0.25}, {}),
        JobResult({"beta": "9"}, "failed: beta=9: a long story", None, {}, {}),
    ]
    names = telling(jobs, list(metrics))
    assert names == ["held_out.accuracy", "loss"]
    assert terminal_table(jobs, names, 80) == (
        "beta  status    held_out.accuracy     loss\n"
        "0.1   complete  0.625 (0.25 to 0.75)  0.5\n"
        "0.3   complete  0.625                 0.25\n"
        "9     failed"
    )
    assert telling(jobs[:1], ["rows", "loss"]) == ["rows", "loss"]  # nothing differs


@pytest.mark.parametrize(("width", "metrics"), [(1000, 6), (51, 6), (50, 5), (10, 1)])
def test_a_terminal_shows_no_more_than_fits_and_counts_the_rest(width: int, metrics: int) -> None:
    names = [f"loss{number}" for number in range(9)]  # 5 characters; 1 + 6 for the others, 2 between columns
    jobs = [JobResult({"a": "1"}, "failed", None, dict.fromkeys(names, 0.5), {})]
    header, _, rest = terminal_table(jobs, names, width).splitlines()
    assert header.split() == ["a", "status", *names[:metrics]]
    assert rest == f"({9 - metrics} more metrics in comparison.md)"


def test_jobs_are_ordered_by_what_varies(house: House) -> None:
    house.run("-m", "factor=10,9,0.5")
    assert [row[0] for row in table(house)[2:]] == ["0.5", "9", "10"]


def test_a_wanted_metric_must_exist() -> None:
    job = JobResult({"seed": "1"}, "complete", 1.0, {"loss": 0.1}, {})
    assert metric_names([job], []) == ["loss"]
    with pytest.raises(UserError, match=r"no job has 'accuracy'. There are: loss"):
        metric_names([job], ["accuracy"])


def test_a_folder_without_jobs_is_named(house: House) -> None:
    result = house.run("folder=src", stage="compare")
    assert result.code == 2
    assert "no jobs of a sweep here" in result.err
