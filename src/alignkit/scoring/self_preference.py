"""Does a judge grade its own writing? Judges favour it (Panickssery et al., 2024, arXiv 2404.13076)."""

from __future__ import annotations

from pathlib import Path

from alignkit.core.lineage import origin_of

WRITERS = ("expand", "sample")
"""Stages in which a teacher writes, rather than grades."""


def teachers_behind(path: Path, seen: set[Path] | None = None) -> set[str]:
    """The teachers that wrote what a file or adapter was made from, as far as there are manifests to tell."""
    seen = set() if seen is None else seen
    origin = origin_of(path) if path.exists() else None
    if origin is None or origin.folder in seen:
        return set()
    seen.add(origin.folder)
    wrote = origin.manifest["stage"] in WRITERS and "teacher" in origin.manifest["metrics"]
    teachers = {str(origin.manifest["metrics"]["teacher"])} if wrote else set()
    return teachers.union(*(teachers_behind(source, seen) for _, source in origin.inputs()))


def short_name(model: str) -> str:
    """A model's name without its owner, in lower case: servers and hubs name the same model differently."""
    return model.rpartition("/")[2].lower()
