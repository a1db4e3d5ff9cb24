"""retriever: train an encoder to find the passages that answer a query, or that help a language model to answer it.

An optimizer step has rows of one task, and every passage of the step competes with the others for each query. What is
learned of a task - the positive before the others, a teacher's scores, or both - is set task by task; the recipes of
LLM-Embedder are options. Held-out queries show whether it helped. What is written is a plain sentence-transformers
folder, with the tasks' instructions as its prompts. A run that was interrupted continues with the same command.
docs/retriever.md has the rest.

Reads:   data.path, also: rows with query, pos, neg, task, and maybe teacher_scores (LLM-Embedder's format), or
         HotpotQA's rows
         encoder.path: a sentence-transformers model or a plain encoder, or `new` for one that is made from nothing
Writes:  model/, as SentenceTransformer("runs/<run>/retriever/model") reads it
         start/, with encoder=new: the encoder before training, to compare with
         held_out_ndcg.jsonl: of each held-out query its nDCG@10 before and after
         loss.jsonl, dropped.jsonl

Overrides people use:
  data.path=mine.jsonl task=qa              the rows, and the task of those that name none
  encoder=bge_base_en                       which encoder to start from
  retriever_recipe=multi_task               one of LLM-Embedder's recipes, for these tasks
  'tasks={qa: {distill_weight: 1, distill: stable}}'   what is learned for a task
  objective.negatives=teacher_highest       for all tasks that `tasks` does not name
  negatives=7 temperature=0.01              the group of a row, and how sharp the contrast is
  tuning=lora lora.rank=16                  train an adapter, which is merged before saving
  train.batch_size=8 train.gradient_accumulation=4     32 rows compete, 8 at a time go through the encoder
  resume=true                               continue an interrupted run, and refuse to begin a new one

Examples:
  python -m alignkit.retriever data.path=hotpotqa.jsonl task=qa
  python -m alignkit.retriever +encoder=bge_base_en +retriever_recipe=multi_task data.path=qa.jsonl also=[tool.jsonl]
  torchrun --nproc_per_node 8 -m alignkit.retriever +encoder=bge_base_en data.path=qa.jsonl +retriever_recipe=nq
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, Optional

from alignkit.core.artifact import Artifact
from alignkit.core.config import (
    DistributedConfig,
    HardwareConfig,
    LoraConfig,
    LoraInit,
    ModelConfig,
    RowsConfig,
    StageConfig,
    TrainConfig,
)
from alignkit.core.errors import UserError
from alignkit.core.records import RetrievalExample
from alignkit.core.retriever_config import NEW, EncoderConfig, TaskConfig

if TYPE_CHECKING:
    from pathlib import Path

LOG = logging.getLogger("alignkit")

RELOAD_TOLERANCE = 1e-5
_CHECKED_TEXTS = 32


class Similarity(Enum):
    """How a query and a passage are compared; the saved encoder says so, too."""

    cosine = "cosine"
    dot = "dot"


class Tuning(Enum):
    """What is trained: all weights, or a low-rank adapter on the linear layers."""

    full = "full"
    lora = "lora"


@dataclass
class RetrieverConfig(StageConfig):
    """Configuration of `retriever`."""

    inputs: ClassVar[tuple[str, ...]] = ("data.path", "also", "encoder.path")

    data: RowsConfig = field(default_factory=RowsConfig)
    also: list[str] = field(default_factory=list)
    """More files of rows, of the same task or of others."""
    task: Optional[str] = None  # noqa: UP045
    """The task of rows that name none; without it such a row is an error."""
    objective: TaskConfig = field(default_factory=TaskConfig)
    """What is learned for every task that `tasks` does not name."""
    tasks: dict[str, TaskConfig] = field(default_factory=dict)
    """What is learned for a task, by its name."""
    negatives: int = 7
    """Negatives of a row besides the passages of the other rows."""
    temperature: float = 0.05
    """Similarities are divided by this."""
    similarity: Similarity = Similarity.cosine
    task_temperature: float = 1.0
    """1: a task has as many steps as it has rows; a larger one evens the tasks out."""
    across_processes: bool = True
    """With torchrun: the passages of all processes compete, not only those of one."""
    held_out_share: float = 0.1
    """Share of each task's queries that is not trained on."""
    tuning: Tuning = Tuning.full
    resume: bool = False
    """Continue an interrupted run of exactly this configuration; an error when there is none."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    """`none` and `ddp` alone: an encoder is small enough for one GPU."""
    hardware: HardwareConfig = field(default_factory=HardwareConfig)

    def __post_init__(self) -> None:
        """Raise `UserError` for numbers that mean nothing."""
        if self.negatives < 0:
            raise UserError(f"negatives={self.negatives}: must be 0 or more")
        for name in ("temperature", "task_temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{name}={getattr(self, name)}: must be above 0")
        if not 0 <= self.held_out_share < 1:
            raise UserError(f"held_out_share={self.held_out_share}: must be at least 0 and below 1")
        if self.tuning is Tuning.lora and self.lora.init is LoraInit.pissa:
            raise UserError("lora.init=pissa: only sft has it, leave it out here")


def run(config: RetrieverConfig) -> Artifact:
    """Read and sift the rows, hold queries out, train, measure before and after, save, and check what was saved."""
    artifact = Artifact.open("retriever", config)
    from alignkit.training.checkpoints import require_checkpoint

    if config.resume:
        require_checkpoint(artifact)
    with artifact:
        if artifact.up_to_date:
            return artifact
        from alignkit.evaluation.retriever_gain import gains, ndcg_of_each
        from alignkit.training.arguments import refuse_what_only_sft_has
        from alignkit.training.distributed import require_possible
        from alignkit.training.encoder import add_adapter, load_encoder, merge_adapter, save_encoder
        from alignkit.training.held_out import split_by_query
        from alignkit.training.retriever import train_retriever
        from alignkit.training.tracking import require_tracker

        refuse_what_only_sft_has(config.train)
        require_tracker(config.train.tracker)
        require_possible("retriever", ModelConfig(config.encoder.name), config.train, config.distributed)
        examples, tasks = read(config, artifact)
        train, held_out = split_by_query(examples, config.held_out_share, config.seed)
        train = sift(config, train, tasks, artifact)
        cosine = config.similarity is Similarity.cosine
        texts = (text for each in train for text in (each.query, *each.pos, *each.neg))
        encoder = load_encoder(config.encoder, texts, config.seed, cosine=cosine)
        before = ndcg_of_each(encoder, held_out, tasks) if artifact.writes else {}
        if artifact.writes and config.encoder.path == NEW:
            with artifact.output("start") as folder:
                save_encoder(encoder, folder, tasks)

        if config.tuning is Tuning.lora:
            add_adapter(encoder, config.lora, config.seed)
        losses = train_retriever(
            encoder,
            train,
            tasks,
            config.train,
            config.encoder,
            seed=config.seed,
            artifact=artifact,
            negatives=config.negatives,
            temperature=config.temperature,
            task_temperature=config.task_temperature,
            cosine=cosine,
            across_processes=config.across_processes,
        )
        if not artifact.writes:
            return artifact

        merge_adapter(encoder)
        after = ndcg_of_each(encoder, held_out, tasks)
        with artifact.output("model") as folder:
            save_encoder(encoder, folder, tasks)
        check_saved(encoder, artifact, [text for each in train[:_CHECKED_TEXTS] for text in (each.query, *each.pos)])
        artifact.write_rows("loss.jsonl", losses)
        artifact.write_rows("held_out_ndcg.jsonl", measured(held_out, before, after))
        artifact.metrics |= {
            "rows": {name: sum(each.task == name for each in train) for name in tasks},
            "held_out_rows": {name: sum(each.task == name for each in held_out) for name in tasks},
            "held_out_ndcg_at_10": gains(before, after, held_out, config.seed),
        }
        artifact.summary = summary(artifact.metrics["held_out_ndcg_at_10"])
    return artifact


def read(config: RetrieverConfig, artifact: Artifact) -> tuple[list[RetrievalExample], dict[str, TaskConfig]]:
    """The rows of all files, without negatives that are positives, and what is learned for each of their tasks.

    Raises `UserError` for a task in `tasks` that no row has, and for an id that stands in two files.
    """
    from alignkit.data.sources import read_retrieval
    from alignkit.training.retrieval_data import without_false_negatives

    examples: list[RetrievalExample] = []
    where: dict[str, str] = {}
    for rows in (config.data, *(RowsConfig(path=path) for path in config.also)):
        found, dropped = read_retrieval(rows, config.task)
        artifact.drop_all(dropped)
        for example in found:
            if example.id in where:
                raise UserError(f"{rows.path}: id '{example.id}' is also in {where[example.id]}; change one of them")
            where[example.id] = rows.path
            kept, removed = without_false_negatives(example)
            examples.append(kept)
            for text in removed:
                artifact.drop({"id": example.id, "neg": text}, "a negative that is also a positive")
    names = dict.fromkeys(example.task for example in examples)
    if absent := [name for name in config.tasks if name not in names]:
        LOG.info("no row has the task %s, for which there are settings", ", ".join(absent))
    alone = sum(example.query_id == example.id for example in examples)
    if alone:
        LOG.info("%d rows have no query_id beside their id, or file and line: each is a query of its own", alone)
    artifact.metrics["rows_without_query_id"] = alone
    return examples, {name: config.tasks.get(name, config.objective) for name in names}


def sift(
    config: RetrieverConfig, examples: list[RetrievalExample], tasks: dict[str, TaskConfig], artifact: Artifact
) -> list[RetrievalExample]:
    """The rows that their task can learn from; the others are dropped with a reason."""
    from alignkit.training.retrieval_data import usable

    kept, dropped = usable(examples, tasks, config.negatives, config.seed)
    artifact.drop_all(dropped)
    few = sum(len(each.neg) < config.negatives for each in kept)
    artifact.metrics["rows_with_repeated_negatives"] = few
    if few:
        LOG.info("%d of %d rows have fewer than negatives=%d: theirs are repeated", few, len(kept), config.negatives)
    return kept


def measured(
    held_out: Sequence[RetrievalExample], before: dict[str, dict[int, float]], after: dict[str, dict[int, float]]
) -> list[dict[str, Any]]:
    """The rows of held_out_ndcg.jsonl."""
    return [
        {"id": held_out[place].id, "task": task, "before": score, "after": after[task][place]}
        for task, scores in before.items()
        for place, score in scores.items()
    ]


def check_saved(encoder: Any, artifact: Artifact, texts: list[str]) -> None:
    """The saved encoder embeds like the one in memory, has its prompts, and holds nothing but text and safetensors."""
    import numpy as np

    from alignkit.scoring.embedding import load_sentence_transformer

    folder = artifact.folder / "model"
    saved = load_sentence_transformer(str(folder), None, None)
    pairs = [each.encode(texts, prompt="", show_progress_bar=False) for each in (encoder, saved)]
    difference = float(np.abs(pairs[0] - pairs[1]).max())
    detail = f"largest difference {difference:.1e} over {len(texts)} texts"
    artifact.check("saved_embeddings_equal", difference <= RELOAD_TOLERANCE, detail)
    kept = {name: saved.prompts.get(name) for name in encoder.prompts} == encoder.prompts
    artifact.check("saved_prompts_equal", kept, ", ".join(sorted(encoder.prompts)))
    others = [str(path.relative_to(folder)) for path in _files(folder) if path.suffix in (".bin", ".pt", ".pkl")]
    artifact.check("weights_are_safetensors", not others, ", ".join(others) or "no pickled file")


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def summary(found: dict[str, Any]) -> str:
    """The key result in a few words."""
    if not found:
        return "no held-out query with a positive"
    whole = found.get("all") or next(iter(found.values()))
    before, after, gain = (whole[side] for side in ("before", "after", "gain"))
    interval = f"[{gain['low']:+.3f}, {gain['high']:+.3f}]"
    return f"nDCG@10 {before['mean']:.3f} -> {after['mean']:.3f}, gain {gain['mean']:+.3f} {interval}"


if __name__ == "__main__":
    from alignkit.core.app import stage_main

    stage_main("retriever")
