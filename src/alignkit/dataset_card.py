"""dataset_card: put the rows of a stage into a folder as the Hub takes it: the files, and a card with its metadata.

The card is made from the manifest of the run that wrote the rows: what they are, how and from what they were made, what
was left out and why, their columns, limits and licence. Only the licence and the language have to be told. The metadata
is read back by huggingface_hub before it is written.

Reads:   rows                      run folder of a stage that writes rows: expand, select, sample, judge,
                                   rejection_sampling, ...
Writes:  *.jsonl                   the rows, as they are
         README.md                 the dataset card
         DATASHEET.md              that of expand, where the rows have one

Overrides people use:
  rows=runs/mine/rejection_sampling        which rows
  license=cc-by-4.0 language=[en]          under which licence, in which languages
  'files=[pairs.jsonl]'                    only these files of the run
  title="Questions about pumps"            what it is called
  push_to_hub=<owner>/<name>               put it on the Hub (private)

Examples:
  python -m alignkit.dataset_card run=demo
  python -m alignkit.dataset_card run=mine rows=runs/mine/expand license=cc-by-4.0 language=[en] title="My questions"
"""

from __future__ import annotations

import logging
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Optional

from alignkit.core.artifact import Artifact
from alignkit.core.config import StageConfig
from alignkit.core.errors import UserError

if TYPE_CHECKING:
    from alignkit.core.lineage import Origin

# ruff: noqa: UP045

LOG = logging.getLogger("alignkit")


@dataclass
class DatasetCardConfig(StageConfig):
    """Configuration of `dataset_card`."""

    inputs: ClassVar[tuple[str, ...]] = ("rows",)
    incidental: ClassVar[tuple[str, ...]] = (*StageConfig.incidental, "push_to_hub", "hub_private")

    rows: str = ""
    """Run folder of the stage that wrote the rows."""
    files: list[str] = field(default_factory=list)
    """Which of its files; none: all that have rows, but for those that were dropped."""
    title: Optional[str] = None
    """What the data set is called; none: by the run and the stage."""
    license: str = "other"
    """Of the rows: your sources' licences and the teacher's terms decide."""
    language: list[str] = field(default_factory=list)
    """Codes of the languages of the rows, like en; none: not said."""
    push_to_hub: Optional[str] = None
    """Upload to this dataset repository, <owner>/<name>; the token is read from HF_TOKEN."""
    hub_private: bool = True
    """Whether that repository is to be private."""


def run(config: DatasetCardConfig) -> Artifact:
    """Copy the rows, and describe them by what the manifest of their run says."""
    check_config(config)
    with Artifact.open("dataset_card", config) as artifact:
        if not artifact.up_to_date:
            from alignkit.reporting.dataset_card import NAME, dataset_card

            origin = find_run(config)
            files = {name: origin.folder / name for name in find_files(config, origin)}
            title = config.title or f"{origin.folder.parent.name} {origin.folder.name}"
            card = dataset_card(origin, files, title, config.license, config.language)
            datasheet = origin.folder / "DATASHEET.md"
            for path in [*files.values(), *([datasheet] if datasheet.is_file() else [])]:
                with artifact.output(path.name) as copy:
                    shutil.copyfile(path, copy)
            artifact.write_text(NAME, card)
            artifact.summary = ", ".join([*files, NAME])
    if config.push_to_hub:
        push(config, artifact)
    return artifact


def check_config(config: DatasetCardConfig) -> None:
    """Raise `UserError` for what the Hub would not take."""
    from alignkit.data.hub import check_push

    if not re.fullmatch(r"[A-Za-z0-9.-]+", config.license):
        raise UserError(f"license={config.license}: give a licence's short name as the Hub has it (cc-by-4.0, other)")
    for code in config.language:
        if not re.fullmatch(r"[a-z]{2,3}|multilingual|code", code):
            raise UserError(f"language={config.language}: give codes of two or three letters (en, it, zh)")
    if config.push_to_hub:
        check_push(config.push_to_hub)


def find_run(config: DatasetCardConfig) -> Origin:
    """The run that wrote the rows, its files as it wrote them."""
    from alignkit.core.lineage import origin_of, warnings_about

    origin = origin_of(Path(config.rows))
    if origin is None or origin.folder != Path(config.rows).resolve():
        raise UserError(f"rows={config.rows}: not the run folder of a stage; give one, e.g. runs/mine/select")
    if warnings := warnings_about(origin.folder):
        raise UserError(f"rows={config.rows}: {'; '.join(warnings)}. Run the stage again with force=true")
    return origin


def find_files(config: DatasetCardConfig, origin: Origin) -> list[str]:
    """The files with rows, or those that were named."""
    there = [
        entry["path"]
        for entry in origin.manifest["outputs"]
        if entry["rows"] and entry["path"].endswith(".jsonl") and entry["path"] != "dropped.jsonl"
    ]
    if unknown := [name for name in config.files if name not in there]:
        raise UserError(f"files={config.files}: {config.rows} has no rows in {unknown[0]}, but in {', '.join(there)}")
    if not there:
        raise UserError(f"rows={config.rows}: the stage {origin.manifest['stage']} wrote no file with rows")
    return config.files or there


def push(config: DatasetCardConfig, artifact: Artifact) -> None:
    """Upload the folder's files to a dataset repository."""
    from alignkit.data.hub import push_files

    assert config.push_to_hub is not None
    files = {entry["path"]: artifact.folder / entry["path"] for entry in artifact.outputs}
    address = push_files(config.push_to_hub, files, "Rows", repo_type="dataset", private=config.hub_private)
    LOG.info("pushed to %s", address)


if __name__ == "__main__":
    from alignkit.core.app import stage_main

    stage_main("dataset_card")
