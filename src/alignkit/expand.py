"""expand: let the teacher turn a few seed examples into many new ones.

Self-Instruct (Wang et al., 2022, arXiv 2212.10560) for questions about statements: each request shows six seeds and two
examples made earlier (eight seeds while there are none), and asks for one new statement, question and answer of a drawn
kind, judgmental or not. What cannot be read is dropped, and so is what resembles a seed or an accepted example too much
(ROUGE-L). A killed run goes on where it was.

Reads:   seeds.path                question-answer rows to start from
Writes:  expanded.jsonl            the new rows; `parents` are the seeds that were shown
         dropped.jsonl             every answer of the teacher that was not used, and why

Overrides people use:
  seeds.path=mine.jsonl            your own seeds
  count=1000                       how many new rows
  answers=false                    statements and questions only
  judgmental_share=0.3             how many questions are to be answered by yes or no
  teacher=openai teacher.model=... a real teacher instead of the scripted one

Examples:
  python -m alignkit.expand run=demo
  python -m alignkit.expand run=mine seeds.path=mine.jsonl count=1000 teacher=openai teacher.model=<model>
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from random import Random
from typing import TYPE_CHECKING, ClassVar, Literal, Optional

from alignkit.core.artifact import Artifact
from alignkit.core.config import RowsConfig, StageConfig, TeacherConfig
from alignkit.core.errors import UserError
from alignkit.core.journal import Journal
from alignkit.core.records import QAExample

if TYPE_CHECKING:
    from alignkit.teacher.client import Answer, Request, Teacher, Usage

# All configurations write Optional[...]; omegaconf takes `... | None` just as well.
# ruff: noqa: UP045

LOG = logging.getLogger("alignkit")

HOPELESS_REQUESTS = 50
"""A teacher that has given nothing usable in as many answers is not asked further."""


@dataclass
class ExpandConfig(StageConfig):
    """Configuration of `expand`."""

    inputs: ClassVar[tuple[str, ...]] = ("seeds.path",)

    seeds: RowsConfig = field(default_factory=RowsConfig)
    count: int = 200
    """New rows wanted."""
    answers: bool = True
    """Whether the new rows are to have answers, or only statements and questions."""
    judgmental_share: float = 0.5
    """Share of the questions that are to be answered by yes or no."""
    novelty_threshold: float = 0.7
    """Highest ROUGE-L F that a new statement and question may have with a seed or an accepted row."""
    seeds_per_prompt: int = 6
    """Seeds shown in each request."""
    machine_per_prompt: int = 2
    """Accepted rows shown beside the seeds; more seeds take their place while there are none."""
    max_requests: Optional[int] = None
    """Ask at most this often; none: three times `count`."""
    round_size: int = 32
    """Requests made up from the same accepted rows, and sent together."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)


@dataclass(frozen=True)
class Draft:
    """A request by its number, the kind of question it asks for, and the seeds that it shows."""

    number: int
    kind: Literal["judgmental", "non_judgmental"]
    parents: list[str]
    request: Request


def run(config: ExpandConfig) -> Artifact:
    """Ask for examples, round by round, until there are enough new ones."""
    from alignkit.core.progress import progress
    from alignkit.teacher.client import Usage, open_teacher

    check_config(config)
    with Artifact.open("expand", config) as artifact:
        if artifact.up_to_date:
            return artifact
        seeds = read_seeds(config, artifact)
        teacher, usage = open_teacher(config.teacher), Usage()
        with Journal(artifact.work_folder / "answers.jsonl", artifact.fingerprint) as journal:
            found = new_examples(config, seeds, teacher, journal, artifact, usage)
            examples = list(progress(found, "expand", total=config.count))
        if not examples:
            reasons = ", ".join(f"{reason} ({times} times)" for reason, times in artifact.dropped.most_common(3))
            where = artifact.folder / "dropped.jsonl"
            raise UserError(
                f"expand: no usable example in {usage.requests} answers: {reasons}. {where} has them all. "
                "For texts outside the demo's world name a real teacher: teacher=openai teacher.model=..."
            )
        if len(examples) < config.count:
            told = f"{len(examples)} of {config.count} rows after {usage.requests} requests"
            LOG.warning("expand: %s; see dropped.jsonl, and raise max_requests or add seeds", told)
        artifact.write_rows("expanded.jsonl", examples)
        artifact.metrics |= {
            "requested": usage.requests,
            "accepted": len(examples),
            "missing": config.count - len(examples),
        }
        artifact.metrics["judgmental"] = sum(example.kind == "judgmental" for example in examples)
        artifact.metrics |= {"teacher": config.teacher.model, "usage": asdict(usage)}
        artifact.summary = f"{len(examples)} new rows from {usage.requests} requests"
    return artifact


