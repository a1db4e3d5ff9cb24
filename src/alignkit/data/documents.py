"""Documents become pages: JSON, Markdown, plain text, HTML and PDF.

What has pages keeps them: a PDF, the keys `page_1`, `page_2`, ... of a JSON object, the rows of a JSON list, the parts
of a text between form feeds. A longer text without pages is cut into some of at most `PAGE_CHARACTERS`, at headings and
sentences. A page without text, and a file that cannot be read, is dropped with the reason.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from alignkit.core.errors import UserError
from alignkit.core.records import DocumentPage, Dropped
from alignkit.data.chunks import chunk_pages
from alignkit.data.jsonl import read_rows

PAGE_CHARACTERS = 2000
MOST_BYTES = 256 * 2**20
"""Larger files are dropped."""
MOST_PDF_PAGES = 20_000
"""PDFs with more pages are dropped."""

_PAGE_KEY = re.compile(r"page[_ ]?(\d{1,9})", re.IGNORECASE)
_CHARSET = re.compile(rb"charset\s*=\s*[\"']?([\w.:-]{1,40})", re.IGNORECASE)
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f]")
_INSTRUCTIONS = re.compile(
    r"(ignore|disregard|forget|override)\W+(\w+\W+){0,4}?(instruction|prompt|rule|direction|message)s?\b"
    r"|\b(new|updated|hidden|secret) (system )?(instruction|prompt)s?\b|\bsystem prompt\b|\byou are now (a|an|the|in)\b"
    r"|\b(dear|attention|note to( the)?) (ai|llm|assistant|language model|chatbot)\b|\bas an ai (language )?model\b"
    r"|<\|\w{2,30}\|>|\[/?inst\]|<</?sys>>|\b(begin|end)_of_(text|turn)\b|^\s*(system|assistant)\s*:"
    r"|(忽略|无视|忘记|不要遵守|忘掉)[^。！？\n]{0,12}(指令|指示|提示|要求|规则|命令|设定)"
    r"|系统提示词?|新的?指令|你现在(是|要扮演)|(请|现在)你?扮演",
    re.MULTILINE,
)
_ZERO_WIDTH = re.compile("[\u00ad\u200b-\u200f\u2060\ufeff]")


class RawPage(NamedTuple):
    """A page as a file has it. Whether its text is one is not known yet."""

    document: str
    page: int
    text: Any
    metadata: Mapping[str, Any]


class _UnreadableError(Exception):
    """Why a file cannot be read: a reason to count by, and the particulars."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


def read_documents(path: str) -> tuple[list[DocumentPage], list[Dropped]]:
    """The pages of a file, or of all files in a folder and those in it, by the order of their names.

    A document is called by its path within the folder, unless a row says otherwise. Raises `UserError` when there is
    not one page to be read, and when a library that the files need is missing.
    """
    root = Path(path)
    pages: dict[str, DocumentPage] = {}
    dropped: list[Dropped] = []
    for file in _files(root):
        name = file.relative_to(root).as_posix() if root.is_dir() else file.name
        try:
            for raw in _read_file(file, name):
                page = _check(raw, pages)
                if isinstance(page, Dropped):
                    dropped.append(page)
                else:
                    pages[page.id] = page
        except _UnreadableError as error:
            dropped.append(Dropped(reason=error.reason, row={"document": name}, detail=error.detail))
    if not pages:
        reasons = "; ".join(dict.fromkeys(f"{each.reason}: {each.detail}" for each in dropped[:5]))
        raise UserError(f"{path}: holds no page that can be read ({reasons or 'it is empty'}). alignkit reads {_KNOWN}")
    return list(pages.values()), dropped


def instructs_model(text: str) -> bool:
    """Whether a text seems to speak to the model that reads it, as injected text does.

    Known phrases in English and Chinese, so neither a proof nor a defence: it tells which rows deserve a look.
    """
    plain = _ZERO_WIDTH.sub("", unicodedata.normalize("NFKC", text)).casefold()
    return _INSTRUCTIONS.search(plain) is not None


