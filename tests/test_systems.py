"""Telling systems apart by what is at their path, and what each of them answers."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from misbehaving_server import serving
from tiny_random import random_model, save_random_base, tokenizer, user

from alignkit.core.app import load_config, run_command
from alignkit.core.artifact import Artifact
from alignkit.core.errors import UserError
from alignkit.data.chat import encode_prompt
from alignkit.evaluate import run
from alignkit.evaluation.answers import NOT_IN_FILE
from alignkit.evaluation.leakage import find_leakage
from alignkit.evaluation.predictions import Prediction, read_predictions
from alignkit.evaluation.systems import (
    ServersConfig,
    System,
    SystemKind,
    adapter_behind,
    check_servers_reachable,
    identify,
)
from alignkit.generation.hf import HFGenerator

NASTY = {
    "script": "<script>alert(1)</script>\"'&",
    "control": "a\x00b\x1b[31mred\x07\r\n\tc\x7f\x85",
    "right-to-left": "\u202e.si sihT\u2066 שלום\u2069 \u2028\u2029 \ufeff",
    "long": "word " * 210_000,
    "empty": "",
}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    """Three rows, about a statement each."""
    rows = [
        {"id": f"q{n}", "instruction": f"Notes: The seat of Fikico is {n}.", "input": "Where?", "output": f"At {n}."}
        for n in range(3)
    ]
    return write(tmp_path / "test.jsonl", rows)


def examine(folder: Path, *given: str) -> Artifact:
    base = ["data.path=test.jsonl", "judge=false", "models.base=null", "run=r"]
    return run(load_config("evaluate", [*base, f"output_dir={folder / 'out'}", *given]))


def texts(artifact: Artifact, name: str) -> dict[str, str]:
    rows = read_predictions(artifact.folder / "predictions.jsonl")
    return {row.id: row.answers[name].text for row in rows if name in row.answers}


# -- what is what ------------------------------------------------------------------------------------------------------


def test_each_kind_is_known_by_what_is_there(tmp_path: Path) -> None:
    for name, file in {"adapter": "adapter_config.json", "merged": "config.json"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("{}")
    (tmp_path / "weights.bin").write_bytes(b"GGUF\x03")
    write(tmp_path / "answers.jsonl", [{"id": "1", "text": "x"}])
    models = {
        "base": "",
        "sft": str(tmp_path / "adapter"),
        "whole": str(tmp_path / "merged"),
        "hub": "owner/name",
        "file": str(tmp_path / "weights.bin"),
        "vllm": "http://127.0.0.1:8000/v1/#qwen/sft",
        "theirs": str(tmp_path / "answers.jsonl"),
    }
    found = identify(models)
    assert [system.name for system in found] == list(models)
    kinds = ["base", "adapter", "model", "model", "gguf", "server", "answers"]
    assert [system.kind.name for system in found] == kinds
    assert (found[5].source, found[5].served_as) == ("http://127.0.0.1:8000/v1", "qwen/sft")
    assert [system.name for system in found if not system.kind.runs_here] == ["vllm", "theirs"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("run", r"models.x=run: neither an adapter .* Did you mean run/adapter, run/a.gguf\?"),
        ("empty", r"neither an adapter .* Correct the path"),
        ("cut.gguf", "not a GGUF file, whatever its name says"),
        ("notes.txt", r"no adapter or model folder, no .gguf, and no file of answers"),
        ("runs/nowhere/adapter", "models.x=runs/nowhere/adapter: no such file or folder"),
        ("http://127.0.0.1:1/v1", r"name the model .* http://127.0.0.1:1/v1#<model>"),
        ("http://localhost:80a/v1#m", "models.x is not a URL"),
        ("https://host/v1?token=hush#m", r"models.x: an address must hold no user, password or query"),
    ],
)
def test_what_is_no_system_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run/adapter").mkdir(parents=True)
    Path("run/a.gguf").touch()
    Path("empty").mkdir()
    Path("cut.gguf").write_bytes(b"GG")
    Path("notes.txt").write_text("notes")
    with pytest.raises(UserError, match=message) as error:
        identify({"x": source})
    assert "hush" not in str(error.value)


def test_names_and_keys_are_checked(held_out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="name at least one"):
        identify({})
    with pytest.raises(UserError, match=r"'\.\./x' is no name"):  # it becomes the name of a file
        identify({"../x": ""})
    monkeypatch.chdir(held_out.parent)
    with pytest.raises(UserError, match=r"servers.api_key_env.gpt: no server among the models"):
        examine(held_out.parent, "models.base=''", "servers.api_key_env.gpt=MY_KEY")
    with pytest.raises(UserError, match=r"passages.documents: not read with contexts=clean"):
        examine(held_out.parent, "models.base=''", "passages.documents=test.jsonl")


def test_a_key_in_place_of_its_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("evaluate", ["servers.api_key_env.gpt=abcdef123456"]) == 2
    assert "a key must not stand on the command line" in capsys.readouterr().err


def test_what_an_exported_model_was_trained_on_is_known(held_out: Path, tmp_path: Path) -> None:
    """The rows that an export was measured on are no training rows."""
    folder = tmp_path / "export"
    folder.mkdir()
    inputs = [{"key": "adapter", "path": "runs/x/sft/adapter"}, {"key": "data.path", "path": str(held_out)}]
    manifest = {"stage": "export", "status": "complete", "fingerprint": "", "inputs": inputs, "outputs": []}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert adapter_behind(System("m", SystemKind.model, str(folder / "merged"))) == "runs/x/sft/adapter"
    assert adapter_behind(System("m", SystemKind.gguf, str(tmp_path / "other.gguf"))) is None
    assert find_leakage([], ["runs/x/sft/adapter"]).unknown == {"runs/x/sft/adapter"}


# -- answers that were written elsewhere -------------------------------------------------------------------------------


def test_nasty_answers_pass_through_unharmed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "test.jsonl", [{"id": id, "instruction": "S.", "input": "Q?", "output": "A."} for id in NASTY])
    write(tmp_path / "answers.jsonl", [{"id": id, "text": text} for id, text in NASTY.items()])
    artifact = examine(tmp_path, "models.theirs=answers.jsonl")
    assert texts(artifact, "theirs") == NASTY
    assert len((artifact.folder / "predictions.jsonl").read_bytes().split(b"\n")) == len(NASTY) + 1
    again = examine(tmp_path, f"models.theirs={artifact.folder / 'predictions.jsonl'}", f"output_dir={tmp_path / 'b'}")
    assert texts(again, "theirs") == NASTY


def test_rows_that_one_system_lacks_count_for_neither(
    held_out: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(held_out.parent)
    old = [{"id": f"q{n}", "text": "At 0."} for n in (0, 1, 9)]
    new = [{"id": f"q{n}", "completions": [{"text": f"At {n}.", "model": "m"}]} for n in (1, 2)]
    write(held_out.parent / "old.jsonl", old)
    write(held_out.parent / "new.jsonl", new)
    with caplog.at_level(logging.INFO, "alignkit"):
        artifact = examine(held_out.parent, "models={old: old.jsonl, new: new.jsonl}")
    assert [sorted(row.answers) for row in read_predictions(artifact.folder / "predictions.jsonl")] == [
        ["old"],
        ["new", "old"],
        ["new"],
    ]
    assert artifact.metrics["unanswered"] == {"old": {NOT_IN_FILE: 1}, "new": {NOT_IN_FILE: 1}}
    assert artifact.metrics["models"]["old"]["exact_match"]["mean"] == 0.5
    assert artifact.metrics["models"]["new"]["exact_match"]["mean"] == 1
    (comparison,) = artifact.metrics["comparisons"]
    assert (comparison["exact_match"]["n"], comparison["exact_match"]["mean"]) == (1, 1.0)
    written = [json.loads(line) for line in (artifact.folder / "unanswered.jsonl").read_text().splitlines()]
    assert [(row["model"], row["id"], row["reason"]) for row in written] == [
        ("old", "q2", NOT_IN_FILE),
        ("new", "q0", NOT_IN_FILE),
    ]
    assert "old has no answer to 1 of 3 questions, and is compared on the others" in caplog.text
    assert "1 of its answers are to rows that are not examined here" in caplog.text
    assert "training data unknown: models.new, models.old" in artifact.checks[0].detail


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, "answers.jsonl:1: no id"),
        ({"id": "q0"}, "answers.jsonl:1: text: missing"),
        ({"id": "q0", "completions": [{"text": t, "model": "m"} for t in "ab"]}, ":1: 2 completions; give one answer"),
        ({"id": "other", "text": "x"}, "answers none of the 3 held-out rows, its first id is 'other', theirs is 'q"),
    ],
)
def test_bad_files_of_answers(
    held_out: Path, monkeypatch: pytest.MonkeyPatch, row: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(held_out.parent)
    write(held_out.parent / "answers.jsonl", [row])
    with pytest.raises(UserError, match=message):
        examine(held_out.parent, "models.theirs=answers.jsonl")


# -- servers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("way", "text"), [("cut", "half a"), ("cut_while_thinking", "")])
def test_a_server_answers_and_what_it_cut_or_refused_is_known(
    held_out: Path, monkeypatch: pytest.MonkeyPatch, way: str, text: str
) -> None:
    monkeypatch.chdir(held_out.parent)
    monkeypatch.setenv("MY_KEY", "canary-key-12345")

    def behaviour(prompt: str, attempt: int) -> str:
        return {"0": "ok", "1": way, "2": "too_long"}[prompt.split(".")[0][-1]]

    with serving(behaviour) as server:
        address = [f"models.served='{server.base_url}#some/model'", "servers.api_key_env.served=MY_KEY"]
        artifact = examine(held_out.parent, *address)
        assert examine(held_out.parent, *address).up_to_date
        assert {body["model"] for body in server.bodies} == {"some/model"}
        assert server.keys == {"canary-key-12345"}
        assert len(server.bodies) == 3
    answers = texts(artifact, "served")
    assert answers == {"q0": "reply to Notes: The seat of Fikico is 0.\n\nWhere?", "q1": text}
    rows = read_predictions(artifact.folder / "predictions.jsonl")
    assert [row.answers["served"].finished for row in rows[:2]] == [True, False]
    assert artifact.metrics["unanswered"] == {"served": {"prompt too long for the model": 1}}
    assert artifact.metrics["servers"]["served"]["requests"] == 3
    written = [file.read_bytes() for file in artifact.folder.rglob("*") if file.is_file()]
    assert not any(b"canary-key" in content for content in written)


def test_a_server_that_does_not_know_the_model(held_out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(held_out.parent)
    with serving(lambda prompt, attempt: "unknown_model") as server:
        said = r"models.served gone at .*no such model.* mend the server, models.served or servers.api_key_env.served"
        with pytest.raises(UserError, match=said):
            examine(held_out.parent, f"models.served='{server.base_url}#gone'")


def test_a_server_that_is_not_there_is_noticed_before_any_work(held_out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not after minutes of retries; and its settings are named, not a teacher's."""
    monkeypatch.chdir(held_out.parent)
    began = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(UserError, match=rf"models.gpt=http://127.0.0.1:{port}/v1: no server answers there .*Start it"):
        examine(held_out.parent, f"models.gpt='http://127.0.0.1:{port}/v1#m'", "models.base=''")
    with pytest.raises(UserError, match=r"models.gpt=http://host/v1: .*in the clear.* servers.allow_http=true"):
        examine(held_out.parent, "models.gpt='http://host/v1#m'")
    with pytest.raises(UserError, match=r"servers.api_key_env.gpt=NOT_SET: .*not set"):
        examine(held_out.parent, f"models.gpt='http://127.0.0.1:{port}/v1#m'", "servers.api_key_env.gpt=NOT_SET")
    with pytest.raises(UserError, match=r"servers.concurrency must be at least 1"):
        examine(held_out.parent, f"models.gpt='http://127.0.0.1:{port}/v1#m'", "servers.concurrency=0")
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (503, "{}", r"models.m=.*: the server is not ready \(status 503\)"),
        (401, "{}", r"models.m=.*: the key was refused \(status 401\). servers.api_key_env.m takes the NAME"),
    ],
)
def test_a_server_that_cannot_answer_yet_stops_it(tmp_path: Path, status: int, body: str, message: str) -> None:
    with listing(status, body) as url, pytest.raises(UserError, match=message):
        reach(url, tmp_path)


