"""Tokens as text while they are written: no half characters, and nothing behind a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

INCOMPLETE = "\ufffd"
"""What a tokenizer decodes the bytes of an unfinished character to."""


class TextStream:
    """The text of an answer, part by part. Joined, the parts are what the tokens decode to, up to the stop string.

    A part is held back while its last character is unfinished, and while it may be the beginning of a stop string. A
    token is decoded together with those since the last part, which gives it the context that some tokenizers look at.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.stop = [text for text in stop if text]
        self.stopped = False
        """Whether a stop string was written."""
        self._context: list[int] = []
        self._new: list[int] = []
        self._held = ""

    def push(self, token: int) -> str:
        """The text that can be shown once this token is there, often empty."""
        self._new.append(token)
        text = self._undecoded()
        if not text or text.endswith(INCOMPLETE):
            return ""
        self._context, self._new = self._new, []
        return self._release(text)

    def finish(self) -> str:
        """The text that was held back: there are no more tokens."""
        text = self._release(self._undecoded()) + self._held
        self._context, self._new, self._held = self._new, [], ""
        return text

    def _undecoded(self) -> str:
        before = self._decode(self._context)
        return self._decode([*self._context, *self._new])[len(before) :]

    def _release(self, text: str) -> str:
        """What of the held and the new text can be shown: all that no stop string begins in."""
        text = self._held + text
        self._held = ""
        found = [place for stop in self.stop if (place := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return text[: min(found)]
        longest = max(map(len, self.stop), default=1) - 1
        for place in range(max(0, len(text) - longest), len(text)):
            if any(stop.startswith(text[place:]) for stop in self.stop):
                self._held = text[place:]
                return text[:place]
        return text

    def _decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))
