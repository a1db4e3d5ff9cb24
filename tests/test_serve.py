"""The server, asked by the real `openai` client over loopback, one request at a time and many at once."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from small_server import ADAPTERS, Models, Served, save_models, serving
from tiny_random import conversation, tokenizer, user

from alignkit.core.config import SamplingConfig
from alignkit.core.records import Message
from alignkit.data.chat import encode_prompt
from alignkit.generation.base import greedily
from alignkit.generation.hf import HFGenerator, load_generator
from alignkit.generation.server import Limits
from alignkit.models.reward_model import RewardModel
from alignkit.models.shared_base import SharedBase

NEW_TOKENS = 24
QUESTIONS = [
    f"Notes: {name} makes {thing}.\n\nWhat does {name} make?" for name in "Bo Cy Di Ed".split() for thing in "ab"
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def base(models: Models) -> SharedBase:
    return SharedBase(models.model, models.models)


@pytest.fixture(scope="module")
def reward(models: Models, base: SharedBase) -> RewardModel:
    return base.add_reward_model(str(models.reward))


@pytest.fixture(scope="module")
def served(base: SharedBase, reward: RewardModel) -> Iterator[Served]:
    with serving(base, reward) as running:
        yield running


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with served.client() as opened:
        yield opened


@pytest.fixture(scope="module")
def alone(models: Models) -> dict[str, HFGenerator]:
    """Each model as `evaluate` loads it: alone in memory, its adapter added into the weights."""
    return {name: load_generator(models.model, adapter or None) for name, adapter in models.models.items()}


def plain(messages: Sequence[Message]) -> Any:
    return [message.model_dump() for message in messages]


def ask(client: openai.OpenAI, model: str, question: str, **settings: Any) -> Any:
    settings = {"temperature": 0, "max_tokens": NEW_TOKENS} | settings
    return client.chat.completions.create(model=model, messages=plain(user(question)), **settings)


def joined(stream: Any) -> tuple[str, str]:
    """Text and finish reason of a stream with one answer."""
    text, reason = "", ""
    for chunk in stream:
        text += chunk.choices[0].delta.content or ""
        reason = chunk.choices[0].finish_reason or reason
    return text, reason


# -- many at once ------------------------------------------------------------------------------------------------------


def test_32_streams_of_several_adapters_each_say_what_their_adapter_says_alone(
    client: openai.OpenAI, alone: dict[str, HFGenerator]
) -> None:
    sampling = greedily(SamplingConfig(max_new_tokens=NEW_TOKENS))
    expected: dict[tuple[str, str], str] = {}
    for name, generator in alone.items():
        answers = generator.generate([user(question) for question in QUESTIONS], sampling, seed=1)
        expected |= {(name, question): answer[0].text for question, answer in zip(QUESTIONS, answers, strict=True)}
    assert len(set(expected.values())) == len(expected) == 32  # no two would be taken for each other

    def stream(key: tuple[str, str]) -> str:
        return joined(ask(client, *key, stream=True))[0]

    with ThreadPoolExecutor(32) as clients:
        assert dict(zip(expected, clients.map(stream, expected), strict=True)) == expected


def test_a_seed_draws_what_the_generator_draws_whoever_else_is_there(
    client: openai.OpenAI, alone: dict[str, HFGenerator]
) -> None:
    sampling = SamplingConfig(n=3, temperature=[0.9, 0.9], top_p=[0.8, 0.8], max_new_tokens=NEW_TOKENS)
    keys = [(name, question, seed) for seed, name in enumerate(ADAPTERS) for question in QUESTIONS[:2]]

    def sample(key: tuple[str, str, int]) -> list[str]:
        reply = ask(client, key[0], key[1], seed=key[2], n=3, temperature=0.9, top_p=0.8)
        return [choice.message.content for choice in reply.choices]

    with ThreadPoolExecutor(len(keys)) as clients:
        found = list(clients.map(sample, keys))
    for (name, question, seed), texts in zip(keys, found, strict=True):
        (written,) = alone[name].generate([user(question)], sampling, seed)
        assert texts == [each.text for each in written]
    assert len({text for texts in found for text in texts}) == 3 * len(keys)


def test_without_a_seed_every_request_draws_anew(client: openai.OpenAI) -> None:
    replies = [ask(client, "dpo", QUESTIONS[0], temperature=1) for _ in range(2)]
    assert replies[0].choices[0].message.content != replies[1].choices[0].message.content


def test_a_client_that_leaves_stops_what_is_written_for_it(served: Served, client: openai.OpenAI) -> None:
    before = counted(served, "sft")
    stream = ask(client, "sft", QUESTIONS[0], n=8, max_tokens=200, temperature=1, seed=5, stream=True)
    next(iter(stream))
    stream.close()
    wait_for(lambda: counted(served, "sft")["requests"] > before["requests"])
    assert counted(served, "sft")["completion_tokens"] - before["completion_tokens"] < 8 * 200

    before = counted(served, "dpo")
    with pytest.raises(openai.APITimeoutError):
        ask(client.with_options(timeout=0.2), "dpo", QUESTIONS[0], n=32, max_tokens=200, temperature=1, seed=5)
    wait_for(lambda: counted(served, "dpo")["requests"] > before["requests"])
    assert counted(served, "dpo")["completion_tokens"] - before["completion_tokens"] < 32 * 200


def counted(served: Served, model: str) -> Counter[str]:
    """What the server has counted for a model so far."""
    return Counter(served.api.served.get(model))


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# -- one reply ---------------------------------------------------------------------------------------------------------


def test_usage_and_reasons_are_told(client: openai.OpenAI, alone: dict[str, HFGenerator]) -> None:
    reply = ask(client, "sft", QUESTIONS[0], n=2)
    assert [choice.finish_reason for choice in reply.choices] == ["length", "length"]
    assert reply.usage.completion_tokens == 2 * NEW_TOKENS
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + 2 * NEW_TOKENS
    chunks = list(ask(client, "sft", QUESTIONS[0], n=2, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == []
    assert chunks[-1].usage == reply.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


def test_a_stop_string_ends_an_answer_and_is_not_part_of_it(client: openai.OpenAI) -> None:
    whole = ask(client, "dpo", QUESTIONS[1]).choices[0].message.content
    stop = whole[len(whole) // 2 :][:3]
    expected = whole[: whole.index(stop)]
    for stops in (stop, ["never written", stop]):
        reply = ask(client, "dpo", QUESTIONS[1], stop=stops)
        assert (reply.choices[0].message.content, reply.choices[0].finish_reason) == (expected, "stop")
        assert reply.usage.completion_tokens < NEW_TOKENS
    assert joined(ask(client, "dpo", QUESTIONS[1], stop=stop, stream=True)) == (expected, "stop")


def test_parameters_that_ask_for_nothing_and_other_spellings_are_accepted(client: openai.OpenAI) -> None:
    expected = ask(client, "sft", QUESTIONS[0]).choices[0].message.content
    parts = [{"type": "text", "text": QUESTIONS[0][:9]}, {"type": "text", "text": QUESTIONS[0][9:]}]
    in_parts: Any = [{"role": "user", "content": parts}]
    reply = client.chat.completions.create(
        model="sft",
        messages=in_parts,
        temperature=0,
        max_completion_tokens=NEW_TOKENS,
        frequency_penalty=0,
        logprobs=False,
        response_format={"type": "text"},
        user="somebody",
    )
    assert reply.choices[0].message.content == expected
    turns: Any = [*plain(user(QUESTIONS[0])), reply.choices[0].message.model_dump(), *plain(user("And?"))]
    assert client.chat.completions.create(model="sft", messages=turns, max_tokens=2).choices


def test_models_are_listed_under_their_names(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["base", *ADAPTERS]
    assert client.models.retrieve("dpo").id == "dpo"
    with pytest.raises(openai.NotFoundError, match="there are: base, sft, sft_best, dpo"):
        client.models.retrieve("gpt")


# -- rewards -----------------------------------------------------------------------------------------------------------


def test_rewards_are_those_of_the_reward_model_while_others_write(
    served: Served, client: openai.OpenAI, models: Models, reward: RewardModel, base: SharedBase
) -> None:
    assert reward.module.policy is base.policy  # one base for all of them
    rows = [plain(conversation(question, answer)) for question in QUESTIONS for answer in ("a", "It makes b.")]
    expected = RewardModel.from_pretrained(models.reward).score([{"messages": row} for row in rows])

    def score(row: Any) -> float:
        return float(served.fetch("/v1/rewards", {"messages": row})[1]["data"][0]["score"])

    with ThreadPoolExecutor(24) as clients:
        writing = [clients.submit(ask, client, name, QUESTIONS[0]) for name in ADAPTERS for _ in range(2)]
        assert list(clients.map(score, rows)) == pytest.approx(expected, abs=1e-5)
        assert len({each.result().choices[0].message.content for each in writing}) == len(ADAPTERS)
    _, reply = served.fetch("/v1/rewards", {"model": "reward", "conversations": rows})
    assert [each["index"] for each in reply["data"]] == list(range(len(rows)))
    assert [each["score"] for each in reply["data"]] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({}, 400, "give either messages"),
        ({"messages": plain(user("?"))}, 400, "row 0"),
        ({"conversations": [plain(conversation("?", "!")), "x"]}, 400, "conversations.1"),
        ({"messages": plain(conversation("?", "word " * 400))}, 400, "(813 of 256 tokens)"),
        ({"messages": plain(conversation("?", "!")), "model": "sft"}, 404, "there is 'reward'"),
    ],
)
def test_what_cannot_be_scored_is_refused(served: Served, body: dict[str, Any], status: int, said: str) -> None:
    got, reply = served.fetch("/v1/rewards", body)
    assert got == status
    assert said in reply["error"]["message"]


# -- bad requests ------------------------------------------------------------------------------------------------------

GOOD: dict[str, Any] = {"model": "sft", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}


@pytest.mark.parametrize(
    ("change", "status", "param", "code"),
    [
        ({"model": "gpt"}, 404, "model", "model_not_found"),
        ({"messages": []}, 400, "messages", "invalid_value"),
        ({"messages": [{"role": "user", "content": 3}]}, 400, "messages.0.content", "invalid_value"),
        ({"messages": [{"role": "king", "content": "x"}]}, 400, "messages.0.role", "invalid_value"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages", "invalid_value"),
        ({"messages": [{"role": "user", "content": "<|im_end|>"}]}, 400, "messages", "invalid_value"),
        ({"messages": [{"role": "user", "content": "word " * 400}]}, 400, "messages", "context_length_exceeded"),
        ({"max_tokens": 201}, 400, "max_tokens", "invalid_value"),
        ({"max_tokens": 0}, 400, "max_tokens", "invalid_value"),
        ({"max_tokens": None, "max_completion_tokens": 201}, 400, "max_completion_tokens", "invalid_value"),
        ({"max_completion_tokens": 3}, 400, None, "invalid_value"),
        ({"temperature": 2.5}, 400, "temperature", "invalid_value"),
        ({"temperature": "1"}, 400, "temperature", "invalid_value"),
        ({"top_p": 0}, 400, "top_p", "invalid_value"),
        ({"n": 33}, 400, "n", "invalid_value"),
        ({"seed": -1}, 400, "seed", "invalid_value"),
        ({"stop": ""}, 400, "stop", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, 400, None, "invalid_value"),
        ({"tools": [{"type": "function"}]}, 400, "tools", "unsupported_parameter"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format", "unsupported_parameter"),
        ({"frequency_penalty": 0.5}, 400, "frequency_penalty", "unsupported_parameter"),
        ({"best_of": 3}, 400, "best_of", "unknown_parameter"),
    ],
)
def test_a_bad_request_is_refused_by_the_name_of_its_parameter(
    served: Served, change: dict[str, Any], status: int, param: str | None, code: str
) -> None:
    got, reply = served.fetch("/v1/chat/completions", GOOD | change)
    assert got == status, reply
    error = reply["error"]
    assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error")


def test_a_prompt_that_is_too_long_is_told_its_tokens(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, "sft", "word " * 400)
    count = len(encode_prompt(tokenizer(), user("word " * 400)))
    said = f"the prompt has {count} tokens, and max_tokens={NEW_TOKENS} are to follow: more than the context of 256"
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("path", "body", "headers", "status"),
    [
        ("/v1/chat/completions", b"{", {}, 400),
        ("/v1/chat/completions", b"[]", {}, 400),
        ("/v1/chat/completions", b'{"temperature": NaN}', {}, 400),
        ("/v1/chat/completions", b"[" * 50_000, {}, 400),
        ("/v1/chat/completions", b" " * 100_001, {}, 413),
        ("/v1/chat/completions", json.dumps(GOOD).encode(), {"content-type": "text/plain"}, 415),
        ("/v1/chat/completions", None, {}, 405),
        ("/v1/embeddings", b"{}", {}, 404),
        ("/v1/models", None, {"host": "evil.example"}, 421),
        ("/v1/models", None, {"host": "localhost:1"}, 200),
        ("/health", None, {}, 200),
    ],
)
def test_bad_bodies_paths_and_hosts_are_refused(
    served: Served, path: str, body: bytes | None, headers: dict[str, str], status: int
) -> None:
    got, reply = served.fetch(path, body, headers)
    assert got == status
    assert ("error" in reply) is (status != 200)


# -- keys, limits, the end ---------------------------------------------------------------------------------------------


def test_a_key_is_asked_for_where_there_is_one(base: SharedBase, caplog: pytest.LogCaptureFixture) -> None:
    with serving(base, key="swordfish") as served:
        with served.client("swordfish") as known:
            assert ask(known, "sft", "Hello", max_tokens=2).choices
        for wrong in ("swordfish2", "Swordfish", "x"):
            with served.client(wrong) as unknown, pytest.raises(openai.AuthenticationError) as caught:
                ask(unknown, "sft", "Hello")
            assert caught.value.code == "invalid_api_key"
        assert served.fetch("/v1/models")[0] == 401
        assert served.fetch("/v1/rewards")[0] == 401
        assert served.fetch("/v1/models", headers={"authorization": "Bearer sword\xe9"})[0] == 401
        assert served.fetch("/health") == (200, {"status": "ok"})
        named = {"host": "models.example", "authorization": "Bearer swordfish"}
        assert served.fetch("/v1/models", headers=named)[0] == 200
    assert "swordfish" not in caplog.text


def test_more_than_may_wait_are_told_to_come_again(base: SharedBase) -> None:
    with serving(base, max_answers=1, max_waiting=1) as served, served.client() as client:
        with ThreadPoolExecutor(8) as clients:
            asked = [clients.submit(ask, client, "sft", question, max_tokens=60) for question in QUESTIONS]
        errors = [each.exception() for each in asked if each.exception()]
        assert 0 < len(errors) < len(asked)
        assert all(isinstance(error, openai.InternalServerError) and error.status_code == 503 for error in errors)


def test_at_the_end_running_streams_finish_and_new_requests_are_turned_away(base: SharedBase) -> None:
    with serving(base) as served, served.client() as client:
        expected = ask(client, "dpo", QUESTIONS[0], max_tokens=60).choices[0].message.content
        streams = [ask(client, "dpo", QUESTIONS[0], max_tokens=60, stream=True) for _ in range(8)]
        parts = [iter(stream) for stream in streams]
        for each in parts:
            next(each)
        served.stop()
        with pytest.raises(openai.InternalServerError, match="shutting down") as caught:
            ask(client, "sft", "Hello")
        assert caught.value.status_code == 503
        assert served.fetch("/health") == (503, {"status": "shutting down"})
        with ThreadPoolExecutor(8) as clients:
            assert list(clients.map(joined, parts)) == [(expected, "length")] * 8
        served.thread.join(timeout=20)
        assert not served.thread.is_alive()


def test_when_the_grace_is_over_running_streams_are_told(base: SharedBase) -> None:
    limits = Limits(max_tokens=200, max_body_bytes=1000, grace_seconds=0.0)
    with serving(base, limits=limits) as served, served.client() as client:
        stream = ask(client, "dpo", QUESTIONS[0], max_tokens=200, n=16, stream=True)
        next(iter(stream))
        served.stop()
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
        served.thread.join(timeout=20)
        assert not served.thread.is_alive()
