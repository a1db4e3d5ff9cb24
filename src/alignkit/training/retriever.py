"""Training an encoder to find passages: sentence-transformers' model and losses, in the steps of our own trainer.

Not in those of SentenceTransformerTrainer: a step of ours is the same whatever the number of processes and of the rows
that are read at once, rows draw their passages anew in every epoch, and an interrupted run goes on with the same draws.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset
from transformers import TrainingArguments
from transformers.utils import SAFE_WEIGHTS_NAME

from alignkit.core.artifact import Artifact
from alignkit.core.config import TrainConfig
from alignkit.core.ranks import batches_of_process, world_size
from alignkit.core.records import RetrievalExample
from alignkit.core.retriever_config import EncoderConfig, TaskConfig
from alignkit.training.arguments import trainer_arguments
from alignkit.training.batches import StepTrainer
from alignkit.training.checkpoints import checkpoint_folder
from alignkit.training.encoder import freeze_unused
from alignkit.training.fit import fit, trainable_in_float32
from alignkit.training.retrieval_data import Drawn, TaskSampler, draw
from alignkit.training.retrieval_losses import RetrievalLoss

_SAMPLE = 256
"""Rows of a task whose tokens are counted; the others are taken to have as many."""


def train_retriever(
    encoder: Any,
    examples: Sequence[RetrievalExample],
    tasks: Mapping[str, TaskConfig],
    train: TrainConfig,
    settings: EncoderConfig,
    *,
    seed: int,
    artifact: Artifact,
    negatives: int,
    temperature: float,
    task_temperature: float = 1.0,
    cosine: bool = True,
    across_processes: bool = True,
) -> list[dict[str, float]]:
    """Train the encoder in place; returns the rows of loss.jsonl.

    An optimizer step has train.batch_size * train.gradient_accumulation rows of one task, whose passages all compete;
    train.batch_size of them go through the encoder at once.
    """
    rows_of_step = train.batch_size * train.gradient_accumulation
    step = replace(train, batch_size=rows_of_step, gradient_accumulation=1)
    rows = _Rows(examples, tasks, negatives, seed)
    sampler = TaskSampler(
        [example.task for example in examples],
        _row_lengths(encoder, rows, settings),
        rows_of_step,
        seed,
        temperature=task_temperature,
        processes=world_size(),
    )
    rows.sampler = sampler
    own, times = batches_of_process(train, world_size())
    loss = RetrievalLoss(
        encoder,
        tasks,
        temperature=temperature,
        cosine=cosine,
        rows_at_once=own if times > 1 else None,
        group=1 + negatives,
        across_processes=across_processes,
    )
    arguments = trainer_arguments(
        TrainingArguments,
        step,
        checkpoint_folder(artifact),
        rows=len(sampler.sizes()) * rows_of_step,
        seed=seed,
        dtype=_autocast(),
        remove_unused_columns=False,
    )
    freeze_unused(encoder)
    with trainable_in_float32(encoder, artifact):
        trainer = _Trainer(encoder, loss, sampler, rows, args=arguments, data_collator=_Collator(encoder, settings))
    return fit(trainer, artifact, step, "retriever", base=settings.path)


def _autocast() -> torch.dtype:
    return torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32


class _Rows(Dataset[Drawn]):
    """The rows as they are drawn in the epoch that the sampler is in: the same after every interruption."""

    sampler: TaskSampler | None = None

    def __init__(
        self, examples: Sequence[RetrievalExample], tasks: Mapping[str, TaskConfig], negatives: int, seed: int
    ) -> None:
        self.examples = examples
        self.tasks = tasks
        self.negatives = negatives
        self.seed = seed

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, row: int) -> Drawn:
        epoch = 0 if self.sampler is None else self.sampler.epoch
        example = self.examples[row]
        return draw(example, self.tasks[example.task], self.negatives, Random(f"{self.seed} {epoch} {row}"))


class _Collator:
    """Drawn rows of one task -> tokens of queries and passages, which texts are which, and the teacher's scores."""

    def __init__(self, encoder: Any, settings: EncoderConfig) -> None:
        self.encoder = encoder
        self.query_length = settings.query_max_length

    def __call__(self, rows: Sequence[Drawn]) -> dict[str, Any]:
        most = max(len(row.positives) for row in rows)
        positives = [[*(_number(text) for text in row.positives)] for row in rows]
        batch = {
            "queries": _tokens(self.encoder, [row.query for row in rows], self.query_length),
            "tokens": _tokens(self.encoder, [text for row in rows for text in row.passages], None),
            "task": rows[0].task,
            "passages": torch.tensor([[_number(text) for text in row.passages] for row in rows]),
            "positives": torch.tensor([own + own[-1:] * (most - len(own)) for own in positives]),
        }
        teacher = [row.teacher for row in rows if row.teacher is not None]
        return batch | ({"teacher": torch.tensor(teacher)} if len(teacher) == len(rows) else {})


