"""A reward model examined on prompts that it was not trained on: everything that the kit can say about it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from alignkit.core.artifact import Artifact
from alignkit.core.hashing import hash_text
from alignkit.core.records import Message
from alignkit.data.chat import encode_conversation
from alignkit.data.jsonl import read_rows
from alignkit.evaluation.reward_bench import sections
from alignkit.evaluation.reward_probes import run_probes, targets
from alignkit.evaluation.rewards import accuracy, agreement, calibration, length_bias
from alignkit.models.reward_model import GPU_BATCH_TOKENS, RewardModel
from alignkit.models.value_head import PromptGroup, collate
from alignkit.training.batches import parts
from alignkit.training.reward import EncodedGroup, encode_group
from alignkit.training.reward_data import AnswerGroup

SCORES_FILE = "held_out_scores.jsonl"
TRAIN_PROMPTS_FILE = "train_prompts.jsonl"
PROBED_ANSWERS = 100
CHECKED_CONVERSATIONS = 64
"""How many are scored again: after loading, alone, and with other padding."""
NEIGHBOUR_TOLERANCE = {"torch.float32": 1e-4, "torch.bfloat16": 0.2, "torch.float16": 0.05}
"""How much a score may change with what else is in the batch: rounding only, by the base's dtype."""


def examine(
    reward_model: RewardModel,
    groups: Sequence[AnswerGroup],
    artifact: Artifact,
    *,
    probed_answers: int = PROBED_ANSWERS,
    seed: int = 0,
) -> list[tuple[AnswerGroup, str, str]]:
    """Score the groups and write what follows; returns (group, answer, reason) of the answers that cannot be scored.

    Writes held_out_scores.jsonl, and into the metrics `held_out_accuracy` and `held_out`: calibration, length,
    agreement with the grader, probes, RewardBench's sections. A group in which no comparison is left counts nowhere.
    """
    unreadable: list[tuple[AnswerGroup, str, str]] = []
    read: list[tuple[AnswerGroup, EncodedGroup]] = []
    for group in groups:
        encoded, reasons = encode_group(reward_model.tokenizer, group, reward_model.model.max_length)
        unreadable += [(group, answer, reason) for answer, reason in reasons.items()]
        if encoded is not None:
            read.append((leave_out(group, reasons), encoded))
    rows = [encoded for _, encoded in read]
    raw = reward_model.raw_scores([encoded.tokens for encoded in rows])
    scores = [[(value - reward_model.offset) / reward_model.scale for value in values] for values in raw]
    found = accuracy(rows, scores)
    artifact.metrics["held_out_accuracy"] = found
    if not rows:
        artifact.metrics["held_out"] = {}
        return unreadable
    artifact.metrics["held_out"] = {
        "calibration": calibration(rows, scores, logits_per_score=reward_model.scale),
        "length": length_bias(rows, scores),
        "agreement": agreement(rows, scores),
        "probes": run_probes(reward_model, targets([group for group, _ in read], probed_answers, seed)),
        "rewardbench": sections(found),
    }
    artifact.write_rows(SCORES_FILE, (_scored(*each) for each in zip(read, scores, strict=True)))
    return unreadable


def leave_out(group: AnswerGroup, answers: Iterable[str]) -> AnswerGroup:
    """The group without these answers, as `encode_group` keeps it."""
    gone = set(answers)
    kept = [place for place, answer in enumerate(group.answers) if answer not in gone]
    return replace(
        group,
        answers=tuple(group.answers[place] for place in kept),
        grades=tuple(group.grades[place] for place in kept),
        comparisons=tuple(
            replace(each, better=kept.index(each.better), worse=kept.index(each.worse))
            for each in group.comparisons
            if each.better in kept and each.worse in kept
        ),
    )


def _scored(read: tuple[AnswerGroup, EncodedGroup], scores: Sequence[float]) -> dict[str, Any]:
    group, encoded = read
    answers = zip(group.answers, scores, encoded.tokens.answers, group.grades, strict=True)
    return {
        "id": group.id,
        "source": group.source,
        "prompt": [message.model_dump() for message in group.prompt],
        "answers": [
            {"text": text, "score": score, "tokens": len(tokens)} | ({} if grade is None else {"grade": grade})
            for text, score, tokens, grade in answers
        ],
        "comparisons": [[each.better, each.worse] for each in group.comparisons],
    }


