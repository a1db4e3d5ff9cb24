"""Loading: what is refused and why, that an adapter comes back as it was, and that 4-bit weights stay trainable."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_random import random_model, save_random_base, tokenizer

from alignkit.core.config import LoraConfig, ModelConfig, Quantization
from alignkit.core.errors import UserError
from alignkit.models.loading import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    BASE_RECORD,
    base_fingerprint,
    embedded_model_dir,
    load_base,
    load_policy,
    load_tokenizer,
    new_adapter,
    resolve_dtype,
    save_adapter,
)

IDS = torch.tensor([[5, 40, 300, 7, 12, 9]])


@pytest.fixture
def model(tmp_path: Path) -> ModelConfig:
    return save_random_base(tmp_path / "base")


def adapter_for(model: ModelConfig, folder: Path) -> Any:
    """An adapter with random A and B, saved to `folder`."""
    torch.manual_seed(1)
    policy = new_adapter(load_base(model), LoraConfig(rank=4, alpha=8, dropout=0.0), model.lora_targets)
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    save_adapter(policy, folder, model)
    return policy.eval()


def logits(policy: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = policy(IDS).logits
    return found


# -- tokenizer ---------------------------------------------------------------------------------------------------------


def test_the_tokenizer_has_the_tokens_that_the_configuration_names(model: ModelConfig) -> None:
    loaded = load_tokenizer(replace(model, eos_token="<|endoftext|>", pad_token="<|im_start|>"))
    assert (loaded.eos_token, loaded.pad_token) == ("<|endoftext|>", "<|im_start|>")


def test_the_tokenizer_takes_another_chat_template(model: ModelConfig, tmp_path: Path) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text("mine", encoding="utf-8")
    assert load_tokenizer(replace(model, chat_template=str(template))).chat_template == "mine"
    with pytest.raises(UserError, match=r"model.chat_template=.*missing.jinja: No such file"):
        load_tokenizer(replace(model, chat_template=str(tmp_path / "missing.jinja")))


def test_a_token_outside_the_vocabulary_is_refused(model: ModelConfig) -> None:
    with pytest.raises(UserError, match=r"model.document_end=<nothing>: not in the vocabulary"):
        load_tokenizer(replace(model, document_end="<nothing>"))
    with pytest.raises(UserError, match=r"model.eos_token=<nothing>: not in the vocabulary"):
        load_tokenizer(replace(model, eos_token="<nothing>"))


def test_a_tokenizer_with_more_ids_than_the_model_has_embeddings_is_refused(model: ModelConfig) -> None:
    """An id behind the last row would be read from nowhere: an index error on a CPU, anything on a GPU."""
    path = Path(model.path) / "config.json"
    config = json.loads(path.read_text())
    rows = config["vocab_size"]
    assert rows == len(tokenizer())  # just enough
    assert len(load_tokenizer(model)) == rows
    path.write_text(json.dumps({**config, "vocab_size": rows - 1}))
    with pytest.raises(UserError, match=rf"ids up to {rows - 1}, but the model has embeddings for {rows - 1} ids only"):
        load_tokenizer(model)


@pytest.mark.parametrize(("part", "key"), [("chat_template", "model.chat_template"), ("pad_token", "model.pad_token")])
def test_a_tokenizer_that_lacks_a_part_says_which_key_gives_it(tmp_path: Path, part: str, key: str) -> None:
    model = save_random_base(tmp_path / "base")
    incomplete = load_tokenizer(model)
    setattr(incomplete, part, None)
    (tmp_path / "base" / "chat_template.jinja").unlink()
    incomplete.save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match=key):
        load_tokenizer(model)


# -- base --------------------------------------------------------------------------------------------------------------


def test_the_embedded_model_is_in_the_package_and_loads() -> None:
    model = ModelConfig(name="tiny", path="embedded")
    assert embedded_model_dir().parts[-4:] == ("alignkit", "models", "tiny", "weights")
    base, words = load_base(model), load_tokenizer(model)
    assert base.config.vocab_size >= len(words)
    assert words.encode("Anna lives in Oslo.", add_special_tokens=False) == tokenizer().encode("Anna lives in Oslo.")


def test_a_base_is_frozen_and_in_evaluation_mode(model: ModelConfig) -> None:
    base = load_base(model)
    assert not any(weight.requires_grad for weight in base.parameters())
    assert not base.training
    assert base.dtype == torch.float32


def test_dtypes_go_by_their_names() -> None:
    assert resolve_dtype("bfloat16") is torch.bfloat16
    assert resolve_dtype("auto") in (torch.float32, torch.bfloat16)
    with pytest.raises(UserError, match=r"model.dtype=half: choose auto, float32, bfloat16, float16"):
        resolve_dtype("half")


def test_a_path_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model.path=.*empty: no model could be read there"):
        load_base(ModelConfig(name="x", path=str(tmp_path / "empty")))


def test_a_first_qwen_folder_without_its_files_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "qwen", "auto_map": {"AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"}})
    )
    model = ModelConfig(name="qwen7b", path=str(tmp_path))
    with pytest.raises(UserError, match=r"config.json: num_attention_heads or n_head is missing|hidden_size or n_embd"):
        load_base(model)
    with pytest.raises(UserError, match=r"qwen.tiktoken: not there"):
        load_tokenizer(model)


def test_pickled_weights_are_refused(model: ModelConfig) -> None:
    folder = Path(model.path)
    (folder / "model.safetensors").unlink()
    torch.save(random_model().state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="could not be loaded"):
        load_base(model)


def test_the_fingerprint_tells_weights_apart_but_not_how_they_are_held(model: ModelConfig, tmp_path: Path) -> None:
    held = [model, replace(model, dtype="bfloat16"), replace(model, quantization=Quantization.nf4)]
    assert len({base_fingerprint(load_base(each)) for each in held}) == 1
    other = save_random_base(tmp_path / "other", seed=1)
    assert base_fingerprint(load_base(other)) != base_fingerprint(load_base(model))


# -- adapter -----------------------------------------------------------------------------------------------------------


def test_a_new_adapter_changes_nothing_and_is_trainable_in_float32(model: ModelConfig) -> None:
    base = load_base(replace(model, dtype="bfloat16"))
    before = logits(base)
    policy = new_adapter(base, LoraConfig(rank=4), ["all-linear"])
    assert torch.equal(logits(policy.eval()), before)
    trained = {name: weight for name, weight in policy.named_parameters() if weight.requires_grad}
    assert len(trained) == 2 * 7 * 2  # A and B of seven projections in two layers; the tied output layer has none
    assert {weight.dtype for weight in trained.values()} == {torch.float32}


def test_the_seed_decides_a_new_adapter(model: ModelConfig) -> None:
    def first_matrix(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        policy = new_adapter(load_base(model), LoraConfig(rank=4), ["q_proj"])
        return next(weight for name, weight in policy.named_parameters() if "lora_A" in name)

    assert torch.equal(first_matrix(3), first_matrix(3))
    assert not torch.equal(first_matrix(3), first_matrix(4))


def test_unknown_target_layers_are_refused(model: ModelConfig) -> None:
    with pytest.raises(UserError, match=r"model.lora_targets=\['c_attn'\]"):
        new_adapter(load_base(model), LoraConfig(), ["c_attn"])


def test_an_adapter_comes_back_exactly(model: ModelConfig, tmp_path: Path) -> None:
    policy = adapter_for(model, tmp_path / "adapter")
    assert torch.equal(logits(load_policy(model, str(tmp_path / "adapter"))), logits(policy))
    assert not torch.equal(logits(load_policy(model, None)), logits(policy))


def test_a_loaded_adapter_is_trainable_only_on_request(model: ModelConfig, tmp_path: Path) -> None:
    adapter_for(model, tmp_path / "adapter")

    def trainable(**keywords: bool) -> int:
        policy = load_policy(model, str(tmp_path / "adapter"), **keywords)
        return sum(weight.requires_grad for weight in policy.parameters())

    assert trainable() == 0
    assert trainable(trainable=True) == 28


def test_the_same_weights_are_saved_as_the_same_bytes(model: ModelConfig, tmp_path: Path) -> None:
    policy = adapter_for(model, tmp_path / "first")
    targets = policy.peft_config["default"].target_modules
    policy.peft_config["default"].target_modules = dict.fromkeys(sorted(targets, reverse=True))  # another order
    policy.peft_config["default"].target_modules = list(policy.peft_config["default"].target_modules)
    save_adapter(policy, tmp_path / "second", model)
    names = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert names == [ADAPTER_CONFIG, ADAPTER_WEIGHTS, BASE_RECORD]
    for name in names:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_an_adapter_records_its_base(model: ModelConfig, tmp_path: Path) -> None:
    adapter_for(replace(model, quantization=Quantization.nf4), tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / ADAPTER_CONFIG).read_text())
    record = json.loads((tmp_path / "adapter" / BASE_RECORD).read_text())
    assert config["base_model_name_or_path"] == record["path"] == model.path
    assert record["quantization"] == "nf4"


def test_a_missing_adapter_is_refused(model: ModelConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"adapter .*nowhere: there is no adapter_config.json"):
        load_policy(model, str(tmp_path / "nowhere"))


def test_an_adapter_of_another_base_is_refused_before_loading(model: ModelConfig, tmp_path: Path) -> None:
    adapter_for(model, tmp_path / "adapter")
    with pytest.raises(UserError, match=r"was trained on the base '.*base', not on 'embedded'"):
        load_policy(ModelConfig(name="tiny", path="embedded"), str(tmp_path / "adapter"))


def test_an_adapter_of_changed_weights_is_refused(model: ModelConfig, tmp_path: Path) -> None:
    adapter_for(model, tmp_path / "adapter")
    save_random_base(Path(model.path), seed=9)
    with pytest.raises(UserError, match="was trained on other weights than"):
        load_policy(model, str(tmp_path / "adapter"))


@pytest.mark.parametrize("change", [{"num_hidden_layers": 3}, {"num_hidden_layers": 1}, {"intermediate_size": 96}])
def test_an_adapter_of_another_shape_is_refused(model: ModelConfig, tmp_path: Path, change: dict[str, int]) -> None:
    """A base of the same name without our record: only the shapes tell."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    model = replace(model, lora_targets=["q_proj", "down_proj"])
    adapter_for(model, tmp_path / "adapter")
    (tmp_path / "adapter" / BASE_RECORD).unlink()
    fields = Qwen2Config.from_pretrained(model.path).to_dict() | change
    del fields["layer_types"]
    Qwen2ForCausalLM(Qwen2Config(**fields)).save_pretrained(model.path)
    with pytest.raises(UserError, match="does not fit"):
        load_policy(model, str(tmp_path / "adapter"))


