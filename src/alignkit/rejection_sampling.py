"""rejection_sampling: draw n completions for each question, score them, keep the best, and pair it with a worse one.

The scorer is a reward model; with scorer=judge it is the teacher, which is the upper bound of what a reward model that
learnt from it can reach. Only finished completions are chosen or rejected. pairing=reward, the default, pairs the best
with the worst of the same n or, with previous_adapter, with the worst of the previous version where that scores lower.
pairing=versions prefers the latest version's answer to the previous version's, whatever they score. A killed run
continues with the same command, and ends with the same files.

Reads:   data.path               questions
         adapter                 the policy's adapter
         reward                  run folder of the reward model (scorer=reward)
         previous_adapter        the previous version's adapter (optional)
         keep                    scored.jsonl of earlier rounds (optional)
Writes:  best.jsonl              the best completion of each question, to learn from (sft)
         pairs.jsonl             chosen against rejected, with the margin, to prefer by (dpo)
         scored.jsonl            all completions with their scores (previous.jsonl: those of the previous version,
                                 greedy.jsonl: the greedy ones)
         dropped.jsonl           questions without a best or without a pair, and why

Overrides people use:
  data.path=questions.jsonl data.limit=500   other questions
  sampling.n=16                              completions a question
  scorer=judge                               let the teacher score instead of the reward model
  min_margin=0.5 pairs_per_prompt=2          smallest score difference of a pair, most pairs of a question
  max_length_ratio=2                         no pair in which one answer is more than twice as long
  previous_adapter=runs/mine/sft/adapter     latest version against this previous one (pairing=versions: unranked)
  keep=[runs/mine/round_1/scored.jsonl]      the best over this round and earlier ones
  grade=true greedy=true                     grade what the reward model chooses from, and the greedy answers beside it
  generator=openai server.model=<name>       let a server of the policy answer (vLLM, for one)

Examples:
  python -m alignkit.rejection_sampling run=demo
  python -m alignkit.rejection_sampling +model=qwen7b run=mine sampling.n=8 sampling.batch_size=32
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, Optional

from alignkit.core.artifact import Artifact
from alignkit.core.config import HardwareConfig, ModelConfig, RowsConfig, SamplingConfig, StageConfig, TeacherConfig
from alignkit.core.errors import UserError
from alignkit.core.records import CompletionSet
from alignkit.generation.engines import GeneratorKind, ServerConfig
from alignkit.scoring.preference_pairs import ChoiceConfig, Pairing

# ruff: noqa: UP045

if TYPE_CHECKING:
    from alignkit.core.journal import Journal
    from alignkit.models.jobs import Job
    from alignkit.scoring.base import Scorer
    from alignkit.scoring.judge import JudgeScorer

LOG = logging.getLogger("alignkit")

ROWS_A_BLOCK = 128
"""Questions whose answers the reward model scores at once, which is what a kill can cost."""
FILES = {"candidates": "scored.jsonl", "previous": "previous.jsonl", "greedy": "greedy.jsonl"}
"""Whose scored completions are written where."""


class ScorerKind(Enum):
    """Who scores: the reward model, or the teacher."""

    reward = "reward"
    judge = "judge"


@dataclass
class RejectionSamplingConfig(ChoiceConfig, StageConfig):
    """Configuration of `rejection_sampling`."""

    inputs: ClassVar[tuple[str, ...]] = ("data.path", "adapter", "previous_adapter", "reward", "keep", "model.path")
    incidental: ClassVar[tuple[str, ...]] = (
        *StageConfig.incidental,
        "server.concurrency",
        "server.timeout_seconds",
        "server.allow_http",
    )

    data: RowsConfig = field(default_factory=RowsConfig)
    generator: GeneratorKind = GeneratorKind.hf
    """Who answers: this process, a server that has the policy, or vLLM in this process."""
    adapter: Optional[str] = None
    """The policy's adapter; none samples from the base."""
    previous_adapter: Optional[str] = None
    """Take the rejected answers from this previous version."""
    server: ServerConfig = field(default_factory=ServerConfig)
    keep: list[str] = field(default_factory=list)
    """Candidates of earlier rounds: their scored.jsonl, which are scored anew."""
    scorer: ScorerKind = ScorerKind.reward
    reward: str = "none"
    """Run folder of the reward model; not read with scorer=judge."""
    uncertainty_penalty: float = 0.0
    """Take this many times the disagreement of an ensemble's heads off its score."""
    greedy: bool = False
    """Write and score the greedy answers, too. Nothing is chosen from them: best of n is compared with them."""
    grade: bool = False
    """Have the teacher grade every completion, too. Nothing is chosen by it: it shows what the reward model's choice is
    worth."""
    model: ModelConfig = field(default_factory=ModelConfig)
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(n=8))
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)

    def __post_init__(self) -> None:
        """With the teacher as scorer no reward model has to exist, and with a server no adapter."""
        if self.scorer is ScorerKind.judge:
            self.reward = "none"
        if self.generator is GeneratorKind.openai:
            self.adapter = self.previous_adapter = None

    @property
    def versions(self) -> dict[str, str | None]:
        """What writes the answers, the previous version first: an adapter or, of a server, a name."""
        if self.generator is GeneratorKind.openai:
            previous, latest = self.server.previous_model, self.server.model
        else:
            previous, latest = self.previous_adapter, self.adapter
        return ({"previous": previous} if previous else {}) | {"latest": latest}


