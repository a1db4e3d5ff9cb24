"""What servers read: an adapter that names its base, and Ollama's Modelfile."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from exporting import llama_tokenizer
from test_merging import TINY, random_adapter
from tiny_random import tokenizer

from alignkit.core.config import ModelConfig
from alignkit.models.loading import load_base, load_policy
from alignkit.models.qwen_v1_tokenizer import CHAT_TEMPLATE as QWEN_V1_TEMPLATE
from alignkit.models.serving import modelfile, save_adapter_for_serving

CONVERSATIONS = (
    [("user", "Hello?")],
    [("system", "Be brief."), ("user", "a\nb"), ("assistant", "c"), ("user", "d")],
)


def with_template(template: str) -> Any:
    changed = copy.deepcopy(tokenizer())
    changed.chat_template = template
    return changed


def as_ollama(text: str, messages: list[tuple[str, str]]) -> str:
    """What Ollama makes of a Modelfile and a conversation: its SYSTEM first where there is none, then the TEMPLATE."""
    template, system = (re.search(rf'{word} """(.*?)"""', text, re.DOTALL) for word in ("TEMPLATE", "SYSTEM"))
    assert template is not None
    if system and messages[0][0] != "system":
        messages = [("system", system[1]), *messages]
    loop = re.fullmatch(r"\{\{- range \.Messages \}\}(.*)\{\{ end \}\}\{\{ end \}\}(.*)", template[1], re.DOTALL)
    assert loop is not None
    cases = re.split(r'\{\{ (?:else )?if eq \.Role "(\w+)" \}\}', loop[1])[1:]
    around = dict(zip(cases[::2], cases[1::2], strict=True))
    return "".join(around[role].replace("{{ .Content }}", content) for role, content in messages) + loop[2]


def rendered(names: Any, messages: list[tuple[str, str]]) -> str:
    plain = [{"role": role, "content": content} for role, content in messages]
    return str(names.apply_chat_template(plain, tokenize=False, add_generation_prompt=True))


@pytest.mark.parametrize("names", [tokenizer(), with_template(QWEN_V1_TEMPLATE)], ids=["chatml", "qwen-v1"])
def test_ollama_s_template_renders_what_ours_renders(names: Any) -> None:
    text = modelfile(names, "model-q8_0.gguf", 512)
    for conversation in CONVERSATIONS:
        assert as_ollama(text, conversation) == rendered(names, conversation)
    assert text.startswith("FROM ./model-q8_0.gguf\n")
    assert 'PARAMETER stop "<|im_end|>"\nPARAMETER num_ctx 512\n' in text


def test_a_leading_token_is_left_to_the_server() -> None:
    text = modelfile(llama_tokenizer(), "x.gguf", 512)
    for conversation in CONVERSATIONS:
        assert "<|begin_of_text|>" + as_ollama(text, conversation) == rendered(llama_tokenizer(), conversation)
    assert 'PARAMETER stop "<|eot_id|>"' in text


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ loop.index }}{{ m['content'] }}<|im_end|>{% endfor %}",
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}",
    ],
    ids=["counts", "no system"],
)
def test_a_template_that_is_more_than_words_is_not_rewritten(template: str) -> None:
    text = modelfile(with_template(template), "x.gguf", 512)
    assert "TEMPLATE" not in text
    assert "# The chat template is more than words" in text
    assert 'PARAMETER stop "<|im_end|>"' in text


def test_peft_loads_the_adapter_without_alignkit(tmp_path: Path) -> None:
    from peft import PeftConfig, PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    adapter = random_adapter(TINY, tmp_path / "adapter")
    written = save_adapter_for_serving(Path(adapter), tmp_path / "out", TINY, tokenizer())
    base = PeftConfig.from_pretrained(str(tmp_path / "out")).base_model_name_or_path
    assert written["base_model_name_or_path"] == base and Path(str(base)).is_absolute()
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        found = PeftModel.from_pretrained(plain, str(tmp_path / "out")).eval()(ids).logits
        assert torch.equal(found, load_policy(TINY, adapter)(ids).logits)
        assert not torch.equal(found, load_base(TINY)(ids).logits)
    names = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert names.chat_template == tokenizer().chat_template and names.eos_token == "<|im_end|>"


def test_a_hub_name_stays_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = random_adapter(TINY, tmp_path / "adapter")
    monkeypatch.setattr("alignkit.models.serving.model_source", lambda model: str(model.path))
    model = ModelConfig(name="q", path="Qwen/Qwen2.5-7B-Instruct")
    written = save_adapter_for_serving(Path(adapter), tmp_path / "out", model, tokenizer())
    assert written["base_model_name_or_path"] == "Qwen/Qwen2.5-7B-Instruct"
