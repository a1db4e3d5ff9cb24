"""The stage `sft`: what it writes, what it refuses, and how it continues."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_random import conversation, save_random_base, tokenizer

from alignkit.core.app import run_command
from alignkit.core.config import LoraConfig, ModelConfig, Quantization, RowsConfig, TrainConfig
from alignkit.core.errors import UserError
from alignkit.data.chat import IGNORED, EncodedExample, encode_example
from alignkit.data.closed_world import World, answer
from alignkit.models.loading import load_policy, load_tokenizer
from alignkit.sft import SFTConfig, run
from alignkit.training.callbacks import StepReport

TRAIN = TrainConfig(learning_rate=1e-2, batch_size=4, max_steps=6, warmup_share=0.0, logging_steps=2, save_steps=2)


@pytest.fixture
def model(tmp_path: Path) -> ModelConfig:
    return save_random_base(tmp_path / "base")


def write_questions(path: Path, count: int = 12, seed: int = 1, **changes: str) -> Path:
    """Questions of the closed world with their right answers; `changes` are made to the first row."""
    world, rows = World(seed), []
    for number in range(count):
        passage = world.passage(2)
        question = world.ask(passage, ("value", "yes", "no", "unanswerable")[number % 4])
        text = answer(passage.facts, question)
        rows.append({"id": f"q{number}", "instruction": passage.statement, "input": question.text, "output": text})
    rows[0].update(changes)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def config(model: ModelConfig, tmp_path: Path) -> SFTConfig:
    return SFTConfig(
        name="sft",
        output_dir=str(tmp_path / "sft"),
        data=RowsConfig(path=str(write_questions(tmp_path / "questions.jsonl"))),
        model=model,
        lora=LoraConfig(rank=4, alpha=8, dropout=0.0),
        train=TRAIN,
    )


def losses(folder: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (Path(folder) / "loss.jsonl").read_text().splitlines()]


def held_out_loss(policy: Any, rows: list[dict[str, str]]) -> float:
    """Mean -log p of the answers' tokens."""
    total, count = 0.0, 0
    for row in rows:
        turns = conversation(row["instruction"] + "\n\n" + row["input"], row["output"])
        encoded = encode_example(tokenizer(), turns[:1], turns[1:], max_length=512)
        assert isinstance(encoded, EncodedExample)
        labels = torch.tensor(encoded.labels)[1:]
        with torch.no_grad():
            log_probs = policy(torch.tensor([encoded.input_ids])).logits[0, :-1].float().log_softmax(-1)
        learned = labels != IGNORED
        total -= float(log_probs[learned].gather(1, labels[learned, None]).sum())
        count += int(learned.sum())
    return total / count


# -- what it writes ----------------------------------------------------------------------------------------------------


def test_a_run_writes_an_adapter_that_has_learned(config: SFTConfig) -> None:
    artifact = run(replace(config, train=replace(TRAIN, max_steps=30)))
    rows = losses(config.output_dir)
    assert [row["step"] for row in rows] == [1, *range(2, 31, 2)]
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    assert {"step", "epoch", "loss", "learning_rate", "gradient_norm", "token_accuracy"} == rows[0].keys()
    assert sorted(entry["path"] for entry in artifact.outputs) == ["adapter", "loss.jsonl"]
    assert all(check.passed for check in artifact.checks)
    assert {"end of turn is learned", "trainable_parameters", "trainable_in_float32", "adapter_moved"} <= {
        check.name for check in artifact.checks
    }
    assert artifact.metrics["rows"] == 12
    assert not artifact.work_folder.exists()

    questions = [json.loads(line) for line in Path(config.data.path).read_text().splitlines()]
    adapter = load_policy(config.model, config.output_dir + "/adapter")
    assert held_out_loss(adapter, questions) < 0.7 * held_out_loss(load_policy(config.model, None), questions)