def run(config: RejectionSamplingConfig) -> Artifact:
    """Sample, score, choose the best, pair it with a worse one."""
    check_config(config)
    with Artifact.open("rejection_sampling", config, always=config.teacher.retry_failed) as artifact:
        if artifact.up_to_date:
            return artifact
        from alignkit.generation.questions import describe_samples, read_prompts
        from alignkit.models.loading import load_tokenizer
        from alignkit.scoring.preference_pairs import choose, eligible, pair

        tokenizer = load_tokenizer(config.model)
        rows, dropped = read_prompts(config.data, tokenizer, config.model, config.sampling)
        artifact.drop_all(dropped)
        check_models(config, rows, tokenizer, artifact)

        written, policy = generate(config, rows, artifact)
        written["candidates"] = with_earlier(config, written["latest"], artifact)
        scored = score(config, written, policy, artifact)
        for name, file in FILES.items():
            if name in scored:
                artifact.write_rows(file, scored[name])

        candidates = eligible(config, scored["candidates"], artifact.drop)
        previous = {row.id: row for row in scored["previous"]} if "previous" in scored else None
        artifact.write_rows("best.jsonl", choose(config, candidates, artifact.drop))
        pairs = pair(config, candidates, artifact.drop, previous, lambda text: len(tokenizer.tokenize(text)))
        artifact.write_rows("pairs.jsonl", pairs)
        if not pairs:
            LOG.warning("there is not a single pair: dropped.jsonl says why, question by question")

        artifact.metrics |= describe_samples(scored["latest"]) | describe(config, scored, artifact)
        artifact.metrics["pairs"] = len(pairs)
        curve = artifact.metrics["best_of_n"]["score"]
        mean, best = curve["1"]["mean"], list(curve.values())[-1]["mean"]
        artifact.summary = f"score {mean:.2f} -> best of {config.sampling.n} {best:.2f}, {len(pairs)} pairs"
    return artifact


def check_config(config: RejectionSamplingConfig) -> None:
    """Raise `UserError` for settings that make no sense or leave nothing to choose, before anything is generated."""
    from alignkit.generation.base import check_sampling
    from alignkit.scoring.preference_pairs import check_choice

    check_sampling(config.sampling)
    check_choice(config)
    if config.scorer is ScorerKind.reward and config.reward == "none":
        raise UserError("reward: name the run folder of a reward model, or set scorer=judge")
    if config.uncertainty_penalty < 0:
        raise UserError(f"uncertainty_penalty={config.uncertainty_penalty}: must be 0 or more")
    if config.uncertainty_penalty and config.scorer is ScorerKind.judge:
        raise UserError(f"uncertainty_penalty={config.uncertainty_penalty}: the teacher has no heads that disagree")
    if config.generator is GeneratorKind.openai and not config.server.model:
        raise UserError("server.model: name the model under which the server has the policy (generator=openai)")
    served = config.server.model or config.server.previous_model
    if config.generator is not GeneratorKind.openai and served:
        raise UserError(f"server: the model {served} is asked only with generator=openai; set that, or leave it out")
    if config.pairing is Pairing.versions and "previous" not in config.versions:
        raise UserError("pairing=versions: name the previous version, previous_adapter (or server.previous_model)")
    if config.pairing is Pairing.versions and config.keep:
        raise UserError("pairing=versions: answers of earlier rounds are not the latest version's. Leave keep out")
    if config.sampling.n == 1 and len(config.versions) == 1 and not config.keep:
        raise UserError(
            "sampling.n=1: one completion a question leaves nothing to choose from and nothing to pair with. Set "
            "sampling.n=2 or more, previous_adapter or keep."
        )


