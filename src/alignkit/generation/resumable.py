"""Generation over many prompts that a kill cannot lose: fixed chunks, a seed for each, and a journal."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from typing import Protocol

from alignkit.core.config import SamplingConfig
from alignkit.core.journal import Journal
from alignkit.core.progress import progress
from alignkit.core.records import Completion, Message
from alignkit.generation.base import Generator

LOG = logging.getLogger("alignkit")

BATCHES_PER_CHUNK = 4
"""A chunk is what a kill can cost. Within one, prompts are sorted by length, so that little of a batch is padding."""


class Prompted(Protocol):
    """A row to generate for: anything with an `id` and a `prompt`, such as a `CompletionSet`."""

    @property
    def id(self) -> str: ...  # noqa: D102

    @property
    def prompt(self) -> list[Message]: ...  # noqa: D102


def generate_all(
    generator: Generator,
    rows: Sequence[Prompted],
    sampling: SamplingConfig,
    seed: int,
    journal: Journal,
    rows_a_chunk: int | None = None,
) -> dict[str, list[Completion]]:
    """Completions by row id for all `rows`; chunks that the journal already holds are not generated again.

    Chunk k always holds the same rows and is seeded by (`seed`, k), so an interrupted run that is resumed ends with the
    same completions as one that was not. Row ids must be unique. `rows_a_chunk` is by default what fills a few batches.
    """
    size = rows_a_chunk or chunk_size(sampling)
    chunks = [rows[start : start + size] for start in range(0, len(rows), size)]
    left = [(index, chunk) for index, chunk in enumerate(chunks) if any(row.id not in journal.done for row in chunk)]
    if len(left) < len(chunks):
        LOG.info("resuming generation: %d of %d chunks are in the journal", len(chunks) - len(left), len(chunks))
    for index, chunk in progress(left, f"generating with {generator.label}") if left else ():
        completions = generator.generate([row.prompt for row in chunk], sampling, chunk_seed(seed, index))
        for row, written in zip(chunk, completions, strict=True):
            journal.add(row.id, [completion.model_dump() for completion in written])
    return {row.id: [Completion.model_validate(entry) for entry in journal.done[row.id]] for row in rows}


def chunk_size(sampling: SamplingConfig) -> int:
    """Prompts in a chunk."""
    return BATCHES_PER_CHUNK * max(1, sampling.batch_size // sampling.n)


def chunk_seed(seed: int, index: int) -> int:
    """A seed for chunk `index` that shares nothing with its neighbours' (63 bits, as torch's generators take)."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{index}".encode()).digest()[:8], "big") >> 1
