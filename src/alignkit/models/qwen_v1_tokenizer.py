"""The tokenizer of the first Qwen models: `qwen.tiktoken` as the native, fast Qwen2 tokenizer."""

from __future__ import annotations

import base64
import binascii
import math
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, cast

from alignkit.core.errors import UserError

if TYPE_CHECKING:
    from transformers import Qwen2Tokenizer

VOCABULARY = "qwen.tiktoken"

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END, *(f"<|extra_{number}|>" for number in range(205)))
"""The 208 special tokens; their ids follow the last rank of the vocabulary file."""

CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    "{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML with the system turn that the model's own `chat` puts first when it is given none."""


def load_tokenizer(path: str | Path) -> Qwen2Tokenizer:
    """The tokenizer of a first-Qwen checkpoint folder, native and fast, from its `qwen.tiktoken`.

    Ids are those of tiktoken with the model's own pattern. A turn ends with `<|im_end|>`; padding is `<|endoftext|>`.
    Raises `UserError` when the file is missing, damaged, or no byte-pair vocabulary.
    """
    from tokenizers import AddedToken
    from transformers import Qwen2Tokenizer

    file = Path(path) / VOCABULARY
    ranks = _read_ranks(file)
    letters = _byte_letters()
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = []
    for token in (token for token in ranks if len(token) > 1):
        parts = _last_merge(token, ranks)
        if parts is None:
            raise UserError(
                f"{file}:{ranks[token] + 1}: {token!r} cannot be merged from two earlier tokens, so this is no "
                "byte-pair vocabulary. Download the file again."
            )
        merges.append((spelled[parts[0]], spelled[parts[1]]))
    tokenizer = Qwen2Tokenizer(
        vocab={spelled[token]: rank for token, rank in ranks.items()},
        merges=cast("list[str]", merges),  # pairs, whatever the annotation says
        eos_token=END_OF_TEXT,  # first, so that the special tokens get their ids in order
        pad_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.eos_token = TURN_END
    tokenizer.chat_template = CHAT_TEMPLATE
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(len(ranks), len(ranks) + 208))
    return tokenizer


def _read_ranks(file: Path) -> dict[bytes, int]:
    """Token to rank, in the order of ranks: 0, 1, 2, ... Every single byte is a token."""
    if not file.is_file():
        raise UserError(f"{file}: not there. A first-Qwen checkpoint folder holds its vocabulary under that name.")
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(file.read_bytes().splitlines()):
        try:
            word, rank = line.split()
            token = base64.b64decode(word, validate=True)
            in_order = int(rank) == number and token not in ranks and token
        except (ValueError, binascii.Error):
            in_order = b""
        if not in_order:
            raise UserError(
                f"{file}:{number + 1}: expected a new base64 token and its rank {number}. Download the file again."
            )
        ranks[token] = number
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise UserError(f"{file}: {len(missing)} of the 256 single bytes have no rank. Download the file again.")
    return ranks


def _last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    """The two parts that are merged last when `token` is built from its bytes; None when it cannot be built.

    Byte-pair encoding always merges the leftmost pair of the lowest rank (Sennrich et al., 2016, arXiv 1508.07909), so
    the way to a token is the same wherever it stands, and one merge for each token says all that the ranks say.
    """
    parts = [token[index : index + 1] for index in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, math.inf) for left, right in pairwise(parts)]
        lowest = min(pairs)
        if lowest >= ranks[token]:
            return None
        where = pairs.index(lowest)
        parts[where : where + 2] = [parts[where] + parts[where + 1]]
    return (parts[0], parts[1]) if max(ranks[parts[0]], ranks[parts[1]]) < ranks[token] else None


def _byte_letters() -> list[str]:
    """The printable letter that byte-level tokenizers write for each byte (GPT-2's table)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    stand_ins = iter(range(256, 512))
    return [chr(byte if byte in printable else next(stand_ins)) for byte in range(256)]
