"""A backbone with a value head, read for several answers to one prompt in a single pass.

The answers to a prompt stand behind it in one row, and the attention mask lets each see the prompt and itself only:

    prompt prompt prompt  answer1 answer1 end  answer2 end  padding
    0      0      0       1       1       1    2       2    -1          segments
    0      1      2       3       4       5    3       4    0           positions

An answer's hidden states are then those of the conversation prompt + answer read alone, but the prompt is computed once
instead of once an answer, in training as in scoring.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alignkit.core.errors import UserError


@dataclass(frozen=True)
class PromptGroup:
    """A prompt and some answers to it as token ids; each answer ends with the end-of-turn token."""

    prompt: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        """Tokens in a row."""
        return len(self.prompt) + sum(map(len, self.answers))

    def split(self, max_tokens: int) -> Iterator[PromptGroup]:
        """The same answers in order, over as many groups of at most `max_tokens` as it takes; none is left empty."""
        taken: list[tuple[int, ...]] = []
        length = len(self.prompt)
        for answer in self.answers:
            if taken and length + len(answer) > max_tokens:
                yield PromptGroup(self.prompt, tuple(taken))
                taken, length = [], len(self.prompt)
            taken.append(answer)
            length += len(answer)
        yield PromptGroup(self.prompt, tuple(taken))


def collate(groups: Sequence[PromptGroup], pad_id: int) -> dict[str, Tensor]:
    """Lay groups out as rows, padded on the right.

    Returns `input_ids`, `segments` and `position_ids` [rows, longest] as in the module's picture, and `last`
    [answers, 2]: row and column of each answer's last token, in order.
    """
    longest = max(map(len, groups))
    input_ids = torch.full((len(groups), longest), pad_id)
    segments = torch.full((len(groups), longest), -1)
    position_ids = torch.zeros((len(groups), longest), dtype=torch.long)
    last: list[tuple[int, int]] = []
    for row, group in enumerate(groups):
        end = 0
        for segment, tokens in enumerate([group.prompt, *group.answers]):
            start, end = end, end + len(tokens)
            first_position = 0 if segment == 0 else len(group.prompt)
            input_ids[row, start:end] = torch.tensor(tokens, dtype=torch.long)
            segments[row, start:end] = segment
            position_ids[row, start:end] = torch.arange(first_position, first_position + len(tokens))
            if segment > 0:
                last.append((row, end - 1))
    return {"input_ids": input_ids, "segments": segments, "position_ids": position_ids, "last": torch.tensor(last)}


def batches(order: Sequence[int], lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Cut `order` (by rising length) into batches whose rows, padded to the longest, hold at most `batch_tokens`."""
    batch: list[int] = []
    for place in order:
        if batch and (len(batch) + 1) * lengths[place] > batch_tokens:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def visible(segments: Tensor) -> Tensor:
    """Attention mask [rows, 1, length, length]: True where a token (third axis) may look at another (last axis).

    A token looks at itself and at earlier tokens of its own segment and of the prompt (segment 0).
    """
    length = segments.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    related = (segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, :, None])
    return (earlier & related)[:, None]


def attention_mask(segments: Tensor, implementation: str) -> Tensor:
    """What `visible` says in the form that `sdpa` or `eager` attention takes."""
    mask = visible(segments)
    if implementation == "eager":  # adds its mask, where sdpa reads it as true and false
        return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, torch.finfo(torch.float16).min)
    return mask


def backbone_of(policy: Any) -> torch.nn.Module:
    """The decoder below a policy's language-model head; adapters live inside its layers."""
    language_model = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
    backbone: torch.nn.Module = language_model.base_model
    return backbone


class ValueHeadModel(torch.nn.Module):
    """Last hidden state of a causal language model -> a number by each of its linear heads, which are held in fp32.

    Heads have no bias: pairs of answers cannot teach it, and the reward model's offset takes its place. Each begins at
    a random place of its own. `policy` is the language model, with or without adapters; its language-model head is not
    used. Raises `UserError` for attention kernels that take no mask of our own.
    """

    def __init__(self, policy: Any, heads: int = 1) -> None:
        super().__init__()
        attention = policy.config._attn_implementation
        if attention not in ("sdpa", "eager"):
            raise UserError(
                f"model.attn={attention}: the reward model needs a free attention mask; set model.attn=sdpa"
            )
        self.policy = policy
        hidden_size = policy.config.get_text_config().hidden_size
        self.value_head = torch.nn.Linear(hidden_size, heads, bias=False, dtype=torch.float32, device=policy.device)
        torch.nn.init.normal_(self.value_head.weight, std=(hidden_size + 1) ** -0.5)

    @property
    def mean_head(self) -> Tensor:
        """The one head [1, hidden size] that says what all heads say on average."""
        return self.value_head.weight.detach().mean(dim=0, keepdim=True)

    @property
    def backbone(self) -> torch.nn.Module:
        """The decoder below the language-model head."""
        return backbone_of(self.policy)

    def forward(self, input_ids: Tensor, segments: Tensor, position_ids: Tensor, last: Tensor) -> Tensor:
        """What each head says of each answer of a `collate`d batch: [answers, heads]."""
        mask = attention_mask(segments, self.policy.config._attn_implementation)
        hidden = self.backbone(
            input_ids=input_ids, attention_mask=mask, position_ids=position_ids, use_cache=False
        ).last_hidden_state
        with torch.autocast(hidden.device.type, enabled=False):  # in 16 bits close answers would tie
            scores: Tensor = self.value_head(hidden[last[:, 0], last[:, 1]].float())
        return scores

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Called by the trainer. The non-reentrant kind, because the first layer's input needs no gradient."""
        language_model = self.policy.get_base_model() if hasattr(self.policy, "get_base_model") else self.policy
        language_model.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers, offload)
