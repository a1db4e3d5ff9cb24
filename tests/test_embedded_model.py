"""The shipped weights: their size, their card, and what they can do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from alignkit.models.loading import embedded_model_dir
from alignkit.models.tiny.gate import measure

FOLDER = embedded_model_dir()


def test_the_weights_are_small_and_safe() -> None:
    files = [path for path in FOLDER.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8 * 2**20
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jinja", ".md"}


@pytest.mark.slow  # the weights change only with their recipe, which the tests below hold to them
def test_the_card_says_what_the_gate_prints() -> None:
    """Each figure of the card's table, measured again (a tenth of the questions may fall otherwise on another CPU)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    claimed = {
        name.strip(): float(value) for name, value in re.findall(r"^    ([a-z][a-z ()]+?) +(0\.\d{3})", card, re.M)
    }
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    found = measure(model, AutoTokenizer.from_pretrained(FOLDER))
    assert claimed.keys() == found.keys()
    assert all(abs(claimed[name] - found[name]) <= 0.02 for name in found), (claimed, found)
    assert found["value"] >= 0.9
    assert found["chat format"] < 0.5 < found["value"]


def test_the_recipe_is_the_one_the_script_has() -> None:
    import json
    from dataclasses import asdict

    from alignkit.models.tiny.pretrain import Recipe

    assert json.loads((FOLDER / "recipe.json").read_text(encoding="utf-8")) == asdict(Recipe())


def test_the_base_is_what_the_pre_training_builds() -> None:
    from safetensors import safe_open

    from alignkit.models.tiny.pretrain import Recipe, build_model
    from alignkit.models.tiny.tokenizer import build_tokenizer

    expected = {
        name: tuple(weight.shape) for name, weight in build_model(Recipe(), build_tokenizer()).state_dict().items()
    }
    with safe_open(str(Path(FOLDER) / "model.safetensors"), framework="pt") as file:
        shipped = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert shipped.items() <= expected.items()
    assert set(expected) - set(shipped) <= {"lm_head.weight"}  # tied to the embeddings
