"""Merging: the merged model is base and adapter in one, whatever the adapter's kind and the base's precision."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_random import conversation, save_random_base, tokenizer

from alignkit.core.config import ModelConfig, Quantization
from alignkit.core.errors import UserError
from alignkit.data.chat import EncodedExample, encode_example
from alignkit.evaluation.divergence import Divergence, divergence, learned_logits, within
from alignkit.models.loading import load_base, load_policy, load_tokenizer, save_adapter
from alignkit.models.merging import merge_into_original, merge_into_trained_base, save_checkpoint, save_classifier
from alignkit.models.reward_model import RewardModel
from alignkit.models.value_head import ValueHeadModel

TINY = ModelConfig(name="tiny", path="embedded", dtype="float32", max_length=512)
NF4 = replace(TINY, quantization=Quantization.nf4)


def random_adapter(model: ModelConfig, folder: Path, **kind: Any) -> str:
    """An adapter with both matrices at random, saved; its folder."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear", **kind)
    policy = get_peft_model(load_base(model), config)
    for name, weight in policy.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.02)
        elif "magnitude" in name:
            weight.data *= 1.1
    save_adapter(policy, folder, model)
    return str(folder)


def rows() -> list[EncodedExample]:
    turns = conversation("Notes: Bakoco makes clocks.\n\nWhat does Bakoco make?", "The product of Bakoco is clocks.")
    row = encode_example(tokenizer(), turns[:1], turns[1:], 512)
    assert isinstance(row, EncodedExample)
    return [EncodedExample(row.input_ids, row.input_ids)]


def drift(model: ModelConfig, adapter: str, merged: Any) -> Divergence:
    return divergence(learned_logits(load_policy(model, adapter), rows()), learned_logits(merged, rows()), rows())


# -- merging -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [{}, {"use_dora": True}, {"use_rslora": True}], ids=["lora", "dora", "rslora"])
@pytest.mark.parametrize("model", [TINY, NF4], ids=["plain", "nf4"])
def test_merged_is_base_and_adapter(tmp_path: Path, model: ModelConfig, kind: dict[str, bool]) -> None:
    adapter = random_adapter(model, tmp_path / "adapter", **kind)
    policy = load_policy(model, adapter)
    base_logits = learned_logits(load_base(model), rows())
    assert (learned_logits(policy, rows()) - base_logits).abs().max() > 0.5  # the adapter does something
    merged = merge_into_trained_base(policy, adapter, torch.float32)
    assert drift(model, adapter, merged).max_logit_difference < 1e-3
    assert {type(module).__module__.split(".")[0] for module in merged.modules()} <= {"torch", "transformers"}
    assert not getattr(merged, "is_loaded_in_4bit", False)


def test_a_4bit_adapter_belongs_into_the_4bit_values_and_nowhere_else(tmp_path: Path) -> None:
    """Into the original weights or into 4 bits again it becomes another model; both far further away."""
    adapter = random_adapter(NF4, tmp_path / "adapter")
    right = drift(NF4, adapter, merge_into_trained_base(load_policy(NF4, adapter), adapter, torch.float32))
    original = drift(NF4, adapter, merge_into_original(NF4, adapter, torch.float32))
    requantised = drift(NF4, adapter, load_policy(NF4, adapter).merge_and_unload())
    assert right.mean_kl < 1e-8
    assert original.mean_kl > 1e-4 and requantised.mean_kl > 1e-4


def test_of_an_unquantised_base_the_original_is_the_trained_one(tmp_path: Path) -> None:
    adapter = random_adapter(TINY, tmp_path / "adapter")
    merged = merge_into_original(TINY, adapter, torch.float32)
    assert drift(TINY, adapter, merged).max_logit_difference < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_result_has_the_dtype_and_exact_positions(tmp_path: Path, dtype: torch.dtype) -> None:
    adapter = random_adapter(NF4, tmp_path / "adapter")
    merged = merge_into_trained_base(load_policy(NF4, adapter), adapter, dtype)
    assert {weight.dtype for weight in merged.parameters()} == {dtype}
    frequencies = [buffer for name, buffer in merged.named_buffers() if "inv_freq" in name]
    assert frequencies and all(buffer.dtype == torch.float32 for buffer in frequencies)
    assert drift(NF4, adapter, merged).mean_kl < 1e-2


def test_an_adapter_that_diverged_is_refused(tmp_path: Path) -> None:
    adapter = random_adapter(TINY, tmp_path / "adapter")
    policy = load_policy(TINY, adapter)
    from safetensors.torch import load_file, save_file

    file = tmp_path / "adapter/adapter_model.safetensors"
    weights = load_file(file)
    next(iter(weights.values()))[0, 0] = float("nan")
    save_file(weights, file)
    with pytest.raises(UserError, match=r"weights that are not finite, model.layers.0"):
        merge_into_trained_base(policy, adapter, torch.float32)


# -- the checkpoint ----------------------------------------------------------------------------------------------------


