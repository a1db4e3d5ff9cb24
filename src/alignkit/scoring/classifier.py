"""Any sequence-classification checkpoint as a scorer: reward models of others, or quality and safety classifiers."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.core.errors import UserError
from alignkit.core.hashing import hash_path, hash_text
from alignkit.core.records import Message
from alignkit.data.chat import special_token_in

if TYPE_CHECKING:
    import torch

LOG = logging.getLogger("alignkit")

Encoded = dict[str, list[int]]


class ClassifierScorer:
    """Scores by a classifier's logit, or by the log-odds of one of its labels.

    `path` is a folder or a hub name. A tokenizer with a chat template gets the conversation as the template writes it;
    one without gets a pair, the prompt's text and the answer, as OpenAssistant's DeBERTa reward models were trained. A
    model with one logit scores by it. Of one with several, `label` must be named, and the score is log(p / (1 - p)) of
    its probability p. Weights are read from safetensors and no remote code is run. `max_length` can only lower the
    model's own limit; nothing is cut. The surprise: a decoder without a padding token in its configuration can only be
    given one conversation at a time, since it finds the last token by looking for padding.
    """

    def __init__(
        self,
        path: str,
        revision: str | None = None,
        batch_size: int = 16,
        label: str | None = None,
        *,
        max_length: int | None = None,
        dtype: str = "float32",
        device: str | None = None,
    ) -> None:
        self.path = path
        self.model, self.tokenizer = _load(path, revision, dtype, device)
        self.label = _label_index(self.model.config, label, path)
        self.max_length = min(limit for limit in (max_length, *_limits(self.model, self.tokenizer)) if limit)
        pad = self.model.config.get_text_config().pad_token_id
        self.batch_size = 1 if pad is None else batch_size
        self.pad_id = 0 if pad is None else pad
        self.reasons: list[str | None] = []

    @cached_property
    def key(self) -> str:
        """Hexadecimal; names the model's files or commit, and the settings that change a score."""
        commit = getattr(self.model.config, "_commit_hash", None)
        files = hash_path(Path(self.path)) if Path(self.path).is_dir() else [self.path, commit]
        return hash_text(json.dumps([files, self.label, self.max_length, str(self.model.dtype)]))

    def score(self, conversations: Sequence[list[Message]]) -> list[float | None]:
        """One score a conversation, in float32; None, with its reason, for one that the model cannot read whole."""
        import torch

        encoded = [self._encode(conversation) for conversation in conversations]
        self.reasons = [each if isinstance(each, str) else None for each in encoded]
        lengths = [0 if isinstance(each, str) else len(each["input_ids"]) for each in encoded]
        readable = sorted((place for place, length in enumerate(lengths) if length), key=lambda place: lengths[place])
        scores: list[float | None] = [None] * len(conversations)
        for start in range(0, len(readable), self.batch_size):
            places = readable[start : start + self.batch_size]
            batch = self._collate([each for place in places if not isinstance(each := encoded[place], str)])
            with torch.inference_mode():
                logits = self.model(**batch).logits.float().cpu()
            for place, score in zip(places, self._scores(logits), strict=True):
                scores[place] = score
        return scores

    def _scores(self, logits: torch.Tensor) -> list[float]:
        """Float32 logits [batch, labels] -> one number a row."""
        chosen = logits[:, self.label]
        if logits.shape[1] > 1 and self.model.config.problem_type != "multi_label_classification":
            others = [label for label in range(logits.shape[1]) if label != self.label]
            chosen = chosen - logits[:, others].logsumexp(dim=1)
        return [float(value) for value in chosen]

    def _encode(self, conversation: Sequence[Message]) -> Encoded | str:
        """What the model is given, or the reason why it cannot be."""
        if len(conversation) < 2 or conversation[-1].role != "assistant":
            return "not a prompt and an answer"
        *prompt, answer = conversation
        if not answer.content.strip():
            return "empty answer"
        if special := special_token_in(self.tokenizer, conversation):
            return f"the text holds the special token {special}"
        if self.tokenizer.chat_template:
            try:
                text = self.tokenizer.apply_chat_template([turn.model_dump() for turn in conversation], tokenize=False)
            except Exception as error:  # templates raise what they like: jinja2's errors, TypeError, ...
                LOG.debug("the chat template refuses: %s", error)
                return "the chat template refuses the conversation"
            encoded = self.tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)
        else:
            before = "\n\n".join(turn.content for turn in prompt)
            encoded = self.tokenizer(before, answer.content, truncation=False, verbose=False)
        if len(encoded["input_ids"]) > self.max_length:
            return f"longer than the classifier reads ({self.max_length} tokens)"
        return {name: list(values) for name, values in encoded.items()}

    def _collate(self, rows: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        """The rows as tensors, padded on the right with the token that the model takes for padding."""
        import torch

        longest = max(len(row["input_ids"]) for row in rows)
        batch = {}
        for name in rows[0]:
            filler = self.pad_id if name == "input_ids" else 0
            padded = [row[name] + [filler] * (longest - len(row[name])) for row in rows]
            batch[name] = torch.tensor(padded, device=self.model.device)
        return batch


def _load(path: str, revision: str | None, dtype: str, device: str | None) -> tuple[Any, Any]:
    """Model and tokenizer. `UserError` when there are none, or when the classifier's head is not in the checkpoint."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    from alignkit.models.loading import resolve_dtype

    transformers_logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
        model, report = AutoModelForSequenceClassification.from_pretrained(
            path,
            revision=revision,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=resolve_dtype(dtype),
            output_loading_info=True,
        )
    except (OSError, ValueError) as error:
        raise UserError(f"the classifier {path} could not be loaded: {str(error).splitlines()[0]}") from error
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"the classifier {path} lacks weights ({', '.join(missing[:3])}), and at random they mean nothing. "
            "Give a checkpoint that was trained for sequence classification."
        )
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval(), tokenizer


def _limits(model: Any, tokenizer: Any) -> Iterator[int]:
    """How many tokens model and tokenizer say they can take."""
    yield int(tokenizer.model_max_length)  # 1e30 when it has no limit
    yield int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0)


def _label_index(config: Any, label: str | None, path: str) -> int:
    names = {name: int(index) for index, name in config.id2label.items()}
    if label in names:
        return names[label]
    if label is None and len(names) == 1:
        return 0
    wanted = "no label is named" if label is None else f"it has no label {label!r}"
    raise UserError(f"the classifier {path} has the labels {', '.join(names)}; {wanted}. Name one of them.")
