"""Embedding by a sentence encoder: a tiny random BERT, pooled by us and by sentence-transformers alike."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_encoders import encoder_settings, save_encoder, word_tokenizer

from alignkit.core.errors import UserError
from alignkit.scoring.embedding import SentenceTransformerEmbedder, Vectors, embed_all
from alignkit.scoring.embedding_cache import EmbeddingCache

pytestmark = pytest.mark.skipif(find_spec("sentence_transformers") is None, reason="alignkit[retrieval]")

TEXTS = ["who is the mayor of padera ?", "yes", "she was born in june .", "a b c d e f g h", "yes"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BertConfig, BertModel

    config = BertConfig(**encoder_settings())
    return save_encoder(tmp_path_factory.mktemp("bert"), BertModel, config, word_tokenizer(max_length=12))


def plain_cls(folder: Path, texts: list[str]) -> Vectors:
    """The vector of the first token, one text at a time, by transformers alone."""
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        rows = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, 0] for text in texts]
    return np.asarray(torch.stack(rows).numpy(), dtype=np.float32)


def test_cls_pooling_is_the_first_tokens_vector_whatever_the_batch(folder: Path) -> None:
    expected = plain_cls(folder, TEXTS)
    for batch_size in (1, 2, 32):
        vectors = SentenceTransformerEmbedder(str(folder), batch_size, pooling="cls").embed(TEXTS)
        assert vectors.dtype == np.float32
        assert np.abs(vectors - expected).max() < 1e-5
    assert np.abs(expected[0] - expected[1]).max() > 0.1  # the texts differ, so agreement means something


def test_key_dimensions_and_no_texts(folder: Path) -> None:
    embedder = SentenceTransformerEmbedder(str(folder))
    assert embedder.dimensions == 32
    assert embedder.embed([]).shape == (0, 32)
    others = [
        SentenceTransformerEmbedder(str(folder), pooling="cls"),
        SentenceTransformerEmbedder(str(folder), prompt="the"),
    ]
    assert embedder.key == SentenceTransformerEmbedder(str(folder), batch_size=3).key
    assert len({embedder.key, *(other.key for other in others)}) == 3


def test_a_prompt_stands_before_every_text(folder: Path) -> None:
    prompted = SentenceTransformerEmbedder(str(folder), prompt="who is ", pooling="cls").embed(["the mayor"])
    assert np.abs(prompted - plain_cls(folder, ["who is the mayor"])).max() < 1e-5


def test_texts_over_the_limit_are_counted_with_their_prompt(folder: Path) -> None:
    ten, eleven = " ".join("a" * 10), " ".join("b" * 11)  # [CLS] and [SEP] make 12 and 13 tokens of them
    assert SentenceTransformerEmbedder(str(folder)).too_long([ten, eleven, "a", eleven] * 400) == 800
    assert SentenceTransformerEmbedder(str(folder), prompt="the ").too_long([ten, "a"]) == 1


def test_cached_vectors_are_the_models(folder: Path, tmp_path: Path) -> None:
    embedder = SentenceTransformerEmbedder(str(folder))
    with EmbeddingCache(tmp_path / "cache.sqlite") as cache:
        first = embed_all(embedder, TEXTS, cache)
        assert cache.count() == 4
        assert np.array_equal(embed_all(embedder, TEXTS, cache), first)
    assert np.array_equal(first[1], first[4])


def test_what_cannot_be_loaded_is_explained(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="nowhere could not be loaded"):
        SentenceTransformerEmbedder(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="pooling=first: choose cls, max, mean"):
        SentenceTransformerEmbedder(str(folder), pooling="first")
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(UserError, match=r"pip install 'alignkit\[retrieval\]'"):
        SentenceTransformerEmbedder(str(folder))


def test_pickled_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModel

    for file in folder.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save(AutoModel.from_pretrained(folder).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="could not be loaded"):
        SentenceTransformerEmbedder(str(tmp_path))


def test_another_prompt_shares_the_model_and_has_a_key_of_its_own(folder: Path) -> None:
    plain = SentenceTransformerEmbedder(str(folder))
    before = plain.key
    prompted = plain.with_prompt("the mayor ")
    assert prompted._model is plain._model
    assert (plain.key, prompted.key != before) == (before, True)
    assert prompted.key == SentenceTransformerEmbedder(str(folder), prompt="the mayor ").key
    assert np.allclose(prompted.embed(["of padera"]), plain.embed(["the mayor of padera"]), atol=1e-6)
    assert plain.own_prompt("query") is None
    plain._model.prompts = {"query": "who is ", "document": ""}
    assert (plain.own_prompt("query"), plain.own_prompt("document")) == ("who is ", None)
