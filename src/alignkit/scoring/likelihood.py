"""How likely a language model finds an answer behind a prompt: mean log p of the answer's tokens.

Of LLM-Embedder (Zhang et al., 2023, arXiv 2310.07554, section 3.2): the score of a passage k for a query q is
1/|o| * sum over t of log p(o_t | q, k, o_<t), with o the right answer. What prompts that begin alike share is read
once: its keys and values stand before each of their ends. Logits are computed for the tokens of answers alone, never
for those of prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any, NamedTuple

from alignkit.core.records import Message
from alignkit.data.chat import IGNORED, encode_example

if TYPE_CHECKING:
    from torch import Tensor

CPU_BATCH_TOKENS, GPU_BATCH_TOKENS = 1024, 8192
"""Tokens in one forward pass, padding included."""

_KEPT = 8
"""For each token of a pass so many may stand before rows as keys and values that are there already: memory, no work."""

_POSITIONS = 512
"""Positions whose logits are computed at once: of a vocabulary of 150,000, 300 MB in float32."""


class Answered(NamedTuple):
    """Token ids of a prompt, with what opens an answer, and of the answer, without its end-of-turn token."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


class Group(NamedTuple):
    """Rows whose prompts begin with the same `shared` tokens."""

    rows: tuple[Answered, ...]
    shared: int = 0

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(map(len, self.rows))


def encode(tokenizer: Any, prompt: Sequence[Message], answer: str, max_length: int) -> Answered | str:
    """A prompt and its answer as the chat template writes them, or the reason why they cannot be read."""
    encoded = encode_example(tokenizer, prompt, [Message(role="assistant", content=answer)], max_length)
    if isinstance(encoded, str):
        return encoded
    start = encoded.labels.index(next(label for label in encoded.labels if label != IGNORED))
    prompt_ids, answer_ids = encoded.input_ids[:start], encoded.input_ids[start:-1]
    return Answered(tuple(prompt_ids), tuple(answer_ids)) if answer_ids else "empty answer"


def mean_log_probs(
    policy: Any, pad_id: int, rows: Sequence[Answered], batch_tokens: int | None = None, *, share: bool = True
) -> list[float]:
    """For each row the mean of log p, in nats, over the tokens of its answer.

    The order of the rows does not change a value beyond rounding. `share` lets rows that begin alike be read as one.
    """
    import torch

    on_cpu = policy.device.type == "cpu"
    limit = batch_tokens or (CPU_BATCH_TOKENS if on_cpu else GPU_BATCH_TOKENS)
    share = share and policy.config._attn_implementation in ("sdpa", "eager")
    distinct = list(dict.fromkeys(rows))
    groups = list(_share(distinct, limit)) if share else [Group((row,)) for row in distinct]
    found: dict[Answered, float] = {}
    policy.eval()
    with torch.inference_mode():
        for batch in _batches(sorted(groups, key=lambda group: (group.shared, group.longest)), limit):
            members = [row for group in batch for row in group.rows]
            found |= dict(zip(members, _read(policy, pad_id, batch), strict=True))
    return [found[row] for row in rows]


def plain_mean_log_prob(policy: Any, row: Answered) -> float:
    """The same for one row by the model's own forward pass, with all logits: what `mean_log_probs` must agree with."""
    import torch

    ids = torch.tensor([[*row.prompt, *row.answer]], device=policy.device)
    with torch.inference_mode():
        logits = policy(input_ids=ids, use_cache=False).logits[0, len(row.prompt) - 1 : -1].float()
        return float(logits.log_softmax(-1).gather(1, ids[0, len(row.prompt) :, None]).mean())


# -- rows that begin alike ---------------------------------------------------------------------------------------------


def _share(rows: Sequence[Answered], max_tokens: int) -> Iterator[Group]:
    """Rows in groups that begin alike and can be read at once.

    A row joins where at least half of it is shared, so that the beginning of all prompts does not take the place of a
    passage. The last token of a prompt is never shared, since an answer's first token is read off it.
    """
    group: Group | None = None
    for row in sorted(rows):
        if group:
            common = _common(group.rows[0].prompt[: group.shared], row.prompt[:-1])
            wider = Group((*group.rows, row), common)
            if 2 * common >= wider.longest and _fits([wider], max_tokens):
                group = wider
                continue
            yield group if len(group.rows) > 1 else Group(group.rows)
        group = Group((row,), len(row.prompt) - 1)
    if group:
        yield group if len(group.rows) > 1 else Group(group.rows)


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))


