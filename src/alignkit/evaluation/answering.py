"""Have several models answer the same held-out questions, and the teacher grade the answers."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from alignkit.core.artifact import Artifact
from alignkit.core.config import ModelConfig, SamplingConfig, TeacherConfig
from alignkit.core.journal import Journal
from alignkit.core.records import Completion, CompletionSet, Message, QAExample
from alignkit.data.chat import qa_prompt

LOG = logging.getLogger("alignkit")

Answers = dict[str, dict[str, Completion]]
"""Model name -> row id -> its answer."""


def answer_with_models(
    examples: Sequence[QAExample],
    models: Mapping[str, str],
    model: ModelConfig,
    sampling: SamplingConfig,
    seed: int,
    artifact: Artifact,
) -> Answers:
    """One answer of each model to each question. `models` maps a name to an adapter folder, "" being the base itself.

    Finished answers are journalled for each model, so that an interrupted run goes on where it stopped; a model whose
    journal is complete is not loaded at all.
    """
    questions = [CompletionSet(id=example.id, prompt=qa_prompt(example), completions=[]) for example in examples]
    answers: Answers = {}
    for name, adapter in models.items():
        with Journal(artifact.work_folder / f"{name}.jsonl", artifact.fingerprint) as journal:
            if any(question.id not in journal.done for question in questions):
                _generate(name, adapter, questions, model, sampling, seed, journal)
            answers[name] = {row.id: Completion.model_validate(journal.done[row.id][0]) for row in questions}
    return answers


def _generate(
    name: str,
    adapter: str,
    questions: Sequence[CompletionSet],
    model: ModelConfig,
    sampling: SamplingConfig,
    seed: int,
    journal: Journal,
) -> None:
    """Load one model and let it answer what the journal does not hold yet."""
    from alignkit.generation.hf import HFGenerator, merge_adapter
    from alignkit.generation.resumable import generate_all
    from alignkit.models.loading import load_policy, load_tokenizer

    policy = merge_adapter(load_policy(model, adapter or None))
    generate_all(HFGenerator(policy, load_tokenizer(model), name), questions, sampling, seed, journal)


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
