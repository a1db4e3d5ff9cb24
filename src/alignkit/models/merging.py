"""Merging: an adapter becomes part of the base's own weights, and the result a checkpoint that needs no alignkit.

An adapter that was trained over a 4-bit base corrects that base, rounding included. It is therefore merged into the
weights that the 4 bits stand for (the dequantised base): added to the original 16-bit weights it corrects errors that
are not there, and added to the 4-bit weights themselves it is rounded away.

Memory: the merged model and little else, since layers are replaced one by one. A 7B model takes 15 GB in 16 bits, on
the GPU when there is one, and as much on disk.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from alignkit.core.config import ModelConfig, Quantization
from alignkit.core.errors import UserError
from alignkit.data.chat import end_of_turn_id
from alignkit.models.loading import load_base

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from alignkit.models.reward_model import RewardModel

SHARD_SIZE = "4GB"


def merge_into_trained_base(policy: PeftModel, adapter: str, dtype: torch.dtype) -> PreTrainedModel:
    """The base under `policy` with `adapter` (its folder) in its weights, of `dtype`. `policy` is used up.

    A 4-bit base is dequantised first. Weights are rounded once, after the sum.
    """
    base: Any = policy.unload()
    if getattr(base, "is_loaded_in_4bit", False):
        base = _dequantise(base, dtype)
    return _merge(base, adapter, dtype)


def merge_into_original(model: ModelConfig, adapter: str, dtype: torch.dtype) -> PreTrainedModel:
    """The base as it was before any quantisation with `adapter` in its weights, of `dtype`."""
    return _merge(load_base(replace(model, quantization=Quantization.none)), adapter, dtype)


def save_checkpoint(merged: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write safetensors shards, tokenizer with chat template, and a generation config that stops where a turn ends.

    The end-of-turn token becomes `eos`; whatever else ended the base's generation goes on ending it.
    """
    end = end_of_turn_id(tokenizer)
    tokenizer.eos_token = str(tokenizer.convert_ids_to_tokens(end))
    generation: Any = merged.generation_config
    before = generation.eos_token_id
    others = before if isinstance(before, list) else [before]
    generation.eos_token_id = [end, *(id for id in others if id not in (None, end))]
    generation._from_model_config = False  # or transformers may make it anew from config.json, which knows one end only
    for config in (merged.config, generation):
        config.pad_token_id, config.bos_token_id = tokenizer.pad_token_id, tokenizer.bos_token_id
    merged.config.eos_token_id = end
    tokenizer.save_pretrained(str(folder))
    merged.save_pretrained(str(folder), max_shard_size=SHARD_SIZE)


def classifier_of(reward_model: RewardModel, dtype: torch.dtype) -> PreTrainedModel:
    """A reward model as a plain sequence classifier with one label; `reward_model` is used up.

    Its logit is the reward model's score plus `classifier_offset`, read at the last token that is not padding: a text
    must end with the end-of-turn token and nothing after it.
    """
    from transformers import AutoModelForSequenceClassification

    head = reward_model.module.mean_head / reward_model.scale
    merged = _merge_loaded(reward_model.module.policy, dtype)
    config = merged.config
    config.num_labels, config.pad_token_id = 1, reward_model.tokenizer.pad_token_id
    config.problem_type = "regression"  # transformers' pipeline squashes any other logit
    config.id2label, config.label2id = {0: "reward"}, {"reward": 0}
    config.reward_offset = classifier_offset(reward_model)
    with torch.device("meta"):  # nothing of it is kept but its shape
        classifier: Any = AutoModelForSequenceClassification.from_config(config)
    setattr(classifier, classifier.base_model_prefix, merged.base_model)
    classifier.score = torch.nn.Linear(head.shape[1], 1, bias=False, dtype=dtype, device=head.device)
    classifier.score.weight.data.copy_(head)
    checked: PreTrainedModel = classifier.eval()
    return checked


def classifier_offset(reward_model: RewardModel) -> float:
    """What a classifier's logit is above the score: its head has no bias that could take it away."""
    return reward_model.offset / reward_model.scale


def save_classifier(reward_model: RewardModel, folder: Path, dtype: torch.dtype) -> None:
    """Write the classifier with a tokenizer whose chat template ends where the score is read.

    Raises `UserError` where padding could not be told from the end of a turn. `reward_model` is used up.
    """
    from alignkit.data.chat import template_up_to_the_end

    tokenizer = reward_model.tokenizer
    if tokenizer.pad_token_id == end_of_turn_id(tokenizer):
        raise UserError(
            f"model.pad_token={tokenizer.pad_token}: it also ends a turn, and classifiers take every such token for "
            "padding; train the reward model with another pad_token"
        )
    template = tokenizer.chat_template
    tokenizer.chat_template = template_up_to_the_end(tokenizer)
    try:
        tokenizer.save_pretrained(str(folder))
    finally:
        tokenizer.chat_template = template
    classifier_of(reward_model, dtype).save_pretrained(str(folder), max_shard_size=SHARD_SIZE)


# -- inside ------------------------------------------------------------------------------------------------------------


def _dequantise(base: Any, dtype: torch.dtype) -> Any:
    """Replace every 4-bit layer by the plain layer that it computes with."""
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it warns that it does what it was asked to do
    try:
        base = base.dequantize(dtype=dtype)
    finally:
        transformers_logging.set_verbosity(before)
    base.is_loaded_in_4bit = False  # stays behind, and PEFT would believe it
    return base


def _merge(base: Any, adapter: str, dtype: torch.dtype) -> PreTrainedModel:
    """Load the adapter over a base that is not quantised, and add it in."""
    from peft import PeftModel

    _cast(base, dtype)
    return _fuse(PeftModel.from_pretrained(base, adapter))


def _merge_loaded(policy: PeftModel, dtype: torch.dtype) -> PreTrainedModel:
    """Like `merge_into_trained_base`, for an adapter that is in memory."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        policy.save_pretrained(folder, selected_adapters=[policy.active_adapter], save_embedding_layers=False)
        return merge_into_trained_base(policy, folder, dtype)


def _fuse(policy: PeftModel) -> PreTrainedModel:
    merged: Any = policy.merge_and_unload()
    broken = [name for name, weight in merged.named_parameters() if not bool(torch.isfinite(weight).all())]
    if broken:
        raise UserError(
            f"merging gave {len(broken)} weights that are not finite, {broken[0]} first: the adapter diverged in "
            "training, or dtype=float16 cannot hold them; train again, or set dtype=bfloat16"
        )
    result: PreTrainedModel = merged.eval()
    return result


def _cast(base: Any, dtype: torch.dtype) -> None:
    """Weights only: buffers hold the rotary frequencies, which in 16 bits would turn far tokens by wrong angles."""
    for weight in base.parameters():
        weight.data = weight.data.to(dtype)
    base.config.dtype = dtype
