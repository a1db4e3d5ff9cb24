"""`alignkit serve` with 32 clients at once, against the same requests one after another: one run, one server.

    python benchmarks/serving.py [--clients 32] [--requests 96] [--adapters 3] [--max-tokens 64]

The server is a process of its own with the embedded base and random adapters on it, and the requests, streamed and
greedy, are spread evenly over them. Both roads must give the same answers. Tokens are those the server counts.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import openai

from alignkit.core.config import LoraConfig, ModelConfig
from alignkit.data.closed_world import World

Answer = tuple[str, int, float]
"""Text, tokens, and seconds to the first of them."""


def main() -> None:
    """Print tokens per second and time to the first token of both roads, and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--adapters", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=64)
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder, served(Path(folder), arguments.adapters) as url:
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=600)
        models = [model.id for model in client.models.list()]
        requests = make_requests(arguments.requests, models)
        for model in models:  # what happens at a model's first request only
            ask(client, model, requests[0][1], arguments.max_tokens)

        began = time.perf_counter()
        one_by_one = [ask(client, *each, arguments.max_tokens) for each in requests]
        alone = time.perf_counter() - began
        with ThreadPoolExecutor(arguments.clients) as clients:
            began = time.perf_counter()
            together = list(clients.map(lambda each: ask(client, *each, arguments.max_tokens), requests))
            at_once = time.perf_counter() - began

    tokens = sum(count for _, count, _ in one_by_one)
    first = [sorted(each[2] for each in answers)[len(answers) // 2] for answers in (one_by_one, together)]
    same = sum(a[0] == b[0] for a, b in zip(one_by_one, together, strict=True))
    print(f"{len(requests)} requests to {len(models)} models, {tokens} tokens; {same} answers are the same")
    print(f"{'':28s} {'one by one':>11s} {f'{arguments.clients} at once':>11s} {'ratio':>7s}")
    rates = tokens / alone, sum(count for _, count, _ in together) / at_once
    print(f"{'tokens/s':28s} {rates[0]:11.1f} {rates[1]:11.1f} {rates[1] / rates[0]:6.1f}x")
    print(f"{'median s to the first token':28s} {first[0]:11.3f} {first[1]:11.3f} {first[1] / first[0]:6.1f}x")


def ask(client: openai.OpenAI, model: str, question: str, max_tokens: int) -> Answer:
    """One streamed answer."""
    began, first, text, tokens = time.perf_counter(), 0.0, "", 0
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=max_tokens,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        if chunk.usage:
            tokens = chunk.usage.completion_tokens
        elif chunk.choices[0].delta.content:
            first = first or time.perf_counter() - began
            text += chunk.choices[0].delta.content
    return text, tokens, first


def make_requests(count: int, models: list[str]) -> list[tuple[str, str]]:
    """Questions of the closed world, each for the next model in turn."""
    world = World(1)
    passages = [world.passage() for _ in range(count)]
    return [
        (models[number % len(models)], f"{passage.statement}\n\n{world.ask(passage).text}")
        for number, passage in enumerate(passages)
    ]


@contextmanager
def served(folder: Path, adapters: int) -> Iterator[str]:
    """The base URL of a server in a process of its own."""
    models = [f"models.a{seed}={save_random_adapter(folder / f'a{seed}', seed)}" for seed in range(1, adapters + 1)]
    command = [sys.executable, "-m", "alignkit.serve", "port=0", f"output_dir={folder / 'serve'}", *models]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        url = next(line.split()[2] for line in server.stdout if line.startswith("listening at "))
        with ThreadPoolExecutor(1) as reader:
            reader.submit(server.stdout.read)  # or it would stop at a full pipe
            yield url
            server.terminate()
    finally:
        server.kill()
        server.wait()


def save_random_adapter(folder: Path, seed: int) -> Path:
    """A random adapter on the embedded base, small enough to leave it its language."""
    import torch

    from alignkit.core.app import load_config
    from alignkit.models.loading import load_base, new_adapter, save_adapter

    model: ModelConfig = load_config("serve").model
    torch.manual_seed(seed)
    policy = new_adapter(load_base(model), LoraConfig(rank=16, dropout=0.0), ["all-linear"])
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.005)
    save_adapter(policy, folder, model)
    return folder


if __name__ == "__main__":
    main()
