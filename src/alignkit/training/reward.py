"""Reward training: the better answer shall score higher (Bradley and Terry, 1952; Ouyang et al., 2022).

Written over transformers' Trainer rather than TRL's RewardTrainer, which reads every pair as two conversations of
their own: a prompt with k answers and all its k (k - 1) / 2 pairs is then read k (k - 1) times. Here a row is a prompt
with all its answers, each answer is read once, the prompt once for all of them, and the loss takes all pairs of the
row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainingArguments
from transformers.utils import SAFE_WEIGHTS_NAME

from alignkit.core.artifact import Artifact
from alignkit.core.config import TrainConfig
from alignkit.models.reward_model import RewardModel, encode_answers
from alignkit.models.value_head import PromptGroup, ValueHeadModel, collate
from alignkit.training.arguments import trainer_arguments
from alignkit.training.batches import StepTrainer
from alignkit.training.checkpoints import checkpoint_folder
from alignkit.training.fit import fit, trainable_in_float32
from alignkit.training.reward_data import AnswerGroup, Comparison

UNKNOWN = float("nan")
"""The target of an answer without a grade."""


@dataclass(frozen=True)
class Objective:
    """Bradley-Terry, and two terms that are off at 0.

    `margin_weight`: demand a score difference of this times the grader's margin (Touvron et al., 2023, arXiv
    2307.09288, equation 2). `regress_weight`: weight of the squared distance between score and standardised grade.
    """

    margin_weight: float = 0.0
    regress_weight: float = 0.0


@dataclass(frozen=True)
class EncodedGroup:
    """A row of training: prompt and answers as tokens, the comparisons between them, grades, and targets or NaN."""

    source: str
    prompt_key: str
    tokens: PromptGroup
    comparisons: tuple[Comparison, ...]
    grades: tuple[float | None, ...]
    targets: tuple[float, ...]


def bradley_terry_loss(better: Tensor, worse: Tensor, margin: Tensor | float, weight: Tensor) -> Tensor:
    """Sum over pairs of weight * -log sigmoid(better - worse - margin).

    `better` and `worse` are the scores of the answers, `margin` the demanded differences, and all weights sum to 1;
    each [pairs].
    """
    return -(weight * torch.nn.functional.logsigmoid(better - worse - margin)).sum()


def regression_loss(scores: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    """Sum over answers of weight * (score - target)^2, each [answers]; answers whose target is NaN count nothing."""
    known = ~targets.isnan()
    return (weight[known] * (scores[known] - targets[known]).square()).sum()


def encode_group(
    tokenizer: Any, group: AnswerGroup, max_length: int, mean: float = 0.0, deviation: float = 1.0
) -> tuple[EncodedGroup | None, dict[str, str]]:
    """A group as tokens, and answer -> reason for answers that cannot be read; None when no comparison is left.

    Targets are (grade - `mean`) / `deviation`.
    """
    prompt, encoded = encode_answers(tokenizer, group.prompt, group.answers, max_length)
    kept = [place for place, ids in enumerate(encoded) if not isinstance(ids, str)]
    dropped = {group.answers[place]: ids for place, ids in enumerate(encoded) if isinstance(ids, str)}
    new_place = {old: new for new, old in enumerate(kept)}
    comparisons = tuple(
        Comparison(new_place[each.better], new_place[each.worse], each.margin)
        for each in group.comparisons
        if each.better in new_place and each.worse in new_place
    )
    if not comparisons:
        return None, dropped
    tokens = PromptGroup(prompt, tuple(ids for ids in encoded if not isinstance(ids, str)))
    grades = tuple(group.grades[place] for place in kept)
    targets = tuple(UNKNOWN if grade is None else (grade - mean) / deviation for grade in grades)
    return EncodedGroup(group.source, group.prompt_key, tokens, comparisons, grades, targets), dropped


def train_reward_model(
    reward_model: RewardModel,
    groups: Sequence[EncodedGroup],
    objective: Objective,
    train: TrainConfig,
    seed: int,
    artifact: Artifact,
) -> list[dict[str, float]]:
    """Train adapter and value head in place; returns the rows of loss.jsonl.

    A batch of `train.batch_size` counts prompts.
    """
    arguments = trainer_arguments(
        TrainingArguments,
        train,
        checkpoint_folder(artifact),
        rows=len(groups),
        seed=seed,
        dtype=reward_model.module.policy.dtype,
        remove_unused_columns=False,
    )
    with trainable_in_float32(reward_model.module, artifact):
        trainer = _Trainer(
            reward_model.module,
            list(groups),
            objective,
            args=arguments,
            data_collator=_Collator(reward_model.tokenizer.pad_token_id, reward_model.model.max_length),
        )
    return fit(trainer, artifact, train, "reward")


def ranked_right(groups: Sequence[EncodedGroup], scores: Sequence[Sequence[float]]) -> list[list[bool]]:
    """For each comparison of each group, whether the better answer scores higher; `scores` are those of its answers."""
    return [
        [row[each.better] > row[each.worse] for each in group.comparisons]
        for group, row in zip(groups, scores, strict=True)
    ]


class _Collator:
    """Groups -> the inputs of the model, and the places of better and worse answers among the batch's answers.

    Every prompt has the same weight, shared equally by its pairs (Ouyang et al., 2022, equation 1): otherwise a prompt
    with many pairs would count for many, and the loss would depend on how a step is cut into batches.
    """

    def __init__(self, pad_id: int, max_length: int) -> None:
        self.pad_id = pad_id
        self.max_length = max_length

    def __call__(self, groups: Sequence[EncodedGroup]) -> dict[str, Tensor]:
        inputs = collate([part for group in groups for part in group.tokens.split(self.max_length)], self.pad_id)
        pairs: list[tuple[int, int]] = []
        first = 0
        for group in groups:
            pairs += [(first + each.better, first + each.worse) for each in group.comparisons]
            first += len(group.tokens.answers)
        return inputs | {
            "pairs": torch.tensor(pairs),
            "margins": torch.tensor([each.margin or 0.0 for group in groups for each in group.comparisons]),
            "pair_weights": _weights([len(group.comparisons) for group in groups]),
            "targets": torch.tensor([target for group in groups for target in group.targets]),
            "answer_weights": _weights([len(group.targets) for group in groups]),
        }


def _weights(counts: Sequence[int]) -> Tensor:
    """A weight for each member of groups of these sizes: groups weigh the same, and all weights sum to 1."""
    return torch.tensor([1 / (len(counts) * count) for count in counts for _ in range(count)])


class _Trainer(StepTrainer):
    """The loss of a batch of groups, and checkpoints without the frozen base."""

    objective: Objective

    def __init__(
        self, module: ValueHeadModel, groups: list[EncodedGroup], objective: Objective, **keywords: Any
    ) -> None:
        super().__init__(model=module, train_dataset=groups, **keywords)
        self.module = module
        self.groups = groups
        self.objective = objective
        self.right = self.pairs = 0

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Bradley-Terry over all pairs of the batch, and regression when it is on."""
        pairs, margins = inputs.pop("pairs"), inputs.pop("margins")
        pair_weights, answer_weights = inputs.pop("pair_weights"), inputs.pop("answer_weights")
        targets = inputs.pop("targets")
        scores: Tensor = model(**inputs)
        better, worse = scores[pairs[:, 0]], scores[pairs[:, 1]]
        self.right += int((better > worse).sum())
        self.pairs += len(pairs)
        loss = bradley_terry_loss(better, worse, self.objective.margin_weight * margins, pair_weights)
        if self.objective.regress_weight:
            loss = loss + self.objective.regress_weight * regression_loss(scores, targets, answer_weights)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the pair accuracy since the last line, over all processes."""
        if "loss" in logs and self.pairs:
            counts = torch.tensor([self.right, self.pairs], device=self.accelerator.device)
            right, pairs = self.accelerator.reduce(counts).tolist()
            logs["rewards/accuracies"] = right / pairs
            self.right = self.pairs = 0
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        trained = {name for name, weight in self.module.named_parameters() if weight.requires_grad}
        state = {name: weight for name, weight in self.module.state_dict().items() if name in trained}
        super()._save(output_dir, state_dict=state)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        state = load_file(Path(resume_from_checkpoint) / SAFE_WEIGHTS_NAME)
        self.module.load_state_dict(state, strict=False)  # the rest is the frozen base

    def row_lengths(self) -> list[int]:
        """Tokens of each prompt with all its answers."""
        return [len(group.tokens) for group in self.groups]
