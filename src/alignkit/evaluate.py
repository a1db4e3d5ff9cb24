"""evaluate: score systems on held-out questions, each score with its 95 % interval, and compare them pairwise.

A system is an adapter on the base, the base alone, a whole model, a GGUF file, a model behind a server, or a file of
answers: what stands at its path says which. All answer the same questions, greedily unless told otherwise. Scores are
exact match, word F1, the accuracy of yes/no verdicts (balanced: the mean over true yes and true no), the answer's
length, those of `metrics`, and the teacher's grade from 0 to 10. Rows with different values of the fields `form`,
`level`, `kind`, `source` or `held_out_name` are also counted by these. Differences are paired: the same questions,
before and after; a row that one of two systems did not answer counts for neither. Intervals and p-values go by
document, since questions about one are correlated, and it is said how small a difference so many questions can show. A
held-out question that a model was trained on stops it.

Reads:   data.path                 held-out question-answer rows
         models                    systems by name, in the order of training; "" is the base
         passages.documents        what distractors are drawn from, or searched (none: the rows' statements)
         retrieval.path            with passages.indexed=true the index that is searched instead
Writes:  predictions.jsonl         for each question what every system answered and read, and the scores
         preferences.jsonl         with pairwise=true: what the teacher said of each pair of answers, in both orders
         unanswered.jsonl          which system did not answer which row, and why (where there are any)
         lm_eval/, promptfoo/      the questions for other harnesses (with export)
         manifest.json             metrics.models: scores by system; metrics.comparisons: differences

Overrides people use:
  'models={sft: runs/mine/sft/adapter}'   systems to examine, after the base (models.base=null: without the base)
  'models.vllm="http://127.0.0.1:8000/v1#<model>"'   a server (servers.api_key_env.vllm: NAME of its key's variable)
  'comparisons=["dpo>sft"]'          which pairs to compare, "new>old" (default: each system with the one before)
  contexts=noisy                     the statement among distractors (retrieved: what is found; multihop: searching)
  judge=false                        without the teacher's grades
  metrics=[rouge_l,chrf,reward]      which scores (reward: measuring.reward=runs/demo/reward)
  export=[lm_eval,promptfoo]         write the questions for these harnesses, too
  pairwise=true                      ask the teacher which of two answers is better, too, in both orders
  human_labels=labels.jsonl          how far the teacher agrees with people's grades or preferences
  cluster_by=machine                 field that correlated questions share (default: document, or else the statement)
  data.limit=100                     the first 100 questions only
  sampling.max_new_tokens=512        longer answers

Examples:
  python -m alignkit.evaluate run=demo data.path=test.jsonl 'models={sft: runs/demo/sft/adapter}'
  python -m alignkit.evaluate run=demo data.path=test.jsonl contexts=retrieved passages.documents=manuals name=live
  python -m alignkit.evaluate +model=qwen7b data.path=test.jsonl judge=false 'models.gpt=answers.jsonl'
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Optional

from alignkit.core.artifact import Artifact
from alignkit.core.config import ModelConfig, RowsConfig, SamplingConfig, StageConfig, TeacherConfig
from alignkit.core.errors import UserError
from alignkit.core.names import read_comparisons
from alignkit.core.retrieval_config import RetrievalConfig, SearchEngine
from alignkit.evaluation.contexts import NONE, ContextKind, PassagesConfig
from alignkit.evaluation.metrics.catalogue import DEFAULT, MeasuringConfig
from alignkit.evaluation.systems import ServersConfig

# All configurations write Optional[...]; omegaconf takes `... | None` just as well.
# ruff: noqa: UP045

if TYPE_CHECKING:
    from alignkit.core.records import QAExample
    from alignkit.evaluation.agreement import HumanLabel
    from alignkit.evaluation.answering import Answers, Setup
    from alignkit.evaluation.answers import Answer
    from alignkit.evaluation.contexts import Question
    from alignkit.evaluation.predictions import ModelAnswer, Prediction
    from alignkit.evaluation.systems import System


LOG = logging.getLogger("alignkit")


@dataclass
class EvaluateConfig(StageConfig):
    """Configuration of `evaluate`."""

    inputs: ClassVar[tuple[str, ...]] = (
        "data.path",
        "models",
        "passages.documents",
        "index",
        "measuring.embedding",
        "measuring.reward",
        "human_labels",
        "model.path",
    )
    incidental: ClassVar[tuple[str, ...]] = (
        *StageConfig.incidental,
        "servers.concurrency",
        "servers.timeout_seconds",
        "servers.allow_http",
    )

    data: RowsConfig = field(default_factory=RowsConfig)
    models: dict[str, Optional[str]] = field(default_factory=dict)
    """Name -> system, in the order of training: an adapter or model folder, a GGUF file, a server's address with its
    model behind a `#`, a file of answers; "" is the base without an adapter; null leaves a system out."""
    comparisons: list[str] = field(default_factory=list)
    """"new>old": names of two systems; none given: each system with the one before it."""
    contexts: ContextKind = ContextKind.clean
    """What is read: the row's statement (clean), that among distractors (noisy), passages that are found for the
    question (retrieved), or passages that the model asks for itself (multihop)."""
    passages: PassagesConfig = field(default_factory=PassagesConfig)
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)
    """How passages are searched; with passages.indexed=true where they are, too."""
    servers: ServersConfig = field(default_factory=ServersConfig)
    allow_training_questions: bool = False
    """Go on although a model was trained on some of the held-out questions."""
    judge: bool = True
    """Have the teacher grade the answers."""
    metrics: list[str] = field(default_factory=lambda: list(DEFAULT))
    """Scores of an answer: docs/evaluation_metrics.md lists them. Exact match, word F1, verdicts and words are always
    taken."""
    measuring: MeasuringConfig = field(default_factory=MeasuringConfig)
    export: list[str] = field(default_factory=list)
    """Other harnesses to write the questions for: lm_eval, promptfoo."""
    pairwise: bool = False
    """Ask the teacher, too, which of the two answers of each comparison is better, in both orders."""
    human_labels: Optional[str] = None
    """A file with people's grades or preferences of the same answers: how far the judge agrees with them."""
    cluster_by: str = "document"
    """Field of the rows that correlated questions share; a row without a document has its statement for one."""
    model: ModelConfig = field(default_factory=ModelConfig)
    sampling: SamplingConfig = field(
        default_factory=lambda: SamplingConfig(n=1, temperature=[0.0, 0.0], top_p=[1.0, 1.0])
    )
    teacher: TeacherConfig = field(default_factory=TeacherConfig)

    @property
    def index(self) -> str:
        """The folder of the index that is searched, where there is one already."""
        local = self.passages.indexed and self.retrieval.engine is SearchEngine.embedded
        return str(self.retrieval.path) if local else NONE


