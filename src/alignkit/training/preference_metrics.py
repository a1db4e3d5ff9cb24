"""What a policy does with preference pairs: measured before and after training, and while it trains."""

from __future__ import annotations

import logging
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState
from trl import DPOTrainer

from alignkit.training.callbacks import Check, stop

LOG = logging.getLogger("alignkit")

NOTABLE_DRIFT = 1.0
"""Fall of the log-probability of chosen answers, in nats per answer, from which on the log warns."""

LINES = 3
"""Log lines over which the fall of chosen answers is averaged before it stops a training."""


def preference_metrics(trainer: DPOTrainer, pairs: Dataset) -> dict[str, float]:
    """Means over pairs, without training: loss, rewards, share of pairs ranked right, log-probabilities.

    The loss is the preference term alone, whatever else is trained on.
    """
    trained_on = trainer.loss_types, trainer.loss_weights
    trainer.loss_types, trainer.loss_weights = ["sigmoid"], [1.0]
    found = trainer.evaluate(pairs)
    trainer.loss_types, trainer.loss_weights = trained_on
    return {
        "loss": found["eval_loss"],
        "chosen_reward": found["eval_rewards/chosen"],
        "rejected_reward": found["eval_rewards/rejected"],
        "reward_margin": found["eval_rewards/margins"],
        "reward_accuracy": found["eval_rewards/accuracies"],
        "chosen_log_prob": found["eval_logps/chosen"],
        "rejected_log_prob": found["eval_logps/rejected"],
    }


def drift(before: dict[str, float], after: dict[str, float]) -> dict[str, Any]:
    """How far chosen and rejected answers have become more or less likely (nats per answer).

    DPO only asks for the difference to grow. When chosen answers become much less likely, too, the policy drifts to
    text that is neither: the usual cause of gibberish.
    """
    change = {side: after[f"{side}_log_prob"] - before[f"{side}_log_prob"] for side in ("chosen", "rejected")}
    LOG.info("dpo: log-probability of chosen answers %+.2f, of rejected %+.2f", change["chosen"], change["rejected"])
    if change["chosen"] < -NOTABLE_DRIFT:
        LOG.warning("dpo: chosen answers became unlikely; a larger beta, fewer steps or sft_weight=0.1 hold them up")
    return {
        "chosen_log_prob_change": change["chosen"],
        "rejected_log_prob_change": change["rejected"],
        "reward_margin": after["reward_margin"],
        "reward_accuracy": after["reward_accuracy"],
        "preference_loss_before": before["loss"],
        "preference_loss_after": after["loss"],
    }


class ChosenFall(TrainerCallback):
    """Stop a training that makes chosen answers unlikely, too: what the policy says instead is neither.

    `most` is by how many nats a token, over the last log lines, chosen answers may fall below the reference.
    """

    def __init__(self, most: float, check: Check) -> None:
        self._most = most
        self._check = check

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Look at the last lines. Raises `UserError` when they lie too low."""
        ratios = [entry["log_ratios/chosen"] for entry in state.log_history if "log_ratios/chosen" in entry][-LINES:]
        if len(ratios) < LINES or (fall := -sum(ratios) / LINES) <= self._most:
            return
        said = f"chosen answers are {fall:.2f} nats a token less likely than under the reference at step"
        remedy = "raise beta, lower train.learning_rate, or hold them up with sft_weight=0.1"
        stop("chosen_answers_stay_likely", f"{said} {state.global_step}", remedy, args, self._check)
