"""sample: draw n completions for each question, each at a temperature and top_p of its own.

generator=hf draws them from a policy, and so does generator=vllm where vLLM is installed; generator=openai asks the
teacher, any model behind an OpenAI-compatible server, for the temperature only. All are resumable: a killed run
continues with the same command and ends with the same completions, and no answer of a teacher is paid for twice.

Reads:   data.path               questions (QA examples, Alpaca rows, HotpotQA; answers may be empty)
         adapter                 the policy's adapter; null samples from the base (not read with generator=openai)
Writes:  completions.jsonl       prompt, completions with their sampling parameters, and the known answer as reference
         dropped.jsonl           questions that were not sampled for, and answers that could not be used, and why

Overrides people use:
  data.path=questions.jsonl data.limit=500   other questions
  adapter=runs/mine/sft/adapter              another policy
  generator=openai teacher=vllm              let a served model answer
  sampling.n=8                               completions a prompt
  sampling.temperature=[0.7,1.0]             drawn uniformly for each completion
  sampling.batch_size=256                    sequences at once; more is faster while memory lasts

Examples:
  python -m alignkit.sample run=demo
  python -m alignkit.sample +model=qwen7b run=mine sampling.batch_size=32
  python -m alignkit.sample run=mine generator=openai teacher=openai teacher.model=<model> sampling.n=8
"""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass, field
from typing import ClassVar, Optional

from alignkit.core.artifact import Artifact
from alignkit.core.config import ModelConfig, RowsConfig, SamplingConfig, TeacherStageConfig
from alignkit.core.errors import UserError
from alignkit.core.records import Completion, CompletionSet
from alignkit.generation.engines import GeneratorKind

REFERENCE = "reference"
"""Who wrote a completion that is the known answer."""

LOG = logging.getLogger("alignkit")


