"""The same questions to llama.cpp itself, where its Python binding is installed (`pip install llama-cpp-python`).

It is asked in a process of its own, `python -m alignkit.evaluation.llama_cpp questions.json answers.npz`: native code
that crashes on a file must not take the export with it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from alignkit.data.chat import end_of_turn_id

if TYPE_CHECKING:
    from alignkit.evaluation.parity import Finding, Questions, Reading

Answers = dict[str, Any]


def is_installed() -> bool:
    """Whether there is a llama.cpp to ask."""
    return find_spec("llama_cpp") is not None


def ask(path: Path, asked: Questions, tokenizer: Any, label: str) -> tuple[Reading | None, list[Finding]]:
    """What llama.cpp says of a file, and whether it reads texts as the same tokens and ends a turn at the same one.

    No reading, and a finding that says so, when it could not run the file.
    """
    import torch

    from alignkit.evaluation.parity import NEW_TOKENS, Finding, Reading, end_finding, texts_finding, token_ids

    end_id = end_of_turn_id(tokenizer)
    rows = [row.input_ids for row in asked.rows]
    questions = {"model": str(path), "rows": rows, "prompts": asked.prompts, "texts": asked.texts}
    with tempfile.TemporaryDirectory() as folder:
        inbox, outbox = Path(folder) / "questions.json", Path(folder) / "answers.npz"
        inbox.write_text(json.dumps({**questions, "end": end_id, "steps": NEW_TOKENS}), encoding="utf-8")
        command = [sys.executable, "-m", "alignkit.evaluation.llama_cpp", str(inbox), str(outbox)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            return None, [Finding(f"{label}_runs", False, f"llama.cpp ended with {done.returncode}: {last[:200]}")]
        with np.load(outbox, allow_pickle=False) as file:
            logits, told = torch.from_numpy(file["logits"]), json.loads(str(file["told"]))
    wrong = [text for text, ids in zip(asked.texts, told["ids"], strict=True) if ids != token_ids(tokenizer, text)]
    findings = [texts_finding(label, asked, wrong), end_finding(label, end_id, told["end"])]
    return Reading(logits, told["continuations"], margins=[]), findings


# -- in the other process ----------------------------------------------------------------------------------------------


def answer(questions: dict[str, Any], outbox: Path) -> None:
    """Run the model over everything that is asked, and save logits [tokens, vocabulary], ids and continuations."""
    import llama_cpp

    defaults = llama_cpp.llama_model_default_params

    def plain_kernels() -> Any:
        # Weights as they are in the file: with repacked ones, version 0.3.36 crashed on q8_0 in a virtual machine.
        params = defaults()
        params.use_extra_bufts = False
        return params

    llama_cpp.llama_cpp.llama_model_default_params = plain_kernels
    longest = max(map(len, questions["rows"])) + questions["steps"]
    model = llama_cpp.Llama(questions["model"], n_ctx=longest, logits_all=True, verbose=False, n_threads=1)
    logits = [_logits(model, ids)[:-1] for ids in questions["rows"]]
    told = {
        "ids": [list(model.tokenize(text.encode(), add_bos=False, special=True)) for text in questions["texts"]],
        "continuations": [_continue(model, ids, questions["end"], questions["steps"]) for ids in questions["prompts"]],
        "end": int(model.token_eos()),
    }
    model.close()
    np.savez(outbox, logits=np.concatenate(logits), told=json.dumps(told))


def _logits(model: Any, ids: list[int]) -> Any:
    model.reset()
    model.eval(ids)
    return model.scores[: len(ids)].copy()


def _continue(model: Any, prompt: list[int], end_id: int, steps: int) -> list[int]:
    """The most likely tokens, one by one, the end of turn included."""
    model.reset()
    model.eval(prompt)
    written: list[int] = []
    while len(written) < steps and written[-1:] != [end_id]:
        written.append(int(model.scores[model.n_tokens - 1].argmax()))
        model.eval(written[-1:])
    return written


if __name__ == "__main__":
    answer(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
