"""What a reward model learns from: prompts with several answers, and which of them are better than which."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from alignkit.core.errors import UserError
from alignkit.core.records import CompletionSet, Dropped, Message, PreferencePair

GRADED = "graded"
"""The source of grades whose file was not given a name."""

UNGRADED = "no graded completion"
ONE_COMPLETION = "one graded completion, and none to compare it with"
SAME_TEXT = "all graded completions are the same text"
EQUAL_GRADES = "all completions have the same grade"
TOO_CLOSE = "no two completions differ by min_margin"
"""Reasons for which a prompt teaches nothing."""


@dataclass(frozen=True)
class Comparison:
    """One answer of a group is better than another: their places, and the margin in the grader's units if known."""

    better: int
    worse: int
    margin: float | None = None


@dataclass(frozen=True)
class AnswerGroup:
    """A prompt, its distinct answers, their grades where known, and the comparisons to learn."""

    id: str
    source: str
    prompt: tuple[Message, ...]
    answers: tuple[str, ...]
    grades: tuple[float | None, ...]
    comparisons: tuple[Comparison, ...]
    judge: str = ""
    """Who gave the grades: those of one judge are on one scale."""

    @property
    def prompt_key(self) -> str:
        """Equal for equal prompts."""
        return json.dumps([message.model_dump() for message in self.prompt], ensure_ascii=False)


@dataclass
class LeftOut:
    """What of the graded rows is not learnt from, beside the rows that are dropped whole."""

    unfinished: int = 0
    """Completions whose end was never written."""
    ungraded: int = 0
    """Finished completions without a grade."""
    comparisons: int = 0
    """Comparisons beyond `pairs_per_prompt`."""

    def describe(self) -> dict[str, Any]:
        """As metrics."""
        completions = {"unfinished": self.unfinished, "ungraded": self.ungraded}
        return {"completions_left_out": completions, "comparisons_left_out": self.comparisons}


def compare(grades: Sequence[float | None], min_margin: float) -> list[Comparison]:
    """Every two answers whose grades differ by at least `min_margin` (and differ at all), the better one first.

    Ungraded answers are in no comparison.
    """
    known = [(place, grade) for place, grade in enumerate(grades) if grade is not None]
    return [
        Comparison(better, worse, high - low)
        for better, high in known
        for worse, low in known
        if high > low and high - low >= min_margin
    ]


def groups_of(
    name: str,
    graded: Iterable[CompletionSet],
    pairs: Iterable[PreferencePair],
    *,
    min_margin: float,
    pairs_per_prompt: int,
    seed: int,
    left_out: LeftOut,
    pointwise: bool = False,
) -> tuple[list[AnswerGroup], list[Dropped]]:
    """The groups of a file with grades or with pairs, and the rows without any; see the two functions below.

    `name` is that of the source; without one, grades are "graded" and pairs have the source that each names.
    """
    compared, without_pair = groups_from_grades(
        graded,
        min_margin=min_margin,
        pairs_per_prompt=pairs_per_prompt,
        seed=seed,
        left_out=left_out,
        judge=name or GRADED,
        pointwise=pointwise,
    )
    preferred, malformed = groups_from_preferences(pairs, name)
    return compared + preferred, without_pair + malformed


def groups_from_grades(
    rows: Iterable[CompletionSet],
    *,
    min_margin: float,
    pairs_per_prompt: int,
    seed: int,
    left_out: LeftOut,
    judge: str = GRADED,
    pointwise: bool = False,
) -> tuple[list[AnswerGroup], list[Dropped]]:
    """One group a prompt whose completions were graded.

    `judge` names who graded, and with it the source. Equal texts count once, with the mean of their grades. Of more
    than `pairs_per_prompt` comparisons as many are drawn at random (the largest margins alone would be the easy ones).
    Unfinished completions are left out: their end was never written, so it cannot be judged. A row that yields no
    comparison is dropped, unless grades are learned `pointwise` and it has one. What is left out is added to
    `left_out`, over all rows, also those that are dropped.
    """
    groups, dropped = [], []
    for row in rows:
        by_text: dict[str, list[float]] = defaultdict(list)
        for completion in row.completions:
            if not completion.finished:
                left_out.unfinished += 1
            elif completion.score is None:
                left_out.ungraded += 1
            else:
                by_text[completion.text].append(completion.score)
        grades = [sum(scores) / len(scores) for scores in by_text.values()]
        comparisons = compare(grades, min_margin)
        if not comparisons and not (pointwise and grades):
            reason = _why_no_comparison(grades, sum(map(len, by_text.values())))
            dropped.append(Dropped(reason=reason, row=row.model_dump(mode="json", exclude_none=True)))
            continue
        if len(comparisons) > pairs_per_prompt:
            left_out.comparisons += len(comparisons) - pairs_per_prompt
            comparisons = Random(f"{seed}/{row.id}").sample(comparisons, pairs_per_prompt)
        kind = (row.model_extra or {}).get("kind")
        groups.append(
            AnswerGroup(
                id=row.id,
                source=judge if kind is None else f"{judge} {kind}",
                prompt=tuple(row.prompt),
                answers=tuple(by_text),
                grades=tuple(grades),
                comparisons=tuple(comparisons),
                judge=judge,
            )
        )
    return groups, dropped


