"""What a generator is, and what every engine checks before it draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from alignkit.core.config import SamplingConfig
from alignkit.core.errors import UserError
from alignkit.core.records import Completion, Message


class Generator(Protocol):
    """Writes completions. `label` is the name under which they are recorded (`Completion.model`)."""

    label: str

    def generate(self, prompts: Sequence[list[Message]], sampling: SamplingConfig, seed: int) -> list[list[Completion]]:
        """`sampling.n` completions for each prompt, in the order of the prompts; the same for the same seed."""
        ...


def check_sampling(sampling: SamplingConfig) -> None:
    """Raise `UserError` when the ranges make no sense, before a model is loaded for them."""
    for key, values, lowest, highest in (
        ("temperature", sampling.temperature, 0.0, 10.0),
        ("top_p", sampling.top_p, 0.0, 1.0),
    ):
        if len(values) != 2 or not lowest <= values[0] <= values[1] <= highest:
            raise UserError(f"sampling.{key}={values}: give [lowest, highest] within [{lowest:g}, {highest:g}]")
    for key in ("n", "max_new_tokens", "batch_size"):
        if getattr(sampling, key) < 1:
            raise UserError(f"sampling.{key}={getattr(sampling, key)}: must be at least 1")
    if is_greedy(sampling) and sampling.n > 1:
        raise UserError(
            f"sampling.n={sampling.n} with sampling.temperature=[0, 0]: greedy decoding writes the same text "
            f"{sampling.n} times. Set sampling.n=1 or a temperature above 0."
        )
    if sampling.top_p[0] == 0 and not is_greedy(sampling):
        raise UserError("sampling.top_p: must be above 0 (use sampling.temperature=[0,0] for greedy decoding)")


def is_greedy(sampling: SamplingConfig) -> bool:
    """Whether every completion is the most likely one."""
    return max(sampling.temperature) == 0


def greedily(sampling: SamplingConfig) -> SamplingConfig:
    """The same, but for one completion a prompt, the most likely one."""
    return replace(sampling, n=1, temperature=[0.0, 0.0], top_p=[1.0, 1.0])
