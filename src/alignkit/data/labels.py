"""Looking at labels before training: what is wrong with them, how much is learned, and how rows look."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from alignkit.data.chat import IGNORED, EncodedExample, end_of_turn_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Characters that could steer a terminal."""


def audit_labels(tokenizer: PreTrainedTokenizerBase, encoded: Sequence[EncodedExample]) -> list[tuple[str, bool, str]]:
    """Check the labels before training: (name, passed, detail) for each rule. Rows may be padded.

    Rows are all conversations, or all documents. What is learned falls into blocks: runs of learned tokens, each up to
    an end token at most. There must be one for each end that is to be learned, so a turn of another role that is
    learned, too, is one too many. Only in a piece of a document that goes on elsewhere has a block no end.
    """
    pad, turn_end = tokenizer.pad_token_id, end_of_turn_id(tokenizer)
    documents = bool(encoded) and encoded[0].document_end is not None
    results: list[tuple[bool, ...]] = []
    for row in encoded:
        end = turn_end if row.document_end is None else row.document_end
        blocks = _learned_blocks(row.labels, end)
        learned = [place for block in blocks for place in block]
        results.append(
            (
                bool(blocks),
                sum(row.labels[block[-1]] == end for block in blocks) == row.ends,
                bool(blocks) and learned[0] > 0 and len(blocks) == max(row.ends, 1),
                pad == end or all(row.labels[place] != pad for place in learned),
                all(row.labels[place] == row.input_ids[place] for place in learned),
            )
        )
    names = (
        "every row learns something",
        "end of document is learned" if documents else "end of turn is learned",
        "first token is not learned" if documents else "prompt is not learned",
        "padding is not learned",
        "labels equal the tokens",
    )
    by_rule = [[row[number] for row in results] for number in range(len(names))]
    return [(name, bool(rule) and all(rule), _count(rule)) for name, rule in zip(names, by_rule, strict=True)]


def count_learned(encoded: Sequence[EncodedExample]) -> dict[str, int]:
    """How many rows and tokens there are, and how many turns, or documents in how many pieces, are learned."""
    learned = sum(label != IGNORED for row in encoded for label in row.labels)
    counts = {
        "rows": len(encoded),
        "tokens": sum(len(row.input_ids) for row in encoded),
        "learned_tokens": learned,
    }
    ends = sum(row.ends for row in encoded)
    documents = bool(encoded) and encoded[0].document_end is not None
    return counts | ({"documents": ends, "pieces": len(encoded)} if documents else {"turns": ends})


def preview(
    tokenizer: PreTrainedTokenizerBase, encoded: Sequence[EncodedExample], count: int = 3, *, colour: bool = True
) -> str:
    """The first rows as text: what is learned stands in brackets ⟦ ⟧ and, with `colour`, in green on a terminal."""
    green, grey, plain = ("\033[32m", "\033[90m", "\033[0m") if colour else ("", "", "")
    shown = []
    for row in encoded[:count]:
        parts = []
        for is_learned, ids in _runs(row):
            text = _CONTROL.sub("␛", str(tokenizer.decode(ids)))
            parts.append(f"{green}⟦{text}⟧{plain}" if is_learned else f"{grey}{text}{plain}")
        shown.append("".join(parts))
    return "\n\n".join(f"row {number}\n{text}" for number, text in enumerate(shown, 1))


def _learned_blocks(labels: Sequence[int], end: int) -> list[list[int]]:
    """The positions that are learned, in runs; a run ends where the row goes on unlearned, and behind an end token."""
    blocks: list[list[int]] = []
    for place, label in enumerate(labels):
        if label == IGNORED:
            continue
        begins = not blocks or blocks[-1][-1] != place - 1 or labels[place - 1] == end
        blocks.append([place]) if begins else blocks[-1].append(place)
    return blocks


def _count(results: list[bool]) -> str:
    if all(results):
        return f"{len(results)} rows"
    return f"{results.count(False)} of {len(results)} rows fail, the first is row {results.index(False) + 1}"


def _runs(row: EncodedExample) -> Iterator[tuple[bool, list[int]]]:
    """The row's tokens in runs that are learned or not."""
    pairs: Any = zip(row.labels, row.input_ids, strict=True)
    for is_learned, run in groupby(pairs, key=lambda pair: pair[0] != IGNORED):
        yield is_learned, [id for _, id in run]
