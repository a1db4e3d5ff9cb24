"""DATASHEET.md beside the data that a recipe wrote: what it is, how it was made, from what, and what it is not.

After Gebru et al., 2018 (arXiv 1803.09010). Whatever stems from rows, sources or the teacher stands in code spans: it
shows as text and cannot become a link, an image or markup.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from alignkit.core.artifact import Artifact
from alignkit.core.config import TeacherConfig, TeacherMode
from alignkit.core.manifest import versions
from alignkit.core.records import Row
from alignkit.reporting.plain import code, one_line
from alignkit.reporting.yields import Yields, as_text
from alignkit.teacher.address import server_host

NAME = "DATASHEET.md"
EXAMPLE_CHARACTERS = 160
LICENCE = "Licence of the sources: fill in."


def write_datasheet(
    artifact: Artifact, output: str, rows: Sequence[Row], yields: Yields, *, recipe: str, teacher: TeacherConfig
) -> Path:
    """Write the datasheet of `output`, a file that `artifact` holds already, made by `recipe`."""
    (entry,) = (entry for entry in artifact.outputs if entry["path"] == output)
    sections = [
        ("What it is", _what_it_is(output, entry, recipe, len(rows))),
        ("How it was made", _how_it_was_made(artifact, recipe, teacher, yields)),
        ("Sources", sources_table(artifact.inputs)),
        ("Yield", yields.markdown()),
        ("Columns", columns_table(row.model_dump(mode="json", exclude_none=True) for row in rows)),
        ("Limits", _limits(rows, teacher)),
        ("Licence", f"{LICENCE} Fill in, too, what the teacher's terms say about the use of its answers.\n"),
    ]
    title = f"# Datasheet: {output}\n"
    return artifact.write_text(NAME, "\n".join([title, *(f"## {name}\n\n{body}" for name, body in sections)]))


def _what_it_is(output: str, entry: dict[str, Any], recipe: str, count: int) -> str:
    about = str(importlib.import_module(f"alignkit.teacher.recipes.{recipe}").__doc__).splitlines()[0]
    return (
        f"`{output}` holds {count:,} rows, one JSON object a line, UTF-8, sha256 `{entry['sha256']}`. They were "
        f"written by alignkit's recipe `{recipe}`: {about} Every row names in `parents` what it was made from.\n"
    )


def _how_it_was_made(artifact: Artifact, recipe: str, teacher: TeacherConfig, yields: Yields) -> str:
    if teacher.mode is TeacherMode.scripted:
        who = (
            "The teacher was the scripted one: fixed rules inside an invented closed world, not a language model. "
            f"{100 * teacher.mistake_rate:g} % of the answers it writes are wrong on purpose."
        )
    else:
        who = f"The teacher was the model {code(teacher.model)} at {code(server_host(teacher))}."
    settings = {
        "started": artifact.started,
        "seed": artifact.config["seed"],
        "temperature": teacher.temperature,
        "cost": yields.cost,
        "alignkit": versions()["alignkit"],
    } | artifact.config.get(recipe, {})
    lines = "\n".join(f"- {name}: {code(as_text(value))}" for name, value in settings.items())
    return f"{who}\n\n    {one_line(artifact.command, 2000)}\n\n{lines}\n"


def sources_table(inputs: Sequence[Mapping[str, Any]]) -> str:
    """What a stage read, by the entries of its manifest."""
    if not inputs:
        return "None: nothing was read from a file.\n"
    rows = [
        (entry["key"], entry["path"], "" if entry["rows"] is None else f"{entry['rows']:,}", entry["sha256"] or "none")
        for entry in inputs
    ]
    return markdown_table(("key", "path", "rows", "sha256"), rows)


def columns_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Every field, in how many rows it has a value, of which type, and one value."""
    counted = 0
    filled: Counter[str] = Counter()
    types: dict[str, set[str]] = {}
    example: dict[str, str] = {}
    for row in rows:
        counted += 1
        for name, value in row.items():
            types.setdefault(name, set()).add(type(value).__name__)
            if value not in ("", [], {}, None):
                filled[name] += 1
                example.setdefault(name, one_line(as_text(value), EXAMPLE_CHARACTERS))
    described = [
        (name, f"{filled[name]:,} of {counted:,}", " or ".join(sorted(types[name])), example.get(name, ""))
        for name in types
    ]
    return markdown_table(("column", "filled", "type", "an example"), described)


def _limits(rows: Sequence[Row], teacher: TeacherConfig) -> str:
    flagged = sum(bool((row.model_extra or {}).get("flags")) for row in rows)
    lines = [
        "The texts were written by a machine. They were checked for their form by rules; whether they are true, nobody "
        "has checked.",
        "They resemble what the teacher was shown and inherit its habits, gaps and biases.",
        "Rows that share a parent are not independent of each other: split them by parent, not by row.",
    ]
    if teacher.mode is TeacherMode.scripted:
        lines.append("They are about a closed world that does not exist, and are good for trying alignkit out only.")
    if flagged:
        lines.append(f"{flagged:,} rows are flagged (`flags`): read them before use.")
    return "\n".join(f"- {line}" for line in lines) + "\n"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose cells show as text, whatever they hold."""
    lines = [header, ["---"] * len(header), *([code(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
