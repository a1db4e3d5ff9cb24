"""What happens during training beside it: progress, logging, checkpoints, and the checks of the first steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from alignkit.core.progress import progress
from alignkit.training.checkpoints import seal

Check = Callable[[str, bool, str], None]
"""`Artifact.check`: records name, whether it passed, and detail; raises when it did not pass."""

PATIENCE = 10
"""Optimizer steps within which every adapter matrix must have moved."""


class AdapterMoved(TrainerCallback):
    """Check that training trains: every trainable matrix has changed within the first steps.

    Not all can change at the first step: a warm-up begins with learning rate zero, and as long as B is zero, as in a
    new adapter, the gradient of A is zero. So matrices are watched until all have moved, for at most `PATIENCE` steps;
    a run too short for A to move is excused for A.
    """

    def __init__(self, policy: torch.nn.Module, check: Check) -> None:
        self._check = check
        self._parameters = {name: weight for name, weight in policy.named_parameters() if weight.requires_grad}
        self._before = {name: weight.detach().clone() for name, weight in self._parameters.items()}
        self._count = len(self._before)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Compare the matrices that have not moved yet; decide when all have, or when patience or the run ends."""
        if not self._before:
            return
        self._before = {name: old for name, old in self._before.items() if torch.equal(old, self._parameters[name])}
        if not self._before:
            self._check("adapter_moved", True, f"all {self._count} matrices had moved by step {state.global_step}")
        elif state.global_step >= min(PATIENCE, state.max_steps):
            self._judge(args, state)

    def _judge(self, args: TrainingArguments, state: TrainerState) -> None:
        unmoved, self._before = set(self._before), {}
        effective = state.global_step - (args.get_warmup_steps(state.max_steps) > 0)
        too_early = {name for name in unmoved if "lora_A" in name} if effective == 1 else set()
        detail = f"{len(unmoved)} of {self._count} matrices have not moved by step {state.global_step}"
        if unmoved <= too_early:
            self._check("adapter_moved", True, f"{detail}: A follows B one step later")
        else:
            self._check("adapter_moved", False, f"{detail}, e.g. {min(unmoved - too_early)}")


class ProcessesAgree(TrainerCallback):
    """Check that all processes hold the same weights: they start alike and apply the same gradients at every step.

    Processes that fail to exchange gradients train each on its own rows, and what is saved has seen only a part.
    """

    def __init__(self, policy: torch.nn.Module, check: Check) -> None:
        self._weights = [weight for weight in policy.parameters() if weight.requires_grad]
        self._check = check

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Compare after the first step, and after the last."""
        if args.world_size == 1 or state.global_step not in (1, state.max_steps):
            return
        total = sum(weight.detach().double().abs().sum() for weight in self._weights)
        totals = gather(torch.as_tensor(total, device=args.device).reshape(1)).tolist()
        detail = f"{len(totals)} processes, weights {totals[0]:.6f} at step {state.global_step}"
        self._check("processes_agree", len(totals) == args.world_size and len(set(totals)) == 1, detail)


class StepReport(TrainerCallback):
    """Progress, a log line for the last step as for the first, no checkpoint after the last, and a stop at NaN."""

    def __init__(self, description: str, check: Check) -> None:
        self._description = description
        self._check = check
        self._bar: Iterator[int] = iter(())

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Start the progress display at the step that the run continues from."""
        self._bar = progress(range(state.global_step, state.max_steps), self._description)
        next(self._bar, None)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Advance the display; ask for a log line, and for no checkpoint, at the last step."""
        next(self._bar, None)
        if state.global_step >= state.max_steps:
            control.should_log = True
            control.should_save = False

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Stop when the loss is no number any more: nothing that follows could be used."""
        loss = (logs or {}).get("loss", 0.0)
        if not math.isfinite(loss):
            self._check("finite_loss", False, f"loss is {loss} at step {state.global_step}; lower train.learning_rate")


class SealCheckpoints(TrainerCallback):
    """Seal each checkpoint once it is whole."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Hash the files of the checkpoint that was just written; every process has written its random state to it."""
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            seal(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")
