"""The weights of the first Qwen models: what they are called in Qwen2, their configuration, and reading them.

Nothing here reads more than one tensor into memory, and nothing unpickles more than tensors.
"""

from __future__ import annotations

import json
import math
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from alignkit.core.errors import UserError

INDEX = "model.safetensors.index.json"
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""Types that weights may have, and their names in safetensors files."""

_SOURCES = (INDEX, "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")


# -- configuration -----------------------------------------------------------------------------------------------------

# What the mapping rests on. No published configuration has another value; one that does is another architecture.
_FIXED: dict[str, Any] = {
    "activation": "swiglu",
    "apply_residual_connection_post_layernorm": False,
    "no_bias": True,
    "pos_emb": "rotary",
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "tie_word_embeddings": False,
    "quantization_config": None,
}


def qwen2_config(file: Path) -> dict[str, Any]:
    """The Qwen2 configuration that a first-Qwen `config.json` amounts to; old and new key names."""
    config = read_json(file)

    def value(*names: str) -> Any:
        for name in names:
            if config.get(name) is not None:
                return config[name]
        raise UserError(f"{file}: {' or '.join(names)} is missing, so the model cannot be mapped to Qwen2.")

    if config.get("model_type") != "qwen":
        raise UserError(f"{file}: model_type is {config.get('model_type')!r}, only 'qwen' is converted.")
    for name, fixed in _FIXED.items():
        if config.get(name, fixed) != fixed:
            raise UserError(f"{file}: {name}={config[name]!r} has no counterpart in Qwen2; only {fixed!r} has.")
    hidden, heads = value("hidden_size", "n_embd"), value("num_attention_heads", "n_head")
    if hidden != heads * config.get("kv_channels", hidden // heads):
        raise UserError(f"{file}: kv_channels times the number of heads is not the hidden size {hidden}.")
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": value("padded_vocab_size", "vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": value("intermediate_size", "ffn_hidden_size") // 2,  # there gate and up count together
        "num_hidden_layers": value("num_hidden_layers", "n_layer"),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "hidden_act": "silu",
        "rms_norm_eps": value("layer_norm_epsilon"),
        "rope_theta": float(value("rotary_emb_base")),
        "max_position_embeddings": value("seq_length"),
        "attention_dropout": config.get("attn_dropout_prob", config.get("attn_pdrop", 0.0)),
        "initializer_range": config.get("initializer_range", 0.02),
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "use_cache": True,
    }


# -- names and shapes --------------------------------------------------------------------------------------------------

_OUTSIDE_LAYERS = {
    "transformer.wte.weight": "model.embed_tokens.weight",
    "transformer.ln_f.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
_IN_LAYER = {  # several names: the matrix is split along its rows
    "ln_1.weight": ("input_layernorm.weight",),
    "attn.c_attn.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "attn.c_attn.bias": ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
    "attn.c_proj.weight": ("self_attn.o_proj.weight",),
    "ln_2.weight": ("post_attention_layernorm.weight",),
    "mlp.w2.weight": ("mlp.gate_proj.weight",),  # w1(x) * silu(w2(x))
    "mlp.w1.weight": ("mlp.up_proj.weight",),
    "mlp.c_proj.weight": ("mlp.down_proj.weight",),
}
_RECOMPUTED = re.compile(r"transformer\.(h\.\d+\.attn\.)?(rotary_emb\.inv_freq|masked_bias|bias|logn_tensor)")
"""Tables that some revisions saved with the weights; Qwen2 computes them from the configuration."""


def _target_names(name: str) -> tuple[str, ...] | None:
    """What a tensor is called in Qwen2, one name or three; none when it is recomputed; None when it is unknown."""
    if name in _OUTSIDE_LAYERS:
        return (_OUTSIDE_LAYERS[name],)
    match = re.fullmatch(r"transformer\.h\.(\d+)\.(.+)", name)
    if match and match[2] in _IN_LAYER:
        return tuple(f"model.layers.{match[1]}.{part}" for part in _IN_LAYER[match[2]])
    return () if _RECOMPUTED.fullmatch(name) else None


def _expected_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of the Qwen2 model with its shape."""
    vocabulary, hidden, inner = config["vocab_size"], config["hidden_size"], config["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocabulary, hidden),
    }
    for layer in range(config["num_hidden_layers"]):
        start = f"model.layers.{layer}."
        shapes |= {f"{start}{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{start}self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        shapes |= {f"{start}self_attn.{name}_proj.bias": (hidden,) for name in "qkv"}
        shapes |= {f"{start}mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        shapes[f"{start}mlp.down_proj.weight"] = (hidden, inner)
    return shapes


# -- the plan ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """One tensor of the source and what becomes of it: its parts along the rows, in order."""

    source: str
    names: tuple[str, ...]
    dtype: torch.dtype
    shape: tuple[int, ...]
    """Of each part."""

    @property
    def part_bytes(self) -> int:
        """Size of each part."""
        return math.prod(self.shape) * self.dtype.itemsize


def plan_conversion(source: Path, config: dict[str, Any]) -> dict[str, list[Piece]]:
    """For each weight file its tensors and what becomes of them. Raises `UserError` unless all of Qwen2 is there."""
    expected = _expected_shapes(config)
    plan: dict[str, list[Piece]] = {}
    place: dict[str, str] = {}
    unknown = []
    for file in weight_files(source):
        for name, tensor in sorted(_tensors(source / file).items()):
            names = _target_names(name)
            if names is None or any(part not in expected for part in names):
                unknown.append(name)
            elif names:
                if tensor.dtype not in DTYPES or tensor.shape != _joined([expected[part] for part in names]):
                    what = f"{tensor.dtype} {list(tensor.shape)}"
                    raise UserError(f"{source / file}: {name} is {what}, which does not fit config.json.")
                if names[0] in place:
                    raise UserError(f"{source / file}: {name} is also in {place[names[0]]}. Remove one of the files.")
                place |= dict.fromkeys(names, file)
                plan.setdefault(file, []).append(Piece(name, names, tensor.dtype, expected[names[0]]))
    missing = sorted(expected.keys() - place.keys())
    for wrong, what in ((unknown, "have no place in Qwen2"), (missing, "that Qwen2 needs are missing")):
        if wrong:
            listed = ", ".join(wrong[:3]) + (", ..." if len(wrong) > 3 else "")
            raise UserError(f"{source}: {len(wrong)} tensors {what}: {listed}. Only whole first-Qwen models convert.")
    # wide types first keeps every tensor aligned in its file
    return {file: sorted(pieces, key=lambda piece: -piece.dtype.itemsize) for file, pieces in plan.items()}


def _joined(shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of equal parts put together along the rows."""
    return (len(shapes) * shapes[0][0], *shapes[0][1:])


# -- files -------------------------------------------------------------------------------------------------------------


def weight_files(source: Path) -> list[str]:
    """Names of the files that hold the weights: of the first of the four usual layouts that is there."""
    found = next((name for name in _SOURCES if (source / name).is_file()), None)
    if found is None:
        raise UserError(f"{source}: no weights there; expected one of {', '.join(_SOURCES)}.")
    if not found.endswith(".index.json"):
        return [found]
    weight_map = read_json(source / found).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{source / found}: has no weight_map. Download it again.")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or not (source / name).is_file():
            raise UserError(f"{source / found}: names the file {name!r}, which is not there. Download it again.")
    return names


def read_tensor(file: Path, name: str) -> torch.Tensor:
    """One tensor; opening the file anew each time lets go of the pages of the one before."""
    return _tensors(file, name)[name]


def _tensors(file: Path, only: str | None = None) -> dict[str, torch.Tensor]:
    """The tensors of a file, mapped into memory and not yet read. Pickled code is never run."""
    from safetensors import SafetensorError, safe_open

    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                return {name: opened.get_tensor(name) for name in ([only] if only else opened.keys())}
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{file}: holds more than tensors; other pickled objects are never loaded.") from error
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{file}: damaged, or not a file of weights ({reason}). Download it again.") from error
    if not isinstance(loaded, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in loaded.values()):
        raise UserError(f"{file}: is not a dictionary of tensors. Not converted.")
    return loaded


def tensor_names(file: Path) -> set[str] | None:
    """Names in a safetensors file; None when it is not there or cut short."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            return set(opened.keys())
    except (SafetensorError, OSError):
        return None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; `UserError` for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object")
    return value
