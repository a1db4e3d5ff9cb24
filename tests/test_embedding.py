"""Embeddings: the one without a model, embedding in blocks with a cache, and contamination by cosine."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from alignkit.core.errors import UserError
from alignkit.data.hygiene import Match
from alignkit.scoring.embedding import CharacterEmbedder, Vectors, contaminated_by_embedding, embed_all
from alignkit.scoring.embedding_cache import EmbeddingCache

HANGS_AT_THE_THIRD_BLOCK = """
import sys, time
from pathlib import Path
from alignkit.scoring.embedding import CharacterEmbedder, embed_all
from alignkit.scoring.embedding_cache import EmbeddingCache

texts = [f"question {number} about town {number % 7}" for number in range(1300)]

class Hanging(CharacterEmbedder):
    calls = 0
    def embed(self, texts):
        self.calls += 1
        if self.calls == 3:
            print("third block", flush=True)
            time.sleep(60)
        return super().embed(texts)

with EmbeddingCache(Path(sys.argv[1])) as cache:
    embed_all(Hanging(texts), texts, cache)
"""


class Counting:
    """Counts what it is asked to embed: a text is embedded as its length and its first character's code."""

    dimensions = 2
    key = "c0"

    def __init__(self, limit: int = 1000) -> None:
        self.limit = limit
        self.asked: list[str] = []

    def embed(self, texts: Sequence[str]) -> Vectors:
        self.asked += texts
        return np.array([[len(text), float(ord(text[0]))] for text in texts], dtype=np.float32)

    def too_long(self, texts: Sequence[str]) -> int:
        return sum(len(text) > self.limit for text in texts)


# -- characters --------------------------------------------------------------------------------------------------------


def test_embedding_is_normalised_and_repeatable() -> None:
    texts = ["Where was Pezus born?", "帕得拉的市长是谁？", "", "Where  was PEZUS born?", "\ud800 lone"]
    embeddings = CharacterEmbedder(texts).embed(texts)
    assert embeddings.shape == (5, 256)
    assert embeddings.dtype == np.float32
    assert np.linalg.norm(embeddings, axis=1) == pytest.approx([1, 1, 0, 1, 1], abs=1e-6)
    assert np.array_equal(embeddings[0], embeddings[3])  # case and spaces are folded: a copy, at distance zero
    assert np.array_equal(embeddings, CharacterEmbedder(texts).embed(texts))
    assert CharacterEmbedder([]).embed([]).shape == (0, 256)


def test_similar_texts_lie_closer_than_others() -> None:
    texts = [
        "Which bus serves Padera on Monday morning?",
        "Which bus serves Vufura on Monday morning?",
        "水电费由乙方承担。",
        "水电费由甲方承担。",
    ]
    a, b, c, d = CharacterEmbedder(texts).embed(texts)
    assert a @ b > 0.4 > abs(a @ c)
    assert c @ d > 0.4 > abs(b @ d)


def test_projection_keeps_cosines() -> None:
    """With 4096 dimensions the sparse projection is nearly exact; 256 must agree with it to about 1 / sqrt(256)."""
    generator = np.random.default_rng(0)
    words = ["".join(generator.choice(list("abcdefghij"), 5)) for _ in range(40)]
    texts = [" ".join(generator.choice(words, 12)) for _ in range(60)]
    wide, narrow = (CharacterEmbedder(texts, dimensions).embed(texts) for dimensions in (4096, 256))
    difference = (wide @ wide.T - narrow @ narrow.T)[~np.eye(60, dtype=bool)]
    assert np.sqrt(np.mean(difference**2)) < 1.5 / np.sqrt(256)


def test_a_rare_ngram_weighs_more_by_the_formula() -> None:
    """An n-gram in 2 of 3 texts weighs 1 + ln(4/3), one in 1 of 3 weighs 1 + ln(4/2); each occurs once.

    "a" has " a", "a " and " a ", all of them also in "a b"; that one has " b", "b " and " b " besides, all of them also
    in "b", and, alone, "a b", " a b" and "a b ".
    """
    texts = ["a", "b", "a b"]
    a, _, both = CharacterEmbedder(texts, 1 << 14).embed(texts)
    common, rare = 1 + np.log(4 / 3), 1 + np.log(4 / 2)
    expected = 3 * common**2 / (np.sqrt(3 * common**2) * np.sqrt(6 * common**2 + 3 * rare**2))
    assert a @ both == pytest.approx(expected, abs=0.02)


def test_other_texts_are_embedded_with_the_same_rarities_whatever_stands_beside_them() -> None:
    pool = [f"row {number}: the mayor of town {number} is away" for number in range(50)]
    embedder = CharacterEmbedder(pool)
    together = embedder.embed([*pool, "something else"])
    assert np.array_equal(together[:50], embedder.embed(pool))
    assert np.array_equal(together[50:], embedder.embed(["something else"]))


