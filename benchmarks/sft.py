"""Supervised fine-tuning against TRL's `trl sft` with its defaults: the same rows, adapter, learning rate and epochs.

    OMP_NUM_THREADS=1 python benchmarks/sft.py [--data FILE.jsonl ...] [--models tiny,random]

Without --data the rows are made up in the closed world. Rows that are longer than 1,024 tokens, TRL's default, are left
out for both, and a tenth is held out. Each training has a process of its own, so that its peak memory can be told.
`trl` is SFTTrainer with everything as `trl sft` leaves it (batches of 8 in random order, gradient checkpointing, bf16
autocast), but for the adapter, the learning rate and the epochs, which are the same for all; `trl, float32` is without
autocast, `trl, no checkpointing` with it. `alignkit` is `alignkit sft` with its defaults but for the schedule, which is
TRL's. `random` is a model of 60 million parameters with random weights, which alignkit holds in bfloat16.

tokens/s counts tokens that are no padding, by CPU seconds of the training loop. The held-out loss is computed by one
function for all.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MAX_LENGTH, BATCH, EPOCHS, LEARNING_RATE = 1024, 8, 1, 5e-4
ENGINES = ("trl", "trl, float32", "trl, no checkpointing", "alignkit", "alignkit, float32", "alignkit, packing")
MODELS = {"tiny": "float32", "random": "bfloat16"}
"""Each with the dtype that alignkit holds it in; `trl sft` holds both in float32, under bfloat16 autocast."""
MADE_UP_ROWS = 600


def main() -> None:
    """Train with every engine and print a table for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", help="files that `alignkit sft` reads")
    parser.add_argument("--limit", type=int, help="rows of each file")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--engines", default=";".join(ENGINES))
    parser.add_argument("--train", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train:
        train(*arguments.train)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for model in arguments.models.split(","):
            path = make_model(model, folder / model)
            rows, held_out = encode(read(arguments.data, arguments.limit), path)
            (folder / "rows.json").write_text(json.dumps([rows, held_out]), encoding="utf-8")
            compare(model, path, folder, arguments.engines.split(";"))


def compare(model: str, path: Path, folder: Path, engines: Sequence[str]) -> None:
    """One row of the table for each engine."""
    rows, held_out = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
    tokens = EPOCHS * sum(len(row["ids"]) for row in rows)
    print(f"\n{model}: {len(rows)} rows, {tokens:,} tokens, {len(held_out)} rows held out")
    print(f"{'':24s}{'CPU s':>8s}{'tokens/s':>10s}{'x trl':>7s}{'peak MiB':>10s}{'held-out loss':>15s}", flush=True)
    first: float | None = None
    for engine in engines:
        command = [sys.executable, __file__, "--train", engine, str(path), str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr)
        found = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        speed = tokens / found["seconds"]
        first = first or speed
        print(
            f"{engine:24s}{found['seconds']:8.1f}{speed:10.0f}{speed / first:7.2f}{found['peak_mib']:10.0f}"
            f"{found['loss']:15.4f}",
            flush=True,
        )


# -- data and models ---------------------------------------------------------------------------------------------------


def read(files: Sequence[Path] | None, limit: int | None) -> list[Any]:
    """Examples of the files, or made-up ones."""
    from alignkit.core.config import RowsConfig
    from alignkit.core.records import ChatExample, Message, QAExample
    from alignkit.data.chat import qa_prompt
    from alignkit.data.closed_world import World, answer
    from alignkit.data.sources import read_examples

    if files:
        return [example for file in files for example in read_examples(RowsConfig(path=str(file), limit=limit))[0]]
    world, made_up = World(1), []
    for number in range(limit or MADE_UP_ROWS):
        passage = world.passage()
        question = world.ask(passage)
        row = QAExample(id=str(number), instruction=passage.statement, input=question.text)
        right = Message(role="assistant", content=answer(passage.facts, question))
        made_up.append(ChatExample(id=row.id, prompt=qa_prompt(row), completion=[right]))
    return made_up


def make_model(name: str, folder: Path) -> Path:
    """The folder of the embedded model, or of a random one with the same tokenizer."""
    from alignkit.models.loading import embedded_model_dir

    if name == "tiny":
        return embedded_model_dir()
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(embedded_model_dir())
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=640,
        intermediate_size=1728,
        num_hidden_layers=12,
        num_attention_heads=10,
        num_key_value_heads=10,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def encode(examples: Sequence[Any], path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows that fit, as messages and as our token ids and labels; every tenth is held out."""
    from transformers import AutoTokenizer

    from alignkit.data.chat import EncodedExample, encode_example

    tokenizer = AutoTokenizer.from_pretrained(path)
    rows = []
    for example in examples:
        row = encode_example(tokenizer, example.prompt, example.completion, MAX_LENGTH)
        if isinstance(row, EncodedExample):
            prompt, completion = (
                [turn.model_dump() for turn in turns] for turns in (example.prompt, example.completion)
            )
            rows.append({"prompt": prompt, "completion": completion, "ids": row.input_ids, "labels": row.labels})
    held_out = rows[::10]
    return [row for number, row in enumerate(rows) if number % 10], held_out


# -- one training, in a process of its own -----------------------------------------------------------------------------


def train(engine: str, path: str, name: str) -> None:
    """Train with one engine and write seconds, peak memory and held-out loss to result.json."""
    from transformers import AutoTokenizer

    from alignkit.core.config import LoraConfig, ModelConfig
    from alignkit.models.loading import load_base, new_adapter

    logging.getLogger("alignkit").setLevel(logging.WARNING)
    folder = Path(name)
    rows, held_out = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
    import torch

    kind = "tiny" if path.endswith("weights") else "random"
    dtype = MODELS[kind] if engine in ("alignkit", "alignkit, packing") else "float32"
    base = load_base(ModelConfig(name=kind, path=path, dtype=dtype, max_length=MAX_LENGTH))
    torch.manual_seed(1)
    policy = new_adapter(base, LoraConfig(), ["all-linear"])
    tokenizer = AutoTokenizer.from_pretrained(path)
    run = train_with_alignkit if engine.startswith("alignkit") else train_with_trl
    seconds = run(engine, policy, tokenizer, rows, folder)
    peak = peak_mebibytes()
    result = {"seconds": seconds, "peak_mib": peak, "loss": held_out_loss(policy, held_out)}
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


def train_with_trl(engine: str, policy: Any, tokenizer: Any, rows: list[dict[str, Any]], folder: Path) -> float:
    """CPU seconds of TRL's trainer."""
    import datasets
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    options: dict[str, Any] = {}
    if engine == "trl, float32":
        options["bf16"] = False
    if engine == "trl, no checkpointing":
        options["gradient_checkpointing"] = False
    arguments = SFTConfig(
        output_dir=str(folder / "trl"),
        learning_rate=LEARNING_RATE,
        num_train_epochs=EPOCHS,
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        **options,
    )
    assert arguments.max_length == MAX_LENGTH and arguments.per_device_train_batch_size == BATCH
    data = Dataset.from_list([{"prompt": row["prompt"], "completion": row["completion"]} for row in rows])
    trainer = SFTTrainer(model=policy, args=arguments, train_dataset=data, processing_class=tokenizer)
    began = time.process_time()
    trainer.train()
    return time.process_time() - began


def train_with_alignkit(engine: str, policy: Any, tokenizer: Any, rows: list[dict[str, Any]], folder: Path) -> float:
    """CPU seconds of our training, with the defaults of `sft` but for the schedule, which is TRL's."""
    from alignkit.core.artifact import Artifact
    from alignkit.core.config import ModelConfig, RowsConfig, Tracker, TrainConfig
    from alignkit.data.chat import EncodedExample
    from alignkit.sft import SFTConfig
    from alignkit.training.supervised import train_supervised

    packing = engine == "alignkit, packing"
    tokens = sum(len(row["ids"]) for row in rows)
    sequences = max(1, round(BATCH * tokens / len(rows) / MAX_LENGTH))  # so that it makes as many optimizer steps
    config = TrainConfig(
        learning_rate=LEARNING_RATE,
        epochs=EPOCHS,
        batch_size=1 if packing else BATCH,
        gradient_accumulation=sequences if packing else 1,
        packing=packing,
        scheduler="linear",
        warmup_share=0.0,
        tracker=Tracker.none,
    )
    encoded = [EncodedExample(row["ids"], row["labels"]) for row in rows]
    stage = SFTConfig(
        name="sft",
        output_dir=str(folder / engine.replace(", ", "-")),
        data=RowsConfig(path=str(folder / "rows.json")),
        model=ModelConfig(name="benchmark", path=policy.get_base_model().name_or_path),
    )
    with Artifact.open("sft", stage) as artifact:
        began = time.process_time()
        train_supervised(policy, tokenizer, encoded, config, 1, artifact, max_length=MAX_LENGTH)
        return time.process_time() - began


def held_out_loss(policy: Any, rows: Sequence[dict[str, Any]]) -> float:
    """Mean loss a learned token, row by row."""
    import torch

    policy.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for row in rows:
            ids, labels = torch.tensor([row["ids"]]), torch.tensor([row["labels"]])
            learned = int((labels[:, 1:] != -100).sum())
            total += float(policy(input_ids=ids, labels=labels).loss) * learned
            count += learned
    return total / count


def peak_mebibytes() -> float:
    """Highest resident memory of this process."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**10


if __name__ == "__main__":
    main()
