"""The teacher as a scorer: 0 to 10 by a rubric, by one judge or several, each reply alone or against the others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from statistics import fmean

from alignkit.core.records import Message
from alignkit.teacher.client import Answer, Request, Teacher
from alignkit.teacher.recipes.judge import HIGHEST_SCORE, Rubric, compare_request, judge_request, read_rubric

NOTHING_TO_COMPARE = "no other reply to compare with"


@dataclass(frozen=True)
class GivenGrade:
    """One grade from 0 to 10: from which judge (by its place), and why."""

    judge: int
    score: float
    reason: str = ""


@dataclass
class Grades:
    """The grades of one reply, and why others are missing, each as "reason: detail"."""

    given: list[GivenGrade] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def score(self) -> float | None:
        """The mean of the judges' means, so that each judge weighs the same; None without a grade."""
        by_judge: dict[int, list[float]] = defaultdict(list)
        for grade in self.given:
            by_judge[grade.judge].append(grade.score)
        return fmean(fmean(scores) for scores in by_judge.values()) if by_judge else None

    @property
    def spread(self) -> float | None:
        """The highest grade minus the lowest; None with fewer than two."""
        scores = [grade.score for grade in self.given]
        return max(scores) - min(scores) if len(scores) > 1 else None


@dataclass(frozen=True)
class PairVerdict:
    """What a judge says of two replies, shown in both orders: which place is better each time, or why that is missing.

    An answer that holds no verdict makes the pair missing; it is neither a tie nor a loss.
    """

    forward: str | None = None
    backward: str | None = None
    missing: str | None = None

    @property
    def share(self) -> float | None:
        """What the first reply has won; None where a verdict is missing."""
        return None if self.forward is None or self.backward is None else share_won(self.forward, self.backward)

    @property
    def consistent(self) -> bool:
        """Whether both orders say the same."""
        return (self.forward, self.backward) in (("first", "second"), ("second", "first"), ("tie", "tie"))

    @property
    def swayed_to(self) -> str | None:
        """The place that won in both orders, whatever stood there; None where none did."""
        return self.forward if self.forward == self.backward != "tie" else None


