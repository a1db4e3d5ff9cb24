"""Log-probabilities of whole answers under the model as it stands: exact, without gradients, hardly any padding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from trl import DPOTrainer

from alignkit.core.progress import progress
from alignkit.core.ranks import is_main, rank, world_size
from alignkit.data.chat import IGNORED
from alignkit.training.batches import parts


class Answer(NamedTuple):
    """Token ids of a prompt and of one answer to it, with its end-of-turn token."""

    prompt_ids: list[int]
    answer_ids: list[int]

    @property
    def tokens(self) -> int:
        """Of both."""
        return len(self.prompt_ids) + len(self.answer_ids)


def answer_log_probs(
    trainer: DPOTrainer,
    answers: Sequence[Answer],
    description: str,
    keep: Callable[[Mapping[int, float]], None] | None = None,
) -> list[float]:
    """log p(answer | prompt) of each, in nats, the sum over its tokens, with the adapter that is active.

    Answers are read in batches of similar length, no larger than a batch of the training. Several processes share the
    batches, and each returns all values. `keep` is called in the main process after every round of batches with what
    is new, place in `answers` -> value, so that nothing of it is lost if the next round is killed.
    """
    found: dict[int, float] = {}
    batches = _batches(trainer, answers)
    rounds = range(0, len(batches), world_size())
    for first in progress(rounds, description) if is_main() and rounds else rounds:
        own = batches[first + rank()] if first + rank() < len(batches) else []
        values = _read(trainer, [answers[place] for place in own]) if own else []
        new = dict(pair for each in gather_object([list(zip(own, values, strict=True))]) for pair in each)
        if keep is not None and is_main():
            keep(new)
        found.update(new)
    return [found[place] for place in range(len(answers))]


def _batches(trainer: DPOTrainer, answers: Sequence[Answer]) -> list[list[int]]:
    """Places of answers that are read at once: as many tokens as the sides of a training batch can have."""
    if not answers:
        return []
    order = sorted(range(len(answers)), key=lambda place: answers[place].tokens)
    lengths = [answers[place].tokens for place in order]
    at_once = 2 * trainer.args.per_device_eval_batch_size * lengths[-1]
    return [order[part] for part in parts(lengths, at_once)]


@torch.no_grad()
def _read(trainer: DPOTrainer, answers: Sequence[Answer]) -> list[float]:
    """One batch, with the arithmetic that the trainer has for a training batch."""
    model: Any = trainer.model
    collator: Any = trainer.data_collator
    pad_id, longest = collator.pad_token_id, max(answer.tokens for answer in answers)
    ids = [answer.prompt_ids + answer.answer_ids for answer in answers]
    labels = [[IGNORED] * len(answer.prompt_ids) + answer.answer_ids for answer in answers]
    columns = {
        "input_ids": [row + [pad_id] * (longest - len(row)) for row in ids],
        "attention_mask": [[1] * len(row) + [0] * (longest - len(row)) for row in ids],
        "labels": [row + [IGNORED] * (longest - len(row)) for row in labels],
    }
    batch = {name: torch.tensor(rows, device=trainer.accelerator.device) for name, rows in columns.items()}
    model.eval()
    with trainer.compute_loss_context_manager():
        log_probs: torch.Tensor = model(**batch, use_cache=False, fused_lm_head=True).log_probs
    return [float(value) for value in log_probs.sum(dim=1).tolist()]
