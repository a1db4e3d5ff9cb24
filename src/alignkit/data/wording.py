"""Whether a text says what another says: word by word, in any script, with every number as it is written."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

QUESTION_MARKS = ("?", "？", "؟")
"""With which a question ends."""
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff"
_TOKEN = re.compile(
    r"(?<![\w.)%])[-−](?=\d)"  # a minus sign; in "2008-09" it is a hyphen
    r"|\d+(?:[.,]\d+)*"
    rf"|[{_CJK}]"
    rf"|[^\W\d_{_CJK}]+"
)
_WORD = re.compile(rf"[{_CJK}]|[^\W\d_{_CJK}]+")
_MINUS = ("-", "−")
_THOUSANDS = re.compile(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_ARTICLES = frozenset({"a", "an", "the"})
_SAID = (
    "(?:say|said|state|stated|mention|mentioned|tell|told|specify|specified|provide|provided|give|given|contain|include|"
    "indicate|indicated|reveal|revealed|answer|answered|name|named|explain|explained|disclose|disclosed|known|"
    "available|possible|enough|clear)"
)
_LEFT_OPEN = re.compile(
    rf"\b(?:(?:do|does|did|is|are|was|were) not|(?:do|does|did|is|are|was|were)n['’]t|never) (?:\w+ )?{_SAID}\b"
    r"|\b(?:cannot|can not|can['’]t|could not|couldn['’]t) be \w+"
    r"|\b(?:no|not enough|without|insufficient) (?:\w+ )?(?:information|mention|answer|indication|details?|evidence)\b"
    r"|\b(?:unknown|unanswerable|unspecified|unclear|unable to|left open|silent (?:on|about)|impossible to \w+)\b"
    r"|(?:没有|未|并未|没)(?:说明|提到|提及|给出|说|写|指出)|无法(?:判断|确定|回答|得知|比较)|不得而知",
    re.IGNORECASE,
)
_SENTENCE_START = re.compile(r"(?:^|[.!?:;\n\"“«(])\s*$")
_CAPITALISED = re.compile(r"\b[A-Z][\w-]*")


def tokens(text: str) -> list[str]:
    """The words and numbers of a text; case and Unicode width are folded, punctuation and English articles left out.

    Chinese and Japanese count by character. A number keeps its sign and its decimal point and loses its thousands
    separators: "-3.5" is no "3.5", and "1,000" is "1000".
    """
    found: list[str] = []
    for token in _TOKEN.findall(unicodedata.normalize("NFKC", text).casefold()):
        if found and found[-1] in _MINUS:
            found.pop()
            token = f"-{token}"
        found.append(token.replace(",", "") if _THOUSANDS.fullmatch(token) else token)
    return [token for token in found if token not in _ARTICLES]


def contains(text: str, part: str) -> bool:
    """Whether the tokens of `part` stand in `text` one after the other. A part without any is contained in nothing."""
    wanted = tokens(part)
    return bool(wanted) and line_of_tokens(wanted) in line_of_tokens(tokens(text))


def line_of_tokens(found: list[str]) -> str:
    """Tokens in a line with spaces around each: one line stands in another where its tokens do, in a row."""
    return f" {' '.join(found)} "


def verdict(text: str) -> str | None:
    """The "yes" or "no" with which a text begins or ends; None when it does neither, or begins and ends differently."""
    found = tokens(text)
    verdicts = {token for token in (*found[:1], *found[-1:]) if token in ("yes", "no")}
    return verdicts.pop() if len(verdicts) == 1 else None


def leaves_open(text: str) -> bool:
    """Whether an English or Chinese text says that what was asked is not said or cannot be known."""
    return _LEFT_OPEN.search(text) is not None


def invented(text: str, sources: str) -> list[str]:
    """Numbers and names of a text that stand nowhere in `sources`.

    A name is a word with a capital letter inside a sentence; names in scripts without capitals go unnoticed.
    """
    known = set(tokens(sources))
    names = [match[0] for match in _CAPITALISED.finditer(text) if not _SENTENCE_START.search(text[: match.start()])]
    numbers = [token for token in tokens(text) if token[-1].isdigit()]
    strange = [each for each in (*names, *numbers) if not known.issuperset(tokens(each))]
    return [each for each in dict.fromkeys(strange) if each != "I"]


def script(text: str) -> str | None:
    """The script of most words at the beginning of a text, like "LATIN" or "CJK" (Chinese and Japanese); None without.

    A Chinese character counts as a word, so that a Chinese sentence around a long Latin name is Chinese.
    """
    found = Counter(_script_of(word[0]) for word in _WORD.findall(unicodedata.normalize("NFKC", text[:20_000])))
    return found.most_common(1)[0][0] if found else None


def language_problem(text: str, *beside: str) -> str | None:
    """What is wrong, as "reason: detail", with a text in a script that none of the texts beside it is in; else None.

    Languages that share a script are not told apart.
    """
    found, known = script(text), set(map(script, beside)) - {None}
    if found is None or not known or found in known:
        return None
    return f"another language than asked for: {found} script instead of {' or '.join(sorted(map(str, known)))}"


def _script_of(letter: str) -> str:
    name = unicodedata.name(letter, "UNKNOWN").split()[0]
    return "CJK" if name in ("HIRAGANA", "KATAKANA") else name
