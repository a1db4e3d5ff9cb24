"""Preference pairs: our own, and the dialogues of hh-rlhf (Bai et al., 2022, arXiv 2204.05862).

hh-rlhf writes a dialogue as one text of "\\n\\nHuman: ..." and "\\n\\nAssistant: ..." turns. It is parsed into
messages, and the prompt is every turn before the last. The longest common *text* of chosen and rejected would reach
into the answers ("I think yes" and "I think no" share "I think"), and the markers are not those of a chat template.
"""

from __future__ import annotations

import re

from pydantic import BaseModel

from alignkit.core.records import Dropped, Message, PreferencePair
from alignkit.data.sources.conversations import unusable
from alignkit.data.sources.raw import RawRow

_MARKER = re.compile(r"\n\n(Human|Assistant):")


class _Dialogues(BaseModel):
    chosen: str
    rejected: str


def read_pair(raw: RawRow) -> PreferencePair | Dropped:
    """A preference pair of ours, unless there is nothing to prefer, or more than one answer to another."""
    if raw.fields["chosen"] == raw.fields["rejected"]:
        return raw.drop("chosen equals rejected")
    pair = raw.record(PreferencePair, id=raw.id)
    for answer in (pair.chosen, pair.rejected):
        if problem := unusable([*pair.prompt, *answer]):
            return raw.drop(problem)
        if len(answer) > 1:
            return raw.drop("an answer is not one assistant's turn")
    return raw.drop("pairs with tools are not learned") if raw.fields.get("tools") else pair


def read_dialogues(raw: RawRow) -> PreferencePair | Dropped:
    """A row of hh-rlhf."""
    row = raw.record(_Dialogues)
    chosen, rejected = parse_dialogue(row.chosen), parse_dialogue(row.rejected)
    for messages in (chosen, rejected):
        if problem := _malformed(messages):
            return raw.drop(problem)
    if chosen[:-1] != rejected[:-1]:
        return raw.drop("different prompts")
    if chosen == rejected:
        return raw.drop("chosen equals rejected")
    return PreferencePair(id=raw.id, prompt=chosen[:-1], chosen=chosen[-1:], rejected=rejected[-1:], source="hh-rlhf")


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
