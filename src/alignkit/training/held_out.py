"""Held-out rows: their loss during training, the weights at its lowest, an early stop, and answers to look at.

Nothing here touches training: the random state is kept and the data loader is not used, so that the weights after a
step are the same with and without held-out rows. Each of several processes measures all rows, so that none waits for
another, and then takes the main one's figure, so that all decide alike; the main one alone answers and writes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from accelerate.utils import broadcast
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainerControl, TrainerState

from alignkit.core.artifact import Artifact
from alignkit.core.config import Keep, SamplingConfig, TrainConfig
from alignkit.core.errors import UserError
from alignkit.core.journal import Journal
from alignkit.core.records import ChatExample, PreferencePair, RetrievalExample, TextExample
from alignkit.data.chat import IGNORED, EncodedExample, end_of_turn_id
from alignkit.generation.hf import decode, draw
from alignkit.training.randomness import random_state_kept

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Trainer

LOG = logging.getLogger("alignkit")

LOSS = "held_out_loss"
BEST_WEIGHTS = "best.safetensors"
"""In a checkpoint: the trainable weights at the lowest held-out loss so far."""

SHOWN_TOKENS = 32
"""Tokens of a document that it is given to go on from."""

SAMPLED_TOKENS = 128
"""Most tokens of an answer that is sampled while training."""


@dataclass(frozen=True)
class Measurement:
    """A held-out loss and the step after which it was measured."""

    step: int
    loss: float


Row = TypeVar("Row", bound=ChatExample | TextExample | PreferencePair)


def split_by_prompt(examples: Sequence[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Examples to train on, and those of a share (rounded) of the distinct prompts, drawn by `seed`.

    All examples with one prompt fall on the same side: the answer to a held-out prompt has not been trained on. The
    prompt of a document is its text. Raises `UserError` when a share leaves one side empty.
    """
    keys = [prompt_key(example) for example in examples]
    distinct = list(dict.fromkeys(keys))
    chosen = set(Random(seed).sample(distinct, round(share * len(distinct))))
    sides: tuple[list[Row], list[Row]] = ([], [])
    for example, key in zip(examples, keys, strict=True):
        sides[key in chosen].append(example)
    _require_both(sides, share)
    return sides


def split_by_query(
    examples: Sequence[RetrievalExample], share: float, seed: int
) -> tuple[list[RetrievalExample], list[RetrievalExample]]:
    """Rows to train on, and those of a share (rounded) of each task's queries, drawn by `seed`.

    All rows with one `query_id` of a task fall on the same side. Raises `UserError` when a share leaves one side empty.
    """
    chosen: set[tuple[str, str]] = set()
    for task in dict.fromkeys(example.task for example in examples):
        queries = list(dict.fromkeys(example.query_id for example in examples if example.task == task))
        drawn = Random(f"{seed} {task}").sample(queries, round(share * len(queries)))
        chosen |= {(task, query) for query in drawn}
    sides: tuple[list[RetrievalExample], list[RetrievalExample]] = ([], [])
    for example in examples:
        sides[(example.task, example.query_id) in chosen].append(example)
    _require_both(sides, share)
    return sides


def _require_both(sides: tuple[Sequence[Any], Sequence[Any]], share: float) -> None:
    if share and not all(sides):
        raise UserError(
            f"held_out_share={share} leaves {len(sides[0])} rows to train on and {len(sides[1])} held out; change it, "
            "or give more data"
        )


def prompt_key(example: ChatExample | TextExample | PreferencePair) -> str:
    """The same for rows with the same prompt."""
    if isinstance(example, TextExample):
        return example.text
    return "\n".join(message.model_dump_json() for message in example.prompt)


def measurements(history: Sequence[Mapping[str, Any]]) -> list[Measurement]:
    """The held-out losses in a trainer's log history."""
    return [Measurement(entry["step"], entry[LOSS]) for entry in history if LOSS in entry]


def best_of(measured: Sequence[Measurement]) -> Measurement:
    """The measurement with the lowest loss, the first of equals."""
    return min(measured, key=lambda each: each.loss)


def without_improvement(measured: Sequence[Measurement]) -> int:
    """How many measurements have been made since the one with the lowest loss."""
    return len(measured) - 1 - measured.index(best_of(measured)) if measured else 0


