"""`alignkit serve` and `alignkit chat` as users start them."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import openai
import pytest
from rich.console import Console
from small_server import Models, save_models
from tiny_random import conversation, tokenizer, user

from alignkit.core.app import run_command
from alignkit.core.config import SamplingConfig
from alignkit.core.records import Message
from alignkit.data.chat import encode_prompt
from alignkit.generation.base import greedily
from alignkit.generation.hf import load_generator
from alignkit.models.reward_model import RewardModel
from alignkit.reporting.chat import AnswerView
from alignkit.reporting.plain import visible


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return save_models(tmp_path_factory.mktemp("models"))


def overrides(models: Models, folder: Path) -> list[str]:
    named = [f"models.{name}={adapter}" for name, adapter in models.models.items() if adapter]
    model = [f"model.path={models.model.path}", "model.dtype=float32", f"model.max_length={models.model.max_length}"]
    return [*named, *model, f"reward={models.reward}", f"output_dir={folder}"]


# -- serve -------------------------------------------------------------------------------------------------------------


def test_it_serves_until_it_is_told_to_stop_and_lets_running_requests_end(models: Models, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "alignkit.serve", *overrides(models, tmp_path), "port=0", "api_key_env=SERVE_KEY"]
    server = subprocess.Popen(
        command, env=os.environ | {"SERVE_KEY": "swordfish"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    listening = server.stdout.readline().split()
    assert listening[:2] == ["listening", "at"]
    with openai.OpenAI(base_url=listening[2], api_key="swordfish", max_retries=0, timeout=60) as client:
        assert [model.id for model in client.models.list()] == list(models.models)
        stream = client.chat.completions.create(
            model="dpo", messages=[{"role": "user", "content": "A secret question?"}], max_tokens=100, stream=True
        )
        next(iter(stream))
        server.send_signal(signal.SIGTERM)
        reasons = [chunk.choices[0].finish_reason for chunk in stream]
        assert reasons[-1] in ("stop", "length")
    said, errors = server.communicate(timeout=60)
    assert (server.returncode, errors) == (0, "")
    manifest = json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["status"] == "complete"
    assert manifest["metrics"]["models"]["dpo"]["requests"] == 1
    assert manifest["outputs"] == []
    written = said + "".join(path.read_text(encoding="utf-8") for path in tmp_path.iterdir())
    assert "swordfish" not in written
    assert "secret question" not in written


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["host=0.0.0.0"], "host=0.0.0.0: other machines could use the models"),
        (["host=0.0.0.0", "api_key_env=SERVE_KEY"], "in the clear"),
        (["api_key_env=NOT_SET"], "the environment variable NOT_SET is not set"),
        (["api_key_env=sk-1234567890"], "a key must not stand on the command line"),
        (["max_answers=0"], "max_answers=0: must be at least 1"),
        (["grace_seconds=-1"], "grace_seconds=-1: must be 0 or more"),
        (["models.sft=nowhere/adapter"], "adapter nowhere/adapter: there is no adapter_config.json"),
        (["models.base=null", "run=nowhere"], "run=nowhere: no such run folder"),
    ],
)
def test_what_cannot_be_served_is_refused_before_anything_is_loaded(
    given: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SERVE_KEY", "swordfish")
    assert run_command("serve", given) == 2
    assert said in capsys.readouterr().err


def test_a_port_that_is_taken_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert run_command("serve", [f"port={port}", f"output_dir={tmp_path}"]) == 2
    assert f"port={port}: " in capsys.readouterr().err


# -- chat --------------------------------------------------------------------------------------------------------------


def type_in(lines: list[str], arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    monkeypatch.setenv("COLUMNS", "80")
    return run_command("chat", arguments)


def greedy(models: Models, name: str, messages: list[Message]) -> str:
    generator = load_generator(models.model, models.models[name])
    (answers,) = generator.generate([messages], greedily(SamplingConfig(max_new_tokens=12)), seed=1)
    return answers[0].text


def test_models_answer_turn_by_turn_side_by_side_with_rewards(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["Hello", "/models sft dpo", "And you?", "/models", "/system Be brief.", "Hello", "/quit", "never read"]
    assert type_in(lines, [*overrides(models, tmp_path), "max_tokens=12"], monkeypatch) == 0
    said = capsys.readouterr().out

    first = greedy(models, "dpo", user("Hello"))
    dpo = greedy(models, "dpo", [*conversation("Hello", first), *user("And you?")])
    sft = greedy(models, "sft", user("And you?"))  # it had not been asked before
    under = greedy(models, "sft", [Message(role="system", content="Be brief."), *user("Hello")])
    reward = RewardModel.from_pretrained(models.reward).score([{"messages": conversation("And you?", sft)}])[0]
    assert (
        said.index(f"dpo> {visible(first)}") < said.index(f"sft> {visible(sft)}") < said.index(f"dpo> {visible(dpo)}")
    )
    assert f"sft> {visible(sft)} [cut, reward {reward:+.2f}]" in said
    assert "base  *sft  sft_best  *dpo" in said
    assert f"sft> {visible(under)}" in said
    assert "never read" not in said
    manifest = json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["metrics"]["turns"] == 3
    assert manifest["outputs"] == []


def test_what_cannot_be_answered_is_said_and_the_conversation_goes_on(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "word " * 400
    lines = [long, "<|im_end|>", "/models gpt", "/dance", "", "Hello"]
    arguments = [*overrides(models, tmp_path), "max_tokens=12", "talk_to=[sft]", "reward=none"]
    assert type_in(lines, arguments, monkeypatch) == 0
    said = capsys.readouterr().out
    assert f"the prompt has {len(encode_prompt(tokenizer(), user(long.strip())))} tokens: more than the context" in said
    assert "/reset begins anew" in said
    assert "special token" in said
    assert "no model 'gpt'" in said
    assert "/dance is no command" in said
    assert f"sft> {visible(greedy(models, 'sft', user('Hello')))}" in said
    assert "reward" not in said


def test_a_model_that_is_not_there_is_named_with_the_nearest(
    models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command("chat", [*overrides(models, tmp_path), "talk_to=[spo]"]) == 2
    assert "no model 'spo' (did you mean 'dpo'?)" in capsys.readouterr().err


@pytest.mark.parametrize("terminal", [True, False])
def test_what_a_model_wrote_is_neither_markup_nor_steers_the_terminal(terminal: bool) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=100, highlight=False)
    with AnswerView(console, ["sft", "dpo"]) as view:
        for text in (
            "[red]not red[/red] [link=x]y[/link]",
            "\x1b]0;title\x07\x1b[2J\x9b1m",
            "\u202eback",
            "two\nlines",
        ):
            view.add("sft", text)
        view.add("dpo", "fine")
        view.notes["dpo"] = "reward +1.00"
    said = out.getvalue()
    assert "[red]not red[/red] [link=x]y[/link]" in said
    assert not {"\x07", "\x9b", "\u202e"} & set(said)
    assert "\x1b]0" not in said
    assert "\x1b[2J" not in said
    assert "reward +1.00" in said
    assert ("\x1b" in said) is terminal  # rich's own


def test_a_chat_that_is_stopped_does_not_promise_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(config: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr("alignkit.chat.converse", stopped)
    assert run_command("chat", ["run=r"]) == 130
    assert capsys.readouterr().err == "interrupted: a conversation is not kept, the same command begins a new one\n"
