"""Held-out rows: what is measured, that it changes nothing, the best weights, early stops, and answers to look at."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_training import (
    TRAIN,
    adapter_weights,
    encoded,
    interrupt_at,
    mean_loss,
    open_artifact,
    policy_for,
    train,
)
from test_sft import write_questions
from tiny_random import conversation, save_random_base, tokenizer

from alignkit.core.config import Keep, ModelConfig, RowsConfig, TrainConfig
from alignkit.core.errors import UserError
from alignkit.core.records import ChatExample, TextExample
from alignkit.sft import SFTConfig, run
from alignkit.training.held_out import Measurement, best_of, measurements, split_by_prompt, without_improvement
from alignkit.training.supervised import train_supervised

EVERY_TWO = replace(TRAIN, eval_steps=2, epochs=4.0)
"""Ten rows: two batches of four and one of two an epoch, twelve steps."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return save_random_base(tmp_path_factory.mktemp("base"))


def measured(rows: Sequence[dict[str, float]]) -> dict[int, float]:
    return {int(row["step"]): row["held_out_loss"] for row in rows if "held_out_loss" in row}


@pytest.mark.parametrize("kind", ["padded", "padding_free"])
def test_the_held_out_loss_is_the_mean_over_learned_tokens(model: ModelConfig, tmp_path: Path, kind: str) -> None:
    rows = encoded()
    policy, settings = policy_for(model), replace(TRAIN, max_steps=3, padding_free=kind == "padding_free")
    losses = train(tmp_path, policy, settings, rows[:6], held_out=rows[6:])
    assert measured(losses) == {3: pytest.approx(mean_loss(policy, rows[6:]), abs=1e-5)}


def test_it_is_measured_on_log_lines_and_after_the_last_step(model: ModelConfig, tmp_path: Path) -> None:
    settings = replace(EVERY_TWO, eval_steps=3, max_steps=11)  # rounded up to 4: a log line is every two steps
    losses = train(tmp_path, policy_for(model), settings, held_out=encoded()[:2])
    assert list(measured(losses)) == [4, 8, 11]
    assert [row["step"] for row in losses] == [1, 2, 4, 6, 8, 10, 11]


def test_training_is_the_same_with_and_without(model: ModelConfig, tmp_path: Path) -> None:
    """With dropout and noise, whose random numbers the measurements and the answers must leave alone."""
    settings = replace(EVERY_TWO, neftune_alpha=5.0)
    without, with_rows = policy_for(model, dropout=0.2), policy_for(model, dropout=0.2)
    expected = train(tmp_path / "without", without, settings)
    found = train(
        tmp_path / "with", with_rows, replace(settings, keep=Keep.last, sample_prompts=2), held_out=encoded()[:3]
    )
    assert [{k: v for k, v in row.items() if k != "held_out_loss"} for row in found] == expected
    for name, weight in adapter_weights(without).items():
        assert torch.equal(weight, adapter_weights(with_rows)[name]), name


def spoiling() -> TrainConfig:
    """Far too fast: the held-out loss falls, and rises again."""
    return replace(EVERY_TWO, learning_rate=5e-2, scheduler="constant", logging_steps=1, eval_steps=1)


def test_the_best_weights_are_kept(model: ModelConfig, tmp_path: Path) -> None:
    rows, policy = encoded(), policy_for(model)
    with open_artifact(tmp_path) as artifact:
        losses = train_supervised(
            policy, tokenizer(), rows[:5], replace(spoiling(), keep=Keep.best), 3, artifact, held_out=rows[5:]
        )
    found = measured(losses)
    step = min(found, key=lambda step: found[step])
    assert found[step] < found[max(found)] - 0.01  # else the test could not fail
    assert mean_loss(policy, rows[5:]) == pytest.approx(found[step], abs=1e-5)
    assert artifact.metrics["held_out"] == {
        "rows": 5,
        "loss": found[step],
        "lowest_loss": found[step],
        "lowest_loss_step": step,
        "kept_step": step,
        "stopped_early": False,
    }


