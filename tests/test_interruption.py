"""Stopping in the middle: by a signal, by a loss that goes wrong, and what is continued from afterwards."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_training import TRAIN, adapter_weights, open_artifact, policy_for, train
from test_sft import losses, write_questions
from tiny_random import save_random_base

from alignkit.core.app import run_command
from alignkit.core.config import ModelConfig, RowsConfig
from alignkit.core.errors import UserError
from alignkit.models.loading import load_policy
from alignkit.sft import SFTConfig, run
from alignkit.training import interruption
from alignkit.training.callbacks import StepReport
from alignkit.training.checkpoints import checkpoint_folder, is_intact, newest_intact
from alignkit.training.interruption import StopAtStepEnd

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def model(tmp_path: Path) -> ModelConfig:
    return save_random_base(tmp_path / "base")


def configure(model: ModelConfig, folder: Path, **train: Any) -> SFTConfig:
    folder.mkdir(exist_ok=True)
    data = RowsConfig(path=str(write_questions(folder / "questions.jsonl")))
    return SFTConfig(
        name="sft", output_dir=str(folder / "sft"), data=data, model=model, train=replace(TRAIN, max_steps=6, **train)
    )


def signalled_at(step: int, monkeypatch: pytest.MonkeyPatch, *numbers: int) -> None:
    """Let this process get signals (SIGTERM if none are named) in the middle of a step."""
    original = StepReport.on_step_begin

    def on_step_begin(self: StepReport, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        original(self, args, state, control, **keywords)
        if state.global_step == step - 1:
            for number in numbers or (signal.SIGTERM,):
                os.kill(os.getpid(), number)

    monkeypatch.setattr(StepReport, "on_step_begin", on_step_begin)


# -- signals -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelConfig, Any, Any]:
    """A training in one piece: its model, the policy at its end, its log lines."""
    folder = tmp_path_factory.mktemp("whole")
    model = save_random_base(folder / "base")
    policy = policy_for(model, dropout=0.2)
    return model, policy, train(folder / "run", policy, TRAIN)


@pytest.mark.parametrize(("step", "number"), [(1, signal.SIGTERM), (3, signal.SIGTERM), (4, signal.SIGINT)])
def test_a_signal_stops_after_the_step_with_a_checkpoint(
    whole: tuple[ModelConfig, Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, number: int
) -> None:
    """The step is on neither the grid of checkpoints nor that of log lines, or on both."""
    model, policy, expected = whole
    resumed = policy_for(model, dropout=0.2)
    before = signal.getsignal(number)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        signalled_at(step, patch, number)
        train(tmp_path / "cut", policy_for(model, dropout=0.2), TRAIN)
    assert signal.getsignal(number) is before
    found = newest_intact(checkpoint_folder(open_artifact(tmp_path / "cut")))
    assert found is not None
    assert found.name == f"checkpoint-{step}"

    torch.manual_seed(77)
    rows = train(tmp_path / "cut", resumed, TRAIN)
    for name, weight in adapter_weights(policy).items():
        assert torch.equal(weight, adapter_weights(resumed)[name]), name
    assert [row["step"] for row in rows] == sorted({step, *(row["step"] for row in expected)})


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_the_same_signal_again_stops_at_once_and_another_does_not(
    model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, second: int
) -> None:
    """At Ctrl-C a stage of a pipeline gets both: one from the terminal, one from the pipeline."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        signalled_at(3, patch, signal.SIGTERM, second)
        train(tmp_path, policy_for(model), TRAIN)
    found = newest_intact(checkpoint_folder(open_artifact(tmp_path)))
    assert found is not None
    assert found.name == ("checkpoint-2" if second == signal.SIGTERM else "checkpoint-3")


@pytest.mark.parametrize(("processes", "expected"), [(1, RuntimeError), (2, KeyboardInterrupt)])
def test_a_process_that_is_stopped_since_another_failed_blames_nothing(
    processes: int, expected: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interruption, "world_size", lambda: processes)
    with pytest.raises(expected), StopAtStepEnd().listening():
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("Connection closed by peer")


