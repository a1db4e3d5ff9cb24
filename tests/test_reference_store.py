"""The reference's log-probabilities: computed once, the same as without a store, and never those of another model."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from small_preference import (
    PAIRS,
    TRAIN,
    encoded_pairs,
    log_prob,
    losses,
    small_config,
    trainer_for,
    write_adapter,
)
from trl.trainer import dpo_trainer

from alignkit.core.app import run_command
from alignkit.core.artifact import Artifact
from alignkit.core.config import Quantization
from alignkit.core.errors import UserError
from alignkit.dpo import DPOConfig, run
from alignkit.models.loading import load_policy
from alignkit.training import log_probs, preference, reference_store
from alignkit.training.callbacks import StepReport
from alignkit.training.fit import fit as original_fit
from alignkit.training.preference import answers_of, margins
from alignkit.training.reference_store import ReferenceStore, answer_key, reference_key, reference_log_probs


@pytest.fixture
def config(tmp_path: Path) -> DPOConfig:
    return replace(small_config(tmp_path), reference_store=str(tmp_path / "cache" / "reference.sqlite"))


def counts(artifact: Artifact) -> Any:
    return artifact.metrics["reference_log_probs"]


def key_of(config: DPOConfig, adapter: str | None = "default") -> str:
    return reference_key(load_policy(config.model, config.init_adapter), adapter, "no")


# -- the same as without -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "quantization"),
    [("sft_adapter", Quantization.nf4), ("base", Quantization.none), ("path", Quantization.none)],
)
def test_losses_are_those_of_a_reference_that_runs_along(
    config: DPOConfig, tmp_path: Path, kind: str, quantization: Quantization
) -> None:
    model = replace(config.model, quantization=quantization)
    policy = write_adapter(model, tmp_path / "policy", seed=1)
    named = write_adapter(model, tmp_path / "other", seed=2, rank=8) if kind == "path" else kind
    config = replace(
        config, model=model, init_adapter=policy, reference=named, train=replace(TRAIN, learning_rate=5e-4)
    )
    stored = run(config)
    live = run(without := replace(config, reference_store=None, output_dir=str(tmp_path / "live")))
    for ours, theirs in zip(losses(config), losses(without), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-6 if ours["step"] == 1 else 5e-6)
        for side in ("chosen", "rejected"):
            assert ours[f"{side}_reward"] == pytest.approx(theirs[f"{side}_reward"], abs=1e-5)
            assert ours[f"{side}_log_prob"] == pytest.approx(theirs[f"{side}_log_prob"], abs=1e-4)
    assert stored.metrics["preference_loss_after"] == pytest.approx(live.metrics["preference_loss_after"], abs=1e-6)
    assert "stored_reference" in {check.name for check in stored.checks if check.passed}
    assert "stored_reference" not in {check.name for check in live.checks}


def test_no_reference_is_run_or_held_while_training(config: DPOConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[str]] = []

    def no_reference(*args: Any) -> Any:
        raise AssertionError("a reference was run")

    def fit(trainer: Any, *args: Any, **keywords: Any) -> Any:
        seen.append(set(trainer.model.peft_config))
        with monkeypatch.context() as patch:
            patch.setattr(dpo_trainer, "use_adapter", no_reference)
            return original_fit(trainer, *args, **keywords)

    monkeypatch.setattr(preference, "fit", fit)
    run(config)
    assert seen == [{"default"}]


def test_bfloat16_differs_by_its_rounding_alone(config: DPOConfig, tmp_path: Path) -> None:
    model = replace(config.model, dtype="bfloat16")
    config = replace(config, model=model, init_adapter=write_adapter(model, tmp_path / "policy", seed=1))
    artifact = run(config)
    run(without := replace(config, reference_store=None, output_dir=str(tmp_path / "live")))
    for ours, theirs in zip(losses(config), losses(without), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=0.02)
    assert {check.name for check in artifact.checks if check.passed} >= {"reference", "stored_reference"}


def test_log_probs_are_those_of_the_definition(config: DPOConfig) -> None:
    with Artifact.open("dpo", config) as artifact:
        policy, trainer = trainer_for(config, artifact)
        found, _ = reference_log_probs(trainer, answers_of(encoded_pairs()), None)
    reference = load_policy(config.model, config.init_adapter)
    expected = [log_prob(reference, row[0], row[side]) for side in (1, 2) for row in PAIRS]
    assert found == pytest.approx(expected, abs=1e-4)
    assert policy.active_adapter == "default"
    assert all(weight.requires_grad for name, weight in policy.named_parameters() if ".default." in name)


def test_margins_by_hand() -> None:
    """Two pairs: chosen, chosen, rejected, rejected."""
    assert margins([-1.0, -5.0, -4.0, -2.0], [-2.0, -3.0, -3.0, -3.0], 0.5) == [1.0, -1.5]


# -- computed once -----------------------------------------------------------------------------------------------------


def test_the_next_run_computes_nothing(config: DPOConfig, tmp_path: Path) -> None:
    assert counts(run(config)) == {"stored": 0, "computed": 2 * len(PAIRS)}
    second = replace(config, beta=0.5, loss="ipo", seed=7, output_dir=str(tmp_path / "second"))
    assert counts(run(second)) == {"stored": 2 * len(PAIRS), "computed": 0}
    by_path = replace(config, reference=config.init_adapter, output_dir=str(tmp_path / "third"))
    assert counts(run(by_path)) == {"stored": 2 * len(PAIRS), "computed": 0}


def test_the_jobs_of_a_sweep_share_the_store_and_are_compared(
    config: DPOConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = [f"model.path={config.model.path}", "model.name=random", "model.dtype=float32", "model.max_length=256"]
    data = [f"data.path={config.data.path}", f"init_adapter={config.init_adapter}", "held_out_share=0.5"]
    assert run_command("dpo", ["-m", "run=swept", *model, *data, "train.max_steps=1", "beta=0.1,0.5"]) == 0
    home = tmp_path / "runs/swept/dpo-sweep"
    manifests = [json.loads((home / f"jobs/beta-{beta}/manifest.json").read_text()) for beta in ("0.1", "0.5")]
    assert [manifest["metrics"]["reference_log_probs"]["computed"] for manifest in manifests] == [8, 0]
    header = (home / "comparison.md").read_text().splitlines()[0]
    for column in ("reward_margin", "chosen_log_prob_change", "held_out.accuracy", "reference_log_probs.computed"):
        assert f" {column} " in header
    assert (home / "comparison.svg").exists()
    assert (tmp_path / "runs/swept/reference.sqlite").exists()


def test_only_what_is_new_is_computed_and_only_what_is_read(config: DPOConfig, tmp_path: Path) -> None:
    """Five answers more: one chosen again in another pair is known; equal ones are computed once."""
    run(config)
    rows = [json.loads(line) for line in Path(config.data.path).read_text().splitlines()]
    new = [{"role": "assistant", "content": "It is new."}]
    more = [*rows, {**rows[0], "id": "p9", "rejected": new}, {**rows[0], "id": "p10", "rejected": new}]
    (tmp_path / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in more))
    wider = replace(config, data=replace(config.data, path=str(tmp_path / "more.jsonl")))
    assert counts(run(replace(wider, output_dir=str(tmp_path / "wider")))) == {"stored": 8, "computed": 1}


def test_pairs_that_no_step_reads_are_not_computed(config: DPOConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preference, "WATCHED_PAIRS", 1)
    artifact = run(replace(config, train=replace(TRAIN, max_steps=1)))
    assert counts(artifact)["computed"] in (4, 6)  # the step's two pairs and the watched one, which may be one of them


def test_what_was_computed_before_a_kill_is_kept(
    config: DPOConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, reads = log_probs._read, []

    def read(trainer: Any, answers: Any) -> Any:
        reads.append(len(answers))
        if len(reads) == 3:
            raise KeyboardInterrupt
        return original(trainer, answers)

    config = replace(config, train=replace(TRAIN, batch_size=1))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(log_probs, "_read", read)
        run(config)
    assert counts(run(config)) == {"stored": sum(reads[:2]), "computed": 8 - sum(reads[:2])}


def test_an_interrupted_run_continues_to_the_same_bytes(
    config: DPOConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(replace(config, output_dir=str(tmp_path / "whole")))

    def on_step_end(self: StepReport, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StepReport, "on_step_end", on_step_end)
        run(config)
    artifact = run(replace(config, resume=True))
    assert artifact.metrics["continued_from_step"] == 2
    assert [entry["sha256"] for entry in artifact.outputs] == [entry["sha256"] for entry in whole.outputs]


def test_two_writers_share_a_file(tmp_path: Path) -> None:
    with ReferenceStore(tmp_path / "s.sqlite") as one, ReferenceStore(tmp_path / "s.sqlite") as two:
        one.put({b"a": -1.5, b"b": -2.0})
        two.put({b"b": -2.0000001, b"c": -3.25})  # what is there stays
        wanted: Mapping[bytes, float] = {b"a": -1.5, b"b": -2.0, b"c": -3.25}
        assert one.get([b"a", b"b", b"c", b"d"]) == two.get([b"a", b"b", b"c", b"d"]) == wanted


def test_what_another_run_has_stored_in_the_meantime_counts(config: DPOConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs that started together: both must go on from the same numbers, and find them again after a kill."""
    path, original = Path(str(config.reference_store)), log_probs.answer_log_probs

    def meanwhile(trainer: Any, answers: Any, *arguments: Any) -> list[float]:
        if not answers:
            return []
        found = original(trainer, answers, "the other run")
        with ReferenceStore(path) as store:
            store.put({answer_key(key, answers[0]): found[0] + 1e-6})
        return original(trainer, answers, *arguments)

    with Artifact.open("dpo", config) as artifact:
        policy, trainer = trainer_for(config, artifact)
        key = reference_key(policy, "ref", trainer.accelerator.mixed_precision)
        answers = answers_of(encoded_pairs())
        alone, _ = reference_log_probs(trainer, answers, None)
        monkeypatch.setattr(reference_store, "answer_log_probs", meanwhile)
        first, _ = reference_log_probs(trainer, answers, path)
        again, counted = reference_log_probs(trainer, answers, path)
    assert first == again == [alone[0] + 1e-6, *alone[1:]]
    assert counted == {"stored": len(answers), "computed": 0}