def test_the_last_weights_are_kept_unless_told_otherwise(model: ModelConfig, tmp_path: Path) -> None:
    rows, policy = encoded(), policy_for(model)
    losses = train(tmp_path, policy, spoiling(), rows[:5], held_out=rows[5:])
    assert mean_loss(policy, rows[5:]) == pytest.approx(losses[-1]["held_out_loss"], abs=1e-5)


def test_patience_ends_the_training(model: ModelConfig, tmp_path: Path) -> None:
    rows = encoded()
    losses = train(tmp_path / "a", policy_for(model), spoiling(), rows[:5], held_out=rows[5:])
    found = list(measured(losses).values())
    stop = next(n for n in range(2, len(found)) if min(found[: n + 1]) < min(found[n - 1 : n + 1])) + 1
    assert stop < len(found)
    stopped = train(tmp_path / "b", policy_for(model), replace(spoiling(), patience=2), rows[:5], held_out=rows[5:])
    assert measured(stopped) == {step: loss for step, loss in measured(losses).items() if step <= stop}


def test_an_interrupted_run_keeps_the_same_best_weights(
    model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its best weights may lie before the checkpoint from which it continues."""
    rows, settings = encoded(), replace(spoiling(), keep=Keep.best, patience=4, sample_prompts=1)
    whole, resumed = policy_for(model), policy_for(model)
    expected = train(tmp_path / "whole", whole, settings, rows[:5], held_out=rows[5:])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(7, patch)
        train(tmp_path / "cut", policy_for(model), settings, rows[:5], held_out=rows[5:])
    assert train(tmp_path / "cut", resumed, settings, rows[:5], held_out=rows[5:]) == expected
    for name, weight in adapter_weights(whole).items():
        assert torch.equal(weight, adapter_weights(resumed)[name]), name
    samples = [(tmp_path / name / "sft" / "samples.jsonl").read_text() for name in ("whole", "cut")]
    assert samples[0] == samples[1]


def test_patience_and_the_best_by_hand() -> None:
    history: list[dict[str, Any]] = [
        {"step": step, "held_out_loss": loss} for step, loss in ((2, 3.0), (4, 1.0), (6, 1.0), (8, 2.0))
    ]
    found = measurements([{"step": 1, "loss": 9.0}, *history])
    assert best_of(found) == Measurement(4, 1.0)
    assert [without_improvement(found[:count]) for count in range(5)] == [0, 0, 0, 1, 2]


def test_the_split_is_by_prompt() -> None:
    turns = [conversation(f"Question {prompt}?", answer) for prompt in range(20) for answer in ("Yes.", "No.")]
    rows = [ChatExample(id=str(n), prompt=each[:1], completion=each[1:]) for n, each in enumerate(turns)]
    kept, held_out = split_by_prompt(rows, 0.25, seed=1)
    assert len(held_out) == 2 * 5
    assert not {row.id for row in kept} & {row.id for row in held_out}
    assert {int(row.id) // 2 for row in held_out}.isdisjoint(int(row.id) // 2 for row in kept)
    assert split_by_prompt(rows, 0.25, seed=1) == (kept, held_out)
    assert split_by_prompt(rows, 0.25, seed=2) != (kept, held_out)
    documents = [TextExample(id=str(place), text=f"text {place % 10}") for place in range(20)]
    assert len(split_by_prompt(documents, 0.1, seed=1)[1]) == 2


def test_documents_are_split_by_their_text() -> None:
    rows = [TextExample(id=str(n), text=text) for n, text in enumerate(["a", "b", "a", "c", "d"])]
    kept, held_out = split_by_prompt(rows, 0.25, seed=1)
    assert {row.id for row in held_out} in ({"1"}, {"3"}, {"4"}, {"0", "2"})
    assert len(kept) + len(held_out) == 5


def test_a_share_that_leaves_a_side_empty_is_refused() -> None:
    with pytest.raises(UserError, match=r"held_out_share=0\.1 leaves 2 rows to train on and 0 held out"):
        split_by_prompt([TextExample(id="a", text="a"), TextExample(id="b", text="b")], 0.1, seed=1)


# -- the stage ---------------------------------------------------------------------------------------------------------


def configure(model: ModelConfig, folder: Path, **changes: Any) -> SFTConfig:
    data = RowsConfig(path=str(write_questions(folder / "questions.jsonl")))
    settings = replace(TRAIN, max_steps=4, eval_steps=2, sample_prompts=2)
    return replace(
        SFTConfig(name="sft", output_dir=str(folder / "sft"), data=data, model=model, train=settings), **changes
    )


def test_the_stage_holds_out_a_file(model: ModelConfig, tmp_path: Path) -> None:
    held_out = RowsConfig(path=str(write_questions(tmp_path / "held_out.jsonl", 5, seed=2)))
    artifact = run(configure(model, tmp_path, held_out=held_out))
    assert artifact.metrics["rows"] == 12
    assert artifact.metrics["held_out"]["rows"] == 5
    rows = [json.loads(line) for line in (tmp_path / "sft" / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 2, 4, 4]
    first = json.loads((tmp_path / "held_out.jsonl").read_text().splitlines()[0])
    assert first["input"] in rows[0]["prompt"]
    assert rows[0].keys() == {"step", "prompt", "text"}


def test_a_held_out_file_without_a_usable_row_is_refused(model: ModelConfig, tmp_path: Path) -> None:
    path = write_questions(tmp_path / "held_out.jsonl", 1, input="word " * 300)
    with pytest.raises(UserError, match=r"held_out.jsonl: no row can be used \(longer than max_length"):
        run(configure(model, tmp_path, held_out=RowsConfig(path=str(path))))


def test_documents_are_held_out_and_gone_on_with(model: ModelConfig, tmp_path: Path) -> None:
    texts = [f"Anna number {place} lives in Oslo, and leads a house of {place} rooms there." for place in range(12)]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    config = configure(model, tmp_path, data=RowsConfig(path=str(path)), held_out_share=0.25)
    artifact = run(replace(config, train=replace(config.train, packing=True, batch_size=1)))
    assert artifact.metrics["held_out"]["rows"] == 3
    rows = [json.loads(line) for line in (tmp_path / "sft" / "samples.jsonl").read_text().splitlines()]
    assert all(any(text.startswith(row["prompt"].strip()) for text in texts) for row in rows)


def test_the_stage_holds_out_a_share(model: ModelConfig, tmp_path: Path) -> None:
    artifact = run(configure(model, tmp_path, held_out_share=0.25))
    assert artifact.metrics["held_out"]["rows"] == 3
    assert artifact.metrics["rows"] == 9


@pytest.mark.parametrize(
    ("changes", "train", "message"),
    [
        ({}, {}, r"train.eval_steps needs held-out rows"),
        ({}, {"eval_steps": 0}, r"train.sample_prompts needs held-out rows"),
        ({"held_out_share": 0.2}, {"eval_steps": 0, "patience": 1}, r"need train.eval_steps"),
        ({"held_out_share": 1.0}, {}, r"must be at least 0 and below 1"),
        ({"held_out_share": 0.2}, {"packing": True, "neftune_alpha": 5.0}, r"train.neftune_alpha adds noise by"),
        ({"held_out_share": 0.01}, {}, r"leaves 12 rows to train on and 0 held out"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    model: ModelConfig, tmp_path: Path, changes: dict[str, Any], train: dict[str, Any], message: str
) -> None:
    config = configure(model, tmp_path, **changes)
    with pytest.raises(UserError, match=message):
        run(replace(config, train=replace(config.train, **train)))


def test_a_file_and_a_share_contradict_each_other(model: ModelConfig, tmp_path: Path) -> None:
    config = configure(model, tmp_path, held_out_share=0.2)
    with pytest.raises(UserError, match="give one"):
        run(replace(config, held_out=config.data))
