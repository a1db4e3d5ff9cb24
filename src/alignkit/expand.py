"""expand: let the teacher write data, by one of five recipes.

  recipe=self_instruct      new questions about new statements, or new tasks, from a few seeds
  recipe=documents          questions and answers over your own documents, with retrieved distractors
  recipe=multihop           questions that compare two things, answered step by step
  recipe=raft               questions, distractors and answers that quote: for a model that will read what is retrieved
  recipe=complete_answers   short answers (SQuAD, BoolQ, DROP, MuSiQue, HotpotQA) become full ones

What cannot be read or used is dropped with its reason. Every answer of the teacher is kept in the response store: a
killed run goes on where it was, and nothing is paid for twice.

Reads:   data.path                 seeds, documents, categories or short answers, as the recipe needs
         metadata.path             recipe=documents: a table about the documents (optional)
Writes:  expanded.jsonl            the new rows; `parents` are the ids of what they were made from
         dropped.jsonl             everything that was not used, and why
         DATASHEET.md              what the rows are and how they came to be

Overrides people use:
  data.path=mine.jsonl             your own seeds, documents, ...
  count=1000                       how many new rows
  dry_run=true                     what would be asked, and what it would cost
  teacher=openai teacher.model=... a real teacher instead of the scripted one
  push_to_hub=<owner>/<name>       put the rows and their datasheet on the Hub (private)

Examples:
  python -m alignkit.expand run=demo
  python -m alignkit.expand run=mine data.path=mine.jsonl count=1000 teacher=openai teacher.model=<model>
  python -m alignkit.expand run=mine recipe=raft data.path=manuals/ teacher=vllm teacher.model=<model> dry_run=true
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, Optional

from alignkit.core.artifact import Artifact
from alignkit.core.config import RowsConfig, StageConfig, TeacherMode, TeacherStageConfig
from alignkit.core.errors import UserError
from alignkit.core.records import Dropped, Row
from alignkit.data.metadata import MetadataConfig
from alignkit.teacher.recipes.complete_answers import CompleteAnswersConfig
from alignkit.teacher.recipes.documents import DocumentsConfig
from alignkit.teacher.recipes.multihop import MultihopConfig
from alignkit.teacher.recipes.raft import RaftConfig
from alignkit.teacher.recipes.self_instruct import SelfInstructConfig

if TYPE_CHECKING:
    from alignkit.reporting.yields import Yields
    from alignkit.teacher.recipes.asking import Asker

# All configurations write Optional[...]; omegaconf takes `... | None` just as well.
# ruff: noqa: UP045

LOG = logging.getLogger("alignkit")


class Recipe(Enum):
    """What to write."""

    self_instruct = "self_instruct"
    documents = "documents"
    multihop = "multihop"
    raft = "raft"
    complete_answers = "complete_answers"


@dataclass
class ExpandConfig(TeacherStageConfig):
    """Configuration of `expand`."""

    inputs: ClassVar[tuple[str, ...]] = ("data.path", "self_instruct.blacklist", "metadata.path")
    incidental: ClassVar[tuple[str, ...]] = (*StageConfig.incidental, "push_to_hub", "hub_private")

    recipe: Recipe = Recipe.self_instruct
    """What to write."""
    data: RowsConfig = field(default_factory=RowsConfig)
    count: Optional[int] = None
    """New rows wanted; none: as many as the data gives (self_instruct and multihop need a number)."""
    metadata: MetadataConfig = field(default_factory=MetadataConfig)
    push_to_hub: Optional[str] = None
    """Upload to this dataset repository, <owner>/<name>; the token is read from HF_TOKEN."""
    hub_private: bool = True
    """Whether that repository is to be private."""
    self_instruct: SelfInstructConfig = field(default_factory=SelfInstructConfig)
    documents: DocumentsConfig = field(default_factory=DocumentsConfig)
    multihop: MultihopConfig = field(default_factory=MultihopConfig)
    raft: RaftConfig = field(default_factory=RaftConfig)
    complete_answers: CompleteAnswersConfig = field(default_factory=CompleteAnswersConfig)


def run(config: ExpandConfig) -> Artifact:
    """Follow the recipe, write down what came of it, and stop when the teacher was of too little use."""
    from alignkit.core.progress import progress
    from alignkit.teacher.client import open_teacher
    from alignkit.teacher.recipes.asking import Asker

    check_config(config)
    artifact = Artifact.open("expand", config, always=config.teacher.retry_failed or config.dry_run)
    if config.dry_run:
        estimate(config, artifact)
        return artifact
    with artifact:
        if not artifact.up_to_date:
            ask = Asker(open_teacher(config.teacher))
            found = progress(follow_recipe(config, ask), f"expand, {config.recipe.name}", total=config.count)
            rows = collect(found, config.count, artifact)
            yields = account(artifact, config, ask, rows)
            if not rows:
                LOG.info("%s", yields.text().rstrip())
                raise UserError(nothing_usable(artifact, config, ask))
            write(artifact, config, ask, rows, yields)
    if config.push_to_hub:
        push(config, artifact)
    return artifact


def collect(found: Iterator[Row | Dropped], count: int | None, artifact: Artifact) -> list[Row]:
    """The rows until there are `count`; what was dropped on the way goes to dropped.jsonl."""
    rows: list[Row] = []
    for each in found:
        if isinstance(each, Dropped):
            artifact.drop(each.row, each.reason, each.detail)
        else:
            rows.append(each)
        if len(rows) == count:
            break
    return rows


def follow_recipe(config: ExpandConfig, ask: Asker) -> Iterator[Row | Dropped]:
    """The rows of the chosen recipe, with what could not be read before them."""
    from alignkit.data.documents import read_documents
    from alignkit.data.metadata import join_metadata
    from alignkit.data.sources import read_comparables, read_questions, read_short_answers
    from alignkit.teacher.recipes import complete_answers, documents, multihop, raft, self_instruct

    found: Iterator[Row | Dropped]
    named: Any = {"name": config.name, "seed": config.seed, "source": f"teacher:{config.teacher.model}"}
    match config.recipe:
        case Recipe.self_instruct:
            from alignkit.scoring.novelty import NoveltyFilter
            from alignkit.scoring.rules import read_verdict

            seeds, unusable = read_questions(config.data)
            pool = NoveltyFilter(config.self_instruct.novelty_threshold)
            settings = config.self_instruct
            assert config.count is not None
            found = self_instruct.rows(seeds, config.count, settings, ask, pool, read_verdict=read_verdict, **named)
        case Recipe.documents:
            from alignkit.retrieval.bm25 import BM25Index

            pages, unusable = read_documents(config.data.path)
            pages, unmatched = join_metadata(pages, config.metadata)
            unusable += unmatched
            found = documents.rows(pages, config.documents, ask, BM25Index, count=config.count, **named)
        case Recipe.raft:
            from alignkit.data.chunks import chunk_pages

            pages, unusable = read_documents(config.data.path)
            chunks = chunk_pages(pages, config.raft.chunk_size, config.raft.chunk_overlap)
            found = raft.rows(chunks, config.raft, ask, count=config.count, **named)
        case Recipe.multihop:
            given, unusable = read_comparables(config.data)
            found = multihop.rows(given, config.count, config.multihop, ask, **named)
        case Recipe.complete_answers:
            short, unusable = read_short_answers(config.data)
            found = complete_answers.rows(short, config.complete_answers, ask, count=config.count, **named)
    yield from unusable
    yield from found


def account(artifact: Artifact, config: ExpandConfig, ask: Asker, rows: list[Row]) -> Yields:
    """What was asked, kept and dropped, and what it took; also noted in the artifact's metrics."""
    from alignkit.reporting.yields import Yields

    usage = ask.teacher.usage
    artifact.metrics |= {"recipe": config.recipe.name, "requested": ask.asked, "accepted": len(rows)}
    artifact.metrics["steps"] = {
        name: {**vars(step), "refused": dict(step.refused)} for name, step in ask.steps.items()
    }
    artifact.metrics |= {"teacher": config.teacher.model, "usage": asdict(usage)}
    return Yields(ask.steps, len(rows), artifact.dropped, usage, config.teacher.prices)


