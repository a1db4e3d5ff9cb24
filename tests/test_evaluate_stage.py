"""evaluate with real (random) adapters on a random base: what it writes, refuses, resumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_random import save_random_base

from alignkit.core.app import load_config, run_command
from alignkit.core.artifact import Artifact
from alignkit.core.config import LoraConfig, ModelConfig
from alignkit.core.errors import UserError
from alignkit.data.closed_world import World, answer
from alignkit.evaluate import run
from alignkit.evaluation.predictions import Prediction
from alignkit.generation.hf import HFGenerator


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, two adapters and twenty held-out rows, one of them without an answer."""
    folder = tmp_path_factory.mktemp("evaluate")
    model = save_random_base(folder / "base")
    for number, name in enumerate(("sft", "dpo"), start=1):
        _random_adapter(folder / name / "adapter", model, seed=number)
    world = World(3, split="held_out")
    with (folder / "test.jsonl").open("w", encoding="utf-8") as file:
        for number in range(20):
            passage = world.passage()
            question = world.ask(passage)
            row = {
                "id": f"t{number}",
                "instruction": passage.statement,
                "input": question.text,
                "output": "" if number == 4 else answer(passage.facts, question),
                "kind": question.kind,
                "form": "value" if question.proposed is None else "verdict",
                "level": "hard" if passage.hard else "easy",
                "held_out_name": number % 2 == 0,
            }
            file.write(json.dumps(row) + "\n")
    return folder


def _random_adapter(folder: Path, model: ModelConfig, seed: int) -> None:
    from alignkit.models.loading import load_base, new_adapter, save_adapter

    torch.manual_seed(seed)
    policy = new_adapter(load_base(model), LoraConfig(rank=2, alpha=4), ["q_proj", "v_proj", "down_proj"])
    for name, weight in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    folder.mkdir(parents=True)
    save_adapter(policy, folder, model)


def overrides(home: Path, output: Path, *more: str) -> list[str]:
    return [
        f"model.path={home / 'base'}",
        "model.max_length=256",
        f"data.path={home / 'test.jsonl'}",
        f"models={{sft: {home / 'sft' / 'adapter'}, dpo: {home / 'dpo' / 'adapter'}}}",
        "sampling.max_new_tokens=8",
        "sampling.batch_size=2",
        f"teacher.store={output / 'store.sqlite'}",
        f"output_dir={output / 'evaluate'}",
        *more,
    ]


def evaluate(home: Path, output: Path, *more: str) -> Artifact:
    return run(load_config("evaluate", overrides(home, output, *more)))


