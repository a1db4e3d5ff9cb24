"""The stage `evaluate_reward` as a user runs it: what it measures, leaves out, and refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_reward_stage import BAD, GOOD, configure, graded, hh_rows, scored_rows, write
from tiny_random import conversation, save_random_base

from alignkit import reward
from alignkit.core.app import run_command
from alignkit.core.config import RowsConfig
from alignkit.core.manifest import read_manifest
from alignkit.evaluation import reward_examination
from alignkit.evaluation.reward_bench import SECTIONS
from alignkit.evaluation.reward_examination import padding_difference
from alignkit.models.reward_model import RewardModel


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained reward model, and the files that it was trained on."""
    folder = tmp_path_factory.mktemp("trained")
    base = save_random_base(folder / "base")
    reward.run(configure(base, folder))
    return folder


@pytest.fixture
def here(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained / "reward", tmp_path / "runs/demo/reward")
    for name in ("scored.jsonl", "hh.jsonl"):
        shutil.copy(trained / name, tmp_path / name)
    return tmp_path


def metrics(folder: Path) -> dict[str, Any]:
    manifest = read_manifest(folder)
    assert manifest is not None and manifest["status"] == "complete"
    return dict(manifest["metrics"]) | {"dropped": manifest["dropped"]}


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_on_its_own_data_it_measures_what_training_measured_on_the_held_out_prompts(here: Path) -> None:
    given = ["run=demo", "data.path=scored.jsonl", "sources={hh-rlhf: hh.jsonl}"]
    assert run_command("evaluate_reward", given) == 0
    found, before = metrics(here / "runs/demo/evaluate_reward"), metrics(here / "runs/demo/reward")
    assert found["held_out_accuracy"] == before["held_out_accuracy"]
    assert found["held_out"] == before["held_out"]
    assert found["train_prompts"] == 16 + 8
    assert found["dropped"]["the reward model was trained on this prompt"] == 16 + 8
    assert set(found["held_out"]["probes"]) == set(before["held_out"]["probes"]) != set()
    scored = rows(here / "runs/demo/evaluate_reward/held_out_scores.jsonl")
    assert scored == rows(here / "runs/demo/reward/held_out_scores.jsonl")
    assert len(scored) == 4 + 2

    score = RewardModel.from_pretrained(here / "runs/demo/reward").score
    for row in scored:
        wanted = score([{"prompt": row["prompt"], "completion": each["text"]} for each in row["answers"]])
        assert [each["score"] for each in row["answers"]] == pytest.approx(wanted, abs=1e-5)
        for better, worse in row["comparisons"]:
            grades = [row["answers"][place].get("grade", 1 - k) for k, place in enumerate((better, worse))]
            assert grades[0] > grades[1]


def test_preferences_alone_and_an_answer_that_is_too_long(here: Path) -> None:
    pairs = hh_rows(30)[20:]
    pairs[0]["chosen"] += " Oslo" * 300
    write(here / "pairs.jsonl", pairs)
    given = ["run=demo", "name=pairs", "data.path=pairs.jsonl", "probed_answers=0"]
    assert run_command("evaluate_reward", given) == 0
    found = metrics(here / "runs/demo/pairs")
    assert found["held_out_accuracy"]["hh-rlhf"]["n"] == 9
    assert found["dropped"] == {"longer than max_length": 1}
    assert found["held_out"]["agreement"] == {}  # nobody has graded
    assert all("rises" not in probe for probe in found["held_out"]["probes"].values())


def test_rewardbench_by_subset_and_in_sections(here: Path) -> None:
    rows_of_a_section = [
        {"id": n, "prompt": f"Was it {n}?", "chosen": GOOD, "rejected": BAD, "subset": subset}
        for n, subset in enumerate(SECTIONS["Safety"] * 2)
    ]
    write(here / "rewardbench.jsonl", rows_of_a_section)
    assert run_command("evaluate_reward", ["run=demo", "name=bench", "data.path=rewardbench.jsonl"]) == 0
    found = metrics(here / "runs/demo/bench")
    assert found["held_out_accuracy"]["rewardbench/donotanswer"]["n"] == 2
    assert found["held_out"]["rewardbench"] == {"Safety": pytest.approx(found["held_out_accuracy"]["all"]["mean"])}