class JudgeScorer:
    """Scores by asking teachers; equal conversations of one call are asked once.

    `samples` grades are asked of each judge; more than one make sense at a temperature above 0 only. With `pairwise`,
    replies to one prompt are compared with each other, always in both orders; a verdict that changes with the order is
    a tie, and the score is the share of wins, ties counting half, times 10. Of the last call, `grades` has every single
    grade, `reasons` why there is no score, and `compared` and `swayed` count the comparisons and those decided by the
    order. `teacher` is the first judge.
    """

    def __init__(
        self,
        teacher: Teacher,
        *others: Teacher,
        rubric: Rubric | None = None,
        samples: int = 1,
        temperature: float = 0.0,
        pairwise: bool = False,
    ) -> None:
        self.teacher = teacher
        self.judges = (teacher, *others)
        self.rubric = rubric or read_rubric()
        self.samples = samples
        self.temperature = temperature
        self.pairwise = pairwise
        self.grades: list[Grades] = []
        self.reasons: list[str | None] = []
        self.compared = self.swayed = 0

    def score(self, conversations: Sequence[list[Message]]) -> list[float | None]:
        """One score from 0 to 10 a conversation; None, with its reason, where no answer holds a grade."""
        keys = [tuple(message.model_dump_json() for message in conversation) for conversation in conversations]
        unique = dict(zip(keys, conversations, strict=True))
        grades = (self._compare if self.pairwise else self._grade)(list(unique.values()))
        found = dict(zip(unique, grades, strict=True))
        self.grades = [found[key] for key in keys]
        self.reasons = [None if each.given else each.missing[0] for each in self.grades]
        return [each.score for each in self.grades]

    def _grade(self, conversations: Sequence[list[Message]]) -> list[Grades]:
        """Each reply on its own."""
        requests = [
            judge_request(conversation, self.rubric, sample=sample, temperature=self.temperature)
            for conversation in conversations
            for sample in range(self.samples)
        ]
        found = [Grades() for _ in conversations]
        for judge, answers in enumerate(self._ask(requests)):
            for position, answer in enumerate(answers):
                grades = found[position // self.samples]
                if answer.usable:
                    grades.given.append(GivenGrade(judge, answer.value.score, answer.value.reason))
                else:
                    grades.missing.append(f"{answer.reason}: {answer.detail}")
        return found

    def _compare(self, conversations: Sequence[list[Message]]) -> list[Grades]:
        """Each reply against every other to the same prompt; a grade is its share of one round of comparisons."""
        pairs = _pairs(conversations)
        shown = [
            (conversations[one][:-1], conversations[one][-1].content, conversations[other][-1].content)
            for one, other in pairs
        ]
        found = [Grades() for _ in conversations]
        for judge, verdicts in enumerate(self.compare(shown)):
            wins: dict[tuple[int, int], list[float]] = defaultdict(list)  # by sample and reply
            for (one, other), drawn in zip(pairs, verdicts, strict=True):
                for sample, verdict in enumerate(drawn):
                    if verdict.share is None:
                        for reply in (one, other):
                            found[reply].missing.append(str(verdict.missing))
                        continue
                    wins[sample, one].append(verdict.share)
                    wins[sample, other].append(1 - verdict.share)
            for (_, reply), shares in wins.items():
                found[reply].given.append(GivenGrade(judge, HIGHEST_SCORE * fmean(shares)))
        for grades in found:
            if not grades.given and not grades.missing:
                grades.missing.append(f"{NOTHING_TO_COMPARE}: ")
        return found

    def compare(self, pairs: Sequence[tuple[Sequence[Message], str, str]]) -> list[list[list[PairVerdict]]]:
        """What every judge says of pairs (prompt, one reply, another), each shown in both orders.

        By judge, pair and sample. `compared` and `swayed` count the pairs with two verdicts, and those of them in which
        the same place won twice.
        """
        requests = [
            compare_request(prompt, first, second, self.rubric, sample=sample, temperature=self.temperature)
            for prompt, one, other in pairs
            for sample in range(self.samples)
            for first, second in ((one, other), (other, one))
        ]
        found = []
        for answers in self._ask(requests):
            flat = [read_verdicts(*both) for both in zip(answers[::2], answers[1::2], strict=True)]
            found.append([flat[start : start + self.samples] for start in range(0, len(flat), self.samples)])
        verdicts = [each for by_pair in found for drawn in by_pair for each in drawn]
        self.compared = sum(each.share is not None for each in verdicts)
        self.swayed = sum(each.swayed_to is not None for each in verdicts)
        return found

    def _ask(self, requests: Sequence[Request]) -> list[list[Answer]]:
        """Every judge's answers, each judge asked for everything at once."""
        return [judge.ask(requests) if requests else [] for judge in self.judges]


def read_verdicts(forward: Answer, backward: Answer) -> PairVerdict:
    """The verdicts of a judge's answers about a pair in both orders."""
    failed = next((answer for answer in (forward, backward) if not answer.usable), None)
    if failed is not None:
        return PairVerdict(missing=f"{failed.reason}: {failed.detail}")
    return PairVerdict(forward.value.better, backward.value.better)


def share_won(forward: str, backward: str) -> float:
    """What the first of two replies has won when they were shown in this order, and then the other way round.

    1 where both verdicts are for it, 0 where both are against it; everything else is a tie, 0.5.
    """
    if (forward, backward) == ("first", "second"):
        return 1.0
    return 0.0 if (forward, backward) == ("second", "first") else 0.5


def _pairs(conversations: Sequence[list[Message]]) -> list[tuple[int, int]]:
    """Positions of all pairs of conversations that differ in the last turn only."""
    by_prompt: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for position, conversation in enumerate(conversations):
        by_prompt[tuple(message.model_dump_json() for message in conversation[:-1])].append(position)
    return [pair for positions in by_prompt.values() for pair in combinations(positions, 2)]
