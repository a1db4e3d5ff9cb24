"""The stage retriever: a tiny random BERT learns which words answer which, in one process and in two."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_training import interrupt_at
from tiny_encoders import encoder_settings, save_encoder, word_tokenizer
from two_processes import run_in_two

from alignkit.core.app import run_command
from alignkit.core.manifest import read_manifest

pytestmark = pytest.mark.skipif(find_spec("sentence_transformers") is None, reason="alignkit[retrieval]")

LETTERS = "a b c d e f g h".split()
STEPS = ["train.batch_size=8", "train.warmup_share=0", "train.learning_rate=1e-3", "train.logging_steps=1"]
TASKS = (
    "tasks={qa: {query_instruction: 'what ', passage_instruction: 'is ', distill_weight: 1, distill: stable}, "
    "tool: {positives: random}}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows of two tasks and a random encoder without dropout."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("work")
    settings = encoder_settings(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    save_encoder(folder / "bert", BertModel, BertConfig(**settings), word_tokenizer(max_length=12))
    rows: list[dict[str, Any]] = []
    for number, letter in enumerate(LETTERS * 3):
        others = [each for each in LETTERS if each != letter]
        negatives = [f"the mayor {each}" for each in others[number % 5 : number % 5 + 3]]
        row = {"query": f"who is {letter} ?", "query_id": number, "pos": [f"she was {letter}"], "neg": negatives}
        rows.append({**row, "task": "tool" if number % 3 == 0 else "qa", "teacher_scores": [0.5, 0.1, 0.4, 0.2]})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(text, encoding="utf-8")
    return folder


def command(name: str, *more: str) -> list[str]:
    model = ["encoder.path=bert", "encoder.name=bert", "encoder.passage_max_length=12", f"run={name}"]
    return [*model, "data.path=rows.jsonl", "negatives=2", TASKS, *STEPS, *more]


def weights(folder: Path, run: str) -> dict[str, torch.Tensor]:
    return load_file(folder / "runs" / run / "retriever" / "model" / "model.safetensors")


def losses(folder: Path, run: str) -> list[dict[str, float]]:
    path = folder / "runs" / run / "retriever" / "loss.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def manifest(folder: Path, run: str) -> dict[str, Any]:
    found = read_manifest(folder / "runs" / run / "retriever")
    assert found is not None
    return found


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Of all weights but the keys' biases: no embedding depends on them, and Adam makes steps of their rounding."""
    assert one.keys() == other.keys()
    names = [name for name in one if not name.endswith("key.bias")]
    return max(float((one[name] - other[name]).abs().max()) for name in names)


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """The run that others are compared with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run_command("retriever", command("whole", "train.epochs=2", "held_out_share=0.2")) == 0
    return folder


def test_what_is_written_is_a_plain_folder_of_sentence_transformers(whole: Path) -> None:
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(str(whole / "runs" / "whole" / "retriever" / "model"), trust_remote_code=False)
    assert encoder.prompts["qa_query"] == "what "
    assert encoder.prompts["tool_passage"] == ""
    asked = encoder.encode(["who is a ?"], prompt_name="qa_query")
    assert np.allclose(asked, encoder.encode(["what who is a ?"], prompt=""), atol=1e-6)
    assert encoder.max_seq_length == 12
    assert largest_difference(weights(whole, "whole"), load_file(whole / "bert" / "model.safetensors")) > 1e-3


def test_the_manifest_says_what_was_checked_and_found(whole: Path) -> None:
    found = manifest(whole, "whole")
    passed = {check["name"] for check in found["checks"] if check["passed"]}
    assert passed >= {"trainable_parameters", "adapter_moved", "saved_embeddings_equal", "saved_prompts_equal"}
    assert found["metrics"]["held_out_rows"] == {"tool": 2, "qa": 3}
    assert found["metrics"]["rows"] == {"tool": 6, "qa": 13}
    assert found["metrics"]["steps"] == 2 * (1 + 2)
    gain = found["metrics"]["held_out_ndcg_at_10"]
    assert set(gain) == {"all", "tool", "qa"}
    rows = [
        json.loads(line)
        for line in (whole / "runs" / "whole" / "retriever" / "held_out_ndcg.jsonl").read_text().splitlines()
    ]
    assert gain["all"]["gain"]["mean"] == pytest.approx(np.mean([row["after"] - row["before"] for row in rows]))
    assert all(0 <= row["positives_on_top"] <= 1 for row in losses(whole, "whole"))


def test_a_step_in_parts_is_the_step(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows of a step compete, however few go through the encoder at once."""
    monkeypatch.chdir(whole)
    parts = ["train.batch_size=2", "train.gradient_accumulation=4"]
    assert run_command("retriever", command("parts", "train.epochs=2", "held_out_share=0.2", *parts)) == 0
    assert largest_difference(weights(whole, "whole"), weights(whole, "parts")) < 1e-5
    pairs = zip(losses(whole, "whole"), losses(whole, "parts"), strict=True)
    assert all(one["loss"] == pytest.approx(other["loss"], abs=1e-4) for one, other in pairs)


