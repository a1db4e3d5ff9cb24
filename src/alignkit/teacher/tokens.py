"""How many tokens a text has, before it is sent: counted where that is possible offline, else estimated.

`tiktoken` counts exactly, but would download its encoding where it does not find it; so it is only asked when the file
lies in its cache. Otherwise the pieces are counted into which such tokenizers cut a text before they merge its bytes:
each becomes at least one token, and a long one, or one in a script with many letters, more of them.

Against `o200k_base` this was off by at most 12 % on each of a dozen files of English, JSON and code. On single
sentences it was off by up to 30 % for German, Italian, Chinese, Japanese, Korean, Greek and Arabic, by 60 % for
Russian, and for Hindi and Thai it is more than twice too high.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from alignkit.core.records import Message

ESTIMATE_MARGIN = 0.4
"""Relative error that is told with an estimate."""
DEFAULT_ENCODING = "o200k_base"
"""Of a model whose encoding is not known."""
TOKENS_PER_MESSAGE = 4
"""Around the content of each chat message, its role among them; three more begin the reply (OpenAI cookbook)."""
TOKENS_BEFORE_REPLY = 3
ASCII_WEIGHT, ALPHABET_WEIGHT, WIDE_WEIGHT = 1 / 9, 0.35, 0.8
"""Tokens a character: ASCII, the other alphabets (below U+0800), and everything above, such as Chinese."""
_PIECE = re.compile(r" ?[^\W\d_]+|\d{1,3}| ?[^\w\s]+|_+|\s*[\r\n]+|\s+(?=\s)|\s")
_ENCODING_FILES = {
    "cl100k_base": "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
    "o200k_base": "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
}
"""SHA-256 of the encoding files; tiktoken replaces a file with another hash by a download."""


@dataclass(frozen=True)
class TokenCounter:
    """Counts the tokens of texts, by `how` it says; `margin` is the relative error, 0 for exact counts."""

    count: Callable[[str], int]
    how: str
    margin: float

    def count_messages(self, messages: Sequence[Message]) -> int:
        """The tokens of a conversation that a reply is asked for."""
        contents = sum(self.count(message.content) + TOKENS_PER_MESSAGE for message in messages)
        return contents + TOKENS_BEFORE_REPLY


def token_counter(model: str) -> TokenCounter:
    """The best counter for a model that needs no network."""
    name = encoding_name(model) or DEFAULT_ENCODING
    if not is_cached(name):
        return TokenCounter(estimate_tokens, f"estimate, ±{ESTIMATE_MARGIN:.0%}", ESTIMATE_MARGIN)
    import tiktoken

    encoding = tiktoken.get_encoding(name)

    def count(text: str) -> int:
        return len(encoding.encode_ordinary(text))

    if encoding_name(model) is None:
        how = f"by {name}, an estimate for this model, ±{ESTIMATE_MARGIN:.0%}"
        return TokenCounter(count, how, ESTIMATE_MARGIN)
    return TokenCounter(count, f"by {name}", 0.0)


def estimate_tokens(text: str) -> int:
    """The sum over the pieces of a text: what the characters of each weigh, and at least 1."""
    return math.ceil(sum(max(1.0, _weight(piece)) for piece in _PIECE.findall(text)))


def encoding_name(model: str) -> str | None:
    """The encoding of a model that tiktoken knows by name; None for any other."""
    import tiktoken

    try:
        return tiktoken.encoding_name_for_model(model)
    except KeyError:
        return None


def _weight(piece: str) -> float:
    if piece.isascii():
        return len(piece) * ASCII_WEIGHT
    return sum(ASCII_WEIGHT if char < "\x80" else ALPHABET_WEIGHT if char < "\u0800" else WIDE_WEIGHT for char in piece)


def is_cached(encoding: str) -> bool:
    """Whether tiktoken finds an encoding, unharmed, in its cache: TIKTOKEN_CACHE_DIR, or else its default folder."""
    if encoding not in _ENCODING_FILES:
        return False
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR"))
    if folder is None:
        folder = str(Path(tempfile.gettempdir()) / "data-gym-cache")
    url = f"https://openaipublic.blob.core.windows.net/encodings/{encoding}.tiktoken"
    file = Path(folder) / hashlib.sha1(url.encode()).hexdigest()
    if not folder or not file.is_file():  # an empty name switches its cache off
        return False
    return hashlib.sha256(file.read_bytes()).hexdigest() == _ENCODING_FILES[encoding]
