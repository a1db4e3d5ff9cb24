"""Several GPUs: what cannot work, what the trainers are told, and weights of which a process holds a part.

Imports without torch.
"""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING, Any

from alignkit.core.config import DistributedConfig, ModelConfig, Quantization, Strategy, TrainConfig
from alignkit.core.errors import UserError
from alignkit.core.ranks import batches_of_process, world_size

if TYPE_CHECKING:
    import torch

DEEPSPEED = (Strategy.zero2, Strategy.zero3)
_RECOMPUTED = "_checkpoint_wrapped_module."
"""What FSDP's own gradient checkpointing puts into names."""

_OPTIONS = {Strategy.zero2: "deepspeed_zero2", Strategy.zero3: "deepspeed_zero3", Strategy.fsdp: "fsdp_qlora"}


# -- what cannot work --------------------------------------------------------------------------------------------------


def require_possible(
    stage: str, model: ModelConfig, train: TrainConfig, distributed: DistributedConfig, needs_whole_weights: str = ""
) -> None:
    """Raise `UserError` for what cannot work with the processes and GPUs that there are.

    These are the rules of how processes share a training; those of the work itself are in models.refusals.
    """
    import torch

    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        if os.environ.get(name, "false").lower() == "true":
            raise UserError(
                f"{name} is set, by accelerate launch or its configuration: start with torchrun, and choose what the "
                "processes divide by distributed=deepspeed_zero2, deepspeed_zero3 or fsdp_qlora"
            )
    refuse_impossible(
        stage,
        model,
        train,
        distributed,
        processes=world_size(),
        gpus=torch.cuda.device_count(),
        needs_whole_weights=needs_whole_weights,
    )


def refuse_impossible(
    stage: str,
    model: ModelConfig,
    train: TrainConfig,
    distributed: DistributedConfig,
    *,
    processes: int,
    gpus: int,
    needs_whole_weights: str = "",
) -> None:
    """Raise `UserError` for what cannot work with so many processes, each of which sees so many GPUs.

    `needs_whole_weights` names what the stage would do with them before training or between steps; empty: nothing.
    """
    strategy = distributed.strategy
    command = f"torchrun --nproc_per_node {max(2, gpus)} -m alignkit.{stage}"
    if processes == 1 and gpus > 1:
        raise UserError(
            f"one process sees {gpus} GPUs and can train on one: start one process for each with {command} ..., or "
            "choose a GPU with CUDA_VISIBLE_DEVICES=0"
        )
    if processes == 1 and strategy is not Strategy.none:
        raise UserError(f"distributed.strategy={strategy.name} is for several processes: start them with {command} ...")
    batches_of_process(train, processes)
    if strategy in _OPTIONS:
        _refuse_sharding(stage, model, strategy, gpus, needs_whole_weights)
    if strategy not in _OPTIONS and distributed.offload:
        raise UserError(
            f"distributed.offload=true: distributed.strategy={strategy.name} divides nothing to be put away"
        )


def _refuse_sharding(stage: str, model: ModelConfig, strategy: Strategy, gpus: int, needs_whole_weights: str) -> None:
    option = f"distributed={_OPTIONS[strategy]}"
    if stage != "sft":
        raise UserError(
            f"{option}: {stage} checks and measures with whole weights in each process; use distributed=ddp"
        )
    if needs_whole_weights:
        raise UserError(f"{option}: {needs_whole_weights} takes whole weights in each process; use distributed=ddp")
    if gpus == 0 and strategy is Strategy.fsdp:  # accelerate makes ddp of it there, and says nothing
        raise UserError(f"{option} needs GPUs, and there is none; the others work without")
    if strategy in DEEPSPEED and importlib.util.find_spec("deepspeed") is None:
        raise UserError(f"{option} needs DeepSpeed: pip install 'alignkit[deepspeed]'")
    quantized = model.quantization is Quantization.nf4
    if quantized and strategy.divides_weights and model.quant_storage != model.dtype:
        raise UserError(
            f"{option} divides 4-bit weights only when they are packed in the dtype of all others: set "
            f"model.quant_storage and model.dtype (now {model.quant_storage} and {model.dtype}) both to bfloat16"
        )


# -- what the trainers are told ----------------------------------------------------------------------------------------


def sharding_arguments(distributed: DistributedConfig, train: TrainConfig) -> dict[str, Any]:
    """The arguments of transformers' `TrainingArguments` that say what is divided among the processes."""
    if distributed.strategy in DEEPSPEED:
        return {"deepspeed": _deepspeed(distributed)}
    if distributed.strategy is Strategy.fsdp:
        return {"fsdp": True, "fsdp_config": _fsdp(distributed, train)}
    return {}


def _deepspeed(distributed: DistributedConfig) -> dict[str, Any]:
    """DeepSpeed's configuration; the trainer fills in what says "auto" from its own arguments."""
    whole = distributed.strategy is Strategy.zero3
    zero: dict[str, Any] = {"stage": 3 if whole else 2, "overlap_comm": True, "contiguous_gradients": True}
    if whole:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    if distributed.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        if whole:
            zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    filled_in = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    return {
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,  # the optimizer is the one that train.optimizer names
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "gradient_clipping": "auto",
        **dict.fromkeys(filled_in, "auto"),
    }


def _fsdp(distributed: DistributedConfig, train: TrainConfig) -> dict[str, Any]:
    """Fully sharded data parallelism, version 2 (torch's `fully_shard`), a unit for each decoder layer."""
    return {
        "version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "reshard_after_forward": True,
        "cpu_offload": distributed.offload,
        "cpu_ram_efficient_loading": False,  # accelerate leaves it out for 4-bit weights
        "activation_checkpointing": train.gradient_checkpointing,
        "state_dict_type": "SHARDED_STATE_DICT",
    }


# -- weights that are divided ------------------------------------------------------------------------------------------


def trained_weights(policy: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Whole copies of all trainable weights in main memory, by name; every process must call it."""
    weights = ((name, weight) for name, weight in policy.named_parameters() if weight.requires_grad)
    return {name.replace(_RECOMPUTED, ""): _whole(weight).cpu() for name, weight in weights}


def make_whole(policy: torch.nn.Module) -> None:
    """Put whole weights in the place of divided ones where they are needed to save an adapter; training is over then.

    These are the trainable weights, and the input embedding that tells one base from another. Every process must call
    it.
    """
    import torch

    embedding = policy.get_input_embeddings()  # type: ignore[operator]
    for module in policy.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if weight.requires_grad or module is embedding:
                module._parameters[name] = torch.nn.Parameter(_whole(weight).cpu(), weight.requires_grad)


def own_part(weight: torch.Tensor) -> torch.Tensor:
    """What this process holds of a weight: all of it, unless it is divided."""
    from torch.distributed.tensor import DTensor

    if isinstance(weight, DTensor):  # FSDP
        return weight.to_local()
    part: torch.Tensor = getattr(weight, "ds_tensor", weight)  # ZeRO-3
    return part


def _whole(weight: torch.Tensor) -> torch.Tensor:
    """The whole of a weight of which each process holds a part."""
    from torch.distributed.tensor import DTensor

    if isinstance(weight, DTensor):  # FSDP
        whole: torch.Tensor = weight.detach().full_tensor()  # type: ignore[attr-defined]
        return whole
    if hasattr(weight, "ds_id"):  # ZeRO-3
        import deepspeed

        with deepspeed.zero.GatheredParameters([weight]):
            return weight.detach().clone()
    return weight.detach().clone()
