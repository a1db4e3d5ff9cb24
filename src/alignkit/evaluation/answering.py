"""Have several systems answer the same held-out questions, and the teacher grade the answers."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.core.artifact import Artifact
from alignkit.core.config import ModelConfig, SamplingConfig, TeacherConfig
from alignkit.core.errors import UserError
from alignkit.core.journal import Journal
from alignkit.core.records import Completion, Message, QAExample, Tools
from alignkit.data.chat import qa_prompt
from alignkit.data.sources.qa_expert import RETRIEVE
from alignkit.evaluation.answers import Answer, Missing, Outcomes, read_answers
from alignkit.evaluation.contexts import Question
from alignkit.evaluation.systems import ServersConfig, System, SystemKind, open_here, server_config, server_keys

if TYPE_CHECKING:
    from alignkit.evaluation.multihop import Search
    from alignkit.generation.hf import HFGenerator
    from alignkit.generation.openai import OpenAIGenerator
    from alignkit.retrieval.open import FilteringRetriever

LOG = logging.getLogger("alignkit")

Answers = dict[str, dict[str, Answer]]
"""System name -> row id -> its answer. A row that a system has no answer to is not there."""


@dataclass(frozen=True)
class Setup:
    """What every system is asked with. `retriever` is there for a multi-hop search of `hops` steps."""

    model: ModelConfig
    sampling: SamplingConfig
    servers: ServersConfig
    seed: int
    retriever: FilteringRetriever | None = None
    k: int = 1
    hops: int = 1

    @property
    def tools(self) -> Tools | None:
        """The functions that a prompt offers."""
        return [RETRIEVE] if self.retriever is not None else None


def drop_unfit(
    questions: Sequence[Question], systems: Sequence[System], setup: Setup, artifact: Artifact
) -> list[Question]:
    """The questions that the base can take, if it or an adapter of it is asked; the others are dropped, for all.

    Raises `UserError` when none is left.
    """
    if not any(system.kind in (SystemKind.base, SystemKind.adapter) for system in systems):
        return list(questions)
    from alignkit.generation.questions import unfit
    from alignkit.models.loading import load_tokenizer

    tokenizer, kept, reasons = load_tokenizer(setup.model), list[Question](), set[str]()
    for question in questions:
        problem = unfit(tokenizer, question.prompt, setup.model, setup.sampling, setup.tools)
        if problem is None:
            kept.append(question)
        else:
            artifact.drop(question.example, *problem)
            reasons.add(problem[0])
    if not kept:
        raise UserError(
            f"no question can be asked ({', '.join(sorted(reasons))}); see dropped.jsonl, and set a larger "
            "model.max_length or a smaller sampling.max_new_tokens"
        )
    return kept


def answer_with_systems(
    questions: Sequence[Question], systems: Sequence[System], setup: Setup, artifact: Artifact
) -> Answers:
    """One answer of each system to each question; what has none goes to unanswered.jsonl with the reason.

    Files of answers are read first: what is wrong with one is said before anything is generated. What is finished is
    kept, so that an interrupted run goes on where it stopped, and a model that has finished is not loaded again.
    Records in the artifact's metrics how many rows each system did not answer, by reason.
    """
    longest_first = sorted(questions, key=lambda question: -sum(len(turn.content) for turn in question.prompt))
    answers: Answers = {}
    unanswered: list[dict[str, str]] = []
    shared: Any = None
    read = {each.name: _read_file(each, longest_first) for each in systems if each.kind is SystemKind.answers}
    for system in systems:
        if system.name in read:
            found = read[system.name]
        elif system.kind.runs_here:
            shared = shared if system.kind is SystemKind.adapter else None
            found, shared = _ask_model(system, longest_first, setup, artifact, shared)
        else:
            found = _ask_server(system, longest_first, setup, artifact)
        answers[system.name] = {id: outcome for id, outcome in found.items() if isinstance(outcome, Answer)}
        missing = {each.id: outcome for each in questions if isinstance(outcome := found[each.id], Missing)}
        unanswered += [{"id": id, "model": system.name, **asdict(outcome)} for id, outcome in missing.items()]
        _report(system, len(questions), missing, artifact)
    if unanswered:
        artifact.write_rows("unanswered.jsonl", unanswered)
    return answers


def _report(system: System, rows: int, missing: Mapping[str, Missing], artifact: Artifact) -> None:
    """Say how many rows a system did not answer. Raises `UserError` when it answered none."""
    if not missing:
        return
    reasons = dict(Counter(outcome.reason for outcome in missing.values()).most_common())
    artifact.metrics.setdefault("unanswered", {})[system.name] = reasons
    told = ", ".join(f"{reason} ({count})" for reason, count in reasons.items())
    if len(missing) == rows:
        detail = next(iter(missing.values())).detail
        raise UserError(f"models.{system.name}: answered none of the {rows} questions: {told}. {detail}".rstrip(". "))
    LOG.warning(
        "%s has no answer to %d of %d questions, and is compared on the others: %s",
        system.name, len(missing), rows, told,
    )  # fmt: skip


# -- asking one system -------------------------------------------------------------------------------------------------


def _ask_model(
    system: System, questions: Sequence[Question], setup: Setup, artifact: Artifact, shared: Any
) -> tuple[Outcomes, Any]:
    """What a model on this machine answers, and what the adapter of the next system can join."""
    journals = {part: artifact.work_folder / part / f"{system.name}.jsonl" for part in ("answers", "turns")}
    with Journal(journals["answers"], artifact.fingerprint) as finished:
        if any(question.id not in finished.done for question in questions):
            generator = open_here(system, setup.model, shared)
            shared = generator.shared
            with Journal(journals["turns"], artifact.fingerprint) as journal:
                for id, outcome in _generate(generator, questions, setup, journal).items():
                    finished.add(id, asdict(outcome))
        found = {question.id: finished.done[question.id] for question in questions}
    return {id: Missing(**each) if "reason" in each else Answer(**each) for id, each in found.items()}, shared


def _generate(generator: HFGenerator, questions: Sequence[Question], setup: Setup, journal: Journal) -> Outcomes:
    """One turn to each question whose prompt the model can take, or a search."""
    from alignkit.evaluation.multihop import TurnsHere, search_and_answer
    from alignkit.generation.questions import unfit
    from alignkit.generation.resumable import generate_all

    if setup.retriever is not None:
        turns = TurnsHere(generator, setup.model, setup.sampling, setup.seed, journal)
        return search_and_answer(turns, questions, setup.retriever, setup.k, setup.hops, journal)
    outcomes: Outcomes = {}
    for question in questions:
        if problem := unfit(generator.tokenizer, question.prompt, setup.model, setup.sampling):
            outcomes[question.id] = Missing(*problem)
    fitting = [question for question in questions if question.id not in outcomes]
    written = generate_all(generator, fitting, setup.sampling, setup.seed, journal)
    for question in fitting:
        (completion,) = written[question.id]
        outcomes[question.id] = Answer(completion.text, completion.finished, question.contexts)
    return outcomes


def store_of(system: System, artifact: Artifact) -> Path:
    """Where a server's answers lie until the stage is complete."""
    return artifact.work_folder / "answers" / f"{system.name}.sqlite"


