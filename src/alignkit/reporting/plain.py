"""Text that others wrote, made harmless: one line without control characters, and a code span in Markdown."""

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


def harmless(text: str) -> str:
    """A text on its lines; but for line ends and tabs, what a terminal would obey is shown as �."""
    return "".join(character if character in "\n\t" else _visible(character) for character in text)


def code(text: str, *, in_table: bool = True) -> str:
    """A text as a code span in Markdown: in it there is no markup, no link, no mention and, in a table, no border."""
    shown = one_line(text).replace("|", "\\|") if in_table else one_line(text)
    if not shown:
        return ""
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    space = " " if "`" in (shown[0], shown[-1]) else ""
    return f"{fence}{space}{shown}{space}{fence}"


def _visible(character: str) -> str:
    harmless = character in _JOINERS or unicodedata.category(character) not in ("Cc", "Cf", "Co", "Cs")
    return character if harmless else "\ufffd"
