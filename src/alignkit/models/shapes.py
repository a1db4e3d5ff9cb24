"""The shape of a decoder: how many numbers of which size, without loading any of them.

Shapes of the models that ship in conf/model are known here, so that an estimate needs no network; those of any other
model are read from its config.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from alignkit.core.config import ModelConfig
from alignkit.core.errors import UserError

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Shape:
    """A decoder of the Llama kind: attention with grouped queries, then a gated MLP, `layers` times."""

    vocabulary: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    head_dim: int
    tied: bool = False
    """Whether the output layer is the input embedding."""
    context: int | None = None
    """Longest sequence, in tokens, that the model was made for; None when it does not say."""

    @property
    def query_width(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of all key heads together, and of all value heads."""
        return self.kv_heads * self.head_dim

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of each linear layer of one decoder layer."""
        hidden, query, kv, inner = self.hidden, self.query_width, self.kv_width, self.intermediate
        return {
            "q_proj": (hidden, query),
            "k_proj": (hidden, kv),
            "v_proj": (hidden, kv),
            "o_proj": (query, hidden),
            "gate_proj": (hidden, inner),
            "up_proj": (hidden, inner),
            "down_proj": (inner, hidden),
        }

    @property
    def linear_parameters(self) -> int:
        """Weights of the linear layers, which are what 4-bit quantisation holds: L (2 H Q + 2 H K + 3 H I)."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.projections.values())

    @property
    def vocabulary_parameters(self) -> int:
        """Weights of the input embedding, V H; the output layer has as many unless it is tied."""
        return self.vocabulary * self.hidden

    def targeted(self, targets: Sequence[str]) -> list[tuple[int, int]]:
        """Inputs and outputs of those linear layers of a decoder layer that an adapter is put on."""
        names = ALL_LINEAR if list(targets) == ["all-linear"] else targets
        return [size for name, size in self.projections.items() if name in names]

    def adapter_parameters(self, rank: int, targets: Sequence[str]) -> int:
        """Weights of a low-rank adapter: rank (inputs + outputs) for each layer that it is put on."""
        return self.layers * rank * sum(inputs + outputs for inputs, outputs in self.targeted(targets))


KNOWN = {
    "Qwen/Qwen-7B-Chat": Shape(151936, 4096, 32, 32, 32, 11008, 128, context=8192),
    "Qwen/Qwen-1_8B-Chat": Shape(151936, 2048, 24, 16, 16, 5504, 128, context=8192),
    "Qwen/Qwen2.5-7B-Instruct": Shape(152064, 3584, 28, 28, 4, 18944, 128, context=32768),
    "Qwen/Qwen3-8B": Shape(151936, 4096, 36, 32, 8, 12288, 128, context=40960),
    "mistralai/Mistral-7B-Instruct-v0.3": Shape(32768, 4096, 32, 32, 8, 14336, 128, context=32768),
    "meta-llama/Meta-Llama-3-8B-Instruct": Shape(128256, 4096, 32, 32, 8, 14336, 128, context=8192),
}
"""By hub name. Qwen-7B-Chat's first revision ends at 2,048 tokens, which loading it finds out."""


def shape_of(model: ModelConfig) -> Shape:
    """The shape of a model: of a local folder by its config.json, of a shipped option from `KNOWN`, else from the hub.

    Raises `UserError` when there is nothing to read, or a model of another kind.
    """
    folder = Path(__file__).resolve().parent / "tiny" / "weights" if model.path == "embedded" else Path(model.path)
    if (folder / "config.json").is_file():
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{folder / 'config.json'}: not JSON ({error})") from error
        return shape_from_config(config, model.path)
    if model.path in KNOWN:
        return KNOWN[model.path]
    return _shape_on_hub(model.path, model.revision)


@cache
def _shape_on_hub(path: str, revision: str | None) -> Shape:
    from transformers import PreTrainedConfig

    try:
        config, _ = PreTrainedConfig.get_config_dict(path, revision=revision)
    except (OSError, ValueError) as error:
        raise UserError(f"model.path={path}: its config.json cannot be read, so its shape is unknown") from error
    return shape_from_config(config, path)


def shape_from_config(config: Mapping[str, Any], path: str) -> Shape:
    """The shape that a config.json describes; the first Qwen models (`model_type: qwen`) have field names of their own.

    Raises `UserError` for a model that is not of the Llama kind.
    """
    first_qwen = config.get("model_type") == "qwen"
    text = dict(config.get("text_config", {})) | dict(config)
    renamed = {
        "hidden_size": ("hidden_size", "n_embd"),
        "layers": ("num_hidden_layers", "n_layer"),
        "heads": ("num_attention_heads", "n_head"),
        "intermediate": ("intermediate_size", "ffn_hidden_size"),
        "vocabulary": ("padded_vocab_size", "vocab_size") if first_qwen else ("vocab_size",),
        "context": ("seq_length",) if first_qwen else ("max_position_embeddings",),
    }
    found = {name: next((text[key] for key in keys if key in text), None) for name, keys in renamed.items()}
    missing = [name for name in ("hidden_size", "layers", "heads", "intermediate", "vocabulary") if not found[name]]
    if missing or "num_experts" in text or "num_local_experts" in text:
        raise UserError(f"{path}: not a decoder whose memory can be estimated ({', '.join(missing) or 'experts'})")
    hidden, heads = int(found["hidden_size"]), int(found["heads"])  # type: ignore[arg-type]
    return Shape(
        vocabulary=int(found["vocabulary"]),  # type: ignore[arg-type]
        hidden=hidden,
        layers=int(found["layers"]),  # type: ignore[arg-type]
        heads=heads,
        kv_heads=int(text.get("num_key_value_heads") or heads),
        intermediate=int(found["intermediate"]) // (2 if first_qwen else 1),  # type: ignore[arg-type]
        head_dim=int(text.get("head_dim") or hidden // heads),
        tied=bool(text.get("tie_word_embeddings", False)),
        context=found["context"],
    )
