"""The reward model: a base, a LoRA adapter and a value head that say how good an answer is. Higher is better.

    from alignkit import RewardModel
    RewardModel.from_pretrained("runs/demo/reward").score([{"messages": [...]}])

Importing this module loads no torch and no pydantic, so `from alignkit import RewardModel` is quick.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.core.config import ModelConfig, Quantization
from alignkit.core.errors import UserError
from alignkit.core.manifest import to_plain

if TYPE_CHECKING:
    from alignkit.core.records import Message
    from alignkit.models.value_head import PromptGroup, ValueHeadModel

CONFIG_FILE = "reward_config.json"
HEAD_FILE = "value_head.safetensors"
ADAPTER_FOLDER = "adapter"

CPU_BATCH_TOKENS, GPU_BATCH_TOKENS = 1024, 16384
"""Tokens in one forward pass of scoring, padding included: a CPU is fastest while they fit its cache."""


class RewardModel:
    """Scores conversations that end with an answer.

    A score is (raw - `offset`) / `scale`, where raw is what the value head says at the answer's last token, its
    end-of-turn token; training chooses offset and scale so that the scores of its own answers have mean 0 and standard
    deviation 1.
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

    # -- files ------------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, folder: str | Path, policy: Any = None) -> RewardModel:
        """Load a saved reward model.

        With `policy`, a model with adapters, the reward adapter is added to it under the name "reward" and the base is
        not loaded again, provided that it is the reward model's base, held alike; the policy's own adapter stays the
        active one between calls of `score`. Raises `UserError` when a file is missing or the value head is not the one
        that was saved.
        """
        from alignkit.models.loading import load_policy, load_tokenizer
        from alignkit.models.value_head import ValueHeadModel

        folder = Path(folder)
        entries, model = _read_config(folder)
        head = _read_head(folder, entries["value_head_sha256"])
        adapter_name = "default"
        if policy is not None and _has_base_of(folder / ADAPTER_FOLDER, policy, model):
            adapter_name = "reward"
            policy.load_adapter(str(folder / ADAPTER_FOLDER), adapter_name=adapter_name)
        else:
            policy = load_policy(model, str(folder / ADAPTER_FOLDER))
        module = ValueHeadModel(policy)
        module.value_head.load_state_dict(head)
        reward_model = cls(module, load_tokenizer(model), model, adapter_name=adapter_name)
        reward_model.offset, reward_model.scale = entries["offset"], entries["scale"]
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
        (folder / CONFIG_FILE).write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")

    # -- scores -----------------------------------------------------------------------------------------------------

    def score(self, rows: Sequence[Mapping[str, Any]], batch_tokens: int | None = None) -> list[float]:
        """Scores of `rows`, each {"messages": [...]} or {"prompt": ..., "completion": ...}, in their order.

        Prompt and completion are lists of messages or plain texts. Raises `UserError` with the row's index for a row of
        another form or longer than `model.max_length` tokens: nothing is cut. `batch_tokens` bounds a forward pass,
        padding included; by default by the device.
        """
        conversations = [read_conversation(row, index) for index, row in enumerate(rows)]
        scores: list[float] = []
        for index, score in enumerate(self.scores_or_reasons(conversations, batch_tokens)):
            if isinstance(score, str):
                raise UserError(f"row {index} cannot be scored: {score}. Leave it out.")
            scores.append(score)
        return scores

    def scores_or_reasons(
        self, conversations: Sequence[Sequence[Message]], batch_tokens: int | None = None
    ) -> list[float | str]:
        """For each conversation its score, or the reason why it has none.

        Equal conversations are scored once, and answers to one prompt share its computation; neither changes a score
        beyond floating-point rounding.
        """
        from alignkit.models.value_head import PromptGroup

        places: dict[tuple[str, ...], dict[str, list[int]]] = {}
        found: list[float | str] = [""] * len(conversations)
        for index, (*prompt, answer) in enumerate(conversations):
            if answer.tool_calls:
                found[index] = "the answer calls a tool"
                continue
            key = tuple(message.model_dump_json() for message in prompt)
            places.setdefault(key, {}).setdefault(answer.content, []).append(index)
        groups: list[PromptGroup] = []
        owners: list[list[list[int]]] = []
        for answers in places.values():
            indices = list(answers.values())
            before = conversations[indices[0][0]][:-1]
            prompt_ids, encoded = encode_answers(self.tokenizer, before, list(answers), self.model.max_length)
            for ids, same in zip(encoded, indices, strict=True):
                for index in same:
                    found[index] = ids if isinstance(ids, str) else found[index]
            if readable := tuple(ids for ids in encoded if not isinstance(ids, str)):
                groups.append(PromptGroup(prompt_ids, readable))
                owners.append([same for ids, same in zip(encoded, indices, strict=True) if not isinstance(ids, str)])
        for group_owners, raw in zip(owners, self.raw_scores(groups, batch_tokens), strict=True):
            for same, value in zip(group_owners, raw, strict=True):
                for index in same:
                    found[index] = (value - self.offset) / self.scale
        return found

    def raw_scores(self, groups: Sequence[PromptGroup], batch_tokens: int | None = None) -> list[list[float]]:
        """What the value head says of every answer of every group, before offset and scale."""
        import torch

        from alignkit.models.value_head import collate

        parts = [(index, part) for index, group in enumerate(groups) for part in group.split(self.model.max_length)]
        by_length = sorted(range(len(parts)), key=lambda place: len(parts[place][1]))
        found: dict[int, list[float]] = {}
        device = self.module.value_head.weight.device
        limit = batch_tokens or (CPU_BATCH_TOKENS if device.type == "cpu" else GPU_BATCH_TOKENS)
        self.module.eval()
        with torch.inference_mode(), self._active():
            for batch in _batches(by_length, [len(part) for _, part in parts], limit):
                inputs = collate([parts[place][1] for place in batch], self.tokenizer.pad_token_id)
                values = iter(self.module(**{key: value.to(device) for key, value in inputs.items()}).tolist())
                for place in batch:
                    found[place] = [next(values) for _ in parts[place][1].answers]
        scores: list[list[float]] = [[] for _ in groups]
        for place, (index, _) in enumerate(parts):
            scores[index] += found[place]
        return scores

    def centre(self, raw: Sequence[float]) -> None:
        """Set offset and scale so that these raw scores get mean 0 and, unless all equal, standard deviation 1."""
        self.offset = sum(raw) / len(raw)
        variance = sum((value - self.offset) ** 2 for value in raw) / len(raw)
        self.scale = variance**0.5 if variance > 0 else 1.0

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


