"""index: documents or passages into a search index, in a folder or on a server.

Documents (Markdown, HTML, PDF, text, JSON pages) are cut into passages, at headings and sentences where that is
possible, each with the path of its headings as title and with its page. The index then holds these passages and no
others: run it again after documents have changed, and only what is new is embedded, what is gone is deleted. A run that
was killed continues with the same command. docs/retrieval.md tells of engines, modes and embedders.

Reads:   documents                 a file or a folder of documents, or instead
         passages.path             rows with id, text, and optionally title, document, page
Writes:  index/                    the index, with retrieval=embedded; otherwise it is on the server
         passages.jsonl            the passages that documents were cut into
         manifest.json             metrics: how many passages, from how many documents

Overrides people use:
  documents=manuals/                          what to index
  retrieval.embedder=<model>                  vectors of a sentence-transformers model as well as words
  chunk.tokenizer=<model> chunk.size=256      passages of at most so many tokens
  action=add documents=more/                  hold these as well
  action=delete 'ids=["a.md#1.1","b.md#2.3"]'  hold these no longer

Examples:
  python -m alignkit.index run=mine documents=manuals/
  python -m alignkit.search run=mine query="how long is the deposit kept"
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Optional

from alignkit.core.artifact import Artifact
from alignkit.core.config import RowsConfig, StageConfig
from alignkit.core.errors import UserError
from alignkit.core.progress import progress
from alignkit.core.retrieval_config import RetrievalConfig, SearchEngine

if TYPE_CHECKING:
    from alignkit.retrieval.base import Passage, Retriever

# ruff: noqa: UP045


class Action(Enum):
    """What to do: hold what is read and nothing else, hold it as well, or hold some passages no longer."""

    build = "build"
    add = "add"
    delete = "delete"


@dataclass
class ChunkConfig:
    """How documents are cut into passages."""

    size: int = 1000
    """Most characters of a passage, or tokens with a tokenizer."""
    overlap: int = 100
    """How much of a passage's end the next one may repeat, to begin with a sentence."""
    tokenizer: Optional[str] = None
    """Folder or hub name of the model whose tokens are counted; none: sizes are in characters."""

    def __post_init__(self) -> None:
        """Raise `UserError` for sizes that cannot be."""
        if not 0 <= self.overlap < self.size:
            raise UserError(f"chunk.overlap={self.overlap}: must not be negative, and below chunk.size={self.size}")


@dataclass
class IndexConfig(StageConfig):
    """Configuration of `index`."""

    inputs: ClassVar[tuple[str, ...]] = ("documents", "passages.path")

    documents: str = ""
    """A file, or a folder with all that is in it."""
    passages: RowsConfig = field(default_factory=RowsConfig)
    chunk: ChunkConfig = field(default_factory=ChunkConfig)
    action: Action = Action.build
    """Hold what is read and nothing else (build), hold it as well (add), or hold `ids` no longer (delete)."""
    ids: list[str] = field(default_factory=list)
    """Passages to delete, with action=delete."""
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)


def run(config: IndexConfig) -> Artifact:
    """Read passages and bring the index to hold them."""
    on_server = config.retrieval.engine is not SearchEngine.embedded
    check(config)
    with Artifact.open("index", config, always=on_server) as artifact:
        if artifact.up_to_date:
            return artifact
        from alignkit.retrieval.open import open_retriever

        passages = read_passages(config, artifact)
        place = config.retrieval if on_server else working_copy(config, artifact)
        retriever = open_retriever(place)
        try:
            change(config, retriever, passages)
            artifact.metrics |= {"passages": len(retriever)}
        finally:
            retriever.close()
        if not on_server:
            assert place.path is not None
            with artifact.output("index") as path:
                Path(place.path).rename(path)
        artifact.summary = f"{artifact.metrics['passages']} passages, {config.retrieval.searches_by.name}"
    return artifact


def check(config: IndexConfig) -> None:
    """Raise `UserError` unless it is said, once, what to index and where."""
    sources = [
        name for name, path in (("documents", config.documents), ("passages.path", config.passages.path)) if path
    ]
    if config.action is Action.delete:
        if sources or not config.ids:
            raise UserError("""action=delete takes 'ids=["<id>","<id>"]' and nothing to read""")
    elif config.ids or len(sources) != 1:
        raise UserError("say what to index: documents=<file or folder>, or else passages.path=<rows with id and text>")
    output = f"{config.output_dir}/index"
    if config.retrieval.engine is SearchEngine.embedded and config.retrieval.path != output:
        raise UserError(f"retrieval.path={config.retrieval.path}: index writes to {output}; set run= or name= instead")


def read_passages(config: IndexConfig, artifact: Artifact) -> Iterator[Passage]:
    """The passages that the configuration names; those of a file are read as they are needed."""
    from alignkit.data.jsonl import read_rows, to_record
    from alignkit.retrieval.base import Passage

    rows = config.passages
    if rows.path:
        placed = read_rows(rows.path, rows.skip, rows.limit)
        return (to_record(place, row, Passage) for place, row in placed)
    return iter(cut_documents(config, artifact) if config.documents else [])


def cut_documents(config: IndexConfig, artifact: Artifact) -> list[Passage]:
    """The passages of all documents; what cannot be read is dropped with the reason."""
    from alignkit.data.chunks import chunk_pages
    from alignkit.data.documents import read_documents
    from alignkit.retrieval.base import Passage

    pages, dropped = read_documents(config.documents)
    artifact.drop_all(dropped)
    tokenizer = load_tokenizer(config.chunk.tokenizer) if config.chunk.tokenizer else None
    chunks = chunk_pages(pages, config.chunk.size, config.chunk.overlap, tokenizer)
    passages = [
        Passage(id=chunk.id, text=chunk.text, title=chunk.title, document=chunk.document, page=chunk.page)
        for chunk in chunks
    ]
    artifact.write_rows("passages.jsonl", passages)
    artifact.metrics |= {"documents": len({page.document for page in pages}), "pages": len(pages)}
    return passages


def load_tokenizer(path: str) -> Any:
    """A tokenizer that knows where its tokens stand in a text."""
    from alignkit.core.config import ModelConfig
    from alignkit.models.loading import load_tokenizer

    tokenizer = load_tokenizer(ModelConfig(name="chunk.tokenizer", path=path))
    if not tokenizer.is_fast:
        raise UserError(
            f"chunk.tokenizer={path}: it does not say where its tokens stand; choose one with tokenizer.json"
        )
    return tokenizer


def working_copy(config: IndexConfig, artifact: Artifact) -> RetrievalConfig:
    """Where the index is changed until it is whole: what an interrupted run left, or a copy of the last one."""
    folder, last = artifact.work_folder / "index", artifact.folder / "index"
    if not folder.exists() and last.exists():
        partial = artifact.work_folder / "index.partial"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(last, partial)
        partial.rename(folder)
    return replace(config.retrieval, path=str(folder))


def change(config: IndexConfig, retriever: Retriever, passages: Iterator[Passage]) -> None:
    """Do what `action` says."""
    if config.action is Action.build:
        retriever.index(progress(passages, "index passages"))
    elif config.action is Action.add:
        retriever.add(progress(passages, "add passages"))
    else:
        retriever.delete(config.ids)


if __name__ == "__main__":
    from alignkit.core.app import stage_main

    stage_main("index")