def check_models(
    config: RejectionSamplingConfig, rows: Sequence[CompletionSet], tokenizer: Any, artifact: Artifact
) -> None:
    """Raise `UserError` when the models will not fit or the reward model is none, before anything is loaded."""
    from alignkit.models.headroom import require_memory
    from alignkit.scoring.reward import require_reward_model

    if config.generator is GeneratorKind.hf:
        require_memory(job(config, rows, tokenizer), config.hardware, artifact)
    if config.scorer is ScorerKind.reward:
        require_reward_model(config.reward, config.uncertainty_penalty)


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
        adapters_loaded=len(config.versions) + (config.scorer is ScorerKind.reward),
    )


def generate(
    config: RejectionSamplingConfig, rows: Sequence[CompletionSet], artifact: Artifact
) -> tuple[dict[str, list[CompletionSet]], Any]:
    """The rows as "previous", "latest" and "greedy" answer them, and what the reward model's adapter can join.

    A version's adapter joins the base of the one before it where that is possible.
    """
    written: dict[str, list[CompletionSet]] = {}
    shared = None
    for version in config.versions:
        found, shared = answer(config, version, rows, artifact, shared)
        written |= found
    if not written["latest"]:
        raise UserError("no completion at all was usable (see dropped.jsonl and log.txt)")
    return written, shared if config.generator is GeneratorKind.hf else None


def answer(
    config: RejectionSamplingConfig, version: str, rows: Sequence[CompletionSet], artifact: Artifact, shared: Any
) -> tuple[dict[str, list[CompletionSet]], Any]:
    """The rows as one version answers them, and what another adapter can join; resumes from its journals."""
    from alignkit.generation.base import greedily
    from alignkit.generation.engines import open_engine
    from alignkit.generation.resumable import generate_all

    name = config.versions[version]
    teacher = config.server.as_teacher(name, config.teacher)
    engine = open_engine(config.generator, config.model, name, teacher, shared)
    asks_server = config.generator is GeneratorKind.openai
    at_once = len(rows) if asks_server else None
    drawn = {version: config.sampling}
    if version == "latest" and config.greedy:
        drawn["greedy"] = greedily(config.sampling)
    written: dict[str, list[CompletionSet]] = {}
    for label, sampling in drawn.items():
        with open_journal(config, artifact, label, artifact.fingerprint, asks_server) as journal:
            completions = generate_all(engine, rows, sampling, config.seed, journal, at_once)
        for row in rows:
            if missing := sampling.n - len(completions[row.id]):
                artifact.drop(row, f"{label}: the server gave no usable answer", f"{missing} of {sampling.n}")
        answered = [row for row in rows if completions[row.id]]
        written[label] = [row.model_copy(update={"completions": completions[row.id]}) for row in answered]
    return written, engine.shared


def with_earlier(
    config: RejectionSamplingConfig, rows: Sequence[CompletionSet], artifact: Artifact
) -> list[CompletionSet]:
    """The rows with what earlier rounds answered as further candidates."""
    from alignkit.generation.earlier_rounds import join_earlier

    joined, dropped = join_earlier(rows, config.keep)
    artifact.drop_all(dropped)
    return joined


def score(
    config: RejectionSamplingConfig, written: Mapping[str, list[CompletionSet]], policy: Any, artifact: Artifact
) -> dict[str, list[CompletionSet]]:
    """What was written, the finished completions scored; "latest" are the candidates of this round again."""
    scorer: Scorer
    if config.scorer is ScorerKind.reward:
        from alignkit.scoring.reward import RewardScorer

        scorer = RewardScorer(config.reward, policy, config.uncertainty_penalty)
    else:
        scorer = open_judge(config)
    found = {name: score_rows(config, scorer, name, written[name], artifact) for name in FILES if name in written}
    drawn = {row.id: len(row.completions) for row in written["latest"]}
    found["latest"] = [
        row.model_copy(update={"completions": row.completions[: drawn[row.id]]})
        for row in found["candidates"]
        if row.id in drawn
    ]
    check_scores(config, found["candidates"], found["latest"], artifact)
    return found


