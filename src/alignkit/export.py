"""export: merge an adapter into its base, and write what other programs load: safetensors, GGUF, adapter, model card.

The adapter is merged into the base that it was trained on; a 4-bit base is dequantised first. How far the merged model
is from base and adapter is measured, and every GGUF file is read back and compared with the merged model: logits, token
ids, chat template, end of turn and greedy continuations. Where one is not the same, the stage stops and says why.

Reads:   adapter                 the adapter to export (none: only the reward model)
         data.path               held-out rows to measure on (none: a few built-in conversations)
         reward                  a reward model to export as a classifier (optional)
Writes:  merged/                 safetensors, tokenizer with chat template, generation config: transformers, vLLM
         adapter/                the adapter with base and tokenizer named, for PEFT and `vllm serve --enable-lora`
         model-<type>.gguf       for llama.cpp, Ollama, LM Studio
         Modelfile               for `ollama create`
         reward_classifier/      the reward model with one label, for transformers and vLLM's pooling
         README.md               the model card: how it was made, what was measured, and its limits

Overrides people use:
  adapter=runs/mine/sft/adapter          another adapter
  formats=[safetensors,gguf]             only these (safetensors, adapter, gguf)
  gguf_types=[bf16,q8_0]                 how GGUF files store weights: f32, f16, bf16, q8_0
  data.path=held_out.jsonl               measure on your own rows
  merge_into=original                    merge into the 16-bit base instead; the drift of both is shown
  reward=runs/mine/reward                export this reward model, too
  adapter=none reward=runs/mine/reward   export this reward model, and nothing else
  push_to_hub=<owner>/<name>             put it on the Hub (private)

Examples:
  python -m alignkit.export run=demo
  python -m alignkit.export +model=qwen7b run=mine data.path=held_out.jsonl gguf_types=[bf16,q8_0] license=other
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Optional

from alignkit.core.artifact import Artifact
from alignkit.core.config import ModelConfig, RowsConfig, StageConfig
from alignkit.core.errors import UserError
from alignkit.core.records import ChatExample, TextExample

if TYPE_CHECKING:
    from alignkit.data.chat import EncodedExample

# All configurations write Optional[...]; omegaconf takes `... | None` just as well.
# ruff: noqa: UP045

LOG = logging.getLogger("alignkit")

FORMATS = ("safetensors", "adapter", "gguf")
CHECK_ROWS = 8
"""Rows, of those given, that exported files are compared on, beside fixed texts."""
SCORE_TOLERANCE = {"torch.float32": 1e-5, "torch.bfloat16": 0.3, "torch.float16": 0.05}
"""Most that a score may differ in the classifier, whose head is rounded like the rest: by dtype."""
NONE, CLASSIFIER = "none", "reward_classifier"


class MergeInto(Enum):
    """Which base gets the adapter: that of the training (4-bit weights dequantised), or the original 16-bit one."""

    trained_base = "trained_base"
    original = "original"


@dataclass
class ExportConfig(StageConfig):
    """Configuration of `export`."""

    inputs: ClassVar[tuple[str, ...]] = ("adapter", "data.path", "reward", "model.path")
    incidental: ClassVar[tuple[str, ...]] = (*StageConfig.incidental, "push_to_hub", "hub_private")

    adapter: str = ""
    """The adapter/ folder of a training stage; none: export the reward model alone, whatever the formats."""
    formats: list[str] = field(default_factory=lambda: list(FORMATS))
    """What to write: safetensors (merged/), adapter, gguf."""
    gguf_types: list[str] = field(default_factory=lambda: ["f16", "q8_0"])
    """One GGUF file for each: f32, f16, bf16, q8_0."""
    merge_into: MergeInto = MergeInto.trained_base
    """The base that the adapter was trained on, or the original 16-bit weights."""
    dtype: str = "auto"
    """Of the merged weights: float32, bfloat16, float16, or auto: that of the model."""
    data: RowsConfig = field(default_factory=lambda: RowsConfig(path="none", limit=64))
    max_drift: float = 0.01
    """Largest mean KL(base + adapter || merged) a token, in nats, that passes."""
    reward: Optional[str] = None
    """Run folder of a reward model to export as a classifier."""
    license: str = "other"
    """Of the model, for the card: the base's licence and your data's decide."""
    push_to_hub: Optional[str] = None
    """Upload to this model repository, <owner>/<name>; the token is read from HF_TOKEN."""
    hub_private: bool = True
    """Whether that repository is to be private."""
    model: ModelConfig = field(default_factory=ModelConfig)


def run(config: ExportConfig) -> Artifact:
    """Merge, measure the drift, write each format, read it back, and describe it all in a model card."""
    check_config(config)
    with Artifact.open("export", config) as artifact:
        if not artifact.up_to_date:
            from alignkit.models.loading import load_tokenizer
            from alignkit.reporting.model_card import write_model_card

            if config.adapter == NONE:
                write_classifier(config, artifact)
            else:
                check_adapter_unchanged(config, artifact)
                tokenizer = load_tokenizer(config.model)
                examples = read_examples(config, tokenizer, artifact)
                if needs_merge(config):
                    merged = write_merged(config, tokenizer, examples, artifact)
                    if "gguf" in config.formats:
                        write_gguf_files(config, tokenizer, examples, merged, artifact)
                if "adapter" in config.formats:
                    write_adapter(config, tokenizer, artifact)
                if config.reward is not None:
                    write_classifier(config, artifact)
                write_model_card(artifact, config.adapter, config.model, config.license)
            artifact.summary = summary(artifact)
    if config.push_to_hub:
        push(config, artifact)
    return artifact


# -- what goes in ------------------------------------------------------------------------------------------------------


def check_config(config: ExportConfig) -> None:
    """Refuse what cannot work, while it costs nothing."""
    from alignkit.data.hub import check_push
    from alignkit.models.gguf_types import gguf_type, require_gguf

    if config.adapter == NONE and config.reward is None:
        raise UserError("adapter=none exports the reward model alone: name it, e.g. reward=runs/mine/reward")
    unknown = [name for name in config.formats if name not in FORMATS]
    if unknown or not config.formats:
        raise UserError(f"formats={config.formats}: choose from {', '.join(FORMATS)}")
    if config.max_drift <= 0:
        raise UserError(f"max_drift={config.max_drift}: must be above 0 (0.01 nats is the default)")
    if not re.fullmatch(r"[A-Za-z0-9.-]+", config.license):
        raise UserError(f"license={config.license}: give a licence's short name as the Hub has it (apache-2.0, other)")
    if "gguf" in config.formats and config.adapter != NONE:
        require_gguf()
        if not config.gguf_types:
            raise UserError("gguf_types=[]: name at least one, or leave gguf out of formats")
        for name in config.gguf_types:
            gguf_type(name)
    if config.push_to_hub:
        check_push(config.push_to_hub)


def needs_merge(config: ExportConfig) -> bool:
    """Whether a merged model is wanted, or needed on the way."""
    return bool({"safetensors", "gguf"} & set(config.formats))


def check_adapter_unchanged(config: ExportConfig, artifact: Artifact) -> None:
    """The adapter belongs to the base, and is what its stage wrote."""
    from alignkit.core.lineage import origin_of, warnings_about
    from alignkit.models.loading import check_adapter

    check_adapter(config.adapter, config.model)
    if origin_of(Path(config.adapter)) is not None:
        warnings = warnings_about(Path(config.adapter))
        artifact.check("adapter_as_trained", not warnings, "; ".join(warnings) or "the hash that its stage wrote down")


def merged_dtype(config: ExportConfig) -> str:
    """Of the merged weights, as `model.dtype` names it."""
    return config.model.dtype if config.dtype == "auto" else config.dtype


def read_examples(config: ExportConfig, tokenizer: Any, artifact: Artifact) -> list[ChatExample]:
    """Prompts and answers to measure on: the rows given, or the built-in conversations; what is unusable is dropped."""
    from alignkit.data import sources
    from alignkit.evaluation.parity import conversations

    given = config.data.path != "none"
    examples, unusable = sources.read_examples(config.data) if given else (conversations(), [])
    artifact.drop_all(unusable)
    usable: list[ChatExample] = []
    for example in examples:
        if isinstance(example, TextExample):
            raise UserError(f"data.path={config.data.path}: documents; give rows with a prompt and an answer")
        encoded = encode(config, tokenizer, example)
        if isinstance(encoded, str):
            artifact.drop(example, encoded)
        else:
            usable.append(example)
    if not usable:
        raise UserError(f"data.path={config.data.path}: no row can be measured on; dropped.jsonl says why")
    return usable


def encode(config: ExportConfig, tokenizer: Any, example: ChatExample) -> EncodedExample | str:
    """Tokens and labels, as training makes them."""
    from alignkit.data.chat import encode_example

    length = config.model.max_length
    return encode_example(tokenizer, example.prompt, example.completion, length, tools=example.tools)


# -- the merged model --------------------------------------------------------------------------------------------------


def write_merged(config: ExportConfig, tokenizer: Any, examples: Sequence[ChatExample], artifact: Artifact) -> Path:
    """Merge, measure, save; returns the checkpoint's folder, which is an output only where it was asked for."""
    from alignkit.data.chat import EncodedExample
    from alignkit.evaluation.divergence import divergence, learned_logits, within
    from alignkit.models.gguf import check_gguf
    from alignkit.models.loading import load_policy, resolve_dtype
    from alignkit.models.merging import merge_into_original, merge_into_trained_base, save_checkpoint

    dtype = resolve_dtype(merged_dtype(config))
    encoded = [encode(config, tokenizer, example) for example in examples]
    rows = within([row for row in encoded if isinstance(row, EncodedExample)])
    policy = load_policy(config.model, config.adapter)
    if "gguf" in config.formats:
        check_gguf(policy.config, tokenizer)
    reference = learned_logits(policy, rows)

    merged = merge_into_trained_base(policy, config.adapter, dtype)
    drift = {"trained_base": divergence(reference, learned_logits(merged, rows), rows)}
    if config.merge_into is MergeInto.original:
        del policy, merged
        merged = merge_into_original(config.model, config.adapter, dtype)
        drift["original"] = divergence(reference, learned_logits(merged, rows), rows)
    artifact.metrics["drift"] = {name: vars(each) for name, each in drift.items()}
    found = drift[config.merge_into.name]
    beside = "" if len(drift) == 1 else f"; merged into the trained base: {drift['trained_base']}"
    hint = "merge_into=trained_base keeps what was trained" if len(drift) > 1 else "a wider dtype rounds less"
    detail = f"{found}; bound {config.max_drift:g} ({hint}, or raise max_drift){beside}"
    artifact.check("merge_drift", found.mean_kl <= config.max_drift, detail)

    if "safetensors" in config.formats:
        with artifact.output("merged") as folder:
            save_checkpoint(merged, tokenizer, folder)
        return artifact.folder / "merged"
    save_checkpoint(merged, tokenizer, artifact.work_folder / "merged")
    return artifact.work_folder / "merged"


