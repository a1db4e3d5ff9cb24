"""Packing: several rows in one sequence, and rows end to end in one batch, each blind to the others.

Both save padding. Rows are kept apart by their position ids, which begin again at 0 for each row, and by the attention
mask that transformers makes from them. Whether the model and its attention implementation really do so is measured
before training, not assumed: one that does not would learn from its neighbours, and only a worse model would tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from trl import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from alignkit.core.artifact import Artifact
from alignkit.data.chat import EncodedExample

PROBED_TOKENS = 64
"""Most tokens of a row that the probe uses."""

LEAK = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.02}
"""How much of the logits' spread may change with a neighbour, by the base's dtype: rounding only."""


def rows_dataset(encoded: Sequence[EncodedExample]) -> Dataset:
    """Rows as the trainer reads them."""
    return Dataset.from_dict(
        {"input_ids": [row.input_ids for row in encoded], "labels": [row.labels for row in encoded]}
    )


def pack(encoded: Sequence[EncodedExample], length: int, artifact: Artifact) -> Dataset:
    """Rows in sequences of at most `length` tokens, best fit decreasing, and how well they fill them in the metrics.

    The whole data set is packed at once: TRL's own call packs a thousand rows at a time, which fills long sequences
    less. It would cut a row that is longer than `length`, so that must not happen.
    """
    disable_progress_bars()
    packed = pack_dataset(rows_dataset(encoded), length, "bfd", map_kwargs={"batch_size": len(encoded)})
    tokens = sum(len(row.input_ids) for row in encoded)
    kept = sum(map(sum, packed["seq_lengths"]))
    detail = f"{kept:,} of {tokens:,} tokens of {len(encoded)} rows in {len(packed)} sequences of {length}"
    artifact.check("packing_keeps_every_token", kept == tokens, detail)
    artifact.metrics["packing"] = {"sequences": len(packed), "efficiency": round(tokens / (len(packed) * length), 4)}
    return packed


def check_rows_apart(policy: Any, encoded: Sequence[EncodedExample], artifact: Artifact) -> None:
    """Check that a row gives the same logits behind one neighbour, behind another, and alone.

    The neighbours have the same length, so that nothing but attention can carry them over; alone, the row must also
    have the positions that it has in the pack.
    """
    ids = max(encoded, key=lambda row: len(row.input_ids)).input_ids[:PROBED_TOKENS]
    neighbours = ids[::-1], ids[1:] + ids[:1]
    first, second = (_last_logits(policy, [neighbour, ids]) for neighbour in neighbours)
    alone = _last_logits(policy, [ids])
    spread = float(alone.std())
    change = max(float((first - second).abs().max()), float((first - alone).abs().max())) / spread
    detail = f"{policy.config._attn_implementation}: a row's logits change by {change:.1e} of their spread in a pack"
    passed = change <= LEAK[policy.dtype]
    hint = "" if passed else "; its rows see each other, choose model.attn=sdpa or no packing"
    artifact.check("packed_rows_apart", passed, detail + hint)


def _last_logits(policy: Any, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Logits of the last of some rows laid end to end, [its length, vocabulary]."""
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)([{"input_ids": ids} for ids in rows])
    inputs = {
        key: value.to(policy.device) if isinstance(value, torch.Tensor) else value
        for key, value in batch.items()
        if key != "labels"
    }
    was_training = policy.training
    with torch.no_grad():
        logits: torch.Tensor = policy.eval()(**inputs, use_cache=False).logits
    policy.train(was_training)
    return logits[0, -len(rows[-1]) :].float()
