"""How far a policy has moved, in its own words: its divergence from the reference, estimated from sampled answers.

What training logs on chosen and rejected answers is no divergence: the policy would not write them. Only answers that
are drawn from the policy itself estimate it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from accelerate.utils import broadcast_object_list
from trl import DPOTrainer

from alignkit.core.config import SamplingConfig
from alignkit.core.ranks import is_main
from alignkit.data.chat import end_of_turn_id
from alignkit.generation.hf import decode, draw
from alignkit.training.log_probs import Answer, answer_log_probs
from alignkit.training.reference_store import reference_log_probs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_TOKENS = 128
"""Where a sampled answer is cut off; the divergence is then that of the first so many tokens."""

AT_ONCE = 64
"""Prompts answered at once."""


def sampled_answers(
    trainer: DPOTrainer, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]], seed: int
) -> list[Answer]:
    """One answer to each prompt, drawn from the model as it stands, at temperature 1, by the main process for all."""
    model: Any = trainer.model
    plain = SamplingConfig(n=1, temperature=[1.0, 1.0], top_p=[1.0, 1.0], max_new_tokens=MOST_TOKENS)
    drawn: list[list[int]] = []
    if is_main():
        noise, end_id, pad_id = draw(len(prompts), plain, seed), end_of_turn_id(tokenizer), tokenizer.pad_token_id
        for first in range(0, len(prompts), AT_ONCE):
            some = prompts[first : first + AT_ONCE]
            rows = noise.take(range(first, first + len(some)))
            drawn += decode(model.eval(), some, rows, end_id=end_id, pad_id=int(pad_id))
    shared = [drawn]
    broadcast_object_list(shared)
    return [Answer(prompt, tokens) for prompt, tokens in zip(prompts, shared[0], strict=True)]


def log_ratios(trainer: DPOTrainer, answers: Sequence[Answer]) -> list[float]:
    """log p_policy(answer | prompt) - log p_reference(answer | prompt) of each, in nats.

    Over answers drawn from the policy their mean is an unbiased estimate of KL(policy || reference). A single one may
    be negative; the divergence is not.
    """
    policy = answer_log_probs(trainer, answers, "log-probs of sampled answers")
    reference, _ = reference_log_probs(trainer, answers, None)
    return [ours - theirs for ours, theirs in zip(policy, reference, strict=True)]
