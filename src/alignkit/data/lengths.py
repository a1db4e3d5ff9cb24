"""How long rows are in tokens, as `sft` would see them, and what a `max_length` would cost."""

from __future__ import annotations

import sys
from array import array
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from alignkit.core.config import ModelConfig, RowsConfig
from alignkit.core.errors import UserError
from alignkit.core.records import Dropped

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROUND = 64
"""Proposed lengths are multiples of this."""

Order = Callable[[Sequence[int]], Iterable[int]]
"""From the lengths of rows to the row numbers in the order in which training takes them."""


@dataclass(frozen=True)
class Summary:
    """Lengths in tokens. A percentile is the smallest length that so many rows do not exceed."""

    rows: int
    tokens: int
    mean: float
    median: int
    p90: int
    p99: int
    longest: int


@dataclass(frozen=True)
class Cost:
    """What a max_length does to rows of known lengths."""

    max_length: int
    rows_dropped: int
    rows_kept_share: float
    tokens_kept_share: float
    padding_share: float | None
    """Share of a batch that is padding; None when no row is left."""
    packed_sequences: int
    """Sequences of max_length that hold the kept rows, none of them cut."""


def row_lengths(tokenizer: PreTrainedTokenizerBase, rows: RowsConfig, model: ModelConfig) -> Iterator[int | Dropped]:
    """The length of each row as `sft` would read it whole, or the row with the reason why it could not be used."""
    from alignkit.data.chat import encode_row
    from alignkit.data.sources import stream_examples

    unbounded = replace(model, max_length=sys.maxsize)
    for example in stream_examples(rows):
        if isinstance(example, Dropped):
            yield example
            continue
        encoded = encode_row(tokenizer, example, unbounded)
        if isinstance(encoded, str):
            yield Dropped(reason=encoded, row=example.model_dump(mode="json", exclude_none=True))
        else:
            yield from (len(row.input_ids) for row in encoded)


def collect(found: Iterable[int | Dropped], drop: Callable[[Dropped], None], path: str) -> array[int]:
    """The lengths, in the order of the rows; what has none goes to `drop`. Raises `UserError` when none is left."""
    lengths = array("I")
    reasons: set[str] = set()
    for each in found:
        if isinstance(each, Dropped):
            reasons.add(each.reason)
            drop(each)
        else:
            lengths.append(each)
    if not lengths:
        raise UserError(f"{path}: no row can be used ({'; '.join(sorted(reasons))}). Give another file.")
    return lengths


def summarise(lengths: Sequence[int]) -> Summary:
    """Count, sum, mean, percentiles and maximum."""
    ordered = sorted(lengths)
    total = sum(ordered)
    median, p90, p99 = (percentile(ordered, share) for share in (50, 90, 99))
    return Summary(len(ordered), total, total / len(ordered), median, p90, p99, ordered[-1])


def percentile(ordered: Sequence[int], percent: int) -> int:
    """The smallest of some rising numbers that `percent` of them do not exceed (nearest rank)."""
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]


def counts_by_length(lengths: Sequence[int]) -> list[tuple[int, int, int, float]]:
    """For each length that occurs: the length, its rows, the rows up to it, and their share."""
    table, up_to = [], 0
    for length, count in sorted(Counter(lengths).items()):
        up_to += count
        table.append((length, count, up_to, up_to / len(lengths)))
    return table


def candidates(summary: Summary) -> list[int]:
    """Lengths worth a look: powers of two and their halves between, up to the first that holds every row."""
    found = []
    for power in range(7, 40):
        for length in (2**power, 2**power + 2 ** (power - 1)):
            found.append(length)
            if length >= summary.longest:
                return found
    return found


def cost(lengths: Sequence[int], max_length: int, batch_size: int, order: Order) -> Cost:
    """What `max_length` costs when rows go to batches of `batch_size` in `order`, each padded to its longest."""
    kept = [length for length in lengths if length <= max_length]
    return Cost(
        max_length,
        len(lengths) - len(kept),
        len(kept) / len(lengths),
        sum(kept) / sum(lengths),
        padding_share(kept, batch_size, order) if kept else None,
        packed_sequences(kept, max_length),
    )


def padding_share(lengths: Sequence[int], batch_size: int, order: Order) -> float:
    """Share of all places of all batches that is padding."""
    taken = [lengths[row] for row in order(lengths)]
    batches = [taken[start : start + batch_size] for start in range(0, len(taken), batch_size)]
    places = sum(len(batch) * max(batch) for batch in batches)
    return 1 - sum(taken) / places


def packed_sequences(lengths: Sequence[int], max_length: int) -> int:
    """Sequences of `max_length` that best fit, longest row first, needs for rows that are not cut.

    Each row goes where it leaves the least room (Johnson, 1973: at most 11/9 of the optimum and a few).
    """
    rooms: list[int] = []  # what is left in each open sequence, rising
    count = 0
    for length in sorted(lengths, reverse=True):
        place = bisect_left(rooms, length)
        if place == len(rooms):
            count += 1
            left = max_length - length
        else:
            left = rooms.pop(place) - length
        if left:
            insort(rooms, left)
    return count


def suggest(lengths: Sequence[int], share: float = 0.99) -> int:
    """The smallest multiple of 64 that keeps this share of the rows."""
    ordered = sorted(lengths)
    needed = percentile(ordered, round(100 * share))
    return -(-needed // ROUND) * ROUND
