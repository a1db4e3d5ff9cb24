"""Scoring with a reward model against TRL's `RewardTrainer.predict` and a plain loop: same weights, same scores.

    OMP_NUM_THREADS=1 python benchmarks/reward_scoring.py [--hh FILE.jsonl] [--prompts 200] [--answers 8]

`graded` is made up in the closed world: prompts with several answers each, as rejection sampling scores them. `hh-rlhf`
are that file's pairs of dialogues (without --hh, or where a pair is longer than 1,024 tokens, left out); the embedded
tokenizer spells their words. All run the embedded model with one adapter (random, so that it changes every layer) and
one value head, in float32 and in one process:

`loop` reads one conversation after the other. `trl` is RewardTrainer.predict with its defaults (batches of 8 pairs, in
file order) but for bfloat16, and `trl, batches of 32` the same with larger ones; both get token ids, and of graded rows
each answer once. `alignkit` is RewardModel.score, which begins with the messages and has to tokenise them, too.

Seconds are CPU seconds, the lowest of three runs.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

MAX_LENGTH, RUNS = 1024, 3
SMALL, LARGE = 8, 32
"""Pairs in a batch of TRL's."""

Rows = list[dict[str, Any]]


def main() -> None:
    """Print a table for each kind of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hh", type=Path, help="hh-rlhf as JSON Lines")
    parser.add_argument("--hh-pairs", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--answers", type=int, default=8, help="a prompt, an even number")
    arguments = parser.parse_args()
    reward_model = make_reward_model()
    compare(f"graded, {arguments.answers} answers a prompt", graded(arguments.prompts, arguments.answers), reward_model)
    if arguments.hh:
        compare("hh-rlhf", dialogues(arguments.hh, arguments.hh_pairs), reward_model)


def compare(title: str, rows: Rows, reward_model: Any) -> None:
    """Score the rows, two by two of one prompt, in every way."""
    from alignkit.data.chat import encode_conversation
    from alignkit.models.reward_model import read_conversation

    encoded = [encode_conversation(reward_model.tokenizer, read_conversation(row, 0)) for row in rows]
    short = [place for place in range(len(rows)) if max(len(encoded[place]), len(encoded[place ^ 1])) <= MAX_LENGTH]
    short = short[: len(short) // (2 * LARGE) * 2 * LARGE]  # of a last batch that is not full `predict` loses scores
    rows, ids = [rows[place] for place in short], [encoded[place] for place in short]
    classifier = as_classifier(reward_model)
    engines: dict[str, Callable[[], list[float]]] = {
        "loop": lambda: loop(classifier, ids),
        "trl": predictor(classifier, reward_model.tokenizer, ids, SMALL),
        f"trl, batches of {LARGE}": predictor(classifier, reward_model.tokenizer, ids, LARGE),
        "alignkit": lambda: [value * reward_model.scale + reward_model.offset for value in reward_model.score(rows)],
    }
    print(f"\n{title}: {len(ids)} conversations, {sum(map(len, ids)):,} tokens")
    print(f"{'':20s}{'CPU s':>8s}{'rows/s':>9s}{'x trl':>8s}{'x loop':>8s}{'largest difference':>20s}")
    scores = {name: engine() for name, engine in engines.items()}  # warm
    seconds = {name: min(timed(engine) for _ in range(RUNS)) for name, engine in engines.items()}
    for name, taken in seconds.items():
        apart = max(abs(a - b) for a, b in zip(scores[name], scores["loop"], strict=True))
        print(
            f"{name:20s}{taken:8.2f}{len(ids) / taken:9.0f}{seconds['trl'] / taken:8.2f}{seconds['loop'] / taken:8.2f}"
            f"{apart:20.1e}",
            flush=True,
        )


def timed(engine: Callable[[], list[float]]) -> float:
    """CPU seconds of one run."""
    before = time.process_time()
    engine()
    return time.process_time() - before


# -- rows: the two of a pair one after the other -----------------------------------------------------------------------


def graded(prompts: int, answers: int) -> Rows:
    """Questions about the closed world with right and wrong answers, no two alike."""
    from alignkit.data.closed_world import World, answer

    world, rows = World(1), Rows()
    for _ in range(prompts):
        passage = world.passage()
        question = world.ask(passage)
        texts = {answer(passage.facts, question): None}
        while len(texts) < answers:  # one mistake, or several
            mistakes = [world.corrupt(passage, question) for _ in range(world.rng.randint(1, 3))]
            texts[" ".join(mistakes)] = None
        prompt = f"{passage.statement}\n\n{question.text}"
        rows += [{"prompt": prompt, "completion": text} for text in [*texts][:answers]]
    return rows


def dialogues(path: Path, pairs: int) -> Rows:
    """Both dialogues of each pair."""
    from alignkit.core.config import RowsConfig
    from alignkit.data.sources import read_preferences

    found, _ = read_preferences(RowsConfig(path=str(path)))
    drawn = Random(0).sample(found, min(2 * pairs, len(found)))  # many will be too long
    return [{"prompt": pair.prompt, "completion": side} for pair in drawn for side in (pair.chosen, pair.rejected)]


# -- one model in two shapes -------------------------------------------------------------------------------------------


def make_reward_model() -> Any:
    """The embedded model with a random adapter and head."""
    import torch

    from alignkit.core.app import load_config
    from alignkit.core.config import LoraConfig
    from alignkit.models.loading import load_base, load_tokenizer, new_adapter
    from alignkit.models.reward_model import RewardModel
    from alignkit.models.value_head import ValueHeadModel

    model = load_config("reward", [f"model.max_length={MAX_LENGTH}"]).model
    torch.manual_seed(0)
    policy = new_adapter(load_base(model), LoraConfig(), model.lora_targets)
    for name, weight in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    return RewardModel(ValueHeadModel(policy.eval()), load_tokenizer(model), model)


def as_classifier(reward_model: Any) -> Any:
    """A sequence classifier of transformers around the very same layers, adapters and head."""
    import torch
    from transformers import AutoModelForSequenceClassification

    module = reward_model.module
    config = module.policy.config
    config.num_labels, config.pad_token_id = 1, reward_model.tokenizer.pad_token_id
    with torch.device("meta"):
        classifier: Any = AutoModelForSequenceClassification.from_config(config)
    classifier.model, classifier.score = module.backbone, module.value_head
    return classifier.eval()


def loop(classifier: Any, ids: Sequence[Sequence[int]]) -> list[float]:
    """One forward pass a conversation."""
    import torch

    with torch.inference_mode():
        return [float(classifier(input_ids=torch.tensor([each])).logits[0, 0]) for each in ids]


def predictor(classifier: Any, tokenizer: Any, ids: Sequence[Sequence[int]], batch: int) -> Callable[[], list[float]]:
    """TRL's trainer over pairs of rows, ready to predict."""
    import numpy as np
    from datasets import Dataset, disable_progress_bars
    from transformers.utils import logging
    from trl import RewardConfig, RewardTrainer

    logging.set_verbosity_error()
    disable_progress_bars()
    pairs = Dataset.from_dict({"chosen_ids": list(ids[::2]), "rejected_ids": list(ids[1::2])})
    arguments = RewardConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_eval_batch_size=batch,
        max_length=MAX_LENGTH,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = RewardTrainer(classifier, arguments, train_dataset=pairs, processing_class=tokenizer)

    def predict() -> list[float]:
        logits = np.asarray(trainer.predict(pairs).predictions).reshape(-1)
        scores, start = [0.0] * len(ids), 0
        for first in range(0, len(pairs), batch):  # a batch is its chosen rows, then its rejected ones
            size = min(batch, len(pairs) - first)
            for place in range(size):
                scores[2 * (first + place)] = float(logits[start + place])
                scores[2 * (first + place) + 1] = float(logits[start + size + place])
            start += 2 * size
        return scores

    return predict


if __name__ == "__main__":
    main()
