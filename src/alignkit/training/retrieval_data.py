"""Rows of queries with passages on their way into batches: what can be learned from, what is drawn, which go together.

Nothing here needs torch but the order of the steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random

import torch

from alignkit.core.errors import UserError
from alignkit.core.records import Dropped, RetrievalExample
from alignkit.core.retriever_config import Distill, Negatives, Positives, TaskConfig
from alignkit.training.batches import LengthGroupedSampler

NO_POSITIVE = "no positive"
NO_NEGATIVE = "no negative"
NO_TEACHER = "no teacher scores"
TOO_CLOSE = "teacher scores too close"
TOO_LOW = "teacher scores too low"
TOO_MANY = "more rows than max_rows"


@dataclass(frozen=True)
class Drawn:
    """A row as it is read once: its positive, then its negatives, with their teacher scores where there are any."""

    task: str
    query: str
    passages: tuple[str, ...]
    teacher: tuple[float, ...] | None
    positives: tuple[str, ...]
    """All passages that are no negatives of this query, wherever they stand."""


def without_false_negatives(example: RetrievalExample) -> tuple[RetrievalExample, list[str]]:
    """The row without those negatives that are also positives, spaces and case aside; and these passages."""
    positives = {_folded(text) for text in example.pos}
    removed = [place for place, text in enumerate(example.neg) if _folded(text) in positives]
    if not removed:
        return example, []
    kept = [place for place in range(len(example.neg)) if place not in set(removed)]
    changes: dict[str, object] = {"neg": [example.neg[place] for place in kept]}
    if example.neg_index:
        changes["neg_index"] = [example.neg_index[place] for place in kept]
    if example.teacher_scores is not None:
        of_negatives = example.teacher_scores[len(example.pos) :]
        changes["teacher_scores"] = example.teacher_scores[: len(example.pos)] + [of_negatives[each] for each in kept]
    return example.model_copy(update=changes), [example.neg[place] for place in removed]


def usable(
    examples: Sequence[RetrievalExample], tasks: Mapping[str, TaskConfig], negatives: int, seed: int
) -> tuple[list[RetrievalExample], list[Dropped]]:
    """The rows that their tasks can learn from, and the others with the reason; `tasks` has the task of every row.

    Raises `UserError` when nothing is left of a task.
    """
    kept: list[RetrievalExample] = []
    dropped: list[Dropped] = []
    for name, task in tasks.items():
        own = [example for example in examples if example.task == name]
        found = []
        for example in own:
            if reason := _reason(example, task, negatives):
                dropped.append(Dropped(reason=reason, row=example.model_dump(mode="json", exclude_none=True)))
            else:
                found.append(example)
        if not found:
            raise UserError(f"task '{name}': none of its {len(own)} rows can be used. {_advice(dropped[-len(own) :])}")
        if task.max_rows is not None and len(found) > task.max_rows:
            chosen = set(Random(f"{seed} {name}").sample(range(len(found)), task.max_rows))
            for place, example in enumerate(found):
                if place not in chosen:
                    dropped.append(Dropped(reason=TOO_MANY, row={"id": example.id, "task": name}))
            found = [example for place, example in enumerate(found) if place in chosen]
        kept += found
    return kept, dropped


def _reason(example: RetrievalExample, task: TaskConfig, negatives: int) -> str:
    """Why a row cannot be used; empty when it can."""
    scores = example.teacher_scores
    if scores is None and task.needs_teacher:
        return NO_TEACHER
    if not example.pos and (task.positives is not Positives.teacher or not example.neg):
        return NO_POSITIVE
    own = len(example.neg) if example.pos and task.positives is not Positives.teacher else _others(example)
    if negatives and not own:
        return NO_NEGATIVE
    if scores is not None and max(scores) - min(scores) < task.min_teacher_margin:
        return TOO_CLOSE
    if scores is not None and task.min_teacher_score is not None and max(scores) < task.min_teacher_score:
        return TOO_LOW
    return ""


def _others(example: RetrievalExample) -> int:
    """Negatives that are left when the teacher chooses the positive."""
    assert example.teacher_scores is not None
    return len(example.neg) - (_best(example.teacher_scores) >= len(example.pos))


def _advice(dropped: Sequence[Dropped]) -> str:
    advice = {
        NO_POSITIVE: "rows without pos need positives=teacher, and teacher scores",
        NO_NEGATIVE: "mine negatives, or set negatives=0 to have only the other rows' passages against a query",
        NO_TEACHER: "score their passages with a language model first, or choose an objective without teacher",
        TOO_CLOSE: "lower min_teacher_margin",
        TOO_LOW: "lower min_teacher_score",
    }
    reasons = sorted({each.reason for each in dropped})
    return "; ".join(f"{reason}: {advice[reason]}" for reason in reasons)


def draw(example: RetrievalExample, task: TaskConfig, negatives: int, random: Random) -> Drawn:
    """Choose the row's positive and so many negatives, as its task says.

    Where a row has fewer negatives than wanted, they are repeated from the first on. For distillation by rank the
    negatives stand by falling teacher score.
    """
    texts, scores, count = [*example.pos, *example.neg], example.teacher_scores, len(example.pos)
    if task.positives is Positives.first:
        positive = 0
    elif task.positives is Positives.random:
        positive = random.randrange(count)
    else:
        assert scores is not None
        positive = _best(scores if task.positives is Positives.teacher else scores[:count])
    others = [place for place in range(count, len(texts)) if place != positive]
    if task.negatives is Negatives.random:
        others = random.sample(others, min(negatives, len(others)))
    elif task.negatives is not Negatives.first:
        assert scores is not None
        highest = task.negatives is Negatives.teacher_highest
        others = sorted(others, key=lambda place: scores[place], reverse=highest)
    others = (others * math.ceil(negatives / max(1, len(others))))[:negatives]
    if task.distill_weight and task.distill is Distill.stable:
        assert scores is not None
        others = sorted(others, key=lambda place: scores[place], reverse=True)
    chosen = [positive, *others]
    return Drawn(
        example.task,
        task.query_instruction + example.query,
        tuple(task.passage_instruction + texts[place] for place in chosen),
        None if scores is None else tuple(scores[place] for place in chosen),
        tuple(task.passage_instruction + text for text in {*example.pos, texts[positive]}),
    )


def _best(scores: Sequence[float]) -> int:
    return max(range(len(scores)), key=lambda place: scores[place])


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


class TaskSampler(LengthGroupedSampler):
    """Row numbers in an order in which every optimizer step is of one task: passages of another are no hard negatives.

    With `temperature` 1 an epoch reads each row once, in steps of about equal size; `processes` is what the size of a
    step is a multiple of, and fewer than so many rows of a task, others in each epoch, wait for the next. With another
    temperature T an epoch has as many steps, and a task the share n^(1/T) / sum n^(1/T) of them, n being its rows: a
    large T evens the tasks out, and reads the rows of small ones more than once. The order depends on seed and epoch
    alone.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        lengths: Sequence[int],
        rows_per_step: int,
        seed: int,
        *,
        temperature: float = 1.0,
        processes: int = 1,
    ) -> None:
        super().__init__(lengths, rows_per_step, seed)
        self.rows = {name: [row for row, each in enumerate(tasks) if each == name] for name in dict.fromkeys(tasks)}
        self.temperature = temperature
        self.processes = processes
        if short := [name for name, rows in self.rows.items() if len(rows) < processes]:
            raise UserError(f"task '{short[0]}' has fewer rows than the {processes} processes that share a step")

    def __len__(self) -> int:
        return sum(self.sizes())

    def sizes(self) -> list[int]:
        """Rows of each step of an epoch."""
        return [size for sizes in self._sizes_by_task.values() for size in sizes]

    def steps(self) -> Iterator[list[int]]:
        """The rows of one optimizer step after the other."""
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.epoch)
        steps: list[list[int]] = []
        for name, sizes in self._sizes_by_task.items():
            waiting: list[int] = []
            for size in sizes:
                if len(waiting) < size:
                    waiting = self._shuffled(name, generator)  # and not the rest: no step may have a row twice
                steps.append(waiting[:size])
                waiting = waiting[size:]
        for index in torch.randperm(len(steps), generator=generator).tolist():
            yield steps[index]

    @cached_property
    def _sizes_by_task(self) -> dict[str, list[int]]:
        even = {name: self._even_steps(len(rows)) for name, rows in self.rows.items()}
        if self.temperature == 1:
            return even
        shares = {name: len(rows) ** (1 / self.temperature) for name, rows in self.rows.items()}
        total = sum(len(sizes) for sizes in even.values())
        counts = {name: max(1, round(total * share / sum(shares.values()))) for name, share in shares.items()}
        return {name: [max(even[name])] * count for name, count in counts.items()}

    def _even_steps(self, rows: int) -> list[int]:
        """Sizes of as few steps as these rows fit into, multiples of the number of processes, as equal as can be."""
        units = rows // self.processes
        count = math.ceil(units * self.processes / self.rows_per_step)
        return [(units // count + (place < units % count)) * self.processes for place in range(count)]

    def _shuffled(self, name: str, generator: torch.Generator) -> list[int]:
        rows = self.rows[name]
        return [rows[place] for place in torch.randperm(len(rows), generator=generator).tolist()]