def test_a_reward_model_that_does_not_say_what_it_was_trained_on(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    (here / "runs/demo/reward/train_prompts.jsonl").unlink()
    shutil.copytree(here / "runs/demo/reward", here / "elsewhere")
    (here / "elsewhere/manifest.json").unlink()
    assert run_command("evaluate_reward", ["run=demo", "reward=elsewhere", "data.path=scored.jsonl"]) == 0
    found = metrics(here / "runs/demo/evaluate_reward")
    assert found["train_prompts"] == "unknown"
    assert len(rows(here / "runs/demo/evaluate_reward/held_out_scores.jsonl")) == 20
    assert "train_prompts.jsonl" in caplog.text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["data.path=nan.jsonl"], "nan.jsonl:1"),
        (["reward=base", "data.path=scored.jsonl"], "reward_config.json is missing"),
        (["data.path=train.jsonl"], "was trained on each of the"),
        (["data.path=long.jsonl"], "no pair can be scored"),
        (["data.path=one.jsonl"], "there is no pair to measure on"),
    ],
)
def test_what_cannot_be_measured_is_said(
    here: Path, capsys: pytest.CaptureFixture[str], given: list[str], message: str
) -> None:
    held_out = {row["id"] for row in rows(here / "runs/demo/reward/held_out_scores.jsonl")}
    write(here / "train.jsonl", [row for row in scored_rows(20) if row["id"] not in held_out])
    long = graded("long", (f"{GOOD} " * 100, 9.0), (f"{BAD} " * 100, 1.0))
    write(here / "long.jsonl", [long.model_dump(exclude_none=True)])
    write(here / "one.jsonl", [graded("one", (GOOD, 9.0)).model_dump(exclude_none=True)])
    (here / "nan.jsonl").write_text(json.dumps(scored_rows(1)[0]).replace("9.0", "NaN") + "\n", encoding="utf-8")
    (here / "base").mkdir()
    assert run_command("evaluate_reward", ["run=demo", *given]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_score_that_depends_on_its_neighbours_stops_the_stage(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def all_visible(segments: torch.Tensor) -> torch.Tensor:
        length = segments.shape[1]
        return torch.ones(len(segments), 1, length, length, dtype=torch.bool).tril()

    monkeypatch.setattr("alignkit.models.value_head.visible", all_visible)
    assert run_command("evaluate_reward", ["run=demo", "data.path=scored.jsonl"]) == 2
    assert "scores_need_no_" in capsys.readouterr().err


def test_padding_is_checked_in_batches_that_fit(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All at once would not fit beside a base of 7B, after hours of training."""
    model = RewardModel.from_pretrained(trained / "reward")
    dialogues = [conversation("Hello " * words, GOOD) for words in (1, 9, 30, 2, 40, 3)]
    shapes: list[torch.Size] = []
    monkeypatch.setattr(reward_examination, "GPU_BATCH_TOKENS", 150)
    model.module.register_forward_pre_hook(
        lambda module, args, inputs: shapes.append(inputs["input_ids"].shape), with_kwargs=True
    )
    assert padding_difference(model, dialogues) <= 1e-5
    assert len(shapes) > 2
    assert max(rows * length for rows, length in shapes) <= 150
    assert any(rows > 1 for rows, _ in shapes)
    assert padding_difference(model, []) == 0


def test_held_out_share_0_leaves_nothing_to_examine(trained: Path, tmp_path: Path) -> None:
    base = save_random_base(tmp_path / "base")
    artifact = reward.run(configure(base, tmp_path, held_out_share=0.0, preferences=RowsConfig(path="none")))
    assert (artifact.metrics["held_out_accuracy"], artifact.metrics["held_out"]) == ({}, {})
    assert not (tmp_path / "reward/held_out_scores.jsonl").exists()
