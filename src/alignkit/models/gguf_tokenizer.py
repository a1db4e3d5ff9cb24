"""A tokenizer as GGUF describes it: tokens with their types, merges, and the name of the rule that splits text.

What a GGUF file cannot say is a normaliser. Qwen's tokenizers compose characters first (NFC); llama.cpp does not, so a
text in decomposed form gets other ids there. Whoever serves such texts composes them before.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from alignkit.core.errors import UserError
from alignkit.data.chat import end_of_turn_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{_REST}": "qwen2",
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}{_REST}": "llama-bpe",
}
"""The pattern that splits text before merging -> what llama.cpp calls it. A wrong name gives other ids, silently."""


def describe_tokenizer(tokenizer: PreTrainedTokenizerBase, rows: int) -> dict[str, Any]:
    """The `tokenizer.*` entries of a GGUF file for an embedding of so many rows, by their names there.

    A turn's end is the end of generation. Raises `UserError` for a tokenizer that llama.cpp would read otherwise.
    """
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    end = end_of_turn_id(tokenizer)
    tokens, types = zip(*_tokens(tokenizer, rows), strict=True)
    entries: dict[str, Any] = {
        "model": "gpt2",  # llama.cpp's word for byte-level BPE
        "pre": _split_name(parts, tokenizer),
        "tokens": list(tokens),
        "token_type": [int(each) for each in types],
        "merges": [" ".join(pair) for pair in parts["model"]["merges"]],
        "eos_token_id": end,
        "eot_token_id": end,
        "padding_token_id": tokenizer.pad_token_id,
        "add_bos_token": bool(_adds_bos(tokenizer)),
        "chat_template": str(tokenizer.chat_template),
    }
    if tokenizer.bos_token_id is not None:
        entries["bos_token_id"] = tokenizer.bos_token_id
    return entries


def _tokens(tokenizer: PreTrainedTokenizerBase, rows: int) -> Iterator[tuple[str, int]]:
    """Text and type of every row of the embedding; rows without a token (padding to a round number) are unused."""
    from gguf import TokenType

    texts = {id: text for text, id in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    if max(texts) >= rows:
        raise UserError(f"the tokenizer has a token with id {max(texts)}, but the model only {rows} embeddings")
    for id in range(rows):
        if id not in texts:
            yield f"[PAD{id}]", TokenType.UNUSED
        elif id in added:
            yield texts[id], TokenType.CONTROL if added[id].special else TokenType.USER_DEFINED
        else:
            yield texts[id], TokenType.NORMAL


def _split_name(parts: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """llama.cpp's name of the pre-tokenizer; `UserError` for any but a byte-level BPE with a split that it knows."""
    steps = (parts.get("pre_tokenizer") or {}).get("pretokenizers", [])
    patterns = [step["pattern"].get("Regex") for step in steps if step["type"] == "Split"]
    kinds = [step["type"] for step in steps]
    if parts["model"]["type"] != "BPE" or kinds != ["Split", "ByteLevel"] or patterns[0] not in SPLITS:
        raise UserError(
            f"formats: gguf is not written for this tokenizer ({type(tokenizer).__name__}), which splits text as "
            f"none of {', '.join(SPLITS.values())} does: llama.cpp would read other tokens. Leave gguf out and use "
            "llama.cpp's convert_hf_to_gguf.py on merged/."
        )
    return SPLITS[patterns[0]]


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer.bos_token_id in tokenizer("a").input_ids[:1]