def write(artifact: Artifact, config: ExpandConfig, ask: Asker, rows: list[Row], yields: Yields) -> None:
    """Write the rows and the datasheet, and show ten rows. Fails when too many requests were in vain."""
    from alignkit.data.sources import qa_expert
    from alignkit.reporting.datasheet import write_datasheet
    from alignkit.reporting.yields import print_ten_rows

    as_records = [qa_expert.record(row) if isinstance(row, qa_expert.MultihopExample) else row for row in rows]
    artifact.write_rows("expanded.jsonl", as_records)  # QA-Expert's records keep their nulls
    write_datasheet(artifact, "expanded.jsonl", rows, yields, recipe=config.recipe.name, teacher=config.teacher)
    print_ten_rows(rows)
    LOG.info("%s", yields.text().rstrip())
    artifact.summary = f"{len(rows)} new rows from {ask.asked} requests"
    if config.count is not None and len(rows) < config.count:
        artifact.metrics["missing"] = config.count - len(rows)
        LOG.warning("expand: only %d of %d rows; see dropped.jsonl", len(rows), config.count)
    detail = f"{ask.failed} of {ask.asked} requests without a usable answer; dropped.jsonl has the reasons"
    artifact.check("answers usable", ask.failed <= config.max_failure_rate * ask.asked, detail)


