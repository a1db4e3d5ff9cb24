"""What an answer has otherwise than the reference, word by word."""

from __future__ import annotations

import re
from collections.abc import Sequence

_NO_SPACES = "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_PIECE = re.compile(rf"\s+|[{_NO_SPACES}]|[^\W{_NO_SPACES}]+|[^\w\s]")
"""White space, a character of a script without spaces, a word, or a mark."""

SAME, MORE, LESS = "=", "+", "-"
"""What stands in both, in the answer only, in the reference only."""


def word_differences(answer: str, reference: str, *, cut: bool = False) -> list[str]:
    """The answer in pieces, each behind `=` (also in the reference), `+` (not in it) or `-` (only in the reference).

    By a longest common subsequence of words. Without the `-` pieces it is the answer, without the `+` pieces the
    reference. Of an answer that was cut nothing is said to be missing at its end. Without a reference, or without a
    word in common, nothing is compared: then all of it is one `=` piece.
    """
    if answer == reference or not answer or not reference:
        return [SAME + answer]
    from rapidfuzz.distance import LCSseq

    new, old = _PIECE.findall(answer), _PIECE.findall(reference)
    found: list[str] = []
    common = False
    for code in LCSseq.opcodes(old, new):
        here, there = new[code.dest_start : code.dest_end], old[code.src_start : code.src_end]
        if code.tag == "equal":
            common = common or any(piece[0].isalnum() for piece in here)
            found.append(SAME + "".join(here))
        else:
            found += [mark + "".join(pieces) for mark, pieces in ((LESS, there), (MORE, here)) if pieces]
    if not common:
        return [SAME + answer]
    return _without_end(_merged(found), cut)


def _merged(pieces: Sequence[str]) -> list[str]:
    """Neighbours of one kind as one, and what was replaced word after word as one replacement of several words."""
    waiting = {LESS: "", MORE: ""}
    told: list[str] = []
    for place, piece in enumerate(pieces):
        bridge = piece[0] == SAME and not piece[1:].strip() and 0 < place < len(pieces) - 1
        if piece[0] == SAME and not bridge:
            told += _both(waiting)
            waiting = {LESS: "", MORE: ""}
            told.append(piece)
        elif bridge:
            waiting = {mark: text + piece[1:] for mark, text in waiting.items()}
        else:
            waiting[piece[0]] += piece[1:]
    return [*told, *_both(waiting)]


def _both(waiting: dict[str, str]) -> list[str]:
    return [mark + text for mark, text in waiting.items() if text]


def _without_end(pieces: list[str], cut: bool) -> list[str]:
    return pieces[:-1] if cut and len(pieces) > 1 and pieces[-1][0] == LESS else pieces
