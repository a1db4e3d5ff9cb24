"""Pages in chunks: nothing lost, nothing too long, cut where a reader would cut."""

from __future__ import annotations

import time
from itertools import pairwise
from random import Random

import pytest
from tiny_encoders import word_tokenizer
from transformers import AutoTokenizer

from alignkit.core.records import DocumentPage
from alignkit.data.chunks import Chunk, chunk_pages
from alignkit.models.loading import embedded_model_dir


def chunks_of(text: str, size: int, overlap: int = 0) -> list[Chunk]:
    return chunk_pages([DocumentPage(document="d", page=3, text=text)], size, overlap)


def texts(text: str, size: int, overlap: int = 0) -> list[str]:
    return [chunk.text for chunk in chunks_of(text, size, overlap)]


def check_invariants(text: str, size: int, overlap: int) -> None:
    chunks = chunks_of(text, size, overlap)
    covered = [False] * len(text)
    for number, chunk in enumerate(chunks, 1):
        assert chunk.id == f"d#3.{number}"
        assert chunk.text == text[chunk.start : chunk.end]
        assert 0 < len(chunk.text) <= size
        assert chunk.text == chunk.text.strip()
        covered[chunk.start : chunk.end] = [True] * len(chunk.text)
    assert all(seen or letter.isspace() for seen, letter in zip(covered, text, strict=True))
    for earlier, later in pairwise(chunks):
        assert earlier.start < later.start and earlier.end < later.end
        assert earlier.end - later.start <= overlap


def test_any_text_is_covered_by_chunks_that_fit() -> None:
    parts = [
        "Word",
        "word",
        ".",
        "!",
        "?!",
        " ",
        " ",
        "\n",
        "\n\n",
        "# Heading\n",
        "- item",
        "中",
        "文",
        "。",
        "\u3000",
    ]
    parts += ["a" * 30, "\r\n", "…", "U.S. ", "é", "🙂", "|", "\t", "== Title ==\n", "1. "]
    for seed in range(300):
        rng = Random(seed)
        text = "".join(rng.choices(parts, k=rng.randint(0, 120)))
        size = rng.choice((1, 2, 7, 40, 1000))
        check_invariants(text, size, rng.randrange(size))


def test_sentences_stay_whole() -> None:
    text = "The first is short. The second one is longer. And a third."
    assert texts(text, 46) == ["The first is short. The second one is longer.", "And a third."]
    assert texts(text, 45) == ["The first is short. The second one is longer.", "And a third."]
    assert texts(text, 44) == ["The first is short.", "The second one is longer. And a third."]


def test_an_initial_or_a_small_letter_does_not_end_a_sentence() -> None:
    assert texts("He met J. Smith, i.e. the baker, in Rome. Then he left.", 45) == [
        "He met J. Smith, i.e. the baker, in Rome.",
        "Then he left.",
    ]


def test_chinese_is_cut_at_its_own_full_stops_and_else_anywhere() -> None:
    assert texts("阿拉斯加很大。人口很少！首府是朱诺。", 13) == ["阿拉斯加很大。人口很少！", "首府是朱诺。"]
    assert texts("一二三四五六七八九", 4) == ["一二三四", "五六七八", "九"]
    assert texts("一二三四五六七八九", 4, 1) == ["一二三四", "四五六七", "七八九"]


def test_a_long_sentence_is_cut_between_words() -> None:
    assert texts("one two three four five", 9) == ["one two", "three", "four five"]
    assert texts("abcdefghij", 4) == ["abcd", "efgh", "ij"]


def test_overlap_repeats_whole_sentences_or_else_whole_words() -> None:
    text = "Aa bb cc. Dd ee ff. Gg hh ii. Jj kk ll."  # four sentences of nine characters
    assert texts(text, 29, 9) == ["Aa bb cc. Dd ee ff. Gg hh ii.", "Gg hh ii. Jj kk ll."]
    assert texts(text, 29, 8) == ["Aa bb cc. Dd ee ff. Gg hh ii.", "hh ii. Jj kk ll."]
    assert texts("one two three four five", 9, 4) == ["one two", "two three", "four five"]


def test_a_heading_begins_a_chunk_and_never_ends_one() -> None:
    text = "# One\n\nFirst words of it here.\n\n## Two\n\nOther words."
    assert texts(text, 48, 10) == ["# One\n\nFirst words of it here.", "## Two\n\nOther words."]
    sentence = "A sentence that fills the first of them."
    assert texts(f"{sentence}\n\n# Heading\n\nIts text is here.", 90) == [
        f"{sentence}\n\n# Heading\n\nIts text is here."
    ]
    assert texts(f"{sentence}\n\n# Heading\n\n{sentence}", 60) == [sentence, f"# Heading\n\n{sentence}"]