def predictions(artifact: Artifact) -> list[Prediction]:
    lines = (artifact.folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return [Prediction.model_validate_json(line) for line in lines]


def test_scores_every_model_on_the_same_questions(home: Path, tmp_path: Path) -> None:
    artifact = evaluate(home, tmp_path)
    rows = predictions(artifact)
    assert [row.id for row in rows] == [f"t{number}" for number in range(20) if number != 4]
    assert artifact.dropped == {"no reference answer": 1}
    assert all(list(row.answers) == ["base", "sft", "dpo"] for row in rows)
    texts = {name: [row.answers[name].text for row in rows] for name in ("base", "sft", "dpo")}
    assert len({tuple(texts[name]) for name in texts}) == 3  # three different models answered
    assert list(artifact.metrics["models"]) == ["base", "sft", "dpo"]
    for name, summary in artifact.metrics["models"].items():
        assert summary["exact_match"]["n"] == 19
        assert summary["judge"]["low"] <= summary["judge"]["mean"] <= summary["judge"]["high"]
        assert summary["judge"]["mean"] == pytest.approx(
            sum(row.answers[name].scores.get("judge", 0) for row in rows) / 19
        )
        assert set(summary["by"]) == {"form", "level", "kind", "held_out_name"}
    pairs = [(entry["new"], entry["old"]) for entry in artifact.metrics["comparisons"]]
    assert pairs == [("sft", "base"), ("dpo", "sft")]
    assert artifact.summary.startswith("exact match base 0.")
    assert {check.name for check in artifact.checks} == {"held-out questions unseen", "answers graded"}
    assert evaluate(home, tmp_path).up_to_date


def test_without_a_judge_nothing_is_graded(home: Path, tmp_path: Path) -> None:
    artifact = evaluate(home, tmp_path, "judge=false", "models.base=null", "data.limit=4", 'comparisons=["sft>dpo"]')
    assert list(artifact.metrics["models"]) == ["sft", "dpo"]
    assert "judge" not in artifact.metrics["models"]["sft"]
    assert [(entry["new"], entry["old"]) for entry in artifact.metrics["comparisons"]] == [("sft", "dpo")]
    assert not (tmp_path / "store.sqlite").exists()


def test_the_judge_chooses_between_answers_and_is_compared_with_people(home: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.jsonl"
    rows = [{"id": "t0", "system": "sft", "grade": 1}, {"id": "t1", "systems": ["sft", "base"], "better": "tie"}]
    labels.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    more = ("pairwise=true", f"human_labels={labels}", "data.limit=4", "cluster_by=level")
    artifact = evaluate(home, tmp_path, *more)
    pairs = [json.loads(line) for line in (artifact.folder / "preferences.jsonl").read_text().splitlines()]
    assert [(pair["id"], pair["new"]) for pair in pairs] == [(f"t{n}", new) for new in ("sft", "dpo") for n in range(4)]
    comparison = artifact.metrics["comparisons"][0]
    assert comparison["preference"]["win_rate"]["n"] == 4
    assert comparison["clusters"] <= 2 and "only" in comparison["warnings"][-1]
    asked = artifact.metrics["pairwise"]["usage"]["requests"]
    assert asked == 2 * (8 - artifact.metrics["pairwise"]["equal_answers"]) < artifact.metrics["usage"]["requests"]
    assert artifact.metrics["human_agreement"]["grades"]["same"]["n"] == 1
    assert artifact.metrics["human_agreement"]["preferences"]["same"]["n"] == 1
    assert evaluate(home, tmp_path, *more).up_to_date
    with pytest.raises(UserError, match="human_labels: people are compared with the judge"):
        evaluate(home, tmp_path, "judge=false", f"human_labels={labels}")


def test_resumes_to_the_same_predictions(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = predictions(evaluate(home, tmp_path / "whole", "judge=false"))
    calls: list[str] = []
    generate = HFGenerator.generate

    def interrupted(self: HFGenerator, *arguments: Any) -> Any:
        if self.label == "sft" and calls.count("sft") == 1:
            raise KeyboardInterrupt
        calls.append(self.label)
        return generate(self, *arguments)

    monkeypatch.setattr(HFGenerator, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(home, tmp_path / "killed", "judge=false")
    assert calls == ["base", "base", "base", "sft"]  # chunks of eight questions
    assert not (tmp_path / "killed" / "evaluate" / "predictions.jsonl").exists()

    calls.clear()

    def counted(self: HFGenerator, *arguments: Any) -> Any:
        calls.append(self.label)
        return generate(self, *arguments)

    monkeypatch.setattr(HFGenerator, "generate", counted)
    resumed = predictions(evaluate(home, tmp_path / "killed", "judge=false"))
    assert calls == ["sft", "sft", "dpo", "dpo", "dpo"]  # neither the base nor the first chunk again
    assert resumed == whole


def test_a_model_trained_on_a_held_out_question_stops_it(home: Path, tmp_path: Path) -> None:
    train = tmp_path / "train.jsonl"
    train.write_text((home / "test.jsonl").read_text().splitlines()[7] + "\n")
    inputs = [{"key": "data.path", "path": str(train), "sha256": None, "rows": 1}]
    manifest = {"stage": "sft", "status": "complete", "fingerprint": "", "inputs": inputs, "outputs": []}
    record = home / "sft" / "manifest.json"
    record.write_text(json.dumps(manifest))
    try:
        with pytest.raises(UserError, match=r"1 of 19 held-out questions in 1 training files \(first: t7\)"):
            evaluate(home, tmp_path, "judge=false")
        artifact = evaluate(home, tmp_path, "judge=false", "data.limit=9", "allow_training_questions=true")
        assert artifact.metrics["leaked_rows"] == 1
    finally:
        record.unlink()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["sampling.n=2"], "sampling.n=2: evaluate takes one answer"),
        (["cluster_by=machine"], "cluster_by=machine: the row t0 has no such field"),
        (["human_labels=gone.jsonl"], "gone.jsonl: no such file"),
        (['comparisons=["dpo>sff"]'], "'dpo>sff' must be 'new>old' with two of the models base, sft, dpo"),
        (["comparisons=[dpo]"], "'dpo' must be 'new>old'"),
        (["models={gone: runs/nowhere/adapter}"], "models.gone=runs/nowhere/adapter: no such file or folder"),
        (["sampling.max_new_tokens=250"], "no question can be asked (prompt and max_new_tokens exceed max_length)"),
    ],
)
def test_bad_configurations_are_explained(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert run_command("evaluate", overrides(home, tmp_path, *more)) == 2
    assert message in capsys.readouterr().err


def test_nothing_to_compare_with(home: Path, tmp_path: Path) -> None:
    row = json.loads((home / "test.jsonl").read_text().splitlines()[4])
    (tmp_path / "unanswered.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match="no row has an output"):
        evaluate(home, tmp_path, f"data.path={tmp_path / 'unanswered.jsonl'}")
