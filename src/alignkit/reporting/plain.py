"""Text that others wrote, made harmless: on one line or several, without control characters; as code in Markdown."""

from __future__ import annotations

import re
import unicodedata

_JOINERS = "\u200c\u200d"
"""Format characters that scripts and emoji need; every other one (bidirectional overrides among them) can deceive."""


def one_line(text: str, most: int = 1000) -> str:
    """At most so many characters of a text on one line; what a terminal would obey is shown as �.

    A cut text ends in an ellipsis.
    """
    shown = "".join(map(_visible, " ".join(text[: 4 * most].split())))
    return shown if len(shown) <= most and len(text) <= 4 * most else f"{shown[:most]}…"


def visible(text: str, most: int | None = None) -> str:
    """A text, or its first `most` characters, on its own lines; what would act rather than show is shown as a symbol.

    Control characters become their pictures (NUL is ␀), other format characters their number (U+202E is ⟨U+202E⟩), so
    no text can turn the direction of what stands beside it. A cut text ends in an ellipsis.
    """
    kept = text[:most].replace("\r\n", "\n")
    shown = kept if kept.isascii() and kept.isprintable() else "".join(map(_symbol, kept))
    return shown if most is None or len(text) <= most else f"{shown}…"


def code(text: str, *, in_table: bool = True) -> str:
    """A text as a code span in Markdown: in it there is no markup, no link, no mention and, in a table, no border."""
    shown = one_line(text).replace("|", "\\|") if in_table else one_line(text)
    if not shown:
        return ""
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    space = " " if "`" in (shown[0], shown[-1]) else ""
    return f"{fence}{space}{shown}{space}{fence}"


def code_block(text: str, most: int = 10_000) -> str:
    """A text as a fenced block in Markdown, which nothing in it can end."""
    shown = visible(text, most)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", shown)), default=0))
    return f"{fence}text\n{shown}\n{fence}"


def _visible(character: str) -> str:
    harmless = character in _JOINERS or unicodedata.category(character) not in ("Cc", "Cf", "Co", "Cs")
    return character if harmless else "\ufffd"


def _symbol(character: str) -> str:
    if character in "\n\t" or character in _JOINERS:
        return character
    number, category = ord(character), unicodedata.category(character)
    if number < 0x20:
        return chr(0x2400 + number)
    if number == 0x7F:
        return "\u2421"
    return f"⟨U+{number:04X}⟩" if category in ("Cc", "Cf", "Co", "Cs", "Zl", "Zp") else character
