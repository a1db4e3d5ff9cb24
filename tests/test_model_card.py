"""The model card: valid for the hub, true to the manifests, and harmless whatever stands in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from alignkit.core.artifact import Artifact
from alignkit.core.config import ModelConfig, StageConfig
from alignkit.core.hashing import hash_path
from alignkit.reporting.model_card import find_scores, write_model_card

QWEN = ModelConfig(name="qwen", path="Qwen/Qwen2.5-7B-Instruct", max_length=2048)


def write_run(folder: Path, stage: str, **changes: Any) -> Path:
    """A complete run folder with an adapter in it."""
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter/adapter_config.json").write_text(json.dumps({"r": 16, "made_by": folder.name}))
    manifest = {
        "stage": stage,
        "status": "complete",
        "fingerprint": "0",
        "command": f"alignkit {stage} run=x",
        "folder": str(folder),
        "inputs": [],
        "outputs": [{"path": "adapter", "sha256": hash_path(folder / "adapter"), "rows": None}],
        "metrics": {"rows": 96},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest | changes))
    (folder / "config.yaml").write_text("seed: 3\ndata: {path: rows.jsonl}\nlora: {rank: 16}\n")
    return folder / "adapter"


def write_evaluation(folder: Path, adapter: Path, sha256: str | None = None, **changes: Any) -> None:
    estimate = {"mean": 0.806, "low": 0.777, "high": 0.832, "n": 800}
    inputs = [
        {"key": "data.path", "path": "sets/test.jsonl", "sha256": "1", "rows": 800},
        {"key": "models.dpo", "path": str(adapter), "sha256": sha256 or hash_path(adapter), "rows": None},
    ]
    gain = {
        "mean": 0.05,
        "low": 0.03,
        "high": 0.071,
        "n": 800,
        "clusters": 534,
        "p": 0.001,
        "p_holm": 0.003,
        "mde": 0.029,
    }
    metrics = {
        "models": {"dpo": {"exact_match": estimate, "words": estimate}, "base": {"exact_match": estimate}},
        "comparisons": [{"new": "dpo", "old": "sft", "exact_match": gain, "gained": 90, "lost": 50}],
    }
    write_run(folder, "evaluate", inputs=inputs, metrics=metrics, **changes)


@pytest.fixture
def adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A DPO adapter that continues an SFT adapter, evaluated once."""
    monkeypatch.chdir(tmp_path)
    first = write_run(Path("runs/x/sft"), "sft")
    entry = {"key": "init_adapter", "path": str(first), "sha256": hash_path(first), "rows": None}
    data = {"key": "data.path", "path": "Anthropic/hh-rlhf", "sha256": None, "rows": None}
    found = write_run(Path("runs/x/dpo"), "dpo", inputs=[entry, data])
    write_evaluation(Path("runs/x/evaluate"), found)
    return found


def card_of(adapter: Path, model: ModelConfig = QWEN) -> Any:
    with Artifact.open("export", StageConfig(name="export", output_dir="runs/x/export")) as artifact:
        artifact.check("merge_drift", True, "mean KL 1e-9")
        write_model_card(artifact, str(adapter), model, "apache-2.0")
    return ModelCard.load(artifact.folder / "README.md")


def test_the_metadata_says_base_licence_data_and_scores(adapter: Path) -> None:
    data = card_of(adapter).data
    assert data.base_model == "Qwen/Qwen2.5-7B-Instruct"
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "transformers", "text-generation")
    assert data.datasets == ["Anthropic/hh-rlhf"]
    assert data.tags == ["alignkit", "lora", "dpo", "sft"]
    (result,) = data.eval_results or []
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("exact_match", 0.806, "test.jsonl")
    assert result.metric_name == "exact match, 95 % interval 0.777 to 0.832"


def test_the_text_tells_how_it_was_made_and_measured(adapter: Path) -> None:
    text = card_of(adapter).text
    assert "(sft, dpo)" in text
    assert text.index("\nsft:\n") < text.index("\ndpo:\n")
    assert "- lora.rank: `16`" in text and "- seed: `3`" in text
    assert "`0.806 [0.777, 0.832]` | `800` | `test.jsonl` | `evaluate`" in text
    assert "| `merge_drift` | `pass` | `mean KL 1e-9` |" in text
    row = "| `exact_match` | `sft` | `+0.050 [+0.030, +0.071]` | `0.003` | `0.029` | `800 / 534` | `evaluate` |"
    assert row in text
    assert "`apache-2.0`, as given at export" in text
    assert "the licence of the base, `Qwen/Qwen2.5-7B-Instruct`, and those of the data do: `Anthropic/hh-rlhf`" in text
    assert "2048 tokens" in text
    assert "closed world" not in text


def test_only_evaluations_of_this_very_adapter_count(adapter: Path) -> None:
    write_evaluation(Path("runs/x/older"), adapter, sha256="another adapter's")
    write_evaluation(Path("runs/x/broken"), adapter, status="failed")
    write_evaluation(Path("runs/x/again"), adapter)
    assert [(score.name, score.run) for score in find_scores(adapter)] == [
        ("exact_match", "again"),
        ("exact_match", "evaluate"),
    ]


def test_an_adapter_from_elsewhere_has_a_card_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("downloaded").mkdir()
    card = card_of(Path("downloaded"), ModelConfig(name="mine", path="./models/mine"))
    assert card.data.base_model is None and card.data.eval_results is None
    assert "No evaluation of this adapter was found" in card.text


def test_what_stands_in_a_manifest_cannot_become_markup(adapter: Path) -> None:
    manifest = json.loads(Path("runs/x/dpo/manifest.json").read_text())
    manifest["command"] = "alignkit dpo '[click](http://evil) <img src=x>' `rm`\n\n# Heading\x1b[31m"
    Path("runs/x/dpo/manifest.json").write_text(json.dumps(manifest))
    lines = card_of(adapter).text.splitlines()
    shown = [line for line in lines if "evil" in line]
    assert shown and all(line.startswith(("    ", "- command: ``")) for line in shown)
    assert not any(line.startswith("# Heading") for line in lines)
    assert "\x1b" not in "".join(lines)
