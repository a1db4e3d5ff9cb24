"""README.md of rows that a stage wrote: the dataset card that the Hub reads, with its metadata, all from the manifest.

Whatever stems from rows, paths or commands stands in code spans or blocks: it shows as text and cannot become markup.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.core.lineage import Origin, lineage
from alignkit.data.jsonl import read_rows
from alignkit.reporting.datasheet import columns_table, markdown_table, sources_table
from alignkit.reporting.model_card import block, read_back
from alignkit.reporting.plain import code, one_line

if TYPE_CHECKING:
    from huggingface_hub import DatasetCardData

NAME = "README.md"

_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))
"""The Hub's classes of row counts, each with what it ends before."""
_FORMS = (
    ("chosen", "preference pairs", ("text-generation",), ("preference", "dpo")),
    ("completions", "prompts with several answers", ("text-generation",), ("completions",)),
    ("question", "questions about passages", ("question-answering",), ("qa",)),
    ("output", "statements, questions and answers", ("question-answering", "text-generation"), ("qa",)),
    ("completion", "prompts with answers", ("text-generation",), ("sft",)),
)
"""By a field of its rows: what a file holds, the Hub's task categories, and tags."""


def dataset_card(origin: Origin, files: Mapping[str, Path], title: str, license: str, languages: Sequence[str]) -> str:
    """The card of these files (name in the repository -> path) of the run that wrote them.

    Raises `ValueError` for metadata that huggingface_hub would not read back as it is.
    """
    from huggingface_hub import DatasetCard

    counts = {name: _rows_of(origin, path) for name, path in files.items()}
    sections = {
        "What it is": _what_it_is(origin, files, counts),
        "How it was made": _how_it_was_made(origin, files),
        "Sources": sources_table(origin.manifest["inputs"]),
        "What was left out": _left_out(origin),
        **{f"Columns of {name}": columns_table(_rows(path)) for name, path in files.items()},
        "Limits": _limits(origin),
        "Licence": f"{code(license)}, as given when this card was made; it was not checked. It cannot allow more than "
        "the licences of the sources do; where a teacher wrote or graded rows, its terms count, too.\n",
    }
    told = [f"## {name}\n\n{text}" for name, text in sections.items()]
    body = "\n".join([f"# {code(title, in_table=False)}\n", *told])
    metadata = _metadata(origin, files, counts, title, license, languages)
    return str(read_back(DatasetCard, metadata, body))


def _metadata(
    origin: Origin,
    files: Mapping[str, Path],
    counts: Mapping[str, int],
    title: str,
    license: str,
    languages: Sequence[str],
) -> DatasetCardData:
    from huggingface_hub import DatasetCardData

    forms = [form for path in files.values() if (form := _form(path)) is not None]
    configs: list[dict[str, Any]] = [{"config_name": Path(name).stem, "data_files": name} for name in files]
    configs[0]["default"] = True
    return DatasetCardData(
        language=list(languages) or None,
        license=license,
        pretty_name=one_line(title, 100),
        size_categories=next((name for end, name in _SIZES if sum(counts.values()) < end), "n>10M"),
        task_categories=list(dict.fromkeys(task for form in forms for task in form[2])) or None,
        annotations_creators="machine-generated",
        language_creators="machine-generated",
        configs=configs,
        tags=["alignkit", *dict.fromkeys(tag for form in forms for tag in form[3]), origin.manifest["stage"]],
    )


def _what_it_is(origin: Origin, files: Mapping[str, Path], counts: Mapping[str, int]) -> str:
    hashes = {entry["path"]: entry["sha256"] for entry in origin.manifest["outputs"]}
    rows = []
    for name, path in files.items():
        form = _form(path)
        rows.append([name, form[1] if form else "rows", f"{counts[name]:,}", hashes[path.name]])
    return (
        f"Written by alignkit's stage {code(origin.manifest['stage'])}: JSON Lines, one object a line, UTF-8. A row "
        "names in `parents` what it was made from.\n\n" + markdown_table(["file", "holds", "rows", "sha256"], rows)
    )


def _how_it_was_made(origin: Origin, files: Mapping[str, Path]) -> str:
    made = [block([origin.manifest.get("command", "")])]
    first = next(iter(files.values()))
    tree = "\n".join(
        f"    {' ' * (len(line) - len(line.lstrip()))}{one_line(line, 2000)}" for line in lineage(str(first))
    )
    teacher = origin.manifest["metrics"].get("teacher")
    if teacher:
        made.append(f"A teacher was asked: {code(str(teacher), in_table=False)}.\n")
    return "\n".join([*made, f"Where {code(first.name, in_table=False)} comes from:\n\n{tree}"])


def _left_out(origin: Origin) -> str:
    dropped = origin.manifest["dropped"]
    if not dropped:
        return "Nothing.\n"
    return markdown_table(["reason", "rows"], [[reason, f"{count:,}"] for reason, count in dropped.items()])


def _limits(origin: Origin) -> str:
    lines = [
        "Texts written or chosen by machines. Rules checked their form; whether they are true, nobody has checked.",
        "They inherit the habits, gaps and biases of their sources and of whoever wrote, answered and graded them.",
        "Rows that share a parent or a document are not independent of each other: split them by it, not by row.",
    ]
    if "scripted" in str(origin.manifest["metrics"].get("teacher", "")):
        lines.append(
            "The teacher was the scripted one, by rule: the rows are about a closed world that does not exist."
        )
    return "\n".join(f"- {line}" for line in lines) + "\n"


def _rows_of(origin: Origin, path: Path) -> int:
    return next(int(entry["rows"]) for entry in origin.manifest["outputs"] if entry["path"] == path.name)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    return (row for _, row in read_rows(str(path)))


def _form(path: Path) -> tuple[str, str, tuple[str, ...], tuple[str, ...]] | None:
    first = next(_rows(path))
    return next((form for form in _FORMS if form[0] in first), None)
