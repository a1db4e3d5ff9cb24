"""Where something came from: walk the manifests from a model, a file or a row back to the seeds.

A file or folder is traced through the inputs of the run that wrote it. A row is traced through the input files that
hold a row of the same id, or of one of its `parents`. What no longer has the hash that a manifest recorded is marked.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignkit.core.errors import UserError
from alignkit.core.hashing import count_rows, hash_path
from alignkit.core.manifest import read_manifest

Row = Mapping[str, Any]
_ROW_FILES = (".jsonl", ".json")


@dataclass(frozen=True)
class Origin:
    """The run that wrote a file or folder."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def root(self) -> Path:
        """What the relative paths of the manifest are relative to, wherever the runs have been moved since."""
        recorded = Path(self.manifest.get("folder", ""))
        folder = self.folder.resolve()
        if recorded.is_absolute() or folder.parts[len(folder.parts) - len(recorded.parts) :] != recorded.parts:
            return Path()
        return Path(*folder.parts[: len(folder.parts) - len(recorded.parts)])

    def inputs(self) -> Iterator[tuple[dict[str, Any], Path]]:
        """Each input's manifest entry and where it is now."""
        for entry in self.manifest["inputs"]:
            yield entry, self.root / entry["path"]


def lineage(target: str) -> list[str]:
    """The lines of the tree of `target`: a run folder, something in one, or `file.jsonl#row-id`."""
    path, _, row_id = target.partition("#")
    if not Path(path).exists():
        raise UserError(f"{path}: no such file or folder")
    if not row_id:
        return list(_trace_path(Path(path), path, "", set()))
    row = find_rows(Path(path), {row_id}).get(row_id)
    if row is None:
        raise UserError(f"{path}: no row with the id '{row_id}'")
    return list(_trace_row(Path(path), path, row_id, row, "", set()))


def warnings_about(path: Path) -> list[str]:
    """What is wrong with a file or folder by the manifest of the run that wrote it; nothing when no stage did."""
    origin = origin_of(path)
    return [] if origin is None else list(_warnings(path, origin))


def _trace_path(path: Path, name: str, indent: str, seen: set[Path]) -> Iterator[str]:
    """A file or folder, then, one step further in, everything that the run behind it read."""
    origin = origin_of(path)
    if origin is not None and path.resolve() in seen:
        yield f"{indent}{name}  (see above)"
        return
    seen.add(path.resolve())
    yield f"{indent}{name}  {_identity(path)}  {_by(origin)}"
    if origin is None:
        return
    indent += "  "
    yield from (f"{indent}! {warning}" for warning in _warnings(path, origin))
    if model := base_model(origin.folder):
        yield f"{indent}base model {model}"
    for entry, source in origin.inputs():
        if not source.exists():
            yield f"{indent}{_missing(entry)}"
            continue
        yield from _trace_path(source, entry["path"], indent, seen)
        yield from _changed_since(entry, source, origin, f"{indent}  ")


def _trace_row(path: Path, name: str, row_id: str, row: Row, indent: str, seen: set[tuple[Path, str]]) -> Iterator[str]:
    """A row, then the rows of the run's input files that it was made from, and the models that were at work."""
    origin = origin_of(path)
    yield f"{indent}{name}#{row_id}  {_excerpt(row)}  {_by(origin)}"
    if (path.resolve(), row_id) in seen or origin is None:
        return
    seen.add((path.resolve(), row_id))
    indent += "  "
    yield from (f"{indent}! {warning}" for warning in _warnings(path, origin))
    wanted = {row_id, *row.get("parents", [])}
    missing = set(row.get("parents", []))
    for entry, source in origin.inputs():
        if not source.exists():
            yield f"{indent}{_missing(entry)}"
        elif source.suffix in _ROW_FILES:
            yield from _changed_since(entry, source, origin, indent)
            for found_id, found in find_rows(source, wanted).items():
                missing.discard(found_id)
                if found_id == row_id:  # the same row, one stage earlier: its parents are found from there
                    missing -= set(found.get("parents", []))
                yield from _trace_row(source, entry["path"], found_id, found, indent, seen)
        else:
            yield f"{indent}with {entry['key']} {entry['path']}  {_identity(source)}"
    yield from (f"{indent}? parent {parent} is in none of the inputs" for parent in sorted(missing))


