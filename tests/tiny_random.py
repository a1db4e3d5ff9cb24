"""A random Qwen2 model of a few thousand parameters with the embedded tokenizer, for tests that need no ability."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch

from alignkit.core.config import ModelConfig
from alignkit.core.records import Message
from alignkit.models.tiny.tokenizer import build_tokenizer


@cache
def tokenizer() -> Any:
    return build_tokenizer()


def random_model(seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """Two layers, hidden size 32; the same weights for the same seed."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=len(tokenizer()),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.2,
        eos_token_id=tokenizer().eos_token_id,
        pad_token_id=tokenizer().pad_token_id,
        use_sliding_window=False,
    )
    torch.manual_seed(seed)
    model: torch.nn.Module = Qwen2ForCausalLM(config)
    return model.to(dtype).eval()


def save_random_base(folder: Path, seed: int = 0) -> ModelConfig:
    """Write the random model to `folder` and return the configuration that loads it."""
    random_model(seed).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return ModelConfig(name="random", path=str(folder), dtype="float32", max_length=256)


def user(text: str) -> list[Message]:
    return [Message(role="user", content=text)]


def conversation(question: str, answer: str) -> list[Message]:
    return [*user(question), Message(role="assistant", content=answer)]
