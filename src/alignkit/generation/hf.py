"""The default engine: a Hugging Face causal language model, decoded by a plain loop of our own.

`model.generate` runs every prompt n times from the start, applies one temperature and top_p to a whole batch, and
keeps finished rows in the batch. Here completions of a prompt share what they have in common, the prompt and every
token until they part; each has its own temperature and top_p; and finished ones leave the batch. All noise is drawn
before decoding, a row at a time, so what a row draws depends neither on its neighbours nor on when they finish.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alignkit.core.config import ModelConfig, SamplingConfig
from alignkit.core.records import Completion, Message, Tools
from alignkit.data.chat import encode_prompt, end_of_turn_id
from alignkit.generation.base import check_sampling

CANDIDATES = 64
"""Most likely tokens that are looked at first; rows that top_p spreads wider than that sort the whole vocabulary."""


class HFGenerator:
    """Generates with a causal language model, with or without adapters, on whatever device it is.

    A completion ends with the end-of-turn token of the tokenizer's chat template. `adapter` names the one to generate
    with, where the model has several; `tools` are the functions that every prompt offers.
    """

    def __init__(
        self, model: Any, tokenizer: Any, label: str, adapter: str | None = None, tools: Tools | None = None
    ) -> None:
        self.model = model.eval()
        self.adapter = adapter
        self.tools = tools
        self.tokenizer = tokenizer
        self.label = label
        self.end_id = end_of_turn_id(tokenizer)
        self.tokens_written = 0

    @property
    def shared(self) -> Any:
        """The model, where its base can take another adapter: while its own is not added into the weights."""
        from peft import PeftModel

        return self.model if isinstance(self.model, PeftModel) else None

    def generate(self, prompts: Sequence[list[Message]], sampling: SamplingConfig, seed: int) -> list[list[Completion]]:
        """`sampling.n` completions for each prompt; `sampling.batch_size` sequences, at least n, run at once."""
        check_sampling(sampling)
        if self.adapter is not None:
            self.model.set_adapter(self.adapter)
        draws = draw(len(prompts) * sampling.n, sampling, seed)
        encoded = [encode_prompt(self.tokenizer, prompt, self.tools) for prompt in prompts]
        by_length = sorted(range(len(prompts)), key=lambda index: len(encoded[index]))
        prompts_at_once = max(1, sampling.batch_size // sampling.n)
        written: dict[int, list[Completion]] = {}
        for start in range(0, len(prompts), prompts_at_once):
            batch = by_length[start : start + prompts_at_once]
            rows = [index * sampling.n + sample for index in batch for sample in range(sampling.n)]
            chosen = draws.take(rows)
            tokens = decode(
                self.model,
                [encoded[index] for index in batch],
                chosen,
                end_id=self.end_id,
                pad_id=self.tokenizer.pad_token_id,
            )
            self.tokens_written += sum(map(len, tokens))
            completions = [self._completion(*row) for row in zip(tokens, chosen.temperature, chosen.top_p, strict=True)]
            for place, index in enumerate(batch):
                written[index] = completions[place * sampling.n : (place + 1) * sampling.n]
        return [written[index] for index in range(len(prompts))]

    def _completion(self, tokens: list[int], temperature: Tensor, top_p: Tensor) -> Completion:
        finished = bool(tokens) and tokens[-1] == self.end_id
        return Completion(
            text=self.tokenizer.decode(tokens, skip_special_tokens=True),
            model=self.label,
            sampling={"temperature": round(float(temperature), 3), "top_p": round(float(top_p), 3)},
            finished=finished,
        )


@dataclass(frozen=True)
class Draws:
    """All randomness of some rows: `temperature` [rows], `top_p` [rows] and uniform `noise` [rows, steps]."""

    temperature: Tensor
    top_p: Tensor
    noise: Tensor

    def take(self, rows: Sequence[int] | Tensor) -> Draws:
        """The draws of these rows, in this order."""
        index = torch.as_tensor(rows)
        return Draws(self.temperature[index], self.top_p[index], self.noise[index])


def draw(rows: int, sampling: SamplingConfig, seed: int) -> Draws:
    """Draw temperature and top_p (to three decimals) and the noise of `rows` completions, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(rows, 2 + sampling.max_new_tokens, generator=generator)
    lowest, highest = torch.tensor([sampling.temperature, sampling.top_p]).T
    values = (lowest + uniform[:, :2] * (highest - lowest)).round(decimals=3)
    return Draws(values[:, 0], values[:, 1], uniform[:, 2:])


