"""The passages that are searched for a query: those of a file, or those that stand in the rows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from alignkit.core.config import RowsConfig
from alignkit.core.errors import UserError
from alignkit.core.records import RetrievalExample
from alignkit.data.hygiene.shingles import normalise
from alignkit.data.jsonl import note_id, read_rows, to_record
from alignkit.retrieval.base import Passage


class Corpus:
    """Passages in the order of their ids, found by id or by text; case, width and spaces of a text do not count."""

    def __init__(self, passages: Iterable[Passage]) -> None:
        self.passages = sorted(passages, key=lambda passage: passage.id)
        self._by_id = {passage.id: passage for passage in self.passages}
        self._by_text: dict[bytes, list[str]] = {}
        for passage in self.passages:
            self._by_text.setdefault(text_key(passage_text(passage)), []).append(passage.id)

    def __len__(self) -> int:
        return len(self.passages)

    def __getitem__(self, id: str) -> Passage:
        return self._by_id[id]

    def __contains__(self, id: object) -> bool:
        return id in self._by_id

    def positives(self, example: RetrievalExample) -> frozenset[str]:
        """Ids of the passages that a row names as its positives, by `pos_index` where it has that, else by text."""
        if example.pos_index:
            return frozenset(id for id in map(str, example.pos_index) if id in self)
        return self.with_texts(example.pos)

    def with_texts(self, texts: Iterable[str]) -> frozenset[str]:
        """Ids of all passages that have one of these texts."""
        return frozenset(id for text in texts for id in self._by_text.get(text_key(text), ()))


def passage_text(passage: Passage) -> str:
    """A passage as `pos` and `neg` of a row hold it: title and text, as LLM-Embedder's `{title} {text}`."""
    return f"{passage.title} {passage.text}" if passage.title else passage.text


def text_key(text: str) -> bytes:
    """The same for texts that differ in case, width and spaces alone. A million keys take less room than the texts."""
    return hashlib.blake2b(normalise(text).encode(errors="surrogatepass"), digest_size=16).digest()


def open_corpus(path: str | None, examples: Sequence[RetrievalExample]) -> Corpus:
    """The passages of a file, or without one those of the rows. Raises `UserError` when there is none."""
    corpus = Corpus(gather(examples) if path is None else read_passages(RowsConfig(path=path)))
    if not len(corpus):
        raise UserError("there is no passage in the rows: give corpus=passages.jsonl")
    return corpus


def read_passages(rows: RowsConfig) -> list[Passage]:
    """Rows with `text`, and `id`, `title`, `document`, `page` where they are known.

    A row without an id is called by its number, from 0, which is what LLM-Embedder's `pos_index` counts. Raises
    `UserError` with the place of a row that is no passage, and of an id that stands there twice.
    """
    passages: list[Passage] = []
    seen: dict[str, str] = {}
    for number, (place, fields) in enumerate(read_rows(rows.path, rows.skip, rows.limit), rows.skip):
        id = fields.get("id", number)
        if isinstance(id, int) and not isinstance(id, bool):
            id = str(id)
        passage = to_record(place, {**fields, "id": id}, Passage)
        note_id(seen, passage.id, place)
        passages.append(passage)
    return passages


def gather(examples: Iterable[RetrievalExample]) -> list[Passage]:
    """The passages that stand in the rows, each once: called by its index, or else by its text.

    Raises `UserError` for an index that stands beside two texts.
    """
    found: dict[str, Passage] = {}
    for example in examples:
        for texts, indexes in ((example.pos, example.pos_index), (example.neg, example.neg_index)):
            for place, text in enumerate(texts):
                id = str(indexes[place]) if len(indexes) == len(texts) else text_key(text).hex()[:16]
                known = found.setdefault(id, Passage(id=id, text=text))
                if text_key(known.text) != text_key(text):
                    raise UserError(
                        f"row '{example.id}': the passage with the index {id} has another text than in a row before. "
                        "Correct pos_index and neg_index, or give the passages themselves: corpus=passages.jsonl"
                    )
    return list(found.values())