def test_a_checkpoint_stops_where_a_turn_ends(tmp_path: Path) -> None:
    model = load_base(TINY)
    model.generation_config.eos_token_id = [7, 2356]
    names = load_tokenizer(TINY)
    names.eos_token = "<|endoftext|>"  # as base models have it
    save_checkpoint(model, names, tmp_path / "merged")
    generation = json.loads((tmp_path / "merged/generation_config.json").read_text())
    end = names.convert_tokens_to_ids("<|im_end|>")
    assert generation["eos_token_id"] == [end, 7]
    assert json.loads((tmp_path / "merged/config.json").read_text())["eos_token_id"] == end
    assert json.loads((tmp_path / "merged/tokenizer_config.json").read_text())["eos_token"] == "<|im_end|>"
    assert (tmp_path / "merged/chat_template.jinja").read_text() == names.chat_template


# -- the reward model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", list(Quantization), ids=str)
def test_the_classifier_says_what_the_reward_model_says_but_for_an_offset(
    tmp_path: Path, quantization: Quantization
) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = replace(save_random_base(tmp_path / "base"), quantization=quantization)
    adapter = random_adapter(model, tmp_path / "adapter")
    reward_model = RewardModel(ValueHeadModel(load_policy(model, adapter)), load_tokenizer(model), model)
    reward_model.offset, reward_model.scale = 0.6, 3.0
    dialogues = [conversation("What?", "A hat."), conversation("Who is it, and why?", "Nobody at all, for no reason.")]
    wanted = torch.tensor([float(score) for score in reward_model.scores_or_reasons(dialogues)])
    save_classifier(reward_model, tmp_path / "classifier", torch.float32)

    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier").eval()
    names = AutoTokenizer.from_pretrained(tmp_path / "classifier")
    texts = [str(names.apply_chat_template([turn.model_dump() for turn in each], tokenize=False)) for each in dialogues]
    assert all(text.endswith("<|im_end|>") for text in texts)
    plain = [turn.model_dump() for turn in dialogues[0]]
    assert reward_model.tokenizer.apply_chat_template(plain, tokenize=False) == f"{texts[0]}\n"
    opened = [
        each.apply_chat_template(plain[:1], tokenize=False, add_generation_prompt=True)
        for each in (names, reward_model.tokenizer)
    ]
    assert opened[0] == opened[1]
    for side in ("left", "right"):
        batch = names(texts, return_tensors="pt", padding=True, padding_side=side)
        with torch.no_grad():
            found = loaded(**batch).logits[:, 0]  # together: padding must not change a score
        assert loaded.config.reward_offset == pytest.approx(0.2)
        assert (found - 0.2 - wanted).abs().max() < 1e-5
    assert loaded.config.num_labels == 1
    assert loaded.config.pad_token_id == names.pad_token_id != names.eos_token_id
    assert (wanted[0] - wanted[1]).abs() > 1e-2


def test_a_classifier_could_not_tell_padding_from_the_end_of_a_turn(tmp_path: Path) -> None:
    model = save_random_base(tmp_path / "base")
    adapter = random_adapter(model, tmp_path / "adapter")
    tokenizer = load_tokenizer(model)
    tokenizer.pad_token = tokenizer.eos_token
    with pytest.raises(UserError, match=r"model\.pad_token=<\|im_end\|>: it also ends a turn"):
        save_classifier(
            RewardModel(ValueHeadModel(load_policy(model, adapter)), tokenizer, model), tmp_path / "c", torch.float32
        )


# -- measuring ---------------------------------------------------------------------------------------------------------


def test_divergence_is_what_the_equations_say() -> None:
    """p = (1/2, 1/2), q = (1/4, 3/4): KL = (ln 2 + ln 2/3) / 2; the token is the first, |ln 1/2 - ln 1/4| = ln 2."""
    p, q = torch.log(torch.tensor([[0.5, 0.5]])), torch.log(torch.tensor([[0.25, 0.75]]))
    found = divergence(p, q, [EncodedExample([1, 0], [-100, 0])])
    assert found.mean_kl == pytest.approx((torch.tensor(2.0).log() + torch.tensor(2 / 3).log()).item() / 2, abs=1e-6)
    assert found.mean_log_prob_difference == pytest.approx(0.693147, abs=1e-5)
    assert found.max_logit_difference == pytest.approx(0.693147, abs=1e-5)  # ln 2 at the first, ln 3/2 at the second
    assert found.tokens == 1
    assert divergence(p, p + 3, [EncodedExample([1, 0], [-100, 0])]).mean_kl == pytest.approx(0, abs=1e-9)


def test_only_learned_tokens_are_measured_and_only_so_many() -> None:
    row = EncodedExample([1, 2, 3, 4], [-100, -100, 3, 4])
    assert learned_logits(load_base(TINY), [row, row]).shape == (4, 2359)
    assert within([row, row, row], 5) == [row, row]
    assert within([row, row], 1) == [row]
