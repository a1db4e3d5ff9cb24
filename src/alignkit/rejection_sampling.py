"""rejection_sampling: draw n completions for each question, score them, keep the best, and pair it with a worse one.

The scorer is a reward model; with scorer=judge it is the teacher, which is the upper bound of what a reward model that
learnt from it can reach. Only finished completions are chosen or rejected. With previous_adapter the rejected answer
of a pair is the worst that the previous version wrote, where that scores lower; without it, the worst of the same n.

Reads:   data.path               questions
         adapter                 the policy's adapter
         reward                  run folder of the reward model (scorer=reward)
         previous_adapter        the previous version's adapter (optional)
Writes:  best.jsonl              the best completion of each question, to learn from (sft)
         pairs.jsonl             best against worse with the margin, to prefer by (dpo)
         scored.jsonl            all completions with their scores (previous.jsonl: those of the previous version)
         dropped.jsonl           questions without a best or without a pair, and why

Overrides people use:
  data.path=questions.jsonl data.limit=500   other questions
  sampling.n=16                              completions a question
  scorer=judge                               let the teacher score instead of the reward model
  min_margin=0.5                             smallest score difference of a pair
  previous_adapter=runs/mine/sft/adapter     latest version against this previous one
  grade=true                                 have the teacher grade what the reward model chooses from, for the report

Examples:
  python -m alignkit.rejection_sampling run=demo
  python -m alignkit.rejection_sampling +model=qwen7b run=mine sampling.n=8 sampling.batch_size=32
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from statistics import mean
from typing import TYPE_CHECKING, Any, ClassVar, Optional

from alignkit.core.artifact import Artifact
from alignkit.core.config import HardwareConfig, ModelConfig, RowsConfig, SamplingConfig, StageConfig, TeacherConfig
from alignkit.core.errors import UserError
from alignkit.core.records import ChatExample, Completion, CompletionSet, Message, PreferencePair

if TYPE_CHECKING:
    from alignkit.models.jobs import Job
    from alignkit.scoring.base import Scorer

LOG = logging.getLogger("alignkit")


class ScorerKind(Enum):
    """Who scores: the reward model, or the teacher."""

    reward = "reward"
    judge = "judge"


@dataclass
class RejectionSamplingConfig(StageConfig):
    """Configuration of `rejection_sampling`."""

    inputs: ClassVar[tuple[str, ...]] = ("data.path", "adapter", "previous_adapter", "reward", "model.path")

    data: RowsConfig = field(default_factory=RowsConfig)
    adapter: Optional[str] = None  # noqa: UP045
    """The policy's adapter; none samples from the base."""
    previous_adapter: Optional[str] = None  # noqa: UP045
    """Take the rejected answers from this previous version."""
    scorer: ScorerKind = ScorerKind.reward
    reward: str = "none"
    """Run folder of the reward model; not read with scorer=judge."""
    min_margin: float = 0.1
    """Smallest score difference of a pair: standard deviations of the reward model, or points of the teacher."""
    max_pairs: Optional[int] = None  # noqa: UP045
    """Keep only so many pairs, those with the largest margins."""
    min_score: Optional[float] = None  # noqa: UP045
    """Keep the best completion of a question only with at least this score; none keeps every best."""
    grade: bool = False
    """Have the teacher grade every completion, too. Nothing is chosen by it: it shows what the reward model's choice is
    worth."""
    model: ModelConfig = field(default_factory=ModelConfig)
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(n=8))
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)

    def __post_init__(self) -> None:
        """With the teacher as scorer no reward model has to exist."""
        if self.scorer is ScorerKind.judge:
            self.reward = "none"


def run(config: RejectionSamplingConfig) -> Artifact:
    """Sample, score, choose the best, pair it with a worse one."""
    from alignkit.generation.base import check_sampling

    check_sampling(config.sampling)
    if config.scorer is ScorerKind.reward and config.reward == "none":
        raise UserError("reward: name the run folder of a reward model, or set scorer=judge")
    with Artifact.open("rejection_sampling", config) as artifact:
        if artifact.up_to_date:
            return artifact
        from alignkit.generation.questions import describe_samples, read_prompts
        from alignkit.models.headroom import require_memory
        from alignkit.models.loading import load_tokenizer

        tokenizer = load_tokenizer(config.model)
        rows, dropped = read_prompts(config.data, tokenizer, config.model, config.sampling)
        for each in dropped:
            artifact.drop(each.row, each.reason, each.detail)
        require_memory(job(config, rows, tokenizer), config.hardware, artifact)
        before = config.previous_adapter
        previous = generate(config, before, rows, "previous", artifact)[0] if before else []
        latest, policy = generate(config, config.adapter, rows, "latest", artifact)

        scorer = open_scorer(config, policy)
        latest, previous = score(scorer, latest), score(scorer, previous)
        rejected_from = {row.id: row.completions for row in previous or latest}

        artifact.write_rows("scored.jsonl", latest)
        if previous:
            artifact.write_rows("previous.jsonl", previous)
        artifact.write_rows("best.jsonl", choose(config, latest, artifact))
        pairs = pair(config, latest, rejected_from, artifact)
        artifact.write_rows("pairs.jsonl", pairs)

        artifact.metrics |= describe_samples(latest) | describe_scores(latest, config)
        artifact.metrics["pairs"] = len(pairs)
        curve = artifact.metrics["best_of_n"]["score"]
        artifact.summary = (
            f"score {curve['1']['mean']:.2f} -> best of {config.sampling.n} {list(curve.values())[-1]['mean']:.2f}"
        )
    return artifact