def test_a_model_that_is_not_listed_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """llama.cpp takes any name; other servers have no list at all."""
    for status, body, warnings in [
        (200, '{"data": [{"id": "sft"}, {"id": "dpo"}]}', 1),
        (200, '{"data": [{"id": "gone"}]}', 0),
        (200, "<html>", 0),
        (404, "{}", 0),
    ]:
        caplog.clear()
        with listing(status, body) as url:
            reach(url, tmp_path)
        assert len(caplog.records) == warnings
        assert all(
            "models.m: the server does not list 'gone' among its models: sft, dpo" in each for each in caplog.messages
        )


def reach(url: str, folder: Path) -> None:
    system = System("m", SystemKind.server, url, "gone")
    check_servers_reachable([system], ServersConfig(), {"m": folder / "none.sqlite"})


@contextmanager
def listing(status: int, body: str) -> Iterator[str]:
    """A server that answers every GET with the same."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.path == "/v1/models"
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, format: str, *values: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("way", ["searches", "searches_in_text"])
def test_a_server_searches_for_itself_and_goes_on_without_paying_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """By the parameter `tools`, or where that is refused by the text of the prompt."""
    monkeypatch.chdir(tmp_path)
    seats = {"Fikico": "Padera", "Ferro": "Posil", "Bakoco": "Lund"}
    rows = [
        {"id": x, "instruction": f"Notes: {x} is in {y}.", "input": f"Where is {x}?", "output": y}
        for x, y in seats.items()
    ]
    write(tmp_path / "test.jsonl", rows)
    broken = True

    def behaviour(prompt: str, attempt: int) -> str:
        return "refused" if broken and prompt.startswith("Notes:") else way

    with serving(behaviour) as server:
        given = [f"models.served='{server.base_url}#m'", "contexts=multihop", "sampling.temperature=[0.2,0.9]"]
        with pytest.raises(UserError, match="the key was refused"):  # after the first step
            examine(tmp_path, *given)
        assert sorted(server.completed) == sorted(row["input"] for row in rows)
        broken = False
        artifact = examine(tmp_path, *given)
        assert set(server.completed.values()) == {1}
        last = server.bodies[-1]
    answers = {row.id: row.answers["served"] for row in read_predictions(artifact.folder / "predictions.jsonl")}
    for row in rows:
        answer = answers[row["id"]]
        assert (answer.queries, answer.contexts) == ([row["input"]], [row["instruction"]])
        assert (answer.text, answer.scores["hops"]) == (f"reply to {row['instruction']}", 1)
    assert artifact.metrics["searches"]["served"]["searched"] == 1
    roles = ["user", "assistant", "tool"] if way == "searches" else ["system", "user", "assistant", "tool"]
    assert [turn["role"] for turn in last["messages"]] == roles
    if way == "searches":
        (call,) = last["messages"][1]["tool_calls"]
        assert json.loads(call["function"]["arguments"])["query"].startswith("Where is")
        assert last["messages"][2]["tool_call_id"] == call["id"]
        assert last["tools"][0]["function"]["name"] == "retrieve"
    else:
        assert '"name": "retrieve"' in last["messages"][0]["content"]
        assert last["messages"][2]["content"].startswith("<tool_call>")


# -- models on this machine --------------------------------------------------------------------------------------------


def test_a_whole_model_and_a_gguf_file_answer_as_the_base_does(held_out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    from alignkit.models.gguf import write_gguf
    from alignkit.models.gguf_types import GGUFType
    from alignkit.models.merging import save_checkpoint

    monkeypatch.chdir(held_out.parent)
    save_random_base(held_out.parent / "base")
    save_checkpoint(random_model(), tokenizer(), held_out.parent / "merged")
    write_gguf(held_out.parent / "merged", tokenizer(), held_out.parent / "m.gguf", GGUFType.f32, "m")
    models = ["models={base: '', whole: merged, gguf: m.gguf}", "model.path=base"]
    artifact = examine(held_out.parent, *models, "sampling.max_new_tokens=6", "model.max_length=256")
    answers = {name: texts(artifact, name) for name in ("base", "whole", "gguf")}
    assert any(answers["base"].values())
    assert answers["whole"] == answers["gguf"] == answers["base"]


def test_longest_prompts_come_first_and_every_model_is_labelled(
    held_out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(held_out.parent)
    write(
        held_out.parent / "test.jsonl",
        [{"id": str(n), "instruction": "Hello. " * n, "input": "Q?", "output": "A"} for n in (1, 7, 3)],
    )
    save_random_base(held_out.parent / "base")
    seen: list[tuple[str, list[int]]] = []
    generate = HFGenerator.generate

    def watched(self: HFGenerator, prompts: Any, *rest: Any) -> Any:
        seen.append((self.label, [len(prompt[0].content) for prompt in prompts]))
        return generate(self, prompts, *rest)

    monkeypatch.setattr(HFGenerator, "generate", watched)
    given = ["models={base: ''}", "model.path=base", "sampling.max_new_tokens=2", "model.max_length=64"]
    artifact = examine(held_out.parent, *given)
    ((label, lengths),) = seen
    assert label == "base"
    assert lengths == sorted(lengths, reverse=True)
    assert [row.id for row in read_predictions(artifact.folder / "predictions.jsonl")] == ["1", "7", "3"]
    longest = len(encode_prompt(tokenizer(), user("Hello. " * 7 + "\n\nQ?")))
    for room, dropped in ((2, {}), (1, {"prompt and max_new_tokens exceed max_length": 1})):
        tight = [*given[:-1], f"model.max_length={longest + room}", f"output_dir={held_out.parent / str(room)}"]
        assert examine(held_out.parent, *tight).dropped == dropped


def test_a_prediction_without_any_answer_can_be_read() -> None:
    row = Prediction(id="1", instruction="S", input="Q", reference="A", answers={})
    assert row.score("x", "exact_match") is None