# -- GGUF --------------------------------------------------------------------------------------------------------------


def write_gguf_files(
    config: ExportConfig, tokenizer: Any, examples: Sequence[ChatExample], merged: Path, artifact: Artifact
) -> None:
    """One file for each type, each compared with the merged checkpoint before it appears; and a Modelfile."""
    from alignkit.evaluation.parity import compare_file, questions, read
    from alignkit.models.gguf import write_gguf
    from alignkit.models.gguf_types import gguf_type
    from alignkit.models.loading import load_base
    from alignkit.models.serving import modelfile

    asked = questions(tokenizer, examples[:CHECK_ROWS], config.model.max_length)
    model = load_base(ModelConfig(name="merged", path=str(merged), dtype=merged_dtype(config)))
    context = min(config.model.max_length, model.config.max_position_embeddings)
    reference = read(model, asked, tokenizer)
    dtype = model.dtype
    del model
    for kind in (gguf_type(name) for name in config.gguf_types):
        with artifact.output(f"model-{kind.name}.gguf") as path:
            write_gguf(merged, tokenizer, path, kind, config.model.name)
            findings, figures = compare_file(path, kind, tokenizer, asked, reference, dtype)
            artifact.metrics.setdefault("gguf", {})[kind.name] = figures
            for finding in findings:
                artifact.check(*finding)
    artifact.write_text("Modelfile", modelfile(tokenizer, f"model-{kind.name}.gguf", context))


