"""The reference of a preference training: named, set, and checked before the first step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from trl import DPOTrainer

from alignkit.core.artifact import Artifact
from alignkit.training.preference_metrics import preference_metrics

if TYPE_CHECKING:
    from peft import PeftModel

LN_2 = math.log(2)
TOLERANCE = 1e-5
"""Policy and reference run the same arithmetic on the same batch, so only summation order can differ."""

ROUNDING = {torch.float32: 1e-6}
COARSE_ROUNDING = 1e-2
"""By how many nats a token's log-probability may differ between two batches, in float32 and in 16 bits."""


def set_reference(policy: PeftModel, reference: str) -> None:
    """Make the trainer compare with the named reference instead of the copy it made.

    Without an adapter called "ref" it switches adapters off, which is the base.
    """
    if reference == "sft_adapter":
        return
    policy.delete_adapter("ref")
    if reference != "base":
        _load_frozen(policy, Path(reference), "ref")


def drop_reference(policy: PeftModel) -> None:
    """Take the reference's adapter out of memory."""
    if "ref" in policy.peft_config:
        policy.delete_adapter("ref")


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
    _check("reference", reference, found, TOLERANCE, artifact)
    return found


def check_stored_reference(
    trainer: DPOTrainer, policy: PeftModel, reference: str, pairs: Dataset, artifact: Artifact
) -> None:
    """Check in the same way that the log-probabilities the trainer was given are those of the named reference.

    They were computed in other batches than the policy's, so rounding differs: by a share of the dtype's precision at
    every token of an answer.
    """
    longest = max(map(len, [*pairs["chosen_ids"], *pairs["rejected_ids"]]))
    with _policy_is(policy, reference):
        found = preference_metrics(trainer, pairs)
    tolerance = max(TOLERANCE, trainer.beta * longest * ROUNDING.get(policy.dtype, COARSE_ROUNDING))
    _check("stored_reference", reference, found, tolerance, artifact)


def _check(name: str, reference: str, found: dict[str, float], tolerance: float, artifact: Artifact) -> None:
    reward = max(abs(found["chosen_reward"]), abs(found["rejected_reward"]))
    artifact.check(
        name,
        abs(found["loss"] - LN_2) <= tolerance and reward <= tolerance,
        f"{reference}: loss {found['loss']:.7f} (ln 2 = {LN_2:.7f}), largest mean reward {reward:.1e}",
    )


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
