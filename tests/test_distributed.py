"""Sharing the rows of an optimizer step, what is refused, and what the trainers are told."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from tiny_random import random_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import TrainerControl, TrainingArguments

from alignkit.core.app import load_config
from alignkit.core.config import DistributedConfig, LoraConfig, ModelConfig, Quantization, Strategy, TrainConfig
from alignkit.core.errors import UserError
from alignkit.core.ranks import batches_of_process
from alignkit.core.stages import group_options
from alignkit.models.loading import base_fingerprint, load_base, load_tokenizer, new_adapter, save_adapter
from alignkit.training import arguments, callbacks
from alignkit.training.arguments import trainer_arguments
from alignkit.training.batches import LengthGroupedSampler, OwnBatches, share
from alignkit.training.distributed import (
    make_whole,
    own_part,
    refuse_impossible,
    require_possible,
    sharding_arguments,
    trained_weights,
)

STAGES = ("sft", "reward", "dpo")
TINY = ModelConfig(name="tiny", path="embedded", dtype="float32")
BIG = ModelConfig(name="big", path="big", quantization=Quantization.nf4, dtype="bfloat16", quant_storage="bfloat16")

# -- sharing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "processes", "expected"),
    [
        (8, 2, 1, (8, 2)),  # one process: as configured
        (8, 2, 2, (8, 1)),
        (8, 1, 2, (4, 1)),  # no more than batch_size at once, and fewer where the step has no more
        (2, 8, 4, (2, 2)),
        (4, 3, 2, (3, 2)),  # 6 rows each: twice 3, not 4 and 2
        (3, 3, 3, (3, 1)),
        (1, 8, 2, (1, 4)),
    ],
)
def test_a_step_keeps_its_rows_however_many_processes_share_it(
    batch_size: int, accumulation: int, processes: int, expected: tuple[int, int]
) -> None:
    train = TrainConfig(batch_size=batch_size, gradient_accumulation=accumulation)
    assert batches_of_process(train, processes) == expected
    assert processes * expected[0] * expected[1] == batch_size * accumulation


@pytest.mark.parametrize(("rows", "processes", "fitting"), [(16, 3, "15 or 18"), (2, 4, "4")])
def test_a_step_that_cannot_be_shared_equally_is_refused(rows: int, processes: int, fitting: str) -> None:
    with pytest.raises(UserError, match=f"= {rows} rows .* {processes} processes .* to make {fitting} rows"):
        batches_of_process(TrainConfig(batch_size=rows, gradient_accumulation=1), processes)


def test_one_process_has_the_rows_of_a_step_in_order() -> None:
    assert share([5, 6, 7, 8, 9], batch_size=2, rank=0, world_size=1) == [[5, 6], [7, 8], [9]]


@pytest.mark.parametrize(
    ("step", "batch_size", "even", "expected"),
    [
        ([0, 1, 2, 3], 2, False, [[[0, 2]], [[1, 3]]]),  # turns: rows of like length for both
        ([0, 1, 2], 4, False, [[[0, 2]], [[1]]]),
        ([0, 1, 2], 4, True, [[[0, 2]], [[1, 1]]]),
        ([0, 1, 2, 3, 4], 2, False, [[[0, 2], [4]], [[1], [3]]]),  # as many batches for both
        ([0, 1, 2], 1, False, [[[0], [2]], [[1], [1]]]),
        ([7], 4, False, [[[7]], [[7]]]),
    ],
)
def test_what_two_processes_get_of_a_step(
    step: list[int], batch_size: int, even: bool, expected: list[list[list[int]]]
) -> None:
    assert [share(step, batch_size, rank, 2, even) for rank in range(2)] == expected


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize("rows", [24, 25, 29, 35, 47])
def test_every_row_is_read_once_an_epoch_and_nobody_waits(rows: int, processes: int, even: bool) -> None:
    """Steps of 12 rows in batches of at most 2; the batches of all processes go together one by one."""
    lengths = [(7 * row) % 31 + 1 for row in range(rows)]
    sampler = LengthGroupedSampler(lengths, rows_per_step=12, seed=1)
    sampler.set_epoch(3)
    loaders = [OwnBatches(sampler, 2, rank, processes, even) for rank in range(processes)]
    batches = [list(loader) for loader in loaders]
    assert {len(each) for each in batches} == {len(loader) for loader in loaders}
    assert len({len(each) for each in batches}) == 1
    read = sorted(row for each in batches for batch in each for row in batch)
    assert set(read) == set(range(rows))
    if rows % 12 == 0 or (not even and rows % 12 >= processes):
        assert read == list(range(rows))
    per_step = 12 // processes // 2
    for number, step in enumerate(sampler.steps()):
        taken = [
            row for each in batches for batch in each[number * per_step : (number + 1) * per_step] for row in batch
        ]
        assert set(taken) == set(step)


# -- what cannot work --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "model", "strategy", "processes", "gpus", "message"),
    [
        ("sft", TINY, Strategy.none, 1, 4, r"one process sees 4 GPUs .* torchrun --nproc_per_node 4 -m alignkit.sft"),
        ("dpo", TINY, Strategy.ddp, 1, 1, "strategy=ddp is for several processes"),
        ("reward", TINY, Strategy.none, 3, 1, "3 processes cannot share equally"),
        ("dpo", TINY, Strategy.zero2, 2, 2, "distributed=deepspeed_zero2: dpo checks and measures with whole weights"),
        ("reward", BIG, Strategy.fsdp, 2, 2, "distributed=fsdp_qlora: reward checks and measures with whole weights"),
        ("sft", BIG, Strategy.fsdp, 2, 0, "distributed=fsdp_qlora needs GPUs"),
        ("sft", replace(BIG, quant_storage="uint8"), Strategy.fsdp, 2, 2, "now uint8 and bfloat16"),
        ("sft", replace(BIG, dtype="auto"), Strategy.fsdp, 2, 2, "now bfloat16 and auto"),
    ],
)
def test_what_cannot_work_is_refused(
    stage: str, model: ModelConfig, strategy: Strategy, processes: int, gpus: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        refuse_impossible(stage, model, TrainConfig(), DistributedConfig(strategy), processes=processes, gpus=gpus)


@pytest.mark.parametrize(
    ("stage", "model", "strategy", "processes", "gpus"),
    [
        ("sft", TINY, Strategy.none, 1, 0),
        ("sft", TINY, Strategy.none, 1, 1),
        ("dpo", TINY, Strategy.none, 2, 0),
        ("reward", BIG, Strategy.ddp, 4, 4),
        ("sft", BIG, Strategy.fsdp, 2, 2),
        ("sft", replace(BIG, quantization=Quantization.none, quant_storage="uint8"), Strategy.fsdp, 2, 2),
    ],
)
def test_what_can_work_is_not_refused(
    stage: str, model: ModelConfig, strategy: Strategy, processes: int, gpus: int
) -> None:
    refuse_impossible(stage, model, TrainConfig(), DistributedConfig(strategy), processes=processes, gpus=gpus)


@pytest.mark.parametrize("what", ["measuring held-out rows", "lora.init=pissa"])
def test_what_needs_whole_weights_is_not_for_divided_ones(what: str) -> None:
    def refuse(strategy: Strategy) -> None:
        refuse_impossible(
            "sft", BIG, TrainConfig(), DistributedConfig(strategy), processes=2, gpus=2, needs_whole_weights=what
        )

    refuse(Strategy.ddp)
    with pytest.raises(UserError, match=rf"distributed=fsdp_qlora: {what} takes whole weights"):
        refuse(Strategy.fsdp)


@pytest.mark.parametrize("name", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_what_accelerate_is_told_beside_us_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "true")
    with pytest.raises(UserError, match=rf"{name} is set, .* start with torchrun, and choose .* distributed=deepspeed"):
        require_possible("sft", TINY, TrainConfig(), DistributedConfig())


def test_offload_needs_something_to_put_away() -> None:
    with pytest.raises(UserError, match=r"offload=true: distributed\.strategy=ddp divides nothing"):
        refuse_impossible(
            "sft", TINY, TrainConfig(), DistributedConfig(Strategy.ddp, offload=True), processes=2, gpus=2
        )


@pytest.mark.parametrize("strategy", [Strategy.zero2, Strategy.zero3])
def test_deepspeed_that_is_missing_is_named(strategy: Strategy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs DeepSpeed: pip install 'alignkit\[deepspeed\]'"):
        refuse_impossible("sft", BIG, TrainConfig(), DistributedConfig(strategy), processes=2, gpus=2)


def test_processes_that_do_not_find_each_other_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments, "world_size", lambda: 2)
    with pytest.raises(UserError, match=r"WORLD_SIZE says 2 processes, but 1 found each other"):
        trainer_arguments(TrainingArguments, TrainConfig(), tmp_path, rows=8, seed=1, dtype=torch.float32)


@pytest.mark.parametrize(("totals", "agree"), [([3.0, 3.0], True), ([3.0, 3.5], False), ([3.0], False)])
def test_processes_that_train_apart_are_found(
    totals: list[float], agree: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks: list[tuple[str, bool, str]] = []
    monkeypatch.setattr(callbacks, "gather", lambda own: torch.tensor(totals) if own.tolist() == [3.0] else own)
    watch = callbacks.ProcessesAgree(torch.nn.Linear(3, 1, bias=False), lambda *check: checks.append(check))
    with torch.no_grad():
        watch._weights[0].copy_(torch.tensor([[1.0, -1.0, 1.0]]))
    two: Any = SimpleNamespace(world_size=2, device="cpu")
    for step in (1, 2, 9):
        watch.on_step_end(two, SimpleNamespace(global_step=step, max_steps=9), TrainerControl())  # type: ignore[arg-type]
    assert [(name, passed) for name, passed, _ in checks] == [("processes_agree", agree)] * 2  # at 1 and at 9


# -- what the trainers are told ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("option", group_options("distributed"))
def test_every_option_composes_in_every_training_stage(stage: str, option: str) -> None:
    needed = ["init_adapter=made_up"] if stage == "dpo" else []
    config: Any = load_config(stage, ["model=qwen7b", f"distributed={option}", *needed])
    assert config.distributed.strategy.name == option.removeprefix("deepspeed_").removesuffix("_qlora")
    divided = config.distributed.strategy in (Strategy.zero3, Strategy.fsdp)
    assert config.model.quant_storage == ("bfloat16" if divided else "uint8")
    assert config.model.quantization is Quantization.nf4


@pytest.mark.parametrize("offload", [False, True])
def test_fsdp_is_accepted_by_the_trainer(tmp_path: Path, offload: bool) -> None:
    """As far as its arguments: sharding itself takes GPUs."""
    config: Any = load_config("sft", ["distributed=fsdp_qlora", f"distributed.offload={offload}"])
    train = replace(config.train, gradient_checkpointing=True)
    made = trainer_arguments(
        TrainingArguments, train, tmp_path, rows=8, seed=1, dtype=torch.bfloat16, distributed=config.distributed
    )
    assert made.fsdp_plugin_args["fsdp_version"] == 2
    assert made.fsdp_plugin_args["activation_checkpointing"]
    assert not made.activation_checkpointing  # FSDP's own takes its place
    assert made.fsdp_plugin_args.get("cpu_offload", False) == offload


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_configuration_says_what_is_divided(stage: int, offload: bool) -> None:
    """Read by accelerate, which needs no DeepSpeed for that."""
    config: Any = load_config("sft", [f"distributed=deepspeed_zero{stage}", f"distributed.offload={offload}"])
    made = sharding_arguments(config.distributed, config.train)
    parsed = HfDeepSpeedConfig(made["deepspeed"])
    assert (parsed.is_zero2(), parsed.is_zero3()) == (stage == 2, stage == 3)
    assert parsed.is_offload() == offload
    assert parsed.get_value("train_micro_batch_size_per_gpu") == "auto"


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs alignkit[deepspeed]")
@pytest.mark.parametrize("option", ["deepspeed_zero2", "deepspeed_zero3"])
def test_deepspeed_is_accepted_by_the_trainer(tmp_path: Path, option: str) -> None:
    config: Any = load_config("sft", [f"distributed={option}"])
    made = trainer_arguments(
        TrainingArguments, config.train, tmp_path, rows=8, seed=1, dtype=torch.float32, distributed=config.distributed
    )
    assert made.deepspeed_plugin is not None


def test_one_process_is_told_nothing() -> None:
    assert sharding_arguments(DistributedConfig(), TrainConfig()) == {}


# -- weights -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
def test_4bit_weights_are_the_same_however_they_are_packed(storage: str) -> None:
    model = replace(TINY, quantization=Quantization.nf4)
    tokens = torch.tensor([load_tokenizer(model)("Anna lives in Oslo.").input_ids])
    packed = load_base(replace(model, quant_storage=storage))
    weight = packed.get_submodule("model.layers.0.mlp.up_proj").weight
    assert str(weight.dtype) == f"torch.{storage}"  # what FSDP and ZeRO-3 can divide
    with torch.no_grad():
        assert torch.equal(packed(tokens).logits, load_base(model)(tokens).logits)


def test_a_storage_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UserError, match=r"model\.quant_storage=int4: choose uint8, float32"):
        load_base(replace(TINY, quantization=Quantization.nf4, quant_storage="int4"))


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_divided_weights_are_made_whole_and_can_be_saved(tmp_path: Path) -> None:
    """Weights as FSDP leaves them, parts of a tensor on a mesh of processes."""
    policy: Any = new_adapter(random_model(), LoraConfig(rank=4), ["q_proj"])
    model = ModelConfig(name="random", path="random")
    save_adapter(policy, tmp_path / "before", model)
    expected, fingerprint = trained_weights(policy), base_fingerprint(policy.get_base_model())
    mesh = init_device_mesh("cpu", (1,))
    for module in policy.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            parts = distribute_tensor(weight.detach(), mesh, [Shard(0)])
            module._parameters[name] = torch.nn.Parameter(parts, weight.requires_grad)
    assert all(torch.equal(expected[name], weight) for name, weight in trained_weights(policy).items())
    assert all(
        torch.equal(expected[name], own_part(weight)) for name, weight in policy.named_parameters() if name in expected
    )
    callbacks.require_finite(policy, lambda *check: pytest.fail(str(check)), "now")
    make_whole(policy)
    assert base_fingerprint(policy.get_base_model()) == fingerprint
    save_adapter(policy, tmp_path / "after", model)
    for file in ("adapter_model.safetensors", "adapter_config.json", "base.json"):
        assert (tmp_path / "before" / file).read_bytes() == (tmp_path / "after" / file).read_bytes()
