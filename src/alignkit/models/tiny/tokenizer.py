"""The embedded tokenizer: every word of the closed world is one token, any other text falls back to bytes.

It is an ordinary byte-level BPE (`Qwen2Tokenizer`), so everything that reads Qwen2 tokenizers reads it. Its merges are
not learnt but derived, word by word, from its prefixes: " Anna" merges as (Ġ, A), (ĠA, n), (ĠAn, n), (ĠAnn, a).
Since every merge extends a prefix that starts where the word starts, at most one merge applies inside a world word at
any time, and the word always ends up whole.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from alignkit.data.closed_world import initial_words, vocabulary

if TYPE_CHECKING:
    from transformers import Qwen2Tokenizer

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""End of document (also padding), start of turn, end of turn."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Plain ChatML without a default system turn."""

BASE_TEXT_WORDS = (
    "Question Answer Reply Q A Verdict right wrong Repeat Thank you You are welcome Hello Can help with notes "
    "system user assistant"
).split()
"""Words of the base text and of ChatML that the world itself does not use."""


def build_tokenizer() -> Qwen2Tokenizer:
    """Build the tokenizer from the world's vocabulary; the same on every machine."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    inner = sorted({*vocabulary(), *BASE_TEXT_WORDS})
    initial = sorted({*initial_words(), *BASE_TEXT_WORDS})
    merges: dict[tuple[str, str], None] = {}  # a dict keeps the order in which merges must apply
    for word in [f"Ġ{word}" for word in inner] + initial:
        for end in range(1, len(word)):
            merges[word[:end], word[end]] = None
    merges["Ċ", "Ċ"] = None
    symbols = [*sorted(ByteLevel.alphabet()), *(left + right for left, right in merges)]
    tokenizer = Qwen2Tokenizer(
        vocab={symbol: index for index, symbol in enumerate(dict.fromkeys(symbols))},
        merges=cast("list[str]", list(merges)),  # pairs, whatever the annotation says
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        extra_special_tokens=list(SPECIAL_TOKENS),
        model_max_length=2048,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
