"""evaluate_reward: how good a saved reward model is, on any graded completions or preference pairs.

Measured are: the share of pairs that it ranks right, by source; whether its probabilities hold (calibration); whether
it goes by length; how far it agrees with the grader; and whether answers that are made no better score higher (probes).
`reward` measures the same on the prompts that it holds out. Prompts that the reward model was trained on are left out.
docs/reward_evaluation.md says how to read the figures.

Reads:   reward                    run folder of a reward model
         data.path                 completions with grades, or preference pairs: ours, TRL's, hh-rlhf, RewardBench
         sources                   more files of either sort, by name (optional)
Writes:  held_out_scores.jsonl     every prompt with its answers: score, length in tokens, grade
         manifest.json             metrics.held_out_accuracy by source; metrics.held_out: the rest

Overrides people use:
  reward=runs/mine/reward                     the reward model to examine
  data.path=pairs.jsonl data.limit=500        other rows: the first 500 of a file
  name=rewardbench                            a folder of its own for each file
  'sources={hh-rlhf: hh-rlhf.jsonl}'          further files, told apart in every figure
  probed_answers=0                            without the probes

Examples:
  python -m alignkit.evaluate_reward run=demo
  python -m alignkit.evaluate_reward run=mine name=rewardbench data.path=rewardbench.parquet
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from alignkit.core.artifact import Artifact
from alignkit.core.config import RowsConfig, StageConfig
from alignkit.core.errors import UserError

if TYPE_CHECKING:
    from alignkit.training.reward_data import AnswerGroup

LOG = logging.getLogger("alignkit")


@dataclass
class EvaluateRewardConfig(StageConfig):
    """Configuration of `evaluate_reward`."""

    inputs: ClassVar[tuple[str, ...]] = ("reward", "data.path", "sources")

    reward: str = ""
    """Run folder of the reward model."""
    data: RowsConfig = field(default_factory=RowsConfig)
    sources: dict[str, str] = field(default_factory=dict)
    """More files to measure on, each by the name of its source: graded completions, or pairs."""
    min_margin: float = 1.0
    """Smallest difference of two grades that makes a pair."""
    pairs_per_prompt: int = 16
    probed_answers: int = 100
    """How many best answers are made no better to see whether their scores rise; 0: none."""
    allow_training_prompts: bool = False
    """Measure on prompts, too, that the reward model was trained on."""


def run(config: EvaluateRewardConfig) -> Artifact:
    """Read prompts that the model was not trained on, score their answers, and measure."""
    with Artifact.open("evaluate_reward", config) as artifact:
        if artifact.up_to_date:
            return artifact
        from alignkit.evaluation.reward_examination import check_invariance, checked_conversations, examine
        from alignkit.models.reward_model import RewardModel
        from alignkit.scoring.reward import require_reward_model

        require_reward_model(config.reward)
        groups = leave_out_trained(config, read_groups(config, artifact), artifact)
        reward_model = RewardModel.from_pretrained(config.reward)
        unreadable = examine(reward_model, groups, artifact, probed_answers=config.probed_answers, seed=config.seed)
        for group, answer, reason in unreadable:
            prompt = [message.model_dump() for message in group.prompt]
            artifact.drop({"id": group.id, "prompt": prompt, "answer": answer}, reason.split(" (")[0], reason)
        if not artifact.metrics["held_out_accuracy"]:
            raise UserError(
                f"no pair can be scored: the reward model reads {reward_model.model.max_length} tokens, and "
                f"{len(unreadable)} answers were dropped (see dropped.jsonl)"
            )
        check_invariance(reward_model, checked_conversations(groups), artifact)
        artifact.summary = summary(artifact)
    return artifact


def read_groups(config: EvaluateRewardConfig, artifact: Artifact) -> list[AnswerGroup]:
    """Prompts with their answers and comparisons, from graded completions and from preference pairs."""
    from alignkit.data.sources import read_graded_or_preferences
    from alignkit.training.reward_data import LeftOut, groups_of

    groups: list[AnswerGroup] = []
    left_out = LeftOut()
    files = {"": config.data} | {name: RowsConfig(path=path) for name, path in config.sources.items()}
    for name, rows in files.items():
        graded, pairs, unusable = read_graded_or_preferences(rows)
        found, without_pair = groups_of(
            name,
            graded,
            pairs,
            min_margin=config.min_margin,
            pairs_per_prompt=config.pairs_per_prompt,
            seed=config.seed,
            left_out=left_out,
        )
        groups += found
        artifact.drop_all(unusable + without_pair)
    artifact.metrics |= left_out.describe()
    if not groups:
        reasons = "; ".join(f"{count} x {reason}" for reason, count in artifact.dropped.most_common())
        raise UserError(f"data.path={config.data.path}: there is no pair to measure on ({reasons}); see dropped.jsonl")
    return groups


def leave_out_trained(
    config: EvaluateRewardConfig, groups: Sequence[AnswerGroup], artifact: Artifact
) -> list[AnswerGroup]:
    """Without the prompts that the reward model was trained on, as far as its folder says which they were."""
    from alignkit.evaluation.reward_examination import TRAIN_PROMPTS_FILE, is_among, read_train_prompts

    trained = read_train_prompts(Path(config.reward))
    if trained is None:
        LOG.warning("%s has no %s: it cannot be told what it was trained on", config.reward, TRAIN_PROMPTS_FILE)
        artifact.metrics["train_prompts"] = "unknown"
        return list(groups)
    known = [group for group in groups if is_among(group, trained)]
    artifact.metrics["train_prompts"] = len({group.prompt_key for group in known})
    if config.allow_training_prompts or not known:
        return list(groups)
    for group in known:
        artifact.drop({"id": group.id, "source": group.source}, "the reward model was trained on this prompt")
    if len(known) == len(groups):
        raise UserError(
            f"the reward model {config.reward} was trained on each of the {len(known)} prompts; give others, "
            "or allow_training_prompts=true"
        )
    return [group for group in groups if not is_among(group, trained)]


def summary(artifact: Artifact) -> str:
    """The key figures in a few words."""
    found, error = artifact.metrics["held_out_accuracy"]["all"], artifact.metrics["held_out"]["calibration"]
    return (
        f"pair accuracy {found['mean']:.2f} [{found['low']:.2f}, {found['high']:.2f}] of {found['n']} pairs, "
        f"calibration error {error['expected_calibration_error']:.2f}"
    )


if __name__ == "__main__":
    from alignkit.core.app import stage_main

    stage_main("evaluate_reward")
