"""The pipeline: order, skipping, resumption, and one real run of it in small."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from inside_steps import inside  # noqa: F401  (a fixture)
from smoke import ENVIRONMENT

from alignkit.__main__ import main
from alignkit.core.app import load_config, run_command
from alignkit.core.errors import UserError
from alignkit.core.steps import Step
from alignkit.pipeline import plan

STEPS = ["expand", "select", "questions", "sft", "sample", "judge", "reward", "rejection_sampling", "sft_best", "dpo",
         "evaluate", "report"]  # fmt: skip
SMALL = ["pipeline=smoke", "run=demo", "workers=1"]
FAST = ["only=[expand,select,questions]"]
"""Steps without torch."""


@cache
def steps_of(*overrides: str) -> list[Step]:
    """The steps of a pipeline without rounds, composed once for all tests, which change nothing of them."""
    (steps,) = plan(load_config("pipeline", list(overrides)))
    return steps


def needs(*overrides: str) -> dict[str, set[str]]:
    steps = steps_of(*overrides)
    return {step.label: {f"{folder.parent.name}/{folder.name}" for folder in step.needs} for step in steps}


def test_a_step_needs_the_steps_whose_files_it_reads() -> None:
    found = needs("pipeline=demo", "replicates=[]")
    assert found["demo/expand"] == set()
    assert found["demo/sft"] == {"demo/select"}
    assert found["demo/reward"] == {"demo/judge", "demo/sft"}
    assert found["demo/dpo"] == {"demo/preference_pairs", "demo/sft_best"}


REPLICATED = ("pipeline=smoke", "run=r", "seed=3", "replicates=[4,7]")


def test_replicates_read_their_own_files_and_the_report_waits_for_all() -> None:
    found = needs(*REPLICATED)
    assert found["r-seed4/sft"] == {"r-seed4/select"}
    assert found["r-seed4/rejection_sampling"] == {f"r-seed4/{name}" for name in ("questions", "sft", "reward")}
    assert "r-seed4/report" not in found
    assert found["r/report"] == set(found) - {"r/report"}
    seeds = {step.label: step.config.seed for step in steps_of(*REPLICATED)}
    assert (seeds["r/sft"], seeds["r-seed4/sft"], seeds["r-seed7/sft"]) == (3, 4, 7)


def test_the_report_shows_exactly_the_replicates() -> None:
    steps = {step.label: step.config for step in steps_of(*REPLICATED)}
    assert steps["r/report"].replicates == ["runs/r-seed4", "runs/r-seed7"]  # type: ignore[attr-defined]
    alone = steps_of("pipeline=demo", "replicates=[]")[-1]
    assert alone.config.replicates == []  # type: ignore[attr-defined]


def test_the_retrieval_pipeline_closes_the_loop() -> None:
    """From the adapter's opinion to the retriever, and from what that finds to the adapter's answers."""
    reads = {step.name: {folder.name for folder in step.needs} for step in steps_of("pipeline=retrieval")}
    assert reads["lm_score"] == {"mine", "sft"}
    assert reads["retriever"] == {"lm_score"} and reads["contrast"] == {"mine"}
    assert reads["evaluate_retriever"] == {"retriever", "contrast"}
    answers = {"answers_before", "answers_bm25", "answers_contrast", "answers_after"}
    assert all(reads[name] == {"evaluate_retriever", "sft"} for name in answers)
    assert reads["evaluate"] == {*answers, "answers_right"}


def test_variables_may_hold_any_path_and_seeds_must_differ(tmp_path: Path) -> None:
    odd = "my files (1), part=2.jsonl"
    steps = steps_of("pipeline=smoke", f'variables.held_out="{odd}"')
    assert next(step for step in steps if step.name == "evaluate").config.data.path == odd  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="seeds must differ"):
        needs("seed=2", "replicates=[2]")
    with pytest.raises(UserError, match="plain name"):
        needs("run='a/b'")


def test_the_demo_controls_have_as_many_steps_as_what_they_control() -> None:
    steps = {step.name: step.config for step in steps_of("pipeline=demo", "replicates=[]")}
    for stage, control in (("sft_best", "sft_control"), ("dpo", "dpo_control"), ("sft_best", "sft_grader")):
        assert steps[stage].train.max_steps == steps[control].train.max_steps > 0  # type: ignore[attr-defined]


def test_more_data_for_the_reward_model_is_measured_on_other_questions() -> None:
    steps: dict[str, Any] = {step.name: step for step in steps_of("pipeline=reward_data", "replicates=[]")}
    learned, fresh = steps["sample"].config.data, steps["fresh_sample"].config.data
    assert learned.path == fresh.path
    assert fresh.skip + fresh.limit == learned.skip
    measuring = {steps[name].folder for name in ("reward", "fresh_judge")}
    assert steps["evaluate_reward"].needs == measuring


def test_the_qwen_pipeline_gives_model_hardware_and_teacher_to_the_stages_that_have_them() -> None:
    given = ["pipeline=qwen7b", "variables.teacher_model=some-model", "variables.held_out=held_out.jsonl"]
    steps = {step.name: step.config for step in steps_of(*given)}
    assert steps["sft"].model.name == "qwen7b"  # type: ignore[attr-defined]
    assert steps["sft"].train.gradient_accumulation == 8  # type: ignore[attr-defined]
    assert steps["judge"].teacher.model == "some-model"  # type: ignore[attr-defined]
    assert steps["evaluate"].data.path == "held_out.jsonl"  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"variables\.held_out"):
        load_config("pipeline", given[:2])


def test_an_unknown_step_and_a_typo_in_a_step_are_named_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="no step named 'sfd'"):
        needs("only=[sfd]")
    monkeypatch.chdir(tmp_path)
    assert run_command("pipeline", [*SMALL, "steps.sft.overrides=['train.learning_rat=1']"]) == 2
    assert "train.learning_rate" in capsys.readouterr().err
    assert not Path("runs/demo/expand").exists()


def test_finished_steps_are_skipped_and_a_changed_one_is_done_again(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    inside: list[str],  # noqa: F811
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_command("pipeline", [*SMALL, *FAST]) == 0
    assert inside == ["demo/expand", "demo/select", "demo/questions"]
    manifest = Path("runs/demo/expand/manifest.json")
    before = manifest.stat().st_mtime_ns
    assert run_command("pipeline", [*SMALL, *FAST]) == 0
    assert run_command("pipeline", [*SMALL, *FAST, "steps.select.overrides=['k=20']"]) == 0
    assert inside[3:] == ["demo/select"]
    assert manifest.stat().st_mtime_ns == before
    assert len(Path("runs/demo/select/selected.jsonl").read_text().splitlines()) == 20


@pytest.mark.usefixtures("inside")
def test_a_failed_step_says_why_and_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.jsonl").write_text('{"id": "a", "instruc\n', encoding="utf-8")
    assert run_command("pipeline", [*SMALL, *FAST, "steps.expand.overrides=['data.path=broken.jsonl']"]) == 2
    said = capsys.readouterr().err
    assert re.search(r"demo/expand failed .*broken\.jsonl:1", said), said
    assert "Traceback" not in said


@pytest.mark.usefixtures("inside")
def test_a_killed_pipeline_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real process and its real steps; what the next command then does is done in this one."""
    arguments = [sys.executable, "-m", "alignkit.pipeline", *SMALL, *FAST]
    process = subprocess.Popen(arguments, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (tmp_path / "runs/demo/expand/manifest.json").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) in (130, 0)
    monkeypatch.chdir(tmp_path)
    assert run_command("pipeline", [*SMALL, *FAST]) == 0
    for step in ("expand", "select", "questions"):
        assert json.loads(Path(f"runs/demo/{step}/manifest.json").read_text())["status"] == "complete"


