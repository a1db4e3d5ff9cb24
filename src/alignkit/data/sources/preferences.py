"""Preference pairs: our own, TRL's, RewardBench's, and the dialogues of hh-rlhf (Bai et al., 2022, arXiv 2204.05862).

hh-rlhf writes a dialogue as one text of "\\n\\nHuman: ..." and "\\n\\nAssistant: ..." turns; full-hh-rlhf (Dahoas) has
the same dialogues cut in two, the prompt up to its last "Assistant:" and the two answers. They are parsed into
messages, and the prompt is every turn before the last. The longest common *text* of chosen and rejected would reach
into the answers ("I think yes" and "I think no" share "I think"), and the markers are not those of a chat template.
"""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel

from alignkit.core.records import Dropped, Message, PreferencePair
from alignkit.data.sources.conversations import unusable
from alignkit.data.sources.raw import Format, RawRow

_MARKER = re.compile(r"\n\n(Human|Assistant):")


class _Dialogues(BaseModel):
    chosen: str
    rejected: str


class _Conversations(BaseModel):
    chosen: list[Message]
    rejected: list[Message]


def read_pair(raw: RawRow) -> PreferencePair | Dropped:
    """A pair with its prompt, unless there is nothing to prefer, or more than one answer to another.

    A prompt that is one text is a dialogue of hh-rlhf up to its last marker, or else what a user says. A row of
    RewardBench (Lambert et al., 2024, arXiv 2403.13787) has the source `rewardbench/<subset>`.
    """
    if raw.fields["chosen"] == raw.fields["rejected"]:
        return raw.drop("chosen equals rejected")
    prompt = raw.fields["prompt"]
    if isinstance(prompt, str) and _MARKER.match(prompt):
        texts = raw.record(_Dialogues)
        return _pair(raw, parse_dialogue(prompt + texts.chosen), parse_dialogue(prompt + texts.rejected))
    sides = {name: _turns("assistant", raw.fields[name]) for name in ("chosen", "rejected")}
    pair = raw.record(PreferencePair, **_name(raw), prompt=_turns("user", prompt), **sides)
    for answer in (pair.chosen, pair.rejected):
        if problem := unusable([*pair.prompt, *answer]):
            return raw.drop(problem)
        if len(answer) > 1:
            return raw.drop("an answer is not one assistant's turn")
    return raw.drop("pairs with tools are not learned") if raw.fields.get("tools") else pair


def read_dialogues(raw: RawRow) -> PreferencePair | Dropped:
    """A pair whose prompt is what both sides begin with: texts of hh-rlhf, or lists of messages."""
    if isinstance(raw.fields["chosen"], list):
        sides = raw.record(_Conversations)
        return _pair(raw, sides.chosen, sides.rejected, raw.fields.get("source", ""))
    texts = raw.record(_Dialogues)
    return _pair(raw, parse_dialogue(texts.chosen), parse_dialogue(texts.rejected))


FORMATS = (
    Format("preference pair", ("prompt", "chosen", "rejected"), read_pair),
    Format("hh-rlhf", ("chosen", "rejected"), read_dialogues),
)


def _pair(
    raw: RawRow, chosen: list[Message], rejected: list[Message], source: str = "hh-rlhf"
) -> PreferencePair | Dropped:
    for messages in (chosen, rejected):
        if problem := _malformed(messages):
            return raw.drop(problem)
    if chosen[:-1] != rejected[:-1]:
        return raw.drop("different prompts")
    if chosen == rejected:
        return raw.drop("chosen equals rejected")
    return PreferencePair(id=raw.id, prompt=chosen[:-1], chosen=chosen[-1:], rejected=rejected[-1:], source=source)


def _turns(role: str, value: Any) -> Any:
    """A text as the one turn of a role."""
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def _name(raw: RawRow) -> dict[str, str]:
    """Id and, of a row of RewardBench, source. RewardBench counts anew in every subset."""
    subset = raw.fields.get("subset")
    if not isinstance(subset, str):
        return {"id": raw.id}
    return {"id": f"{subset}-{raw.id}", "source": raw.fields.get("source") or f"rewardbench/{subset}"}


def parse_dialogue(text: str) -> list[Message]:
    """The turns of a "\\n\\nHuman: ... \\n\\nAssistant: ..." text; none when it does not begin with a marker."""
    before, *parts = _MARKER.split(text)
    if before.strip():
        return []
    return [
        Message(role="user" if speaker == "Human" else "assistant", content=content.strip())
        for speaker, content in zip(parts[::2], parts[1::2], strict=True)
    ]


def _malformed(messages: list[Message]) -> str | None:
    if not messages:
        return "not a dialogue"
    if problem := unusable(messages):
        return problem
    if any(message.role != ("user", "assistant")[index % 2] for index, message in enumerate(messages)):
        return "turns do not alternate"  # many chat templates refuse such a conversation
    if any(not message.content for message in messages):
        return "empty turn"
    return None
