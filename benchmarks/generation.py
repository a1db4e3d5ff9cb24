"""Sampling n completions a prompt with the embedded model, against a loop over `model.generate`: one run, one thread.

    python benchmarks/generation.py

Both draw 8 completions for each of 64 questions at temperature 0.8 and top_p 0.95, with the same length limit.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import time

from alignkit.core.config import SamplingConfig
from alignkit.core.records import Message
from alignkit.data.closed_world import World

QUESTIONS, COMPLETIONS, NEW_TOKENS = 64, 8, 24


def main() -> None:
    """Print completions a second of both, and their ratio."""
    import torch

    from alignkit.core.app import load_config
    from alignkit.data.chat import encode_prompt
    from alignkit.generation.hf import HFGenerator
    from alignkit.models.loading import load_policy, load_tokenizer

    model = load_config("sample", ["data.path=none"]).model
    policy, tokenizer = load_policy(model, None), load_tokenizer(model)
    world = World(1)
    prompts = []
    for _ in range(QUESTIONS):
        passage = world.passage()
        prompts.append([Message(role="user", content=f"{passage.statement}\n\n{world.ask(passage).text}")])
    sampling = SamplingConfig(
        n=COMPLETIONS, temperature=[0.8, 0.8], top_p=[0.95, 0.95], max_new_tokens=NEW_TOKENS, batch_size=512
    )

    began = time.process_time()
    HFGenerator(policy, tokenizer, "tiny").generate(prompts, sampling, seed=1)
    ours = time.process_time() - began

    began = time.process_time()
    for prompt in prompts:
        ids = torch.tensor([encode_prompt(tokenizer, prompt)])
        policy.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=0.8,
            top_p=0.95,
            top_k=0,
            num_return_sequences=COMPLETIONS,
            max_new_tokens=NEW_TOKENS,
            pad_token_id=tokenizer.pad_token_id,
        )
    loop = time.process_time() - began

    count = QUESTIONS * COMPLETIONS
    print(f"{'generator':28s} {'CPU s':>7s} {'completions/s':>14s}")
    print(f"{'model.generate, a prompt':28s} {loop:7.2f} {count / loop:14.1f}")
    print(f"{'alignkit HFGenerator':28s} {ours:7.2f} {count / ours:14.1f}   {loop / ours:.1f} x")


if __name__ == "__main__":
    main()
