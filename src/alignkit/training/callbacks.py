"""What happens during training beside it: progress, logging, checkpoints, and the checks of the first steps."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from alignkit.training.checkpoints import newest_intact, seal
from alignkit.training.display import Display
from alignkit.training.distributed import own_part, trained_weights

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
        self._policy = policy
        self._check = check
        self._before = trained_weights(policy)
        self._count = len(self._before)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Compare the matrices that have not moved yet; decide when all have, or when patience or the run ends."""
        if not self._before:
            return
        self._forget_moved(state)
        if self._before and state.global_step >= min(PATIENCE, state.max_steps):
            self._judge(args, state)

    def judge(self, args: TrainingArguments, state: TrainerState) -> None:
        """Decide now, if that has not been done yet."""
        if self._before:
            self._forget_moved(state)
        if self._before:
            self._judge(args, state)

    def _forget_moved(self, state: TrainerState) -> None:
        now = trained_weights(self._policy)
        self._before = {name: old for name, old in self._before.items() if torch.equal(old, now[name])}
        if not self._before:
            self._check("adapter_moved", True, f"all {self._count} matrices had moved by step {state.global_step}")

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
    """Progress, a log line for the last step as for the first, no checkpoint after the last, and a stop at NaN.

    `tokens` are those of each optimizer step of the run, of all processes together, padding not counted.
    """

    def __init__(
        self, description: str, check: Check, tokens: Sequence[int] = (), divergence: float | None = None
    ) -> None:
        self._description = description
        self._check = check
        self._tokens = tokens
        self._divergence = divergence
        self._display: Display | None = None
        self._done = self._seconds = self._began = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens learned from a second, what happens between steps (logs, checkpoints, evaluations) not counted."""
        return self._done / self._seconds if self._seconds else 0.0

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Start the progress display at the step that the run continues from."""
        if state.is_world_process_zero:
            self._display = Display(self._description, state.global_step, state.max_steps)

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Start the clock."""
        self._began = time.monotonic()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Advance the display; ask for a log line, and for no checkpoint, at the last step."""
        self._seconds += time.monotonic() - self._began
        self._done += self._tokens[state.global_step - 1] if self._tokens else 0
        if self._display is not None:
            self._display.advance(state.global_step, self.tokens_per_second)
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
        """Stop when the loss is no number any more, or far above the first: nothing that follows could be used."""
        loss = (logs or {}).get("loss")
        if loss is None:
            return
        if self._display is not None:
            self._display.note_loss(loss)
        first = next((entry["loss"] for entry in state.log_history if "loss" in entry), loss)
        if not math.isfinite(loss):
            stop("finite_loss", f"loss is {loss} at step {state.global_step}", SLOWER, args, self._check)
        elif self._divergence is not None and loss > self._divergence * first:
            said = f"loss is {loss:.4f} at step {state.global_step}, {loss / first:.1f} times the first"
            stop("no_divergence", said, SLOWER, args, self._check)

    def close(self) -> None:
        """Take the display away."""
        if self._display is not None:
            self._display.close()


SLOWER = "lower train.learning_rate"


def stop(name: str, said: str, remedy: str, args: TrainingArguments, check: Check) -> None:
    """Fail the check `name`, which ends the training, and name the last checkpoint that is still good."""
    good = newest_intact(Path(str(args.output_dir)))
    where = "no checkpoint was written before" if good is None else f"the last good checkpoint is {good}"
    check(name, False, f"{said}; {remedy} ({where})")


class SealCheckpoints(TrainerCallback):
    """Seal each checkpoint once it is whole, if its weights are numbers.

    Its adapter names the base as the configuration does, `base`, so that a training can be started from a checkpoint.
    """

    def __init__(self, policy: torch.nn.Module, check: Check, base: str) -> None:
        self._policy = policy
        self._check = check
        self._base = base

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Name the base, and hash the files of the checkpoint that was just written.

        Every process has written its random state to it by then, and the main one does the rest.
        """
        require_finite(self._policy, self._check, f"step {state.global_step}")
        PartialState().wait_for_everyone()
        if not state.is_world_process_zero:
            return
        checkpoint = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if (adapter := checkpoint / "adapter_config.json").exists():
            config = json.loads(adapter.read_text(encoding="utf-8")) | {"base_model_name_or_path": self._base}
            adapter.write_text(json.dumps(config, indent=1), encoding="utf-8")
        seal(checkpoint)


def require_finite(policy: torch.nn.Module, check: Check, when: str) -> None:
    """Fail a check when a trainable weight is no number: a step can spoil weights after its own loss was fine.

    Of a weight that is divided each process looks at its part.
    """
    for name, weight in policy.named_parameters():
        if weight.requires_grad and not bool(torch.isfinite(own_part(weight)).all()):
            check("finite_weights", False, f"{name} is no longer finite at {when}; lower train.learning_rate")