def _files(root: Path) -> list[Path]:
    if not root.exists():
        raise UserError(f"{root}: no such file or folder. Correct the path.")
    if not root.is_dir():
        return [root]
    inside = (file for file in root.rglob("*") if file.is_file())
    return sorted(file for file in inside if not any(part.startswith(".") for part in file.relative_to(root).parts))


def _read_file(file: Path, name: str) -> Iterator[RawPage]:
    """The pages of one file, unchecked."""
    read = _READERS.get(file.suffix.lower())
    if read is None:
        raise _UnreadableError("format not known", f"{file}: alignkit reads {_KNOWN}")
    try:
        if (size := file.stat().st_size) > MOST_BYTES:
            raise _UnreadableError("file too large", f"{file}: {size} bytes, at most {MOST_BYTES} are read")
        yield from read(file, name)
    except OSError as error:
        raise _UnreadableError("not readable", f"{file}: {error.strerror}") from error


def _check(raw: RawPage, pages: Mapping[str, DocumentPage]) -> DocumentPage | Dropped:
    """A page with clean text, or the reason why it is not used."""
    row = {"document": raw.document, "page": raw.page}
    where = f"{raw.document}, page {raw.page}"
    if not isinstance(raw.text, str):
        return Dropped(reason="page is not text", row=row, detail=f"{where}: found {type(raw.text).__name__}")
    text = _UNPRINTABLE.sub("", raw.text.replace("\r\n", "\n").replace("\r", "\n"))
    if re.search(r"[\ud800-\udfff]", text):
        return Dropped(reason="broken encoding", row=row, detail=f"{where}: half of a surrogate pair")
    if not text.strip():
        return Dropped(reason="no text", row=row, detail=f"{where}: empty, or a picture")
    metadata = {str(key): str(value) for key, value in raw.metadata.items()}
    page = DocumentPage(document=raw.document, page=raw.page, text=text, metadata=metadata)
    if page.id in pages:
        return Dropped(reason="page given twice", row=page.model_dump(), detail=where)
    return page


# -- formats -----------------------------------------------------------------------------------------------------------


def _read_text(file: Path, name: str) -> Iterator[RawPage]:
    return _paged(name, _decode(file, file.read_bytes()))


def _paged(name: str, text: str) -> Iterator[RawPage]:
    """A text by its form feeds, or else cut; an empty one is an empty page."""
    parts = text.split("\f")
    if len(parts) == 1 and text.strip():
        whole = DocumentPage(document=name, page=1, text=text)
        parts = [chunk.text for chunk in chunk_pages([whole], PAGE_CHARACTERS, 0)]
    return (RawPage(name, number, part, {}) for number, part in enumerate(parts, 1))


def _read_json(file: Path, name: str) -> Iterator[RawPage]:
    """One object, a list of rows, or one row a line."""
    text = _decode(file, file.read_bytes())
    if text.lstrip().startswith("["):
        return _read_lines(file, name)
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":  # a second row follows
            return _read_lines(file, name)
        place = f"{file}:{error.lineno}" if isinstance(error, json.JSONDecodeError) else str(file)
        raise _UnreadableError("not JSON", f"{place}: {error}") from error
    if not isinstance(fields, dict):
        raise _UnreadableError("no pages", f"{file}: an object or a list is needed, found {type(fields).__name__}")
    return _counted_from_one(_object_pages(fields, name, 1))


def _read_lines(file: Path, name: str) -> Iterator[RawPage]:
    found: list[RawPage] = []
    problem: UserError | None = None
    try:
        for number, (place, fields) in enumerate(read_rows(str(file)), 1):
            paged = any(map(_PAGE_KEY.fullmatch, fields))
            found += _object_pages(fields, f"{name}:{place.rpartition(':')[2]}" if paged else name, number)
    except UserError as error:
        problem = error
    yield from _counted_from_one(found)
    if problem:
        raise _UnreadableError("not readable", str(problem)) from problem


