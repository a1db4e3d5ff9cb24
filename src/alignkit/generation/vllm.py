"""vLLM in this process, for GPUs. The surprise: it pins a torch and transformers of its own, rarely those of alignkit.

The usual road to vLLM is therefore `vllm serve` in an environment of its own and generator=openai. This engine is
written to the documented interface of vLLM's `LLM` class and tested against a stand-in of it; nobody has run it yet.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

from alignkit.core.config import ModelConfig, Quantization, SamplingConfig
from alignkit.core.errors import UserError
from alignkit.core.records import Completion, Message
from alignkit.generation.base import check_sampling

MEMORY_SHARE = 0.6
"""Of the GPU for vLLM, which keeps it until the process ends; the reward model needs the rest."""
LORA_RANKS = (64, 128, 256, 320, 512)
"""Ranks that vLLM makes room for, from 64 on."""


class VLLMGenerator:
    """Generates with vLLM: continuous batching, and a prompt's n completions share its cache.

    Each completion has its own temperature, top_p and seed. `shared` is the running engine of another generator of the
    same base, which is used in turn with this one's adapter.
    """

    def __init__(self, model: ModelConfig, adapter: str | None, shared: Any = None) -> None:
        from alignkit.data.chat import end_of_turn_id
        from alignkit.models.loading import check_adapter, load_tokenizer

        if adapter is not None:
            check_adapter(adapter, model)
        self.label = adapter or model.name
        self.adapter = adapter
        self.tokenizer = load_tokenizer(model)
        self.end_id = end_of_turn_id(self.tokenizer)
        self.shared = shared or _open(model, adapter)
        self.tokens_written = 0

    def generate(self, prompts: Sequence[list[Message]], sampling: SamplingConfig, seed: int) -> list[list[Completion]]:
        """`sampling.n` completions for each prompt, all submitted at once; vLLM decides how many run together."""
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        from alignkit.data.chat import encode_prompt
        from alignkit.generation.hf import draw

        check_sampling(sampling)
        drawn = draw(len(prompts) * sampling.n, sampling, seed)
        settings = [
            SamplingParams(
                n=1,
                temperature=round(float(temperature), 3),
                top_p=round(float(top_p), 3),
                max_tokens=sampling.max_new_tokens,
                stop_token_ids=[self.end_id],
                seed=(seed + row) % (1 << 63),
                detokenize=False,
            )
            for row, (temperature, top_p) in enumerate(zip(drawn.temperature, drawn.top_p, strict=True))
        ]
        inputs = [
            {"prompt_token_ids": ids}
            for ids in (encode_prompt(self.tokenizer, prompt) for prompt in prompts)
            for _ in range(sampling.n)
        ]
        number = 1 + crc32(self.label.encode()) % (2**31 - 1)  # vLLM tells adapters apart by it, above 0
        request = None if self.adapter is None else LoRARequest(self.label, number, str(Path(self.adapter).resolve()))
        outputs = self.shared.generate(inputs, settings, lora_request=request)
        self.tokens_written += sum(len(output.outputs[0].token_ids) for output in outputs)
        written = [self._completion(*each) for each in zip(outputs, settings, strict=True)]
        return [written[start : start + sampling.n] for start in range(0, len(written), sampling.n)]

    def _completion(self, output: Any, settings: Any) -> Completion:
        (only,) = output.outputs
        return Completion(
            text=str(self.tokenizer.decode(list(only.token_ids), skip_special_tokens=True)),
            model=self.label,
            sampling={"temperature": settings.temperature, "top_p": settings.top_p},
            finished=only.finish_reason == "stop",
        )


def _open(model: ModelConfig, adapter: str | None) -> Any:
    """vLLM's engine on the base. Raises `UserError` when the package is not installed."""
    from alignkit.models.loading import model_source

    try:
        from vllm import LLM
    except ImportError as error:
        raise UserError(
            f"generator=vllm: {error}. pip install 'alignkit[vllm]' in an environment of its own (it pins another "
            "torch); or start `vllm serve` there and set generator=openai here."
        ) from error
    return LLM(
        model=model_source(model),
        revision=model.revision,
        dtype=model.dtype,
        quantization="bitsandbytes" if model.quantization is Quantization.nf4 else None,
        max_model_len=model.max_length,
        gpu_memory_utilization=MEMORY_SHARE,
        skip_tokenizer_init=True,
        enable_lora=adapter is not None,
        max_lora_rank=_room(adapter),
    )


def _room(adapter: str | None) -> int:
    """The smallest rank that vLLM makes room for and the adapter fits in."""
    if adapter is None:
        return LORA_RANKS[0]
    rank = json.loads((Path(adapter) / "adapter_config.json").read_text(encoding="utf-8"))["r"]
    fitting = [room for room in LORA_RANKS if room >= rank]
    if not fitting:
        raise UserError(f"adapter {adapter}: rank {rank} is more than vLLM takes ({LORA_RANKS[-1]})")
    return fitting[0]
