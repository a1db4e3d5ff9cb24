"""The encoder of a retriever: loaded or made from nothing, trained wholly or by an adapter, saved as plain files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from alignkit.core.config import LoraConfig
from alignkit.core.errors import UserError, first_line
from alignkit.core.retriever_config import NEW, EncoderConfig, TaskConfig
from alignkit.scoring.embedding import load_sentence_transformer


def load_encoder(config: EncoderConfig, texts: Iterable[str], seed: int, *, cosine: bool = True) -> Any:
    """A `SentenceTransformer`, float32, which compares by cosine or dot product; a new one knows the words of `texts`.

    Raises `UserError` for an encoder that cannot be loaded.
    """
    if config.path == NEW and (config.query_max_length or config.passage_max_length or config.pooling):
        raise UserError(
            "encoder.path=new reads texts whole, and takes their mean: give another encoder, or leave out "
            "encoder.pooling, encoder.query_max_length and encoder.passage_max_length"
        )
    if config.path == NEW:
        encoder = _new_encoder(config, texts, seed)
    else:
        encoder = load_sentence_transformer(config.path, config.pooling, config.revision)
    if config.passage_max_length is not None:
        limit = getattr(getattr(encoder[0], "config", None), "max_position_embeddings", None)
        if limit is not None and config.passage_max_length > limit:
            raise UserError(
                f"encoder.passage_max_length={config.passage_max_length}: {config.path} reads at most {limit} tokens"
            )
        encoder.max_seq_length = config.passage_max_length
    encoder.similarity_fn_name = "cosine" if cosine else "dot"
    return encoder


def _new_encoder(config: EncoderConfig, texts: Iterable[str], seed: int) -> Any:
    """Random vectors for word pieces (Schuster and Nakajima, 2012), learned from `texts`; a text is their mean.

    The surprise: it finds something before any training, since random vectors of many dimensions are nearly
    orthogonal, and their mean is a bag of words.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=config.vocabulary, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    torch.manual_seed(seed)
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=config.dimensions)])


def add_adapter(encoder: Any, lora: LoraConfig, seed: int) -> None:
    """Freeze the encoder and train a low-rank adapter on all its linear layers instead.

    Raises `UserError` for an encoder without any.
    """
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model
    from sentence_transformers.sentence_transformer.modules import Transformer

    if not isinstance(encoder[0], Transformer):
        raise UserError("tuning=lora: this encoder has no linear layers to put an adapter on; use tuning=full")
    torch.manual_seed(seed)
    for weight in encoder.parameters():
        weight.requires_grad = False
    adapter = PeftLoraConfig(
        task_type="FEATURE_EXTRACTION",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        target_modules="all-linear",
    )
    try:
        encoder[0].model = get_peft_model(encoder[0].model, adapter)
    except ValueError as error:
        raise UserError(f"tuning=lora: {first_line(error)}; use tuning=full") from error


def merge_adapter(encoder: Any) -> None:
    """Put the adapter, if there is one, into the weights: W + (alpha / rank) B A."""
    from peft import PeftModel

    if isinstance(getattr(encoder[0], "model", None), PeftModel):
        encoder[0].model = encoder[0].model.merge_and_unload()


def freeze_unused(encoder: Any) -> None:
    """Freeze the weights that no embedding depends on, like BERT's pooler under another pooling."""
    inputs = {name: _to(value, encoder.device) for name, value in encoder.preprocess(["a", "b"]).items()}
    encoder(inputs)["sentence_embedding"].sum().backward()
    for weight in encoder.parameters():
        weight.requires_grad = weight.requires_grad and weight.grad is not None
        weight.grad = None


def prompts(tasks: Mapping[str, TaskConfig]) -> dict[str, str]:
    """The instructions as sentence-transformers' prompts: `<task>_query` and `<task>_passage`.

    Where all tasks have the same, `query` and `document` as well, which `encode_query` and `encode_document` use.
    """
    found: dict[str, str] = {}
    for name, task in tasks.items():
        found |= {f"{name}_query": task.query_instruction, f"{name}_passage": task.passage_instruction}
    pairs = {(task.query_instruction, task.passage_instruction) for task in tasks.values()}
    if len(pairs) == 1:
        (pair,) = pairs
        found |= {"query": pair[0], "document": pair[1]}
    return found


def save_encoder(encoder: Any, folder: Path, tasks: Mapping[str, TaskConfig]) -> None:
    """Write the encoder, without adapter, as `SentenceTransformer(folder)` reads it; weights as safetensors alone."""
    encoder.prompts = prompts(tasks)
    encoder.save_pretrained(str(folder), create_model_card=False, safe_serialization=True)


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value
