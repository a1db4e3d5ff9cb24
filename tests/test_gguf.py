"""GGUF: written tensor by tensor, and read back by transformers as the same model with the same tokenizer."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exporting import ARCHITECTURES, random_model, save, tokenizer_of
from safetensors.torch import load_file, save_file
from tiny_random import tokenizer as embedded_tokenizer

from alignkit.core.errors import UserError
from alignkit.evaluation import parity
from alignkit.evaluation.parity import compare_file, conversations, load_gguf, questions, read
from alignkit.models import gguf as gguf_module
from alignkit.models.gguf import check_gguf, write_gguf
from alignkit.models.gguf_tokenizer import describe_tokenizer
from alignkit.models.gguf_types import GGUFType, gguf_type, require_gguf

gguf = pytest.importorskip("gguf")


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def findings_of(folder: Path, architecture: str, kind: GGUFType) -> tuple[dict[str, bool], dict[str, float]]:
    """Write, read back, compare: what passed, and the figures."""
    tokenizer = tokenizer_of(architecture)
    asked = questions(tokenizer, conversations(), 512)
    path = folder / f"model-{kind.name}.gguf"
    write_gguf(folder, tokenizer, path, kind, "random")
    findings, figures = compare_file(path, kind, tokenizer, asked, read(load(folder), asked, tokenizer), torch.float32)
    return {finding.name.removeprefix(f"gguf_{kind.name}_"): finding.passed for finding in findings}, figures


@pytest.fixture(autouse=True)
def _without_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is installed here and there must not decide what these tests test."""
    monkeypatch.setattr("alignkit.evaluation.llama_cpp.is_installed", lambda: False)


# -- the same model ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_f32_read_back_is_the_model(tmp_path: Path, architecture: str) -> None:
    passed, figures = findings_of(save(tmp_path / "model", architecture), architecture, GGUFType.f32)
    assert passed == dict.fromkeys(("token_ids", "chat_template", "end_of_turn", "logits", "greedy"), True)
    assert figures["max_logit_difference"] == 0
    assert figures["greedy_tokens_equal"] == 1


@pytest.mark.parametrize(
    ("kind", "most"), [(GGUFType.f16, 0.05), (GGUFType.bf16, 0.5), (GGUFType.q8_0, 1.0)], ids=lambda value: str(value)
)
def test_coarser_types_are_near_the_model_and_not_equal(tmp_path: Path, kind: GGUFType, most: float) -> None:
    passed, figures = findings_of(save(tmp_path / "model", "qwen2"), "qwen2", kind)
    assert passed["logits"], figures
    assert 0 < figures["max_logit_difference"] < most
    weights = {
        tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model" / f"model-{kind.name}.gguf").tensors
    }
    assert weights["blk.0.attn_q.weight"].tensor_type.name == kind.value
    assert weights["blk.0.attn_q.bias"].tensor_type.name == "F32"


def test_tied_embeddings_are_written_once(tmp_path: Path) -> None:
    passed, _ = findings_of(save(tmp_path / "model", "qwen2", tie_word_embeddings=True), "qwen2", GGUFType.f32)
    assert all(passed.values())
    names = {tensor.name for tensor in gguf.GGUFReader(tmp_path / "model/model-f32.gguf").tensors}
    assert "token_embd.weight" in names and "output.weight" not in names


def test_rows_that_fill_no_block_stay_f16(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", "qwen2", intermediate_size=80)
    assert findings_of(folder, "qwen2", GGUFType.q8_0)[0]["logits"]
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(folder / "model-q8_0.gguf").tensors}
    assert types["blk.0.ffn_down.weight"] == "F16"  # rows of 80
    assert types["blk.0.ffn_up.weight"] == "Q8_0"


