"""Questions as prompts to sample for, and what a set of sampled completions is like."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import TYPE_CHECKING, Any

from alignkit.core.config import ModelConfig, RowsConfig, SamplingConfig
from alignkit.core.errors import UserError
from alignkit.core.records import CompletionSet, Dropped, Message, QAExample, Tools

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def read_prompts(
    rows: RowsConfig, tokenizer: PreTrainedTokenizerBase, model: ModelConfig, sampling: SamplingConfig
) -> tuple[list[CompletionSet], list[Dropped]]:
    """A set without completions for each question.

    Dropped are prompts that the chat template or the tokenizer cannot take, and those that would leave a completion
    less than `max_new_tokens` of `model.max_length`. Raises `UserError` when none is left.
    """
    from alignkit.data.sources import read_questions

    questions, dropped = read_questions(rows)
    sets: list[CompletionSet] = []
    for question in questions:
        row = prompt_row(question)
        if problem := unfit(tokenizer, row.prompt, model, sampling):
            reason, detail = problem
            dropped.append(Dropped(reason=reason, row=question.model_dump(exclude_none=True), detail=detail))
            continue
        sets.append(row)
    if not sets:
        reasons = ", ".join(sorted({each.reason for each in dropped}))
        raise UserError(f"{rows.path}: no question can be sampled for ({reasons})")
    return sets, dropped


def unfit(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[Message],
    model: ModelConfig,
    sampling: SamplingConfig,
    tools: Tools | None = None,
) -> tuple[str, str] | None:
    """Why a prompt cannot be answered, in words to count by, and the particulars; None when it can."""
    from alignkit.data.chat import RefusedError, encode_prompt, special_token_in

    try:
        length = len(encode_prompt(tokenizer, prompt, tools))
    except RefusedError as error:
        return str(error), ""
    detail = f"{length} prompt tokens, max_new_tokens {sampling.max_new_tokens}, max_length {model.max_length}"
    if special := special_token_in(tokenizer, prompt, tools):
        return f"the text holds the special token {special}", detail
    if length + sampling.max_new_tokens > model.max_length:
        return "prompt and max_new_tokens exceed max_length", detail
    return None


def prompt_row(question: QAExample) -> CompletionSet:
    """A set without completions for a question, with its id, its kind and, if known, its answer as the reference."""
    from alignkit.data.chat import qa_prompt

    fields = {"id": question.id, "parents": question.parents, "prompt": qa_prompt(question), "completions": []}
    optional = {"reference": question.output or None, "kind": question.kind}
    return CompletionSet.model_validate(fields | {key: value for key, value in optional.items() if value})


def describe_samples(rows: Sequence[CompletionSet]) -> dict[str, Any]:
    """Metrics of sampled completions: how many, how many finished, and how varied they are within a prompt."""
    completions = [completion for row in rows for completion in row.completions]
    return {
        "prompts": len(rows),
        "completions": len(completions),
        "finished_share": mean(float(completion.finished) for completion in completions),
        "distinct_share": mean(len({each.text for each in row.completions}) / len(row.completions) for row in rows),
        "mean_characters": mean(len(completion.text) for completion in completions),
    }
