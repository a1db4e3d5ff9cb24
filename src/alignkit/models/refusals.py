"""Combinations of settings that are known to fail, each with what to do instead.

Only what a source says: our notes of probes on this stack, or the installed code, which each rule names.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass

from alignkit.core.config import Quantization
from alignkit.core.errors import UserError
from alignkit.models.jobs import DPO, REWARD, SAMPLING, SFT, Job
from alignkit.models.machine import visible_gpus
from alignkit.models.pissa import check_init
from alignkit.models.shapes import shape_of

LOG = logging.getLogger("alignkit")


@dataclass(frozen=True)
class Surroundings:
    """How this process was started, and what it can use."""

    gpus: int = 0
    launched: bool = False
    """By torchrun or accelerate: a process a GPU."""
    fsdp: bool = False
    zero_stage: int = 0
    bitsandbytes: bool = True


@dataclass(frozen=True)
class Rule:
    """A combination that fails: when, and what to do instead."""

    name: str
    applies: Callable[[Job, Surroundings], bool]
    advice: str
    warns: bool = False
    """It works, only badly."""


def _four_bits(job: Job) -> bool:
    return job.model.quantization is Quantization.nf4


def _training(job: Job) -> bool:
    return job.stage != SAMPLING


def _pissa_fails(job: Job, here: Surroundings) -> bool:
    if job.stage != SFT or job.adapter:
        return False
    try:
        check_init(job.lora, job.model)
    except UserError:
        return True
    return False


def _too_long(job: Job, here: Surroundings) -> bool:
    try:
        context = shape_of(job.model).context
    except UserError:
        return False  # of an unknown model nothing is known
    return context is not None and job.model.max_length > context


RULES = (
    # accelerate 1.15 puts 4-bit weights that are stored as uint8 among FSDP's ignored parameters: every GPU then holds
    # all of them, and before (accelerate #3983) training was silently wrong.
    Rule(
        "4-bit weights under FSDP",
        lambda job, here: _training(job) and _four_bits(job) and here.fsdp,
        "the weights would be replicated, not sharded. Use plain data parallelism (torchrun), which holds the 4-bit "
        "base on each GPU, or model.quantization=none",
    ),
    # transformers.integrations.accelerate.check_and_set_device_map raises, and models.loading places the base.
    Rule(
        "DeepSpeed ZeRO-3",
        lambda job, here: _training(job) and here.zero_stage == 3,
        "it cannot load a base that is placed on its GPU whole, as alignkit does. Use ZeRO-2: only adapters are "
        "trained, and their gradients and optimizer states are what it shards",
    ),
    # PEFT splits floating-point weights only (LoraLayer.pissa_init); models.pissa says what else it cannot do.
    Rule(
        "lora.init=pissa over a 4-bit base or with DoRA",
        _pissa_fails,
        "PiSSA takes its start out of the base's weights, and is saved as a plain adapter. Set lora.init=default, or "
        "model.quantization=none lora.dora=false",
    ),
    # TRL 1.16: only SFTTrainer packs, DPOTrainer ignores padding_free with a warning; the reward stage has neither.
    # Whether attention keeps packed rows apart is measured when training begins (training.packing), not guessed here.
    Rule(
        "train.packing or train.padding_free outside sft",
        lambda job, here: job.stage in (REWARD, DPO) and (job.train.packing or job.train.padding_free),
        "only sft can lay rows end to end. Set train.packing=false train.padding_free=false",
    ),
    # models.value_head.ValueHeadModel: answers to one prompt stand in one sequence and must not see each other.
    Rule(
        "a reward model with an attention that takes no mask",
        lambda job, here: job.stage == REWARD and job.model.attn not in ("sdpa", "eager"),
        "answers to one prompt would read each other. Set model.attn=sdpa",
    ),
    # Beyond its context a model's positions are untrained; of the first Qwen models they are not even reproduced.
    Rule(
        "model.max_length beyond the model's context",
        _too_long,
        "the model was not made for such lengths. Lower model.max_length",
    ),
    # trl.trainer.sft_trainer raises: its loss multiplies with lm_head.weight directly. Reward models leave it out.
    Rule(
        "an adapter on lm_head",
        lambda job, here: _training(job) and "lm_head" in job.model.lora_targets and not job.adapter,
        "it would never be trained. Take lm_head out of model.lora_targets",
    ),
    Rule(
        "model.quantization=nf4 without bitsandbytes",
        lambda job, here: _four_bits(job) and not here.bitsandbytes,
        "install it: pip install 'bitsandbytes>=0.50'",
    ),
    # trl raises in DPOTrainer and SFTTrainer; transformers' Trainer would wrap the model in DataParallel.
    Rule(
        "several visible GPUs in one process",
        lambda job, here: _training(job) and here.gpus > 1 and not here.launched,
        "start a process for each (torchrun --nproc-per-node=<gpus> -m alignkit ...), or show it one with "
        "CUDA_VISIBLE_DEVICES=0",
    ),
    # Embedding and output layer are not quantised: of Qwen-7B they take 5.0 GB in float32, 2.5 GB in bfloat16.
    Rule(
        "model.dtype=float32 over a 4-bit base",
        lambda job, here: _four_bits(job) and job.model.dtype == "float32",
        "embeddings, output layer and activations take twice the memory; model.dtype=bfloat16 is what QLoRA uses",
        warns=True,
    ),
)
"""Every rule, in the order in which they are told."""


def known_problems(job: Job, here: Surroundings | None = None) -> list[Rule]:
    """The rules that refuse a job, as it would run here."""
    here = here or find_surroundings()
    return [rule for rule in RULES if not rule.warns and rule.applies(job, here)]


def refuse_known_problems(job: Job, here: Surroundings | None = None) -> None:
    """Raise `UserError` for a job that is known to fail; say so in the log when it is only a bad idea."""
    here = here or find_surroundings()
    for rule in RULES:
        if rule.warns and rule.applies(job, here):
            LOG.warning("%s: %s: %s", job.stage, rule.name, rule.advice)
    problems = known_problems(job, here)
    if problems:
        raise UserError("; ".join(f"{job.stage}: {rule.name}: {rule.advice}" for rule in problems))


def find_surroundings() -> Surroundings:
    """What the launcher's environment variables and the installed packages say."""
    environment = os.environ
    return Surroundings(
        gpus=visible_gpus(),
        launched="LOCAL_RANK" in environment or "WORLD_SIZE" in environment,
        fsdp=environment.get("ACCELERATE_USE_FSDP", "false").lower() == "true",
        zero_stage=int(environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "0") or 0)
        if environment.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
        else 0,
        bitsandbytes=importlib.util.find_spec("bitsandbytes") is not None,
    )
