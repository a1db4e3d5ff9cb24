"""alignkit: from a few dozen seed questions to an aligned adapter, with proof at every step.

Names are imported when they are first used (PEP 562), so `import alignkit` costs next to nothing and imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alignkit.core.app import load_config, run_stage
    from alignkit.core.artifact import Artifact
    from alignkit.core.errors import UserError
    from alignkit.core.records import ChatExample, Completion, CompletionSet, Message, PreferencePair, QAExample
    from alignkit.generation.hf import HFGenerator
    from alignkit.models.reward_model import RewardModel
    from alignkit.scoring.judge import JudgeScorer
    from alignkit.scoring.reward import RewardScorer
    from alignkit.teacher.client import Teacher, open_teacher

_HOME = {
    "Artifact": "core.artifact",
    "ChatExample": "core.records",
    "Completion": "core.records",
    "CompletionSet": "core.records",
    "HFGenerator": "generation.hf",
    "JudgeScorer": "scoring.judge",
    "Message": "core.records",
    "PreferencePair": "core.records",
    "QAExample": "core.records",
    "RewardModel": "models.reward_model",
    "RewardScorer": "scoring.reward",
    "Teacher": "teacher.client",
    "UserError": "core.errors",
    "load_config": "core.app",
    "open_teacher": "teacher.client",
    "run_stage": "core.app",
}
"""Where each public name is defined."""

__all__ = [
    "Artifact",
    "ChatExample",
    "Completion",
    "CompletionSet",
    "HFGenerator",
    "JudgeScorer",
    "Message",
    "PreferencePair",
    "QAExample",
    "RewardModel",
    "RewardScorer",
    "Teacher",
    "UserError",
    "load_config",
    "open_teacher",
    "run_stage",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            value: Any = version("alignkit")
        except PackageNotFoundError:  # a clone on the path
            value = "not installed"
    elif name in _HOME:
        value = getattr(importlib.import_module(f"alignkit.{_HOME[name]}"), name)
    else:
        raise AttributeError(f"module 'alignkit' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
