"""What a stage is about to do, in the terms of `models.memory`: the longest rows, the adapter, the batch."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

from alignkit.core.config import LoraConfig, ModelConfig, Quantization, SamplingConfig, Strategy, TrainConfig
from alignkit.core.ranks import batches_of_process
from alignkit.models.memory import Adapters, Base, Memory, Step, sampling_memory, training_memory
from alignkit.models.reward_model import GPU_BATCH_TOKENS
from alignkit.models.shapes import shape_of

SFT, REWARD, DPO, SAMPLING = "sft", "reward", "dpo", "rejection_sampling"
STAGES = (SFT, REWARD, DPO, SAMPLING)
"""Stages whose memory is estimated. `serve` and `chat` are estimated as SAMPLING: adapters of one base that answer."""


@dataclass(frozen=True)
class Job:
    """One stage's work on one model; `longest` is the longest sequence, in tokens."""

    stage: str
    model: ModelConfig
    longest: int
    lora: LoraConfig = field(default_factory=LoraConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    adapter: str | None = None
    """An adapter that is continued: its rank and layers count then, not those of `lora`."""
    reference: str = "sft_adapter"
    """DPO's: `base` costs nothing, an adapter is held beside the one that is trained."""
    sequences_per_row: int = 1
    """Sequences that a row of a batch becomes: 2 for pairs, the answers of a prompt for the reward model."""
    processes: int = 1
    """That share each optimizer step, one a GPU."""
    strategy: Strategy = Strategy.none
    """What they divide besides."""
    adapters_loaded: int = 3
    """While sampling: the policy's, the previous version's, the reward model's. One alone scores nothing."""
    at_once_key: str | None = "sampling.batch_size"
    """The setting of how many answers are written at once; None where there is none (`chat`)."""
    command: str | None = None
    """What the user has typed, where it is estimated as another stage."""

    @property
    def name(self) -> str:
        """Of the stage, for messages."""
        return self.command or self.stage

    @property
    def base(self) -> Base:
        """The frozen base."""
        return Base(shape_of(self.model), self.model.quantization is Quantization.nf4, number_bytes(self.model.dtype))

    @property
    def adapters(self) -> Adapters:
        """What is trained."""
        rank, targets = _rank_and_targets(self)
        dropout = 0.0 if self.stage in (DPO, SAMPLING) else self.lora.dropout  # TRL turns it off for DPO
        return Adapters(rank, targets, dropout)

    @property
    def sequences(self) -> int:
        """Sequences of a micro-batch, or generated at once."""
        if self.stage == SAMPLING:
            return max(self.sampling.n, self.sampling.batch_size // self.sampling.n * self.sampling.n)
        rows, _ = batches_of_process(self.train, self.processes)
        if self.in_parts:
            return min(rows, max(1, self.train.max_batch_tokens // self.longest))
        return rows * self.sequences_per_row

    @property
    def in_parts(self) -> bool:
        """Whether a batch goes through the model in parts of `train.max_batch_tokens`, as training.supervised says."""
        end_to_end = self.train.packing or self.train.padding_free
        return self.stage == SFT and self.processes == 1 and not end_to_end

    @property
    def times_policy_alone(self) -> float:
        """While sampling: the peak with all its adapters on one base and scoring, against that of the policy alone."""
        return self.memory().peak / replace(self, adapters_loaded=1).memory().peak

    def memory(self) -> Memory:
        """The estimate. Raises `UserError` for a model whose shape is not known."""
        if self.stage == SAMPLING:
            prompts = self.sequences // self.sampling.n
            return sampling_memory(
                self.base,
                self.adapters,
                count=self.adapters_loaded,
                sequences=self.sequences,
                length=self.longest,
                prompt_tokens=prompts * max(1, self.longest - self.sampling.max_new_tokens),
                score_tokens=max(GPU_BATCH_TOKENS, self.longest) if self.adapters_loaded > 1 else 0,
            )
        return training_memory(
            self.base,
            self.adapters,
            Step(
                self.sequences,
                self.longest,
                self.train.optimizer,
                checkpointing=self.train.gradient_checkpointing,
                accumulating=batches_of_process(self.train, self.processes)[1] > 1,
                free_mask=self.stage == REWARD,
                eager=self.model.attn == "eager",
                reference_copies=int(self.stage == DPO and self.reference != "base"),
                value_head=self.stage == REWARD,
            ),
        )


def number_bytes(dtype: str) -> int:
    """Bytes of a number of the base; `auto` is bfloat16 on a GPU that has it, else float32, as when loading."""
    if dtype == "auto":
        import torch

        return 2 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else 4
    return 4 if dtype == "float32" else 2


def _rank_and_targets(job: Job) -> tuple[int, tuple[str, ...]]:
    """Rank and layers of the adapter: of the one that is continued, where there is one."""
    path = Path(job.adapter or "") / "adapter_config.json"
    if job.adapter is None or not path.is_file():
        return job.lora.rank, tuple(job.model.lora_targets)
    config = json.loads(path.read_text(encoding="utf-8"))
    targets = config["target_modules"]
    return int(config["r"]), ("all-linear",) if isinstance(targets, str) else tuple(targets)
