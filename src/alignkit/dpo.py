"""dpo: direct preference optimisation. Raise chosen answers over rejected ones, relative to a reference model.

The reference is named, not implied: `sft_adapter` is a frozen copy of init_adapter, `base` the model without an
adapter, anything else the folder of an adapter. Before the first step it is checked that a policy equal to the
reference has loss ln 2 and rewards 0. What the reference says of a pair is computed once and kept (reference_store). An
interrupted run continues with the same command from its last checkpoint. docs/dpo.md says what to choose, and what the
log lines mean.

Reads:   data.path: preference pairs (prompt, chosen, rejected; or hh-rlhf)
         init_adapter: the adapter that is trained further
Writes:  adapter/, loss.jsonl, dropped.jsonl with the reason for each pair that was not used
         reference_store: log-probabilities, shared by the runs and sweeps of runs/<run>

Overrides people use:
  data.path=pairs.jsonl                    other pairs
  init_adapter=runs/demo/sft/adapter       where the policy starts
  reference=base                           what it is compared with
  beta=0.2 train.learning_rate=5e-6        how far and how fast it may move
  loss=ipo                                 another loss of TRL's: robust, hinge, apo_zero, nca_pair, ...
  sft_weight=0.1                           also keep chosen answers likely
  held_out_share=0.1                       measure on pairs that are not trained on
  kl_samples=100                           estimate how far the policy has moved, from its own answers

Examples:
  python -m alignkit.dpo +model=tiny run=demo
  python -m alignkit.dpo +model=qwen7b hardware=rtx4090_24gb init_adapter=runs/default/sft/adapter
  python -m alignkit.dpo -m +model=tiny run=demo held_out_share=0.1 beta=0.05,0.1,0.3
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Optional

from omegaconf import MISSING

from alignkit.core.artifact import Artifact
from alignkit.core.config import DistributedConfig, HardwareConfig, ModelConfig, RowsConfig, StageConfig, TrainConfig
from alignkit.core.errors import UserError
from alignkit.core.ranks import world_size
from alignkit.core.records import PreferencePair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from alignkit.training.preference import EncodedPair, Trained, Watch
    from alignkit.training.preference_losses import Objective


@dataclass
class DPOConfig(StageConfig):
    """Which pairs, from which policy, against which reference, and how."""

    inputs: ClassVar[tuple[str, ...]] = ("data.path", "init_adapter", "reference", "model.path")
    incidental: ClassVar[tuple[str, ...]] = (*StageConfig.incidental, "reference_store", "max_chosen_fall")

    data: RowsConfig = field(default_factory=RowsConfig)
    init_adapter: str = MISSING
    """The adapter that is trained further."""
    reference: str = "sft_adapter"
    """`sft_adapter` (a frozen copy of init_adapter), `base`, or the folder of an adapter."""
    beta: float = 0.1
    """How strongly the policy is held to the reference; larger holds harder."""
    loss: str = "sigmoid"
    """Which preference loss, by TRL's name: sigmoid (DPO), ipo, hinge, robust, apo_zero, ...: see docs/dpo.md."""
    label_smoothing: float = 0.0
    """Share of the pairs whose preference is taken to be the wrong way round (robust, exo_pair, aot, aot_unpaired)."""
    sft_weight: float = 0.0
    """Weight of an additional likelihood loss on chosen answers."""
    held_out_share: float = 0.0
    """Hold out the pairs of this share of the prompts, and measure after training how many are ranked right."""
    kl_samples: int = 0
    """Sample so many answers before and after training, and estimate the policy's divergence from the reference."""
    max_chosen_fall: Optional[float] = 2.0  # noqa: UP045
    """Stop when chosen answers are this many nats a token less likely than under the reference; null: never."""
    reference_store: Optional[str] = None  # noqa: UP045
    """Where the reference's log-probabilities are kept, so that they are computed once; null: anew at every step."""
    resume: bool = False
    """Continue an interrupted run of exactly this configuration; an error when there is none."""
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)


def run(config: DPOConfig) -> Artifact:
    """Read and encode the pairs; check the reference; train the adapter on them; save it."""
    objective = _objective(config)
    artifact = Artifact.open("dpo", config)

    from alignkit.training.checkpoints import require_checkpoint

    if config.resume:
        require_checkpoint(artifact)
    with artifact:
        if artifact.up_to_date:
            return artifact
        from alignkit.models.headroom import require_memory
        from alignkit.models.jobs import Job
        from alignkit.models.loading import check_adapter, load_policy, load_tokenizer, save_adapter
        from alignkit.training.arguments import refuse_what_only_sft_has
        from alignkit.training.distributed import require_possible
        from alignkit.training.preference import train_preference
        from alignkit.training.tracking import require_tracker

        refuse_what_only_sft_has(config.train)
        require_tracker(config.train.tracker)
        require_possible("dpo", config.model, config.train, config.distributed)
        if config.reference not in ("sft_adapter", "base"):
            check_adapter(config.reference, config.model)
        tokenizer = load_tokenizer(config.model)
        pairs, held_out = _encode(config, tokenizer, artifact)
        job = Job("dpo", config.model, max(map(len, pairs)), train=config.train, adapter=config.init_adapter)
        job = replace(job, reference=config.reference, sequences_per_row=2, processes=world_size())
        require_memory(job, config.hardware, artifact)

        policy = load_policy(config.model, config.init_adapter, trainable=True)
        trained = train_preference(
            policy,
            tokenizer,
            pairs,
            objective,
            config.train,
            config.seed,
            artifact,
            store=Path(config.reference_store) if config.reference_store else None,
            watch=_watch(config, pairs, held_out),
        )
        if not artifact.writes:
            return artifact

        with artifact.output("adapter") as folder:
            save_adapter(policy, folder, config.model)
        artifact.write_rows("loss.jsonl", trained.losses)
        artifact.metrics.update(pairs=len(pairs))
        if held_out:
            artifact.metrics["held_out"] = _ranked_right(trained.held_out_margins, [each.prompt for each in held_out])
        if config.kl_samples:
            artifact.metrics["sampled"] = _divergence(trained)
        accuracy = artifact.metrics["reward_accuracy"]
        artifact.summary = f"{len(pairs)} pairs, {accuracy:.0%} ranked right after training"
    return artifact


