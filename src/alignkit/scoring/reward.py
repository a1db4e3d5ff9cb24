"""The reward model as a scorer."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignkit.core.errors import UserError
from alignkit.core.records import Message
from alignkit.models.reward_model import ADAPTER_FOLDER, CONFIG_FILE, HEAD_FILE, RewardModel

LOG = logging.getLogger("alignkit")


class RewardScorer:
    """Scores by a saved reward model: standard deviations above the mean of what it was trained on.

    With `policy`, the model that has just generated, both are adapters on one base and nothing is loaded twice,
    provided that the reward model was trained on that base; else its own base is loaded, and the log says so.

    From an ensemble's score `uncertainty_penalty` times the disagreement of its heads is taken off: where they
    disagree, it is most easily exploited (Coste et al., 2023, arXiv 2310.02743, who take the variance off).
    """

    def __init__(self, folder: str | Path, policy: Any = None, uncertainty_penalty: float = 0.0) -> None:
        self.reward_model = RewardModel.from_pretrained(folder, policy)
        self.uncertainty_penalty = uncertainty_penalty
        self.reasons: list[str | None] = []
        if policy is not None and self.reward_model.module.policy is not policy:
            LOG.warning("%s: its base is not the policy's, held alike; a second base was loaded for it", folder)

    def score(self, conversations: Sequence[list[Message]]) -> list[float | None]:
        """One score a conversation; None, with its reason, for one that is too long or cannot be rendered."""
        found: Sequence[float | str]
        if self.uncertainty_penalty:
            both = self.reward_model.scores_and_disagreements(conversations)
            found = [each if isinstance(each, str) else each[0] - self.uncertainty_penalty * each[1] for each in both]
        else:
            found = self.reward_model.scores_or_reasons(conversations)
        self.reasons = [each if isinstance(each, str) else None for each in found]
        return [None if isinstance(each, str) else each for each in found]


def require_reward_model(folder: str | Path, uncertainty_penalty: float = 0.0) -> None:
    """Raise `UserError` when a part of the reward model is missing, or the heads that could disagree.

    To be called before anything is loaded or generated for it.
    """
    if not Path(folder).is_dir():
        raise UserError(f"reward={folder}: no such folder. Give a reward stage's run folder.")
    for name in (CONFIG_FILE, HEAD_FILE, ADAPTER_FOLDER):
        if not (Path(folder) / name).exists():
            raise UserError(
                f"reward={folder}: no reward model, or a damaged one ({name} is missing). Give a reward stage's run "
                "folder; what was lost from one is trained or copied again."
            )
    entries = json.loads((Path(folder) / CONFIG_FILE).read_text(encoding="utf-8"))
    if uncertainty_penalty and len(entries.get("head_offsets", [0.0])) < 2:
        raise UserError(
            f"uncertainty_penalty={uncertainty_penalty}: the reward model {folder} has one head, and so no "
            "disagreement. Train one with several, or set uncertainty_penalty=0."
        )
