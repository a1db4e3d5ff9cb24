"""The rejection_sampling stage: what it writes, that it resumes, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_sample import SAMPLING, TINY, questions

from alignkit import rejection_sampling
from alignkit.core.app import load_config
from alignkit.core.config import LoraConfig, RowsConfig, TeacherConfig
from alignkit.core.errors import UserError
from alignkit.core.records import ChatExample, CompletionSet, PreferencePair
from alignkit.generation import hf
from alignkit.models.loading import load_base, load_tokenizer, new_adapter, save_adapter
from alignkit.models.reward_model import RewardModel
from alignkit.models.value_head import ValueHeadModel
from alignkit.rejection_sampling import RejectionSamplingConfig, ScorerKind


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model over the embedded base, untrained: the stage only needs its order."""
    folder = tmp_path_factory.mktemp("reward")
    torch.manual_seed(3)
    policy = new_adapter(load_base(TINY), LoraConfig(rank=2, dropout=0.0), ["all-linear"])
    model = RewardModel(ValueHeadModel(policy), load_tokenizer(TINY), TINY)
    model.centre([0.0, 1.0])
    model.save_pretrained(folder)
    return folder


def configure(folder: Path, count: int = 12, **changes: Any) -> RejectionSamplingConfig:
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in questions(count)), encoding="utf-8")
    values: dict[str, Any] = {
        "model": TINY,
        "sampling": replace(SAMPLING, n=4, batch_size=8),
        "teacher": TeacherConfig(model="scripted"),
        "name": "rejection_sampling",
        "output_dir": str(folder / "out"),
        "min_margin": 0.0,
    }
    return RejectionSamplingConfig(data=RowsConfig(path=str(path)), **(values | changes))


def read(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out" / name).read_text(encoding="utf-8").splitlines()]


def test_the_stage_chooses_by_the_reward_model(tmp_path: Path, reward_folder: Path) -> None:
    artifact = rejection_sampling.run(configure(tmp_path, reward=str(reward_folder), grade=True))
    rows = [CompletionSet.model_validate(each) for each in read(tmp_path, "scored.jsonl")]
    examples = {each["id"]: ChatExample.model_validate(each) for each in read(tmp_path, "best.jsonl")}
    pairs = [PreferencePair.model_validate(each) for each in read(tmp_path, "pairs.jsonl")]
    assert len(rows) == 12
    model = RewardModel.from_pretrained(reward_folder)
    for row in rows:
        finished = [each for each in row.completions if each.finished]
        rescored = model.score(
            [{"messages": [*row.prompt, {"role": "assistant", "content": each.text}]} for each in finished]
        )
        assert [each.score for each in finished] == pytest.approx(rescored, abs=1e-4)
        assert all(each.score is None for each in row.completions if not each.finished)
        if finished:
            assert examples[row.id].completion[0].content == finished[rescored.index(max(rescored))].text
    assert pairs
    for pair in pairs:
        assert pair.margin is not None
        assert pair.margin > 0
        assert pair.chosen == examples[pair.id].completion
    curves = artifact.metrics["best_of_n"]
    means = [curves["score"][k]["mean"] for k in ("1", "2", "4")]
    assert means == sorted(means)
    assert means[0] < means[-1]
    assert means[-1] == pytest.approx(artifact.metrics["mean_best_score"])
    assert 0 <= curves["grade"]["1"]["mean"] <= 10
    assert len(read(tmp_path, "best.jsonl")) + artifact.dropped["no finished completion with a score"] == 12


def test_the_teacher_is_the_upper_bound_and_needs_no_reward_model(tmp_path: Path) -> None:
    config = configure(tmp_path, scorer=ScorerKind.judge, reward="nowhere/at/all")
    artifact = rejection_sampling.run(config)
    for each in read(tmp_path, "scored.jsonl"):
        assert all(0 <= completion["score"] <= 10 for completion in each["completions"] if completion["finished"])
    assert [entry["key"] for entry in artifact.inputs] == ["data.path"]


def test_a_killed_run_ends_with_the_same_files(
    tmp_path: Path, reward_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    previous = tmp_path / "previous"
    torch.manual_seed(9)
    policy = new_adapter(load_base(TINY), LoraConfig(rank=2, dropout=0.0), ["all-linear"])
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    save_adapter(policy, previous, TINY)
    settings: dict[str, Any] = {"count": 40, "reward": str(reward_folder), "previous_adapter": str(previous)}
    (tmp_path / "whole").mkdir()
    rejection_sampling.run(configure(tmp_path / "whole", **settings))

    decode, calls = hf.decode, 0

    def dies(*arguments: Any, **keywords: Any) -> list[list[int]]:
        nonlocal calls
        calls += 1
        if calls == 30:  # the previous version is done (20 batches), the latest is not
            raise KeyboardInterrupt
        return decode(*arguments, **keywords)

    monkeypatch.setattr(hf, "decode", dies)
    (tmp_path / "cut").mkdir()
    with pytest.raises(KeyboardInterrupt):
        rejection_sampling.run(configure(tmp_path / "cut", **settings))
    calls = 100
    rejection_sampling.run(configure(tmp_path / "cut", **settings))
    assert calls == 112  # two of the latest version's five chunks were in the journal
    for name in ("scored.jsonl", "previous.jsonl", "best.jsonl", "pairs.jsonl"):
        assert read(tmp_path / "cut", name) == read(tmp_path / "whole", name)
    old = {
        each["id"]: {completion["text"] for completion in each["completions"]}
        for each in read(tmp_path / "cut", "previous.jsonl")
    }
    assert all(each["rejected"][0]["content"] in old[each["id"]] for each in read(tmp_path / "cut", "pairs.jsonl"))


def test_a_reward_model_must_be_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="scorer=judge"):
        rejection_sampling.run(configure(tmp_path))
    with pytest.raises(UserError, match=r"reward=.*nowhere: no such file or folder"):
        rejection_sampling.run(configure(tmp_path, reward=str(tmp_path / "nowhere")))


def test_the_shipped_configuration_composes() -> None:
    config = load_config("rejection_sampling", ["run=x", "scorer=judge"])
    assert isinstance(config, RejectionSamplingConfig)
    assert (config.reward, config.sampling.n, config.adapter) == ("none", 8, "runs/x/sft/adapter")
    assert load_config("rejection_sampling", ["run=x"]).reward == "runs/x/reward"
