"""The reward model: a base, a LoRA adapter and a value head that say how good an answer is. Higher is better.

    from alignkit import RewardModel
    RewardModel.from_pretrained("runs/demo/reward").score([{"messages": [...]}])

Importing this module loads no torch and no pydantic, so `from alignkit import RewardModel` is quick.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from statistics import pstdev
from typing import TYPE_CHECKING, Any

from alignkit.core.config import ModelConfig, Quantization
from alignkit.core.errors import UserError
from alignkit.core.manifest import to_plain
from alignkit.core.progress import progress

if TYPE_CHECKING:
    from alignkit.core.records import Message
    from alignkit.models.value_head import PromptGroup, ValueHeadModel

CONFIG_FILE = "reward_config.json"
HEAD_FILE = "value_head.safetensors"
ADAPTER_FOLDER = "adapter"

CPU_BATCH_TOKENS, GPU_BATCH_TOKENS = 1024, 4096
"""Tokens in one forward pass of scoring, padding included: a CPU is fastest while they fit its cache."""

WINDOW = 1024
"""Rows of which those of similar length are scored together."""


class RewardModel:
    """Scores conversations that end with an answer.

    A score is (raw - `offset`) / `scale`, where raw is what the value head says at the answer's last token, its
    end-of-turn token; training chooses offset and scale so that the scores of its own answers have mean 0 and standard
    deviation 1. With several heads (an ensemble on one backbone: Osband et al., 2016, arXiv 1602.04621; Coste et al.,
    2023, arXiv 2310.02743) raw is their mean, and their standard deviation is how much they disagree.
    """

    def __init__(
        self, module: ValueHeadModel, tokenizer: Any, model: ModelConfig, *, adapter_name: str = "default"
    ) -> None:
        self.module = module
        self.tokenizer = tokenizer
        self.model = model
        self.adapter_name = adapter_name
        self.offset = 0.0
        self.scale = 1.0
        self.head_offsets = [0.0] * module.value_head.out_features
        """What each head says of an average answer: disagreement is counted from there."""

    # -- files ------------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, folder: str | Path, policy: Any = None) -> RewardModel:
        """Load a saved reward model.

        With `policy`, a model with adapters, the reward adapter is added to it under the name "reward" and the base is
        not loaded again, provided that it is the reward model's base, held alike; the policy's own adapter stays the
        active one between calls of `score`. Raises `UserError` when a file is missing or the value head is not the one
        that was saved.
        """
        from alignkit.models.loading import add_adapter, load_policy, load_tokenizer
        from alignkit.models.value_head import ValueHeadModel

        folder = Path(folder)
        entries, model = _read_config(folder)
        head = _read_head(folder, entries["value_head_sha256"])
        adapter_name = "default"
        if policy is not None and _has_base_of(folder / ADAPTER_FOLDER, policy, model):
            adapter_name = "reward"
            add_adapter(policy, str(folder / ADAPTER_FOLDER), model, adapter_name)
        else:
            policy = load_policy(model, str(folder / ADAPTER_FOLDER))
        head_offsets = entries.get("head_offsets", [0.0])
        module = ValueHeadModel(policy, heads=len(head_offsets))
        _require_fit(folder / HEAD_FILE, head, module)
        module.value_head.load_state_dict(head)
        reward_model = cls(module, load_tokenizer(model), model, adapter_name=adapter_name)
        reward_model.offset, reward_model.scale = entries["offset"], entries["scale"]
        reward_model.head_offsets = head_offsets
        return reward_model

    def save_pretrained(self, folder: str | Path) -> None:
        """Write adapter/, value_head.safetensors and reward_config.json into `folder`."""
        from safetensors.torch import save

        from alignkit.models.loading import save_adapter

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_adapter(self.module.policy, folder / ADAPTER_FOLDER, self.model)
        head = save(
            {key: value.detach().cpu().contiguous() for key, value in self.module.value_head.state_dict().items()}
        )
        (folder / HEAD_FILE).write_bytes(head)
        entries = {
            "base": to_plain(self.model),
            "value_head_sha256": hashlib.sha256(head).hexdigest(),
            "offset": self.offset,
            "scale": self.scale,
        }
        if len(self.head_offsets) > 1:
            entries["head_offsets"] = self.head_offsets
        (folder / CONFIG_FILE).write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")

    # -- scores -----------------------------------------------------------------------------------------------------

    def score(
        self,
        rows: Sequence[Mapping[str, Any] | str],
        batch_tokens: int | None = None,
        *,
        show_progress: bool = False,
    ) -> list[float]:
        """Scores of `rows` in their order; a row is a conversation that ends with the answer, in one of three forms.

        {"messages": [...]}, or {"prompt": ..., "completion": ...} with lists of messages or plain texts, or a text: the
        whole conversation as the chat template renders it, up to the end-of-turn token. Raises `UserError` with the
        row's index for a row of another form or longer than `model.max_length` tokens: nothing is cut. `batch_tokens`
        bounds a forward pass, padding included; by default by the device.
        """
        scores: list[float] = []
        found: Iterable[float | str] = self.iter_scores(rows, batch_tokens)
        if show_progress:
            found = progress(found, "scoring", total=len(rows))
        for index, score in enumerate(found):
            if isinstance(score, str):
                raise UserError(f"row {index} cannot be scored: {score}. Leave it out.")
            scores.append(score)
        return scores

    def iter_scores(
        self, rows: Iterable[Mapping[str, Any] | str], batch_tokens: int | None = None, window: int = WINDOW
    ) -> Iterator[float | str]:
        """For each of any number of rows its score, or the reason why it has none, while they are read.

        At most `window` rows are held. Those of similar length are scored together, so that a larger window pads less.
        Raises `UserError` with the row's index for a row that is of none of the forms of `score`.
        """
        from alignkit.models.conversations import read_conversation

        numbered = enumerate(rows)
        while conversations := [read_conversation(row, index) for index, row in islice(numbered, window)]:
            yield from self.scores_or_reasons(conversations, batch_tokens)

    def scores_or_reasons(
        self, conversations: Sequence[Sequence[Message] | str], batch_tokens: int | None = None
    ) -> list[float | str]:
        """For each conversation its score, or the reason why it has none; a text is a conversation already rendered.

        Equal conversations are scored once, and answers to one prompt share its computation; neither changes a score
        beyond floating-point rounding.
        """
        found = self._say(conversations, batch_tokens)
        return [each if isinstance(each, str) else self._score(each) for each in found]

    def scores_and_disagreements(
        self, conversations: Sequence[Sequence[Message] | Mapping[str, Any] | str], batch_tokens: int | None = None
    ) -> list[tuple[float, float] | str]:
        """For each conversation its score and how much the heads disagree about it, or the reason why it has none.

        A row of one of the forms of `score` is a conversation, too.
        The disagreement is the standard deviation of the heads' own scores (each head is 0 for an average answer), in
        the unit of the score. Raises `UserError` for a reward model with a single head.
        """
        if len(self.head_offsets) == 1:
            raise UserError(
                "this reward model has one head, and so no disagreement: train one with several (reward heads=4), or "
                "do without it"
            )
        from alignkit.models.conversations import read_conversation

        read = [
            read_conversation(each, index) if isinstance(each, Mapping) else each
            for index, each in enumerate(conversations)
        ]
        found = self._say(read, batch_tokens)
        return [each if isinstance(each, str) else (self._score(each), self._disagreement(each)) for each in found]

    def raw_scores(self, groups: Sequence[PromptGroup], batch_tokens: int | None = None) -> list[list[float]]:
        """What the heads say on average of every answer of every group, before offset and scale."""
        return [[_mean(answer) for answer in group] for group in self.head_scores(groups, batch_tokens)]

    def head_scores(self, groups: Sequence[PromptGroup], batch_tokens: int | None = None) -> list[list[list[float]]]:
        """What each head says of every answer of every group."""
        import torch

        from alignkit.models.value_head import batches, collate

        parts = [(index, part) for index, group in enumerate(groups) for part in group.split(self.model.max_length)]
        by_length = sorted(range(len(parts)), key=lambda place: len(parts[place][1]))
        found: dict[int, list[list[float]]] = {}
        device = self.module.value_head.weight.device
        limit = batch_tokens or (CPU_BATCH_TOKENS if device.type == "cpu" else GPU_BATCH_TOKENS)
        self.module.eval()
        with torch.inference_mode(), self._active():
            for batch in batches(by_length, [len(part) for _, part in parts], limit):
                inputs = collate([parts[place][1] for place in batch], self.tokenizer.pad_token_id)
                values = iter(self.module(**{key: value.to(device) for key, value in inputs.items()}).tolist())
                for place in batch:
                    found[place] = [next(values) for _ in parts[place][1].answers]
        scores: list[list[list[float]]] = [[] for _ in groups]
        for place, (index, _) in enumerate(parts):
            scores[index] += found[place]
        return scores

    def balance_heads(self, scores: Sequence[Sequence[float]]) -> None:
        """Scale each head so that these answers, given with what each head says of them, get one standard deviation.

        Without it a head whose numbers are large would outvote the others in their mean. The common deviation is the
        mean of the heads' own, so that differences of raw scores remain the logits that the heads were trained to. A
        single head is left as it is: `centre` does the rest.
        """
        if len(self.head_offsets) == 1:
            return
        moments = [_moments(values) for values in zip(*scores, strict=True)]
        common = _mean([deviation for _, deviation in moments])
        for head, (mean, deviation) in enumerate(moments):
            self.module.value_head.weight.data[head] *= common / deviation
            self.head_offsets[head] = mean * common / deviation

    def centre(self, raw: Sequence[float]) -> None:
        """Set offset and scale so that these raw scores get mean 0 and, unless all equal, standard deviation 1."""
        self.offset, self.scale = _moments(raw)

    def _score(self, heads: Sequence[float]) -> float:
        return (_mean(heads) - self.offset) / self.scale

    def _disagreement(self, heads: Sequence[float]) -> float:
        return pstdev(value - offset for value, offset in zip(heads, self.head_offsets, strict=True)) / self.scale

    def _say(
        self, conversations: Sequence[Sequence[Message] | str], batch_tokens: int | None
    ) -> list[list[float] | str]:
        """What each head says of each conversation, or the reason why nothing can be said."""
        from alignkit.models.conversations import group_by_prompt

        groups, owners, reasons = group_by_prompt(self.tokenizer, conversations, self.model.max_length)
        found: list[list[float] | str] = [reasons.get(index, "") for index in range(len(conversations))]
        for group_owners, scores in zip(owners, self.head_scores(groups, batch_tokens), strict=True):
            for same, heads in zip(group_owners, scores, strict=True):
                for index in same:
                    found[index] = heads
        return found

    @contextmanager
    def _active(self) -> Iterator[None]:
        """Our adapter active, and afterwards the one that was."""
        policy = self.module.policy
        previous = getattr(policy, "active_adapter", self.adapter_name)
        if previous == self.adapter_name:
            yield
            return
        policy.set_adapter(self.adapter_name)
        try:
            yield
        finally:
            policy.set_adapter(previous)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _moments(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation; 1 for the latter where all values are equal, as there is nothing to divide by."""
    mean = _mean(values)
    variance = sum((value - mean) ** 2 for value in values) / len(values)
    return mean, variance**0.5 if variance > 0 else 1.0


