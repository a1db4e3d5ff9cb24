"""The stage `preflight`: what it says, what it proposes, and how it ends."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from alignkit.core.app import load_config, run_command
from alignkit.core.config import SamplingConfig
from alignkit.models.machine import GIB
from alignkit.preflight import as_text, grouped

CARD = ["+model=qwen7b", "hardware=rtx4090_24gb"]


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def report() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(Path("runs/default/preflight/preflight.json").read_text(encoding="utf-8"))
    return content


def stage(name: str) -> dict[str, Any]:
    return next(each for each in report()["stages"] if each["stage"] == name)


def test_qwen_7b_trains_on_24_gb(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("preflight", [*CARD, "stages=sft,reward,dpo"]) == 0
    out = capsys.readouterr().out
    assert "All of this is an estimate" in out
    assert out.count(" fits ") == 3
    for each in report()["stages"]:
        assert sum(each["parts"].values()) == each["peak_bytes"] < each["needed_bytes"]
        assert each["needed_bytes"] + each["spare_bytes"] == round(23.6 * GIB)
        assert 0 < each["hours"][0] < each["hours"][1]
    assert stage("dpo")["parts"]["adapters"] == 2 * stage("sft")["parts"]["adapters"]  # the reference's copy
    manifest = json.loads(Path("runs/default/preflight/manifest.json").read_text(encoding="utf-8"))
    assert manifest["status"] == "complete"


def test_what_does_not_fit_ends_with_2_and_a_command_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    typed = [
        *CARD,
        "lora.rank=64",
        "train.batch_size=16",
        "train.gradient_accumulation=1",
        "train.max_batch_tokens=65536",
    ]
    for attempt in range(2):  # never up to date: it tells about a machine
        assert run_command("preflight", [*typed, "stages=sft", "rows=50000"]) == 2, attempt
    assert "sft will not run so" in capsys.readouterr().err
    words = shlex.split(stage("sft")["command"])
    assert words[:3] == ["python", "-m", "alignkit.sft"]
    assert "hardware=rtx4090_24gb" in words
    assert "lora.rank=64" in words
    config: Any = load_config("sft", words[3:])
    assert config.train.batch_size * config.train.gradient_accumulation == 16
    assert run_command("preflight", [*words[3:], "stages=sft"]) == 0


def test_sampling_is_held_by_its_batch() -> None:
    assert run_command("preflight", [*CARD, "stages=rejection_sampling"]) == 2
    found = stage("rejection_sampling")
    assert found["parts"]["keys and values"] > 23.6 * GIB
    assert found["overrides"] == ["sampling.batch_size=8"]
    config: Any = load_config("rejection_sampling", shlex.split(found["command"])[3:])
    assert config.sampling == SamplingConfig(**{**vars(config.sampling), "batch_size": 8})
    assert run_command("preflight", [*CARD, "stages=rejection_sampling", *found["overrides"]]) == 0


@pytest.mark.parametrize("settings", [[], ["sampling.batch_size=8"], ["lora.rank=64", "sampling.batch_size=8"]])
def test_three_adapters_on_one_4_bit_base_take_little_more_than_one(
    settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run_command("preflight", ["+model=qwen7b", "hardware=h200", "stages=rejection_sampling", *settings])
    times = stage("rejection_sampling")["times_policy_alone"]
    assert 1 < times <= 1.15
    assert f"as adapters on one base: {times:.3f} times the policy alone" in capsys.readouterr().out


def test_what_nothing_helps_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("preflight", ["+model=qwen7b", "hardware.memory_gib=4", "stages=sft"]) == 2
    assert "no setting that is known here makes it fit" in capsys.readouterr().out
    assert stage("sft")["command"] is None


def test_what_is_known_to_fail_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("preflight", [*CARD, "stages=sft", "lora.init=pissa"]) == 2
    assert "sft: known to fail: lora.init=pissa over a 4-bit base or with DoRA" in capsys.readouterr().out


def test_rows_are_counted_with_the_model_s_tokenizer() -> None:
    rows = [{"id": f"r{n}", "instruction": "Say it.", "input": "", "output": "yes " * (n + 1)} for n in range(3)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert run_command("preflight", ["+model=tiny", "data.path=rows.jsonl", "stages=sft"]) == 0
    found = report()["rows"]
    assert found["count"] == 3
    assert found["mean"] < found["longest"] == stage("sft")["longest"] < 512
    with Path("rows.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"id": "empty", "instruction": "Say it.", "input": "", "output": ""}) + "\n")
    assert run_command("preflight", ["+model=tiny", "data.path=rows.jsonl", "stages=sft"]) == 0
    assert report()["rows"] == found
    assert "empty answer" in Path("runs/default/preflight/dropped.jsonl").read_text(encoding="utf-8")


def test_an_unknown_stage_and_an_unreadable_model_are_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("preflight", ["stages=expand"]) == 2
    assert "choose from sft, reward, dpo, rejection_sampling" in capsys.readouterr().err
    assert run_command("preflight", ["rows=0"]) == 2
    assert "rows=0" in capsys.readouterr().err
    assert run_command("preflight", ["+model=qwen7b", "model.path=nobody/knows", "hardware.memory_gib=24"]) == 2
    assert "shape is unknown" in capsys.readouterr().err


def test_the_page_shows_every_part_and_the_limit() -> None:
    assert run_command("preflight", CARD) == 2
    page = Path("runs/default/preflight/preflight.html").read_text(encoding="utf-8")
    for text in (
        "rejection_sampling will not run so",
        "keys and values",
        "of 23.6 GiB",
        "sampling.batch_size=8",
        "<svg",
    ):
        assert text in page
    assert "<script" not in page


def test_parts_are_grouped_without_a_rest() -> None:
    parts = {"base weights": 1, "embeddings and head": 2, "adapters": 4, "optimizer": 8, "gradients": 16, "logits": 32}
    assert grouped(parts) == {"weights": 3, "trained": 28, "passing": 32}
    run_command("preflight", ["+model=tiny", "stages=sft"])
    assert "this machine, without a GPU" in as_text(report())


def test_the_report_shows_predicted_beside_measured_memory(tmp_path: Path) -> None:
    """Their ratio only where both are there: without a GPU nothing comparable is measured."""
    from test_report import make_run

    from alignkit.reporting.page import render_page
    from alignkit.reporting.runs import read_run

    def page(folder: Path, measured: int) -> str:
        path = make_run(folder, stages=8) / "sft/manifest.json"
        manifest = json.loads(path.read_text(encoding="utf-8"))
        manifest["metrics"]["predicted_memory_bytes"] = 9 * GIB
        path.write_text(json.dumps({**manifest, "peak_gpu_memory_bytes": measured}), encoding="utf-8")
        return render_page([read_run(folder)], None)

    def line(shown: str) -> str:
        section = shown[shown.index('<section id="memory">') :]
        return section[section.index(">sft<") :].partition("</tr>")[0]

    without = page(tmp_path / "cpu", measured=0)
    assert "nothing that a prediction could be held against" in without
    assert "9.00\u00a0GiB" in line(without)
    shown = line(page(tmp_path / "gpu", measured=8 * GIB))
    assert all(text in shown for text in ("9.00\u00a0GiB", "8.00\u00a0GiB", "1.12"))