def _object_pages(fields: Mapping[str, Any], name: str, number: int) -> Iterator[RawPage]:
    """The pages of an object: its `page_<n>`, or one page with its `text`, or else with the whole object.

    The last is how RAFT reads the description of an API. `document`, `page` and `metadata` are taken where they fit.
    Pages may be counted from 0 here.
    """
    document, page, metadata = fields.get("document"), fields.get("page"), fields.get("metadata")
    document = document if isinstance(document, str) and document else name
    metadata = metadata if isinstance(metadata, dict) else {}
    numbered = sorted((int(match[1]), key) for key in fields if (match := _PAGE_KEY.fullmatch(key)))
    for found, key in numbered:
        yield RawPage(document, found, fields[key], metadata)
    if not numbered:
        page = page if isinstance(page, int) and not isinstance(page, bool) and page >= 0 else number
        text = fields["text"] if "text" in fields else json.dumps(fields, ensure_ascii=False, indent=1)
        yield RawPage(document, page, text if fields else "", metadata)


def _counted_from_one(pages: Iterable[RawPage]) -> Iterator[RawPage]:
    """The pages, those of a document that counts them from 0 each with the number after its own."""
    pages = list(pages)
    from_zero = {page.document for page in pages if page.page == 0}
    return (page._replace(page=page.page + (page.document in from_zero)) for page in pages)


def _read_html(file: Path, name: str) -> Iterator[RawPage]:
    """HTML as Markdown, without scripts, styles and the addresses of links."""
    try:
        from bs4 import BeautifulSoup
        from markdownify import MarkdownConverter
    except ImportError as error:
        raise UserError(f"{file}: HTML needs markdownify: pip install 'alignkit[html]'") from error
    raw = file.read_bytes()
    declared = _CHARSET.search(raw[:2048])
    page = BeautifulSoup(_decode(file, raw, declared[1].decode() if declared else None), "html.parser")
    for hidden in page(["script", "style", "template", "noscript", "head", "svg"]):
        hidden.decompose()
    try:
        text = MarkdownConverter(heading_style="ATX", strip=["a", "img"], escape_misc=False).convert_soup(page)
    except RecursionError as error:
        raise _UnreadableError("not readable", f"{file}: its elements are nested too deeply") from error
    return _paged(name, re.sub(r"\n{3,}", "\n\n", text).strip())


def _read_pdf(file: Path, name: str) -> Iterator[RawPage]:
    try:
        import pypdfium2
    except ImportError as error:
        raise UserError(f"{file}: PDF needs pypdfium2: pip install 'alignkit[pdf]'") from error
    try:
        pdf = pypdfium2.PdfDocument(file)
    except pypdfium2.PdfiumError as error:
        raise _UnreadableError("not a readable PDF", f"{file}: {error}. Is it damaged or locked?") from error
    with pdf:
        if len(pdf) > MOST_PDF_PAGES:
            raise _UnreadableError("too many pages", f"{file}: {len(pdf)}, at most {MOST_PDF_PAGES} are read")
        for number in range(len(pdf)):
            try:
                page = pdf[number]
                text = page.get_textpage().get_text_bounded()
                page.close()
            except pypdfium2.PdfiumError as error:
                raise _UnreadableError("not a readable PDF", f"{file}: page {number + 1}: {error}") from error
            yield RawPage(name, number + 1, text.replace("\ufffe", ""), {})  # the mark of a hyphenated line


def _decode(file: Path, raw: bytes, declared: str | None = None) -> str:
    """Text in UTF-8, or in UTF-16 if it is marked as such, or else in the encoding that it declares."""
    encoding = "utf-16" if raw.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8"
    try:
        return raw.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        if declared is not None:
            with suppress(UnicodeError, LookupError):
                return raw.decode(declared)
        line = 1 + raw.count(b"\n", 0, error.start)
        byte = f"the byte 0x{raw[error.start]:02x} at offset {error.start}"
        detail = f"{file}:{line}: {byte} is not {encoding.upper()}. Save the file in UTF-8."
        raise _UnreadableError("broken encoding", detail) from error


_Reader = Callable[[Path, str], Iterator[RawPage]]
_READERS: dict[str, _Reader] = {
    **dict.fromkeys((".txt", ".text", ".md", ".markdown"), _read_text),
    **dict.fromkeys((".html", ".htm", ".xhtml"), _read_html),
    ".json": _read_json,
    ".jsonl": _read_lines,
    ".pdf": _read_pdf,
}
_KNOWN = ", ".join(_READERS)
