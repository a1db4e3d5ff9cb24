"""DPO with the reference's log-probabilities from the store, against a reference that runs along at every step.

    OMP_NUM_THREADS=1 python benchmarks/dpo.py [--pairs 300] [--epochs 1] [--models tiny,random]

Pairs are made up in the closed world: the right answer against a wrong one. Three jobs of one configuration follow each
other, as in a sweep, in one process: `runs along` has no store, `fills the store` is the first job with one, `finds it
filled` the second. They train on the same batches in the same order, so that their losses can be compared line by line.
`random` is a model of 60 million parameters with random weights, in bfloat16.

Seconds are CPU seconds: of filling the store, of the training loop, of the stage as a whole with loading and checks.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import logging
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

JOBS = ("runs along", "fills the store", "finds it filled")
DTYPES = {"tiny": "float32", "random": "bfloat16"}


def main() -> None:
    """Run the three jobs with each model and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=300)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--models", default="tiny")
    arguments = parser.parse_args()
    logging.getLogger("alignkit").setLevel(logging.WARNING)
    for model in arguments.models.split(","):
        with tempfile.TemporaryDirectory() as name:
            compare(model, arguments.pairs, arguments.epochs, Path(name))


def compare(name: str, pairs: int, epochs: float, folder: Path) -> None:
    """One row of the table for each job."""
    from sft import make_model  # the models of the other benchmark

    from alignkit import dpo
    from alignkit.core.config import ModelConfig, RowsConfig, TrainConfig

    write_pairs(pairs, folder / "pairs.jsonl")
    model = ModelConfig(name=name, path=str(make_model(name, folder / "base")), dtype=DTYPES[name])
    config = dpo.DPOConfig(
        name="dpo",
        data=RowsConfig(path=str(folder / "pairs.jsonl")),
        init_adapter=write_adapter(model, folder / "sft"),
        model=model,
        train=TrainConfig(learning_rate=1e-4, epochs=epochs, logging_steps=1),
    )
    print(f"\n{name} in {model.dtype}: {pairs} pairs, {epochs:g} epoch(s)")
    print(
        f"{'':18s}{'fill s':>8s}{'train s':>9s}{'stage s':>9s}{'x train':>9s}{'x fill + train':>16s}{'computed':>10s}",
        end="",
    )
    print(f"{'largest loss difference':>26s}", flush=True)
    first: tuple[float, list[float]] | None = None
    for job in JOBS:
        store = None if job == "runs along" else str(folder / "reference.sqlite")
        job_config = replace(config, output_dir=str(folder / job), reference_store=store)
        fill, train, stage, artifact = timed(partial(dpo.run, job_config))
        lines = [json.loads(line)["loss"] for line in (artifact.folder / "loss.jsonl").read_text().splitlines()]
        first = first or (train, lines)
        computed = artifact.metrics.get("reference_log_probs", {}).get("computed", "")
        difference = max(abs(ours - theirs) for ours, theirs in zip(lines, first[1], strict=True))
        print(
            f"{job:18s}{fill:8.1f}{train:9.1f}{stage:9.1f}{first[0] / train:9.2f}{first[0] / (fill + train):16.2f}"
            f"{computed!s:>10s}{difference:26.1e}",
            flush=True,
        )


def timed(run: Callable[[], Any]) -> tuple[float, float, float, Any]:
    """CPU seconds of the store and of the training loop of a run, and of the whole of it; and what it returns."""
    from alignkit.training import preference

    spent = {"reference_log_probs": 0.0, "fit": 0.0}
    originals = {name: getattr(preference, name) for name in spent}

    def clocked(name: str) -> Callable[..., Any]:
        def call(*args: Any, **keywords: Any) -> Any:
            began = time.process_time()
            try:
                return originals[name](*args, **keywords)
            finally:
                spent[name] += time.process_time() - began

        return call

    for name in spent:
        setattr(preference, name, clocked(name))
    began = time.process_time()
    try:
        done = run()
    finally:
        for name, original in originals.items():
            setattr(preference, name, original)
    return spent["reference_log_probs"], spent["fit"], time.process_time() - began, done


def write_pairs(count: int, path: Path) -> None:
    """Questions of the closed world, each with its right answer and that to another question."""
    from alignkit.core.records import Message, PreferencePair, QAExample
    from alignkit.data.chat import qa_prompt
    from alignkit.data.closed_world import World, answer

    world, wrong = World(1), "I do not know."
    rows: list[str] = []
    while len(rows) < count:
        passage = world.passage()
        question = world.ask(passage)
        right = answer(passage.facts, question)
        if right == wrong:
            continue
        row = QAExample(id=str(len(rows)), instruction=passage.statement, input=question.text)
        sides = [[Message(role="assistant", content=text)] for text in (right, wrong)]
        pair = PreferencePair(id=row.id, prompt=qa_prompt(row), chosen=sides[0], rejected=sides[1])
        rows.append(pair.model_dump_json(exclude_none=True))
        wrong = right
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")


def write_adapter(model: Any, folder: Path) -> str:
    """A new adapter, as a policy to start from."""
    import torch

    from alignkit.core.config import LoraConfig
    from alignkit.models.loading import load_base, new_adapter, save_adapter

    torch.manual_seed(1)
    policy = new_adapter(load_base(model), LoraConfig(), ["all-linear"])
    save_adapter(policy, folder, model)
    return str(folder)


if __name__ == "__main__":
    main()
