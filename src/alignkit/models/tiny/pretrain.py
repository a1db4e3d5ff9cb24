"""Pre-train the embedded base model from nothing: `python -m alignkit.models.tiny.pretrain --output DIR`.

Plain PyTorch: Muon for the matrices of the layers, AdamW for embeddings and norms, linear warm-up, constant, linear
decay to zero. A run writes its ability on a development split as it goes and can be interrupted: the same
command continues from the last checkpoint. `--scaled` trains a larger model for those who have hours.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from alignkit.data.closed_world import World, answer
from alignkit.models.tiny.base_text import Document, documents, drilled_documents
from alignkit.models.tiny.tokenizer import build_tokenizer

if TYPE_CHECKING:
    from transformers import Qwen2ForCausalLM, Qwen2Tokenizer


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, besides the world's grammar."""

    layers: int = 6
    hidden: int = 128
    steps: int = 3600
    easy_steps: int = 400
    """At first passages of two facts, nearly all about one entity; ..."""
    mixed_steps: int = 1800
    """... until here `mixed_hard_share` of the passages about two entities that share a relation; ..."""
    decay_steps: int = 1000
    batch_documents: int = 32
    learning_rate: float = 2e-3
    warmup: int = 100
    seed: int = 1
    mixed_hard_share: float = 0.4
    hard_share: float = 0.8
    """... and then this share, because telling two entities apart is learnt last."""
    check_share: float = 0.6
    reasoned_steps: int = 1200
    """A second cycle, in which verdicts on a line of their own give the right answer first."""
    reasoned_decay_steps: int = 800
    reasoned_hard_share: float = 0.3
    drilled_steps: int = 800
    """A third cycle: first with many drills, ..."""
    recited_steps: int = 800
    """... then with many recitals."""
    recited_decay_steps: int = 400
    recited_hard_share: float = 0.5

    @property
    def cycles(self) -> tuple[tuple[int, int], ...]:
        """The step at which each cycle ends, and over how many steps its rate decays before."""
        reasoned = self.steps + self.reasoned_steps
        recited = reasoned + self.drilled_steps + self.recited_steps
        return (
            (self.steps, self.decay_steps),
            (reasoned, self.reasoned_decay_steps),
            (recited, self.recited_decay_steps),
        )

    @property
    def all_steps(self) -> int:
        """Steps of all cycles."""
        return self.cycles[-1][0]


SCALED = Recipe(layers=12, hidden=256, steps=20_000, easy_steps=2000, mixed_steps=8000, decay_steps=6000)


def build_model(recipe: Recipe, tokenizer: Qwen2Tokenizer) -> Qwen2ForCausalLM:
    """A randomly initialised Qwen2 of the recipe's size, the same for the same seed."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(recipe.seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        intermediate_size=3 * recipe.hidden,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.hidden // 32,
        num_key_value_heads=recipe.hidden // 32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    return Qwen2ForCausalLM(config)


def learning_rate_factor(step: int, recipe: Recipe) -> float:
    """In each cycle warm-up, plateau, linear decay to zero (the trapezoid of WSD schedules)."""
    begin = 0
    for end, decay in recipe.cycles:
        if step < end:
            return min(1.0, (step - begin + 1) / recipe.warmup) * min(1.0, (end - step) / decay)
        begin = end
    return 0.0


def encode(document: Document, tokenizer: Qwen2Tokenizer) -> list[tuple[list[int], float]]:
    """The token ids of a document's pieces, each piece with the loss weight of its tokens."""
    encoded = tokenizer([text for text, _ in document.pieces])["input_ids"]
    return [(ids, weight) for ids, (_, weight) in zip(encoded, document.pieces, strict=True)]