# -- never another model's ---------------------------------------------------------------------------------------------


def test_the_key_names_base_adapter_and_arithmetic(config: DPOConfig, tmp_path: Path) -> None:
    first = key_of(config)
    assert first == key_of(config)
    other = write_adapter(config.model, tmp_path / "other", seed=2)
    policy: Any = load_policy(config.model, config.init_adapter)
    keys = {
        first,
        key_of(config, adapter=None),
        key_of(replace(config, init_adapter=other)),
        key_of(replace(config, model=replace(config.model, dtype="bfloat16"))),
        key_of(replace(config, model=replace(config.model, attn="eager"))),
        key_of(replace(config, model=replace(config.model, quantization=Quantization.nf4))),
        reference_key(policy, "default", "bf16"),
    }
    layer = next(module for module in policy.modules() if isinstance(module, LoraLayer))
    layer.scaling["default"] *= 2
    keys.add(reference_key(policy, "default", "no"))
    layer.scaling["default"] /= 2
    positions = policy.get_base_model().config.rope_parameters
    positions["rope_theta"] *= 2
    keys.add(reference_key(policy, "default", "no"))
    positions["rope_theta"] /= 2
    assert reference_key(policy, "default", "no") == first
    with torch.no_grad():
        policy.get_base_model().get_input_embeddings().weight.add_(1e-3)
    keys.add(reference_key(policy, "default", "no"))
    assert len(keys) == 10


