"""The stage retriever: a tiny random BERT learns which words answer which."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_retriever import command, largest_difference, losses, manifest, weights, write_queries
from small_training import interrupt_at

from alignkit.core.app import run_command

pytestmark = pytest.mark.skipif(find_spec("sentence_transformers") is None, reason="alignkit[retrieval]")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_queries(tmp_path_factory.mktemp("work"))


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
    given = ["run=new", "data.path=queries.jsonl", "negatives=2", "train.batch_size=8", "held_out_share=0.2", *small]
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
        (["also=[queries.jsonl]"], "is also in queries.jsonl"),
        (["objective.min_teacher_score=9"], "teacher scores too low: lower min_teacher_score"),
        (["encoder.path=bert", "encoder.passage_max_length=100"], "reads at most 64 tokens"),
    ],
)
def test_what_cannot_work_is_said_at_once(
    more: list[str], said: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    given = ["run=bad", "data.path=queries.jsonl", "negatives=2", "held_out_share=0"]
    assert run_command("retriever", [*given, *more]) == 2
    assert said in capsys.readouterr().err
