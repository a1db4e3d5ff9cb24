"""Opening an engine: adapters that share a base, vLLM behind its documented interface, what a reward model joins."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from tiny_random import conversation, random_model, save_random_base, tokenizer, user

from alignkit.core.config import LoraConfig, ModelConfig, Quantization, SamplingConfig, TeacherConfig
from alignkit.core.errors import UserError
from alignkit.data.chat import encode_prompt
from alignkit.generation.engines import GeneratorKind, open_engine
from alignkit.generation.hf import HFGenerator, load_generator
from alignkit.models.loading import load_base, new_adapter, save_adapter
from alignkit.models.reward_model import RewardModel
from alignkit.models.value_head import ValueHeadModel
from alignkit.scoring.reward import RewardScorer

PROMPTS = [user("Who leads Ferro?"), user("Hello")]
VARIED = SamplingConfig(n=3, temperature=[0.5, 1.5], top_p=[0.5, 1.0], max_new_tokens=8)
SERVER = TeacherConfig(model="none")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    """A base held in 16 bits, whose adapters are not added into the weights."""
    return replace(save_random_base(tmp_path_factory.mktemp("base")), dtype="bfloat16")


@pytest.fixture(scope="module")
def adapters(model: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two random adapters of different ranks."""
    folders = []
    for rank in (2, 4):
        torch.manual_seed(rank)
        policy = new_adapter(load_base(model), LoraConfig(rank=rank, dropout=0.0), ["all-linear"])
        with torch.no_grad():
            for name, weight in policy.named_parameters():
                if "lora_B" in name:
                    weight.normal_(std=0.5)
        folders.append(tmp_path_factory.mktemp("adapter"))
        save_adapter(policy, folders[-1], model)
    return str(folders[0]), str(folders[1])


# -- one base ----------------------------------------------------------------------------------------------------------


def test_versions_share_a_base_and_write_what_they_write_alone(model: ModelConfig, adapters: tuple[str, str]) -> None:
    alone = [load_generator(model, adapter).generate(PROMPTS, VARIED, seed=1) for adapter in adapters]
    previous = open_engine(GeneratorKind.hf, model, adapters[0], SERVER)
    assert isinstance(previous, HFGenerator)
    first = previous.generate(PROMPTS, VARIED, seed=1)
    latest = load_generator(model, adapters[1], previous.shared)
    assert latest.model is previous.model
    assert [first, latest.generate(PROMPTS, VARIED, seed=1)] == alone
    assert alone[0] != alone[1]
    assert previous.generate(PROMPTS, VARIED, seed=1) == alone[0]  # whichever was active
    floats = {parameter.dtype for name, parameter in latest.model.named_parameters() if "lora" in name}
    assert floats == {torch.float32}
    assert {name for name in latest.model.peft_config} == {"default", "adapter-2"}


def test_an_adapter_of_another_base_cannot_join(model: ModelConfig, adapters: tuple[str, str], tmp_path: Path) -> None:
    shared = load_generator(model, adapters[0]).shared
    other = save_random_base(tmp_path / "other", seed=7)
    save_adapter(new_adapter(load_base(other), LoraConfig(rank=2), ["all-linear"]), tmp_path / "adapter", other)
    with pytest.raises(UserError, match="was trained on the base"):
        load_generator(model, str(tmp_path / "adapter"), shared)
    (tmp_path / "other").rename(tmp_path / "moved")
    renamed = replace(other, path=model.path)
    save_adapter(new_adapter(random_model(seed=7), LoraConfig(rank=2), ["all-linear"]), tmp_path / "adapter", renamed)
    with pytest.raises(UserError, match="trained on other weights"):
        load_generator(model, str(tmp_path / "adapter"), shared)


def test_a_merged_adapter_leaves_nothing_to_join(model: ModelConfig, tmp_path: Path) -> None:
    exact = replace(model, dtype="float32")
    save_adapter(new_adapter(load_base(exact), LoraConfig(rank=2), ["all-linear"]), tmp_path, exact)
    assert load_generator(exact, str(tmp_path)).shared is None
    assert load_generator(exact, None).shared is None


