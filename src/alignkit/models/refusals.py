"""Combinations of settings that are known to fail, each with what to do instead.

Only what a source says: our notes of probes on this stack, or the installed code, which each rule names. What several
processes cannot share is refused by training.distributed, since only a training knows how it was started.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

from alignkit.core.config import Quantization
from alignkit.core.errors import UserError
from alignkit.models.jobs import DPO, REWARD, SAMPLING, SFT, Job
from alignkit.models.pissa import check_init
from alignkit.models.shapes import shape_of

LOG = logging.getLogger("alignkit")


@dataclass(frozen=True)
class Rule:
    """A combination that fails: when, and what to do instead."""

    name: str
    applies: Callable[[Job], bool]
    advice: str
    warns: bool = False
    """It works, only badly."""


def _four_bits(job: Job) -> bool:
    return job.model.quantization is Quantization.nf4


def _training(job: Job) -> bool:
    return job.stage != SAMPLING


def _pissa_fails(job: Job) -> bool:
    if job.stage != SFT or job.adapter:
        return False
    try:
        check_init(job.lora, job.model)
    except UserError:
        return True
    return False


def _too_long(job: Job) -> bool:
    try:
        context = shape_of(job.model).context
    except UserError:
        return False  # of an unknown model nothing is known
    return context is not None and job.model.max_length > context


RULES = (
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
        lambda job: job.stage in (REWARD, DPO) and (job.train.packing or job.train.padding_free),
        "only sft can lay rows end to end. Set train.packing=false train.padding_free=false",
    ),
    # models.value_head.ValueHeadModel: answers to one prompt stand in one sequence and must not see each other.
    Rule(
        "a reward model with an attention that takes no mask",
        lambda job: job.stage == REWARD and job.model.attn not in ("sdpa", "eager"),
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
        lambda job: _training(job) and "lm_head" in job.model.lora_targets and not job.adapter,
        "it would never be trained. Take lm_head out of model.lora_targets",
    ),
    Rule(
        "model.quantization=nf4 without bitsandbytes",
        lambda job: _four_bits(job) and find_spec("bitsandbytes") is None,
        "install it: pip install 'bitsandbytes>=0.50'",
    ),
    # Embedding and output layer are not quantised: of Qwen-7B they take 5.0 GB in float32, 2.5 GB in bfloat16.
    Rule(
        "model.dtype=float32 over a 4-bit base",
        lambda job: _four_bits(job) and job.model.dtype == "float32",
        "embeddings, output layer and activations take twice the memory; model.dtype=bfloat16 is what QLoRA uses",
        warns=True,
    ),
)
"""Every rule, in the order in which they are told."""


def known_problems(job: Job) -> list[Rule]:
    """The rules that refuse a job."""
    return [rule for rule in RULES if not rule.warns and rule.applies(job)]


def refuse_known_problems(job: Job) -> None:
    """Raise `UserError` for a job that is known to fail; say so in the log when it is only a bad idea."""
    for rule in RULES:
        if rule.warns and rule.applies(job):
            LOG.warning("%s: %s: %s", job.name, rule.name, rule.advice)
    problems = known_problems(job)
    if problems:
        raise UserError("; ".join(f"{job.name}: {rule.name}: {rule.advice}" for rule in problems))
