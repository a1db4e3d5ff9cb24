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
from alignkit.models.conversations import encode_answers
from alignkit.models.reward_model import RewardModel
from alignkit.models.value_head import PromptGroup, ValueHeadModel, collate
from alignkit.training.arguments import trainer_arguments
from alignkit.training.batches import StepTrainer
from alignkit.training.checkpoints import checkpoint_folder
from alignkit.training.fit import fit, trainable_in_float32
from alignkit.training.judges import JudgeScales, grade_statistics, regression_loss
from alignkit.training.reward_data import AnswerGroup, Comparison

UNKNOWN = float("nan")
"""The target of an answer without a grade."""


@dataclass(frozen=True)
class Objective:
    """Bradley-Terry, and three terms that are off at 0.

    `margin_weight`: demand a score difference of this times the grader's margin (Touvron et al., 2023, arXiv
    2307.09288, equation 2). `regress_weight`: weight of the squared distance between an answer's grade and what its
    score stands for with this judge (`training.judges`). `center_weight`: weight of the squared sum of a pair's scores
    (Eisenstein et al., 2023, arXiv 2312.09244, equation 2), which keeps scores of all prompts around 0.
    """

    margin_weight: float = 0.0
    regress_weight: float = 0.0
    center_weight: float = 0.0


@dataclass(frozen=True)
class EncodedGroup:
    """A row of training: prompt and answers as tokens, the comparisons between them, grades, and who gave them."""

    source: str
    prompt_key: str
    tokens: PromptGroup
    comparisons: tuple[Comparison, ...]
    grades: tuple[float | None, ...]
    judge: str = ""
    weights: tuple[float, ...] = (1.0,)
    """How much the prompt counts, for each head."""


def bradley_terry_loss(better: Tensor, worse: Tensor, margin: Tensor | float, weight: Tensor) -> Tensor:
    """Sum over pairs of weight * -log sigmoid(better - worse - margin).

    `better` and `worse` are the scores of the answers, `margin` the demanded differences, and all weights sum to 1;
    each [pairs], or [pairs, heads].
    """
    return -(weight * torch.nn.functional.logsigmoid(better - worse - margin)).sum()


def centering_loss(better: Tensor, worse: Tensor, weight: Tensor) -> Tensor:
    """Sum over pairs of weight * (better + worse)^2, with the arguments of `bradley_terry_loss`."""
    return (weight * (better + worse).square()).sum()


def encode_group(
    tokenizer: Any,
    group: AnswerGroup,
    max_length: int,
    weights: tuple[float, ...] = (1.0,),
    *,
    pointwise: bool = False,
) -> tuple[EncodedGroup | None, dict[str, str]]:
    """A group as tokens, and answer -> reason for answers that cannot be read; None when nothing is left to learn.

    That is a comparison or, if grades are learned `pointwise`, a graded answer. `weights` say how much the group counts
    for each head.
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
    grades = tuple(group.grades[place] for place in kept)
    if not comparisons and not (pointwise and any(grade is not None for grade in grades)):
        return None, dropped
    tokens = PromptGroup(prompt, tuple(ids for ids in encoded if not isinstance(ids, str)))
    row = EncodedGroup(group.source, group.prompt_key, tokens, comparisons, grades, group.judge, weights)
    return row, dropped


def train_reward_model(
    reward_model: RewardModel,
    groups: Sequence[EncodedGroup],
    objective: Objective,
    train: TrainConfig,
    seed: int,
    artifact: Artifact,
    head_learning_rate: float | None = None,
) -> list[dict[str, float]]:
    """Train adapter and value head in place; returns the rows of loss.jsonl.

    A batch of `train.batch_size` counts prompts. The head learns with `head_learning_rate`, or else like the adapter.
    With regression the scale and the offset of each judge come into `metrics.judges`.
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
    module = reward_model.module
    judges = None
    if objective.regress_weight:
        grades = ((group.judge, grade) for group in groups for grade in group.grades if grade is not None)
        judges = JudgeScales(grade_statistics(grades), module.value_head.weight.device)
        module.add_module("judges", judges)  # of the model for as long as it learns: optimizer, checkpoints, checks
    with trainable_in_float32(module, artifact):
        trainer = _Trainer(
            module,
            list(groups),
            objective,
            head_learning_rate=head_learning_rate,
            args=arguments,
            judges=judges,
            data_collator=_Collator(reward_model.tokenizer.pad_token_id, reward_model.model.max_length, judges),
        )
    losses = fit(trainer, artifact, train, "reward")
    if judges is not None:
        artifact.metrics["judges"] = judges.describe()
        del module.judges
    return losses


