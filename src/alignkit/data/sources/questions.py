"""Question and answer rows: our own, Alpaca's, Self-Instruct's seed tasks and predictions, prompts and completions."""

from __future__ import annotations

from pydantic import BaseModel

from alignkit.core.records import Dropped, QAExample
from alignkit.data.sources import conversations
from alignkit.data.sources.raw import RawRow


class _Instance(BaseModel):
    input: str
    output: str


class _SeedTask(BaseModel):
    instruction: str
    instances: list[_Instance]
    is_classification: bool | None = None


class _Prediction(BaseModel):
    instruction: str
    input: str = ""
    response: str


class _PromptAndCompletion(BaseModel):
    prompt: str
    completion: str


def read_question(raw: RawRow) -> QAExample | Dropped:
    """A QA example; an Alpaca row has the same fields, but no id."""
    return _usable(raw, raw.record(QAExample, id=raw.id))


def read_seed_task(raw: RawRow) -> QAExample | Dropped:
    """A Self-Instruct seed task (Wang et al., 2022, arXiv 2212.10560), with its first instance.

    Whether it is judgmental is not known: a classification there may ask for yes or no, or for any other label.
    """
    task = raw.record(_SeedTask)
    if not task.instances:
        return raw.drop("no instance")
    first = task.instances[0]
    example = QAExample(
        id=raw.id,
        instruction=task.instruction,
        input=first.input,
        output=first.output,
        kind="non_judgmental" if task.is_classification is False else None,
        classification=task.is_classification,
        source="self-instruct",
    )
    return _usable(raw, example)


def read_prediction(raw: RawRow) -> QAExample | Dropped:
    """A model's answer as Self-Instruct evaluates it: its `response` is the answer."""
    prediction = raw.record(_Prediction)
    example = QAExample(
        id=raw.id, instruction=prediction.instruction, input=prediction.input, output=prediction.response.strip()
    )
    return _usable(raw, example)


def read_prompt_and_completion(raw: RawRow) -> QAExample | Dropped:
    """A prompt text and its completion, as GPT-3 was fine-tuned on; the end-of-text mark of the completion is no text.

    The prompt is the instruction: which part of it is the question, nothing tells.
    """
    row = raw.record(_PromptAndCompletion)
    output = conversations.without_end_of_text(row.completion).strip()
    return _usable(raw, QAExample(id=raw.id, instruction=row.prompt.strip(), output=output))


def _usable(raw: RawRow, example: QAExample) -> QAExample | Dropped:
    if not example.instruction.strip() and not example.input.strip():
        return raw.drop("empty question")
    return example