def test_a_signal_in_the_last_step_has_nothing_to_stop(
    model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signalled_at(6, monkeypatch)
    assert run(configure(model, tmp_path)).status == "complete"


def test_only_the_main_thread_listens() -> None:
    from concurrent.futures import ThreadPoolExecutor

    def inside() -> bool:
        with StopAtStepEnd().listening():
            return signal.getsignal(signal.SIGTERM) == before

    before = signal.getsignal(signal.SIGTERM)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(inside).result()


def test_a_killed_command_continues_from_exactly_that_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A real process, as `timeout` or a cluster would stop it: exit code 130, and the same command goes on."""
    data = write_questions(tmp_path / "questions.jsonl", 12)
    command = [
        *(sys.executable, "-m", "alignkit.sft", "model=tiny", f"data.path={data}", f"output_dir={tmp_path / 'sft'}"),
        *("train.max_steps=30", "train.batch_size=4", "train.save_steps=1000", "train.logging_steps=1"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "PYTHONUNBUFFERED": "1"}
    started: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": environment}
    first: Any = subprocess.Popen(command, **started)
    next(line for line in first.stdout if line.startswith("check adapter_moved"))  # in the middle of training
    first.send_signal(signal.SIGTERM)
    said, _ = first.communicate(timeout=60)
    assert first.returncode == 130, said
    assert "interrupted: what is finished is saved, the same command continues" in said
    (checkpoint,) = (tmp_path / "sft" / "unfinished" / "checkpoints").glob("checkpoint-*")
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    assert 0 < step < 30
    assert f"sft: stopped after step {step}, its checkpoint is saved" in said

    assert run_command("sft", command[3:]) == 0  # the same command, without another import of torch
    assert f"sft: continues from step {step}" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "sft" / "manifest.json").read_text())
    assert manifest["metrics"]["continued_from_step"] == step
    assert [row["step"] for row in losses(str(tmp_path / "sft"))] == list(range(1, 31))


# -- a loss that goes wrong --------------------------------------------------------------------------------------------


def spoil_after(step: int, monkeypatch: pytest.MonkeyPatch, factor: float, part: str = "lora_B") -> None:
    """Multiply the weights after a step, as a step that went wrong would do."""
    original = StepReport.on_step_end

    def on_step_end(self: StepReport, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        original(self, args, state, control, **keywords)
        if state.global_step == step:
            for name, weight in keywords["model"].named_parameters():
                if part in name:
                    weight.data.mul_(factor)

    monkeypatch.setattr(StepReport, "on_step_end", on_step_end)


def test_a_loss_that_is_no_number_stops_with_the_last_good_checkpoint(
    model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_after(3, monkeypatch, float("nan"))
    with pytest.raises(UserError, match=r"'finite_loss' failed: loss is nan at step 4; .*good checkpoint is") as error:
        run(configure(model, tmp_path))
    checkpoint = tmp_path / "sft" / "unfinished" / "checkpoints" / "checkpoint-2"
    assert str(error.value).endswith(f"the last good checkpoint is {checkpoint})")
    adapter = load_policy(model, str(checkpoint))  # it can be used, and continued with init_adapter
    assert all(bool(torch.isfinite(weight).all()) for weight in adapter.parameters())


def test_weights_that_are_no_numbers_make_no_checkpoint(
    model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Spoiled by the very step whose own loss was still fine."""
    spoil_after(4, monkeypatch, float("inf"))
    with pytest.raises(UserError, match=r"'finite_weights' failed: .*lora_B.* is no longer finite at step 4"):
        run(configure(model, tmp_path))
    found = newest_intact(tmp_path / "sft" / "unfinished" / "checkpoints")
    assert found is not None
    assert found.name == "checkpoint-2"


def test_a_finished_training_with_weights_that_are_no_numbers_is_not_saved(
    model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_after(6, monkeypatch, float("nan"))
    with pytest.raises(UserError, match=r"'finite_weights' failed: .* at the end"):
        run(configure(model, tmp_path))
    assert not (tmp_path / "sft" / "adapter").exists()


def test_a_loss_far_above_the_first_stops_only_when_asked_to(
    model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a larger limit continues the same work: the limit does not decide what is learned."""
    with monkeypatch.context() as patch:
        spoil_after(3, patch, 100.0, part="model.norm")
        with pytest.raises(UserError, match=r"'no_divergence' failed: loss is .* at step 4, .* times the first"):
            run(configure(model, tmp_path, divergence=1.5))
        assert run(configure(model, tmp_path / "unlimited")).status == "complete"
    artifact = run(configure(model, tmp_path, divergence=50.0))
    assert artifact.metrics["continued_from_step"] == 2


# -- broken checkpoints ------------------------------------------------------------------------------------------------


def test_a_changed_checkpoint_is_skipped_and_named(
    model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "alignkit")
    config = configure(model, tmp_path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        signalled_at(5, patch)
        run(config)
    checkpoints = tmp_path / "sft" / "unfinished" / "checkpoints"
    assert sorted(path.name for path in checkpoints.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-5"]
    weights = checkpoints / "checkpoint-5" / "adapter_model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        signalled_at(5, patch)
        run(config)
    log = (tmp_path / "sft" / "log.txt").read_text()
    assert f"{checkpoints / 'checkpoint-5'} is skipped: it is incomplete, or its files are not those" in log
    assert "sft: continues from step 4" in log

    assert is_intact(checkpoints / "checkpoint-5")  # written anew in its place
    for checkpoint in checkpoints.glob("checkpoint-*"):
        (checkpoint / "optimizer.pt").write_bytes(b"")
    with pytest.raises(UserError, match=r"resume=true: every checkpoint in .* is incomplete, or its files"):
        run(replace(config, resume=True))
    assert run(config).metrics["continued_from_step"] == 0