def run(config: EvaluateConfig) -> Artifact:
    """Let every system answer every held-out question, grade the answers, and estimate scores and differences."""
    from alignkit.evaluation.agreement import read_labels
    from alignkit.evaluation.answering import answer_with_systems, grade, store_of
    from alignkit.evaluation.comparison import document_of
    from alignkit.evaluation.harnesses import check_harnesses, export_questions
    from alignkit.evaluation.metrics.catalogue import check_metrics
    from alignkit.evaluation.metrics.measure import score_rows
    from alignkit.evaluation.predictions import compare, scores_to_compare, summarise
    from alignkit.evaluation.systems import check_servers_reachable, identify

    check_metrics(config.metrics, config.measuring)
    check_harnesses(config.export)
    systems = identify({name: source for name, source in config.models.items() if source is not None})
    comparisons = read_comparisons("models", [system.name for system in systems], config.comparisons)
    check_config(config, systems)
    if config.pairwise and not comparisons:
        raise UserError("pairwise=true: there is nothing to compare with one system; name another in models")
    labels = read_labels(config.human_labels, [system.name for system in systems]) if config.human_labels else {}
    with Artifact.open("evaluate", config) as artifact:
        if artifact.up_to_date:
            return artifact
        check_servers_reachable(systems, config.servers, {each.name: store_of(each, artifact) for each in systems})
        examples = read_held_out(config, artifact)
        documents = {example.id: document_of(example, config.cluster_by) for example in examples}
        check_leakage(examples, systems, config, artifact)
        questions, setup = pose_questions(config, examples, systems, artifact)
        with closing(setup.retriever) if setup.retriever else nullcontext():
            answers = answer_with_systems(questions, systems, setup, artifact)
        examples = [question.example for question in questions]
        grades = grade(examples, answers, config.teacher, artifact) if config.judge else {}
        rows = [predict(example, answers, grades, documents[example.id]) for example in examples]
        policies = {each.name: partial(open_policy, each, config.model) for each in systems if each.kind.runs_here}
        score_rows(rows, config.metrics, config.measuring, config.model, policies, artifact)
        if config.judge or config.pairwise:
            rows = ask_judge(rows, comparisons, systems, labels, config, artifact)
        artifact.write_rows("predictions.jsonl", rows)
        artifact.metrics["systems"] = {system.name: system.kind.name for system in systems}
        artifact.metrics["models"] = {name: summarise(rows, name, config.seed) for name in answers}
        scores = scores_to_compare(config.metrics)
        artifact.metrics["comparisons"] = [compare(rows, new, old, config.seed, scores) for new, old in comparisons]
        log_comparisons(artifact.metrics["comparisons"])
        artifact.metrics |= describe_reading(config, questions, answers, rows, systems)
        export_questions(examples, config.export, config.sampling.max_new_tokens, artifact)
        if config.judge:
            share = sum(grade is not None for grade in grades.values()) / len(grades)
            artifact.check("answers graded", share >= 0.95, f"{share:.1%} of {len(grades)} different answers")
        artifact.summary = headline(artifact.metrics["models"])
    return artifact