def test_llama_rows_are_reordered_as_neighbours() -> None:
    """A head of six rows: in transformers 0 turns with 3, 1 with 4, 2 with 5; in llama.cpp neighbours turn."""

    class Config:
        model_type, num_attention_heads, num_key_value_heads = "llama", 2, 1

    queries = np.arange(12).reshape(12, 1)
    assert gguf_module._permuted(queries, "blk.0.attn_q.weight", Config).ravel().tolist() == [
        *(0, 3, 1, 4, 2, 5),
        *(6, 9, 7, 10, 8, 11),
    ]
    assert gguf_module._permuted(queries[:6], "blk.0.attn_k.weight", Config).ravel().tolist() == [0, 3, 1, 4, 2, 5]
    assert gguf_module._permuted(queries, "blk.0.attn_v.weight", Config) is queries


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, alive, most = save(tmp_path / "model", "qwen2"), 0, 0
    read_one, encode = gguf_module._read, gguf_module._encoded

    def counted(source: Any) -> Any:
        nonlocal alive, most
        alive += 1
        most = max(most, alive)
        return read_one(source)

    def done(*arguments: Any) -> Any:
        nonlocal alive
        alive -= 1
        return encode(*arguments)

    monkeypatch.setattr(gguf_module, "_read", counted)
    monkeypatch.setattr(gguf_module, "_encoded", done)
    write_gguf(folder, tokenizer_of("qwen2"), tmp_path / "x.gguf", GGUFType.f16, "x")
    assert (alive, most) == (0, 1)


# -- the same tokenizer ------------------------------------------------------------------------------------------------


def fields(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def test_the_tokenizer_is_described_as_llama_cpp_needs_it(tmp_path: Path) -> None:
    folder, tokenizer = save(tmp_path / "model", "qwen2"), embedded_tokenizer()
    write_gguf(folder, tokenizer, tmp_path / "x.gguf", GGUFType.f16, "x")
    found = fields(tmp_path / "x.gguf")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert found["tokenizer.ggml.model"] == "gpt2"
    assert found["tokenizer.ggml.pre"] == "qwen2"
    assert found["tokenizer.ggml.eos_token_id"] == found["tokenizer.ggml.eot_token_id"] == end
    assert found["tokenizer.ggml.padding_token_id"] == tokenizer.pad_token_id
    assert found["tokenizer.ggml.add_bos_token"] is False and "tokenizer.ggml.bos_token_id" not in found
    assert found["tokenizer.chat_template"] == tokenizer.chat_template
    assert found["qwen2.context_length"] == 512
    types = found["tokenizer.ggml.token_type"]
    assert types[end] == gguf.TokenType.CONTROL and types[0] == gguf.TokenType.NORMAL
    assert types[len(tokenizer)] == gguf.TokenType.UNUSED and len(types) == len(found["tokenizer.ggml.tokens"]) == 2368


def test_a_leading_token_is_announced(tmp_path: Path) -> None:
    folder, tokenizer = save(tmp_path / "model", "llama"), tokenizer_of("llama")
    write_gguf(folder, tokenizer, tmp_path / "x.gguf", GGUFType.f16, "x")
    found = fields(tmp_path / "x.gguf")
    assert found["tokenizer.ggml.pre"] == "llama-bpe"
    assert found["tokenizer.ggml.add_bos_token"] is True
    assert found["tokenizer.ggml.bos_token_id"] == tokenizer.bos_token_id


def test_what_a_gguf_cannot_say_is_the_normaliser(tmp_path: Path) -> None:
    """Known, and said in docs/export.md: decomposed text gets other ids. The checks compare composed text."""
    folder, tokenizer = save(tmp_path / "model", "qwen2"), embedded_tokenizer()
    write_gguf(folder, tokenizer, tmp_path / "x.gguf", GGUFType.f16, "x")
    other, _ = load_gguf(tmp_path / "x.gguf", torch.float32)
    decomposed = unicodedata.normalize("NFD", "café")
    assert other.encode(decomposed) != tokenizer.encode(decomposed)
    assert other.encode("café") == tokenizer.encode("café")
    assert all(unicodedata.is_normalized("NFC", text) for text in parity.TEXTS)


# -- what is caught ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "damage", "failing"),
    [
        ("_permuted", lambda weight, name, config: weight, {"logits", "greedy"}),
        ("_stored_as", lambda shape, kind: GGUFType.f16, {"logits"}),
    ],
)
def test_a_wrong_tensor_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, damage: Any, failing: set[str]
) -> None:
    monkeypatch.setattr(gguf_module, name, damage)
    passed, _ = findings_of(save(tmp_path / "model", "llama"), "llama", GGUFType.f32)
    assert failing <= {name for name, fine in passed.items() if not fine} <= {"logits", "greedy"}