@dataclass
class SampleConfig(TeacherStageConfig):
    """Configuration of `sample`."""

    inputs: ClassVar[tuple[str, ...]] = ("data.path", "adapter", "model.path")

    data: RowsConfig = field(default_factory=RowsConfig)
    generator: GeneratorKind = GeneratorKind.hf
    """Who answers: the policy (model and adapter; vllm: in vLLM), or the teacher."""
    adapter: Optional[str] = None  # noqa: UP045
    """The policy's adapter; none samples from the base."""
    include_reference: bool = False
    """Add the known answer, where there is one, as one more completion, to be graded like the others."""
    model: ModelConfig = field(default_factory=ModelConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        """With a teacher no policy has to exist."""
        if self.generator is GeneratorKind.openai:
            self.adapter = None
            self.model = ModelConfig(name="none", path="none")


def run(config: SampleConfig) -> Artifact:
    """Read the questions, generate for each, write the completions."""
    from alignkit.generation.base import check_sampling
    from alignkit.generation.questions import describe_samples

    check_sampling(config.sampling)
    if not 0 <= config.max_failure_rate <= 1:
        raise UserError(f"max_failure_rate={config.max_failure_rate}: must lie between 0 and 1")
    asks_teacher = config.generator is GeneratorKind.openai
    if config.dry_run:
        if not asks_teacher:
            raise UserError("dry_run=true: says what a teacher would cost; with generator=hf there is nothing to pay")
        return estimate(config)
    with Artifact.open("sample", config, always=asks_teacher and config.teacher.retry_failed) as artifact:
        if artifact.up_to_date:
            return artifact
        sets = sample_teacher(config, artifact) if asks_teacher else sample_policy(config, artifact)
        artifact.metrics |= describe_samples(sets)
        if config.include_reference:
            sets = [with_reference(row) for row in sets]
        artifact.write_rows("completions.jsonl", sets)
        artifact.summary = f"{artifact.metrics['completions']} completions of {len(sets)} prompts"
        if asks_teacher:
            failed, asked = artifact.metrics["failed"], artifact.metrics["requested"]
            detail = f"{failed} of {asked} requests without a usable answer; dropped.jsonl has the reasons"
            artifact.check("answers usable", failed <= config.max_failure_rate * asked, detail)
    return artifact


def sample_policy(config: SampleConfig, artifact: Artifact) -> list[CompletionSet]:
    """The questions with completions of the policy; chunks that the journal holds are not generated again."""
    from alignkit.core.journal import Journal
    from alignkit.generation.engines import open_engine
    from alignkit.generation.questions import read_prompts
    from alignkit.generation.resumable import generate_all
    from alignkit.models.loading import load_tokenizer

    tokenizer = load_tokenizer(config.model)
    rows, dropped = read_prompts(config.data, tokenizer, config.model, config.sampling)
    artifact.drop_all(dropped)

    generator = open_engine(config.generator, config.model, config.adapter, config.teacher)
    started = time.monotonic()
    with Journal(artifact.work_folder / "completions.jsonl", artifact.fingerprint) as journal:
        written = generate_all(generator, rows, config.sampling, config.seed, journal)
    if generator.tokens_written:  # not when the journal held everything
        artifact.metrics["tokens_per_second"] = round(generator.tokens_written / (time.monotonic() - started))
    return [row.model_copy(update={"completions": written[row.id]}) for row in rows]


def sample_teacher(config: SampleConfig, artifact: Artifact) -> list[CompletionSet]:
    """The questions with completions of the teacher; answers that could not be used are dropped one by one."""
    from alignkit.data.sources import read_questions
    from alignkit.generation.openai import OpenAIGenerator
    from alignkit.generation.questions import prompt_row
    from alignkit.reporting.yields import what_it_took
    from alignkit.teacher.client import open_teacher

    questions, dropped = read_questions(config.data)
    artifact.drop_all(dropped)
    rows = [prompt_row(question) for question in questions]
    generator = OpenAIGenerator(open_teacher(config.teacher), config.teacher.model)
    written = generator.generate([row.prompt for row in rows], config.sampling, config.seed)
    for position, answer in generator.failures:
        artifact.drop(rows[position], str(answer.reason), answer.detail)
    artifact.metrics |= {"requested": len(rows) * config.sampling.n, "failed": len(generator.failures)}
    artifact.metrics |= {"teacher": config.teacher.model, "usage": asdict(generator.teacher.usage)}
    for name, value in what_it_took(generator.teacher.usage, config.teacher.prices):
        LOG.info("%-7s %s", name, value)
    if not any(written):
        raise UserError(f"sample: no usable answer at all, mostly: {artifact.dropped.most_common(1)[0][0]}")
    return [
        row.model_copy(update={"completions": completions})
        for row, completions in zip(rows, written, strict=True)
        if completions
    ]


def estimate(config: SampleConfig) -> Artifact:
    """Say what the teacher would be asked, and what that would cost."""
    from alignkit.data.sources import read_questions
    from alignkit.generation.openai import OpenAIGenerator
    from alignkit.generation.questions import prompt_row
    from alignkit.teacher.dry_run import DryRunTeacher

    artifact = Artifact.open("sample", config, always=True)
    questions, _ = read_questions(config.data)
    teacher = DryRunTeacher(config.teacher)
    prompts = [prompt_row(question).prompt for question in questions]
    OpenAIGenerator(teacher, config.teacher.model).generate(prompts, config.sampling, config.seed)
    LOG.info("%s", teacher.report())
    artifact.summary = "dry run, nothing was sent"
    return artifact


def with_reference(row: CompletionSet) -> CompletionSet:
    """The row with its known answer as one more completion; the row itself when none is known."""
    if row.reference is None:
        return row
    known = Completion(text=row.reference, model=REFERENCE)
    return row.model_copy(update={"completions": [*row.completions, known]})


if __name__ == "__main__":
    from alignkit.core.app import stage_main

    stage_main("sample")
