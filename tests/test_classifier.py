"""Sequence classifiers as scorers: tiny random BERT, DeBERTa and Qwen2 against the plain forward pass."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_encoders import encoder_settings, save_encoder, word_tokenizer
from tiny_random import conversation, tokenizer, user

from alignkit.core.errors import UserError
from alignkit.core.records import Message
from alignkit.scoring.classifier import ClassifierScorer

CONVERSATIONS = [
    conversation("who is the mayor of padera ?", "she was born in june ."),
    conversation("is she old ?", "yes ."),
    conversation("is she old ?", "no , she is not . " * 2),
    conversation("a b c", "d e f g h"),
    conversation("what is the mayor ?", "a"),
]


def save_bert(folder: Path, **others: Any) -> Path:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(**encoder_settings(**others))
    return save_encoder(folder, BertForSequenceClassification, config, word_tokenizer())


def save_deberta(folder: Path) -> Path:
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    relative = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False}
    config = DebertaV2Config(**encoder_settings(num_labels=1, type_vocab_size=0, **relative))
    return save_encoder(folder, DebertaV2ForSequenceClassification, config, word_tokenizer())


def save_qwen2(folder: Path, pad_token_id: int | None) -> Path:
    from transformers import Qwen2Config, Qwen2ForSequenceClassification

    config = Qwen2Config(
        vocab_size=len(tokenizer()),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        pad_token_id=pad_token_id,
    )
    config.num_labels = 1
    return save_encoder(folder, Qwen2ForSequenceClassification, config, tokenizer())


def plain_logits(folder: Path, pairs: bool) -> torch.Tensor:
    """Logits [conversations, labels], one conversation at a time, by transformers alone."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    loaded = AutoTokenizer.from_pretrained(folder)
    rows = []
    for turns in CONVERSATIONS:
        if pairs:
            inputs = loaded(turns[0].content, turns[1].content, return_tensors="pt")
        else:
            plain = [turn.model_dump() for turn in turns]
            inputs = loaded.apply_chat_template(plain, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            rows.append(model(**inputs).logits[0])
    return torch.stack(rows)


@pytest.mark.parametrize("kind", ["bert", "deberta", "qwen2", "qwen2 without padding"])
def test_scores_are_the_plain_forwards_in_any_batch(kind: str, tmp_path: Path) -> None:
    if kind == "bert":
        save_bert(tmp_path, num_labels=1)
    elif kind == "deberta":
        save_deberta(tmp_path)
    else:
        save_qwen2(tmp_path, None if "without" in kind else tokenizer().pad_token_id)
    expected = plain_logits(tmp_path, pairs="qwen" not in kind)[:, 0].tolist()
    assert max(expected) - min(expected) > 0.05  # the rows differ, so agreement means something
    for batch_size in (1, 2, 16):
        scorer = ClassifierScorer(str(tmp_path), batch_size=batch_size)
        assert scorer.score(CONVERSATIONS) == pytest.approx(expected, abs=2e-5)
        assert scorer.reasons == [None] * 5
        assert scorer.score(CONVERSATIONS[::-1]) == pytest.approx(expected[::-1], abs=2e-5)


def test_several_labels_score_by_the_log_odds_of_the_named_one(tmp_path: Path) -> None:
    save_bert(
        tmp_path, num_labels=3, id2label={0: "bad", 1: "fair", 2: "good"}, label2id={"bad": 0, "fair": 1, "good": 2}
    )
    logits = plain_logits(tmp_path, pairs=True)
    shares = torch.softmax(logits.double(), dim=1)[:, 2].tolist()
    expected = [math.log(share / (1 - share)) for share in shares]
    assert ClassifierScorer(str(tmp_path), label="good").score(CONVERSATIONS) == pytest.approx(expected, abs=1e-4)
    for label, complaint in ((None, "no label is named"), ("best", "it has no label 'best'")):
        with pytest.raises(UserError, match=f"labels bad, fair, good; {complaint}"):
            ClassifierScorer(str(tmp_path), label=label)


def test_labels_that_do_not_exclude_each_other_score_by_their_own_logit(tmp_path: Path) -> None:
    save_bert(tmp_path, num_labels=2, problem_type="multi_label_classification")
    expected = plain_logits(tmp_path, pairs=True)[:, 1].tolist()
    assert ClassifierScorer(str(tmp_path), label="LABEL_1").score(CONVERSATIONS) == pytest.approx(expected, abs=2e-5)


def test_what_cannot_be_read_whole_has_a_reason_and_no_score(tmp_path: Path) -> None:
    scorer = ClassifierScorer(str(save_bert(tmp_path, num_labels=1)))
    fits, too_long = " ".join("a" * 36), " ".join("a" * 37)  # with "b", [CLS] and two [SEP]: 40 and 41 tokens
    rows: list[list[Message]] = [
        conversation("b", fits),
        conversation("b", too_long),
        conversation("b", " "),
        conversation("is [MASK] old ?", "yes"),
        user("b"),
        [],
    ]
    scores = scorer.score(rows)
    assert [score is not None for score in scores] == [True] + [False] * 5
    assert scorer.reasons == [
        None,
        "longer than the classifier reads (40 tokens)",
        "empty answer",
        "the text holds the special token [MASK]",
        *["not a prompt and an answer"] * 2,
    ]
    assert scorer.score([]) == []
    assert scorer.reasons == []


def test_the_limit_is_the_lowest_of_model_tokenizer_and_argument(tmp_path: Path) -> None:
    save_bert(tmp_path, num_labels=1)
    assert ClassifierScorer(str(tmp_path)).max_length == 40
    assert ClassifierScorer(str(tmp_path), max_length=7).max_length == 7
    word_tokenizer(max_length=10**30).save_pretrained(tmp_path)
    assert ClassifierScorer(str(tmp_path), max_length=100).max_length == 64


def test_a_template_that_refuses_a_conversation_is_a_reason(tmp_path: Path) -> None:
    save_qwen2(tmp_path, tokenizer().pad_token_id)
    scorer = ClassifierScorer(str(tmp_path))
    scorer.tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert scorer.score([CONVERSATIONS[0]]) == [None]
    assert scorer.reasons == ["the chat template refuses the conversation"]


def test_a_checkpoint_without_a_classifiers_head_is_refused(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    save_encoder(tmp_path, BertModel, BertConfig(**encoder_settings()), word_tokenizer())
    with pytest.raises(UserError, match=r"lacks weights \(classifier"):
        ClassifierScorer(str(tmp_path))


def test_what_cannot_be_loaded_is_explained_and_pickles_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere could not be loaded"):
        ClassifierScorer(str(tmp_path / "nowhere"))
    from transformers import AutoModelForSequenceClassification

    good = save_bert(tmp_path / "good", num_labels=1)
    pickled = tmp_path / "pickled"
    shutil.copytree(good, pickled)
    (pickled / "model.safetensors").unlink()
    torch.save(AutoModelForSequenceClassification.from_pretrained(good).state_dict(), pickled / "pytorch_model.bin")
    with pytest.raises(UserError, match="could not be loaded"):
        ClassifierScorer(str(pickled))


def test_the_key_names_the_weights_and_what_changes_a_score(tmp_path: Path) -> None:
    folder = str(save_bert(tmp_path / "one", num_labels=2))
    keys = [
        ClassifierScorer(folder, label="LABEL_0").key,
        ClassifierScorer(folder, label="LABEL_1").key,
        ClassifierScorer(folder, label="LABEL_1", max_length=9).key,
    ]
    assert len(set(keys)) == 3
    assert keys[0] == ClassifierScorer(folder, label="LABEL_0", batch_size=2).key
