"""Scoring with a reward model against TRL's `RewardTrainer.predict` and a plain loop: same weights, same scores.

    OMP_NUM_THREADS=1 python benchmarks/reward_scoring.py [--hh FILE.jsonl] [--prompts 64] [--answers 8]

`sampled` is what rejection sampling scores: questions about the closed world with several answers each, drawn as a
policy draws them that is right in 60 % of cases, so that some are equal. In `distinct` no two answers to a question
are. Without --hh there are no dialogues of `hh-rlhf`; the embedded tokenizer spells their words, and pairs above 1,024
tokens are left out. All engines run the embedded model with one adapter (random, so that it changes every layer) and
one value head, in float32 and in one process:

`loop` reads one conversation after the other. `trl` is RewardTrainer.predict with its defaults (batches of 8 pairs, in
file order) but for bfloat16, and `trl, batches of 32` the same with larger ones. `alignkit` is RewardModel.score.

Seconds are CPU seconds, the lowest of three runs: `passes` from token ids to scores, `in all` from messages to scores,
with the tokenising that each of them does. A chat template that ends with the end-of-turn token lets all read the same.
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

RIGHT = 0.6
"""Share of the sampled answers that is right."""

Rows = list[dict[str, Any]]
Work = Callable[[], Any]


def main() -> None:
    """Print a table for each kind of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hh", type=Path, help="hh-rlhf as JSON Lines")
    parser.add_argument("--hh-pairs", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--answers", type=int, default=8, help="a prompt, an even number")
    arguments = parser.parse_args()
    reward_model = make_reward_model()
    for kind in ("sampled", "distinct"):
        rows = graded(arguments.prompts, arguments.answers, distinct=kind == "distinct")
        compare(f"{kind}, {arguments.answers} answers a prompt", rows, reward_model)
    if arguments.hh:
        compare("hh-rlhf", dialogues(arguments.hh, arguments.hh_pairs), reward_model)


def compare(title: str, rows: Rows, reward_model: Any) -> None:
    """Score the rows, two by two of one prompt, in every way."""
    from alignkit.data.chat import encode_conversation
    from alignkit.models.conversations import group_by_prompt, read_conversation

    tokenizer, read = reward_model.tokenizer, read_conversation
    lengths = [len(encode_conversation(tokenizer, read(row, 0))) for row in rows]
    short = [place for place in range(len(rows)) if max(lengths[place], lengths[place ^ 1]) <= MAX_LENGTH]
    short = short[: len(short) // (2 * LARGE) * 2 * LARGE]  # of a last batch that is not full `predict` loses scores
    rows = [rows[place] for place in short]
    conversations = [read(row, 0) for row in rows]
    ids = [encode_conversation(tokenizer, conversation) for conversation in conversations]
    groups, _, _ = group_by_prompt(tokenizer, conversations, MAX_LENGTH)
    classifier = as_classifier(reward_model)
    predict, prepare = {}, {}
    for size in (SMALL, LARGE):
        predict[size], prepare[size] = predictor(classifier, tokenizer, conversations, size)

    def tokenise() -> None:
        for conversation in conversations:
            encode_conversation(tokenizer, conversation)

    def score() -> list[float]:
        return [value * reward_model.scale + reward_model.offset for value in reward_model.score(rows)]

    engines: dict[str, tuple[Work, Work, Work]] = {  # scores, and what its passes and its tokenising are
        "loop": (lambda: loop(classifier, ids), lambda: loop(classifier, ids), tokenise),
        "trl": (predict[SMALL], predict[SMALL], prepare[SMALL]),
        f"trl, batches of {LARGE}": (predict[LARGE], predict[LARGE], prepare[LARGE]),
        "alignkit": (
            score,
            lambda: reward_model.raw_scores(groups),
            lambda: group_by_prompt(tokenizer, conversations, MAX_LENGTH),
        ),
    }
    distinct = len({str(each) for each in ids})
    print(f"\n{title}: {len(ids)} conversations, {distinct} distinct, {sum(map(len, ids)):,} tokens")
    print(
        f"{'':20s}{'passes':>8s}{'in all':>8s}{'x trl':>8s}{'x trl':>8s}{'x loop':>8s}{'difference':>12s}", flush=True
    )
    expected: list[float] = []
    first: tuple[float, float] | None = None
    slowest = 0.0
    for name, (scores, passes, tokenising) in engines.items():
        found = scores()  # warm
        expected = expected or found
        apart = max(abs(a - b) for a, b in zip(found, expected, strict=True))
        taken = timed(passes)
        whole = taken + timed(tokenising)
        slowest = slowest or whole
        if name == "trl":
            first = taken, whole
        ratios = f"{first[0] / taken:8.2f}{first[1] / whole:8.2f}" if first else f"{'':16s}"
        print(f"{name:20s}{taken:8.2f}{whole:8.2f}{ratios}{slowest / whole:8.2f}{apart:12.1e}", flush=True)


def timed(work: Work) -> float:
    """CPU seconds of the fastest run."""
    found = []
    for _ in range(RUNS):
        before = time.process_time()
        work()
        found.append(time.process_time() - before)
    return min(found)


# -- rows: the two of a pair one after the other -----------------------------------------------------------------------


def graded(prompts: int, answers: int, *, distinct: bool) -> Rows:
    """Questions about the closed world with right and wrong answers."""
    from alignkit.data.closed_world import World, answer

    world, rows = World(1), Rows()
    for _ in range(prompts):
        passage = world.passage()
        question = world.ask(passage)
        texts: list[str] = []
        while len(texts) < answers:
            right = world.rng.random() < RIGHT
            text = answer(passage.facts, question) if right else world.corrupt(passage, question)
            while distinct and text in texts:  # with one more mistake
                text = f"{text} {world.corrupt(passage, question)}"
            texts.append(text)
        prompt = f"{passage.statement}\n\n{question.text}"
        rows += [{"prompt": prompt, "completion": text} for text in texts]
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


def predictor(classifier: Any, tokenizer: Any, conversations: Sequence[Any], batch: int) -> tuple[Work, Work]:
    """TRL's trainer over pairs of conversations: the function that predicts, and the one that makes it ready to."""
    import copy

    import numpy as np
    from datasets import Dataset, disable_caching, disable_progress_bars
    from transformers.utils import logging
    from trl import RewardConfig, RewardTrainer

    from alignkit.data.chat import template_up_to_the_end

    logging.set_verbosity_error()
    disable_progress_bars()
    disable_caching()
    names = copy.deepcopy(tokenizer)
    names.chat_template = template_up_to_the_end(tokenizer)
    plain = [[turn.model_dump() for turn in conversation] for conversation in conversations]
    rows = Dataset.from_dict({"chosen": plain[::2], "rejected": plain[1::2]})
    arguments = RewardConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_eval_batch_size=batch,
        max_length=MAX_LENGTH,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = RewardTrainer(classifier, arguments, train_dataset=rows, processing_class=names)
    pairs: Any = trainer.train_dataset

    def prepare() -> None:
        trainer._prepare_dataset(rows, names, arguments, "eval")

    def predict() -> list[float]:
        logits = np.asarray(trainer.predict(pairs).predictions).reshape(-1)
        scores, start = [0.0] * 2 * len(pairs), 0
        for first in range(0, len(pairs), batch):  # a batch is its chosen rows, then its rejected ones
            for place in range(batch):
                scores[2 * (first + place)] = float(logits[start + place])
                scores[2 * (first + place) + 1] = float(logits[start + batch + place])
            start += 2 * batch
        return scores

    return predict, prepare


if __name__ == "__main__":
    main()