def _why_no_comparison(grades: Sequence[float], completions: int) -> str:
    """Of so many completions, whose distinct texts have these grades."""
    if len(grades) < 2:
        return SAME_TEXT if completions > 1 else ONE_COMPLETION if grades else UNGRADED
    return EQUAL_GRADES if len(set(grades)) == 1 else TOO_CLOSE


def groups_from_preferences(
    pairs: Iterable[PreferencePair], source: str = ""
) -> tuple[list[AnswerGroup], list[Dropped]]:
    """One group a pair: the chosen answer is better than the rejected one. An answer must be one assistant's turn.

    `source` names them all; without it each has the source that its row names.
    """
    groups, dropped = [], []
    for pair in pairs:
        answers = [*pair.chosen, *pair.rejected]
        if len(answers) != 2 or any(answer.role != "assistant" or answer.tool_calls for answer in answers):
            row = pair.model_dump(mode="json", exclude_none=True)
            dropped.append(Dropped(reason="an answer is not one assistant's turn", row=row))
            continue
        groups.append(
            AnswerGroup(
                id=pair.id,
                source=source or pair.source or "preferences",
                prompt=tuple(pair.prompt),
                answers=tuple(answer.content for answer in answers),
                grades=(None, None),
                comparisons=(Comparison(0, 1, pair.margin),),
            )
        )
    return groups, dropped


def split_by_prompt(
    groups: Sequence[AnswerGroup], held_out_share: float, seed: int
) -> tuple[list[AnswerGroup], list[AnswerGroup]]:
    """Training and held-out groups; all groups of one prompt fall on the same side.

    Of each source's distinct prompts the share `held_out_share` (rounded) is held out, drawn by `seed`.
    """
    prompts: dict[str, dict[str, None]] = defaultdict(dict)
    seen: set[str] = set()
    for group in groups:
        if group.prompt_key not in seen:
            seen.add(group.prompt_key)
            prompts[group.source][group.prompt_key] = None
    held_out: set[str] = set()
    for source, keys in prompts.items():
        held_out |= set(Random(f"{seed}/{source}").sample(list(keys), round(held_out_share * len(keys))))
    return (
        [group for group in groups if group.prompt_key not in held_out],
        [group for group in groups if group.prompt_key in held_out],
    )


def source_weights(groups: Iterable[AnswerGroup], weights: Mapping[str, float]) -> dict[str, float]:
    """The weight of every source, by its own name or else by the first part of it, which a space or slash ends.

    So `graded` covers "graded judgmental", and `rewardbench` covers "rewardbench/chat"; a source without a weight has
    1. Raises `UserError` for a name that no source has, and for a weight that is not above 0.
    """
    sources = dict.fromkeys(group.source for group in groups)
    names = {*sources, *map(_family, sources)}
    for name, weight in weights.items():
        if name not in names:
            raise UserError(f"weights.{name}: no source of that name; there are {', '.join(sorted(names))}")
        if not 0 < weight < math.inf:
            raise UserError(f"weights.{name}={weight}: must be above 0; to leave a source out, do not give its file")
    return {source: weights.get(source, weights.get(_family(source), 1.0)) for source in sources}


def _family(source: str) -> str:
    return re.split("[ /]", source, maxsplit=1)[0]


def bootstrap_weights(prompt_key: str, heads: int, seed: int) -> tuple[float, ...]:
    """How much a prompt counts for each head of an ensemble: drawn from the exponential distribution with mean 1.

    This is the Bayesian bootstrap (Rubin, 1981): each head learns from a resample of the prompts that is smooth, where
    the classical bootstrap would leave a third of them out. What heads that have seen different evidence disagree on is
    not settled by it. A single head counts every prompt once.
    """
    draw = Random(f"{seed}/{prompt_key}")
    return (1.0,) if heads == 1 else tuple(draw.expovariate(1.0) for _ in range(heads))
