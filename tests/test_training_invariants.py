"""Training: equal results however batches are cut or runs interrupted, and guards against training nothing."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_training import (
    QUESTIONS,
    TRAIN,
    adapter_weights,
    encoded,
    interrupt_at,
    mean_loss,
    open_artifact,
    policy_for,
    train,
)
from tiny_random import save_random_base, tokenizer
from transformers import TrainerControl

from alignkit.core.config import LoraInit, ModelConfig, TrainConfig
from alignkit.core.errors import UserError
from alignkit.data.chat import IGNORED, EncodedExample
from alignkit.training import callbacks
from alignkit.training.arguments import optimizer_steps, trainer_arguments
from alignkit.training.batches import LengthGroupedSampler
from alignkit.training.callbacks import AdapterMoved, StepReport
from alignkit.training.checkpoints import checkpoint_folder, is_intact, newest_intact, remove_newer, seal
from alignkit.training.fit import trainable_in_float32
from alignkit.training.supervised import train_supervised


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return save_random_base(tmp_path_factory.mktemp("base"))


# -- batches -----------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_mean_over_all_learned_tokens_of_the_step(model: ModelConfig, tmp_path: Path) -> None:
    policy = policy_for(model)
    expected = mean_loss(policy, encoded())
    losses = train(tmp_path, policy, replace(TRAIN, batch_size=16, max_steps=1))
    assert losses[0]["loss"] == pytest.approx(expected, abs=1e-5)


def test_one_by_eight_is_eight_by_one(model: ModelConfig, tmp_path: Path) -> None:
    """Rows of different length: a mean of means would weigh the tokens of short answers more."""
    whole, parts = policy_for(model), policy_for(model)
    rows = encoded()[:8]
    whole_losses = train(tmp_path / "whole", whole, replace(TRAIN, batch_size=8, max_steps=3, logging_steps=1), rows)
    parts_losses = train(
        tmp_path / "parts",
        parts,
        replace(TRAIN, batch_size=1, gradient_accumulation=8, max_steps=3, logging_steps=1),
        rows,
    )
    for key in ("loss", "gradient_norm"):
        assert [row[key] for row in parts_losses] == pytest.approx([row[key] for row in whole_losses], rel=1e-4)
    for name, weight in adapter_weights(whole).items():
        assert torch.allclose(weight, adapter_weights(parts)[name], atol=1e-4), name


def test_gradient_checkpointing_changes_nothing_but_memory(model: ModelConfig, tmp_path: Path) -> None:
    plain, checkpointed = policy_for(model), policy_for(model)
    expected = train(tmp_path / "plain", plain, TRAIN)
    found = train(tmp_path / "checkpointed", checkpointed, replace(TRAIN, gradient_checkpointing=True))
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in expected], abs=1e-5)


@pytest.mark.parametrize("learn_prompt", [False, True])
def test_exactly_the_labelled_tokens_are_learned(model: ModelConfig, tmp_path: Path, learn_prompt: bool) -> None:
    policy = policy_for(model)
    row = encoded()[0]
    if learn_prompt:
        row = EncodedExample(row.input_ids, [IGNORED, *row.input_ids[1:]])
    expected = mean_loss(policy, [row])
    losses = train(tmp_path, policy, replace(TRAIN, max_steps=1), [row])
    assert losses[0]["loss"] == pytest.approx(expected, abs=1e-5)


def test_rows_are_grouped_by_length_and_each_is_seen_once() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(5, 200, (403,), generator=generator).tolist()
    order = list(LengthGroupedSampler(lengths, rows_per_step=8, seed=1))
    assert sorted(order) == list(range(403))

    def padding(order: list[int]) -> int:
        steps = [[lengths[row] for row in order[start : start + 8]] for start in range(0, len(order), 8)]
        return sum(max(step) * len(step) - sum(step) for step in steps)

    assert padding(order) < 0.2 * padding(list(range(403)))
    assert len(order[-3:]) == 403 % 8  # the smaller step comes last


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    lengths = list(range(100))

    def order(seed: int, epoch: int) -> list[int]:
        sampler = LengthGroupedSampler(lengths, rows_per_step=4, seed=seed)
        sampler.set_epoch(epoch)
        torch.manual_seed(int(torch.randint(1000, (1,))))  # the state of the global generator must not matter
        return list(sampler)

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        (TrainConfig(batch_size=4, epochs=2.0), 6),  # 3 batches an epoch
        (TrainConfig(batch_size=4, epochs=1.5), 5),
        (TrainConfig(batch_size=2, gradient_accumulation=2, epochs=2.0), 6),  # 5 batches: steps of 2, 2, 1
        (TrainConfig(batch_size=4, max_steps=7), 7),
    ],
)
def test_steps_are_counted_as_the_trainer_counts_them(
    model: ModelConfig, tmp_path: Path, settings: TrainConfig, steps: int
) -> None:
    assert optimizer_steps(len(QUESTIONS), settings) == steps
    assert train(tmp_path, policy_for(model), settings)[-1]["step"] == steps


def test_values_that_the_trainer_refuses_are_the_users_to_mend(tmp_path: Path) -> None:
    from transformers import TrainingArguments

    with pytest.raises(UserError, match=r"train: .*adam_torch"):
        trainer_arguments(
            TrainingArguments,
            replace(TRAIN, optimizer="adam_torch"),
            tmp_path,
            rows=8,
            seed=1,
            dtype=torch.float32,
        )


# -- resuming ----------------------------------------------------------------------------------------------------------


CUTS: dict[str, tuple[int, TrainConfig, dict[str, Any]]] = {
    "in a log line": (3, TRAIN, {}),
    "at a checkpoint": (4, TRAIN, {}),
    "after a checkpoint": (5, TRAIN, {}),
    "packed": (5, replace(TRAIN, packing=True, batch_size=1), {}),
    "padding-free": (5, replace(TRAIN, padding_free=True), {}),
    "with noise": (5, replace(TRAIN, neftune_alpha=5.0), {}),
    "dora": (5, TRAIN, {"dora": True}),
    "pissa": (5, TRAIN, {"init": LoraInit.pissa}),
}
"""What is trained when it is interrupted at which step."""


@pytest.mark.parametrize(
    "case",  # by default the plainest, and the two that prepare their rows or weights anew
    [
        case if case in ("at a checkpoint", "packed", "pissa") else pytest.param(case, marks=pytest.mark.slow)
        for case in CUTS
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """Three steps an epoch and a checkpoint every two: it is resumed within an epoch, with dropout on."""
    step, settings, lora = CUTS[case]
    whole = policy_for(model, dropout=0.2, **lora)
    expected = train(tmp_path / "whole", whole, settings)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(step, patch)
        train(tmp_path / "cut", policy_for(model, dropout=0.2, **lora), settings)
    saved = newest_intact(checkpoint_folder(open_artifact(tmp_path / "cut")))
    assert saved is not None
    assert saved.name == ("checkpoint-4" if step == 5 else "checkpoint-2")

    torch.manual_seed(77)  # another process has another random state
    resumed = policy_for(model, dropout=0.2, **lora)
    assert train(tmp_path / "cut", resumed, settings) == expected
    for name, weight in adapter_weights(whole).items():
        assert torch.equal(weight, adapter_weights(resumed)[name]), name


def test_noise_changes_training_and_nothing_else(model: ModelConfig, tmp_path: Path) -> None:
    """NEFTune: another loss of the same weights while training, none in evaluation, and no trace afterwards."""
    policy, settings = policy_for(model), replace(TRAIN, batch_size=16, max_steps=1, neftune_alpha=50.0)
    quiet = mean_loss(policy, encoded())
    noisy = train(tmp_path / "run", policy, settings, held_out=encoded())[0]
    assert abs(noisy["loss"] - quiet) > 1e-3
    assert noisy["held_out_loss"] == pytest.approx(mean_loss(policy, encoded()), abs=1e-5)
    after = mean_loss(policy.train(), encoded())  # dropout is 0, so that only noise could make a difference
    assert after == mean_loss(policy.eval(), encoded())


@pytest.mark.parametrize(
    "file",  # whichever file it is, the checkpoint's hashes find it
    [
        "optimizer.pt",
        pytest.param("adapter_model.safetensors", marks=pytest.mark.slow),
        pytest.param("trainer_state.json", marks=pytest.mark.slow),
        pytest.param("rng_state.pth", marks=pytest.mark.slow),
    ],
)
def test_a_torn_checkpoint_is_skipped_for_the_one_before(
    model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    expected = train(tmp_path / "whole", policy_for(model), TRAIN)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(5, patch)
        train(tmp_path / "cut", policy_for(model), TRAIN)
    checkpoints = checkpoint_folder(open_artifact(tmp_path / "cut"))
    torn = checkpoints / "checkpoint-4" / file
    torn.write_bytes(torn.read_bytes()[: torn.stat().st_size // 2])
    assert newest_intact(checkpoints) == checkpoints / "checkpoint-2"
    assert train(tmp_path / "cut", policy_for(model), TRAIN) == expected


def test_a_kill_while_a_checkpoint_is_written_leaves_no_intact_one(
    model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(checkpoint: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(callbacks, "seal", killed)
        train(tmp_path, policy_for(model), TRAIN)
    checkpoints = checkpoint_folder(open_artifact(tmp_path))
    assert (checkpoints / "checkpoint-2" / "trainer_state.json").exists()
    assert newest_intact(checkpoints) is None
    assert train(tmp_path, policy_for(model), TRAIN)[-1]["step"] == 6


def test_a_checkpoint_counts_only_while_its_files_are_those_that_were_sealed(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-10"
    (checkpoint / "ref").mkdir(parents=True)
    (checkpoint / "ref" / "weights").write_text("abc")
    assert not is_intact(checkpoint)
    seal(checkpoint)
    assert is_intact(checkpoint)
    (tmp_path / "checkpoint-9").mkdir()
    assert newest_intact(tmp_path) == checkpoint
    (checkpoint / "ref" / "weights").write_text("abd")
    assert newest_intact(tmp_path) is None
    (checkpoint / "seal.json").write_text('{"ref/wei')
    assert not is_intact(checkpoint)


def test_torn_checkpoints_that_are_passed_over_make_room_for_those_to_come(tmp_path: Path) -> None:
    """The trainer keeps the newest: a torn checkpoint-30 would outlive the checkpoint-15 that is written next."""
    for step in (5, 10, 20, 30):
        (tmp_path / f"checkpoint-{step}").mkdir()
    remove_newer(tmp_path, tmp_path / "checkpoint-10")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-5"]
    remove_newer(tmp_path, None)
    assert not list(tmp_path.iterdir())


# -- guards ------------------------------------------------------------------------------------------------------------


def test_matrices_that_do_not_move_stop_the_run(model: ModelConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'adapter_moved' failed: 28 of 28 matrices have not moved by step 6"):
        train(tmp_path, policy_for(model), replace(TRAIN, learning_rate=0.0))


def test_a_good_run_says_when_all_had_moved(model: ModelConfig, tmp_path: Path) -> None:
    with open_artifact(tmp_path) as artifact:
        train_supervised(policy_for(model), tokenizer(), encoded(), TRAIN, seed=3, artifact=artifact)
    found = {check.name: check for check in artifact.checks}
    assert found["adapter_moved"].detail == "all 28 matrices had moved by step 2"  # B at the first, A at the second
    assert found["trainable_parameters"].detail.endswith("in 28 matrices")
    manifest = json.loads((artifact.folder / "manifest.json").read_text())
    assert manifest["metrics"]["steps"] == 6


def test_a_run_of_one_step_is_excused_for_a_but_not_for_b(model: ModelConfig, tmp_path: Path) -> None:
    with open_artifact(tmp_path) as artifact:
        settings = replace(TRAIN, max_steps=1)
        train_supervised(policy_for(model), tokenizer(), encoded(), settings, seed=3, artifact=artifact)
    moved = next(check for check in artifact.checks if check.name == "adapter_moved")
    assert moved.detail == "14 of 28 matrices have not moved by step 1: A follows B one step later"


def test_one_frozen_matrix_among_many_is_found() -> None:
    policy = torch.nn.ParameterDict({"lora_A": torch.zeros(2), "lora_B": torch.zeros(2)})
    checks: list[tuple[str, bool, str]] = []
    watch = AdapterMoved(policy, lambda *check: checks.append(check))
    arguments = SimpleNamespace(get_warmup_steps=lambda steps: 0)
    for step in range(1, callbacks.PATIENCE + 1):
        with torch.no_grad():
            policy["lora_B"] += 1
        watch.on_step_end(arguments, SimpleNamespace(global_step=step, max_steps=100), TrainerControl())  # type: ignore[arg-type]
    assert checks == [("adapter_moved", False, "1 of 2 matrices have not moved by step 10, e.g. lora_A")]


def test_a_loss_that_is_no_number_stops_the_run() -> None:
    checks: list[tuple[str, bool, str]] = []
    report = StepReport("sft", lambda *check: checks.append(check), divergence=3.0)
    state: Any = SimpleNamespace(global_step=7, log_history=[{"loss": 1.0}])
    arguments: Any = SimpleNamespace(output_dir="nowhere")
    for logs in ({"loss": 2.9}, {"train_runtime": 1.0}):
        report.on_log(arguments, state, TrainerControl(), logs=logs)
    assert checks == []
    report.on_log(arguments, state, TrainerControl(), logs={"loss": math.nan})
    report.on_log(arguments, state, TrainerControl(), logs={"loss": 3.1})
    end = "; lower train.learning_rate (no checkpoint was written before)"
    assert checks == [
        ("finite_loss", False, "loss is nan at step 7" + end),
        ("no_divergence", False, "loss is 3.1000 at step 7, 3.1 times the first" + end),
    ]


def test_trainable_weights_come_out_of_the_trainer_in_float32(model: ModelConfig, tmp_path: Path) -> None:
    """What TRL does over a 4-bit base, without one: cast to bfloat16. The values must not be rounded on the way."""
    policy = policy_for(model)
    before = adapter_weights(policy)
    with open_artifact(tmp_path) as artifact, trainable_in_float32(policy, artifact):
        for weight in policy.parameters():
            if weight.requires_grad:
                weight.data = weight.data.to(torch.bfloat16)
    assert all(torch.equal(weight, before[name]) for name, weight in adapter_weights(policy).items())
    assert {check.name: check.detail for check in artifact.checks}["trainable_in_float32"] == "torch.float32"
