"""GGUF, the file format of llama.cpp, Ollama and LM Studio: written from a checkpoint folder, one tensor at a time.

Memory: the largest tensor in float32 (2.5 GB for the embedding of a Qwen of 7B), whatever the size of the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from alignkit.core.errors import UserError
from alignkit.models.gguf_tokenizer import describe_tokenizer
from alignkit.models.gguf_types import GGUFType

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ARCHITECTURES = {"qwen2": "qwen2", "qwen3": "qwen3", "llama": "llama", "mistral": "llama"}
"""`model_type` of a checkpoint -> architecture in GGUF."""

Array = NDArray[Any]


def check_gguf(config: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `UserError`, before anything is merged, for a model that cannot be written as GGUF."""
    if config.model_type not in ARCHITECTURES:
        raise UserError(
            f"formats: gguf is not written for the architecture {config.model_type!r}, only for "
            f"{', '.join(ARCHITECTURES)}. Leave gguf out and use llama.cpp's convert_hf_to_gguf.py on merged/."
        )
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "default":
        raise UserError(f"formats: gguf is not written for rotary positions scaled by {rope['rope_type']!r}")
    window = config.sliding_window if getattr(config, "use_sliding_window", True) else None
    if window and window < config.max_position_embeddings:
        raise UserError(f"formats: gguf is not written for attention that slides (over {window} tokens)")
    describe_tokenizer(tokenizer, config.vocab_size)


def write_gguf(checkpoint: Path, tokenizer: PreTrainedTokenizerBase, path: Path, kind: GGUFType, name: str) -> None:
    """Write the checkpoint in a folder to a GGUF file. Raises `UserError` for what `check_gguf` refuses."""
    import gguf
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(checkpoint)
    check_gguf(config, tokenizer)
    architecture = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(path, architecture)
    try:
        writer.add_name(name)
        writer.add_file_type(_file_type(kind))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _add_shape(writer, config)
        _add_tokenizer(writer, describe_tokenizer(tokenizer, config.vocab_size))
        plan = list(_plan(checkpoint, config))
        for target, source in plan:
            _announce(writer, target, _shape(source), kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for target, source in plan:
            weight = _permuted(_read(source).float().numpy(), target, config)
            writer.write_tensor_data(_encoded(weight, target, kind))
    finally:
        writer.close()


# -- what is written ---------------------------------------------------------------------------------------------------


def _add_shape(writer: Any, config: Any) -> None:
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_rope_dimension_count(head_size)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _add_tokenizer(writer: Any, entries: dict[str, Any]) -> None:
    writer.add_tokenizer_model(entries["model"])
    writer.add_tokenizer_pre(entries["pre"])
    writer.add_token_list(entries["tokens"])
    writer.add_token_types(entries["token_type"])
    writer.add_token_merges(entries["merges"])
    writer.add_eos_token_id(entries["eos_token_id"])
    writer.add_eot_token_id(entries["eot_token_id"])
    writer.add_pad_token_id(entries["padding_token_id"])
    if "bos_token_id" in entries:
        writer.add_bos_token_id(entries["bos_token_id"])
    writer.add_add_bos_token(entries["add_bos_token"])
    writer.add_chat_template(entries["chat_template"])


Source = tuple[Path, str]
"""A safetensors file and a tensor's name in it."""


def _plan(checkpoint: Path, config: Any) -> Iterator[tuple[str, Source]]:
    """GGUF name and source of every tensor, embedding first, then layer by layer."""
    import gguf
    from safetensors import safe_open

    architecture = next(
        key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == ARCHITECTURES[config.model_type]
    )
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    found: dict[str, Source] = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for source in tensors.keys():  # noqa: SIM118 (not a dictionary)
                target = names.get_name(source, try_suffixes=(".weight", ".bias"))
                if target is None:
                    raise UserError(f"{file}: GGUF has no place for the tensor {source} in {config.model_type}")
                found[target] = (file, source)
    if config.tie_word_embeddings:
        found.pop("output.weight", None)  # read as the embedding again
    yield from sorted(found.items(), key=lambda entry: _order(entry[0]))


def _order(name: str) -> tuple[int, int, str]:
    """Embedding, blocks by number, the rest."""
    block = int(name.split(".")[1]) if name.startswith("blk.") else 0
    return (0 if name.startswith("token_embd") else 1 if name.startswith("blk.") else 2, block, name)


def _shape(source: Source) -> list[int]:
    from safetensors import safe_open

    with safe_open(source[0], framework="pt") as tensors:
        shape: list[int] = tensors.get_slice(source[1]).get_shape()
    return shape


def _read(source: Source) -> torch.Tensor:
    from safetensors import safe_open

    with safe_open(source[0], framework="pt") as tensors:
        tensor: torch.Tensor = tensors.get_tensor(source[1])
    return tensor


def _permuted(weight: Array, name: str, config: Any) -> Array:
    """Rows of q and k as llama.cpp's `llama` wants them; other tensors and architectures as they are.

    There rotary positions turn neighbouring rows (2i, 2i+1) of a head, in transformers rows i and i + half.
    """
    if ARCHITECTURES[config.model_type] != "llama" or not any(part in name for part in (".attn_q.", ".attn_k.")):
        return weight
    heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


# -- how it is stored --------------------------------------------------------------------------------------------------


def _stored_as(shape: list[int] | tuple[int, ...], kind: GGUFType) -> GGUFType:
    """Vectors are f32; rows that do not fill blocks of 32 are f16 where q8_0 was asked for, as in llama.cpp."""
    if len(shape) == 1:
        return GGUFType.f32
    return GGUFType.f16 if kind is GGUFType.q8_0 and shape[-1] % 32 else kind


def _announce(writer: Any, name: str, shape: list[int], kind: GGUFType) -> None:
    """Say which tensor comes; all are announced before the first is written."""
    import gguf

    stored = gguf.GGMLQuantizationType[_stored_as(shape, kind).value]
    bytes_shape = gguf.quant_shape_to_byte_shape(shape, stored)
    writer.add_tensor_info(name, bytes_shape, np.dtype(np.uint8), int(np.prod(bytes_shape)), raw_dtype=stored)


def _encoded(weight: Array, name: str, kind: GGUFType) -> Array:
    import gguf

    stored = gguf.GGMLQuantizationType[_stored_as(weight.shape, kind).value]
    with np.errstate(over="ignore"):  # said below
        encoded: Array = gguf.quantize(weight, stored)
    if stored is gguf.GGMLQuantizationType.F16 and not np.isfinite(encoded).all():
        raise UserError(f"gguf_types: {name} has weights beyond what f16 can hold; write bf16 instead")
    return encoded


def _file_type(kind: GGUFType) -> int:
    import gguf

    return int(gguf.LlamaFileType["ALL_F32" if kind is GGUFType.f32 else f"MOSTLY_{kind.value}"])