def test_the_whole_road_runs_and_every_check_passes(smoke_run: Path) -> None:
    run = smoke_run / "runs" / "demo"
    console = (smoke_run / "console.txt").read_text(encoding="utf-8")
    assert [line for line in STEPS if f"demo/{line} " not in console] == []
    assert f"report: {run / 'report' / 'report.html'}" in console
    manifests = {step: json.loads((run / step / "manifest.json").read_text(encoding="utf-8")) for step in STEPS}
    assert {manifest["status"] for manifest in manifests.values()} == {"complete"}
    checks = [check for manifest in manifests.values() for check in manifest["checks"]]
    assert len(checks) >= 10
    assert all(check["passed"] for check in checks)


def test_what_a_stage_reads_is_what_another_wrote(smoke_run: Path) -> None:
    """Every input that lies in the run has the hash that its own stage's manifest gives it."""
    run = smoke_run / "runs" / "demo"
    manifests = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(run.glob("*/manifest.json"))]
    written = {
        str(Path("runs/demo") / path.parent.name / output["path"]): output["sha256"]
        for path in sorted(run.glob("*/manifest.json"))
        for output in json.loads(path.read_text(encoding="utf-8"))["outputs"]
    }
    checked = 0
    for manifest in manifests:
        for entry in manifest["inputs"]:
            if entry["path"] in written:
                assert entry["sha256"] == written[entry["path"]], entry
                checked += 1
    assert checked >= 10


def test_a_preference_pair_can_be_followed_back_to_the_seeds(
    smoke_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(smoke_run)
    pairs = Path("runs/demo/rejection_sampling/pairs.jsonl")
    row = json.loads(pairs.read_text(encoding="utf-8").splitlines()[0])
    assert main(["lineage", f"{pairs}#{row['id']}"]) == 0
    said = capsys.readouterr().out
    assert "seeds.jsonl#seeds-" in said
    assert "is in none of the inputs" not in said


def test_only_the_report_is_out_of_date_when_the_report_is_mended() -> None:
    from alignkit.core.hashing import _code

    rooms = {stage: {path.parent.name for path in _code(stage)} for stage in ("sft", "report")}
    assert "reporting" not in rooms["sft"]
    assert "training" in rooms["sft"]
    assert "reporting" in rooms["report"]