# -- beside it ---------------------------------------------------------------------------------------------------------


def write_adapter(config: ExportConfig, tokenizer: Any, artifact: Artifact) -> None:
    """The adapter with its base and tokenizer named, as PEFT and vLLM want it."""
    from alignkit.models.serving import save_adapter_for_serving

    with artifact.output("adapter") as folder:
        written = save_adapter_for_serving(Path(config.adapter), folder, config.model, tokenizer)
    artifact.metrics["adapter"] = {"rank": written.get("r"), "base": written["base_model_name_or_path"]}


def write_classifier(config: ExportConfig, artifact: Artifact) -> None:
    """The reward model as a classifier that anybody can load, checked against its own scores."""
    from alignkit.evaluation.parity import classifier_scores, conversations
    from alignkit.models.loading import resolve_dtype
    from alignkit.models.merging import classifier_offset, save_classifier
    from alignkit.models.reward_model import RewardModel
    from alignkit.reporting.classifier_card import classifier_card

    assert config.reward is not None
    reward_model = RewardModel.from_pretrained(config.reward)
    offset, dialogues = classifier_offset(reward_model), [[*each.prompt, *each.completion] for each in conversations()]
    said = reward_model.scores_or_reasons(dialogues)
    scores = {number: score for number, score in enumerate(said) if isinstance(score, float)}
    if not scores:
        raise UserError(f"reward={config.reward}: it cannot read a short conversation ({said[0]})")
    card = classifier_card(reward_model, offset)
    with artifact.output(CLASSIFIER) as folder:
        save_classifier(reward_model, folder, resolve_dtype(merged_dtype(config)))
        (folder / "README.md").write_text(card, encoding="utf-8")
        for side in ("right", "left"):
            found, dtype = classifier_scores(folder, [dialogues[number] for number in scores], side)
            apart = max(abs(a - (b - offset)) for a, b in zip(scores.values(), found, strict=True))
            detail = f"largest difference {apart:.1e} over {len(found)} conversations, rounding allows "
            name = "classifier_scores" if side == "right" else "classifier_scores_padded_left"
            artifact.check(name, apart <= SCORE_TOLERANCE[dtype], f"{detail}{SCORE_TOLERANCE[dtype]:g}")
    artifact.metrics[CLASSIFIER] = {"offset": offset, "largest_difference": apart}


