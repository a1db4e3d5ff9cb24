"""Training in two real processes: the result of one, one writer, one message, and an end for all."""

from __future__ import annotations

import importlib.util
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import small_retriever
import torch
from safetensors.torch import load_file
from tiny_random import conversation, save_random_base
from two_processes import Ended, finish, run_in_two, torchrun

from alignkit.core.app import run_command
from alignkit.core.config import LoraConfig
from alignkit.core.manifest import read_manifest
from alignkit.models.loading import load_base, new_adapter, save_adapter
from alignkit.training.checkpoints import newest_intact

PLACES = "Oslo Rome Lima Kyiv Bern Riga Baku".split()
STEPS = ["train.batch_size=4", "train.gradient_accumulation=2", "train.warmup_share=0", "train.learning_rate=1e-3"]
LORA = ["lora.rank=4", "lora.dropout=0"]
RETRIEVAL = importlib.util.find_spec("sentence_transformers") is not None
RETRIEVER = ["train.epochs=1", "held_out_share=0", "train.logging_steps=5"]


def questions(count: int) -> list[dict[str, Any]]:
    """Rows of different length; 19 of them make two optimizer steps of 8 and one of 3."""
    rows = []
    for number in range(count):
        place, other = PLACES[number % 7], PLACES[(number + 3) % 7]
        statement = "Anna lives here. " * (number % 4) + f"Bo lives in {place}."
        rows.append({"id": f"q{number}", "instruction": statement, "input": "Where?", "output": place, "worse": other})
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random base, an adapter for it, and rows for every training stage."""
    folder = tmp_path_factory.mktemp("work")
    model = save_random_base(folder / "base")
    torch.manual_seed(1)
    save_adapter(
        new_adapter(load_base(model), LoraConfig(rank=4, dropout=0.0), ["q_proj", "up_proj"]), folder / "first", model
    )
    rows, pairs = questions(19), []
    worse = [{**row, "output": "Xyz! Xyz!"} for row in rows[:5]]  # what no row teaches
    for row in questions(16):
        turns = [
            [turn.model_dump() for turn in conversation(row["instruction"], row[side])] for side in ("output", "worse")
        ]
        pairs.append({"id": row["id"], "prompt": turns[0][:1], "chosen": turns[0][1:], "rejected": turns[1][1:]})
    graded = [
        {"id": pair["id"], "prompt": pair["prompt"], "completions": [
            {"text": pair[side][0]["content"], "model": "m", "score": score}
            for side, score in (("chosen", 9), ("rejected", 2))
        ]}
        for pair in pairs[8:]
    ]  # fmt: skip
    for name, content in (
        ("rows", rows), ("pairs", pairs), ("graded", graded), ("two", rows[:2]), ("worse", worse)
    ):  # fmt: skip
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    if RETRIEVAL:
        small_retriever.write_queries(folder)
    return folder


def commands(folder: Path, run: str) -> dict[str, list[str]]:
    """The training commands."""
    base = ["model=tiny", f"model.path={folder / 'base'}", "model.max_length=256", f"run={run}", *STEPS]
    pairs = ["data.path=graded.jsonl", "preferences.path=pairs.jsonl", "preferences.limit=8", "held_out_share=0"]
    pairs += ["heads=2", "regress_weight=0.1", "center_weight=0.01", f"adapter={folder / 'first'}"]
    return {
        "sft": ["sft", *base, "data.path=rows.jsonl", "train.epochs=2", *LORA],
        "dpo": ["dpo", *base, "data.path=pairs.jsonl", "train.epochs=1", f"init_adapter={folder / 'first'}"],
        "reward": ["reward", *base, *pairs, "train.epochs=1"],
    }


@pytest.fixture(scope="module")
def both(folder: Path) -> Ended:
    """A training stage in two processes, a second time the same, and a stage that is not for two."""
    sft = commands(folder, "two")["sft"]
    return run_in_two(folder, sft, sft, ["evaluate", "run=two"])


@pytest.fixture(scope="module")
def others(folder: Path) -> Ended:
    """The other training stages in two processes."""
    two = commands(folder, "two")
    parts = ["train.batch_size=2", "train.gradient_accumulation=4"]
    retriever = [["retriever", *small_retriever.command("two", *RETRIEVER, *parts)]] if RETRIEVAL else []
    return run_in_two(folder, two["dpo"], two["reward"], *retriever)


def weights(folder: Path, run: str, stage: str) -> dict[str, torch.Tensor]:
    found = load_file(folder / "runs" / run / stage / "adapter" / "adapter_model.safetensors")
    head = folder / "runs" / run / stage / "value_head.safetensors"
    return found | (load_file(head) if head.exists() else {})


def manifest(folder: Path, stage: str, run: str = "two") -> dict[str, Any]:
    found = read_manifest(folder / "runs" / run / stage)
    assert found is not None
    return found


def test_all_commands_end_alike_in_both_processes(both: Ended) -> None:
    assert both.codes[0] == [0, 0, 2]
    assert both.codes[1][:2] == [0, 0]


@pytest.mark.slow  # torch is imported twice more, and what two processes do otherwise is the same code for all stages
def test_the_other_stages_end_alike_in_both_processes(others: Ended) -> None:
    assert others.codes == [[0] * (3 if RETRIEVAL else 2)] * 2


@pytest.mark.parametrize(
    ("fixture", "stage"),
    [
        ("both", "sft"),
        pytest.param("others", "dpo", marks=pytest.mark.slow),
        pytest.param("others", "reward", marks=pytest.mark.slow),
    ],
)
def test_two_processes_train_what_one_trains(
    fixture: str, stage: str, folder: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """The same rows in every optimizer step, each once: the same adapter, within rounding."""
    request.getfixturevalue(fixture)
    monkeypatch.chdir(folder)
    assert run_command(stage, commands(folder, "one")[stage][1:]) == 0
    alone, shared, start = (weights(folder, run, stage) for run in ("one", "two", "one"))
    assert alone.keys() == shared.keys()
    assert max(float((alone[name] - shared[name]).abs().max()) for name in start) < 1e-5
    one, two = (manifest(folder, stage, run) for run in ("one", "two"))
    assert (one["metrics"]["processes"], two["metrics"]["processes"]) == (1, 2)
    assert one["metrics"]["steps"] == two["metrics"]["steps"] == {"sft": 6}.get(stage, 2)
    assert one["metrics"]["last_loss"] == pytest.approx(two["metrics"]["last_loss"], abs=1e-5)
    assert one["fingerprint"] == two["fingerprint"]  # their number does not make it another piece of work
    agree = [check for check in two["checks"] if check["name"] == "processes_agree"]
    assert len(agree) == 2
    assert agree[0]["detail"].startswith("2 processes")


@pytest.mark.slow  # as above
@pytest.mark.skipif(not RETRIEVAL, reason="alignkit[retrieval]")
@pytest.mark.usefixtures("others")
def test_two_processes_train_the_retriever_that_one_trains(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has half of every step, in two parts, and all passages of the step compete."""
    monkeypatch.chdir(folder)
    assert run_command("retriever", small_retriever.command("one", *RETRIEVER)) == 0
    alone, shared = (small_retriever.weights(folder, run) for run in ("one", "two"))
    assert small_retriever.largest_difference(alone, shared) < 1e-5
    metrics = small_retriever.manifest(folder, "two")["metrics"]
    assert (metrics["processes"], metrics["steps"]) == (2, 3)
    one, two = (small_retriever.losses(folder, run)[0]["loss"] for run in ("one", "two"))
    assert one == pytest.approx(two, abs=1e-4)


