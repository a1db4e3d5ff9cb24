"""Every stage that trains or samples asks whether it will fit before it loads a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from alignkit.core.app import run_command
from alignkit.models import loading

QUESTION = [{"role": "user", "content": "Which?"}]


def turn(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def write(name: str, rows: Sequence[dict[str, Any]]) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return name


@pytest.fixture(autouse=True)
def _nothing_may_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **keywords: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "load_base", refuse)
    monkeypatch.setattr(loading, "load_policy", refuse)


def arguments(stage: str) -> list[str]:
    """The least that a stage needs to get as far as the check."""
    Path("adapter").mkdir()
    config = {"r": 4, "target_modules": ["q_proj"], "base_model_name_or_path": "embedded"}
    Path("adapter/adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    Path("adapter/adapter_model.safetensors").touch()
    question = {"instruction": "Which?", "output": "This one."}
    pair = {"prompt": QUESTION, "chosen": turn("This one."), "rejected": turn("None.")}
    return {
        "sft": [f"data.path={write('rows.jsonl', [question])}"],
        "reward": [
            "data.path=none",
            f"preferences.path={write('pairs.jsonl', [{**pair, 'prompt': turn_of(n)} for n in range(8)])}",
            "adapter=null",
        ],
        "dpo": [f"data.path={write('pairs.jsonl', [{'id': 'a', **pair}])}", "init_adapter=adapter"],
        "rejection_sampling": [
            f"data.path={write('rows.jsonl', [question])}",
            "adapter=adapter",
            "reward=adapter",
            "sampling.max_new_tokens=16",
        ],
    }[stage]


def turn_of(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Which of {number}?"}]


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "rejection_sampling"])
def test_what_does_not_fit_is_stopped_before_a_model_is_loaded(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(stage, [*arguments(stage), "hardware.memory_gib=0.5"]) == 2
    message = capsys.readouterr().err
    assert f"{stage}: tiny with" in message
    assert "needs about" in message
    manifest = json.loads(Path(f"runs/default/{stage}/manifest.json").read_text(encoding="utf-8"))
    assert manifest["status"] == "failed"
    assert manifest["metrics"]["predicted_memory_bytes"] > 2**20


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_what_is_known_to_fail_is_stopped_as_well(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = [*arguments(stage), "model.lora_targets=q_proj,lm_head", "model.max_length=4096"]
    code = run_command(stage, given)
    message = capsys.readouterr().err
    assert code == 2
    assert "beyond the model's context" in message
    assert ("an adapter on lm_head" in message) == (stage != "dpo")  # dpo continues an adapter that is there
