"""Direct preference optimisation against a reference that is named, set and checked."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from transformers import PrinterCallback
from trl import DPOConfig, DPOTrainer

from alignkit.core.artifact import Artifact
from alignkit.core.config import TrainConfig
from alignkit.training.arguments import trainer_arguments
from alignkit.training.batches import StepTrainer
from alignkit.training.checkpoints import checkpoint_folder
from alignkit.training.fit import fit, trainable_in_float32

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

LOG = logging.getLogger("alignkit")

LN_2 = math.log(2)
TOLERANCE = 1e-5
"""Policy and reference run the same arithmetic on the same batch, so only summation order can differ."""

NOTABLE_DRIFT = 1.0
"""Fall of the log-probability of chosen answers, in nats per answer, from which on the log warns."""

WATCHED_PAIRS = 64
"""Pairs on which log-probabilities are compared before and after training."""


@dataclass
class EncodedPair:
    """Token ids of a prompt and of its two completions, each with its end-of-turn token."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]

    def __len__(self) -> int:
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))


@dataclass
class Objective:
    """The DPO loss of Rafailov et al., 2023 (arXiv 2305.18290, equation 7), and an optional likelihood term.

    loss = -log sigmoid(beta * (chosen log-ratio - rejected log-ratio)) + sft_weight * (-mean log p of chosen tokens),
    where a log-ratio is log p_policy(completion | prompt) - log p_reference(completion | prompt). `reference` is
    `sft_adapter` (a frozen copy of the policy as it comes in), `base` (no adapter) or an adapter's folder.
    """

    reference: str
    beta: float
    sft_weight: float = 0.0


def train_preference(
    policy: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[EncodedPair],
    objective: Objective,
    train: TrainConfig,
    seed: int,
    artifact: Artifact,
) -> list[dict[str, float]]:
    """Train the policy's "default" adapter in place on pairs; returns the rows of loss.jsonl."""
    trainer = build_trainer(policy, tokenizer, pairs, objective, train, seed, artifact)
    set_reference(policy, objective.reference)
    watched = pairs_dataset(pairs[:WATCHED_PAIRS])
    at_reference = check_reference(trainer, policy, objective.reference, watched, artifact)
    before = at_reference if objective.reference == "sft_adapter" else preference_metrics(trainer, watched)
    row_tokens = [2 * len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids) for pair in pairs]
    losses = fit(trainer, artifact, train, "dpo", row_tokens)
    after = preference_metrics(trainer, watched)
    artifact.metrics.update(_drift(before, after))
    return losses


