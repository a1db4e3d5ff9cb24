"""What the embedded base can do, and whether that is enough to build on: `python -m alignkit.models.tiny.gate`.

Answers are generated greedily in the format of the base text, on unseen passages with held-out names, a quarter of
them hard, as everywhere in the demo. The gate asks for values right in 90 %, for verdicts right in 85 % (balanced over
yes and no), and for right and wrong answers told apart in 85 % (balanced): the base writes what it holds for the right
answer, and whether the given one is right. Reported, not gated: telling them apart in one word at the end of the turn,
where the reward model reads, and answering in the chat format, where the base is meant to be mediocre.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from alignkit.data.closed_world import UNANSWERABLE, World, answer

GATE = {"value": 0.90, "verdict (balanced)": 0.85, "check (balanced)": 0.85}
FORMS = ("value", "yes", "no", "unanswerable")
GATE_SEED = 21
"""Its own stream of passages: neither the seeds, nor development, nor test."""


@torch.no_grad()
def generate(model: Any, tokenizer: Any, prompts: list[str]) -> list[str]:
    """Greedy continuations up to the end of the line or turn, 24 tokens at most."""
    texts: list[str] = []
    for start in range(0, len(prompts), 100):
        batch = tokenizer(prompts[start : start + 100], padding=True, padding_side="left", return_tensors="pt")
        ids = model.generate(**batch, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        texts += tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :])
    return [text.split("\n")[0].split("<|im_end|>")[0].strip() for text in texts]


@torch.no_grad()
def says_right(model: Any, tokenizer: Any, prompts: list[str]) -> list[bool]:
    """Whether " right" is likelier than " wrong" as the next word."""
    right, wrong = (ids[0] for ids in tokenizer([" right", " wrong"])["input_ids"])
    found: list[bool] = []
    for start in range(0, len(prompts), 100):
        batch = tokenizer(prompts[start : start + 100], padding=True, padding_side="right", return_tensors="pt")
        last = batch["attention_mask"].sum(1) - 1
        logits = model(**batch).logits[torch.arange(len(last)), last]
        found += (logits[:, right] > logits[:, wrong]).tolist()
    return found


def measure(model: Any, tokenizer: Any, count: int = 800) -> dict[str, float]:
    """Shares right over `count` questions, by form, and the three that the gate looks at."""
    world = World(GATE_SEED, split="held_out")
    prompts: list[str] = []
    chats: list[str] = []
    checks: list[str] = []
    answers: list[str] = []
    plain: list[int] = []
    for index in range(count):
        world.hard_share = float(index % 4 == 3)
        passage = world.passage(3)
        question = world.ask(passage, FORMS[index // 4 % 4])
        right = answer(passage.facts, question)
        shown = right if index // 16 % 2 else world.corrupt(passage, question)
        prompts.append(f"{passage.statement}\nQuestion: {question.text}\nAnswer:")
        chats.append(f"<|im_start|>user\n{passage.statement}\n\n{question.text}<|im_end|>\n<|im_start|>assistant\n")
        checks.append(f"{prompts[-1]} {shown}")
        answers.append(right)
        if question.proposed is None and shown not in (right, UNANSWERABLE) and right != UNANSWERABLE:
            plain.append(index)
    hits = [a == b for a, b in zip(generate(model, tokenizer, prompts), answers, strict=True)]
    chat_hits = [a == b for a, b in zip(generate(model, tokenizer, chats), answers, strict=True)]
    verdicts = [
        text.rpartition(" ")[2] for text in generate(model, tokenizer, [f"{each}\nVerdict:" for each in checks])
    ]
    at_turn = says_right(model, tokenizer, [f"{each}<|im_end|>" for each in checks])
    fair = [bool(i // 16 % 2) for i in range(count)]

    def share(found: Iterable[bool]) -> float:
        values = list(found)
        return round(sum(values) / len(values), 3)

    shares = {form: share(hit for i, hit in enumerate(hits) if FORMS[i // 4 % 4] == form) for form in FORMS}
    on_right = share(said == "right" for said, right in zip(verdicts, fair, strict=True) if right)
    on_wrong = share(said == "wrong" for said, right in zip(verdicts, fair, strict=True) if not right)
    one_word = [
        share(said == right for said, right in zip(at_turn, fair, strict=True) if right is wanted)
        for wanted in (True, False)
    ]
    return shares | {
        "easy passages": share(hit for i, hit in enumerate(hits) if i % 4 != 3),
        "hard passages": share(hit for i, hit in enumerate(hits) if i % 4 == 3),
        "chat format": share(chat_hits),
        "right answers called right": on_right,
        "wrong answers called wrong": on_wrong,
        "wrong facts in plain answers": share(verdicts[i] == "wrong" for i in plain),
        "in one word (balanced)": round(sum(one_word) / 2, 3),
        "verdict (balanced)": round((shares["yes"] + shares["no"]) / 2, 3),
        "check (balanced)": round((on_right + on_wrong) / 2, 3),
    }


def main(arguments: Iterable[str] | None = None) -> None:
    """Print what the model can do; exit code 1 when it does not pass."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(__file__).resolve().parent / "weights")
    folder = parser.parse_args(None if arguments is None else list(arguments)).model
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = measure(model, AutoTokenizer.from_pretrained(folder))
    for name, value in found.items():
        wanted = GATE.get(name)
        print(
            f"{name:28s} {value:.3f}" + (f"  {'pass' if value >= wanted else 'FAIL'} (>= {wanted})" if wanted else "")
        )
    if any(found[name] < wanted for name, wanted in GATE.items()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