def test_blocks_do_not_change_a_vector(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["", "ab", "水", "a long text that fills a block of its own", "ab", " ", "x y z"] * 5
    whole = CharacterEmbedder(texts).embed(texts)
    monkeypatch.setattr("alignkit.scoring.embedding._BLOCK_CHARACTERS", 70)
    in_blocks = CharacterEmbedder(texts)
    assert np.array_equal(in_blocks.embed(texts), whole)
    assert np.array_equal(in_blocks.embed(texts[::-1]), whole[::-1])


def test_the_key_names_the_settings_and_the_texts_it_was_fitted_on() -> None:
    texts = ["one text", "another text"]
    key = CharacterEmbedder(texts).key
    assert key == CharacterEmbedder(texts).key
    assert int(key, 16)
    assert len({key, CharacterEmbedder(texts, 128).key, CharacterEmbedder(texts[:1]).key}) == 3


def test_needs_no_model_library() -> None:
    program = (
        "import sys; from alignkit.scoring.embedding import CharacterEmbedder as C; C(['a b']).embed(['a b']); "
        "print({'torch', 'transformers', 'sklearn', 'sentence_transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# -- many texts --------------------------------------------------------------------------------------------------------


def test_equal_texts_are_embedded_once_and_stand_in_their_places() -> None:
    embedder = Counting()
    vectors = embed_all(embedder, ["b", "aaa", "b", "aaa", "c"])
    assert vectors.tolist() == [[1, 98], [3, 97], [1, 98], [3, 97], [1, 99]]
    assert embedder.asked == ["b", "aaa", "c"]
    assert embed_all(embedder, []).shape == (0, 2)


def test_what_the_cache_holds_is_not_embedded_again(tmp_path: Path) -> None:
    first, second = Counting(), Counting()
    with EmbeddingCache(tmp_path / "cache.sqlite") as cache:
        embed_all(first, ["a", "bb"], cache)
        assert embed_all(second, ["bb", "new", "a"], cache).tolist() == [[2, 98], [3, 110], [1, 97]]
    assert second.asked == ["new"]


def test_a_damaged_vector_is_embedded_again_and_mended(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "cache.sqlite"
    with EmbeddingCache(path) as cache:
        embed_all(Counting(), ["a", "bb"], cache)
        cache._database.execute("UPDATE vectors SET vector = zeroblob(12) WHERE rowid = 1")
        again = Counting()
        assert embed_all(again, ["a", "bb"], cache).tolist() == [[1, 97], [2, 98]]
        assert again.asked == ["a"]
        assert "1 vectors are damaged" in caplog.text
        third = Counting()
        embed_all(third, ["a", "bb"], cache)
        assert third.asked == []


def test_texts_that_are_too_long_are_counted_in_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        embed_all(Counting(limit=3), ["abc", "abcd", "abcde", "abcd"])
    assert "2 of 3 texts are too long" in caplog.text


def test_a_vector_that_is_not_finite_names_its_text() -> None:
    class Broken(Counting):
        def embed(self, texts: Sequence[str]) -> Vectors:
            return np.array([[0, np.nan if text == "bad" else 1] for text in texts], dtype=np.float32)

    with pytest.raises(UserError, match=r"text 1 .* not finite: 'bad'"):
        embed_all(Broken(), ["good", "bad"])


def test_after_kill_9_only_what_is_not_in_the_cache_is_embedded(tmp_path: Path) -> None:
    path = tmp_path / "cache.sqlite"
    command = [sys.executable, "-c", HANGS_AT_THE_THIRD_BLOCK, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "third block\n"
        process.kill()
    texts = [f"question {number} about town {number % 7}" for number in range(1300)]

    class CountingCharacters(CharacterEmbedder):
        asked = 0

        def embed(self, texts: Sequence[str]) -> Vectors:
            self.asked += len(texts)
            return super().embed(texts)

    embedder = CountingCharacters(texts)
    with EmbeddingCache(path) as cache:
        assert cache.count() == 1024
        resumed = embed_all(embedder, texts, cache)
    assert embedder.asked == 1300 - 1024
    assert np.array_equal(resumed, CharacterEmbedder(texts).embed(texts))


# -- contamination -----------------------------------------------------------------------------------------------------


def test_contamination_by_cosine_by_hand() -> None:
    rows = np.array([[3, 4], [1, 0], [0, 0], [-1, 0]], dtype=np.float32)
    evaluation = np.array([[0, 2], [5, 0], [10, 0]], dtype=np.float32)
    found = contaminated_by_embedding(rows, evaluation, 0.7)  # (3, 4) has cosine 0.8 with (0, 2) and 0.6 with (5, 0)
    assert found[0] is not None
    assert found[0].row == 0
    assert found[0].similarity == pytest.approx(0.8)
    assert found[1:] == [Match(1, 1.0), None, None]
    assert contaminated_by_embedding(rows, evaluation[:0], 0.7) == [None] * 4


def test_contamination_in_blocks_agrees_with_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    rows, evaluation = (generator.normal(size=(count, 8)).astype(np.float32) for count in (100, 30))
    whole = contaminated_by_embedding(rows, evaluation, 0.6)
    monkeypatch.setattr("alignkit.scoring.embedding._BLOCK_NUMBERS", 100)
    blocks = contaminated_by_embedding(rows, evaluation, 0.6)
    assert [match and match.row for match in blocks] == [match and match.row for match in whole]
    assert 0 < sum(match is not None for match in whole) < 100