def _ask_server(system: System, questions: Sequence[Question], setup: Setup, artifact: Artifact) -> Outcomes:
    """What a server answers, in one turn to each question or after a search.

    Its response store lies with the unfinished work: a server may have another model under the same name tomorrow.
    """
    from alignkit.evaluation.multihop import search_and_answer
    from alignkit.generation.openai import OpenAIGenerator
    from alignkit.generation.resumable import chunk_seed
    from alignkit.teacher.openai_client import OpenAITeacher

    teacher = OpenAITeacher(server_config(system, setup.servers, store_of(system, artifact)), server_keys(system))
    generator = OpenAIGenerator(teacher, system.name, setup.tools)

    def write(step: int, going: Sequence[Search]) -> dict[str, Completion | Missing]:
        prompts = [search.messages for search in going]
        written = _write_turns(generator, prompts, setup.sampling, chunk_seed(setup.seed, step))
        return {search.id: turn for search, turn in zip(going, written, strict=True)}

    outcomes: Outcomes = {}
    if setup.retriever is not None:
        with Journal(artifact.work_folder / "turns" / f"{system.name}.jsonl", artifact.fingerprint) as journal:
            outcomes = search_and_answer(write, questions, setup.retriever, setup.k, setup.hops, journal)
    else:
        turns = _write_turns(generator, [question.prompt for question in questions], setup.sampling, setup.seed)
        for question, turn in zip(questions, turns, strict=True):
            if isinstance(turn, Completion):
                outcomes[question.id] = Answer(turn.text, turn.finished, question.contexts)
            else:
                outcomes[question.id] = turn
    artifact.metrics.setdefault("servers", {})[system.name] = asdict(teacher.usage)
    return outcomes


def _write_turns(
    generator: OpenAIGenerator, prompts: Sequence[list[Message]], sampling: SamplingConfig, seed: int
) -> list[Completion | Missing]:
    """A server's turn to each prompt: one that it cut counts as it is, what it refused or never sent does not."""
    from alignkit.teacher.wire import CUT

    written = generator.generate(prompts, sampling, seed)
    failures = dict(generator.failures)
    turns: list[Completion | Missing] = []
    for position, completions in enumerate(written):
        if completions:
            turns.append(completions[0])
        elif (failure := failures[position]).reason == CUT:  # without a text where all of it went into reasoning
            turns.append(Completion(text=failure.text or "", model=generator.label, finished=False))
        else:
            turns.append(Missing(str(failure.reason), failure.detail))
    return turns


def _read_file(system: System, questions: Sequence[Question]) -> Outcomes:
    """The answers that a file has."""
    outcomes, others = read_answers(f"models.{system.name}", system.source, [question.id for question in questions])
    if others:
        LOG.info("%s: %d of its answers are to rows that are not examined here", system.source, others)
    return outcomes


# -- grading -----------------------------------------------------------------------------------------------------------


def grade(
    examples: Sequence[QAExample], answers: Answers, teacher: TeacherConfig, artifact: Artifact
) -> dict[tuple[str, str], float | None]:
    """The teacher's grade of each different answer, by row id and text: two models that agree get the same grade.

    None where the teacher's reply held no grade. Records who graded, and what it took, in the artifact's metrics.
    """
    from alignkit.scoring.judge import JudgeScorer
    from alignkit.teacher.client import open_teacher

    prompts = {example.id: qa_prompt(example) for example in examples}
    keys = list(dict.fromkeys((id, answer.text) for by_row in answers.values() for id, answer in by_row.items()))
    scorer = JudgeScorer(open_teacher(teacher))
    grades = scorer.score([[*prompts[id], Message(role="assistant", content=text)] for id, text in keys])
    missing = [reason for reason in scorer.reasons if reason]
    if missing:
        LOG.warning("no grade for %d of %d answers, the first because: %s", len(missing), len(keys), missing[0])
    artifact.metrics |= {"teacher": teacher.model, "usage": asdict(scorer.teacher.usage)}
    return dict(zip(keys, grades, strict=True))
