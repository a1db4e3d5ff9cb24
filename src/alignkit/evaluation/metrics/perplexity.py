"""How unlikely a system finds the reference answer: one pass over the references, no text is generated."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from alignkit.core.journal import Journal
from alignkit.core.progress import progress
from alignkit.core.records import Message
from alignkit.data.chat import IGNORED, EncodedExample, encode_example
from alignkit.training.batches import parts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOG = logging.getLogger("alignkit")

BATCH_TOKENS = 2048
"""Tokens, padding included, that are read at once; a longer row is read alone."""

Referenced = tuple[str, list[Message], str]
"""Id, prompt and reference answer of a row."""


def log_perplexities(
    model: Any, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Referenced], max_length: int, journal: Journal
) -> dict[str, float]:
    """Mean -log p of the reference's tokens given the prompt, end of turn included, in nats a token, by row id.

    exp of it is the perplexity. Rows that the tokenizer cannot take or that have more than `max_length` tokens are not
    in it; the log says how many. Rows of similar length are read together, in the same batches in every run, so that an
    interrupted run ends with the same numbers; a finished batch is in the journal. Of a batch's logits only those of
    the reference's tokens are made, and none are kept.
    """
    encoded, refused = _encode(tokenizer, rows, max_length)
    if refused:
        LOG.warning("no log-perplexity for %d of %d rows, the first because: %s", len(refused), len(rows), refused[0])
    order = sorted(encoded, key=lambda id: len(encoded[id].input_ids))
    batches = [order[part] for part in parts([len(encoded[id].input_ids) for id in order], BATCH_TOKENS)]
    left = [batch for batch in batches if any(id not in journal.done for id in batch)]
    for batch in progress(left, "read references") if left else ():
        for id, value in zip(batch, mean_nll(model, [encoded[id] for id in batch]), strict=True):
            journal.add(id, value)
    return {id: journal.done[id] for id in order}


def _encode(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Referenced], max_length: int
) -> tuple[dict[str, EncodedExample], list[str]]:
    encoded, refused = {}, []
    for id, prompt, reference in rows:
        row = encode_example(tokenizer, prompt, [Message(role="assistant", content=reference)], max_length)
        if isinstance(row, str):
            refused.append(f"{id}: {row}")
        else:
            encoded[id] = row
    return encoded, refused


@torch.inference_mode()
def mean_nll(model: Any, rows: Sequence[EncodedExample]) -> list[float]:
    """Of each row the mean of -log p(token | all before it) over its learned tokens, in nats, from one forward pass."""
    device = next(model.parameters()).device
    longest = max(len(row.input_ids) for row in rows)
    ids = torch.tensor([row.input_ids + [0] * (longest - len(row.input_ids)) for row in rows], device=device)
    labels = torch.tensor([row.labels + [IGNORED] * (longest - len(row.labels)) for row in rows], device=device)
    mask = torch.tensor(
        [[1] * len(row.input_ids) + [0] * (longest - len(row.input_ids)) for row in rows], device=device
    )
    targets = labels[:, 1:]
    places = (targets != IGNORED).any(dim=0).nonzero()[:, 0]  # where any row has a token of its reference next
    logits = model.eval()(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=places).logits
    nll = torch.nn.functional.cross_entropy(
        logits.float().transpose(1, 2), targets[:, places], ignore_index=IGNORED, reduction="none"
    )
    counts = (targets != IGNORED).sum(dim=1)
    return [float(value) for value in (nll.double().sum(dim=1) / counts).tolist()]
