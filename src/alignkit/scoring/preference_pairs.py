"""What rejection sampling keeps: the best answer to each question, and pairs of a chosen and a rejected one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Optional

from alignkit.core.errors import UserError
from alignkit.core.records import ChatExample, Completion, CompletionSet, Message, PreferencePair
from alignkit.scoring.best_of_n import ranked

# ruff: noqa: UP045

SOURCE = "rejection_sampling"
SAME_TEXT = "no pair: chosen and rejected are the same text"
MARGIN = "no pair: best and worst differ by less than min_margin"
LENGTHS = "no pair: lengths differ by more than max_length_ratio"

Drop = Callable[..., None]
"""Sets a row aside with a reason and its particulars: `Artifact.drop`."""


class Pairing(Enum):
    """What makes an answer chosen or rejected: its score, or which version wrote it."""

    reward = "reward"
    versions = "versions"


@dataclass
class ChoiceConfig:
    """Which answers may be chosen, and which are paired. Every filter is off unless it is set."""

    pairing: Pairing = Pairing.reward
    """By score, best against worst; or the latest version's answer over the previous version's, whatever they score."""
    pairs_per_prompt: int = 1
    """Most pairs of a question: best against worst, then second best against second worst, and so on."""
    min_margin: float = 0.1
    """Smallest score difference of a pair: standard deviations of the reward model, or points of the teacher."""
    max_pairs: Optional[int] = None
    """Keep only so many pairs, those with the largest margins."""
    max_length_ratio: Optional[float] = None
    """Drop a pair of which one answer has more than so many times the other's tokens."""
    min_score: Optional[float] = None
    """Keep the best completion of a question only with at least this score; none keeps every best."""
    min_characters: int = 0
    """Neither choose nor reject an answer shorter than this."""
    max_characters: Optional[int] = None
    """Neither choose nor reject an answer longer than this."""
    min_distinct: int = 1
    """Leave out a question to which fewer different answers were drawn; 2: one that is always answered alike."""
    max_similarity: Optional[float] = None
    """Leave out a best answer whose ROUGE-L F with that of an earlier question is higher than this."""


def check_choice(config: ChoiceConfig) -> None:
    """Raise `UserError` for settings that mean nothing."""
    most = config.max_characters
    wanted = (
        ("pairs_per_prompt", config.pairs_per_prompt >= 1, "at least 1"),
        ("min_margin", config.min_margin >= 0, "0 or more"),
        ("max_pairs", config.max_pairs is None or config.max_pairs >= 1, "at least 1"),
        ("max_length_ratio", config.max_length_ratio is None or config.max_length_ratio >= 1, "at least 1"),
        ("max_characters", most is None or most >= max(1, config.min_characters), "at least 1 and min_characters"),
        ("min_distinct", config.min_distinct >= 1, "at least 1"),
        ("max_similarity", config.max_similarity is None or 0 < config.max_similarity <= 1, "above 0 and at most 1"),
    )
    for key, holds, needed in wanted:
        if not holds:
            raise UserError(f"{key}={getattr(config, key)}: must be {needed}")
    if config.max_pairs is not None and config.pairing is Pairing.versions:
        raise UserError(
            f"max_pairs={config.max_pairs} with pairing=versions: such pairs have no margin to choose by. "
            "Ask fewer questions by data.limit, or set pairing=reward"
        )


def eligible(config: ChoiceConfig, rows: Sequence[CompletionSet], drop: Drop) -> list[CompletionSet]:
    """The rows without answers that are too short or too long, and without questions answered too much alike."""
    kept = []
    for row in rows:
        different = len({each.text for each in row.completions})
        if different < config.min_distinct:
            drop(row, "fewer than min_distinct different answers", f"{different} of {len(row.completions)}")
        else:
            kept.append(within_lengths(config, row, drop))
    return kept


def within_lengths(config: ChoiceConfig, row: CompletionSet, drop: Drop) -> CompletionSet:
    """The row without answers shorter than min_characters or longer than max_characters; each is dropped."""
    kept = []
    for completion in row.completions:
        length, reason = len(completion.text), ""
        if length < config.min_characters:
            reason = "answer shorter than min_characters"
        elif config.max_characters is not None and length > config.max_characters:
            reason = "answer longer than max_characters"
        if reason:
            drop(row.model_copy(update={"completions": [completion]}), reason, f"{length} characters")
        else:
            kept.append(completion)
    return row.model_copy(update={"completions": kept})


