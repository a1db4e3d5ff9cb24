"""Which losses a preference training can have: TRL's, by TRL's names. docs/dpo.md has their equations and papers."""

from __future__ import annotations

from dataclasses import dataclass

from alignkit.core.errors import UserError
from alignkit.core.stages import nearest

LOSSES = (
    *("sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "discopop"),  # of the difference of log-ratios
    *("nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down"),  # of each log-ratio by itself
    *("aot", "aot_unpaired"),  # of the sorted ones of a batch
)
"""Names of `loss`; TRL's "sft" is not one of them but the term that `sft_weight` weighs."""

SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired")
"""Losses that `label_smoothing` changes; TRL ignores it in silence with all others."""


@dataclass(frozen=True)
class Objective:
    """A preference loss, what it is relative to, and an optional likelihood term.

    The default is that of Rafailov et al., 2023 (arXiv 2305.18290, equation 7):

    loss = -log sigmoid(beta * (chosen log-ratio - rejected log-ratio)) + sft_weight * (-mean log p of chosen tokens),

    where a log-ratio is log p_policy(completion | prompt) - log p_reference(completion | prompt). `reference` is
    `sft_adapter` (a frozen copy of the policy as it comes in), `base` (no adapter) or an adapter's folder. Raises
    `UserError` for a loss that does not exist and for numbers that it cannot have.
    """

    reference: str
    beta: float
    sft_weight: float = 0.0
    loss: str = "sigmoid"
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what TRL would ignore, or fail on with a traceback."""
        if self.loss not in LOSSES:
            meant, known = nearest(self.loss, LOSSES), ", ".join(LOSSES)
            raise UserError(f"loss={self.loss}: no such loss{meant}. There are {known}")
        if not self.beta > 0:
            raise UserError(f"beta={self.beta}: must be above 0")
        if self.sft_weight < 0:
            raise UserError(f"sft_weight={self.sft_weight}: must be 0 or more")
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(
                f"label_smoothing={self.label_smoothing}: must be from 0 up to, but not, 0.5; it is the share of pairs "
                "whose preference is the wrong way round"
            )
        if self.label_smoothing and self.loss not in SMOOTHED:
            raise UserError(
                f"label_smoothing={self.label_smoothing}: loss={self.loss} has no such thing. For noisy preferences "
                f"choose loss=robust; {', '.join(SMOOTHED[1:])} take it, too"
            )
        if self.loss == "exo_pair" and not self.label_smoothing:
            raise UserError("loss=exo_pair needs label_smoothing above 0: its paper recommends label_smoothing=1e-3")

    @property
    def terms(self) -> dict[str, float]:
        """TRL's name and the weight of each term of the loss."""
        return {self.loss: 1.0} | ({"sft": self.sft_weight} if self.sft_weight else {})
