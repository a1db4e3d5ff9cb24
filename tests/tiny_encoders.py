"""Random checkpoints of a few thousand parameters, with a tokenizer of whole words, for tests that need no ability."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

WORDS = "is the mayor of padera old yes no she was born in june what who when ? . a b c d e f g h".split()
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def word_tokenizer(max_length: int = 40) -> Any:
    """Lower-cased words; [CLS] text [SEP], or [CLS] text [SEP] pair [SEP], with token types 0 and 1."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate((*SPECIAL, *WORDS))}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        model_max_length=max_length,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def encoder_settings(**others: Any) -> dict[str, Any]:
    """What BERT's and DeBERTa's configurations need to be tiny, with weights large enough to tell texts apart."""
    return {
        "vocab_size": len(SPECIAL) + len(WORDS),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        **others,
    }


def save_encoder(folder: Path, model_class: Any, config: Any, tokenizer: Any, seed: int = 0) -> Path:
    """Write a random model of the class, and the tokenizer, to `folder`."""
    torch.manual_seed(seed)
    model_class(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