def encode_answers(
    tokenizer: Any, prompt: Sequence[Message], answers: Sequence[str], max_length: int
) -> tuple[tuple[int, ...], list[tuple[int, ...] | str]]:
    """Token ids of a prompt, and of each answer with its end-of-turn token or the reason why it cannot be read."""
    from alignkit.core.records import Message
    from alignkit.data.chat import RefusedError, encode_conversation, encode_prompt, special_token_in

    try:
        prompt_ids = tuple(encode_prompt(tokenizer, prompt))
    except RefusedError as error:
        return (), [str(error)] * len(answers)
    encoded: list[tuple[int, ...] | str] = []
    for answer in answers:
        messages = [*prompt, Message(role="assistant", content=answer)]
        try:
            ids = encode_conversation(tokenizer, messages)
        except RefusedError as error:
            encoded.append(str(error))
            continue
        if special := special_token_in(tokenizer, messages):
            encoded.append(f"the text holds the special token {special}")
        elif len(ids) > max_length:
            encoded.append(f"longer than max_length ({len(ids)} of {max_length} tokens)")
        else:
            encoded.append(tuple(ids[len(prompt_ids) :]))
    return prompt_ids, encoded


def read_conversation(row: Mapping[str, Any], index: int) -> list[Message]:
    """The conversation of a row to be scored; `UserError` naming row `index` when it has not the form."""
    from pydantic import ValidationError

    try:
        if "messages" in row:
            messages = _turns(row["messages"], "user")
        else:
            messages = _turns(row["prompt"], "user") + _turns(row["completion"], "assistant")
    except (KeyError, TypeError, ValidationError) as error:
        raise UserError(
            f'row {index}: give {{"messages": [{{"role", "content"}}, ...]}} or {{"prompt", "completion"}} ({error})'
        ) from error
    if len(messages) < 2 or messages[-1].role != "assistant":
        raise UserError(f"row {index}: a conversation to score is a prompt and, at its end, an assistant's turn")
    return messages


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


def _turns(value: Any, role: str) -> list[Message]:
    """Messages, or a text as the one message of `role`."""
    from alignkit.core.records import Message

    if isinstance(value, str):
        return [Message.model_validate({"role": role, "content": value})]
    return [Message.model_validate(turn) for turn in value]


def _batches(order: Sequence[int], lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Cut `order` (by rising length) into batches whose rows, padded to the longest, hold at most `batch_tokens`."""
    batch: list[int] = []
    for place in order:
        if batch and (len(batch) + 1) * lengths[place] > batch_tokens:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def _read_config(folder: Path) -> tuple[dict[str, Any], ModelConfig]:
    path = folder / CONFIG_FILE
    if not path.exists():
        raise UserError(
            f"{folder}: not a reward model ({CONFIG_FILE} is missing). Give the run folder of the reward stage."
        )
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        base = dict(entries["base"], quantization=Quantization[entries["base"]["quantization"]])
        _ = entries["value_head_sha256"], float(entries["offset"]), float(entries["scale"])
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
