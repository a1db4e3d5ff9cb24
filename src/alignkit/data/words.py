"""The words of a text in any script."""

from __future__ import annotations

import re
import unicodedata

_ENGLISH_WORD = re.compile(r"[a-z0-9]+")
_HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
HAN = re.compile(f"[{_HAN}]")
"""A Chinese character, in whatever language."""
WITHOUT_SPACES = re.compile(f"[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff{_HAN}]")
"""A character of a script that puts no spaces between words: Thai, Lao, Tibetan; Burmese; Khmer; kana; Chinese."""


def words(text: str) -> list[str]:
    """The words of a text, case folded; punctuation is left out.

    Where no letter or digit lies beyond ASCII: the runs of [a-z0-9], which are the words of `rouge_score`. Else, after
    NFKC: the runs of letters, digits and marks on them; of scripts that are written without spaces each character.
    """
    if text.isascii() or not any(each.isalpha() or each.isdecimal() for each in text if each > "\x7f"):
        return english_words(text)
    characters = map(_in_a_word, unicodedata.normalize("NFKC", text).casefold())
    return "".join(f" {each} " if WITHOUT_SPACES.match(each) else each for each in characters).split()


def english_words(text: str) -> list[str]:
    """The runs of [a-z0-9] of the text in lower case: all that `rouge_score` sees of it, whatever its script."""
    return _ENGLISH_WORD.findall(text.lower())


def _in_a_word(character: str) -> str:
    """The character if it is a letter, a digit or a mark on one, else a space."""
    return character if unicodedata.category(character)[0] in "LNM" else " "
