"""The scripted teacher: no model, but rules that read, write and grade inside the closed world of the demo.

It is given chat messages like any model and does what the last one asks for. Each recipe has its rules in a file beside
this one; a conversation that none of them knows is a question to be answered, or lies outside the world. It stands in
for a paid teacher so that everything runs offline, and is called what it is everywhere. As real teachers do, it makes
mistakes: a share `mistake_rate` of the answers it *writes* is wrong. Its grades never are.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import replace

from alignkit.core.errors import UserError
from alignkit.core.records import Message
from alignkit.data.closed_world import World
from alignkit.teacher.client import Answer, OnAnswer, Request, Usage
from alignkit.teacher.reading import MOST_REPEATS, OUTSIDE, ask_again, read_reply
from alignkit.teacher.scripted import answering, complete_answers, documents, judge, multihop, raft, self_instruct

__all__ = ["NAME", "OUTSIDE", "ScriptedTeacher"]

LOG = logging.getLogger("alignkit")

NAME = "scripted"
"""The model name under which it is configured and served."""
HARD_SHARE = 0.25
"""Share of the passages it writes that are about two entities sharing a relation."""
RULES = (
    judge.reply,
    self_instruct.reply,
    raft.reply,
    documents.reply,
    multihop.reply,
    complete_answers.reply,
    answering.reply,
)
"""Asked in this order; each says None to a conversation that is not its own."""


class ScriptedTeacher:
    """Answers by rule; the same messages and sample index get the same answer, whatever was asked before."""

    def __init__(self, mistake_rate: float = 0.15, seed: int = 0) -> None:
        if not 0 <= mistake_rate <= 1:
            raise UserError(f"teacher.mistake_rate={mistake_rate}: must lie between 0 and 1")
        self.mistake_rate = mistake_rate
        self.seed = seed
        self.usage = Usage()
        LOG.info(
            "teacher: scripted, by rule; %.0f %% of the answers it writes are wrong on purpose", 100 * mistake_rate
        )

    def ask(self, requests: Sequence[Request], on_answer: OnAnswer | None = None) -> list[Answer]:
        """Answer every request; "tokens" are words, since there is no tokenizer."""
        answers = []
        for index, request in enumerate(requests):
            answers.append(self._answer(request))
            if on_answer:
                on_answer(index, answers[-1])
        self.usage.count(answers)
        return answers

    def _answer(self, request: Request) -> Answer:
        prompt_tokens = completion_tokens = 0
        for repeat in range(MOST_REPEATS + 1):
            text = self.reply(request.messages, request.sample)
            prompt_tokens += sum(len(message.content.split()) for message in request.messages)
            completion_tokens += len(text.split())
            answer = read_reply(request, text)
            if answer.usable or text == OUTSIDE or repeat == MOST_REPEATS:
                break
            request = ask_again(request, answer)
        return replace(answer, prompt_tokens=prompt_tokens, completion_tokens=completion_tokens)

    def reply(self, messages: Sequence[Message], sample: int = 0) -> str:
        """The reply to a conversation that ends with a user turn."""
        world = World(self._number(messages, sample), hard_share=HARD_SHARE)
        for rule in RULES:
            if (text := rule(messages, world, self.mistake_rate)) is not None:
                return text
        return OUTSIDE

    def _number(self, messages: Sequence[Message], sample: int) -> int:
        """A number from everything that decides the reply."""
        content = json.dumps([self.seed, sample, [(message.role, message.content) for message in messages]])
        return int.from_bytes(hashlib.sha256(content.encode()).digest()[:8], "big")
