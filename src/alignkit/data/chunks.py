"""Pages in chunks: at most `size` characters or tokens each, cut at headings and sentences where that is possible.

A chunk is a span of its page, word for word: `page.text[chunk.start : chunk.end] == chunk.text`. Every character of a
page that is not white space lies in a chunk.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from alignkit.core.records import DocumentPage

_CJK = re.compile(r"[\u3000-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003134f]")
"""Chinese and Japanese characters and their punctuation: beside one a text may be cut without a space."""
_SENTENCE_END = re.compile(
    r"(?<![.!?…])(?<!\b[A-Z])[.!?…]++[\"'”’»)\]]*+(?=\s+[^\sa-z])"  # not after an initial, nor before a small letter
    r"|[。！？；]++[\"'”’」』）]*+"
    r"|(?<=\S)[ \t\r]*+\n[ \t\r]*+(?=\n|[-*+•|] |\d{1,3}[.)] )"  # a blank line, or a list's item or table's row follows
)
_HEADING = re.compile(r"^[ \t]{0,3}(?:#{1,6}[ \t]+\S|={2,6}[ \t]*[^\s=]).*$", re.MULTILINE)
_MARKS = re.compile(r"^\s*(#+|=+)\s*(.*?)[\s#=]*$")
_INK = re.compile(r"\S")


@dataclass(frozen=True)
class Chunk:
    """A part of a page: `text` is the page's text from `start` to `end`. `id` is `<document>#<page>.<number>`.

    `title` is the path of the headings that it stands under, its own first line included, like `Renting > Deposits`.
    """

    id: str
    document: str
    page: int
    text: str
    start: int
    end: int
    title: str = ""


def chunk_pages(pages: Sequence[DocumentPage], size: int, overlap: int, tokenizer: Any = None) -> list[Chunk]:
    """The chunks of all pages, in order. No chunk is longer than `size` or reaches over a page's end.

    Sizes are in characters, or in tokens of a fast `tokenizer` of transformers, special tokens not counted. A chunk
    ends before a heading when it is half full by then, else with its last whole sentence, else (in a sentence that is
    longer than `size`) with a word, else anywhere. The next one begins at most `overlap` before that end, with a
    sentence or at least a word. Nothing is repeated before a heading, where there would be no room left for a new
    sentence, and where not even one word has room in `overlap`. Raises `ValueError` unless 0 <= overlap < size.
    """
    if not 0 <= overlap < size:
        raise ValueError(f"overlap={overlap} must not be negative, and must be below size={size}")
    chunks: list[Chunk] = []
    paths: dict[str, list[tuple[int, str]]] = {}
    for page in pages:
        borders = _Borders(page.text, _Tokens(tokenizer, page.text) if tokenizer is not None else _Characters())
        path = paths.setdefault(page.document, [])
        titles = iter([*borders.titles, (len(page.text) + 1, 0, "")])
        place, level, title = next(titles)
        for number, (start, end) in enumerate(borders.spans(size, overlap), 1):
            while place <= start:
                _go_to(path, level, title)
                place, level, title = next(titles)
            heading = " > ".join(name for _, name in path)
            id = f"{page.document}#{page.page}.{number}"
            chunks.append(Chunk(id, page.document, page.page, page.text[start:end], start, end, heading))
        while level:  # the rest of this page's headings are those that the next page begins under
            _go_to(path, level, title)
            _, level, title = next(titles)
    return chunks


def _go_to(path: list[tuple[int, str]], level: int, title: str) -> None:
    """Change the path of headings to what it is below a heading of this level."""
    while path and path[-1][0] >= level:
        path.pop()
    path.append((level, title))


class _Ruler(Protocol):
    """Measures how far some characters or tokens reach."""

    def end(self, start: int, size: int) -> int:
        """Where `size` units that begin at `start` end at the latest; behind `start`."""

    def start(self, end: int, size: int) -> int:
        """Where `size` units that end at `end` begin at the earliest."""


class _Characters:
    def end(self, start: int, size: int) -> int:
        return start + size

    def start(self, end: int, size: int) -> int:
        return end - size


class _Tokens:
    """A text is cut into tokens once. A part of it that is cut by itself can have one more: ends are counted again."""

    def __init__(self, tokenizer: Any, text: str) -> None:
        self._tokenizer, self._text = tokenizer, text
        encoded = tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, truncation=False, verbose=False
        )
        offsets = [(start, end) for start, end in encoded["offset_mapping"] if end > start]
        self._starts, self._ends = [start for start, _ in offsets], [end for _, end in offsets]

    def end(self, start: int, size: int) -> int:
        following = bisect_right(self._ends, start) + size
        while True:
            place = self._starts[following] if following < len(self._starts) else len(self._text)
            more = self._count(self._text[start:place]) - size
            if more <= 0 or place <= start + 1:
                return max(place, start + 1)
            following = min(following, len(self._starts)) - more

    def start(self, end: int, size: int) -> int:
        first = bisect_left(self._starts, end) - size
        return self._starts[max(first, 0)] if size and self._starts else end

    def _count(self, text: str) -> int:
        ids = self._tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
        return len(ids)


class _Borders:
    """The places where a text may be cut, without the white space around them."""

    def __init__(self, text: str, ruler: _Ruler) -> None:
        self.text = text
        self.ruler = ruler
        self.last = self._before_space(len(text))
        headings = list(_HEADING.finditer(text))
        self.headings = [self._after_space(heading.start()) for heading in headings]
        marks = [_MARKS.match(heading[0]) for heading in headings]
        self.titles = [(place, len(mark[1]), mark[2]) for place, mark in zip(self.headings, marks, strict=True) if mark]
        bodies = [self._after_space(heading.end()) for heading in headings]
        ends = {self._before_space(match.end()) for match in _SENTENCE_END.finditer(text)}
        ends |= {self._before_space(heading) for heading in self.headings} | {self.last}
        self.ends = sorted(end for end in ends if not self._in_title(end, bodies))

    def spans(self, size: int, overlap: int) -> Iterator[tuple[int, int]]:
        """The spans of the chunks; their starts rise, and so do their ends."""
        start = self._after_space(0)
        while start < self.last:
            end = self._end(start, size)
            yield start, end
            start = self._next_start(start, end, size, overlap)

    def _end(self, start: int, size: int) -> int:
        """Where the chunk that begins at `start` ends."""
        limit = self.ruler.end(start, size)
        heading = bisect_left(self.headings, self.ruler.end(start, max(1, size // 2)))
        if heading < len(self.headings) and self.headings[heading] <= limit:
            return self._before_space(self.headings[heading])
        if limit >= self.last:
            return self.last
        sentence = bisect_right(self.ends, limit) - 1
        if sentence >= 0 and self.ends[sentence] > start:
            return self.ends[sentence]
        words = (self._before_space(place) for place in range(limit, start, -1) if self._between_words(place))
        return next(words, limit)

    def _next_start(self, start: int, end: int, size: int, overlap: int) -> int:
        """Where the chunk after the one from `start` to `end` begins."""
        following = self._after_space(end)
        heading = bisect_left(self.headings, following)
        before_heading = heading < len(self.headings) and self.headings[heading] == following
        if not overlap or following >= self.last or before_heading:
            return following
        lowest = max(start + 1, self.ruler.start(end, overlap))
        sentence = self.ends[bisect_left(self.ends, lowest)]
        words = (self._after_space(place) for place in range(lowest, end) if self._between_words(place))
        repeated = self._after_space(sentence) if sentence < end else next(words, end)
        return repeated if repeated < end < self._end(repeated, size) else following

    def _in_title(self, end: int, bodies: Sequence[int]) -> bool:
        """Whether a heading stands before `end`, with nothing of what it heads in between."""
        heading = bisect_left(self.headings, end) - 1
        return heading >= 0 and end < bodies[heading] and end < self.last

    def _between_words(self, place: int) -> bool:
        before, after = self.text[place - 1], self.text[place]
        return before.isspace() or after.isspace() or bool(_CJK.match(before) or _CJK.match(after))

    def _after_space(self, place: int) -> int:
        """The first character at or after `place` that is not white space."""
        ink = _INK.search(self.text, place)
        return ink.start() if ink else len(self.text)

    def _before_space(self, place: int) -> int:
        """The end of the last character before `place` that is not white space."""
        while place and self.text[place - 1].isspace():
            place -= 1
        return place
