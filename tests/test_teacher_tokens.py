"""Token counts before sending: never a download, and an estimate that is called one."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NoReturn

import pytest

from alignkit.core.records import Message
from alignkit.teacher.tokens import (
    ESTIMATE_MARGIN,
    TokenCounter,
    encoding_name,
    estimate_tokens,
    is_cached,
    token_counter,
)

O200K_FILE = "fb374d419588a4632f3f557e76b4b70aebbca790"
"""SHA-1 of the address that tiktoken fetches o200k_base from: the name of the file in its cache."""


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def no_network(path: str) -> NoReturn:
        raise AssertionError(f"tiktoken was about to download {path}")

    monkeypatch.setattr("tiktoken.load.read_file", no_network)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("", 0),
        ("the cat sat.", 4),  # the | cat | sat | . and none longer than 9 characters
        ("incomprehensibilities", 3),  # 21 characters / 9 = 2.33
        ("a1234567b", 5),  # a | 123 | 456 | 7 | b
        ("最高速度是多少", 6),  # 7 characters * 0.8 = 5.6
        ("скорость", 3),  # 8 characters * 0.35 = 2.8
        ("a\n\n\nb", 3),  # line breaks are one piece
        ("_" * 50, 6),  # one piece of 50 characters / 9 = 5.56
        ("\ud800", 1),  # half a surrogate pair, as broken files hold them
    ],
)
def test_the_estimate_is_the_sum_over_pieces(text: str, tokens: int) -> None:
    assert estimate_tokens(text) == tokens


def test_a_conversation_has_four_tokens_a_message_and_three_for_the_reply() -> None:
    counter = TokenCounter(len, "characters", 0.0)
    assert counter.count_messages([Message(role="system", content="ab"), Message(role="user", content="cde")]) == 16


def test_without_the_encoding_file_it_estimates_and_downloads_nothing(empty_cache: Path) -> None:
    counter = token_counter("gpt-4o")
    assert counter.count("the cat sat.") == 4
    assert counter.margin == ESTIMATE_MARGIN == 0.4
    assert counter.how == "estimate, ±40%"


def test_a_harmed_file_is_not_used_and_not_replaced(empty_cache: Path) -> None:
    file = empty_cache / O200K_FILE
    file.write_bytes(b"IQ== 0\n")
    assert not is_cached("o200k_base")
    assert token_counter("gpt-4o").margin == ESTIMATE_MARGIN
    assert file.read_bytes() == b"IQ== 0\n"


def test_a_cache_that_is_switched_off_holds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    assert not is_cached("o200k_base")


def test_encodings_go_by_the_name_of_the_model() -> None:
    assert encoding_name("gpt-4o-2024-05-13") == "o200k_base"
    assert encoding_name("gpt-3.5-turbo") == "cl100k_base"
    assert encoding_name("qwen3-8b") is None


@pytest.mark.skipif(not is_cached("o200k_base"), reason="tiktoken's file of o200k_base is not on this machine")
def test_with_the_encoding_file_it_counts() -> None:
    url = "https://openaipublic.blob.core.windows.net/encodings/o200k_base.tiktoken"
    assert hashlib.sha1(url.encode()).hexdigest() == O200K_FILE
    counter = token_counter("gpt-4o")
    assert (counter.count("hello world"), counter.margin, counter.how) == (2, 0.0, "by o200k_base")
    assert token_counter("qwen3-8b").margin == ESTIMATE_MARGIN
    assert counter.count("<|endoftext|>") > 1, "a document cannot smuggle in special tokens"
