"""Text while tokens come, and turns in which requests join and leave."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from small_server import Models, save_models
from tiny_random import tokenizer, user

from alignkit.core.config import SamplingConfig
from alignkit.core.errors import UserError
from alignkit.data.chat import encode_prompt
from alignkit.generation.continuous import BusyError, Engine, Part, Request, _read_together
from alignkit.generation.text_stream import TextStream
from alignkit.models.loading import load_policy
from alignkit.models.shared_base import SharedBase, choose_models, choose_reward_model

TEXTS = ("The product of Bakoco is clocks.", "日本語とemoji 🎉🏳️‍🌈, ünïcödé\n\n\ttabs", "", "�")


# -- text --------------------------------------------------------------------------------------------------------------


def written(tokens: list[int], *stop: str) -> tuple[list[str], bool]:
    stream = TextStream(tokenizer(), stop)
    parts = []
    for token in tokens:
        parts.append(stream.push(token))
        if stream.stopped:
            return parts, True
    return [*parts, stream.finish()], stream.stopped


@pytest.mark.parametrize("text", TEXTS)
def test_the_parts_of_a_text_are_the_text(text: str) -> None:
    parts, _ = written(tokenizer().encode(text, add_special_tokens=False))
    assert "".join(parts) == text


def test_the_parts_of_any_tokens_are_what_they_decode_to_and_no_half_characters() -> None:
    random = Random(1)
    for _ in range(200):
        tokens = [random.randrange(len(tokenizer())) for _ in range(random.randrange(40))]
        parts, _ = written(tokens)
        assert "".join(parts) == tokenizer().decode(tokens, skip_special_tokens=True)
        assert not any(part.endswith("\ufffd") for part in parts[:-1])


@pytest.mark.parametrize(
    ("stop", "expected", "stopped"),
    [
        (("of",), "The product ", True),
        (("duct of B",), "The pro", True),
        (("clocks!", "is"), "The product of Bakoco ", True),
        (("clocks.X",), TEXTS[0], False),  # held back until it is known not to come
        (("The",), "", True),
        (("o", "of"), "The pr", True),
    ],
)
def test_a_stop_string_is_found_wherever_the_tokens_part(stop: tuple[str, ...], expected: str, stopped: bool) -> None:
    parts, found = written(tokenizer().encode(TEXTS[0], add_special_tokens=False), *stop)
    assert ("".join(parts), found) == (expected, stopped)


# -- turns -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def base(models: Models) -> SharedBase:
    return SharedBase(models.model, models.models)


class Asked:
    """A request and what came of it; `log` is told when its last answer ends."""

    def __init__(self, model: str, log: list[str], tokens: int = 4, n: int = 1) -> None:
        sampling = SamplingConfig(n=n, temperature=[0.0, 0.0], top_p=[1.0, 1.0], max_new_tokens=tokens)
        prompt = encode_prompt(tokenizer(), user("Who leads Ferro?"))
        self.request = Request(model, prompt, sampling, 1, tokenizer(), self.receive)
        self.model, self.log, self.open, self.reasons = model, log, n, set[str]()
        self.done = threading.Event()

    def receive(self, part: Part) -> None:
        if part.finish_reason and self.open:
            self.reasons.add(part.finish_reason)
            self.open -= 1
            if not self.open:
                self.log.append(self.model)
                self.done.set()


def submit_all(engine: Engine, asked: list[Asked]) -> None:
    """Submit requests so that the engine finds all of them at its next turn."""
    begun, go = threading.Event(), threading.Event()

    def hold() -> None:
        begun.set()
        go.wait()

    engine.call(hold)
    begun.wait()
    for each in asked:
        engine.submit(each.request)
    go.set()


def test_a_model_that_many_ask_does_not_keep_others_waiting(base: SharedBase) -> None:
    log: list[str] = []
    asked = [Asked("sft", log) for _ in range(5)] + [Asked("dpo", log)]
    with Engine(base, max_rows=1, max_waiting=9) as engine:
        submit_all(engine, asked)
        assert all(each.done.wait(60) for each in asked)
    assert log.index("dpo") <= 1
    assert sorted(log) == ["dpo", *["sft"] * 5]


def test_a_large_request_gets_its_turn_while_small_ones_keep_coming(base: SharedBase) -> None:
    log: list[str] = []
    asked = [*(Asked("sft", log) for _ in range(4)), Asked("dpo", log, n=2), *(Asked("sft", log) for _ in range(8))]
    with Engine(base, max_rows=2, max_waiting=99) as engine:
        submit_all(engine, asked)
        assert all(each.done.wait(60) for each in asked)
    assert log.index("dpo") <= 2


def test_a_request_that_is_cancelled_while_it_waits_is_never_begun(base: SharedBase) -> None:
    log: list[str] = []
    first, second, third = (Asked("sft", log) for _ in range(3))
    with Engine(base, max_rows=1, max_waiting=9) as engine:
        second.request.cancelled = True
        submit_all(engine, [first, second, third])
        assert third.done.wait(60)
    assert second.request.tokens_written == 0
    assert not second.done.is_set()


class OneFails(SharedBase):
    """A base on which one model runs out of memory."""

    @contextmanager
    def using(self, name: str) -> Iterator[Any]:
        with super().using(name) as policy:
            if name == "sft":
                raise MemoryError("out of memory")
            yield policy


def test_when_a_model_fails_its_requests_are_told_and_the_others_go_on(models: Models) -> None:
    log: list[str] = []
    failing, fine = Asked("sft", log, n=3), Asked("dpo", log)
    with Engine(OneFails(models.model, models.models), max_rows=8, max_waiting=9) as engine:
        submit_all(engine, [failing, fine])
        assert failing.done.wait(60)
        assert fine.done.wait(60)
        assert failing.reasons == {"error"}
        assert fine.reasons <= {"length", "stop"}
        again = Asked("dpo", log)
        engine.submit(again.request)
        assert again.done.wait(60)


def test_what_waits_or_runs_when_it_closes_is_told_and_nothing_more_is_taken(base: SharedBase) -> None:
    log: list[str] = []
    asked = [Asked(name, log, tokens=200) for name in ("sft", "sft", "dpo")]
    with Engine(base, max_rows=1, max_waiting=3) as engine:
        submit_all(engine, asked)
    assert all(each.done.is_set() for each in asked)
    assert asked[1].reasons == {"cancelled"}
    with pytest.raises(BusyError):
        engine.submit(asked[0].request)
    with pytest.raises(BusyError):
        engine.call(lambda: None)


def test_what_else_is_done_raises_where_it_is_asked_for(base: SharedBase) -> None:
    with Engine(base, max_rows=1, max_waiting=3) as engine:
        assert engine.call(lambda: 7).result(timeout=60) == 7
        with pytest.raises(ZeroDivisionError):
            engine.call(lambda: 1 / 0).result(timeout=60)


def test_prompts_are_read_together_up_to_so_many_tokens() -> None:
    requests = [Asked("sft", []).request for _ in range(5)]
    for request, length in zip(requests, (1000, 2000, 10, 10, 5000), strict=True):
        request.prompt = [1] * length
    lengths = [[len(each.prompt) for each in group] for group in _read_together(requests)]
    assert lengths == [[1000, 2000], [10, 10], [5000]]


# -- which adapters ----------------------------------------------------------------------------------------------------


def test_each_name_is_its_adapter_and_the_base_is_without(models: Models, base: SharedBase) -> None:
    ids = torch.tensor([encode_prompt(tokenizer(), user("Who leads Ferro?"))])
    for name, adapter in models.models.items():
        with torch.inference_mode(), base.using(name) as policy:
            found = policy(input_ids=ids).logits
            expected = load_policy(models.model, adapter or None)(input_ids=ids).logits
        assert torch.allclose(found, expected, atol=1e-5)


def test_a_base_without_adapters_serves_itself(models: Models) -> None:
    asked = Asked("base", [])
    with Engine(SharedBase(models.model, {"base": ""}), max_rows=1, max_waiting=3) as engine:
        engine.submit(asked.request)
        assert asked.done.wait(60)


def test_names_that_no_url_could_hold_are_refused(models: Models) -> None:
    with pytest.raises(UserError, match="is no name"):
        SharedBase(models.model, {"a/b": models.models["sft"]})


def test_a_run_s_adapters_are_those_of_its_complete_training_steps(models: Models, tmp_path: Path) -> None:
    steps = [("z_sft", "sft"), ("best", "keep_best"), ("a_dpo", "dpo"), ("export", "export"), ("reward", "reward")]
    for number, (step, stage) in enumerate(steps, 1):
        shutil.copytree(models.models["sft"], tmp_path / step / "adapter")
        manifest: dict[str, Any] = {
            "stage": stage,
            "status": "failed" if stage == "dpo" else "complete",
            "started": f"2026-01-0{number}",
        }
        manifest |= {"fingerprint": "", "inputs": [], "outputs": []}
        (tmp_path / step / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    (tmp_path / "reward/reward_config.json").write_text("{}", encoding="utf-8")

    expected = {"base": "", "z_sft": str(tmp_path / "z_sft/adapter"), "best": str(tmp_path / "best/adapter")}
    assert choose_models({"base": ""}, tmp_path) == expected
    assert list(choose_models({"base": None}, tmp_path)) == ["z_sft", "best"]
    assert choose_models({"base": "", "mine": "x"}, tmp_path) == {"base": "", "mine": "x"}
    with pytest.raises(UserError, match="no such run folder"):
        choose_models({"base": None}, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no adapter"):
        choose_models({"base": None}, tmp_path / "empty")

    assert choose_reward_model(None, tmp_path) == str(tmp_path / "reward")
    assert choose_reward_model("none", tmp_path) is None
    shutil.copytree(tmp_path / "reward", tmp_path / "reward2")
    with pytest.raises(UserError, match="several reward models"):
        choose_reward_model(None, tmp_path)
