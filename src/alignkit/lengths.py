"""lengths: how long the rows are in tokens, and what each max_length would cost.

Rows are read and tokenised as `sft` would, one at a time; only the tokenizer of the model is loaded.

Reads:   data.path: rows with prompt and answer (QA examples, prompt/completion, messages, Alpaca, HotpotQA)
Writes:  lengths.csv               length,count,rows_up_to,share
         max_length.csv            what candidates for model.max_length cost: rows, tokens, padding, packed sequences
         lengths.html              both as a page, with a histogram
         dropped.jsonl             rows that sft could not use at any length, and why

Overrides people use:
  data.path=mine.jsonl             which rows
  model=qwen7b                     whose tokenizer
  candidates=512,1024,2048         lengths to compare (default: from 128 up to the longest row)
  batch_size=4                     for the share of padding

Examples:
  python -m alignkit.lengths +model=tiny data.path=mine.jsonl
  python -m alignkit.lengths +model=qwen7b data.path=mine.jsonl candidates=1024,2048
"""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from alignkit.core.artifact import Artifact
from alignkit.core.config import ModelConfig, RowsConfig, StageConfig
from alignkit.core.errors import UserError

if TYPE_CHECKING:
    from alignkit.data.lengths import Cost

LOG = logging.getLogger("alignkit")


@dataclass
class LengthsConfig(StageConfig):
    """Which rows, by whose tokenizer."""

    inputs: ClassVar[tuple[str, ...]] = ("data.path", "model.path")

    data: RowsConfig = field(default_factory=RowsConfig)
    candidates: list[int] = field(default_factory=list)
    """Values for model.max_length to compare; none: from 128 up to the longest row."""
    batch_size: int = 8
    """Rows of a batch, for the share of padding."""
    keep_share: float = 0.99
    """Share of the rows that the proposed max_length has to keep."""
    model: ModelConfig = field(default_factory=ModelConfig)


def run(config: LengthsConfig) -> Artifact:
    """Count tokens, compare lengths, propose one."""
    if not 0 < config.keep_share <= 1 or config.batch_size < 1 or any(each < 1 for each in config.candidates):
        raise UserError("keep_share must be above 0 and at most 1, batch_size and candidates at least 1")
    with Artifact.open("lengths", config) as artifact:
        if artifact.up_to_date:
            return artifact
        from alignkit.core.progress import progress
        from alignkit.data import lengths
        from alignkit.models.loading import load_tokenizer
        from alignkit.reporting.lengths import render_lengths

        there = next((entry["rows"] for entry in artifact.inputs if entry["key"] == "data.path"), None)
        found = progress(
            lengths.row_lengths(load_tokenizer(config.model), config.data, config.model),
            "lengths",
            config.data.limit or there,
        )
        rows = lengths.collect(found, lambda each: artifact.drop(each.row, each.reason, each.detail), config.data.path)
        summary = lengths.summarise(rows)
        table = lengths.counts_by_length(rows)
        tried = config.candidates or lengths.candidates(summary)
        costs = [lengths.cost(rows, each, config.batch_size, in_training_order(config)) for each in sorted(tried)]
        proposed = lengths.suggest(rows, config.keep_share)
        kept = lengths.cost(rows, proposed, config.batch_size, in_training_order(config))

        artifact.write_text("lengths.csv", as_csv(("length", "count", "rows_up_to", "share"), table))
        artifact.write_text("max_length.csv", as_csv(asdict(costs[0]), (asdict(each).values() for each in costs)))
        title = f"{config.data.path}, tokenizer of {config.model.name}"
        artifact.write_text("lengths.html", render_lengths(title, summary, table, costs, kept, config.batch_size))
        artifact.metrics = {**asdict(summary), "proposed_max_length": proposed}
        show(costs, config.batch_size)
        artifact.summary = suggestion(kept)
    return artifact


def in_training_order(config: LengthsConfig) -> Any:
    """The order in which `sft` takes rows: those of similar length together, shuffled by the seed."""
    from alignkit.training.batches import LengthGroupedSampler

    return lambda lengths: LengthGroupedSampler(lengths, config.batch_size, config.seed)


def as_csv(header: Iterable[str], lines: Iterable[Iterable[Any]]) -> str:
    """A table as CSV; shares with six digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([f"{cell:.6f}" if isinstance(cell, float) else cell for cell in line] for line in lines)
    return text.getvalue()


def show(costs: Sequence[Cost], batch_size: int) -> None:
    """The table on the terminal."""
    LOG.info("max_length  rows dropped  rows kept  tokens kept  padding at %d  packed sequences", batch_size)
    for each in costs:
        padding = "-" if each.padding_share is None else f"{each.padding_share:.1%}"
        LOG.info(
            "%10d %13d %10.2f%% %11.2f%% %13s %17d",
            *(each.max_length, each.rows_dropped, 100 * each.rows_kept_share, 100 * each.tokens_kept_share),
            *(padding, each.packed_sequences),
        )


def suggestion(kept: Cost) -> str:
    """The proposed length in one line."""
    return (
        f"model.max_length={kept.max_length} keeps {kept.rows_kept_share:.1%} of the rows "
        f"and {kept.tokens_kept_share:.1%} of the tokens"
    )


if __name__ == "__main__":
    from alignkit.core.app import stage_main

    stage_main("lengths")
