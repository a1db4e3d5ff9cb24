"""Where a training's figures go: TensorBoard by default, a tracker on request, and the display."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from small_training import TRAIN, encoded, interrupt_at, open_artifact, policy_for, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_random import save_random_base, tokenizer
from transformers.integrations import integration_utils

from alignkit.core.artifact import Artifact
from alignkit.core.config import ModelConfig, RowsConfig, Tracker, TrainConfig
from alignkit.core.errors import UserError
from alignkit.sft import SFTConfig
from alignkit.training.display import Display
from alignkit.training.supervised import train_supervised
from alignkit.training.tracking import require_tracker, tracking_callbacks


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return save_random_base(tmp_path_factory.mktemp("base"))


def scalars(run: Path, name: str) -> dict[int, float]:
    events = EventAccumulator(str(run / "sft" / "tensorboard"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(name)}


def test_tensorboard_gets_every_log_line(model: ModelConfig, tmp_path: Path) -> None:
    losses = train(tmp_path, policy_for(model), TRAIN, held_out=encoded()[:2])
    assert scalars(tmp_path, "train/loss") == pytest.approx({int(row["step"]): row["loss"] for row in losses}, rel=1e-6)
    assert scalars(tmp_path, "train/held_out_loss") == {6: pytest.approx(losses[-1]["held_out_loss"], rel=1e-6)}


def test_event_files_are_no_output(model: ModelConfig, tmp_path: Path) -> None:
    with open_artifact(tmp_path) as artifact:
        train_supervised(policy_for(model), tokenizer(), encoded(), TRAIN, 3, artifact)
    assert (artifact.folder / "tensorboard").is_dir()
    assert artifact.outputs == []


def test_a_continued_run_goes_on_with_its_events_and_a_new_one_forgets_them(
    model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(5, patch)
        train(tmp_path, policy_for(model), TRAIN)
    losses = train(tmp_path, policy_for(model), TRAIN)
    assert list(scalars(tmp_path, "train/loss")) == [1, 2, 4, 6]
    assert len(list((tmp_path / "sft" / "tensorboard").iterdir())) == 2
    assert train(tmp_path, policy_for(model), TRAIN) == losses
    assert len(list((tmp_path / "sft" / "tensorboard").iterdir())) == 1


def test_none_writes_nothing(model: ModelConfig, tmp_path: Path) -> None:
    train(tmp_path, policy_for(model), replace(TRAIN, tracker=Tracker.none))
    assert not (tmp_path / "sft" / "tensorboard").exists()


@pytest.mark.parametrize("tracker", [Tracker.wandb, Tracker.trackio, Tracker.mlflow])
def test_a_missing_tracker_says_how_to_install_it(tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alignkit.training.tracking.find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"train.tracker={tracker.name}: pip install {tracker.name} "):
        require_tracker(tracker)
    require_tracker(Tracker.none)


def test_another_tracker_is_the_one_of_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Callback:
        """Stands for MLflow's."""

    monkeypatch.setattr("alignkit.training.tracking.find_spec", lambda name: name)
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "mlflow", Callback)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    (callback,) = tracking_callbacks(Tracker.mlflow, open_artifact(tmp_path), 0)
    assert isinstance(callback, Callback)


def test_the_tracker_does_not_decide_what_is_learned(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    opened = [
        Artifact.open(
            "sft",
            SFTConfig(
                name="sft",
                output_dir=str(tmp_path / "sft"),
                data=RowsConfig(path=str(tmp_path / "rows.jsonl")),
                model=ModelConfig(name="tiny", path="embedded"),
                train=TrainConfig(tracker=tracker),
            ),
        )
        for tracker in (Tracker.tensorboard, Tracker.none)
    ]
    assert opened[0].fingerprint == opened[1].fingerprint


# -- speed and display -------------------------------------------------------------------------------------------------


def test_tokens_a_second_are_those_of_the_steps(model: ModelConfig, tmp_path: Path) -> None:
    with open_artifact(tmp_path) as artifact:
        train_supervised(policy_for(model), tokenizer(), encoded(), TRAIN, 3, artifact)
    tokens = TRAIN.epochs * sum(len(row.input_ids) for row in encoded())
    speed = artifact.metrics["tokens_per_second"]
    assert speed >= tokens / artifact.metrics["training_seconds"] * 0.9
    assert speed < tokens / 1e-3


def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, lines = SimpleNamespace(now=0.0), list[str]()
    monkeypatch.setattr("alignkit.training.display.time.monotonic", lambda: clock.now)
    monkeypatch.setattr("alignkit.training.display.LOG.info", lambda text, *values: lines.append(text % values))
    shown = Display("sft", 0, 10)
    shown.note_loss(1.25)
    for step in range(1, 11):
        clock.now += 25.0
        shown.advance(step, 1234.5)
    shown.close()
    assert lines[0] == "sft: 10 steps to do"
    assert [line.split(",")[0] for line in lines[1:]] == ["sft: step 3 of 10", "sft: step 6 of 10", "sft: step 9 of 10"]
    assert "loss 1.2500, 1,234 tokens/s, peak" in lines[1]
    assert lines[1].endswith("2 min 55 s left")


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    shown: Any = Display("sft", 2, 10)
    shown.note_loss(1.25)
    shown.advance(3, 1234.5)
    (task,) = shown._bar.tasks
    assert (task.completed, task.total) == (3, 10)
    assert task.fields["figures"].startswith("loss 1.2500, 1,234 tokens/s, peak")
    shown.close()
    assert shown._bar.finished or not shown._bar.live.is_started
