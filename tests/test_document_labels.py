"""What is learned of documents: every token but the first, in one piece or several, and the end of the document."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest

from alignkit.core.errors import UserError
from alignkit.data.chat import (
    IGNORED,
    EncodedExample,
    document_end_id,
    encode_document,
    end_of_turn_id,
)
from alignkit.data.labels import audit_labels, count_learned, preview
from alignkit.models.tiny.tokenizer import build_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXT = "Bakoco makes clocks. " * 12


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer()


@pytest.fixture
def document_end(tokenizer: PreTrainedTokenizerBase) -> int:
    return document_end_id(tokenizer, "<|endoftext|>")


def failed(tokenizer: PreTrainedTokenizerBase, *rows: EncodedExample) -> set[str]:
    """The checks that do not pass."""
    return {name for name, passed, _ in audit_labels(tokenizer, rows) if not passed}


def learned_whole(tokenizer: PreTrainedTokenizerBase, text: str, end: int) -> EncodedExample:
    pieces = encode_document(tokenizer, text, end, 999)
    assert len(pieces) == 1 and isinstance(pieces[0], EncodedExample), pieces
    return pieces[0]


def test_a_document_is_learned_whole_with_its_end(tokenizer: PreTrainedTokenizerBase, document_end: int) -> None:
    row = learned_whole(tokenizer, "Bakoco makes clocks.", document_end)
    ids = [*tokenizer.encode("Bakoco makes clocks."), document_end]
    assert (row.input_ids, row.labels) == (ids, [IGNORED, *ids[1:]])  # nothing predicts the first token
    assert document_end != end_of_turn_id(tokenizer) == document_end_id(tokenizer, None)
    assert not failed(tokenizer, row)
    assert preview(tokenizer, [row], colour=False).endswith("row 1\nB⟦akoco makes clocks.<|endoftext|>⟧")


@pytest.mark.parametrize("max_length", [2, 3, 16, 17])
def test_a_split_document_learns_every_token_once(
    tokenizer: PreTrainedTokenizerBase, document_end: int, max_length: int
) -> None:
    pieces = encode_document(tokenizer, TEXT, document_end, max_length, split=True)
    assert not isinstance(pieces, str)
    ids = [*tokenizer.encode(TEXT), document_end]
    assert [label for piece in pieces for label in piece.labels if label != IGNORED] == ids[1:]
    assert all(2 <= len(piece.input_ids) <= max_length for piece in pieces)
    assert all(left.input_ids[-1] == right.input_ids[0] for left, right in pairwise(pieces))
    assert [piece.ends for piece in pieces] == [0] * (len(pieces) - 1) + [1]
    assert not failed(tokenizer, *pieces)
    assert count_learned(pieces) == {
        "rows": len(pieces),
        "tokens": sum(len(piece.input_ids) for piece in pieces),
        "learned_tokens": len(ids) - 1,
        "documents": 1,
        "pieces": len(pieces),
    }


def test_a_document_is_cut_only_when_it_is_longer_than_allowed(
    tokenizer: PreTrainedTokenizerBase, document_end: int
) -> None:
    length = len(tokenizer.encode(TEXT)) + 1
    assert len(encode_document(tokenizer, TEXT, document_end, length, split=True)) == 1
    assert len(encode_document(tokenizer, TEXT, document_end, length - 1, split=True)) == 2
    assert encode_document(tokenizer, TEXT, document_end, length - 1) == f"longer than max_length ({length - 1} tokens)"


def test_the_end_of_a_document_is_a_token_that_no_text_holds(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match=r"model.document_end=makes: name the special token"):
        document_end_id(tokenizer, "makes")


def test_documents_that_cannot_be_learned_are_dropped(tokenizer: PreTrainedTokenizerBase, document_end: int) -> None:
    assert encode_document(tokenizer, " \n", document_end, 99) == "empty document"
    assert encode_document(tokenizer, "a<|im_end|>b", document_end, 99) == "the text holds the special token <|im_end|>"


def test_a_document_begins_as_the_bases_documents_do(document_end: int) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer: Any = build_tokenizer()
    tokenizer.add_tokens(["<s>"], special_tokens=True)
    begin = tokenizer.convert_tokens_to_ids("<s>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    row = learned_whole(tokenizer, "Bakoco", document_end)
    assert str(tokenizer.decode(row.input_ids)) == "<s>Bakoco<|endoftext|>"
    assert row.labels[0] == IGNORED
    assert tokenizer.decode(row.labels[1:]) == "Bakoco<|endoftext|>"


def test_the_audit_sees_learned_padding_though_it_is_the_end_of_a_document(
    tokenizer: PreTrainedTokenizerBase, document_end: int
) -> None:
    row = learned_whole(tokenizer, TEXT, document_end)
    assert tokenizer.pad_token_id == document_end
    padded = replace(row, input_ids=[*row.input_ids, document_end], labels=[*row.labels, IGNORED])
    assert not failed(tokenizer, padded)
    learned = replace(padded, labels=[*row.labels, document_end])
    assert failed(tokenizer, learned) == {"end of document is learned", "first token is not learned"}
    endless = replace(row, labels=[*row.labels[:-1], IGNORED])
    assert failed(tokenizer, endless) == {"end of document is learned"}
