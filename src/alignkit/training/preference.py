"""Direct preference optimisation against a reference that is named, set and checked."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from transformers import PrinterCallback
from trl import DPOConfig, DPOTrainer

from alignkit.core.artifact import Artifact
from alignkit.core.config import TrainConfig
from alignkit.training.arguments import optimizer_steps, trainer_arguments
from alignkit.training.batches import StepTrainer, planned_steps
from alignkit.training.checkpoints import checkpoint_folder
from alignkit.training.fit import fit, trainable_in_float32
from alignkit.training.log_probs import Answer, answer_log_probs
from alignkit.training.preference_losses import Objective
from alignkit.training.preference_metrics import ChosenFall, drift, preference_metrics
from alignkit.training.reference import check_reference, check_stored_reference, drop_reference, set_reference
from alignkit.training.reference_store import reference_log_probs
from alignkit.training.sampled_kl import log_ratios, sampled_answers

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

LOG = logging.getLogger("alignkit")

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

    @property
    def chosen(self) -> Answer:
        """The prompt with the better answer."""
        return Answer(self.prompt_ids, self.chosen_ids)

    @property
    def rejected(self) -> Answer:
        """The prompt with the worse answer."""
        return Answer(self.prompt_ids, self.rejected_ids)


@dataclass
class Watch:
    """What is looked at besides the training itself."""

    held_out: Sequence[EncodedPair] = ()
    """Pairs that are ranked after training."""
    max_chosen_fall: float | None = None
    """See `ChosenFall`; None: never stop."""
    sampled_prompts: Sequence[list[int]] = ()
    """Prompts that the policy answers before and after training."""


@dataclass
class Trained:
    """What comes out of a preference training besides the weights."""

    losses: list[dict[str, float]]
    """The rows of loss.jsonl."""
    held_out_margins: list[float]
    """Of each held-out pair, after training: see `margins`. Above 0: it is ranked right."""
    sampled_log_ratios: list[float]
    """Of each answer that the trained policy samples: see `log_ratios`."""
    sampled_tokens: tuple[list[int], list[int]]
    """Lengths of the answers sampled before and after training."""


def train_preference(
    policy: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[EncodedPair],
    objective: Objective,
    train: TrainConfig,
    seed: int,
    artifact: Artifact,
    *,
    store: Path | None = None,
    watch: Watch | None = None,
) -> Trained:
    """Train the policy's "default" adapter in place on pairs.

    With a `store` the reference's log-probabilities come from there, those that it lacks are computed once and added,
    and training runs without a reference model; without one they are computed anew at every step.
    """
    watch = watch or Watch()
    trainer = build_trainer(policy, tokenizer, pairs, objective, train, seed, artifact)
    if watch.max_chosen_fall is not None:
        trainer.add_callback(ChosenFall(watch.max_chosen_fall, artifact.check))
    set_reference(policy, objective.reference)
    watched = range(min(WATCHED_PAIRS, len(pairs)))
    before = check_reference(trainer, policy, objective.reference, trainer.rows(watched), artifact)
    sampled_before = sampled_answers(trainer, tokenizer, watch.sampled_prompts, seed)

    rows = sorted({*watched, *_rows_read(trainer, train)}) if store else []
    held_out, read = answers_of(watch.held_out), answers_of([pairs[row] for row in rows])
    reference, counts = reference_log_probs(trainer, [*held_out, *read], store)
    if store is not None:
        _use_store(trainer, rows, reference[len(held_out) :], counts, artifact)
        if not watch.sampled_prompts:
            drop_reference(policy)
        check_stored_reference(trainer, policy, objective.reference, trainer.rows(watched), artifact)
    if objective.reference != "sft_adapter":
        before = preference_metrics(trainer, trainer.rows(watched))

    row_tokens = [2 * len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids) for pair in pairs]
    losses = fit(trainer, artifact, train, "dpo", row_tokens)
    artifact.metrics.update(drift(before, preference_metrics(trainer, trainer.rows(watched))))
    log_probs = answer_log_probs(trainer, held_out, "held-out pairs")
    sampled = sampled_answers(trainer, tokenizer, watch.sampled_prompts, seed)
    return Trained(
        losses,
        margins(log_probs, reference[: len(held_out)], objective.beta),
        log_ratios(trainer, sampled),
        (lengths(sampled_before), lengths(sampled)),
    )


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
    arguments = trainer_arguments(
        DPOConfig,
        train,
        checkpoint_folder(artifact),
        rows=len(pairs),
        seed=seed,
        dtype=policy.dtype,
        beta=objective.beta,
        loss_type=list(objective.terms),
        loss_weights=list(objective.terms.values()),
        label_smoothing=objective.label_smoothing,
        max_length=None,
    )
    with trainable_in_float32(policy, artifact):
        trainer = _Trainer(model=policy, args=arguments, train_dataset=pairs_dataset(pairs), processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    return trainer


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


def answers_of(pairs: Sequence[EncodedPair]) -> list[Answer]:
    """All chosen answers, then all rejected ones."""
    return [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]


def margins(policy: Sequence[float], reference: Sequence[float], beta: float) -> list[float]:
    """beta * (chosen log-ratio - rejected log-ratio) of each pair, from log-probabilities as `answers_of` orders them.

    The implicit reward of Rafailov et al., 2023 (equation 5), of the chosen answer less that of the rejected one.
    """
    ratios = [ours - theirs for ours, theirs in zip(policy, reference, strict=True)]
    half = len(ratios) // 2
    return [beta * (chosen - rejected) for chosen, rejected in zip(ratios[:half], ratios[half:], strict=True)]


def lengths(answers: Sequence[Answer]) -> list[int]:
    """Tokens of each answer, its end included."""
    return [len(answer.answer_ids) for answer in answers]


def _rows_read(trainer: _Trainer, train: TrainConfig) -> set[int]:
    """The pairs that come up in this run's steps."""
    steps = planned_steps(trainer.sampler, optimizer_steps(len(trainer.sampler), train))
    return {row for step in steps for row in step}