def origin_of(path: Path) -> Origin | None:
    """The run folder that a path is or lies in; None for a source that no stage wrote."""
    absolute = path.resolve()
    for folder in (absolute, *absolute.parents):
        manifest = read_manifest(folder)
        if manifest is not None:
            return Origin(folder, manifest)
    return None


def find_rows(path: Path, wanted: set[str]) -> dict[str, Row]:
    """The rows of a JSON Lines or JSON file with these ids. Rows without an id are known as `<file>-<line>`."""
    found: dict[str, Row] = {}
    for number, row in enumerate(_rows(path), start=1):
        row_id = str(row.get("id", f"{path.stem}-{number}"))
        if row_id in wanted:
            found[row_id] = row
    return found


def base_model(folder: Path) -> str | None:
    """Name and path of the base model in a run's configuration; None when the stage has none."""
    import yaml

    path = folder / "config.yaml"
    config = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}
    model = (config or {}).get("model")
    return f"{model['name']} ({model['path']})" if model else None


def _rows(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8") as file:
        try:
            rows = (
                (json.loads(line) for line in file if line.strip())
                if path.suffix == ".jsonl"
                else iter(json.load(file))
            )
            yield from (row for row in rows if isinstance(row, dict))
        except ValueError as error:
            raise UserError(f"{path}: not JSON ({error})") from error


def _warnings(path: Path, origin: Origin) -> Iterator[str]:
    """What is wrong with a run's outputs: all of them for its folder, else the one that `path` is or lies in."""
    inside = path.resolve().relative_to(origin.folder).parts
    if origin.manifest["status"] != "complete":
        yield f"the stage is {origin.manifest['status']}, not complete"
    outputs = [entry for entry in origin.manifest["outputs"] if not inside or entry["path"] == inside[0]]
    if inside and not outputs:
        yield "its manifest does not list it"
    for entry in outputs:
        output = origin.folder / entry["path"]
        if not output.exists():
            yield f"{entry['path']} is gone"
        elif (now := hash_path(output)) != entry["sha256"]:
            yield f"{entry['path']} has changed since it was written: {_short(entry['sha256'])} then, {_short(now)} now"


def _changed_since(entry: Mapping[str, Any], source: Path, origin: Origin, indent: str) -> Iterator[str]:
    now = hash_path(source, without=origin.folder)
    if entry["sha256"] not in (None, now):
        stage = origin.manifest["stage"]
        yield f"{indent}! has changed since {stage} read it: {_short(entry['sha256'])} then, {_short(now)} now"


def _missing(entry: Mapping[str, Any]) -> str:
    if entry["sha256"] is None:
        return f"{entry['path']}  (from the hub)"
    return f"{entry['path']}  {_short(entry['sha256'])}  ! is gone"


def _identity(path: Path) -> str:
    rows = count_rows(path) if path.is_file() else None
    return _short(hash_path(path)) + ("" if rows is None else f"  {rows} rows")


def _by(origin: Origin | None) -> str:
    return "source" if origin is None else f"<- {origin.manifest['stage']}: {origin.manifest.get('command', '')}"


def _excerpt(row: Row) -> str:
    """The beginning of what a row is about: its question, or the last turn of its prompt."""
    prompt = row.get("prompt") or row.get("messages")
    text = (
        prompt[-1].get("content", "")
        if isinstance(prompt, list) and prompt
        else row.get("input") or row.get("instruction")
    )
    words = " ".join(str(text or "").split())
    return f'"{words[:60]}…"' if len(words) > 60 else f'"{words}"'


def _short(sha256: str) -> str:
    return sha256[:12]