def test_the_same_run_again_does_nothing(config: SFTConfig) -> None:
    first = run(config)
    again = run(config)
    assert again.up_to_date
    assert again.outputs == first.outputs


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(config: SFTConfig, tmp_path: Path) -> None:
    def adapter_hash(name: str, seed: int) -> str:
        artifact = run(replace(config, seed=seed, output_dir=str(tmp_path / name)))
        return next(str(entry["sha256"]) for entry in artifact.outputs if entry["path"] == "adapter")

    assert adapter_hash("a", 1) == adapter_hash("b", 1)
    assert adapter_hash("c", 2) != adapter_hash("a", 1)


def test_rows_that_cannot_be_used_are_dropped_with_a_reason(config: SFTConfig, tmp_path: Path) -> None:
    write_questions(Path(config.data.path), input="word " * 300)
    with Path(config.data.path).open("a") as file:
        file.write(json.dumps({"id": "silent", "instruction": "Say nothing.", "input": "", "output": " "}) + "\n")
    artifact = run(config)
    assert artifact.dropped == {"longer than max_length (256 tokens)": 1, "empty answer": 1}
    assert artifact.metrics["rows"] == 11
    dropped = [json.loads(line) for line in (Path(config.output_dir) / "dropped.jsonl").read_text().splitlines()]
    assert {row["row"]["id"]: row["reason"] for row in dropped} == {
        "silent": "empty answer",
        "q0": "longer than max_length (256 tokens)",
    }
    (silent,) = (row for row in dropped if row["row"]["id"] == "silent")
    assert silent["detail"] == f"{config.data.path}:13"


def test_a_file_without_a_usable_row_is_refused(config: SFTConfig) -> None:
    with pytest.raises(UserError, match=r"questions.jsonl: no row can be used \(longer than max_length \(3 tokens\)\)"):
        run(replace(config, model=replace(config.model, max_length=3)))


# -- how it continues --------------------------------------------------------------------------------------------------


def test_a_staged_continuation_starts_where_the_adapter_stands(config: SFTConfig, tmp_path: Path) -> None:
    run(config)
    first = config.output_dir + "/adapter"
    whole = replace(TRAIN, batch_size=12, max_steps=2, logging_steps=1)
    second = replace(config, init_adapter=first, output_dir=str(tmp_path / "second"), train=whole)
    run(second)
    questions = [json.loads(line) for line in Path(config.data.path).read_text().splitlines()]
    expected = held_out_loss(load_policy(config.model, first), questions)
    rows = losses(second.output_dir)
    assert rows[0]["loss"] == pytest.approx(expected, abs=1e-4)
    assert rows[1]["loss"] < rows[0]["loss"]
    assert rows[0]["learning_rate"] == TRAIN.learning_rate  # a new optimizer and schedule