def new_examples(
    config: ExpandConfig,
    seeds: Sequence[QAExample],
    teacher: Teacher,
    journal: Journal,
    artifact: Artifact,
    usage: Usage,
) -> Iterator[QAExample]:
    """Yield accepted rows. The same seeds and answers give the same rows, however often the run was interrupted."""
    from alignkit.scoring.novelty import NoveltyIndex

    pool = NoveltyIndex(config.novelty_threshold)
    for seed in seeds:
        pool.add(novelty_text(seed), seed.id)
    accepted: list[QAExample] = []
    asked, most = 0, config.max_requests or 3 * config.count
    while len(accepted) < config.count and asked < most and (accepted or asked < HOPELESS_REQUESTS):
        size = min(config.round_size, config.count - len(accepted), most - asked)
        drafts = [draw(config, seeds, accepted, number) for number in range(asked + 1, asked + size + 1)]
        answers = ask(drafts, teacher, journal)
        usage.count(answers)
        for draft, answer in zip(drafts, answers, strict=True):
            example = read_answer(draft, answer, config, artifact)
            if example is None:
                continue
            if (match := pool.most_similar(novelty_text(example))) is not None:
                artifact.drop(example, "too similar", f"ROUGE-L {match.similarity:.3f} with {match.label}")
                continue
            example = example.model_copy(update={"id": f"{config.name}-{len(accepted) + 1:05d}"})
            pool.add(novelty_text(example), example.id)
            accepted.append(example)
            yield example
        asked += size


def draw(config: ExpandConfig, seeds: Sequence[QAExample], accepted: Sequence[QAExample], number: int) -> Draft:
    """Make up request `number` from the random seed, the number and the rows accepted so far, and from nothing else."""
    from alignkit.teacher.recipes.expand import expand_request

    rng = Random(f"{config.seed}-{number}")
    kind: Literal["judgmental", "non_judgmental"] = (
        "judgmental" if rng.random() < config.judgmental_share else "non_judgmental"
    )
    machine = rng.sample(accepted, min(config.machine_per_prompt, len(accepted)))
    wanted = config.seeds_per_prompt + config.machine_per_prompt - len(machine)
    human = rng.sample(seeds, min(wanted, len(seeds)))
    shown = [*human, *machine]
    rng.shuffle(shown)
    request = expand_request(shown, kind, answers=config.answers, sample=number)
    return Draft(number, kind, [seed.id for seed in human], request)


def ask(drafts: Sequence[Draft], teacher: Teacher, journal: Journal) -> list[Answer]:
    """The teacher's answers, each journaled as it arrives; what is in the journal is not asked again.

    Failures are journaled at the end only: when the teacher breaks down amid a round, they are asked again.
    """
    from alignkit.teacher.client import Answer

    missing = [draft for draft in drafts if str(draft.number) not in journal.done]

    def keep(position: int, answer: Answer) -> None:
        if answer.text is not None:
            journal.add(str(missing[position].number), asdict(answer))

    answers = teacher.ask([draft.request for draft in missing], keep) if missing else []
    for draft, answer in zip(missing, answers, strict=True):
        if answer.text is None:
            journal.add(str(draft.number), asdict(answer))
    return [Answer(**journal.done[str(draft.number)]) for draft in drafts]


def read_answer(draft: Draft, answer: Answer, config: ExpandConfig, artifact: Artifact) -> QAExample | None:
    """The example in an answer, called by its request; None when there is none, which goes to dropped.jsonl."""
    from alignkit.teacher.recipes.expand import Unusable, read_example

    id = f"{config.name}-request-{draft.number}"
    found = (
        read_example(answer.text, answers=config.answers)
        if answer.text is not None
        else Unusable("no answer", str(answer.error))
    )
    if isinstance(found, Unusable):
        row = {"id": id, "kind": draft.kind, "parents": draft.parents, "answer": answer.text}
        artifact.drop(row, found.reason, found.detail)
        return None
    return QAExample(
        id=id,
        instruction=found.statement,
        input=found.question,
        output=found.answer,
        kind=draft.kind,
        source=f"teacher:{config.teacher.model}",
        parents=draft.parents,
    )


def read_seeds(config: ExpandConfig, artifact: Artifact) -> list[QAExample]:
    """The seeds that can be shown: with statement and question, and with an answer where answers are wanted."""
    from alignkit.data.sources import read_questions

    examples, unusable = read_questions(config.seeds)
    for dropped in unusable:
        artifact.drop(dropped.row, dropped.reason, dropped.detail)
    seeds = []
    for example in examples:
        if not (example.instruction.strip() and example.input.strip()):
            artifact.drop(example, "seed without statement or question")
        elif config.answers and not example.output.strip():
            artifact.drop(example, "seed without answer")
        else:
            seeds.append(example)
    if not seeds:
        raise UserError(f"seeds.path={config.seeds.path}: no row has a statement, a question and an answer")
    return seeds


def check_config(config: ExpandConfig) -> None:
    """Raise `UserError` for numbers that make no sense."""
    for key in ("count", "round_size", "seeds_per_prompt"):
        if getattr(config, key) < 1:
            raise UserError(f"{key}={getattr(config, key)}: must be at least 1")
    if config.machine_per_prompt < 0:
        raise UserError(f"machine_per_prompt={config.machine_per_prompt}: must not be negative")
    if config.max_requests is not None and config.max_requests < 1:
        raise UserError(f"max_requests={config.max_requests}: must be at least 1, or null for three times count")
    if not 0 <= config.judgmental_share <= 1:
        raise UserError(f"judgmental_share={config.judgmental_share}: must lie between 0 and 1")
    if not 0 < config.novelty_threshold <= 1:
        raise UserError(f"novelty_threshold={config.novelty_threshold}: must lie above 0 and not above 1")


def novelty_text(example: QAExample) -> str:
    """What the novelty of a row is measured on: its statement and question."""
    return f"{example.instruction}\n{example.input}"


if __name__ == "__main__":
    from alignkit.core.app import stage_main

    stage_main("expand")