def test_one_process_writes_and_speaks(both: Ended, folder: Path) -> None:
    assert both.written[1] == set()
    assert "two/sft/manifest.json" in {name.replace(".partial", "").replace("/.", "/") for name in both.written[0]}
    assert both.out[1] == ""
    late = r"(error: process 1 of 2: evaluate is the work of one process.*\n)?"  # a slow launcher lets it say that, too
    assert re.fullmatch(late, both.err[1])
    assert both.out[0].count("sft: 2 processes share each optimizer step of 8 rows: 4 each, 4 at once") == 1
    assert both.out[0].count("sft is up to date") == 1
    assert "error: evaluate is the work of one process: start it without torchrun" in both.err[0]
    assert "Traceback" not in both.err[0]
    assert manifest(folder, "sft")["status"] == "complete"


def test_a_mistake_is_told_once(folder: Path) -> None:
    ended = finish(torchrun(folder, "-m", "alignkit.sft", "model=tiny", "run=bad", "data.path=nowhere.jsonl"), folder)
    assert ended.code == 1  # torchrun's own, whatever the code of its processes
    assert "exitcode  : 2" in ended.said
    told = "".join(path.read_text() for path in folder.glob("log/*/attempt_0/*/std*.log"))
    assert told.count("error: data.path=nowhere.jsonl: no such file or folder") == 1
    assert not (folder / "runs/bad").exists()


