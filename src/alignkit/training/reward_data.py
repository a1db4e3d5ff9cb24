"""What a reward model learns from: prompts with several answers, and which of them are better than which."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random
from statistics import mean, pstdev

from alignkit.core.records import CompletionSet, Dropped, Message, PreferencePair


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


def groups_from_grades(
    rows: Iterable[CompletionSet], *, min_margin: float, pairs_per_prompt: int, seed: int
) -> tuple[list[AnswerGroup], list[Dropped], LeftOut]:
    """One group a prompt whose completions were graded.

    Equal texts count once, with the mean of their grades. Of more than `pairs_per_prompt` comparisons as many are drawn
    at random (the largest margins alone would be the easy ones). Unfinished completions are left out: their end was
    never written, so it cannot be judged. A row that yields no comparison is dropped. Completions left out are counted
    over all rows, also those that are dropped.
    """
    groups, dropped, left_out = [], [], LeftOut()
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
        if not comparisons:
            reason = "no graded completion" if not grades else "no two completions differ by min_margin"
            dropped.append(Dropped(reason=reason, row=row.model_dump(mode="json", exclude_none=True)))
            continue
        if len(comparisons) > pairs_per_prompt:
            left_out.comparisons += len(comparisons) - pairs_per_prompt
            comparisons = Random(f"{seed}/{row.id}").sample(comparisons, pairs_per_prompt)
        kind = (row.model_extra or {}).get("kind")
        groups.append(
            AnswerGroup(
                id=row.id,
                source="graded" if kind is None else f"graded {kind}",
                prompt=tuple(row.prompt),
                answers=tuple(by_text),
                grades=tuple(grades),
                comparisons=tuple(comparisons),
            )
        )
    return groups, dropped, left_out


def groups_from_preferences(pairs: Iterable[PreferencePair]) -> tuple[list[AnswerGroup], list[Dropped]]:
    """One group a pair: the chosen answer is better than the rejected one. An answer must be one assistant's turn."""
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
                source=pair.source or "preferences",
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


def grade_statistics(groups: Iterable[AnswerGroup]) -> tuple[float, float]:
    """Mean and standard deviation of all known grades; 0 and 1 where they say nothing."""
    grades = [grade for group in groups for grade in group.grades if grade is not None]
    deviation = pstdev(grades) if grades else 0.0
    return (mean(grades), deviation) if deviation > 0 else (0.0, 1.0)