def check_config(config: EvaluateConfig, systems: Sequence[System]) -> None:
    """Raise `UserError` for settings that make no sense together, before anything is read."""
    from alignkit.evaluation.systems import check_servers
    from alignkit.generation.base import check_sampling

    if config.sampling.n != 1:
        raise UserError(f"sampling.n={config.sampling.n}: evaluate takes one answer from each model; set sampling.n=1")
    check_sampling(config.sampling)
    for name in ("documents", "indexed"):
        if config.contexts is ContextKind.clean and getattr(config.passages, name) not in (NONE, False):
            raise UserError(f"passages.{name}: not read with contexts=clean; choose noisy, retrieved or multihop")
    if config.contexts is ContextKind.noisy and config.passages.indexed:
        raise UserError("passages.indexed=true: distractors are drawn from passages.documents, or the statements")
    if config.index != NONE and not Path(config.index).is_dir():
        raise UserError(f"retrieval.path={config.index}: no index there; make one with: alignkit index run=...")
    if config.human_labels and not (config.judge or config.pairwise):
        raise UserError("human_labels: people are compared with the judge; set judge=true or pairwise=true")
    config.passages.check()
    check_servers(systems, config.servers)


def read_held_out(config: EvaluateConfig, artifact: Artifact) -> list[QAExample]:
    """The questions that have a reference answer; others are dropped."""
    from alignkit.data.sources import read_questions

    examples, unusable = read_questions(config.data)
    artifact.drop_all(unusable)
    for example in examples:
        if not example.output.strip():
            artifact.drop(example, "no reference answer")
    answered = [example for example in examples if example.output.strip()]
    if not answered:
        raise UserError(
            f"data.path={config.data.path}: no row has an output, so there is nothing to compare answers with"
        )
    return answered


def check_leakage(
    examples: Sequence[QAExample], systems: Sequence[System], config: EvaluateConfig, artifact: Artifact
) -> None:
    """Stop when a held-out question is among those that a model was trained on."""
    from alignkit.evaluation.leakage import find_leakage
    from alignkit.evaluation.systems import SystemKind, adapter_behind

    adapters = {system.name: adapter_behind(system) for system in systems if system.kind is not SystemKind.base}
    leakage = find_leakage(examples, [adapter for adapter in adapters.values() if adapter is not None])
    leakage.unknown |= {f"models.{name}" for name, adapter in adapters.items() if adapter is None}
    detail = f"{len(leakage.rows)} of {len(examples)} held-out questions in {len(leakage.files)} training files"
    if leakage.rows:
        detail += f" (first: {min(leakage.rows)}); allow_training_questions=true goes on regardless"
    if leakage.unknown:
        detail += f"; training data unknown: {', '.join(sorted(leakage.unknown))}"
    artifact.metrics["leaked_rows"] = len(leakage.rows)
    artifact.check("held-out questions unseen", not leakage.rows or config.allow_training_questions, detail)


def pose_questions(
    config: EvaluateConfig, examples: Sequence[QAExample], systems: Sequence[System], artifact: Artifact
) -> tuple[list[Question], Setup]:
    """What every system is asked, and with what; prompts that the base cannot take are dropped, for all of them."""
    from alignkit.core.journal import Journal
    from alignkit.evaluation.answering import Setup, drop_unfit
    from alignkit.evaluation.contexts import Library, pose

    library = Library(config.passages, config.retrieval, artifact.work_folder / "index")
    with Journal(artifact.work_folder / "contexts.jsonl", artifact.fingerprint) as journal:
        questions, retriever, description = pose(config.contexts, library, examples, config.seed, journal)
    k = config.passages.found_at_once(config.contexts)
    setup = Setup(config.model, config.sampling, config.servers, config.seed, retriever, k, config.passages.hops)
    questions = drop_unfit(questions, systems, setup, artifact)
    artifact.metrics["contexts"] = description
    return questions, setup