def summary(artifact: Artifact) -> str:
    """The key figures in a few words."""
    parts = [entry["path"] for entry in artifact.outputs if entry["path"] not in ("README.md", "dropped.jsonl")]
    drift = artifact.metrics.get("drift", {})
    found = drift.get("original") or drift.get("trained_base")
    return ", ".join(parts) + (f"; drift {found['mean_kl']:.1e} nats" if found else "")


def push(config: ExportConfig, artifact: Artifact) -> None:
    """Upload all outputs to a model repository; merged/ at its top, where hubs and loaders look for a model.

    An adapter whose base is a folder of this machine is of no use elsewhere, and its path nobody's business.
    """
    from alignkit.core.manifest import is_hub_name
    from alignkit.data.hub import push_files

    assert config.push_to_hub is not None
    files: dict[str, Path] = {}
    for entry in artifact.outputs:
        if entry["path"] == "adapter" and not is_hub_name(artifact.metrics["adapter"]["base"]):
            LOG.info("adapter/ is not uploaded: its base is a folder of this machine")
            continue
        path = artifact.folder / entry["path"]
        inside = [file for file in sorted(path.rglob("*")) if file.is_file()] if path.is_dir() else [path]
        for file in inside:
            place = file.relative_to(path if entry["path"] == "merged" else artifact.folder)
            files[str(place)] = file
    files.pop("dropped.jsonl", None)
    address = push_files(config.push_to_hub, files, "A model", repo_type="model", private=config.hub_private)
    LOG.info("pushed to %s", address)


if __name__ == "__main__":
    from alignkit.core.app import stage_main

    stage_main("export")
