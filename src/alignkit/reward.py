"""reward: train the reward model on which of a prompt's graded completions are better, and on human preferences.

It is the policy's base and adapter with a linear value head on the last hidden state, read at an answer's end-of-turn
token. Within a prompt every two completions whose grades differ by min_margin are a pair; rows of hh-rlhf or other
pairs, and grades of other judges, can be mixed in. A share of prompts is held out, and the accuracy on their pairs is
the number to look at. After training the saved model is loaded again and must give the same scores. docs/reward.md has
the whole story.

Reads:   data.path               completions with grades (none: train on preferences alone)
         preferences.path        preference pairs: ours, TRL's, hh-rlhf, full-hh-rlhf, RewardBench (none: not used)
         sources                 more files of either sort, by name (optional)
         adapter                 the adapter to start from; null starts from the base with a new one
Writes:  adapter/, value_head.safetensors, reward_config.json     the run folder is the reward model
         held_out_scores.jsonl     the held-out prompts with their answers' scores, lengths and grades
         train_prompts.jsonl       which prompts it was trained on (hashes), so that evaluate_reward leaves them out
         loss.jsonl, dropped.jsonl

Overrides people use:
  preferences.path=hh-rlhf.jsonl preferences.limit=8000   mix in human preferences
  'sources={other_judge: scored.jsonl}'                   more grades or pairs, by the name of their source
  'weights={graded: 1, hh-rlhf: 0.5}'                     how much each source counts
  min_margin=2                                            only clear differences
  train.epochs=2 train.learning_rate=2e-4                 how long and how fast
  heads=4                                                 an ensemble, whose disagreement measures doubt
  center_weight=0.01 regress_weight=0.1 margin_weight=0.1 further terms of the loss
  held_out_share=0.2                                      prompts kept for measuring
  adapter=runs/mine/sft/adapter                           where it starts

Examples:
  python -m alignkit.reward run=demo
  python -m alignkit.reward +model=qwen7b run=mine preferences.path=hh-rlhf.jsonl hardware=rtx4090_24gb
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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
from alignkit.core.ranks import world_size
from alignkit.core.records import CompletionSet, Dropped, PreferencePair

if TYPE_CHECKING:
    from alignkit.models.jobs import Job
    from alignkit.models.reward_model import RewardModel
    from alignkit.training.reward import EncodedGroup
    from alignkit.training.reward_data import AnswerGroup

LOG = logging.getLogger("alignkit")

NONE = "none"
RELOAD_TOLERANCE = 1e-5


@dataclass
class RewardConfig(StageConfig):
    """Configuration of `reward`."""

    inputs: ClassVar[tuple[str, ...]] = ("data.path", "preferences.path", "sources", "adapter", "model.path")

    data: RowsConfig = field(default_factory=RowsConfig)
    preferences: RowsConfig = field(default_factory=lambda: RowsConfig(path=NONE, limit=8000))
    sources: dict[str, str] = field(default_factory=dict)
    """More files to learn from, each by the name of its source: graded completions of another judge, or pairs."""
    weights: dict[str, float] = field(default_factory=dict)
    """How much the prompts of a source count, by its name; 1 for a source that is not named."""
    adapter: Optional[str] = None  # noqa: UP045
    """Start from this adapter; its rank and dropout then count, not those of `lora`."""
    held_out_share: float = 0.1
    """Share of each source's prompts that is not trained on."""
    min_margin: float = 1.0
    """Smallest difference of two grades that makes a pair."""
    pairs_per_prompt: int = 16
    margin_weight: float = 0.0
    """Demand a score difference of this times the difference of the grades."""
    regress_weight: float = 0.0
    """Weight of an additional loss that pulls scores to the grades themselves; scale and offset are learned a judge."""
    center_weight: float = 0.0
    """Weight of an additional loss that keeps the two scores of a pair around 0; 0.01 is usual."""
    heads: int = 1
    """Linear heads on the same hidden state, each with its own resample of the prompts; 4 or more measure doubt."""
    head_learning_rate: Optional[float] = None  # noqa: UP045
    """Of the value head, where it is to differ from train.learning_rate."""
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)

    def __post_init__(self) -> None:
        """Raise `UserError` for numbers that mean nothing."""
        for name in ("min_margin", "margin_weight", "regress_weight", "center_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name}={getattr(self, name)}: must be 0 or more")
        for name in ("pairs_per_prompt", "heads"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.head_learning_rate is not None and not 0 < self.head_learning_rate < math.inf:
            raise UserError(f"head_learning_rate={self.head_learning_rate}: must be above 0, or null")
        if not 0 <= self.held_out_share < 1:
            raise UserError(f"held_out_share={self.held_out_share}: must be at least 0 and below 1")
        if "graded" in self.sources and self.data.path != NONE:
            raise UserError("sources.graded: the grades of data.path have this name; choose another")


def run(config: RewardConfig) -> Artifact:
    """Build pairs, hold prompts out, train, measure, save, and check that what was saved scores the same."""
    with Artifact.open("reward", config) as artifact:
        if artifact.up_to_date:
            return artifact
        from alignkit.evaluation.reward_examination import TRAIN_PROMPTS_FILE, examine, train_prompts
        from alignkit.evaluation.rewards import accuracy
        from alignkit.models.headroom import require_memory
        from alignkit.models.loading import load_tokenizer
        from alignkit.training.arguments import refuse_what_only_sft_has
        from alignkit.training.distributed import require_possible
        from alignkit.training.reward import Objective, train_reward_model
        from alignkit.training.reward_data import source_weights, split_by_prompt
        from alignkit.training.tracking import require_tracker

        refuse_what_only_sft_has(config.train)
        require_tracker(config.train.tracker)
        if config.adapter is None and config.lora.init is LoraInit.pissa:
            raise UserError("lora.init=pissa: only sft has it, leave it out here")
        require_possible("reward", config.model, config.train, config.distributed)
        groups = read_groups(config, artifact)
        weights = source_weights(groups, config.weights)
        train_groups, held_out_groups = split_by_prompt(groups, config.held_out_share, config.seed)
        if not train_groups:
            raise UserError(
                f"held_out_share={config.held_out_share} holds out every prompt ({len(held_out_groups)} rows) "
                "and leaves none to train on; lower it, or give more data"
            )
        tokenizer = load_tokenizer(config.model)
        train = encode(config, tokenizer, train_groups, weights, "leaves for training", artifact)
        held_out = encode(config, tokenizer, held_out_groups, weights, "holds out", artifact)
        require_grades(config, train)
        require_memory(job(config, train), config.hardware, artifact)

        reward_model = starting_model(config, tokenizer)
        objective = Objective(config.margin_weight, config.regress_weight, config.center_weight)
        losses = train_reward_model(
            reward_model, train, objective, config.train, config.seed, artifact, config.head_learning_rate
        )
        if not artifact.writes:
            return artifact

        if config.heads > 1:
            heads = reward_model.head_scores([each.tokens for each in train])
            reward_model.balance_heads([answer for group in heads for answer in group])
            artifact.metrics["held_out_accuracy_of_heads"] = accuracy_of_heads(reward_model, held_out)
        train_scores = reward_model.raw_scores([each.tokens for each in train])
        reward_model.centre([score for scores in train_scores for score in scores])
        artifact.metrics |= {
            "train_prompts": len(train),
            "train_pairs": sum(len(group.comparisons) for group in train),
            "held_out_prompts": len(held_out),
            "held_out_pairs": sum(len(group.comparisons) for group in held_out),
            "train_accuracy": accuracy(train, train_scores),
        }
        examine(reward_model, held_out_groups, artifact, seed=config.seed)
        artifact.write_rows(TRAIN_PROMPTS_FILE, train_prompts(train_groups))
        save(reward_model, artifact)
        artifact.write_rows("loss.jsonl", losses)
        check_saved(reward_model, held_out_groups or train_groups, artifact)
        artifact.summary = summary(artifact.metrics)
    return artifact


def read_groups(config: RewardConfig, artifact: Artifact) -> list[AnswerGroup]:
    """Prompts with their answers and comparisons, from graded completions and from preference pairs.

    Raises `UserError` for a file that nothing can be learned from, when there are others, too.
    """
    from alignkit.training.reward_data import LeftOut, groups_of

    groups: list[AnswerGroup] = []
    left_out = LeftOut()
    for key, name, graded, pairs, unusable in read_files(config):
        found, without_pair = groups_of(
            name,
            graded,
            pairs,
            min_margin=config.min_margin,
            pairs_per_prompt=config.pairs_per_prompt,
            seed=config.seed,
            left_out=left_out,
            pointwise=config.regress_weight > 0,
        )
        dropped = [*unusable, *without_pair]
        artifact.drop_all(dropped)
        if not found:
            raise UserError(f"{key}: {nothing_to_learn(dropped, config.min_margin)}")
        groups += found
    if not groups:
        raise UserError("there is no pair to learn from: give data.path, preferences.path or sources")
    artifact.metrics |= left_out.describe()
    return groups


def read_files(
    config: RewardConfig,
) -> Iterator[tuple[str, str, list[CompletionSet], list[PreferencePair], list[Dropped]]]:
    """Of each file: key and path, the name that was given to it, its grades or its pairs, and its unusable rows."""
    from alignkit.data.sources import read_graded, read_graded_or_preferences, read_preferences

    if config.data.path != NONE:
        graded, unusable = read_graded(config.data)
        yield f"data.path={config.data.path}", "", graded, [], unusable
    if config.preferences.path != NONE:
        pairs, unusable = read_preferences(config.preferences)
        yield f"preferences.path={config.preferences.path}", "", [], pairs, unusable
    for name, path in config.sources.items():
        yield f"sources.{name}={path}", name, *read_graded_or_preferences(RowsConfig(path=path))


def nothing_to_learn(dropped: Sequence[Dropped], min_margin: float) -> str:
    """Why a file makes no pair, with what to do about each reason."""
    from alignkit.training.reward_data import EQUAL_GRADES, ONE_COMPLETION, SAME_TEXT, TOO_CLOSE, UNGRADED

    advice = {
        ONE_COMPLETION: "sample several a prompt: sampling.n=4",
        SAME_TEXT: "sample more freely: sampling.temperature=[0.8,1.2]",
        EQUAL_GRADES: "a judge that says the same of every answer teaches nothing: see its grades.jsonl, or use "
        "mode=pairwise in judge",
        TOO_CLOSE: f"lower min_margin={min_margin:g}",
        UNGRADED: "run judge on them first",
    }
    reasons = Counter(each.reason for each in dropped).most_common()
    found = [f"{count} x {reason}" + f" ({advice[reason]})" * (reason in advice) for reason, count in reasons]
    return f"there is no pair to learn from: {'; '.join(found)}. dropped.jsonl has the rows."


def require_grades(config: RewardConfig, groups: Sequence[EncodedGroup]) -> None:
    """Raise `UserError` for a regression on grades where there are none."""
    if config.regress_weight and all(grade is None for group in groups for grade in group.grades):
        raise UserError(
            f"regress_weight={config.regress_weight:g}: no answer has a grade, and pairs alone have none; give "
            "data.path, or leave it out"
        )


def encode(
    config: RewardConfig,
    tokenizer: Any,
    groups: Sequence[AnswerGroup],
    weights: Mapping[str, float],
    side: str,
    artifact: Artifact,
) -> list[EncodedGroup]:
    """Groups as tokens, with how much each counts for each head; `weights` are those of the sources."""
    from alignkit.training.reward import encode_group
    from alignkit.training.reward_data import bootstrap_weights

    encoded = []
    for group in groups:
        drawn = bootstrap_weights(group.prompt_key, config.heads, config.seed)
        counts = tuple(weights[group.source] * weight for weight in drawn)
        row, unreadable = encode_group(
            tokenizer, group, config.model.max_length, counts, pointwise=config.regress_weight > 0
        )
        prompt = [message.model_dump() for message in group.prompt]
        for answer, reason in unreadable.items():
            artifact.drop({"id": group.id, "prompt": prompt, "answer": answer}, reason.split(" (")[0], reason)
        if row is not None:
            encoded.append(row)
        else:
            answers = {"id": group.id, "prompt": prompt, "answers": list(group.answers)}
            artifact.drop(answers, "no comparison left", f"{len(unreadable)} answers cannot be read")
    if groups and not encoded:
        raise UserError(
            f"no pair fits model.max_length={config.model.max_length} in the {len(groups)} rows that "
            f"held_out_share={config.held_out_share} {side} (see dropped.jsonl); raise model.max_length, or change "
            "held_out_share"
        )
    return encoded


def job(config: RewardConfig, groups: Sequence[EncodedGroup]) -> Job:
    """What training takes: each prompt of a batch in as many sequences of at most max_length as its answers need."""
    from alignkit.models.jobs import Job

    parts = [[len(part) for part in group.tokens.split(config.model.max_length)] for group in groups]
    return Job(
        "reward",
        config.model,
        longest=max(map(max, parts)),
        lora=config.lora,
        train=config.train,
        adapter=config.adapter,
        sequences_per_row=max(map(len, parts)),
        processes=world_size(),
    )


def starting_model(config: RewardConfig, tokenizer: Any) -> RewardModel:
    """The policy, or the base with a new adapter, with an untrained value head."""
    import torch

    from alignkit.models.loading import load_base, load_policy, new_adapter
    from alignkit.models.reward_model import RewardModel
    from alignkit.models.value_head import ValueHeadModel

    torch.manual_seed(config.seed)
    if config.adapter is None:
        policy: Any = new_adapter(load_base(config.model), config.lora, config.model.lora_targets)
    else:
        policy = load_policy(config.model, config.adapter, trainable=True)
    return RewardModel(ValueHeadModel(policy, config.heads), tokenizer, config.model)


def accuracy_of_heads(reward_model: RewardModel, groups: Sequence[EncodedGroup]) -> list[float]:
    """Share of pairs that each head alone ranks right: what the ensemble adds is the distance to their mean."""
    from alignkit.training.reward import ranked_right

    found = []
    scores = reward_model.head_scores([each.tokens for each in groups])
    for head in range(len(reward_model.head_offsets)):
        right = ranked_right(groups, [[answer[head] for answer in group] for group in scores])
        outcomes = [each for group in right for each in group]
        found.append(sum(outcomes) / max(1, len(outcomes)))
    return found


def save(reward_model: RewardModel, artifact: Artifact) -> None:
    """Write the reward model into the run folder; each of its parts appears whole or not at all."""
    from alignkit.models.reward_model import ADAPTER_FOLDER, CONFIG_FILE, HEAD_FILE

    staging = artifact.work_folder / "reward_model"
    reward_model.save_pretrained(staging)
    for name in (ADAPTER_FOLDER, HEAD_FILE, CONFIG_FILE):
        with artifact.output(name) as path:
            (staging / name).rename(path)


def check_saved(reward_model: RewardModel, groups: Sequence[AnswerGroup], artifact: Artifact) -> None:
    """The saved model, loaded again, scores like the one in memory; and a score depends on its conversation alone."""
    from alignkit.evaluation.reward_examination import check_invariance, checked_conversations, largest_difference
    from alignkit.models.reward_model import RewardModel as Saved

    conversations = checked_conversations(groups)
    saved = Saved.from_pretrained(artifact.folder)
    scores = saved.scores_or_reasons(conversations)
    reload = largest_difference(reward_model.scores_or_reasons(conversations), scores)
    detail = f"largest difference {reload:.1e} over {len(conversations)} conversations"
    artifact.check("saved_scores_equal", reload <= RELOAD_TOLERANCE, detail)
    check_invariance(saved, conversations, artifact)


def summary(metrics: dict[str, Any]) -> str:
    """The key figure in a few words."""
    found = metrics["held_out_accuracy"].get("all")
    if found is None:
        return "no held-out pairs"
    return f"held-out pair accuracy {found['mean']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"


if __name__ == "__main__":
    from alignkit.core.app import stage_main

    stage_main("reward")