def score_rows(
    config: RejectionSamplingConfig,
    scorer: Scorer,
    name: str,
    rows: Sequence[CompletionSet],
    artifact: Artifact,
    noun: str = "score",
) -> list[CompletionSet]:
    """The rows, scored; resumes from a journal that belongs to their texts.

    A teacher is asked for everything at once: its answers are in the response store, and a batch takes hours.
    """
    from alignkit.core.hashing import hash_text
    from alignkit.scoring.judge import JudgeScorer
    from alignkit.scoring.resumable import score_completions

    texts = [[row.id, *(completion.text for completion in row.completions)] for row in rows]
    fingerprint = hash_text(json.dumps([artifact.fingerprint, texts]))
    asks_teacher = isinstance(scorer, JudgeScorer)
    block = max(1, len(rows)) if asks_teacher else ROWS_A_BLOCK
    with open_journal(config, artifact, f"{name}.{noun}s", fingerprint, asks_teacher) as journal:
        return score_completions(scorer, rows, journal, block, noun)


def open_journal(
    config: RejectionSamplingConfig, artifact: Artifact, name: str, fingerprint: str, asked: bool
) -> Journal:
    """A journal of unfinished work; what was `asked` of a server begins anew where failures are to be asked again.

    Nothing is paid twice by that: all other answers are in the response store.
    """
    from alignkit.core.journal import Journal

    path = artifact.work_folder / f"{name}.jsonl"
    if asked and config.teacher.retry_failed:
        path.unlink(missing_ok=True)
    return Journal(path, fingerprint)


def open_judge(config: RejectionSamplingConfig) -> JudgeScorer:
    """The teacher as the scorer or grader."""
    from alignkit.scoring.judge import JudgeScorer
    from alignkit.teacher.client import open_teacher

    return JudgeScorer(open_teacher(config.teacher))


def check_scores(
    config: RejectionSamplingConfig,
    candidates: Sequence[CompletionSet],
    latest: Sequence[CompletionSet],
    artifact: Artifact,
) -> None:
    """Stop when no answer of this round has a score, or a reward model gives different answers all the same.

    A teacher may: it gives whole points, and a good policy's few answers all of them.
    """
    from alignkit.scoring.best_of_n import scored

    if not any(scored(row.completions) for row in latest):
        raise UserError("no completion has both an end and a score: look at log.txt and at sampling.max_new_tokens")
    found = [completion for row in candidates for completion in scored(row.completions)]
    scores, texts = {each.score for each in found}, {each.text for each in found}
    alike = len(scores) == 1 < len(texts)
    if alike and config.scorer is ScorerKind.judge:
        LOG.warning("the teacher gives all %d different answers %g: there is no best", len(texts), found[0].score)
        return
    detail = f"{len(scores)} different scores of {len(texts)} different texts"
    if alike:
        detail += "; a reward model that likes all alike chooses nothing. Train it longer, or take another"
    artifact.check("scores tell answers apart", not alike, detail)


def describe(
    config: RejectionSamplingConfig, scored: Mapping[str, list[CompletionSet]], artifact: Artifact
) -> dict[str, Any]:
    """Metrics of the scores and, with grade=true, of the grades: see `evaluation.best_of_n`.

    `best_of_n.score` is by the scores themselves; `best_of_n.grade` is what the teacher gives the answers that those
    scores choose. The latter falls where the reward model is being exploited. It is taken over the questions whose
    scored answers all have a grade; `ungraded_questions` counts the others.
    """
    from alignkit.evaluation.best_of_n import (
        by_grade,
        by_score,
        describe_best_of_n,
        describe_scores,
        latest_over_previous,
    )

    latest, greedy = scored["latest"], scored.get("greedy", [])
    found: dict[str, Any] = {}
    if "previous" in scored:
        found["latest_over_previous"] = latest_over_previous(latest, scored["previous"])
    measures = {"score": by_score(latest, greedy)}
    if config.grade:
        graded = {name: grade(config, name, scored[name], artifact) for name in ("latest", "greedy") if name in scored}
        measures["grade"], without = by_grade(latest, graded["latest"], graded.get("greedy", []))
        found["ungraded_questions"] = without
        if without:
            LOG.warning("%d of %d questions are left out of the grade curve", without, len(measures["score"]))
    return describe_scores(latest, config.sampling.n) | found | describe_best_of_n(measures, config.sampling.n)


def grade(
    config: RejectionSamplingConfig, name: str, rows: Sequence[CompletionSet], artifact: Artifact
) -> list[CompletionSet]:
    """The rows with their scored completions alone, and the teacher's grades in place of the scores."""
    from alignkit.scoring.best_of_n import scored

    only = [row.model_copy(update={"completions": scored(row.completions)}) for row in rows]
    return score_rows(config, open_judge(config), name, only, artifact, "grade")


if __name__ == "__main__":
    from alignkit.core.app import stage_main

    stage_main("rejection_sampling")