def test_an_interrupted_run_ends_as_one_in_a_piece(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(whole)
    given = command("cut", "train.epochs=2", "held_out_share=0.2", "train.save_steps=2")
    with monkeypatch.context() as patch:
        interrupt_at(5, patch)
        assert run_command("retriever", given) == 130
    assert run_command("retriever", [*given, "resume=true"]) == 0
    assert manifest(whole, "cut")["metrics"]["continued_from_step"] == 4
    assert largest_difference(weights(whole, "whole"), weights(whole, "cut")) == 0.0


def test_two_processes_train_what_one_trains(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has half of every step, in two parts, and all passages of the step compete."""
    monkeypatch.chdir(folder)
    more = ["train.epochs=1", "held_out_share=0", "train.logging_steps=5"]
    assert run_command("retriever", command("one", *more)) == 0
    parts = ["train.batch_size=2", "train.gradient_accumulation=4"]
    both = run_in_two(folder, ["retriever", *command("two", *more, *parts)])
    assert both.codes == [[0], [0]], both.err
    assert manifest(folder, "two")["metrics"]["processes"] == 2
    assert manifest(folder, "two")["metrics"]["steps"] == 3
    assert largest_difference(weights(folder, "one"), weights(folder, "two")) < 1e-5
    assert losses(folder, "one")[0]["loss"] == pytest.approx(losses(folder, "two")[0]["loss"], abs=1e-4)


def test_an_adapter_is_merged_into_a_plain_encoder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    given = command("lora", "tuning=lora", "lora.rank=4", "train.max_steps=3", "held_out_share=0")
    given.append("train.gradient_checkpointing=true")
    assert run_command("retriever", given) == 0
    start, found = load_file(folder / "bert" / "model.safetensors"), weights(folder, "lora")
    assert start.keys() == found.keys()
    changed = {name for name in start if not torch.equal(start[name], found[name])}
    assert changed
    assert all(name.endswith("weight") and ".layer." in name and "LayerNorm" not in name for name in changed)


def test_an_encoder_made_from_nothing_learns_the_words(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    from sentence_transformers import SentenceTransformer

    small = ["encoder.vocabulary=60", "encoder.dimensions=32", "train.max_steps=30", "objective.negatives=first"]
    given = ["run=new", "data.path=rows.jsonl", "negatives=2", "train.batch_size=8", "held_out_share=0.2", *small]
    assert run_command("retriever", given) == 0
    rows = losses(folder, "new")
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
    start, end = (SentenceTransformer(f"runs/new/retriever/{name}") for name in ("start", "model"))
    vectors = [each.encode(["who"], prompt_name="qa_query") for each in (start, end)]
    assert vectors[0].shape == vectors[1].shape == (1, 32) and abs(vectors[0] - vectors[1]).max() > 1e-3
    assert run_command("retriever", given) == 0  # up to date
    assert run_command("retriever", [*given, "name=again", "encoder.path=runs/new/retriever/model"]) == 0
    assert not (folder / "runs/new/again/start").exists()  # the caller has it


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["tuning=lora"], "no linear layers"),
        (["encoder.pooling=cls"], "encoder.path=new reads texts whole"),
        (["tasks={qa: {contrastive_weight: 0}}"], "nothing would be learned"),
        (["tasks={qa: {contrastiv_weight: 1}}"], "did you mean"),
        (["temperature=0"], "temperature=0.0: must be above 0"),
        (["train.packing=true"], "train.packing: only sft has it"),
        (["distributed.strategy=ddp"], "distributed.strategy=ddp is for several processes"),
        (["also=[rows.jsonl]"], "is also in rows.jsonl"),
        (["objective.min_teacher_score=9"], "teacher scores too low: lower min_teacher_score"),
        (["encoder.path=bert", "encoder.passage_max_length=100"], "reads at most 64 tokens"),
    ],
)
def test_what_cannot_work_is_said_at_once(
    more: list[str], said: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    assert run_command("retriever", ["run=bad", "data.path=rows.jsonl", "negatives=2", "held_out_share=0", *more]) == 2
    assert said in capsys.readouterr().err