def interrupt(config: SFTConfig, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run until the end of a step."""

    def on_step_end(self: StepReport, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        if state.global_step == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StepReport, "on_step_end", on_step_end)
        run(config)


@pytest.mark.parametrize("resume", [pytest.param(True, marks=pytest.mark.slow), False])  # the same, said aloud
def test_an_interrupted_run_continues(
    config: SFTConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: bool
) -> None:
    """With the same command, and with resume=true; the result is that of a run in one piece."""
    whole = run(replace(config, output_dir=str(tmp_path / "whole")))
    interrupt(config, 5, monkeypatch)
    assert json.loads((tmp_path / "sft" / "manifest.json").read_text())["status"] == "failed"
    artifact = run(replace(config, resume=resume))
    assert [entry["sha256"] for entry in artifact.outputs] == [entry["sha256"] for entry in whole.outputs]
    assert artifact.metrics["continued_from_step"] == 4


def test_resume_refuses_to_begin(config: SFTConfig) -> None:
    with pytest.raises(UserError, match=r"resume=true: .* holds no checkpoint to resume from"):
        run(replace(config, resume=True))
    assert not Path(config.output_dir).exists()


def test_resume_and_force_contradict_each_other(config: SFTConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(config, 5, monkeypatch)
    with pytest.raises(UserError, match="resume=true continues and force=true begins anew"):
        run(replace(config, resume=True, force=True))


def test_resume_refuses_other_settings_and_deletes_nothing(config: SFTConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(config, 5, monkeypatch)
    with pytest.raises(UserError, match="belong to another configuration"):
        run(replace(config, resume=True, train=replace(TRAIN, learning_rate=1e-3)))
    assert run(replace(config, resume=True)).status == "complete"


def test_other_settings_begin_anew(config: SFTConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(config, 5, monkeypatch)
    assert run(replace(config, train=replace(TRAIN, learning_rate=1e-3))).metrics["continued_from_step"] == 0


# -- 4 bits ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow  # learns something twice; that a 4-bit base trains is seen in test_dpo.py and test_reward_stage.py
def test_a_4bit_base_trains_to_the_same_held_out_loss(tmp_path: Path) -> None:
    """The embedded model, so that there is something to learn: QLoRA reaches what LoRA reaches, within noise."""
    write_questions(tmp_path / "train.jsonl", count=96)
    held_out = [
        json.loads(line) for line in write_questions(tmp_path / "held_out.jsonl", 32, 9).read_text().splitlines()
    ]
    train = replace(TRAIN, learning_rate=2e-3, batch_size=8, max_steps=24)

    def reached(quantization: Quantization) -> tuple[float, float]:
        model = ModelConfig(name="tiny", path="embedded", quantization=quantization, max_length=512)
        output = str(tmp_path / quantization.name)
        data = RowsConfig(path=str(tmp_path / "train.jsonl"))
        run(SFTConfig(name="sft", output_dir=output, data=data, model=model, train=train))
        after = held_out_loss(load_policy(model, output + "/adapter"), held_out)
        return held_out_loss(load_policy(model, None), held_out), after

    lora_before, lora = reached(Quantization.none)
    _, qlora = reached(Quantization.nf4)
    assert lora < 0.9 * lora_before
    assert lora_before - qlora > 0.9 * (lora_before - lora)  # of what LoRA learned, QLoRA learned nearly all


# -- the command line --------------------------------------------------------------------------------------------------


def arguments(config: SFTConfig, *more: str) -> list[str]:
    return [
        "model=tiny",
        f"data.path={config.data.path}",
        f"output_dir={config.output_dir}",
        "train.max_steps=1",
        "train.warmup_share=0",
        *more,
    ]


def test_preview_shows_rows_and_writes_nothing(config: SFTConfig, capsys: pytest.CaptureFixture[str]) -> None:
    write_questions(Path(config.data.path), output=" ")
    assert run_command("sft", arguments(config, "preview=true")) == 0
    out = capsys.readouterr().out
    assert "<|im_end|>⟧" in out
    assert "row 10" in out
    assert "would drop 1 rows: empty answer" in out
    assert not Path(config.output_dir).exists()


@pytest.mark.parametrize("plus", ["", "+"])
def test_the_command_of_the_readme_runs(config: SFTConfig, plus: str) -> None:
    assert run_command("sft", [f"{plus}model=tiny", *arguments(config)[1:]]) == 0
    assert load_tokenizer(ModelConfig(name="tiny", path="embedded")).eos_token == "<|im_end|>"
    assert (Path(config.output_dir) / "adapter" / "adapter_model.safetensors").exists()


def test_a_missing_adapter_and_one_of_another_base_end_with_one_message(
    config: SFTConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command("sft", arguments(config, "init_adapter=runs/nowhere/sft/adapter")) == 2
    assert "init_adapter=runs/nowhere/sft/adapter: no such file or folder" in capsys.readouterr().err

    run(config)
    adapter = config.output_dir + "/adapter"
    assert run_command("sft", arguments(config, f"init_adapter={adapter}", f"output_dir={config.output_dir}_2")) == 2
    message = capsys.readouterr().err
    assert f"adapter {adapter} was trained on the base '{config.model.path}', not on 'embedded'" in message
    assert "Traceback" not in message
