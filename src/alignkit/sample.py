"""sample: draw n completions for each question from a policy, each with its own temperature and top_p.

Generation is resumable: a killed run continues with the same command and ends with the same completions.

Reads:   data.path               questions (QA examples, Alpaca rows, HotpotQA; answers may be empty)
         adapter                 the policy's adapter; null samples from the base
Writes:  completions.jsonl       prompt, completions with their sampling parameters, and the known answer as reference
         dropped.jsonl           questions that were not sampled for, and why

Overrides people use:
  data.path=questions.jsonl data.limit=500   other questions
  adapter=runs/mine/sft/adapter              another policy
  sampling.n=8                               completions a prompt
  sampling.temperature=[0.7,1.0]             drawn uniformly for each completion
  sampling.batch_size=256                    sequences at once; more is faster while memory lasts

Examples:
  python -m alignkit.sample run=demo
  python -m alignkit.sample +model=qwen7b run=mine sampling.batch_size=32
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import ClassVar, Optional

from alignkit.core.artifact import Artifact
from alignkit.core.config import ModelConfig, RowsConfig, SamplingConfig, StageConfig
from alignkit.core.records import Completion, CompletionSet

REFERENCE = "reference"
"""Who wrote a completion that is the known answer."""


@dataclass
class SampleConfig(StageConfig):
    """Configuration of `sample`."""

    inputs: ClassVar[tuple[str, ...]] = ("data.path", "adapter", "model.path")

    data: RowsConfig = field(default_factory=RowsConfig)
    adapter: Optional[str] = None  # noqa: UP045
    """The policy's adapter; none samples from the base."""
    include_reference: bool = False
    """Add the known answer, where there is one, as one more completion, to be graded like the others."""
    model: ModelConfig = field(default_factory=ModelConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)


def run(config: SampleConfig) -> Artifact:
    """Read the questions, generate for each, write the completions."""
    from alignkit.generation.base import check_sampling

    check_sampling(config.sampling)
    with Artifact.open("sample", config) as artifact:
        if artifact.up_to_date:
            return artifact
        from alignkit.core.journal import Journal
        from alignkit.generation.hf import HFGenerator, merge_adapter
        from alignkit.generation.questions import describe_samples, read_prompts
        from alignkit.generation.resumable import generate_all
        from alignkit.models.loading import load_policy, load_tokenizer

        tokenizer = load_tokenizer(config.model)
        rows, dropped = read_prompts(config.data, tokenizer, config.model, config.sampling)
        for each in dropped:
            artifact.drop(each.row, each.reason, each.detail)

        policy = merge_adapter(load_policy(config.model, config.adapter))
        generator = HFGenerator(policy, tokenizer, config.adapter or config.model.name)
        started = time.monotonic()
        with Journal(artifact.work_folder / "completions.jsonl", artifact.fingerprint) as journal:
            written = generate_all(generator, rows, config.sampling, config.seed, journal)
        seconds = time.monotonic() - started

        sets = [row.model_copy(update={"completions": written[row.id]}) for row in rows]
        artifact.metrics |= describe_samples(sets)
        if generator.tokens_written:  # not when the journal held everything
            artifact.metrics["tokens_per_second"] = round(generator.tokens_written / seconds)
        if config.include_reference:
            sets = [with_reference(row) for row in sets]
        artifact.write_rows("completions.jsonl", sets)
        artifact.summary = f"{artifact.metrics['completions']} completions of {len(sets)} prompts"
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
