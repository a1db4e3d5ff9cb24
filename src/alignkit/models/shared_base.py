"""One base in memory under several adapters, each of which answers as a model of its own."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.core.config import ModelConfig
from alignkit.core.errors import UserError
from alignkit.core.manifest import MANIFEST, read_manifest
from alignkit.core.names import check_names
from alignkit.models.loading import ADAPTER_CONFIG, add_adapter, check_adapter, load_policy, load_tokenizer
from alignkit.models.reward_model import CONFIG_FILE

if TYPE_CHECKING:
    from alignkit.models.reward_model import RewardModel

LOG = logging.getLogger("alignkit")

_WITHOUT_ADAPTER_OF_THEIR_OWN = ("reward", "export")
"""Stages whose adapter/ is a reward model's, or a copy of another step's."""


class SharedBase:
    """A base with adapters on it. `models` maps the names under which they answer to adapter folders, "" the base.

    Raises `UserError` for a name that no URL or log could hold, and as `load_policy` does.
    """

    def __init__(self, model: ModelConfig, models: Mapping[str, str]) -> None:
        check_names("models", models)
        for adapter in models.values():
            if adapter:
                check_adapter(adapter, model)  # all of them before anything big is loaded
        adapters = [name for name, adapter in models.items() if adapter]
        from peft.tuners.tuners_utils import BaseTunerLayer

        self.model = model
        self.tokenizer = load_tokenizer(model)
        self.policy: Any = load_policy(model, models[adapters[0]] if adapters else None)
        self._adapters: dict[str, str | None] = dict.fromkeys(models)  # of each name, what PEFT calls its adapter
        for number, name in enumerate(adapters, 1):
            self._adapters[name] = "default" if number == 1 else f"adapter-{number}"
        for name in adapters[1:]:
            self._add(models[name], str(self._adapters[name]))
        self.policy.eval()
        self._layer = next((each for each in self.policy.modules() if isinstance(each, BaseTunerLayer)), None)

    @property
    def names(self) -> list[str]:
        """The names of the models, in the order given."""
        return list(self._adapters)

    @contextmanager
    def using(self, name: str) -> Iterator[Any]:
        """The model of that name: the policy with only its adapter active, or with none. One at a time."""
        adapter = self._adapters[name]
        active = [] if adapter is None else [adapter]
        # Switching takes about half a step of a small model (`disable_adapter` two): only where it is needed
        if self._layer is not None and self._layer.active_adapters != active:
            self.policy.base_model.set_adapter(active)
        yield self.policy

    def _add(self, adapter: str, name: str) -> None:
        add_adapter(self.policy, adapter, self.model, name)

    def add_reward_model(self, folder: str) -> RewardModel:
        """A reward model as one more adapter of this base, or on a base of its own where it was trained on another."""
        from alignkit.models.reward_model import RewardModel

        reward_model = RewardModel.from_pretrained(folder, self.policy)
        if reward_model.module.policy is not self.policy:
            LOG.warning("%s: its base is not the one that is served, held alike; a second base was loaded", folder)
        return reward_model


def choose_models(models: Mapping[str, str | None], run: Path) -> dict[str, str]:
    """Name -> adapter folder of the models that are named and, where none of them has an adapter, those of the run.

    Null leaves a model out. Raises `UserError` when nothing is left.
    """
    chosen = {name: adapter for name, adapter in models.items() if adapter is not None}
    if not any(chosen.values()):
        if not run.is_dir():
            raise UserError(f"run={run.name}: no such run folder. Name the run whose adapters are wanted, or models")
        found = find_adapters(run)
        if not found:
            LOG.info("there is no adapter of a complete step in %s", run)
        chosen |= found
    if not chosen:
        raise UserError(f"models: {run} has no adapter. Name one, 'models={{name: folder}}', or leave the base in")
    return chosen


def find_adapters(run: Path) -> dict[str, str]:
    """Step -> adapter folder for each complete step of a run that trained or kept an adapter, the oldest first."""
    return {
        folder.name: str(folder / "adapter")
        for folder, stage in _complete_steps(run)
        if stage not in _WITHOUT_ADAPTER_OF_THEIR_OWN and (folder / "adapter" / ADAPTER_CONFIG).is_file()
    }


def choose_reward_model(reward: str | None, run: Path) -> str | None:
    """The folder of the reward model that is named or, where none is, the run's; `none` stands for no reward model.

    Raises `UserError` when the run has several.
    """
    if reward is not None:
        return None if reward == "none" else reward
    found = [str(folder) for folder, _ in _complete_steps(run) if (folder / CONFIG_FILE).is_file()]
    if len(found) > 1:
        raise UserError(f"reward: {run} has several reward models; name one of {', '.join(found)}, or reward=none")
    return found[0] if found else None


def _complete_steps(run: Path) -> list[tuple[Path, str]]:
    """Folder and stage of each step of a run that is complete, in the order in which they started."""
    manifests = {path.parent: read_manifest(path.parent) for path in sorted(run.glob(f"*/{MANIFEST}"))}
    complete = [(folder, each) for folder, each in manifests.items() if each and each["status"] == "complete"]
    return [(folder, str(each["stage"])) for folder, each in sorted(complete, key=lambda step: step[1]["started"])]
