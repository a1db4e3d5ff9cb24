"""Completions of earlier rounds as further candidates, so that the best answer is the best over all rounds."""

from __future__ import annotations

from collections.abc import Sequence

from alignkit.core.config import RowsConfig
from alignkit.core.errors import UserError
from alignkit.core.records import Completion, CompletionSet, Dropped, Message


def join_earlier(rows: Sequence[CompletionSet], files: Sequence[str]) -> tuple[list[CompletionSet], list[Dropped]]:
    """The rows with what was answered to the same prompts in `files` (each round's scored.jsonl), and what is dropped.

    As Llama 2 does from its second round on (Touvron et al., 2023, arXiv 2307.09288, section 3.2.3): prompts of earlier
    rounds that are not among the rows come after them. Only finished answers are taken, each text once, and without
    their scores: those of another reward model cannot be compared. Where rows share a prompt the first of them takes
    the answers. Raises `UserError` for a file without a usable row.
    """
    from alignkit.data.sources import read_completions

    joined = list(rows)
    places = {_key(row.prompt): place for place, row in reversed(list(enumerate(rows)))}
    ids = {row.id for row in rows}
    dropped: list[Dropped] = []
    for path in files:
        try:
            found, unusable = read_completions(RowsConfig(path=path))
        except UserError as error:
            raise UserError(f"keep: {error}") from error
        dropped += unusable
        for row in found:
            key = _key(row.prompt)
            if key not in places and row.id in ids:
                reason = "keep: another question has this id"
                dropped.append(Dropped(reason=reason, row=row.model_dump(exclude_none=True), detail=path))
                continue
            if key not in places:
                places[key] = len(joined)
                joined.append(row.model_copy(update={"completions": []}))
                ids.add(row.id)
            current = joined[places[key]]
            together = _with(current.completions, row.completions)
            joined[places[key]] = current.model_copy(update={"completions": together})
    return [row for row in joined if row.completions], dropped


def _with(completions: Sequence[Completion], earlier: Sequence[Completion]) -> list[Completion]:
    """The completions, and those earlier ones that are finished and say something else."""
    texts = {each.text for each in completions if each.finished}
    together = list(completions)
    for each in earlier:
        if each.finished and each.text not in texts:
            texts.add(each.text)
            together.append(each.model_copy(update={"score": None}))
    return together


def _key(prompt: Sequence[Message]) -> tuple[str, ...]:
    return tuple(message.model_dump_json() for message in prompt)