def ranked_right(groups: Sequence[EncodedGroup], scores: Sequence[Sequence[float]]) -> list[list[bool]]:
    """For each comparison of each group, whether the better answer scores higher; `scores` are those of its answers."""
    return [
        [row[each.better] > row[each.worse] for each in group.comparisons]
        for group, row in zip(groups, scores, strict=True)
    ]


class _Collator:
    """Groups -> the inputs of the model, and the places of better and worse answers among the batch's answers.

    Every prompt of a source has the same weight, shared equally by its pairs (Ouyang et al., 2022, equation 1):
    otherwise a prompt with many pairs would count for many, and the loss would depend on how a step is cut into
    batches.
    """

    def __init__(self, pad_id: int, max_length: int, judges: JudgeScales | None = None) -> None:
        self.pad_id = pad_id
        self.max_length = max_length
        self.judges = judges

    def __call__(self, groups: Sequence[EncodedGroup]) -> dict[str, Tensor]:
        inputs = collate([part for group in groups for part in group.tokens.split(self.max_length)], self.pad_id)
        pairs: list[tuple[int, int]] = []
        first = 0
        for group in groups:
            pairs += [(first + each.better, first + each.worse) for each in group.comparisons]
            first += len(group.tokens.answers)
        margins = [each.margin or 0.0 for group in groups for each in group.comparisons]
        inputs |= {
            "pairs": torch.tensor(pairs, dtype=torch.long).reshape(-1, 2),
            "margins": torch.tensor(margins).reshape(-1, 1),
            "pair_weights": _weights(groups, [len(group.comparisons) for group in groups]),
        }
        return inputs if self.judges is None else inputs | self._grades(groups, self.judges)

    def _grades(self, groups: Sequence[EncodedGroup], judges: JudgeScales) -> dict[str, Tensor]:
        grades = [(group.judge, grade) for group in groups for grade in group.grades]
        return {
            "targets": torch.tensor([[UNKNOWN if g is None else judges.standardised(judge, g)] for judge, g in grades]),
            "answer_judges": torch.tensor([judges.places.get(judge, 0) for judge, _ in grades]),
            "answer_weights": _weights(groups, [len(group.grades) for group in groups]),
        }


def _weights(groups: Sequence[EncodedGroup], counts: Sequence[int]) -> Tensor:
    """A weight [members, heads] for each of the groups' members, of which they have so many.

    Groups weigh as they say, divided by the number of groups and of heads: with one head and no weights all sum to 1.
    """
    heads = len(groups[0].weights)
    weights = [
        [weight / (len(groups) * count * heads) for weight in group.weights]
        for group, count in zip(groups, counts, strict=True)
        for _ in range(count)
    ]
    return torch.tensor(weights).reshape(-1, heads)


class _Trainer(StepTrainer):
    """The loss of a batch of groups, and checkpoints without the frozen base."""

    objective: Objective

    def __init__(
        self,
        module: ValueHeadModel,
        groups: list[EncodedGroup],
        objective: Objective,
        *,
        head_learning_rate: float | None = None,
        judges: JudgeScales | None = None,
        **keywords: Any,
    ) -> None:
        super().__init__(model=module, train_dataset=groups, **keywords)
        self.module = module
        self.groups = groups
        self.objective = objective
        self.head_learning_rate = head_learning_rate
        self.judges = judges
        self.right = self.pairs = 0

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The value head apart from the rest where it has a learning rate of its own."""
        optimizer = super().create_optimizer(model)
        if self.head_learning_rate is not None:
            head = self.module.value_head.weight
            for group in optimizer.param_groups:
                group["params"] = [weight for weight in group["params"] if weight is not head]
            decay = self.args.weight_decay
            optimizer.add_param_group({"params": [head], "lr": self.head_learning_rate, "weight_decay": decay})
        return optimizer

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Bradley-Terry over all pairs of the batch and all heads; centering and regression when they are on."""
        pairs, margins, pair_weights = inputs.pop("pairs"), inputs.pop("margins"), inputs.pop("pair_weights")
        graded = {name: inputs.pop(name) for name in ("targets", "answer_judges", "answer_weights") if name in inputs}
        scores: Tensor = model(**inputs)
        better, worse = scores[pairs[:, 0]], scores[pairs[:, 1]]
        self.right += int((better.mean(dim=1) > worse.mean(dim=1)).sum())
        self.pairs += len(pairs)
        loss = bradley_terry_loss(better, worse, self.objective.margin_weight * margins, pair_weights)
        if self.objective.center_weight:
            loss = loss + self.objective.center_weight * centering_loss(better, worse, pair_weights)
        if self.judges is not None:
            predicted = self.judges(scores, graded["answer_judges"])
            distance = regression_loss(predicted, graded["targets"], graded["answer_weights"])
            loss = loss + self.objective.regress_weight * distance
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