def test_pages_without_text_have_no_chunks() -> None:
    assert chunk_pages([], 10, 0) == []
    assert texts("", 10) == texts(" \n\t\u3000", 10) == []


def test_each_page_is_cut_on_its_own() -> None:
    pages = [DocumentPage(document="a", page=page, text="Words.") for page in (1, 2)]
    assert [(chunk.id, chunk.text) for chunk in chunk_pages(pages, 100, 5)] == [
        ("a#1.1", "Words."),
        ("a#2.1", "Words."),
    ]


def test_titles_are_the_headings_that_a_chunk_stands_under_also_those_of_pages_before() -> None:
    first = "Before.\n\n# Flat #\n\nWelcome to it.\n\n## Deposit\n\nIt is kept."
    second = "It is paid back.\n\n### When\n\nIn May.\n\n## Noise\n\nNone at night.\n\n== Wiki ==\nText."
    pages = [DocumentPage(document="a", page=page, text=text) for page, text in ((1, first), (2, second))]
    chunks = chunk_pages([*pages, DocumentPage(document="b", page=1, text="Other.")], 24, 0)
    titles = {chunk.text.split("\n")[-1]: chunk.title for chunk in chunks}
    assert titles == {
        "Before.": "",
        "Welcome to it.": "Flat",
        "It is kept.": "Flat > Deposit",
        "It is paid back.": "Flat > Deposit",
        "In May.": "Flat > Deposit > When",
        "None at night.": "Flat > Noise",
        "Text.": "Flat > Wiki",
        "Other.": "",
    }


@pytest.mark.parametrize("kind", ["words", "bytes"])
def test_sizes_can_be_in_tokens(kind: str) -> None:
    tokenizer = word_tokenizer() if kind == "words" else AutoTokenizer.from_pretrained(embedded_model_dir())

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    random = Random(3)
    parts = [
        "the mayor",
        "Übergrößenträger",
        "市长是安娜。",
        ".",
        "\n\n",
        " ",
        "unhyphenated",
        "# head\n",
        "🙂",
        "a. B",
        "7,000",
    ]
    for size, overlap in [(1, 0), (5, 2), (17, 6), (60, 59)] * 4:
        text = "".join(random.choice(parts) for _ in range(120))
        chunks = chunk_pages([DocumentPage(document="d", page=1, text=text)], size, overlap, tokenizer)
        covered = {place for chunk in chunks for place in range(chunk.start, chunk.end)}
        assert covered >= {place for place, letter in enumerate(text) if not letter.isspace()}
        for chunk in chunks:
            assert count(chunk.text) <= size or len(chunk.text) == 1  # a character of several tokens
        for earlier, later in pairwise(chunks):
            assert earlier.start < later.start and earlier.end < later.end
            assert count(text[later.start : earlier.end]) <= overlap + 1  # cut out, it can have a token more


def test_a_sentence_that_fits_by_its_tokens_is_not_cut() -> None:
    text = "She was born in june. The mayor of padera is old. Who is she?"  # 6, 7 and 4 words with their full stops
    pages = [DocumentPage(document="d", page=1, text=text)]
    assert [chunk.text for chunk in chunk_pages(pages, 13, 0, word_tokenizer())] == [
        "She was born in june. The mayor of padera is old.",
        "Who is she?",
    ]
    assert [chunk.text for chunk in chunk_pages(pages, 12, 0, word_tokenizer())] == [
        "She was born in june.",
        "The mayor of padera is old. Who is she?",
    ]


@pytest.mark.parametrize(("size", "overlap"), [(0, 0), (10, 10), (10, -1)])
def test_impossible_sizes_are_refused(size: int, overlap: int) -> None:
    with pytest.raises(ValueError, match="overlap"):
        chunks_of("text", size, overlap)


@pytest.mark.parametrize("unit", [" ", "\n", ".", "a", "。", "#", "# a\n", "=", '."', "- \n", "x. ", "\u3000 \n"])
def test_half_a_million_characters_take_no_longer_than_they_are_long(unit: str) -> None:
    started = time.process_time()
    chunks_of(unit * (500_000 // len(unit)), 1000, 100)
    assert time.process_time() - started < 10