MEASURED = ["train.eval_steps=2", "train.logging_steps=2", "train.keep=best", "train.sample_prompts=2"]
KINDS = {
    "held_out": [*MEASURED, "held_out_share=0.25", "train.epochs=4"],
    "best": [*MEASURED, "held_out.path=worse.jsonl", "train.learning_rate=1e-2", "train.epochs=3"],
    "packed": ["train.packing=true", "model.max_length=64", "train.batch_size=2", "train.gradient_accumulation=1"],
    "padding_free": ["train.padding_free=true"],
    "pissa": ["lora.init=pissa"],
}
"""What `sft` has besides, which two processes must do like one."""


@pytest.fixture(scope="module")
def kinds(folder: Path) -> Ended:
    return run_in_two(folder, *([*commands(folder, kind)["sft"], *more] for kind, more in KINDS.items()))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_do_what_one_does(kinds: Ended, folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kinds.codes == [[0] * len(KINDS)] * 2, kinds.err
    assert kinds.written[1] == set()
    monkeypatch.chdir(folder)
    assert run_command("sft", [*commands(folder, f"{kind}_alone")["sft"][1:], *KINDS[kind]]) == 0
    alone, shared = (weights(folder, run, "sft") for run in (f"{kind}_alone", kind))
    one, two = (manifest(folder, "sft", run)["metrics"] for run in (f"{kind}_alone", kind))
    assert max(float((alone[name] - shared[name]).abs().max()) for name in alone) < 1e-5
    for name in ("steps", "packing", "learned_tokens"):
        assert one.get(name) == two.get(name)
    assert one["last_loss"] == pytest.approx(two["last_loss"], abs=1e-5)
    if kind in ("held_out", "best"):
        assert one["held_out"] == pytest.approx(two["held_out"], abs=1e-5)
        assert two["held_out"]["kept_step"] == {"held_out": 8, "best": 2}[kind]
        samples = [(folder / "runs" / run / "sft/samples.jsonl").read_text() for run in (f"{kind}_alone", kind)]
        assert samples[0] == samples[1]


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_at_the_same_step(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a checkpoint of that step, from which the run goes on to the weights of one in one piece."""
    command = [*commands(folder, "told")["sft"], "lora.dropout=0.2"]
    ended = run_in_two(folder, ["sft", "signal:1:4", *command[1:]])
    assert ended.codes[0] == ended.codes[1] == [130]
    assert "sft: stopped after step 4, its checkpoint is saved" in ended.out[0]
    assert ended.err[0].count("interrupted: what is finished is saved") == 1
    assert "interrupted" not in ended.err[1]
    assert "Traceback" not in ended.err[0] + ended.err[1]
    assert manifest(folder, "sft", "told")["error"] == "interrupted"
    checkpoints = folder / "runs/told/sft/unfinished/checkpoints"
    assert [path.name for path in checkpoints.glob("checkpoint-*")] == ["checkpoint-4"]
    assert newest_intact(checkpoints) is not None
    assert run_in_two(folder, command).codes == [[0], [0]]
    assert manifest(folder, "sft", "told")["metrics"]["continued_from_step"] == 4
    run_in_two(folder, [*commands(folder, "untold")["sft"], "lora.dropout=0.2"])
    for name, weight in weights(folder, "untold", "sft").items():
        assert torch.equal(weight, weights(folder, "told", "sft")[name]), name


@pytest.mark.slow
def test_an_error_in_one_process_ends_all(folder: Path, tmp_path: Path) -> None:
    command = commands(folder, "enough")["sft"]
    ended = run_in_two(folder, [command[0], "fail:1:2", *command[1:]])
    assert "error: process 1 of 2: this process had enough" in ended.err[1]
    assert "Traceback" not in ended.err[0] + ended.err[1]
    assert "interrupted" in ended.err[0]
    assert manifest(folder, "sft", "enough")["status"] == "failed"


@pytest.mark.slow
def test_an_interrupted_run_continues_with_as_many_processes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after a checkpoint, with dropout on: continued, it is the run in one piece."""
    saving = ["lora.dropout=0.2", "train.logging_steps=1", "train.save_steps=2"]
    whole, cut = ([*commands(folder, run)["sft"], *saving] for run in ("whole", "cut"))
    run_in_two(folder, whole)
    run_in_two(folder, ["sft", "fail:1:5", *cut[1:]])
    checkpoint = folder / "runs/cut/sft/unfinished/checkpoints/checkpoint-4"
    assert {f"rng_state_{rank}.pth" for rank in (0, 1)} <= json.loads((checkpoint / "seal.json").read_text()).keys()

    monkeypatch.chdir(folder)
    assert run_command("sft", cut[1:]) == 2  # one process: refused, and nothing is deleted
    assert run_in_two(folder, [*cut, "resume=true"]).codes == [[0], [0]]
    assert manifest(folder, "sft", "cut")["metrics"]["continued_from_step"] == 4
    for name, weight in weights(folder, "whole", "sft").items():
        assert torch.equal(weight, weights(folder, "cut", "sft")[name]), name


@pytest.mark.slow
def test_sigterm_ends_both_with_their_state_saved(folder: Path) -> None:
    command = [*commands(folder, "stopped")["sft"][1:], "train.epochs=500", "train.save_steps=5"]
    process = torchrun(folder, "-m", "alignkit.sft", *command)
    checkpoints = folder / "runs/stopped/sft/unfinished/checkpoints"
    while process.poll() is None and not list(checkpoints.glob("checkpoint-*/seal.json")):
        time.sleep(0.05)
    process.terminate()
    ended = finish(process, folder, timeout=60)
    assert ended.err[0].splitlines()[-1] == "interrupted: what is finished is saved, the same command continues"
    assert ended.err[1] == ""
    assert manifest(folder, "sft", "stopped")["error"] == "interrupted"
    assert newest_intact(checkpoints) is not None


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs alignkit[deepspeed]")
@pytest.mark.parametrize("option", ["deepspeed_zero2", "deepspeed_zero3"])
def test_deepspeed_trains_what_one_process_trains(folder: Path, option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = ["model.dtype=float32", "model.quantization=nf4", "model.quant_storage=float32"]
    ended = run_in_two(folder, [*commands(folder, option)["sft"], f"distributed={option}", *storage])
    assert ended.codes == [[0], [0]], ended.err[0]
    monkeypatch.chdir(folder)
    assert run_command("sft", [*commands(folder, f"{option}_one")["sft"][1:], *storage]) == 0
    alone, shared = (weights(folder, run, "sft") for run in (f"{option}_one", option))
    assert max(float((alone[name] - shared[name]).abs().max()) for name in alone) < 1e-5