def choose(config: ChoiceConfig, rows: Sequence[CompletionSet], drop: Drop) -> list[ChatExample]:
    """The best completion of each row as an example to learn from. Raises `UserError` when there is none at all."""
    from alignkit.scoring.novelty import NoveltyFilter

    others = NoveltyFilter(config.max_similarity) if config.max_similarity is not None else None
    examples = []
    for row in rows:
        chosen = next(iter(ranked(row.completions)), None)
        if chosen is None or chosen.score is None:
            drop(row, "no finished completion with a score")
            continue
        if config.min_score is not None and chosen.score < config.min_score:
            drop(row, "best completion scores below min_score", f"{chosen.score:.3f} < {config.min_score}")
            continue
        if others is not None:
            if similar := others.most_similar(chosen.text):
                detail = f"ROUGE-L {similar.similarity:.3f} with {similar.label}"
                drop(row, "best completion is nearly that of another question", detail)
                continue
            others.add(chosen.text, row.id)
        fields = {"id": row.id, "parents": row.parents, "prompt": row.prompt, "completion": _turn(chosen)}
        examples.append(ChatExample.model_validate(fields | {"source": SOURCE, "score": chosen.score}))
    if not examples:
        raise UserError(
            "no question has a best completion (see dropped.jsonl); look at sampling.max_new_tokens and min_score"
        )
    return examples


def pair(
    config: ChoiceConfig,
    rows: Sequence[CompletionSet],
    drop: Drop,
    previous: Mapping[str, CompletionSet] | None = None,
    tokens: Callable[[str], int] = len,
) -> list[PreferencePair]:
    """Pairs of a chosen and a rejected answer to the same question.

    The rejected come from `previous` (by row id) where it is given, else from the row itself. `tokens` says how long an
    answer is. No text is paired with itself, and none of a row's own answers is chosen in one pair and rejected in
    another.
    """
    pairs = []
    for row in rows:
        other = row
        if previous is not None:
            nothing = row.model_copy(update={"completions": []})
            other = within_lengths(config, previous.get(row.id, nothing), drop)
        for number, (chosen, rejected) in enumerate(_candidates(config, row, other, drop), start=1):
            if problem := _problem(config, chosen, rejected, tokens):
                reason, detail = problem
                if number == 1 or reason != MARGIN:  # that a row's second best is not much better is no loss
                    drop(row, reason, detail)
                continue
            pairs.append(_preference(config, row, chosen, rejected, number))
    if config.max_pairs is None or len(pairs) <= config.max_pairs:
        return pairs
    by_margin = sorted(range(len(pairs)), key=lambda place: pairs[place].margin or 0.0, reverse=True)
    for place in by_margin[config.max_pairs :]:
        drop(pairs[place], "no pair: max_pairs others have a larger margin")
    return [pairs[place] for place in sorted(by_margin[: config.max_pairs])]


def _candidates(
    config: ChoiceConfig, row: CompletionSet, other: CompletionSet, drop: Drop
) -> Iterator[tuple[Completion, Completion]]:
    """What could be paired, the likeliest first, at most pairs_per_prompt."""
    if config.pairing is Pairing.versions:
        better, worse = _finished(row), _finished(other)
        missing = "no pair: one of the versions has no finished completion"
    else:
        better, worse = ranked(row.completions), sorted(ranked(other.completions), key=lambda each: each.score or 0.0)
        missing = "no pair: the previous version has no finished completion with a score"
        if not better:
            return  # set aside by `choose`
    if not better or not worse:
        drop(row, missing)
    most = config.pairs_per_prompt
    if other is row and most > 1:
        most = min(most, max(1, len(better) // 2))
    yield from list(zip(better, worse, strict=False))[:most]


def _finished(row: CompletionSet) -> list[Completion]:
    """The finished answers in the order in which they were drawn, each text once."""
    by_text: dict[str, Completion] = {}
    for completion in row.completions:
        if completion.finished:
            by_text.setdefault(completion.text, completion)
    return list(by_text.values())


def _problem(
    config: ChoiceConfig, chosen: Completion, rejected: Completion, tokens: Callable[[str], int]
) -> tuple[str, str] | None:
    """Why two answers are no pair: the reason and its particulars."""
    if chosen.text == rejected.text:
        return SAME_TEXT, chosen.text[:200]
    if config.pairing is Pairing.reward:
        margin = _margin(chosen, rejected)
        if margin <= 0 or margin < config.min_margin:
            return MARGIN, f"margin {margin:.3f}"
    if config.max_length_ratio is not None:
        lengths = tokens(chosen.text), tokens(rejected.text)
        if max(lengths) > config.max_length_ratio * max(1, min(lengths)):
            return LENGTHS, f"{lengths[0]} tokens chosen, {lengths[1]} rejected"
    return None


def _preference(
    config: ChoiceConfig, row: CompletionSet, chosen: Completion, rejected: Completion, number: int
) -> PreferencePair:
    """The pair as a row; further pairs of a question have ids of their own, with the question's as a parent."""
    fields: dict[str, Any] = {"id": row.id, "parents": row.parents}
    if number > 1:
        fields = {"id": f"{row.id}/{number}", "parents": [row.id]}
    if config.pairing is Pairing.reward:
        fields["margin"] = _margin(chosen, rejected)
    turns = {"prompt": row.prompt, "chosen": _turn(chosen), "rejected": _turn(rejected), "source": SOURCE}
    return PreferencePair.model_validate(fields | turns)


def _margin(chosen: Completion, rejected: Completion) -> float:
    assert chosen.score is not None and rejected.score is not None
    return chosen.score - rejected.score


def _turn(completion: Completion) -> list[Message]:
    return [Message(role="assistant", content=completion.text)]