# -- what was trained on -----------------------------------------------------------------------------------------------


def train_prompts(groups: Iterable[AnswerGroup]) -> Iterator[dict[str, str]]:
    """A row for each group that is trained on, to be kept beside the model: its id, its source, its prompt's hash."""
    for group in groups:
        yield {"id": group.id, "source": group.source, "prompt_sha256": hash_text(group.prompt_key)}


def read_train_prompts(folder: Path) -> set[str] | None:
    """The hashes of the prompts that the reward model in `folder` was trained on; None when it does not say."""
    path = folder / TRAIN_PROMPTS_FILE
    return {str(row["prompt_sha256"]) for _, row in read_rows(str(path))} if path.is_file() else None


def is_among(group: AnswerGroup, prompts: set[str]) -> bool:
    """Whether the group's prompt is one of those hashes."""
    return hash_text(group.prompt_key) in prompts


# -- a score is a matter of its conversation alone ---------------------------------------------------------------------


def checked_conversations(groups: Iterable[AnswerGroup]) -> list[list[Message]]:
    """The first conversations of the groups."""
    every = ([*group.prompt, Message(role="assistant", content=text)] for group in groups for text in group.answers)
    return list(islice(every, CHECKED_CONVERSATIONS))


def check_invariance(reward_model: RewardModel, conversations: Sequence[Sequence[Message]], artifact: Artifact) -> None:
    """Scores do not depend on what else is in the batch, nor on the side of the padding."""
    together = reward_model.scores_or_reasons(conversations)
    alone = [reward_model.scores_or_reasons([conversation])[0] for conversation in conversations]
    tolerance = NEIGHBOUR_TOLERANCE[str(reward_model.module.policy.dtype)]
    apart = largest_difference(together, alone)
    detail = f"scored alone and together: largest difference {apart:.1e}, rounding allows {tolerance:g}"
    artifact.check("scores_need_no_neighbours", apart <= tolerance, detail)
    readable = [each for each, score in zip(conversations, together, strict=True) if isinstance(score, float)]
    sides = padding_difference(reward_model, readable) / reward_model.scale
    detail = f"{len(readable)} padded left and right: largest difference {sides:.1e}, rounding allows {tolerance:g}"
    artifact.check("scores_need_no_padding_side", sides <= tolerance, detail)


def largest_difference(first: Sequence[float | str], second: Sequence[float | str]) -> float:
    """Of two lists of scores; infinite where one has a score and the other a reason."""
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if a != b]
    return max(
        (abs(a - b) if isinstance(a, float) and isinstance(b, float) else float("inf") for a, b in pairs), default=0.0
    )


def padding_difference(reward_model: RewardModel, conversations: Sequence[Sequence[Message]]) -> float:
    """Largest difference of what the value head says when batches are padded on the left instead of on the right."""
    rows = [PromptGroup((), (tuple(encode_conversation(reward_model.tokenizer, each)),)) for each in conversations]
    device = reward_model.module.value_head.weight.device
    largest = 0.0
    for part in parts([len(row) for row in rows], GPU_BATCH_TOKENS) if rows else ():  # unsorted: there is padding
        right = collate(rows[part], reward_model.tokenizer.pad_token_id)
        with torch.inference_mode():
            values = [
                reward_model.module(**{key: value.to(device) for key, value in side.items()})
                for side in (padded_left(right), right)
            ]
        largest = max(largest, float((values[0] - values[1]).abs().max()))
    return largest


def padded_left(right: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A batch of `collate`, of one conversation a row, with its padding moved to the left."""
    left = {key: value.clone() for key, value in right.items()}
    for row, length in enumerate((right["segments"] >= 0).sum(dim=1).tolist()):
        shift = right["input_ids"].shape[1] - length
        for key in ("input_ids", "segments", "position_ids"):
            left[key][row] = torch.roll(right[key][row], shift)
        left["last"][row, 1] += shift
    return left
