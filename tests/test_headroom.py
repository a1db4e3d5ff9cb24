"""Jobs: will they fit, what makes them fit, what is known to fail, and how fast they may be."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml

from alignkit.core.app import load_config
from alignkit.core.artifact import Artifact
from alignkit.core.config import (
    HardwareConfig,
    LoraConfig,
    LoraInit,
    ModelConfig,
    Quantization,
    SamplingConfig,
    Strategy,
    TrainConfig,
)
from alignkit.core.errors import UserError
from alignkit.core.stages import conf_dir
from alignkit.models import machine, refusals
from alignkit.models.headroom import require_memory, verdict
from alignkit.models.jobs import DPO, REWARD, SAMPLING, SFT, Job
from alignkit.models.machine import GIB, Machine, find_machine
from alignkit.models.refusals import RULES, known_problems, refuse_known_problems
from alignkit.models.remedies import find_remedies, largest_length
from alignkit.models.speed import PEAK_SHARE, sampling_speed, speed, training_flops, training_speed

CARD = Machine("rtx4090_24gb", round(23.6 * GIB), True, 165, 1008)


def option(name: str) -> ModelConfig:
    values = yaml.safe_load((conf_dir() / f"model/{name}.yaml").read_text(encoding="utf-8"))
    return ModelConfig(**{**values, "quantization": Quantization[values["quantization"]]})


QWEN = Job(SFT, option("qwen7b"), 2048, LoraConfig(rank=64, dropout=0.0))
LIGHT = TrainConfig(batch_size=1, gradient_accumulation=16, gradient_checkpointing=True, optimizer="paged_adamw_8bit")
WHOLE = 1 << 20
"""As max_batch_tokens: batches go through the model whole."""


def apply(job: Job, overrides: list[str]) -> Job:
    """A job with overrides, by another road than the one that proposes them."""
    for override in overrides:
        key, _, text = override.partition("=")
        owner, _, name = key.partition(".")
        section = getattr(job, owner)
        value: Any = Quantization[text] if name == "quantization" else yaml.safe_load(text)
        job = replace(job, **{owner: replace(section, **{name: value})})
        if name == "max_length":
            job = replace(job, longest=min(job.longest, value))
    return job


# -- what makes it fit -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "job",
    [
        replace(QWEN, train=TrainConfig(batch_size=16, max_batch_tokens=WHOLE)),
        replace(
            QWEN,
            model=replace(QWEN.model, quantization=Quantization.none),
            train=TrainConfig(batch_size=4, max_batch_tokens=WHOLE),
        ),
        replace(QWEN, stage=DPO, sequences_per_row=2, longest=8192, train=TrainConfig(batch_size=8)),
        replace(QWEN, stage=REWARD, sequences_per_row=4, longest=2048, train=TrainConfig(batch_size=8)),
        replace(QWEN, stage=SAMPLING, sampling=SamplingConfig(n=8, batch_size=64)),
        replace(QWEN, longest=40_000, train=LIGHT),
    ],
    ids=["batch", "bfloat16", "dpo", "reward", "sampling", "length"],
)
def test_what_is_proposed_fits(job: Job) -> None:
    assert CARD.spare(job.memory()) < 0
    proposed = find_remedies(job, CARD)
    assert proposed
    changed = apply(job, proposed)
    assert CARD.spare(changed.memory()) >= 0
    if job.stage != SAMPLING:
        rows = changed.train.batch_size * changed.train.gradient_accumulation
        assert rows == job.train.batch_size * job.train.gradient_accumulation


def test_time_is_given_before_rows() -> None:
    assert find_remedies(replace(QWEN, train=TrainConfig(batch_size=16, max_batch_tokens=WHOLE)), CARD) == [
        "train.gradient_checkpointing=true",
        "train.max_batch_tokens=16384",
    ]
    long = find_remedies(replace(QWEN, longest=40_000, train=replace(LIGHT)), CARD)
    assert [each.split("=")[0] for each in long] == ["model.max_length"]


def test_parts_of_a_batch_are_what_counts() -> None:
    job = replace(QWEN, train=TrainConfig(batch_size=16, max_batch_tokens=5000))
    assert job.sequences == 2
    assert replace(job, longest=6000).sequences == 1
    assert replace(job, stage=DPO, sequences_per_row=2).sequences == 32
    assert replace(job, train=replace(job.train, padding_free=True)).sequences == 16


def test_what_a_later_change_makes_needless_is_taken_back() -> None:
    """In 16 bits not even one row fits beside 13 GiB of weights; in 4 bits four do, with the optimizer as it was."""
    sixteen = replace(
        QWEN,
        model=replace(QWEN.model, quantization=Quantization.none),
        train=TrainConfig(batch_size=4, max_batch_tokens=WHOLE),
    )
    assert find_remedies(sixteen, replace(CARD, memory_bytes=14 * GIB)) == [
        "train.gradient_checkpointing=true",
        "model.quantization=nf4",
    ]


def test_a_stage_is_told_of_its_own_settings() -> None:
    many = SamplingConfig(n=1, batch_size=512)
    sampling = replace(QWEN, stage=SAMPLING, sampling=many)
    found = {
        key: find_remedies(replace(sampling, at_once_key=key), CARD) for key in ("sampling.batch_size", "max_answers")
    }
    assert found["max_answers"] == [
        each.replace("sampling.batch_size", "max_answers") for each in found["sampling.batch_size"]
    ]
    assert found["max_answers"][0].startswith("max_answers=")
    assert not any("batch" in each for each in find_remedies(replace(sampling, at_once_key=None), CARD))
    assert verdict(replace(sampling, command="serve"), CARD, sampling.memory()).startswith("serve: ")


def test_what_fits_needs_nothing_and_what_cannot_fit_gets_nothing() -> None:
    assert find_remedies(replace(QWEN, train=LIGHT), CARD) == []
    assert find_remedies(QWEN, replace(CARD, memory_bytes=4 * GIB)) == []


def test_the_largest_length_fits_and_the_next_does_not() -> None:
    job = replace(QWEN, train=replace(LIGHT, batch_size=8, max_batch_tokens=WHOLE))
    longest = largest_length(job, CARD)
    assert longest is not None
    assert longest % 64 == 0
    assert CARD.spare(replace(job, longest=longest).memory()) >= 0
    assert CARD.spare(replace(job, longest=longest + 64).memory()) < 0
    assert largest_length(replace(job, train=LIGHT), CARD) == 8192  # the model's context


# -- before loading ----------------------------------------------------------------------------------------------------


def artifact(folder: Path) -> Artifact:
    return Artifact("sft", folder, {"force": False}, [], "", "")


def test_the_predicted_peak_is_recorded(tmp_path: Path) -> None:
    found = artifact(tmp_path)
    job = replace(QWEN, train=LIGHT)
    require_memory(job, HardwareConfig(name="card", memory_gib=23.6), found)
    assert found.metrics == {"predicted_memory_bytes": job.memory().peak}


def test_a_job_that_does_not_fit_is_stopped_with_what_to_do(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    hardware = HardwareConfig(name="card", memory_gib=12)
    job = replace(QWEN, train=replace(LIGHT, batch_size=8, max_batch_tokens=WHOLE))
    with pytest.raises(
        UserError, match=r"8 sequences of 2048 tokens needs .*card has 12\.0.*train\.max_batch_tokens=4096"
    ):
        require_memory(job, hardware, artifact(tmp_path))
    monkeypatch.setattr(logging.getLogger("alignkit"), "propagate", True)
    require_memory(job, replace(hardware, enforce=False), artifact(tmp_path))
    assert "needs about" in caplog.text


def test_a_model_of_unknown_shape_is_not_estimated(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"d_model": 8}), encoding="utf-8")
    found = artifact(tmp_path)
    require_memory(replace(QWEN, model=replace(QWEN.model, path=str(tmp_path))), HardwareConfig(), found)
    assert found.metrics == {}


def test_free_memory_counts_where_nothing_else_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "free_gpu_memory", lambda: ("a card", 7 * GIB))
    assert find_machine(HardwareConfig()) == Machine("a card", 7 * GIB, is_gpu=True)
    assert find_machine(HardwareConfig(name="other", memory_gib=2)).memory_bytes == 2 * GIB
    monkeypatch.setattr(machine, "free_gpu_memory", lambda: None)
    without = find_machine(HardwareConfig(name="cpu"))
    assert not without.is_gpu
    assert without.memory_bytes > GIB


def test_a_continued_adapter_has_its_own_rank(tmp_path: Path) -> None:
    config = {"r": 8, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    continued = replace(QWEN, adapter=str(tmp_path))
    assert (continued.adapters.rank, continued.adapters.targets) == (8, ("q_proj",))
    assert QWEN.adapters.rank == 64
    everything = {"r": 4, "target_modules": "all-linear"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(everything), encoding="utf-8")
    assert continued.adapters.targets == ("all-linear",)


def test_the_check_takes_no_time(tmp_path: Path) -> None:
    import time

    began = time.process_time()
    for _ in range(10):
        require_memory(replace(QWEN, train=LIGHT), HardwareConfig(memory_gib=24), artifact(tmp_path))
    assert (time.process_time() - began) / 10 < 0.05


# -- known to fail -----------------------------------------------------------------------------------------------------

FOUR_BITS, BFLOAT16 = QWEN.model, replace(QWEN.model, quantization=Quantization.none)
CASES: dict[str, tuple[Job, Job]] = {
    "lora.init=pissa over a 4-bit base or with DoRA": (
        replace(QWEN, lora=LoraConfig(init=LoraInit.pissa)),
        replace(QWEN, lora=LoraConfig(init=LoraInit.pissa), model=BFLOAT16),
    ),
    "train.packing or train.padding_free outside sft": (
        replace(QWEN, stage=DPO, train=TrainConfig(padding_free=True)),
        replace(QWEN, train=TrainConfig(packing=True)),
    ),
    "a reward model with an attention that takes no mask": (
        replace(QWEN, stage=REWARD, model=replace(FOUR_BITS, attn="flash_attention_2")),
        replace(QWEN, model=replace(FOUR_BITS, attn="flash_attention_2")),
    ),
    "model.max_length beyond the model's context": (
        replace(QWEN, model=replace(FOUR_BITS, max_length=8193)),
        replace(QWEN, model=replace(FOUR_BITS, max_length=8192)),
    ),
    "an adapter on lm_head": (
        replace(QWEN, model=replace(FOUR_BITS, lora_targets=["q_proj", "lm_head"])),
        replace(QWEN, model=replace(FOUR_BITS, lora_targets=["all-linear"])),
    ),
    "model.quantization=nf4 without bitsandbytes": (QWEN, replace(QWEN, model=BFLOAT16)),
}


def test_every_rule_has_a_case() -> None:
    assert set(CASES) == {rule.name for rule in RULES if not rule.warns}


@pytest.mark.parametrize("name", CASES)
def test_a_combination_that_is_known_to_fail_is_refused_by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    job, allowed = CASES[name]
    if "without bitsandbytes" in name:
        monkeypatch.setattr(refusals, "find_spec", lambda package: None)
    with pytest.raises(UserError, match=name):
        refuse_known_problems(job)
    assert known_problems(allowed) == []
    assert known_problems(job) == [next(rule for rule in RULES if rule.name == name)]


def test_processes_share_a_batch_and_take_it_whole() -> None:
    train = replace(LIGHT, batch_size=8, gradient_accumulation=2, max_batch_tokens=4096)
    alone, two, eight = (replace(QWEN, train=train, processes=processes) for processes in (1, 2, 8))
    assert (alone.sequences, two.sequences, eight.sequences) == (2, 8, 2)  # 2 x 2048 tokens in a part; 8 of 8 rows; 2
    assert (
        eight.memory().peak
        == replace(eight, processes=1, train=replace(train, batch_size=2, gradient_accumulation=1)).memory().peak
    )
    assert "train.max_batch_tokens" not in " ".join(find_remedies(two, CARD))
    with pytest.raises(UserError, match="which 3 processes cannot share equally"):
        _ = replace(alone, processes=3).sequences


def test_divided_weights_are_not_estimated(tmp_path: Path) -> None:
    found = artifact(tmp_path)
    for strategy in (Strategy.zero3, Strategy.fsdp):
        require_memory(replace(QWEN, processes=2, strategy=strategy), HardwareConfig(memory_gib=1), found)
    assert "predicted_memory_bytes" not in found.metrics
    with pytest.raises(UserError, match="needs about"):
        require_memory(replace(QWEN, processes=2, strategy=Strategy.zero2), HardwareConfig(memory_gib=1), found)


def test_float32_over_four_bits_is_only_warned_of(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("alignkit"), "propagate", True)
    job = replace(QWEN, model=replace(FOUR_BITS, dtype="float32"))
    refuse_known_problems(job)
    assert "twice the memory" in caplog.text
    assert job.memory().parts["embeddings and head"] == 2 * QWEN.memory().parts["embeddings and head"]


def test_nothing_is_refused_that_the_kit_ships() -> None:
    """Every model with every hardware option, in every training stage."""
    models = [option(path.stem) for path in (conf_dir() / "model").glob("*.yaml")]
    for hardware in (path.stem for path in (conf_dir() / "hardware").glob("*.yaml")):
        config: Any = load_config("sft", [f"hardware={hardware}"])
        for model, (stage, each) in product(models, ((SFT, 1), (REWARD, 2), (DPO, 2))):
            job = Job(stage, model, model.max_length, train=config.train, sequences_per_row=each)
            assert known_problems(job) == []
            if config.hardware.memory_gib:
                assert find_machine(config.hardware).spare(job.memory()) >= 0, (model.name, hardware, stage)


# -- speed -------------------------------------------------------------------------------------------------------------


def test_operations_a_token_are_those_of_the_reference() -> None:
    """45.1, 46.3, 48.7 and 53.5 GFLOP a token at 1k, 2k, 4k and 8k: rank 64, checkpointing."""
    job = replace(QWEN, train=LIGHT)
    found = [training_flops(job, length) / 1e9 for length in (1024, 2048, 4096, 8192)]
    assert found == pytest.approx([45.1, 46.3, 48.7, 53.5], rel=0.005)
    dpo = training_flops(replace(job, stage=DPO), 2048) / training_flops(job, 2048)
    assert dpo == pytest.approx(1.32, abs=0.02)
    without = replace(job, train=replace(LIGHT, gradient_checkpointing=False))
    assert training_flops(without, 2048) < 0.75 * training_flops(job, 2048)
    assert training_flops(replace(job, stage=REWARD), 2048) < training_flops(job, 2048)


def test_speed_is_a_range_below_the_peak() -> None:
    job = replace(QWEN, train=LIGHT)
    found = training_speed(job, CARD, 2048)
    assert found is not None
    peak = 165e12 / training_flops(job, 2048)
    assert found.low < PEAK_SHARE[0] * peak < found.high < PEAK_SHARE[1] * peak < peak
    small = training_speed(job, CARD, 128)  # dequantisation costs the same however few the tokens
    assert small is not None
    assert small.high < found.high
    two = training_speed(job, replace(CARD, gpus=2), 2048)
    assert two is not None
    assert two.high == 2 * found.high


@pytest.mark.parametrize(
    ("path", "rank", "length", "tokens_per_second", "peak", "share"),
    [
        ("Qwen/Qwen-7B-Chat", 64, 2048, 2341, 312e12, 0.34),  # README of Qwen-7B: Q-LoRA on an A100
        ("Qwen/Qwen-7B-Chat", 64, 8192, 2939, 312e12, 0.49),
        ("meta-llama/Meta-Llama-3-8B-Instruct", 8, 2048, 2413, 165e12, 0.68),  # README of torchtune: compiled, RTX 4090
    ],
)
def test_published_runs_reach_the_share_that_the_docs_say(
    path: str, rank: int, length: int, tokens_per_second: float, peak: float, share: float
) -> None:
    job = replace(QWEN, model=replace(QWEN.model, path=path), lora=LoraConfig(rank=rank), train=LIGHT)
    assert tokens_per_second * training_flops(job, length) / peak == pytest.approx(share, abs=0.025)


def test_sampling_is_bound_by_bandwidth() -> None:
    job = replace(QWEN, stage=SAMPLING, sampling=SamplingConfig(n=1, batch_size=1))
    one = sampling_speed(job, CARD, 512)
    many = speed(replace(job, sampling=SamplingConfig(n=16, batch_size=16)), CARD, 512)
    assert one is not None
    assert many is not None
    weights = 6.476e9 * (0.516 + 4) + 2 * 151936 * 4096 + 2 * 2 * 32 * 4096 * 512
    assert one.high == pytest.approx(0.7 * 1008e9 / weights, rel=0.01)
    assert 8 * one.high < many.high < 16 * one.high


def test_without_a_stated_speed_there_is_no_estimate() -> None:
    unknown = Machine("here", GIB, is_gpu=True)
    assert training_speed(QWEN, unknown, 100) is None
    assert sampling_speed(QWEN, unknown, 100) is None