def _objective(config: DPOConfig) -> Objective:
    """What is optimised. Raises `UserError` for settings that mean nothing, before anything big is loaded."""
    from alignkit.training.preference_losses import Objective

    if not 0 <= config.held_out_share < 1:
        raise UserError(f"held_out_share={config.held_out_share}: must be at least 0 and below 1")
    if config.kl_samples < 0:
        raise UserError(f"kl_samples={config.kl_samples}: must be 0 or more")
    if config.max_chosen_fall is not None and config.max_chosen_fall <= 0:
        raise UserError(f"max_chosen_fall={config.max_chosen_fall}: must be above 0, or null to never stop")
    return Objective(config.reference, config.beta, config.sft_weight, config.loss, config.label_smoothing)


class _HeldOut(NamedTuple):
    """A held-out pair, and its prompt, which it may share with others."""

    pair: EncodedPair
    prompt: str


def _watch(config: DPOConfig, pairs: Sequence[EncodedPair], held_out: Sequence[_HeldOut]) -> Watch:
    """What is measured besides; answers are sampled to the first prompts, held-out ones before those trained on."""
    from alignkit.training.preference import Watch

    held_out_pairs = [each.pair for each in held_out]
    prompts = dict.fromkeys(tuple(pair.prompt_ids) for pair in [*held_out_pairs, *pairs])
    sampled = list(map(list, prompts))[: config.kl_samples]
    return Watch(held_out_pairs, config.max_chosen_fall, sampled)


def _divergence(trained: Trained) -> dict[str, Any]:
    """KL(policy || reference) in nats an answer, and how long sampled answers were before and are now, in tokens."""
    from alignkit.evaluation.statistics import bootstrap_mean

    before, after = trained.sampled_tokens
    return {
        "kl_to_reference": bootstrap_mean(trained.sampled_log_ratios),
        "tokens_before": bootstrap_mean(before),
        "tokens_after": bootstrap_mean(after),
    }


def _ranked_right(margins: Sequence[float], prompts: Sequence[str]) -> dict[str, Any]:
    """How many held-out pairs have a margin above 0, and the mean margin; pairs of a prompt are not independent."""
    from alignkit.evaluation.statistics import bootstrap_mean, proportion

    right = [float(margin > 0) for margin in margins]
    return {"accuracy": proportion(right, prompts), "margin": bootstrap_mean(margins, prompts)}


def _encode(
    config: DPOConfig, tokenizer: PreTrainedTokenizerBase, artifact: Artifact
) -> tuple[list[EncodedPair], list[_HeldOut]]:
    """Pairs to train on and pairs held out, as token ids; those that cannot be used are dropped with a reason."""
    from alignkit.data.sources import read_preferences
    from alignkit.training.held_out import prompt_key, split_by_prompt

    pairs, unusable = read_preferences(config.data)
    artifact.drop_all(unusable)
    sides: list[list[_HeldOut]] = []
    for side in split_by_prompt(pairs, config.held_out_share, config.seed):
        encoded = [(pair, _encode_pair(tokenizer, pair, config.model.max_length)) for pair in side]
        for pair, row in encoded:
            if isinstance(row, str):
                artifact.drop(pair, row)
        sides.append([_HeldOut(row, prompt_key(pair)) for pair, row in encoded if not isinstance(row, str)])
        if not sides[-1] and (side or not pairs):
            raise UserError(f"{config.data.path}: no pair can be used; dropped.jsonl says why")
    return [each.pair for each in sides[0]], sides[1]


def _encode_pair(tokenizer: PreTrainedTokenizerBase, pair: PreferencePair, max_length: int) -> EncodedPair | str:
    """A pair as token ids, or the reason to drop it."""
    from alignkit.data.chat import IGNORED, encode_example
    from alignkit.training.preference import EncodedPair

    chosen = encode_example(tokenizer, pair.prompt, pair.chosen, max_length)
    rejected = encode_example(tokenizer, pair.prompt, pair.rejected, max_length)
    if isinstance(chosen, str):
        return f"chosen: {chosen}"
    if isinstance(rejected, str):
        return f"rejected: {rejected}"
    if chosen == rejected:
        return "chosen and rejected are the same tokens"
    prompt = chosen.labels.count(IGNORED)
    return EncodedPair(chosen.input_ids[:prompt], chosen.input_ids[prompt:], rejected.input_ids[prompt:])


if __name__ == "__main__":
    from alignkit.core.app import stage_main

    stage_main("dpo")
