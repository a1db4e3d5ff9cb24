"""How fast training and sampling may be: an estimate from a card's stated peak, always a range, never measured by us.

Symbols as in `models.memory`; S is the length of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

from alignkit.models.jobs import DPO, REWARD, SAMPLING, Job
from alignkit.models.machine import Machine
from alignkit.models.memory import kv_cache_bytes, linear_bytes

PEAK_SHARE = (0.25, 0.60)
"""Of the stated bfloat16 peak. Published QLoRA runs imply, by the formula below, 34 to 49 % on an A100 (README of
Qwen-7B) and 68 % on an RTX 4090 with torch.compile (README of torchtune). We do not compile, and a faster card waits
more for its kernels to start; so the range begins lower and ends before."""

BANDWIDTH_SHARE = (0.2, 0.7)
"""Of the stated memory bandwidth, while sampling. Assumed: a loop over layers in Python is far from a graph."""

DEQUANTIZED_BYTES = 2.5
"""Traffic of one pass over a 4-bit weight: half a byte read, two bytes written."""


@dataclass(frozen=True)
class Range:
    """Lowest and highest estimate, in tokens a second on all GPUs together."""

    low: float
    high: float


def training_flops(job: Job, length: float) -> float:
    """Floating-point operations for each token of rows of `length` tokens.

    With checkpointing every layer is computed twice forward and once backward, and frozen weights take no gradient:
    6 lin + 6 V H + 8 P + 9 S Q L, of which the reward model leaves out the output layer. Without, 4 lin + 4 V H + 6 P +
    7 S Q L. DPO adds the reference's forward pass, 2 lin + 2 V H + 2 P + 2 S Q L. Attention is causal.
    """
    shape = job.base.shape
    again = int(job.train.gradient_checkpointing)
    head = 0 if job.stage == REWARD else shape.vocabulary_parameters
    adapter = shape.adapter_parameters(job.adapters.rank, job.adapters.targets)
    attention = length * shape.query_width * shape.layers
    flops = (4 + 2 * again) * (shape.linear_parameters + head) + (6 + 2 * again) * adapter + (7 + 2 * again) * attention
    if job.stage == DPO:
        flops += 2 * (shape.linear_parameters + head + adapter + attention)
    return flops


def training_speed(job: Job, machine: Machine, length: float) -> Range | None:
    """Tokens a second while training on rows of mean `length`; None when the card's speed is not known.

    Each micro-batch dequantises a 4-bit base once for each pass, however few tokens it has: 2.5 bytes a weight.
    """
    if machine.bf16_tflops is None or machine.bandwidth_gb_per_s is None:
        return None
    tokens = job.sequences * length
    passes = (3 if job.train.gradient_checkpointing else 2) + int(job.stage == DPO)
    traffic = DEQUANTIZED_BYTES * passes * job.base.shape.linear_parameters if job.base.quantized else 0.0
    waiting = traffic / (machine.bandwidth_gb_per_s * 1e9)
    low, high = (
        machine.gpus * tokens / (tokens * training_flops(job, length) / (share * machine.bf16_tflops * 1e12) + waiting)
        for share in PEAK_SHARE
    )
    return Range(low, high)


def sampling_speed(job: Job, machine: Machine, length: float) -> Range | None:
    """New tokens a second while sampling: each step reads all weights and the cache once for all sequences.

    A 4-bit weight is read, written and read again in 16 bits. None when the card's bandwidth is not known.
    """
    if machine.bandwidth_gb_per_s is None:
        return None
    base, shape = job.base, job.base.shape
    weights = linear_bytes(base) + (4 * shape.linear_parameters if base.quantized else 0)
    step = (
        weights + base.number_bytes * shape.vocabulary_parameters + kv_cache_bytes(base, job.sequences, round(length))
    )
    low, high = (
        machine.gpus * job.sequences * share * machine.bandwidth_gb_per_s * 1e9 / step for share in BANDWIDTH_SHARE
    )
    return Range(low, high)


def speed(job: Job, machine: Machine, length: float) -> Range | None:
    """The estimate for a job whose rows have this mean length."""
    return sampling_speed(job, machine, length) if job.stage == SAMPLING else training_speed(job, machine, length)