def collate(batch: list[list[tuple[list[int], float]]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids `[documents, tokens]` and loss weights of the same shape; padding weighs nothing."""
    rows = [[(id, weight) for ids, weight in pieces for id in ids] for pieces in batch]
    longest = max(map(len, rows))
    padded = [row + [(pad, 0.0)] * (longest - len(row)) for row in rows]
    return torch.tensor([[id for id, _ in row] for row in padded]), torch.tensor(
        [[w for _, w in row] for row in padded]
    )


def training_documents(recipe: Recipe, start: int) -> Iterator[list[Document]]:
    """Batches from step `start` on, along the recipe's curriculum."""
    for step in range(start, recipe.all_steps):
        world = World(recipe.seed * 1_000_000 + step)
        stream = _stream(recipe, step, world)
        yield [next(stream) for _ in range(recipe.batch_documents)]


def _stream(recipe: Recipe, step: int, world: World) -> Iterator[Document]:
    """What the documents of a step are."""
    reasoned, drilled = recipe.steps, recipe.cycles[1][0]
    easy, mixed = step < recipe.easy_steps, step < recipe.mixed_steps
    if step >= drilled:
        world.hard_share = recipe.recited_hard_share
        drills, recitals = (0.45, 0.15) if step < drilled + recipe.drilled_steps else (0.15, 0.5)
        shares = {"drills": drills, "recitals": recitals, "check_share": recipe.check_share}
        return drilled_documents(world, facts=(2, 3, 3), **shares)
    world.hard_share = 0.1 if easy else recipe.mixed_hard_share if mixed else recipe.hard_share
    if step >= reasoned:
        world.hard_share = recipe.reasoned_hard_share
    facts = (2,) if easy else (2, 3, 3)
    return documents(world, facts=facts, check_share=recipe.check_share, reasoned=step >= reasoned)


@torch.no_grad()
def ability(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, seed: int = 7, count: int = 480) -> dict[str, float]:
    """Greedy exact match by form and difficulty, verdicts on answers, and the chat format, on unseen passages.

    Exact match is teacher-forced: every token of the answer must be the argmax, which is what greedy decoding gives.
    """
    model.eval()
    world = World(seed, split="held_out")
    hits: dict[str, list[bool]] = {}
    rows: list[tuple[str, str, str]] = []
    verdict_rows: list[tuple[str, str, bool]] = []
    for index in range(count):
        world.hard_share = float(index % 2)
        level = "hard" if index % 2 else "easy"
        form = ("value", "yes", "no", "unanswerable")[index // 2 % 4]
        passage = world.passage(3)
        question = world.ask(passage, form)
        right = answer(passage.facts, question)
        rows.append((f"{form}_{level}", f"{passage.statement}\nQuestion: {question.text}\nAnswer:", f" {right}\n"))
        chat = f"<|im_start|>user\n{passage.statement}\n\n{question.text}<|im_end|>\n<|im_start|>assistant\n"
        rows.append((f"chat_{level}", chat, f"{right}<|im_end|>"))
        fair = index % 16 < 8
        shown = right if fair else world.corrupt(passage, question)
        asked = f"{passage.statement}\nQuestion: {question.text}\nAnswer: {shown}"
        name = f"{'right' if fair else 'wrong'}_{level}"
        rows.append((f"check_{name}", f"{asked}\nVerdict:", f" {right[:-1]}, so {'right' if fair else 'wrong'}\n"))
        verdict_rows.append((f"turn_check_{name}", f"{asked}<|im_end|>", fair))
        verdict_rows.append((f"chat_check_{name}", f"{chat}{shown}<|im_end|>", fair))
    for start in range(0, len(rows), 120):
        chunk = rows[start : start + 120]
        prompts = tokenizer([p for _, p, _ in chunk])["input_ids"]
        answers = tokenizer([a for _, _, a in chunk])["input_ids"]
        longest = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
        ids = torch.full((len(chunk), longest), tokenizer.pad_token_id)
        for row, (p, a) in enumerate(zip(prompts, answers, strict=True)):
            ids[row, : len(p) + len(a)] = torch.tensor(p + a)
        best = model(input_ids=ids).logits.argmax(-1)
        for row, (name, _, _) in enumerate(chunk):
            begin, end = len(prompts[row]), len(prompts[row]) + len(answers[row])
            hits.setdefault(name, []).append(bool((best[row, begin - 1 : end - 1] == ids[row, begin:end]).all()))
    yes, no = tokenizer([" right", " wrong"])["input_ids"]
    for start in range(0, len(verdict_rows), 120):
        part = verdict_rows[start : start + 120]
        batch = tokenizer([prompt for _, prompt, _ in part], padding=True, padding_side="right", return_tensors="pt")
        logits = model(**batch).logits[torch.arange(len(part)), batch["attention_mask"].sum(1) - 1]
        for row, (name, _, fair) in enumerate(part):
            hits.setdefault(name, []).append(bool((logits[row, yes[0]] > logits[row, no[0]]) == fair))
    model.train()
    return {name: round(sum(found) / len(found), 3) for name, found in sorted(hits.items())}


def optimizers(model: Qwen2ForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon (Jordan, 2024) for the matrices of the layers, AdamW for everything else."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=recipe.learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def train(recipe: Recipe, output: Path, report_every: int = 200, ability_rows: int = 480) -> None:
    """Train to the end of the recipe, from the last checkpoint in `output` if there is one, and save fp16 weights."""
    tokenizer = build_tokenizer()
    model = build_model(recipe, tokenizer)
    opts = optimizers(model, recipe)
    output.mkdir(parents=True, exist_ok=True)
    checkpoint, start, tokens = output / "checkpoint.pt", 0, 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for opt, saved in zip(opts, state["optimizers"], strict=True):
            opt.load_state_dict(saved)
        start, tokens = state["step"], state["tokens"]
    began, losses = time.monotonic(), list[float]()
    for step, batch in enumerate(training_documents(recipe, start), start=start):
        encoded = sorted((encode(document, tokenizer) for document in batch), key=lambda it: sum(len(i) for i, _ in it))
        total = sum(weight * len(ids) for pieces in encoded for ids, weight in pieces)
        batch_loss = 0.0
        for half in (encoded[: len(encoded) // 2], encoded[len(encoded) // 2 :]):  # which saves a fifth of the padding
            ids, weights = collate(half, tokenizer.pad_token_id)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = model(input_ids=ids[:, :-1], use_cache=False).logits
            losses_of_tokens = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            loss = (losses_of_tokens * weights[:, 1:].flatten()).sum() / total
            loss.backward()
            batch_loss += float(loss.detach())
            tokens += int((ids != tokenizer.pad_token_id).sum())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = recipe.learning_rate * learning_rate_factor(step, recipe)
            opt.step()
            opt.zero_grad()
        losses.append(batch_loss)
        if (step + 1) % report_every == 0 or step + 1 == recipe.all_steps:
            mean = sum(losses[-report_every:]) / len(losses[-report_every:])
            row = {
                "step": step + 1,
                "tokens": tokens,
                "seconds": round(time.monotonic() - began),
                "loss": round(mean, 4),
            }
            row |= ability(model, tokenizer, count=ability_rows)
            with (output / "progress.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
            state = {"model": model.state_dict(), "optimizers": [opt.state_dict() for opt in opts]}
            torch.save(state | {"step": step + 1, "tokens": tokens}, checkpoint.with_suffix(".partial"))
            checkpoint.with_suffix(".partial").replace(checkpoint)
    model.half().save_pretrained(output)
    tokenizer.save_pretrained(output)
    (output / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2) + "\n")


def main(arguments: Iterable[str] | None = None) -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--scaled", action="store_true", help="12 layers of 256 instead of the shipped size")
    for name, kind in (
        ("steps", int),
        ("layers", int),
        ("hard-share", float),
        ("check-share", float),
        ("learning-rate", float),
    ):
        parser.add_argument(f"--{name}", type=kind)
    chosen = vars(parser.parse_args(None if arguments is None else list(arguments)))
    base = SCALED if chosen.pop("scaled") else Recipe()
    output = chosen.pop("output")
    train(Recipe(**asdict(base) | {k: v for k, v in chosen.items() if v is not None}), output)


if __name__ == "__main__":
    main()
