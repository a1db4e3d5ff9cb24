"""Where the figures of a training go besides loss.jsonl: TensorBoard, Weights & Biases, Trackio, MLflow, or nowhere.

TensorBoard writes into the run folder. The others are used the way transformers uses them, with their own environment
variables; only Trackio and TensorBoard keep everything on this machine.
"""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec
from typing import TYPE_CHECKING

from alignkit.core.artifact import Artifact
from alignkit.core.config import Tracker
from alignkit.core.errors import UserError

if TYPE_CHECKING:
    from transformers import TrainerCallback

EVENTS = "tensorboard"
"""Folder in the run folder. It is no output: nothing depends on it, and it holds times."""

_PROJECT = "alignkit"


def require_tracker(tracker: Tracker) -> None:
    """Raise `UserError` when the tracker's package is not installed."""
    if tracker is not Tracker.none and find_spec(tracker.name) is None:
        raise UserError(
            f"train.tracker={tracker.name}: pip install {tracker.name} (or train.tracker=none, or tensorboard)"
        )


def tracking_callbacks(tracker: Tracker, artifact: Artifact, continued_from: int) -> list[TrainerCallback]:
    """What sends a trainer's log lines to the tracker, from the process that writes.

    A training that begins anew forgets the events of the last.
    """
    require_tracker(tracker)
    if tracker is Tracker.none or not artifact.writes:
        return []
    if tracker is Tracker.tensorboard:
        return [_tensorboard(artifact, continued_from)]
    from transformers.integrations.integration_utils import get_reporting_integration_callbacks

    os.environ.setdefault("WANDB_PROJECT", _PROJECT)
    os.environ.setdefault("MLFLOW_EXPERIMENT_NAME", _PROJECT)
    return [kind() for kind in get_reporting_integration_callbacks([tracker.name])]


def _tensorboard(artifact: Artifact, continued_from: int) -> TrainerCallback:
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations.integration_utils import TensorBoardCallback

    folder = artifact.folder / EVENTS
    if not continued_from:
        shutil.rmtree(folder, ignore_errors=True)
    return TensorBoardCallback(SummaryWriter(str(folder), purge_step=continued_from + 1 if continued_from else None))