def _tokens(encoder: Any, texts: list[str], length: int | None) -> dict[str, Any]:
    limit = {} if length is None else {"max_length": length}
    return dict(encoder.preprocess(texts, **limit))


def _number(text: str) -> int:
    """A number for a text, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)


def _row_lengths(encoder: Any, rows: _Rows, settings: EncoderConfig) -> list[int]:
    """Tokens of each row, padding not counted: the mean of the first rows of its task.

    All rows of a task have the same, so that all processes find the same step the largest.
    """
    by_task: dict[str, list[int]] = {}
    for row, example in enumerate(rows.examples):
        by_task.setdefault(example.task, []).append(row)
    means = {}
    for name, places in by_task.items():
        drawn = [rows[row] for row in places[:_SAMPLE]]
        columns = ([each.query for each in drawn], [text for each in drawn for text in each.passages])
        counts = [_count(_tokens(encoder, column, limit)) for column, limit in zip(
            columns, (settings.query_max_length, None), strict=True
        )]  # fmt: skip
        means[name] = round(sum(counts) / len(drawn))
    return [means[example.task] for example in rows.examples]


def _count(tokens: Mapping[str, Any]) -> int:
    mask = tokens.get("attention_mask")
    return int(tokens["input_ids"].numel() if mask is None else mask.sum())


class _Trainer(StepTrainer):
    """Steps of one task each, and checkpoints of what is trained."""

    even = True

    def __init__(self, encoder: Any, loss: RetrievalLoss, sampler: TaskSampler, rows: _Rows, **keywords: Any) -> None:
        self._sampler = sampler
        super().__init__(model=encoder, train_dataset=rows, **keywords)
        self.loss = loss
        self.encoder = encoder
        self.right = self.pairs = 0

    @cached_property
    def sampler(self) -> TaskSampler:
        """The order of the rows, the same in every process."""
        return self._sampler

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The loss of a batch; `model` is the encoder, or what exchanges gradients around it."""
        self.loss.model = model
        found: Tensor = self.loss([inputs.pop("queries"), inputs.pop("tokens")], inputs)
        self.right += self.loss.on_top
        self.pairs += self.loss.queries
        return found

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the share of queries whose positive was on top since the last line, over all processes."""
        if "loss" in logs and self.pairs:
            counts = torch.tensor([self.right, self.pairs], device=self.accelerator.device)
            right, pairs = self.accelerator.reduce(counts).tolist()
            logs["positives_on_top"] = right / pairs
            self.right = self.pairs = 0
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        folder = Path(str(output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        trained = {name: weight for name, weight in self.encoder.named_parameters() if weight.requires_grad}
        save_file({name: weight.detach().contiguous() for name, weight in trained.items()}, folder / SAFE_WEIGHTS_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        state = load_file(Path(resume_from_checkpoint) / SAFE_WEIGHTS_NAME)
        self.encoder.load_state_dict(state, strict=False)  # the rest is as it was loaded
