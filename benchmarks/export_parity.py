"""What each step of an export costs in fidelity, for an adapter trained over the embedded model in 4 bits.

    python benchmarks/export_parity.py

The reference of a merge is the 4-bit base with its adapter. That of a GGUF file is the merged float32 model, and the
file is read by transformers and, where it is installed, by llama.cpp. All predict the tokens of fixed texts and of
conversations about held-out questions (2,048 tokens at most), and continue 32 prompts greedily, by 24 tokens or up to
the end of turn.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alignkit.core.app import load_config
from alignkit.data.closed_world import World, answer

TRAIN, HELD_OUT, STEPS = 192, 32, 40


def main() -> None:
    """Train, merge in three ways, write and read every type, and print the table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder / "held_out.jsonl", HELD_OUT, seed=9)
        write_rows(folder / "train.jsonl", TRAIN, seed=1)
        adapter = train_adapter(folder)
        print(f"\n{'':28s} {'mean KL':>9s} {'log-prob':>9s} {'logit':>9s} {'greedy':>7s}")
        print(f"{'':28s} {'nats':>9s} {'mean diff':>9s} {'max diff':>9s} {'equal':>7s}")
        for label, figures in measure(folder, adapter):
            print(
                f"{label:28s} {figures['mean_kl']:9.1e} {figures['mean_log_prob_difference']:9.1e} "
                f"{figures['max_logit_difference']:9.1e} {figures['greedy_tokens_equal']:7.1%}",
                flush=True,
            )


def write_rows(path: Path, count: int, seed: int) -> None:
    """Questions about a closed world with their right answers."""
    world, rows = World(seed), []
    for number in range(count):
        passage = world.passage()
        question = world.ask(passage)
        row = {"id": f"q{number}", "instruction": passage.statement, "input": question.text}
        rows.append(row | {"output": answer(passage.facts, question)})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def train_adapter(folder: Path) -> str:
    """An adapter over the 4-bit base."""
    from alignkit.sft import run

    given = [f"data.path={folder / 'train.jsonl'}", f"output_dir={folder / 'sft'}", "model.quantization=nf4"]
    run(load_config("sft", [*given, f"train.max_steps={STEPS}", "train.learning_rate=2e-3"]))
    return str(folder / "sft/adapter")


def measure(folder: Path, adapter: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """A row of the table after the other."""
    import torch

    from alignkit.core.config import RowsConfig
    from alignkit.core.records import ChatExample
    from alignkit.data.sources import read_examples
    from alignkit.evaluation.parity import compare_file, compare_readings, questions, read
    from alignkit.models.gguf import write_gguf
    from alignkit.models.gguf_types import GGUFType
    from alignkit.models.loading import load_policy, load_tokenizer
    from alignkit.models.merging import merge_into_original, merge_into_trained_base, save_checkpoint

    model = load_config("export", ["model.quantization=nf4"]).model
    tokenizer = load_tokenizer(model)
    rows, _ = read_examples(RowsConfig(path=str(folder / "held_out.jsonl")))
    examples = [row for row in rows if isinstance(row, ChatExample)]
    asked = questions(tokenizer, examples, model.max_length)
    trained = read(load_policy(model, adapter), asked, tokenizer)

    def row(merged: Any) -> dict[str, Any]:
        return compare_readings("", GGUFType.f32, trained, read(merged, asked, tokenizer), asked)[1]

    merged = merge_into_trained_base(load_policy(model, adapter), adapter, torch.float32)
    yield "merged, dequantised base", row(merged)
    bfloat16 = merge_into_trained_base(load_policy(model, adapter), adapter, torch.bfloat16)
    yield "  the same in bfloat16", row(bfloat16)
    yield "merged, original base", row(merge_into_original(model, adapter, torch.float32))
    yield "merged, 4 bits again", row(load_policy(model, adapter).merge_and_unload())

    reference = read(merged, asked, tokenizer)
    save_checkpoint(merged, tokenizer, folder / "merged")
    for kind in GGUFType:
        path = folder / f"model-{kind.name}.gguf"
        write_gguf(folder / "merged", tokenizer, path, kind, "tiny")
        _, figures = compare_file(path, kind, tokenizer, asked, reference, torch.float32)
        yield f"GGUF {kind.value}, transformers", figures
        others = {name.removeprefix("llama_cpp_"): figures[name] for name in figures if name.startswith("llama_cpp_")}
        if others:
            yield f"GGUF {kind.value}, llama.cpp", others


if __name__ == "__main__":
    main()