def _use_store(
    trainer: _Trainer, rows: Sequence[int], reference: Sequence[float], counts: dict[str, int], artifact: Artifact
) -> None:
    """Give the trainer the reference's log-probabilities of the rows that it will read, as `answers_of` orders them."""
    LOG.info("dpo: reference log-probs: %d were stored, %d computed", counts["stored"], counts["computed"])
    artifact.metrics["reference_log_probs"] = counts
    artifact.check("reference_log_probs", all(map(math.isfinite, reference)), f"{len(reference)} numbers")
    sides = zip(reference[: len(rows)], reference[len(rows) :], strict=True)
    trainer.use_reference(dict(zip(rows, sides, strict=True)))


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

    def _precompute_ref_logps(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset  # they are in it

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """TRL's loss and all that it notes, and besides the answers' lengths and their log-ratios a token."""
        loss = super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[no-untyped-call]
        noted = self._metrics["train" if model.training else "eval"]
        for side, mask in zip(("chosen", "rejected"), inputs["completion_mask"].chunk(2), strict=True):
            tokens = self.accelerator.gather(mask.sum(dim=1)).double().mean().item()
            noted[f"tokens/{side}"].append(tokens)
            noted[f"log_ratios/{side}"].append(noted[f"rewards/{side}"][-1] / self.beta / tokens)
        return loss

    def use_reference(self, log_probs: dict[int, tuple[float, float]]) -> None:
        """Train with these reference log-probabilities, row -> of chosen and of rejected, and no reference model."""
        data: Any = self.train_dataset
        rows = [log_probs.get(row, (math.nan, math.nan)) for row in range(len(data))]
        for place, name in enumerate(("ref_chosen_logps", "ref_rejected_logps")):
            data = data.add_column(name, [row[place] for row in rows])
        self.train_dataset = data
        self.precompute_ref_logps = True

    def rows(self, numbers: Sequence[int]) -> Dataset:
        """Some of the rows that are trained on."""
        assert isinstance(self.train_dataset, Dataset)
        return self.train_dataset.select(numbers)

    def row_lengths(self) -> list[int]:
        """Tokens of each pair's longer side."""
        assert isinstance(self.train_dataset, Dataset)
        return list(self.train_dataset["length"])
