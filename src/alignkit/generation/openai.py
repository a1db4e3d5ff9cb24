"""Completions from a teacher: any model behind an OpenAI-compatible server, or the scripted rules."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from alignkit.core.config import SamplingConfig
from alignkit.core.records import Completion, Message, Tools
from alignkit.generation.base import check_sampling
from alignkit.teacher.client import Answer, Request, Teacher

SAMPLES_A_SEED = 1_000_000
"""Sample indices that a seed has to itself; no more completions of a prompt can be told apart."""


class OpenAIGenerator:
    """Generates by asking a teacher, all prompts at once; the response store is what makes it resumable.

    A temperature is drawn for each completion; top_p stays the server's own. A prompt has fewer than `sampling.n`
    completions where the teacher gave no usable answer: `failures` holds the position of the prompt and the answer.
    `tools` are the functions that every prompt offers.
    """

    def __init__(self, teacher: Teacher, label: str, tools: Tools | None = None) -> None:
        self.teacher = teacher
        self.label = label
        self.tools = tools
        self.failures: list[tuple[int, Answer]] = []
        self.tokens_written = 0
        """Of this process: none, what the server wrote is in the teacher's usage."""
        self.shared = None
        """Nothing of a server's is in this process."""

    def generate(self, prompts: Sequence[list[Message]], sampling: SamplingConfig, seed: int) -> list[list[Completion]]:
        """Up to `sampling.n` completions for each prompt; another seed asks anew, a larger `n` for the rest."""
        check_sampling(sampling)
        requests = [
            Request(
                prompt,
                sample=seed * SAMPLES_A_SEED + sample,
                temperature=round(Random(f"{seed}-{position}-{sample}").uniform(*sampling.temperature), 3),
                max_tokens=sampling.max_new_tokens,
                tools=self.tools,
            )
            for position, prompt in enumerate(prompts)
            for sample in range(sampling.n)
        ]
        written: list[list[Completion]] = [[] for _ in prompts]
        self.failures = []
        for number, (request, answer) in enumerate(zip(requests, self.teacher.ask(requests), strict=True)):
            position = number // sampling.n
            if answer.usable:
                drawn = {"temperature": float(request.temperature or 0)}
                written[position].append(Completion(text=answer.value, model=self.label, sampling=drawn))
            else:
                self.failures.append((position, answer))
        return written