def test_the_base_is_the_same_reference_whatever_is_trained_on_it(config: DPOConfig, tmp_path: Path) -> None:
    other = write_adapter(config.model, tmp_path / "other", seed=2, rank=8)
    assert key_of(config, None) == key_of(replace(config, init_adapter=other), None)


def test_the_key_of_an_answer_says_where_it_begins() -> None:
    answer = encoded_pairs()[0].chosen
    shifted = answer._replace(prompt_ids=[*answer.prompt_ids, answer.answer_ids[0]], answer_ids=answer.answer_ids[1:])
    assert answer_key("m", answer) == answer_key("m", encoded_pairs()[0].chosen)
    assert len({answer_key("m", answer), answer_key("n", answer), answer_key("m", shifted)}) == 3


def test_a_stored_value_that_is_wrong_stops_the_stage(config: DPOConfig, tmp_path: Path) -> None:
    run(config)
    assert config.reference_store is not None
    with sqlite3.connect(config.reference_store) as database:
        database.execute("UPDATE log_probs SET value = value - 0.01 WHERE key = (SELECT min(key) FROM log_probs)")
    with pytest.raises(UserError, match="check 'stored_reference' failed: sft_adapter: loss"):
        run(replace(config, output_dir=str(tmp_path / "second")))


def test_a_file_that_is_no_store_ends_with_one_message(
    config: DPOConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("these are notes, and no database at all\n" * 40)
    with pytest.raises(UserError, match=r"reference_store=.*notes.txt: file is not a database. Free space"):
        run(replace(config, reference_store=str(tmp_path / "notes.txt")))


def test_the_store_is_in_the_run_folder_unless_it_is_said_otherwise(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("dpo", ["--cfg", "job", "--resolve", "run=mine"]) == 0
    assert "reference_store: runs/mine/reference.sqlite" in capsys.readouterr().out
