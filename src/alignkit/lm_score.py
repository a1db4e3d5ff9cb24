"""lm_score: let a language model say which passages help it to the answer: the teacher scores of a retriever.

The score of a passage is the mean of log p(answer token | passage, query), in nats, over the tokens of the right
answer, by the base or by an adapter. A retriever that is trained on these scores finds what the model likes to read.
Passages are scored a few hundred rows at a time; after a kill the same command continues with the next of these.

Reads:   data.path                 queries with passages and answers: mined.jsonl, LLM-Embedder's rows, HotpotQA's
         adapter                   the adapter whose opinion counts (adapter=null: the base)
Writes:  scored.jsonl              the rows with `teacher_scores`, those of `pos` first, then those of `neg`

Overrides people use:
  adapter=runs/mine/sft/adapter    who scores
  data.limit=1000                  the first 1,000 rows only
  model.max_length=2048            a prompt that is longer is dropped with its passage, never cut
  'templates={icl: "{passage}\\n{query}"}'  how passage and query stand in a prompt, by task
  batch_tokens=16384               tokens in one pass

Examples:
  python -m alignkit.lm_score run=mine data.path=runs/mine/mine/mined.jsonl adapter=runs/mine/sft/adapter
  python -m alignkit.lm_score +model=qwen7b run=mine data.path=runs/mine/mine/mined.jsonl adapter=null
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Optional

from alignkit.core.artifact import Artifact
from alignkit.core.config import ModelConfig, RowsConfig, StageConfig
from alignkit.core.errors import UserError

if TYPE_CHECKING:
    from alignkit.core.records import RetrievalExample
    from alignkit.scoring.candidates import CandidateScorer

# ruff: noqa: UP045

ROWS_A_BLOCK = 256
"""Rows whose passages are scored at once, which is what a kill can cost."""


@dataclass
class LmScoreConfig(StageConfig):
    """Configuration of `lm_score`."""

    inputs: ClassVar[tuple[str, ...]] = ("data.path", "adapter", "model.path")
    incidental: ClassVar[tuple[str, ...]] = (*StageConfig.incidental, "batch_tokens")

    data: RowsConfig = field(default_factory=RowsConfig)
    task: Optional[str] = None
    """The task of rows that name none."""
    adapter: Optional[str] = None
    """Who scores; none: the base."""
    template: str = "{passage}\n\n{query}"
    """The user's turn; the default is how training rows put a statement and a question together."""
    templates: dict[str, str] = field(default_factory=dict)
    """In place of `template`, by task."""
    batch_tokens: Optional[int] = None
    """Tokens in one forward pass, padding included; none: 1,024 on a CPU, 8,192 on a GPU."""
    model: ModelConfig = field(default_factory=ModelConfig)

    def __post_init__(self) -> None:
        """Raise `UserError` for templates that leave something out."""
        for key, template in {
            "template": self.template,
            **{f"templates.{k}": v for k, v in self.templates.items()},
        }.items():
            for part in ("{passage}", "{query}"):
                if part not in template:
                    raise UserError(f"{key}: must hold {part}, like '{{passage}}\\n\\n{{query}}'")
        if self.batch_tokens is not None and self.batch_tokens < 1:
            raise UserError(f"batch_tokens={self.batch_tokens}: must be at least 1, or null")


def run(config: LmScoreConfig) -> Artifact:
    """Score every passage of every row, a block of rows after the other, and write them as they are finished."""
    with Artifact.open("lm_score", config) as artifact:
        if artifact.up_to_date:
            return artifact
        from alignkit.core.journal import Journal
        from alignkit.models.loading import load_policy, load_tokenizer
        from alignkit.scoring.candidates import CandidateScorer, Tally

        policy = load_policy(config.model, config.adapter)
        scorer = CandidateScorer(
            policy,
            load_tokenizer(config.model),
            config.model.max_length,
            config.template,
            config.templates,
            config.batch_tokens,
        )
        tally = Tally()
        with Journal(artifact.work_folder / "scores.jsonl", artifact.fingerprint) as journal:
            blocks = scored_blocks(usable_rows(config, artifact), scorer, journal, artifact)
            artifact.write_rows("scored.jsonl", tally.count(blocks))
        if not tally.rows:
            raise UserError(f"data.path={config.data.path}: no row could be scored; see dropped.jsonl")
        artifact.metrics |= tally.describe()
        artifact.summary = tally.summary
    return artifact


def usable_rows(config: LmScoreConfig, artifact: Artifact) -> Iterator[RetrievalExample]:
    """The rows with an answer and a passage, as they are read."""
    from alignkit.core.hashing import count_rows
    from alignkit.core.progress import progress
    from alignkit.core.records import Dropped
    from alignkit.data.sources import stream_retrieval

    rows = stream_retrieval(config.data, config.task)
    whole = Path(config.data.path).is_file() and not config.data.skip and config.data.limit is None
    total = count_rows(Path(config.data.path)) if whole else None
    for row in progress(rows, "score passages, row by row", total):
        if isinstance(row, Dropped):
            artifact.drop(row.row, row.reason, row.detail)
        elif not any(answer.strip() for answer in row.answers):
            artifact.drop(row, "no answer")
        elif not row.pos and not row.neg:
            artifact.drop(row, "no passage")
        else:
            yield row


def scored_blocks(
    rows: Iterable[RetrievalExample], scorer: CandidateScorer, journal: Any, artifact: Artifact
) -> Iterator[RetrievalExample]:
    """The rows with teacher scores, without passages that cannot be scored.

    A block that is not in the journal as a whole is scored anew as a whole, so that an interrupted run ends with the
    very scores of one that was not.
    """
    from alignkit.scoring.candidates import with_scores

    checked = False
    source = iter(rows)
    while block := list(islice(source, ROWS_A_BLOCK)):
        if not all(row.id in journal.done for row in block):
            found = scorer.score(block)
            if not checked:
                difference, count = scorer.difference_to_plain()
                allowed = scorer.allowed_difference
                artifact.check(
                    "scores_are_the_model's", difference <= allowed, f"{count} passages, at most {difference:.1e} apart"
                )
                checked = True
            for row, scores in zip(block, found, strict=True):
                journal.add(row.id, scores)
        for row in block:
            scored = with_scores(row, journal.done[row.id], artifact.drop)
            if scored is not None:
                yield scored


if __name__ == "__main__":
    from alignkit.core.app import stage_main

    stage_main("lm_score")