def predict(
    example: QAExample, answers: Answers, grades: Mapping[tuple[str, str], float | None], document: str | None
) -> Prediction:
    """All systems' answers to one question, scored."""
    from alignkit.evaluation.predictions import Prediction

    extra = example.model_extra or {}
    return Prediction(
        id=example.id,
        parents=example.parents,
        instruction=example.instruction,
        input=example.input,
        reference=example.output,
        document=document,
        source=example.source or None,
        kind=example.kind,
        form=extra.get("form"),
        level=extra.get("level"),
        held_out_name=extra.get("held_out_name"),
        unanswerable=extra.get("unanswerable"),
        keywords=extra.get("keywords") or [],
        answers={
            name: score(by_row[example.id], example, grades) for name, by_row in answers.items() if example.id in by_row
        },
    )


def score(answer: Answer, example: QAExample, grades: Mapping[tuple[str, str], float | None]) -> ModelAnswer:
    """One system's answer to one question, scored, with what it read and searched for."""
    from alignkit.evaluation.predictions import score_answer

    grade = grades.get((example.id, answer.text))
    scored = score_answer(answer.text, example.output, finished=answer.finished, judge=grade)
    return scored.model_copy(
        update={
            "scores": scored.scores | answer.scores,
            "contexts": answer.contexts,
            "queries": answer.queries,
        }
    )


def describe_reading(
    config: EvaluateConfig,
    questions: Sequence[Question],
    answers: Answers,
    rows: Sequence[Prediction],
    systems: Sequence[System],
) -> dict[str, Any]:
    """How those systems that were asked here searched, or how well they found the statement among other passages."""
    from alignkit.evaluation.contexts import exact_match_by_place
    from alignkit.evaluation.multihop import describe_searches
    from alignkit.evaluation.systems import SystemKind

    asked = [system.name for system in systems if system.kind is not SystemKind.answers]
    if config.contexts is ContextKind.clean:
        return {}
    if config.contexts is ContextKind.multihop:
        return {"searches": {name: describe_searches(answers[name].values()) for name in asked}}
    return {"exact_match_by_place": {name: exact_match_by_place(questions, rows, name) for name in asked}}


def open_policy(system: System, model: ModelConfig) -> tuple[Any, Any]:
    """The model and the tokenizer of a system on this machine."""
    from alignkit.evaluation.systems import open_here

    generator = open_here(system, model)
    return generator.model, generator.tokenizer


def ask_judge(
    rows: list[Prediction],
    comparisons: Sequence[tuple[str, str]],
    systems: Sequence[System],
    labels: Mapping[str, HumanLabel],
    config: EvaluateConfig,
    artifact: Artifact,
) -> list[Prediction]:
    """The rows with the judge's preferences, where they are wanted; and whether the judge can be relied on."""
    from alignkit.evaluation.agreement import agreement
    from alignkit.evaluation.preferences import add_preferences, warn_of_self_preference
    from alignkit.evaluation.systems import adapter_behind

    adapters = {system.name: str(adapter) for system in systems if (adapter := adapter_behind(system))}
    warn_of_self_preference(config.teacher, adapters, config.data.path, artifact)
    if config.pairwise:
        rows = add_preferences(rows, comparisons, config.teacher, artifact)
    if labels:
        artifact.metrics["human_agreement"] = agreement(rows, labels, config.seed)
    return rows


def log_comparisons(comparisons: Sequence[Mapping[str, Any]]) -> None:
    """Say what each comparison shows, and what so few questions cannot show."""
    for comparison in comparisons:
        for line in comparison["in_words"]:
            LOG.info("%s", line)
        for line in comparison["warnings"]:
            LOG.warning("%s", line)


def headline(models: Mapping[str, dict[str, Any]]) -> str:
    """Exact match of every model, in a few words; where they answered different numbers of questions, on how many."""
    scores = {name: each["exact_match"] for name, each in models.items()}
    uneven = len({each["n"] for each in scores.values()}) > 1
    said = {name: f" (n {each['n']})" if uneven else "" for name, each in scores.items()}
    return "exact match " + ", ".join(f"{name} {each['mean']:.3f}{said[name]}" for name, each in scores.items())


if __name__ == "__main__":
    from alignkit.core.app import stage_main

    stage_main("evaluate")