def _has_base_of(adapter: Path, policy: Any, model: ModelConfig) -> bool:
    """Whether `policy` has adapters over the very base, in the same precision, that `adapter` was trained on."""
    from peft import PeftModel

    from alignkit.models.loading import BASE_RECORD, base_fingerprint, resolve_dtype

    record = adapter / BASE_RECORD
    if not isinstance(policy, PeftModel) or not record.exists() or policy.dtype != resolve_dtype(model.dtype):
        return False
    base = policy.get_base_model()
    in_4_bits = bool(getattr(base, "is_loaded_in_4bit", False))
    same_weights = json.loads(record.read_text(encoding="utf-8"))["fingerprint"] == base_fingerprint(base)
    return bool(same_weights and in_4_bits == (model.quantization is Quantization.nf4))


def _read_config(folder: Path) -> tuple[dict[str, Any], ModelConfig]:
    path = folder / CONFIG_FILE
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder. Give the run folder of the reward stage.")
    if not path.exists():
        raise UserError(
            f"{folder}: not a reward model ({CONFIG_FILE} is missing). Give the run folder of the reward stage."
        )
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        base = dict(entries["base"], quantization=Quantization[entries["base"]["quantization"]])
        _ = entries["value_head_sha256"], float(entries["offset"]), float(entries["scale"])
        _ = [float(offset) for offset in entries.get("head_offsets", [0.0])]
        return entries, ModelConfig(**base)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({type(error).__name__}: {error}). Run the reward stage again.") from error


def _read_head(folder: Path, sha256: str) -> dict[str, Any]:
    """The value head's tensors; `UserError` when the file is missing or is not the one the config names."""
    from safetensors.torch import load

    path = folder / HEAD_FILE
    if not path.exists():
        raise UserError(
            f"{path}: the value head is missing, and without it no score means anything. Train again or copy it."
        )
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise UserError(
            f"{path}: not the value head that {CONFIG_FILE} names (its hash differs). Train again or copy it."
        )
    return load(content)


def _require_fit(path: Path, head: Mapping[str, Any], module: ValueHeadModel) -> None:
    """Raise `UserError` when the value head that was read has not the shape of the model's."""
    expected = module.value_head.weight.shape
    found = head["weight"].shape if "weight" in head else None
    if found != expected:
        raise UserError(
            f"{path}: holds {'no weight' if found is None else f'{found[0]} heads for {found[1]} hidden values'}, but "
            f"the base and {CONFIG_FILE} want {expected[0]} for {expected[1]}. It is the head of another reward model: "
            "copy the run folder whole, or train again."
        )