def test_a_reward_model_joins_its_own_base_and_says_so_when_it_cannot(
    model: ModelConfig, adapters: tuple[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(1)
    reward = ValueHeadModel(new_adapter(load_base(model), LoraConfig(rank=2, dropout=0.0), ["all-linear"]))
    RewardModel(reward, tokenizer(), model).save_pretrained(tmp_path)
    policy = load_generator(model, adapters[0]).shared
    assert RewardScorer(tmp_path, policy).reward_model.module.policy is policy
    assert caplog.text == ""
    stranger = new_adapter(random_model(seed=7), LoraConfig(rank=2), ["all-linear"])
    scorer = RewardScorer(tmp_path, stranger)
    assert scorer.reward_model.module.policy is not stranger
    assert "a second base was loaded for it" in caplog.text
    assert scorer.score([conversation("Hello", "A")])[0] is not None


def test_disagreement_is_taken_off_the_score(tmp_path: Path) -> None:
    class Ensemble:
        def scores_and_disagreements(self, conversations: Sequence[Any]) -> list[tuple[float, float] | str]:
            return [(1.0, 0.5), "too long", (0.8, 0.0)]

        def scores_or_reasons(self, conversations: Sequence[Any]) -> list[float | str]:
            return [1.0, "too long", 0.8]

    scorer = RewardScorer.__new__(RewardScorer)
    scorer.reward_model, scorer.uncertainty_penalty = Ensemble(), 2.0  # type: ignore[assignment]
    assert scorer.score([[], [], []]) == [0.0, None, 0.8]
    assert scorer.reasons == [None, "too long", None]
    scorer.uncertainty_penalty = 0.0
    assert scorer.score([[], [], []]) == [1.0, None, 0.8]


# -- vLLM --------------------------------------------------------------------------------------------------------------


@dataclass
class SamplingParams:
    """vLLM's, as far as it is used."""

    n: int
    temperature: float
    top_p: float
    max_tokens: int
    stop_token_ids: list[int]
    seed: int
    detokenize: bool


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str


@dataclass
class CompletionOutput:
    token_ids: Sequence[int]
    finish_reason: str


@dataclass
class RequestOutput:
    outputs: list[CompletionOutput]


class LLM:
    """Repeats the prompt; at a temperature above 1 without coming to its end."""

    opened: ClassVar[list[dict[str, Any]]] = []

    def __init__(self, **settings: Any) -> None:
        self.opened.append(settings)
        self.asked: list[tuple[list[Any], list[SamplingParams], LoRARequest | None]] = []

    def generate(
        self, prompts: list[Any], params: list[SamplingParams], *, lora_request: LoRARequest | None
    ) -> list[RequestOutput]:
        self.asked.append((prompts, params, lora_request))
        return [
            RequestOutput(
                [
                    CompletionOutput(prompt["prompt_token_ids"][: each.max_tokens], "length")
                    if each.temperature > 1
                    else CompletionOutput([*prompt["prompt_token_ids"][:3], each.stop_token_ids[0]], "stop")
                ]
            )
            for prompt, each in zip(prompts, params, strict=True)
        ]


@pytest.fixture
def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> type[LLM]:
    package, lora, request = ModuleType("vllm"), ModuleType("vllm.lora"), ModuleType("vllm.lora.request")
    vars(package).update(LLM=LLM, SamplingParams=SamplingParams)
    vars(request).update(LoRARequest=LoRARequest)
    for module in (package, lora, request):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(LLM, "opened", [])
    return LLM


def test_vllm_is_asked_for_each_completion_with_the_adapter(
    fake_vllm: type[LLM], model: ModelConfig, adapters: tuple[str, str]
) -> None:
    quantized = replace(model, quantization=Quantization.nf4)
    first: Any = open_engine(GeneratorKind.vllm, quantized, adapters[0], SERVER)
    written = first.generate(PROMPTS, VARIED, seed=3)
    (settings,) = fake_vllm.opened
    assert settings["model"] == model.path
    assert (settings["quantization"], settings["enable_lora"], settings["max_lora_rank"]) == ("bitsandbytes", True, 64)
    assert settings["max_model_len"] == model.max_length
    (prompts, params, request), *_ = first.shared.asked
    ids = [encode_prompt(tokenizer(), prompt) for prompt in PROMPTS]
    assert [each["prompt_token_ids"] for each in prompts] == [ids[0]] * 3 + [ids[1]] * 3
    assert request.lora_path == adapters[0]
    assert len({each.seed for each in params}) == 6
    assert all(0.5 <= each.temperature <= 1.5 and each.max_tokens == 8 for each in params)
    assert [len(row) for row in written] == [3, 3]
    for completion, each, prompt in zip([*written[0], *written[1]], params, prompts, strict=True):
        assert completion.sampling == {"temperature": each.temperature, "top_p": each.top_p}
        assert completion.finished == (each.temperature <= 1)
        if completion.finished:
            assert completion.text == tokenizer().decode(prompt["prompt_token_ids"][:3], skip_special_tokens=True)
    assert {completion.finished for row in written for completion in row} == {True, False}

    second: Any = open_engine(GeneratorKind.vllm, quantized, adapters[1], SERVER, first.shared)
    second.generate(PROMPTS, VARIED, seed=3)
    assert len(fake_vllm.opened) == 1  # one engine, one base
    assert first.shared.asked[1][2].lora_int_id != request.lora_int_id
    assert [each.seed for each in first.shared.asked[1][1]] == [each.seed for each in params]
    base: Any = open_engine(GeneratorKind.vllm, model, None, SERVER)
    base.generate(PROMPTS, VARIED, seed=3)
    assert base.shared.asked[0][2] is None
    assert fake_vllm.opened[1]["quantization"] is None


def test_without_vllm_the_error_says_what_to_install(model: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match=r"pip install 'alignkit\[vllm\]'.*generator=openai"):
        open_engine(GeneratorKind.vllm, model, None, SERVER)
