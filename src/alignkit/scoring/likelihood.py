"""How likely a language model finds an answer behind a prompt: mean log p of the answer's tokens.

Of LLM-Embedder (Zhang et al., 2023, arXiv 2310.07554, section 3.2): the score of a passage k for a query q is
1/|o| * sum over t of log p(o_t | q, k, o_<t), with o the right answer. Prompts that begin alike are read in one row, as
`models.value_head` reads several answers to one prompt: what they share is computed once. Logits are computed for the
tokens of answers alone, never for those of prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any, NamedTuple

from alignkit.core.records import Message
from alignkit.data.chat import IGNORED, encode_example

if TYPE_CHECKING:
    from torch import Tensor

    from alignkit.models.value_head import PromptGroup

CPU_BATCH_TOKENS, GPU_BATCH_TOKENS = 1024, 8192
"""Tokens in one forward pass, padding included."""

_POSITIONS = 512
"""Positions whose logits are computed at once: of a vocabulary of 150,000, 300 MB in float32."""


class Answered(NamedTuple):
    """Token ids of a prompt, with what opens an answer, and of the answer, without its end-of-turn token."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


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

    from alignkit.models.value_head import batches

    on_cpu = policy.device.type == "cpu"
    limit = batch_tokens or (CPU_BATCH_TOKENS if on_cpu else GPU_BATCH_TOKENS)
    share = share and policy.config._attn_implementation in ("sdpa", "eager")
    distinct = list(dict.fromkeys(rows))
    parts = list(_share(distinct, limit) if share else _apart(distinct))
    by_length = sorted(range(len(parts)), key=lambda place: (len(parts[place][1].answers) > 1, len(parts[place][1])))
    found: dict[Answered, float] = {}
    policy.eval()
    with torch.inference_mode():
        for batch in batches(by_length, [len(group) for _, group in parts], limit):
            members = [row for place in batch for row in parts[place][0]]
            values = _read(policy, pad_id, [parts[place][1] for place in batch], [len(row.answer) for row in members])
            found |= dict(zip(members, values, strict=True))
    return [found[row] for row in rows]


def plain_mean_log_prob(policy: Any, row: Answered) -> float:
    """The same for one row by the model's own forward pass, with all logits: what `mean_log_probs` must agree with."""
    import torch

    ids = torch.tensor([[*row.prompt, *row.answer]], device=policy.device)
    with torch.inference_mode():
        logits = policy(input_ids=ids, use_cache=False).logits[0, len(row.prompt) - 1 : -1].float()
        return float(logits.log_softmax(-1).gather(1, ids[0, len(row.prompt) :, None]).mean())


# -- rows that begin alike ---------------------------------------------------------------------------------------------


def _apart(rows: Sequence[Answered]) -> Iterator[tuple[list[Answered], PromptGroup]]:
    """Each row by itself."""
    from alignkit.models.value_head import PromptGroup

    for row in rows:
        yield [row], PromptGroup((), (row.prompt + row.answer,))


def _share(rows: Sequence[Answered], max_tokens: int) -> Iterator[tuple[list[Answered], PromptGroup]]:
    """Rows in groups that have a beginning in common, at most `max_tokens` long where more than one row is in a group.

    A row joins where at least half of it is shared: attention reads a group as a whole, so that less would not pay.
    The last token of a prompt is never shared, since an answer's first token is read off it.
    """
    group: list[Answered] = []
    shared = 0
    for row in sorted(rows):
        common = _common(group[0].prompt[:shared], row.prompt[:-1]) if group else 0
        longer = common + sum(len(each) - common for each in [*group, row])
        if group and 2 * common >= max(map(len, [*group, row])) and longer <= max_tokens:
            group.append(row)
            shared = common
            continue
        if group:
            yield _as_group(group, shared)
        group, shared = [row], len(row.prompt) - 1
    if group:
        yield _as_group(group, shared)


def _as_group(rows: list[Answered], shared: int) -> tuple[list[Answered], PromptGroup]:
    from alignkit.models.value_head import PromptGroup

    if len(rows) == 1:
        return next(_apart(rows))
    return rows, PromptGroup(rows[0].prompt[:shared], tuple((row.prompt + row.answer)[shared:] for row in rows))


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))


# -- one batch ---------------------------------------------------------------------------------------------------------


def _read(policy: Any, pad_id: int, groups: Sequence[PromptGroup], answer_lengths: Sequence[int]) -> list[float]:
    """Mean log p of each answer of a batch, in order; `answer_lengths` are their tokens, the last ones of a segment."""
    import torch

    from alignkit.models.value_head import attention_mask, backbone_of, collate

    inputs = {name: value.to(policy.device) for name, value in collate(groups, pad_id).items()}
    arguments = {"input_ids": inputs["input_ids"], "use_cache": False}
    if any(len(group.answers) > 1 for group in groups):
        implementation = policy.config._attn_implementation
        arguments["attention_mask"] = attention_mask(inputs["segments"], implementation)
        arguments["position_ids"] = inputs["position_ids"]
    # Else no mask is needed: padding stands behind the texts, where nothing looks.
    hidden = backbone_of(policy)(**arguments).last_hidden_state
    lengths = torch.tensor(answer_lengths, device=policy.device)
    owners = torch.repeat_interleave(torch.arange(len(lengths), device=policy.device), lengths)
    before = torch.arange(len(owners), device=policy.device) - (lengths.cumsum(0) - lengths)[owners]
    rows, columns = inputs["last"][owners, 0], inputs["last"][owners, 1] - lengths[owners] + 1 + before
    log_probs = _log_probs(policy, hidden[rows, columns - 1], inputs["input_ids"][rows, columns])
    sums = torch.zeros(len(lengths), dtype=log_probs.dtype, device=policy.device).index_add_(0, owners, log_probs)
    return [float(value) for value in (sums / lengths).tolist()]


def _log_probs(policy: Any, hidden: Tensor, targets: Tensor) -> Tensor:
    """log p of each target behind its hidden state, in float32: [positions]."""
    import torch

    head = policy.get_output_embeddings()
    found = [
        head(some).float().log_softmax(-1).gather(1, wanted[:, None])[:, 0]
        for some, wanted in zip(hidden.split(_POSITIONS), targets.split(_POSITIONS), strict=True)
    ]
    return torch.cat(found)