def job(config: RejectionSamplingConfig, rows: Sequence[CompletionSet], tokenizer: Any) -> Job:
    """What sampling takes: the prompts with the most characters are taken for the longest."""
    from alignkit.data.chat import encode_prompt
    from alignkit.models.jobs import Job

    wordiest = sorted(rows, key=lambda row: sum(len(message.content) for message in row.prompt))[-8:]
    longest = max(len(encode_prompt(tokenizer, row.prompt)) for row in wordiest) + config.sampling.max_new_tokens
    return Job(
        "rejection_sampling",
        config.model,
        longest,
        sampling=config.sampling,
        adapter=config.adapter,
        adapters_loaded=1 + (config.scorer is ScorerKind.reward),
    )


def generate(
    config: RejectionSamplingConfig,
    adapter: str | None,
    rows: Sequence[CompletionSet],
    version: str,
    artifact: Artifact,
) -> tuple[list[CompletionSet], Any]:
    """The rows with the completions of one version of the policy, and that policy; resumes from its journal."""
    from alignkit.core.journal import Journal
    from alignkit.generation.hf import HFGenerator, merge_adapter
    from alignkit.generation.resumable import generate_all
    from alignkit.models.loading import load_policy, load_tokenizer

    policy = merge_adapter(load_policy(config.model, adapter))
    generator = HFGenerator(policy, load_tokenizer(config.model), adapter or config.model.name)
    with Journal(artifact.work_folder / f"{version}.jsonl", artifact.fingerprint) as journal:
        written = generate_all(generator, rows, config.sampling, config.seed, journal)
    return [row.model_copy(update={"completions": written[row.id]}) for row in rows], policy


def open_scorer(config: RejectionSamplingConfig, policy: Any) -> Scorer:
    """The reward model, on the policy's base where that is possible, or the teacher."""
    if config.scorer is ScorerKind.reward:
        from alignkit.scoring.reward import RewardScorer

        return RewardScorer(config.reward, policy)
    from alignkit.scoring.judge import JudgeScorer
    from alignkit.teacher.client import open_teacher

    return JudgeScorer(open_teacher(config.teacher))


def score(scorer: Scorer, rows: Sequence[CompletionSet]) -> list[CompletionSet]:
    """The rows with their finished completions scored; unfinished ones and those without a score keep None."""
    finished = [(row, completion) for row in rows for completion in row.completions if completion.finished]
    scores = iter(scorer.score([[*row.prompt, Message(role="assistant", content=each.text)] for row, each in finished]))
    missing = [reason for reason in scorer.reasons if reason]
    if missing:
        LOG.warning(
            "%d of %d completions have no score, the first because: %s", len(missing), len(finished), missing[0]
        )
    return [
        row.model_copy(
            update={
                "completions": [
                    each.model_copy(update={"score": next(scores)}) if each.finished else each
                    for each in row.completions
                ]
            }
        )
        for row in rows
    ]


def choose(config: RejectionSamplingConfig, rows: Sequence[CompletionSet], artifact: Artifact) -> list[ChatExample]:
    """The best completion of each row as an example to learn from."""
    from alignkit.scoring.best_of_n import best

    examples = []
    for row in rows:
        chosen = best(row.completions)
        if chosen is None or chosen.score is None:
            artifact.drop(row, "no finished completion with a score")
        elif config.min_score is not None and chosen.score < config.min_score:
            artifact.drop(row, "best completion scores below min_score", f"{chosen.score:.3f} < {config.min_score}")
        else:
            fields = {"id": row.id, "parents": row.parents, "prompt": row.prompt, "completion": _turn(chosen)}
            examples.append(
                ChatExample.model_validate(fields | {"source": "rejection_sampling", "score": chosen.score})
            )
    if not examples:
        raise UserError(
            "no question has a best completion (see dropped.jsonl); look at sampling.max_new_tokens and min_score"
        )
    return examples