class HeldOut(TrainerCallback):
    """Measure the held-out rows' loss every `eval_steps` steps and after the last one, and act on it."""

    def __init__(
        self,
        trainer: Trainer,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[EncodedExample],
        train: TrainConfig,
        artifact: Artifact,
    ) -> None:
        self._trainer = trainer
        self._tokenizer = tokenizer
        self._rows = rows
        self._train = train
        self._artifact = artifact
        self._best: dict[str, torch.Tensor] = {}
        self._journal = Journal(artifact.work_folder / "samples.jsonl", artifact.fingerprint)
        every = math.ceil(train.eval_steps / train.logging_steps) * train.logging_steps
        self._every = every or math.inf

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take up the best weights of the checkpoint from which the run continues."""
        kept = Path(args.output_dir) / f"checkpoint-{state.global_step}" / BEST_WEIGHTS
        if kept.exists():
            self._best = load_file(kept)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure when it is time; keep the weights when they are the best so far; stop when patience ends."""
        if state.global_step % self._every and state.global_step < state.max_steps:
            return
        wants_log = control.should_log
        with random_state_kept():
            model = self._model.eval()
            self._trainer.log({LOSS: self._loss()})
            if self._artifact.writes:
                self._answer(state.global_step)
            model.train()
        control.should_log = wants_log  # which the log line of the held-out loss has taken for served
        measured = measurements(state.log_history)
        LOG.info("held-out loss %.4f after step %d", measured[-1].loss, state.global_step)
        if self._train.keep is Keep.best and best_of(measured).step == state.global_step:
            self._best = {name: weight.detach().cpu().clone() for name, weight in self._trainable().items()}
        if self._train.patience and without_improvement(measured) >= self._train.patience:
            control.should_training_stop = True
            control.should_save = False  # from a checkpoint of this step a killed run would train on

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the best weights into the checkpoint, before it is sealed."""
        if self._best and state.is_world_process_zero:
            save_file(self._best, Path(args.output_dir) / f"checkpoint-{state.global_step}" / BEST_WEIGHTS)

    def finish(self) -> list[dict[str, Any]]:
        """After training: load the best weights if they are to be kept; returns the rows of samples.jsonl.

        There are none but in the process that writes.
        """
        measured = measurements(self._trainer.state.log_history)
        best, last = best_of(measured), measured[-1]
        kept = best if self._train.keep is Keep.best else last
        LOG.info("kept: the weights of step %d, held-out loss %.4f", kept.step, kept.loss)
        with torch.no_grad():
            for name, weight in self._trainable().items():
                if self._train.keep is Keep.best:
                    weight.copy_(self._best[name])
        self._artifact.metrics["held_out"] = {
            "rows": len(self._rows),
            "loss": kept.loss,
            "lowest_loss": best.loss,
            "lowest_loss_step": best.step,
            "kept_step": kept.step,
            "stopped_early": last.step < self._trainer.state.max_steps,
        }
        if not self._artifact.writes:
            return []
        with self._journal as journal:
            return list(journal.done.values())

    @property
    def _model(self) -> torch.nn.Module:
        """The model without what exchanges gradients around it: the processes need not go in step."""
        model = self._trainer.model
        assert model is not None
        return model

    def _trainable(self) -> dict[str, torch.nn.Parameter]:
        return {name: weight for name, weight in self._model.named_parameters() if weight.requires_grad}

    @torch.no_grad()
    def _loss(self) -> float:
        """Mean of -log p over all learned tokens of the held-out rows."""
        total, count = 0.0, 0
        size = self._trainer.args.per_device_eval_batch_size
        by_length = sorted(self._rows, key=lambda row: len(row.input_ids), reverse=True)
        for first in range(0, len(by_length), size):
            batch = [{"input_ids": r.input_ids, "labels": r.labels} for r in by_length[first : first + size]]
            inputs = self._trainer._prepare_inputs(self._trainer.data_collator(batch))
            learned = int((inputs["labels"][..., 1:] != IGNORED).sum())
            loss = self._trainer.compute_loss(self._model, inputs)
            assert isinstance(loss, torch.Tensor)
            total += learned * float(loss)
            count += learned
        mean = torch.tensor(total / count, dtype=torch.float64, device=self._trainer.args.device)
        return float(broadcast(mean))

    def _answer(self, step: int) -> None:
        """Let the model answer the first held-out prompts, or go on with the first documents, greedily."""
        greedy = SamplingConfig(n=1, temperature=[0.0, 0.0], top_p=[1.0, 1.0], max_new_tokens=SAMPLED_TOKENS)
        with self._journal as journal:
            for place, row in enumerate(self._rows[: self._train.sample_prompts]):
                is_document = row.document_end is not None
                end = row.document_end if row.document_end is not None else end_of_turn_id(self._tokenizer)
                learned_from = next(place for place, label in enumerate(row.labels) if label != IGNORED)
                prompt = row.input_ids[: SHOWN_TOKENS if is_document else learned_from]
                (tokens,) = decode(
                    self._trainer.model,
                    [prompt],
                    draw(1, greedy, seed=0),
                    end_id=end,
                    pad_id=int(self._tokenizer.pad_token_id),
                )
                texts = [self._tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt, tokens)]
                journal.add(f"{step}/{place}", {"step": step, "prompt": texts[0], "text": texts[1]})
