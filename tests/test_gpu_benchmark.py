"""The measurement for a GPU machine, on a toy shape without one: every stage trains, the file says what is known."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks/gpu/measure.py"


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("measure", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["measure"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow  # trains three times; its cases are those below
def test_the_smoke_run_measures_every_stage(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--cpu-smoke", "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*-cpu.json")
    report = json.loads(path.read_text(encoding="utf-8"))
    assert [case["stage"] for case in report["cases"]] == ["sft", "reward", "dpo"]
    for case in report["cases"]:
        assert case["predicted_bytes"] == sum(case["parts"].values())
        assert case["tokens_per_second"] > 0
        assert "allocated_bytes" not in case  # nothing comparable is measured without a GPU
    assert report["capped"]["must_run"]["length"] < report["capped"]["must_not_run"]["length"]
    assert str(path) in capsys.readouterr().out


def test_without_a_gpu_it_says_so(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert script.main([]) == 2
    assert "--cpu-smoke" in capsys.readouterr().err


def test_a_case_costs_the_same_memory_as_the_stage_that_it_stands_for(script: Any) -> None:
    """Rows of the given length, as many sequences as the job counts."""
    job = script.make_job(script.Case("reward", 2, 64), Path("nowhere"))
    for group in script.groups(job, 2):
        assert [len(part) for part in group.tokens.split(job.model.max_length)] == [64, 64]
    assert [len(row.input_ids) for row in script.examples(job, 3)] == [64, 64, 64]
    assert [len(pair) for pair in script.pairs(job, 2)] == [64, 64]
    assert job.sequences == 2


def test_the_gpu_cases_begin_small_and_end_with_the_whole_model(script: Any) -> None:
    from alignkit.models.shapes import KNOWN

    cases = script.cases(KNOWN["Qwen/Qwen-7B-Chat"])
    assert [case.layers for case in cases] == sorted(case.layers for case in cases)
    assert cases[-1].layers == 32
    assert {case.stage for case in cases} == {"sft", "reward", "dpo"}
