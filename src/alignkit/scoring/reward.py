"""The reward model as a scorer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignkit.core.records import Message
from alignkit.models.reward_model import RewardModel


class RewardScorer:
    """Scores by a saved reward model: standard deviations above the mean of what it was trained on.

    With `policy`, the model that has just generated, both are adapters on one base and nothing is loaded twice,
    provided that the reward model was trained on that base.
    """

    def __init__(self, folder: str | Path, policy: Any = None) -> None:
        self.reward_model = RewardModel.from_pretrained(folder, policy)
        self.reasons: list[str | None] = []

    def score(self, conversations: Sequence[list[Message]]) -> list[float | None]:
        """One score a conversation; None, with its reason, for one that is too long or cannot be rendered."""
        found = self.reward_model.scores_or_reasons(conversations)
        self.reasons = [each if isinstance(each, str) else None for each in found]
        return [None if isinstance(each, str) else each for each in found]