def build_trainer(
    policy: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[EncodedPair],
    objective: Objective,
    train: TrainConfig,
    seed: int,
    artifact: Artifact,
) -> _Trainer:
    """TRL's trainer on encoded pairs. It adds the adapter "ref", a frozen copy of "default", and turns dropout off."""
    weights = [1.0, objective.sft_weight] if objective.sft_weight else [1.0]
    arguments = trainer_arguments(
        DPOConfig,
        train,
        checkpoint_folder(artifact),
        rows=len(pairs),
        seed=seed,
        dtype=policy.dtype,
        beta=objective.beta,
        loss_type=["sigmoid", "sft"][: len(weights)],
        loss_weights=weights,
        max_length=None,
    )
    with trainable_in_float32(policy, artifact):
        trainer = _Trainer(model=policy, args=arguments, train_dataset=pairs_dataset(pairs), processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    return trainer


# -- the reference -----------------------------------------------------------------------------------------------------


def set_reference(policy: PeftModel, reference: str) -> None:
    """Make the trainer compare with the named reference instead of the copy it made.

    Without an adapter called "ref" it switches adapters off, which is the base.
    """
    if reference == "sft_adapter":
        return
    policy.delete_adapter("ref")
    if reference != "base":
        _load_frozen(policy, Path(reference), "ref")


def check_reference(
    trainer: DPOTrainer, policy: PeftModel, reference: str, pairs: Dataset, artifact: Artifact
) -> dict[str, float]:
    """Check that the trainer's reference is the named one: a policy that *is* that reference has loss ln 2, rewards 0.

    Every log-ratio is then zero. Conversely the mean of -log sigmoid, which is strictly convex, is ln 2 at mean margin
    zero only when every single margin is zero. With `sft_adapter` this is the policy as it stands; otherwise the policy
    takes the place of the named reference for the time of the check. Returns the metrics of that policy.
    """
    with _policy_is(policy, reference):
        found = preference_metrics(trainer, pairs)
    reward = max(abs(found["chosen_reward"]), abs(found["rejected_reward"]))
    artifact.check(
        "reference",
        abs(found["loss"] - LN_2) <= TOLERANCE and reward <= TOLERANCE,
        f"{reference}: loss {found['loss']:.7f} (ln 2 = {LN_2:.7f}), largest mean reward {reward:.1e}",
    )
    return found


@contextmanager
def _policy_is(policy: PeftModel, reference: str) -> Iterator[None]:
    """Let the policy be the named reference, by another road than `set_reference` takes."""
    if reference == "sft_adapter":
        yield
    elif reference == "base":
        with _adding_nothing(policy):
            yield
    else:
        _load_frozen(policy, Path(reference), "named")
        policy.set_adapter("named")
        yield
        policy.set_adapter("default")
        policy.delete_adapter("named")


@contextmanager
def _adding_nothing(policy: PeftModel) -> Iterator[None]:
    """Let the "default" adapter add nothing to the base for a while: B = 0, and DoRA's magnitudes those of the base."""
    kinds = (".lora_B.default", ".lora_magnitude_vector.default")
    changed = [weight for name, weight in policy.named_parameters() if any(kind in name for kind in kinds)]
    saved = [weight.detach().clone() for weight in changed]
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if ".lora_B.default" in name:
                weight.zero_()
        for layer in policy.modules():
            magnitudes: Any = getattr(layer, "lora_magnitude_vector", {})
            if "default" in magnitudes:
                magnitudes["default"].weight.copy_(_base_norms(layer, magnitudes["default"]))
        yield
        for weight, value in zip(changed, saved, strict=True):
            weight.copy_(value)


def _base_norms(layer: Any, dora: Any) -> torch.Tensor:
    """The norm of each output's weights in the base, [outputs], as PEFT takes it in a forward pass."""
    from peft.utils.integrations import dequantize_module_weight

    weight = dequantize_module_weight(layer.get_base_layer()).float()
    norms: torch.Tensor = dora.get_weight_norm(weight, torch.zeros_like(weight), 1.0)
    return norms


def _load_frozen(policy: PeftModel, folder: Path, name: str) -> None:
    policy.load_adapter(str(folder), name, is_trainable=False)
    for path, module in policy.named_modules():
        if path.endswith(f"lora_dropout.{name}") and isinstance(module, torch.nn.Dropout):
            module.p = 0.0


# -- measuring ---------------------------------------------------------------------------------------------------------


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
        "reward_accuracy": found["eval_rewards/accuracies"],
        "chosen_log_prob": found["eval_logps/chosen"],
        "rejected_log_prob": found["eval_logps/rejected"],
    }


def _drift(before: dict[str, float], after: dict[str, float]) -> dict[str, Any]:
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
        "reward_accuracy": after["reward_accuracy"],
        "preference_loss_before": before["loss"],
        "preference_loss_after": after["loss"],
    }


def pairs_dataset(pairs: Sequence[EncodedPair]) -> Dataset:
    """Pairs as the trainer reads them."""
    return Dataset.from_dict(
        {
            "prompt_ids": [pair.prompt_ids for pair in pairs],
            "chosen_ids": [pair.chosen_ids for pair in pairs],
            "rejected_ids": [pair.rejected_ids for pair in pairs],
            "length": [len(pair) for pair in pairs],
        }
    )


class _Trainer(StepTrainer, DPOTrainer):
    """TRL's trainer with our token ids and our batches, and without its telemetry."""

    even = True  # TRL collects its metrics row by row, as many from each process

    def _send_telemetry(self) -> None:
        pass

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        shutil.rmtree(Path(str(output_dir)) / "ref", ignore_errors=True)  # made anew from where it is named

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset  # tokenised already

    def row_lengths(self) -> list[int]:
        """Tokens of each pair's longer side."""
        assert isinstance(self.train_dataset, Dataset)
        return list(self.train_dataset["length"])