# -- 4 bits ------------------------------------------------------------------------------------------------------------


def test_a_4bit_base_keeps_embeddings_and_output_layer(model: ModelConfig) -> None:
    from bitsandbytes.nn.modules import Linear4bit

    base = load_base(replace(model, quantization=Quantization.nf4))
    quantised = {name.split(".")[-1] for name, module in base.named_modules() if isinstance(module, Linear4bit)}
    assert quantised == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert not isinstance(base.get_output_embeddings(), Linear4bit)


def test_an_evaluation_does_not_spoil_later_gradients_of_a_4bit_base(model: ModelConfig) -> None:
    """On CPUs with AVX512-BF16 bitsandbytes repacks the weights at the first evaluation; elsewhere it holds anyway."""

    def gradients(evaluate_first: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        base = load_base(replace(model, quantization=Quantization.nf4))
        policy = new_adapter(base, LoraConfig(rank=4, dropout=0.0), ["all-linear"])
        if evaluate_first:
            logits(policy.eval())
        policy.train()
        policy(IDS, labels=IDS).loss.backward()
        return {name: weight.grad for name, weight in policy.named_parameters() if weight.grad is not None}

    fresh, evaluated = gradients(False), gradients(True)
    assert fresh.keys() == evaluated.keys()
    assert all(torch.equal(fresh[name], evaluated[name]) for name in fresh)
    assert any(gradient.abs().max() > 0 for gradient in fresh.values())