def estimate(config: ExpandConfig, artifact: Artifact) -> None:
    """Say what the recipe would ask, and what that would cost."""
    from alignkit.teacher.dry_run import DryRunTeacher
    from alignkit.teacher.recipes.asking import Asker

    teacher = DryRunTeacher(config.teacher)
    rows = list(follow_recipe(config, Asker(teacher, announce=teacher.begin)))
    LOG.info("%s", teacher.report())
    known = sum(not isinstance(row, Dropped) for row in rows)
    artifact.summary = f"dry run, nothing was sent; {known} rows could be made from stored answers"


def nothing_usable(artifact: Artifact, config: ExpandConfig, ask: Asker) -> str:
    """What to say when there is not one row."""
    reasons = ", ".join(f"{reason} ({times} times)" for reason, times in artifact.dropped.most_common(3))
    advice = "teacher.retry_failed=true asks again for what failed."
    if config.teacher.mode is TeacherMode.scripted:
        advice = "For texts outside the demo's world name a real teacher: teacher=openai teacher.model=..."
    file = artifact.folder / "dropped.jsonl"
    return f"expand: no usable row in {ask.asked} answers: {reasons}. {file} has them all. {advice}"


def push(config: ExpandConfig, artifact: Artifact) -> None:
    """Upload the rows and their datasheet."""
    from alignkit.data.hub import push_to_hub
    from alignkit.reporting.datasheet import NAME

    assert config.push_to_hub
    files = [artifact.folder / "expanded.jsonl"]
    address = push_to_hub(config.push_to_hub, files, artifact.folder / NAME, private=config.hub_private)
    LOG.info("expand: uploaded to %s", address)


def check_config(config: ExpandConfig) -> None:
    """Raise `UserError` for settings that make no sense, before anything is paid for."""
    from alignkit.data.hub import check_push

    if config.count is not None and config.count < 1:
        raise UserError(f"count={config.count}: must be at least 1")
    if not 0 <= config.max_failure_rate <= 1:
        raise UserError(f"max_failure_rate={config.max_failure_rate}: must lie between 0 and 1")
    if config.recipe is Recipe.self_instruct and config.count is None:
        raise UserError("count has no value: recipe=self_instruct needs to know how many new rows you want")
    if config.recipe in (Recipe.documents, Recipe.raft) and (config.data.skip or config.data.limit is not None):
        raise UserError(
            f"data.skip and data.limit count rows, and recipe={config.recipe.name} reads documents: leave files out of "
            "data.path, or say with count how many new rows you want"
        )
    if config.recipe is not Recipe.documents and (config.metadata.path or config.metadata.query):
        raise UserError(f"metadata: only recipe=documents joins it, not recipe={config.recipe.name}")
    getattr(config, config.recipe.name).check()
    config.metadata.check()
    if config.push_to_hub:
        check_push(config.push_to_hub)


if __name__ == "__main__":
    from alignkit.core.app import stage_main

    stage_main("expand")
