"""evaluate: score models on held-out questions, each score with its 95 % interval, and compare them pairwise.

Each model is the same base with one adapter, or the base alone; all answer the same questions, greedily. Scores are
exact match, word F1, the accuracy of yes/no verdicts (balanced: the mean over true yes and true no), the answer's
length, and the teacher's grade from 0 to 10. Rows with the fields `form`, `level` or `held_out_name` are also counted
by these. Differences are paired: the same questions, before and after; intervals and p-values go by document, since
questions about one are correlated, and it is said how small a difference so many questions can show. A held-out
question that a model was trained on stops it.

Reads:   data.path                 held-out question-answer rows
         models                    adapters by name, in the order of training; "" is the base
Writes:  predictions.jsonl         for each question what every model answered, and the scores
         preferences.jsonl         with pairwise=true: what the teacher said of each pair of answers, in both orders
         manifest.json             metrics.models: scores by model; metrics.comparisons: differences

Overrides people use:
  'models={sft: runs/mine/sft/adapter}'   adapters to examine, after the base (models.base=null: without the base)
  'comparisons=["dpo>sft"]'          which pairs to compare, "new>old" (default: each model with the one before)
  judge=false                        without the teacher's grades
  pairwise=true                      ask the teacher which of two answers is better, too, in both orders
  human_labels=labels.jsonl          how far the teacher agrees with people's grades or preferences
  cluster_by=machine                 field that correlated questions share (default: document, or else the statement)
  data.limit=100                     the first 100 questions only
  sampling.max_new_tokens=512        longer answers

Examples:
  python -m alignkit.evaluate run=demo data.path=test.jsonl 'models={sft: runs/demo/sft/adapter}'
  python -m alignkit.evaluate +model=qwen7b data.path=test.jsonl judge=false
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Optional

from alignkit.core.artifact import Artifact
from alignkit.core.config import ModelConfig, RowsConfig, SamplingConfig, StageConfig, TeacherConfig
from alignkit.core.errors import UserError

# All configurations write Optional[...]; omegaconf takes `... | None` just as well.
# ruff: noqa: UP045

if TYPE_CHECKING:
    from alignkit.core.records import QAExample
    from alignkit.evaluation.agreement import HumanLabel
    from alignkit.evaluation.answering import Answers
    from alignkit.evaluation.predictions import Prediction


LOG = logging.getLogger("alignkit")


@dataclass
class EvaluateConfig(StageConfig):
    """Configuration of `evaluate`."""

    inputs: ClassVar[tuple[str, ...]] = ("data.path", "models", "human_labels", "model.path")

    data: RowsConfig = field(default_factory=RowsConfig)
    models: dict[str, Optional[str]] = field(default_factory=dict)
    """Name -> adapter folder, in the order of training; "" is the base without an adapter; null leaves a model out."""
    comparisons: list[str] = field(default_factory=list)
    """"new>old": names of two models; none given: each model with the one before it."""
    allow_training_questions: bool = False
    """Go on although a model was trained on some of the held-out questions."""
    judge: bool = True
    """Have the teacher grade the answers."""
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


def run(config: EvaluateConfig) -> Artifact:
    """Let every model answer every held-out question, grade the answers, and estimate scores and differences."""
    from alignkit.evaluation.agreement import read_labels
    from alignkit.evaluation.answering import answer_with_models, grade
    from alignkit.evaluation.comparison import document_of
    from alignkit.evaluation.predictions import compare, summarise

    if config.human_labels and not (config.judge or config.pairwise):
        raise UserError("human_labels: people are compared with the judge; set judge=true or pairwise=true")
    models = {name: adapter for name, adapter in config.models.items() if adapter is not None}
    comparisons = read_comparisons(models, config.comparisons)
    labels = read_labels(config.human_labels, list(models)) if config.human_labels else []
    with Artifact.open("evaluate", config) as artifact:
        if artifact.up_to_date:
            return artifact
        examples = read_held_out(config, artifact)
        documents = {example.id: document_of(example, config.cluster_by) for example in examples}
        check_leakage(examples, models, config, artifact)
        answers = answer_with_models(examples, models, config.model, config.sampling, config.seed, artifact)
        grades = grade(examples, answers, config.teacher, artifact) if config.judge else {}
        rows = [predict(example, answers, grades, documents[example.id]) for example in examples]
        if config.judge or config.pairwise:
            rows = ask_judge(rows, comparisons, models, labels, config, artifact)
        artifact.write_rows("predictions.jsonl", rows)
        artifact.metrics["models"] = {name: summarise(rows, name, config.seed) for name in models}
        artifact.metrics["comparisons"] = [compare(rows, new, old, config.seed) for new, old in comparisons]
        log_comparisons(artifact.metrics["comparisons"])
        if config.judge:
            share = sum(grade is not None for grade in grades.values()) / len(grades)
            artifact.check("answers graded", share >= 0.95, f"{share:.1%} of {len(grades)} different answers")
        artifact.summary = headline(artifact.metrics["models"])
    return artifact


def read_comparisons(models: Mapping[str, str], comparisons: Sequence[str]) -> list[tuple[str, str]]:
    """(new, old) for each comparison; raises `UserError` for models that cannot be compared."""
    if not models:
        raise UserError("models: name at least one, e.g. 'models={sft: runs/demo/sft/adapter}'")
    for name in models:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise UserError(f"models: {name!r} is no name; use letters, digits, dot, dash and underscore")
    names = list(models)
    if not comparisons:
        return list(zip(names[1:], names[:-1], strict=True))
    pairs = []
    for comparison in comparisons:
        new, arrow, old = (part.strip() for part in comparison.partition(">"))
        unknown = [name for name in (new, old) if name not in models]
        if not arrow or unknown or new == old:
            raise UserError(f"comparisons: {comparison!r} must be 'new>old' with two of the models {', '.join(names)}")
        pairs.append((new, old))
    return pairs


def read_held_out(config: EvaluateConfig, artifact: Artifact) -> list[QAExample]:
    """The questions that have a reference answer and fit the model; others are dropped."""
    from alignkit.data.sources import read_questions
    from alignkit.generation.questions import read_prompts
    from alignkit.models.loading import load_tokenizer

    if config.sampling.n != 1:
        raise UserError(f"sampling.n={config.sampling.n}: evaluate takes one answer from each model; set sampling.n=1")
    prompts, unusable = read_prompts(config.data, load_tokenizer(config.model), config.model, config.sampling)
    for dropped in unusable:
        artifact.drop(dropped.row, dropped.reason, dropped.detail)
    usable = {prompt.id for prompt in prompts}
    examples = [example for example in read_questions(config.data)[0] if example.id in usable]
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
    examples: Sequence[QAExample], models: Mapping[str, str], config: EvaluateConfig, artifact: Artifact
) -> None:
    """Stop when a held-out question is among those that a model was trained on."""
    from alignkit.evaluation.leakage import find_leakage

    leakage = find_leakage(examples, [adapter for adapter in models.values() if adapter])
    detail = f"{len(leakage.rows)} of {len(examples)} held-out questions in {len(leakage.files)} training files"
    if leakage.rows:
        detail += f" (first: {min(leakage.rows)}); allow_training_questions=true goes on regardless"
    if leakage.unknown:
        detail += f"; training data unknown: {', '.join(sorted(leakage.unknown))}"
    artifact.metrics["leaked_rows"] = len(leakage.rows)
    artifact.check("held-out questions unseen", not leakage.rows or config.allow_training_questions, detail)


def predict(
    example: QAExample, answers: Answers, grades: Mapping[tuple[str, str], float | None], document: str | None
) -> Prediction:
    """All models' answers to one question, scored."""
    from alignkit.evaluation.predictions import Prediction, score_answer

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
        answers={
            name: score_answer(
                by_row[example.id].text,
                example.output,
                finished=by_row[example.id].finished,
                judge=grades.get((example.id, by_row[example.id].text)),
            )
            for name, by_row in answers.items()
        },
    )


def ask_judge(
    rows: list[Prediction],
    comparisons: Sequence[tuple[str, str]],
    models: Mapping[str, str],
    labels: Sequence[HumanLabel],
    config: EvaluateConfig,
    artifact: Artifact,
) -> list[Prediction]:
    """The rows with the judge's preferences, where they are wanted; and whether the judge can be relied on."""
    from alignkit.evaluation.agreement import agreement
    from alignkit.evaluation.preferences import add_preferences, warn_of_self_preference

    warn_of_self_preference(config.teacher, models, config.data.path, artifact)
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
    """Exact match of every model, in a few words."""
    return "exact match " + ", ".join(f"{name} {each['exact_match']['mean']:.3f}" for name, each in models.items())


if __name__ == "__main__":
    from alignkit.core.app import stage_main

    stage_main("evaluate")
