"""How far one model is from another that should be the same: in distribution, in log-probability, in logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alignkit.data.chat import IGNORED, EncodedExample

MOST_TOKENS = 2048
"""Most that two models are compared on: the whole distribution of each is held, 1.2 GB with Qwen's 152,000 words."""
CHUNK = 128
"""Tokens whose distributions are compared at once, in float64."""


@dataclass(frozen=True)
class Divergence:
    """Of a model from a reference, over `tokens` next-token distributions."""

    mean_kl: float
    """KL(reference || model) a token, in nats."""
    mean_log_prob_difference: float
    """Mean |log p - log q| of the tokens that stand there."""
    max_logit_difference: float
    tokens: int

    def __str__(self) -> str:
        return (
            f"mean KL {self.mean_kl:.2g} nats, mean log-prob difference {self.mean_log_prob_difference:.2g}, "
            f"largest logit difference {self.max_logit_difference:.2g}, over {self.tokens} tokens"
        )


def within(rows: Sequence[EncodedExample], tokens: int = MOST_TOKENS) -> list[EncodedExample]:
    """The first rows that learn at most so many tokens together, but at least one row."""
    chosen: list[EncodedExample] = []
    total = 0
    for row in rows:
        total += len(_targets(row))
        if chosen and total > tokens:
            break
        chosen.append(row)
    return chosen


@torch.inference_mode()
def learned_logits(model: Any, rows: Sequence[EncodedExample]) -> Tensor:
    """Logits [learned tokens, vocabulary] at the positions before each learned token, float32, on the CPU.

    A row is read alone, so that padding changes nothing.
    """
    device = next(model.parameters()).device
    found = []
    for row in rows:
        logits = model(input_ids=torch.tensor([row.input_ids], device=device), use_cache=False).logits[0, :-1]
        learned = torch.tensor(row.labels[1:], device=device) != IGNORED
        found.append(logits[learned].float().cpu())
    return torch.cat(found)


def divergence(reference: Tensor, other: Tensor, rows: Sequence[EncodedExample]) -> Divergence:
    """Compare the `learned_logits` of two models on the same rows.

    KL(P || Q) = sum_i p_i (log p_i - log q_i), with P the reference's distribution (Kullback and Leibler, 1951).
    """
    targets = torch.tensor([token for row in rows for token in _targets(row)])
    kl, difference, largest = 0.0, 0.0, 0.0
    for p, q, ids in _chunks(reference, other, targets):
        largest = max(largest, float((p - q).abs().max()))
        log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
        kl += float((log_p.exp() * (log_p - log_q)).sum())
        difference += float((log_p - log_q).gather(1, ids[:, None]).abs().sum())
    return Divergence(kl / len(targets), difference / len(targets), largest, len(targets))


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for p, q, ids in zip(*(tensor.split(CHUNK) for tensor in tensors), strict=True):
        yield p.double(), q.double(), ids


def _targets(row: EncodedExample) -> list[int]:
    return [label for label in row.labels[1:] if label != IGNORED]
