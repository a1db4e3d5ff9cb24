"""The embedded tokenizer: whole words for the world, bytes for everything else, and the same after saving."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2Tokenizer

from alignkit.data.closed_world import World, answer, initial_words, vocabulary
from alignkit.models.tiny.tokenizer import BASE_TEXT_WORDS, SPECIAL_TOKENS, build_tokenizer

TRICKY = [
    "plain text, with punctuation: (a) [b] {c} 'd' \"e\"",
    "  two  leading and   inner spaces\tand tabs\n\n\nand lines\r\n",
    "Notes: Bagon leads; notes, NOTES and Notes.",
    "中文句子。日本語のテキスト、한국어",
    "\u00e9 as one and e\u0301 as two code points",
    "emoji 👩‍👩‍👧‍👦 🇩🇪 ❤️ and zero\u200bwidth\u200d joiners",
    "right-to-left שלום مرحبا and back",
    "control \x00 \x07 \x1f and private \ue000 and \uffff",
    "astral 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 and math ∑∞∂",
    "<|im_start|>user\n<|im_end|><|endoftext|>",
    "",
    "ġĠĊ the very letters that byte-level vocabularies are written in",
]


@pytest.fixture(scope="module")
def tokenizer() -> Qwen2Tokenizer:
    return build_tokenizer()


def ids_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def test_every_word_is_one_token_inside_a_text(tokenizer: Qwen2Tokenizer) -> None:
    words = [*vocabulary(), *BASE_TEXT_WORDS]
    assert [word for word in words if len(ids_of(tokenizer, f" {word}")) != 1] == []
    assert len({ids_of(tokenizer, f" {word}")[0] for word in words}) == len(set(words))


def test_every_first_word_is_one_token_at_the_beginning(tokenizer: Qwen2Tokenizer) -> None:
    assert [word for word in (*initial_words(), *BASE_TEXT_WORDS) if len(ids_of(tokenizer, word)) != 1] == []


def test_a_world_text_has_a_token_for_each_word_and_mark(tokenizer: Qwen2Tokenizer) -> None:
    world = World(1, split="held_out")
    for _ in range(200):
        passage = world.passage()
        question = world.ask(passage)
        right = answer(passage.facts, question)
        for text in (passage.statement, right):
            marks = sum(text.count(mark) for mark in ".,:?")
            assert len(ids_of(tokenizer, text)) == len(text.split()) + marks, text
        assert tokenizer.decode(ids_of(tokenizer, passage.statement)) == passage.statement


@pytest.mark.parametrize("text", TRICKY)
def test_any_text_survives_the_round_trip(tokenizer: Qwen2Tokenizer, text: str) -> None:
    """Up to canonical composition (NFC), which Qwen2 tokenizers apply to what they read."""
    ids = ids_of(tokenizer, text)
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == unicodedata.normalize("NFC", text)


def test_saved_and_loaded_it_gives_the_same_ids(tokenizer: Qwen2Tokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    world = World(2)
    for text in [*TRICKY, *(world.passage().statement for _ in range(50))]:
        assert ids_of(loaded, text) == ids_of(tokenizer, text), text
    assert len(loaded) == len(tokenizer)
    assert loaded.chat_template == tokenizer.chat_template
    assert (loaded.eos_token, loaded.pad_token) == (tokenizer.eos_token, tokenizer.pad_token)


def test_the_shipped_tokenizer_is_the_one_that_is_built(tokenizer: Qwen2Tokenizer) -> None:
    from alignkit.models.loading import embedded_model_dir

    shipped = AutoTokenizer.from_pretrained(embedded_model_dir())
    assert shipped.get_vocab() == tokenizer.get_vocab()
    assert shipped.chat_template == tokenizer.chat_template
    assert [ids_of(shipped, text) for text in TRICKY] == [ids_of(tokenizer, text) for text in TRICKY]
    config = json.loads((embedded_model_dir() / "config.json").read_text(encoding="utf-8"))
    assert config["vocab_size"] >= len(tokenizer)


def test_it_is_the_same_on_every_machine() -> None:
    assert build_tokenizer().get_vocab() == build_tokenizer().get_vocab()


def test_chatml_tokens_are_special_and_single(tokenizer: Qwen2Tokenizer) -> None:
    ids = [ids_of(tokenizer, token) for token in SPECIAL_TOKENS]
    assert [len(each) for each in ids] == [1, 1, 1]
    assert len({each[0] for each in ids}) == 3
    assert [tokenizer.eos_token, tokenizer.pad_token] == ["<|im_end|>", "<|endoftext|>"]
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    assert set(tokenizer.all_special_ids) == {each[0] for each in ids}
    assert tokenizer.decode(ids[2] + ids_of(tokenizer, "yes"), skip_special_tokens=True) == "yes"


def test_the_chat_template_is_plain_chatml(tokenizer: Qwen2Tokenizer) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "Anna."},
    ]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nWho?<|im_end|>\n"
        "<|im_start|>assistant\nAnna.<|im_end|>\n"
    )
    prompt = tokenizer.apply_chat_template(messages[1:2], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