@torch.inference_mode()
def decode(model: Any, prompts: Sequence[list[int]], draws: Draws, *, end_id: int, pad_id: int) -> list[list[int]]:
    """Continue each prompt len(draws) / len(prompts) times; returns the new tokens of each row, `end_id` included.

    Rows of the same prompt stand beside each other. A row ends after `end_id` or after all its steps of noise. Rows
    that have written the same tokens so far are one branch, which the model reads once: at first a branch is a prompt,
    and it splits where its rows draw different tokens.
    """
    device = next(model.parameters()).device
    rows, steps = draws.noise.shape
    input_ids, mask = (tensor.to(device) for tensor in pad_left(prompts, pad_id))
    position = (mask.cumsum(dim=-1) - 1).clamp(min=0)
    output = model(input_ids=input_ids, attention_mask=mask, position_ids=position, use_cache=True, logits_to_keep=1)
    cache, position = output.past_key_values, position[:, -1:]
    draws = Draws(draws.temperature.to(device), draws.top_p.to(device), draws.noise.to(device))
    alive = torch.arange(rows, device=device)
    branch = alive // (rows // len(prompts))
    written = torch.full((rows, steps), -1, device=device)
    for step in range(steps):
        now, logits = draws.take(alive), output.logits[:, -1].float()
        tokens = sample_tokens(logits[branch], now.temperature, now.top_p, now.noise[:, step])
        written[alive, step] = tokens
        going = tokens != end_id
        alive, branch, tokens = alive[going], branch[going], tokens[going]
        if len(alive) == 0 or step == steps - 1:
            break
        split, branch = torch.unique(branch * logits.shape[-1] + tokens, return_inverse=True)
        parent, tokens = split // logits.shape[-1], split % logits.shape[-1]
        if len(parent) != len(mask) or not torch.equal(parent, torch.arange(len(mask), device=device)):
            cache.batch_select_indices(parent)
            mask, position = mask[parent], position[parent]
        mask, position = torch.nn.functional.pad(mask, (0, 1), value=1), position + 1
        output = model(
            input_ids=tokens[:, None],
            attention_mask=mask,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
        )
    return [[token for token in row if token >= 0] for row in written.tolist()]


def sample_tokens(logits: Tensor, temperature: Tensor, top_p: Tensor, noise: Tensor) -> Tensor:
    """Draw one token a row from the nucleus (Holtzman et al., 2020, arXiv 1904.09751).

    `logits` [rows, vocabulary]; `temperature`, `top_p` and `noise` (uniform in [0, 1)) [rows]. With the tokens in order
    of falling probability p_1 >= p_2 >= ... under softmax(logits / temperature), the nucleus is the shortest p_1 .. p_k
    whose sum reaches `top_p`, and the drawn token is the first i with p_1 + ... + p_i > noise * (p_1 + ... + p_k).
    Temperature 0 takes the most likely token.
    """
    probabilities = torch.softmax(logits / temperature.clamp(min=1e-4)[:, None], dim=-1)
    found, order = probabilities.topk(min(CANDIDATES, logits.shape[-1]), dim=-1)
    if bool((found.sum(dim=-1) < top_p).any()):
        found, order = probabilities.sort(dim=-1, descending=True)
    cumulative = found.cumsum(dim=-1)
    nucleus = (cumulative - found < top_p[:, None]).sum(dim=-1, keepdim=True)
    mass = cumulative.gather(-1, nucleus - 1)
    place = torch.searchsorted(cumulative, noise[:, None] * mass, right=True)
    drawn = order.gather(-1, torch.minimum(place, nucleus - 1))[:, 0]
    return torch.where(temperature == 0, logits.argmax(dim=-1), drawn)


def pad_left(sequences: Sequence[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token ids [rows, longest] and their mask (1 real, 0 padding), padded on the left."""
    longest = max(len(sequence) for sequence in sequences)
    ids = torch.tensor([[pad_id] * (longest - len(sequence)) + sequence for sequence in sequences])
    mask = torch.tensor([[0] * (longest - len(sequence)) + [1] * len(sequence) for sequence in sequences])
    return ids, mask


def load_generator(model: ModelConfig, adapter: str | None, shared: Any = None) -> HFGenerator:
    """A generator with an adapter on the base, or with the base alone.

    On `shared`, a policy with other adapters of the same model, the adapter joins the base, which is not loaded again.
    """
    from peft import PeftModel

    from alignkit.models.loading import add_adapter, load_policy, load_tokenizer

    tokenizer, label = load_tokenizer(model), adapter or model.name
    if shared is not None and adapter is not None:
        add_adapter(shared, adapter, model, adapter_name := f"adapter-{len(shared.peft_config) + 1}")
        return HFGenerator(shared, tokenizer, label, adapter_name)
    policy = merge_adapter(load_policy(model, adapter))
    return HFGenerator(policy, tokenizer, label, "default" if isinstance(policy, PeftModel) else None)


def merge_adapter(policy: Any) -> Any:
    """The policy with its adapter added into the weights, which makes decoding faster; in fp32 and unquantised only.

    In 16 or 4 bits the sum would be rounded to another model, so there the policy is returned as it is.
    """
    from peft import PeftModel

    if not isinstance(policy, PeftModel) or policy.dtype != torch.float32:
        return policy
    if getattr(policy.get_base_model(), "quantization_method", None) is not None:
        return policy
    return policy.merge_and_unload()
