"""llama.cpp is asked in a process of its own: a stand-in of the same interface, and itself where it is installed."""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from exporting import save, tokenizer_of
from test_gguf import load

from alignkit.evaluation import llama_cpp
from alignkit.evaluation.parity import Finding, Questions, compare_file, conversations, questions, read
from alignkit.models.gguf import write_gguf
from alignkit.models.gguf_types import GGUFType

pytest.importorskip("gguf")

STAND_IN = '''
import os
from types import SimpleNamespace
import numpy as np

class llama_cpp:
    pass

def llama_model_default_params():
    return SimpleNamespace()

class Llama:
    """Reads letters as tokens; the next token is the last one plus one."""

    def __init__(self, path, n_ctx, logits_all, verbose, n_threads):
        assert llama_cpp.llama_model_default_params().use_extra_bufts is False
        if "broken" in path:
            os.kill(os.getpid(), 11)
        self.scores, self.n_tokens = np.zeros((n_ctx, 200), dtype=np.float32), 0

    def reset(self):
        self.n_tokens = 0

    def eval(self, ids):
        for token in ids:
            self.scores[self.n_tokens] = np.eye(200)[token + 1]
            self.n_tokens += 1

    def tokenize(self, text, add_bos, special):
        assert special and not add_bos
        return list(text)

    def token_eos(self):
        return 99

    def close(self):
        pass
'''


class Letters:
    """A tokenizer of letters."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(text.encode())


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "llama_cpp.py").write_text(STAND_IN, encoding="utf-8")
    source = Path(llama_cpp.__file__).resolve().parents[2]
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{source}")
    monkeypatch.setattr(llama_cpp, "end_of_turn_id", lambda tokenizer: 99)
    return tmp_path


def asked() -> Questions:
    from alignkit.data.chat import EncodedExample

    rows = [EncodedExample(ids, ids) for ids in ([10, 20, 30], [40, 50])]
    return Questions(rows, prompts=[[1, 97], [5]], texts=["abc", "é"])


def test_what_it_says_comes_back(stand_in: Path) -> None:
    reading, findings = llama_cpp.ask(stand_in / "model.gguf", asked(), Letters(), "x")
    assert reading is not None
    assert reading.logits.argmax(-1).tolist() == [11, 21, 41]  # before 20, 30 and 50
    assert reading.continuations == [[98, 99], list(range(6, 30))]  # to the end of turn, or 24 tokens
    assert findings == [
        Finding("x_token_ids", True, "2 texts get the same ids"),
        Finding("x_end_of_turn", True, "token 99"),
    ]


def test_a_crash_is_a_finding_and_not_ours(stand_in: Path) -> None:
    reading, ((name, passed, detail),) = llama_cpp.ask(stand_in / "broken.gguf", asked(), Letters(), "x")
    assert reading is None
    assert (name, passed) == ("x_runs", False)
    assert "llama.cpp ended with -11" in detail


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama", "mistral"])
@pytest.mark.parametrize("kind", list(GGUFType), ids=lambda kind: str(kind.value))
def test_llama_cpp_itself_says_what_the_model_says(tmp_path: Path, architecture: str, kind: GGUFType) -> None:
    folder, tokenizer = save(tmp_path / "model", architecture), tokenizer_of(architecture)
    questioned = questions(tokenizer, conversations(), 512)
    write_gguf(folder, tokenizer, tmp_path / "x.gguf", kind, "random")
    reference = read(load(folder), questioned, tokenizer)
    findings, figures = compare_file(tmp_path / "x.gguf", kind, tokenizer, questioned, reference, torch.float32)
    assert [finding for finding in findings if not finding.passed] == []
    assert math.isfinite(figures["llama_cpp_mean_kl"])
