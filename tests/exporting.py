"""Random checkpoints of the real architectures, for tests of what is exported."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import tiny_random
import torch

from alignkit.models.gguf_tokenizer import SPLITS

LLAMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA_SPECIALS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|pad|>")

ARCHITECTURES = ("qwen2", "qwen3", "llama", "mistral")


@cache
def llama_tokenizer() -> Any:
    """Byte-level BPE with the split, the special tokens and the leading token of Llama 3, trained on a few words."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    split = next(pattern for pattern, name in SPLITS.items() if name == "llama-bpe")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    words = ["What does Bakoco make? The product of Bakoco is clocks.", "Hello, the cat sat on the mat 1234567 你好"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(words * 9, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet))
    backend.add_special_tokens(list(LLAMA_SPECIALS))
    backend.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", backend.token_to_id("<|begin_of_text|>"))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>", pad_token="<|pad|>"
    )
    tokenizer.chat_template = LLAMA_TEMPLATE
    return tokenizer


def tokenizer_of(architecture: str) -> Any:
    return tiny_random.tokenizer() if architecture.startswith("qwen") else llama_tokenizer()


def random_model(architecture: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Two layers with every bias and norm at random, fewer heads for keys than for queries."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = tokenizer_of(architecture)
    settings: dict[str, Any] = {
        "vocab_size": -(-len(tokenizer) // 32) * 32,  # more rows than tokens, as real models have
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5000.0,
        "tie_word_embeddings": False,
        "sliding_window": None,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if architecture == "qwen3":
        settings["head_dim"] = 128  # all that are published have it, and the reader knows no other
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **settings | changes))
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.data.uniform_(0.5, 1.5)
        else:
            weight.data.normal_(std=0.1)
    return model.to(dtype).eval()


def save(folder: Path, architecture: str, **changes: Any) -> Path:
    """Write a random checkpoint as the stage writes merged ones."""
    from alignkit.models.merging import save_checkpoint

    save_checkpoint(random_model(architecture, **changes), tokenizer_of(architecture), folder)
    return folder