def _batches(groups: Sequence[Group], max_tokens: int) -> Iterator[list[Group]]:
    """Cut groups into batches; those that share nothing stand apart from the others."""
    batch: list[Group] = []
    for group in groups:
        if batch and not ((batch[0].shared > 0) == (group.shared > 0) and _fits([*batch, group], max_tokens)):
            yield batch
            batch = []
        batch.append(group)
    if batch:
        yield batch


def _fits(groups: Sequence[Group], max_tokens: int) -> bool:
    """Whether beginnings, ends, and the keys and values of both, padded to the longest, are few enough for a pass."""
    rows, shared = sum(len(group.rows) for group in groups), max(group.shared for group in groups)
    end = max(group.longest - group.shared for group in groups)
    return max(len(groups) * shared, rows * end) <= max_tokens and rows * (shared + end) <= _KEPT * max_tokens


# -- one batch ---------------------------------------------------------------------------------------------------------


def _read(policy: Any, pad_id: int, groups: Sequence[Group]) -> list[float]:
    """Mean log p of the answer of each row of a batch, in order."""
    import torch

    from alignkit.models.value_head import backbone_of

    device, backbone = policy.device, backbone_of(policy)
    ends = [(row.prompt + row.answer)[group.shared :] for group in groups for row in group.rows]
    input_ids = _padded(ends, pad_id).to(device)
    # No mask is needed for padding: it stands behind the texts, where nothing looks.
    before = _read_beginnings(backbone, pad_id, groups, input_ids) if groups[0].shared else {"use_cache": False}
    hidden = backbone(input_ids=input_ids, **before).last_hidden_state

    lengths = torch.tensor([len(row.answer) for group in groups for row in group.rows], device=device)
    starts = torch.tensor([len(end) for end in ends], device=device) - lengths
    rows = torch.repeat_interleave(torch.arange(len(ends), device=device), lengths)
    columns = starts[rows] + torch.arange(len(rows), device=device) - (lengths.cumsum(0) - lengths)[rows]
    log_probs = _log_probs(policy, hidden[rows, columns - 1], input_ids[rows, columns])
    sums = torch.zeros(len(lengths), dtype=log_probs.dtype, device=device).index_add_(0, rows, log_probs)
    return [float(value) for value in (sums / lengths).tolist()]


def _read_beginnings(backbone: Any, pad_id: int, groups: Sequence[Group], ends: Tensor) -> dict[str, Any]:
    """What a pass over the `ends` [rows, longest end] needs to know of what stands before each of them."""
    import torch

    beginnings = _padded([group.rows[0].prompt[: group.shared] for group in groups], pad_id).to(ends.device)
    cache = backbone(input_ids=beginnings, use_cache=True).past_key_values
    owners = torch.tensor([place for place, group in enumerate(groups) for _ in group.rows], device=ends.device)
    cache.batch_select_indices(owners)
    shared = torch.tensor([group.shared for group in groups], device=ends.device)[owners, None]
    columns = torch.arange(beginnings.shape[1] + ends.shape[1], device=ends.device)
    return {
        "past_key_values": cache,
        "use_cache": True,
        "attention_mask": ((columns < shared) | (columns >= beginnings.shape[1])).long(),
        "position_ids": shared + torch.arange(ends.shape[1], device=ends.device),
    }


def _padded(rows: Sequence[Sequence[int]], pad_id: int) -> Tensor:
    """Token ids [rows, longest], padded on the right."""
    import torch

    longest = max(map(len, rows))
    return torch.tensor([[*row, *[pad_id] * (longest - len(row))] for row in rows])


def _log_probs(policy: Any, hidden: Tensor, targets: Tensor) -> Tensor:
    """log p of each target behind its hidden state, in float32: [positions]."""
    import torch

    head = policy.get_output_embeddings()
    found = [
        head(some).float().log_softmax(-1).gather(1, wanted[:, None])[:, 0]
        for some, wanted in zip(hidden.split(_POSITIONS), targets.split(_POSITIONS), strict=True)
    ]
    return torch.cat(found)