@pytest.mark.parametrize(
    ("change", "failing"),
    [
        ({"pre": "qwen2"}, "token_ids"),
        ({"token_type": None}, "token_ids"),
        ({"add_bos_token": False}, "token_ids"),
        ({"chat_template": "{{ messages }}"}, "chat_template"),
        ({"eos_token_id": 5}, "end_of_turn"),
    ],
    ids=str,
)
def test_a_wrong_tokenizer_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], failing: str
) -> None:

    def damaged(tokenizer: Any, rows: int) -> dict[str, Any]:
        entries = describe_tokenizer(tokenizer, rows)
        if "token_type" in change:  # special tokens as if they were text
            return {**entries, "token_type": [min(1, each) for each in entries["token_type"]]}
        return {**entries, **change}

    monkeypatch.setattr(gguf_module, "describe_tokenizer", damaged)
    passed, _ = findings_of(save(tmp_path / "model", "llama"), "llama", GGUFType.f32)
    assert [name for name, fine in passed.items() if not fine] == [failing]


def test_a_file_that_nobody_can_read_is_one_finding(tmp_path: Path) -> None:
    folder, tokenizer = save(tmp_path / "model", "qwen2"), tokenizer_of("qwen2")
    path = folder / "cut.gguf"
    write_gguf(folder, tokenizer, path, GGUFType.f16, "x")
    path.write_bytes(path.read_bytes()[:-20_000])
    asked = questions(tokenizer, conversations(), 512)
    reading = read(load(folder), asked, tokenizer)
    ((name, passed, detail),), _ = compare_file(path, GGUFType.f16, tokenizer, asked, reading, torch.float32)
    assert (name, passed) == ("gguf_f16_readable", False)
    assert "transformers cannot read it" in detail and "\n" not in detail


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("qwen2", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "positions scaled by 'linear'"),
        ("mistral", {"sliding_window": 128}, r"attention that slides \(over 128 tokens\)"),
    ],
)
def test_what_a_gguf_of_ours_cannot_hold_is_refused(architecture: str, changes: Any, message: str) -> None:
    config = random_model(architecture, **changes).config
    with pytest.raises(UserError, match=message):
        check_gguf(config, tokenizer_of(architecture))


def test_other_architectures_are_refused_by_name() -> None:
    from transformers import GPT2Config

    with pytest.raises(UserError, match=r"architecture 'gpt2', only for qwen2, qwen3, llama, mistral"):
        check_gguf(GPT2Config(), embedded_tokenizer())


def test_a_tokenizer_that_splits_otherwise_is_refused() -> None:
    import copy

    from tokenizers import pre_tokenizers

    tokenizer = copy.deepcopy(embedded_tokenizer())
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    with pytest.raises(UserError, match=r"none of qwen2, llama-bpe does: llama.cpp would read other tokens"):
        check_gguf(random_model("qwen2").config, tokenizer)


def test_more_tokens_than_rows_are_refused() -> None:
    with pytest.raises(UserError, match=r"token with id 2358, but the model only 2000 embeddings"):
        describe_tokenizer(embedded_tokenizer(), 2000)


def test_an_unknown_tensor_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", "qwen2")
    weights = load_file(folder / "model.safetensors") | {"model.extra.weight": torch.ones(2)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"no place for the tensor model.extra.weight in qwen2"):
        write_gguf(folder, tokenizer_of("qwen2"), tmp_path / "x.gguf", GGUFType.f16, "x")


def test_weights_beyond_f16_are_refused(tmp_path: Path) -> None:
    model = random_model("qwen2")
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e6
    from alignkit.models.merging import save_checkpoint

    save_checkpoint(model, tokenizer_of("qwen2"), tmp_path / "model")
    with pytest.raises(UserError, match=r"blk.0.ffn_up.weight has weights beyond what f16 can hold; write bf16"):
        write_gguf(tmp_path / "model", tokenizer_of("qwen2"), tmp_path / "x.gguf", GGUFType.f16, "x")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("q4_k_m", "llama-quantize model-f16.gguf model-q4_k_m.gguf Q4_K_M"),
        ("f8", "'f8' is none of f32, f16, bf16, q8_0$"),
    ],
)
def test_types_that_cannot_be_written_are_refused_with_the_way_to_get_them(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        gguf_type(name)
    assert gguf_type("Q8_0") is GGUFType.q8_0


def test_the_package_is_needed_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alignkit.models.gguf_types.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'alignkit\[gguf\]'"):
        require_gguf()