def pair(
    config: RejectionSamplingConfig,
    rows: Sequence[CompletionSet],
    rejected_from: dict[str, list[Completion]],
    artifact: Artifact,
) -> list[PreferencePair]:
    """For each row its best completion against the worst of `rejected_from`, where the margin is large enough."""
    from alignkit.scoring.best_of_n import best, worst

    pairs = []
    for row in rows:
        chosen, rejected = best(row.completions), worst(rejected_from[row.id])
        if chosen is None or chosen.score is None:
            continue  # set aside by `choose`
        if rejected is None or rejected.score is None:
            artifact.drop(row, "no pair: the previous version has no finished completion with a score")
            continue
        margin = chosen.score - rejected.score
        if margin <= 0 or margin < config.min_margin or chosen.text == rejected.text:
            artifact.drop(row, "no pair: best and worst differ by less than min_margin", f"margin {margin:.3f}")
            continue
        fields = {"id": row.id, "parents": row.parents, "prompt": row.prompt, "margin": margin}
        turns = {"chosen": _turn(chosen), "rejected": _turn(rejected), "source": "rejection_sampling"}
        pairs.append(PreferencePair.model_validate(fields | turns))
    by_margin = sorted(pairs, key=lambda pair: pair.margin or 0.0, reverse=True)
    surplus = by_margin[config.max_pairs :] if config.max_pairs is not None else []
    for each in surplus:
        artifact.drop(each, "no pair: max_pairs others have a larger margin")
    left_out = {each.id for each in surplus}
    return [each for each in pairs if each.id not in left_out]


def describe_scores(rows: Sequence[CompletionSet], config: RejectionSamplingConfig) -> dict[str, Any]:
    """Metrics of the scores: what the best of 1, 2, 4, ... n is worth, and whether longer answers score higher.

    `best_of_n.score` is by the scores themselves; `best_of_n.grade`, with grade=true, is what the teacher gives the
    answers that those scores choose. The latter falls where the reward model is being exploited. It is taken over the
    questions whose scored answers all have a grade; `ungraded_questions` counts the others.
    """
    from alignkit.evaluation.statistics import bootstrap_mean
    from alignkit.scoring.best_of_n import correlation, expected_best, powers_of_two, scored

    kept = [candidates for row in rows if (candidates := scored(row.completions))]
    scores = [[each.score or 0.0 for each in candidates] for candidates in kept]
    flat = [value for row in scores for value in row]
    lengths = [len(each.text) for candidates in kept for each in candidates]
    curves = {"score": [(row, row) for row in scores]}
    ungraded: dict[str, int] = {}
    if config.grade:
        grades = _grades(rows, config)
        graded = [(row, values) for row, values in zip(scores, grades, strict=True) if values is not None]
        ungraded["ungraded_questions"] = len(scores) - len(graded)
        curves |= {"grade": graded} if graded else {}
    return ungraded | {
        "mean_score": mean(flat),
        "mean_best_score": mean(max(row) for row in scores),
        "score_length_correlation": correlation(flat, lengths),
        "best_of_n": {
            name: {
                str(k): bootstrap_mean([expected_best(row, k, values) for row, values in curve])
                for k in powers_of_two(config.sampling.n)
            }
            for name, curve in curves.items()
        },
    }


def _grades(rows: Sequence[CompletionSet], config: RejectionSamplingConfig) -> list[list[float] | None]:
    """The teacher's grades of the scored completions of each row that has any; None where one of them has no grade."""
    from alignkit.scoring.best_of_n import scored
    from alignkit.scoring.judge import JudgeScorer
    from alignkit.teacher.client import open_teacher

    kept = [(row, candidates) for row in rows if (candidates := scored(row.completions))]
    conversations = [[*row.prompt, *_turn(each)] for row, candidates in kept for each in candidates]
    scorer = JudgeScorer(open_teacher(config.teacher))
    grades = scorer.score(conversations)
    remaining = iter(grades)
    by_row = [[next(remaining) for _ in candidates] for _, candidates in kept]
    known = [[grade for grade in found if grade is not None] for found in by_row]
    complete = [some if len(some) == len(found) else None for some, found in zip(known, by_row, strict=True)]
    missing = [reason for reason in scorer.reasons if reason]
    if missing:
        LOG.warning(
            "grade=true: %d of %d completions have no grade, the first because: %s; %d of %d questions are left out of "
            "the grade curve",
            *(len(missing), len(grades), missing[0], complete.count(None), len(complete)),
        )
    return complete


def _turn(completion: Completion) -> list[Message]:
    return [Message(role="assistant", content=completion.text)]


if __name__ == "__main__":
    from alignkit.core.app import stage_main

    stage_main("rejection_sampling")
