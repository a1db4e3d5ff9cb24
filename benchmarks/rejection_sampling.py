"""Best of n with the embedded model, against a loop over the questions in plain transformers: one run, one thread.

    python benchmarks/rejection_sampling.py [--questions 64] [--n 8] [--temperature 0.8]

Both draw n completions for each question at one temperature and top_p 0.95 with the same length limit, and score each
by the same reward model (untrained: its speed is that of any other). The loop calls `model.generate` once a question
for all of its n, and the model once a completion to score it. The two draw other random numbers, so that equal
statistics are what can be asked for: two-sample Kolmogorov-Smirnov tests of scores and of lengths. Scores of the same
completions are compared one by one.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import time
from statistics import mean
from typing import Any

from alignkit.core.config import LoraConfig, ModelConfig, SamplingConfig
from alignkit.core.records import Message
from alignkit.data.closed_world import World

NEW_TOKENS = 24
Conversation = list[Message]


def main() -> None:
    """Print CPU seconds of generating and scoring, their ratios, and how alike the two are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--n", type=int, default=8)
    parser.add_argument("--temperature", type=float, default=0.8)
    arguments = parser.parse_args()

    from scipy.stats import ks_2samp

    from alignkit.core.app import load_config
    from alignkit.generation.hf import HFGenerator
    from alignkit.models.loading import load_policy, load_tokenizer

    model: ModelConfig = load_config("sample", ["data.path=none"]).model
    policy, tokenizer, reward_model = load_policy(model, None), load_tokenizer(model), make_reward_model(model)
    prompts = make_prompts(arguments.questions)
    sampling = SamplingConfig(
        n=arguments.n,
        temperature=[arguments.temperature] * 2,
        top_p=[0.95, 0.95],
        max_new_tokens=NEW_TOKENS,
        batch_size=512,
    )
    seconds: dict[str, float] = {}

    began = time.process_time()
    written = HFGenerator(policy, tokenizer, "tiny").generate(prompts, sampling, seed=1)
    seconds["ours, generating"] = time.process_time() - began
    ours = [answered(prompt, each.text) for prompt, row in zip(prompts, written, strict=True) for each in row]
    began = time.process_time()
    our_scores = reward_model.score([{"messages": each} for each in ours])
    seconds["ours, scoring"] = time.process_time() - began

    began = time.process_time()
    texts = [loop_generate(policy, tokenizer, prompt, sampling) for prompt in prompts]
    seconds["loop, generating"] = time.process_time() - began
    theirs = [answered(prompt, text) for prompt, found in zip(prompts, texts, strict=True) for text in found]
    began = time.process_time()
    their_scores = [loop_score(reward_model, each) for each in theirs]
    seconds["loop, scoring"] = time.process_time() - began

    print(f"{len(prompts)} questions, n = {sampling.n}, temperature {arguments.temperature}; CPU seconds on one thread")
    print(f"{'':12s} {'loop':>8s} {'alignkit':>9s} {'ratio':>7s}")
    for part in ("generating", "scoring"):
        loop, own = seconds[f"loop, {part}"], seconds[f"ours, {part}"]
        print(f"{part:12s} {loop:8.2f} {own:9.2f} {loop / own:6.1f}x")
    loop, own = (sum(value for name, value in seconds.items() if name.startswith(who)) for who in ("loop", "ours"))
    print(f"{'together':12s} {loop:8.2f} {own:9.2f} {loop / own:6.1f}x")

    lengths = [[float(len(tokenizer.tokenize(each[-1].content))) for each in rows] for rows in (theirs, ours)]
    for name, pair in (("score", [their_scores, our_scores]), ("tokens", lengths)):
        test, means = ks_2samp(*pair), [mean(values) for values in pair]
        print(
            f"{name:12s} {means[0]:8.3f} {means[1]:9.3f}          "
            f"means; Kolmogorov-Smirnov D = {test.statistic:.3f}, p = {test.pvalue:.2f}"
        )
    furthest = max(abs(loop_score(reward_model, each) - score) for each, score in zip(ours, our_scores, strict=True))
    print(f"scores of the same {len(ours)} completions differ by at most {furthest:.1e}")


def make_prompts(count: int) -> list[Conversation]:
    """Questions of the closed world."""
    world = World(1)
    prompts = []
    for _ in range(count):
        passage = world.passage()
        prompts.append([Message(role="user", content=f"{passage.statement}\n\n{world.ask(passage).text}")])
    return prompts


def make_reward_model(model: ModelConfig) -> Any:
    """A reward model on the embedded base with a random adapter and head."""
    import torch

    from alignkit.models.loading import load_base, load_tokenizer, new_adapter
    from alignkit.models.reward_model import RewardModel
    from alignkit.models.value_head import ValueHeadModel

    torch.manual_seed(3)
    adapted = new_adapter(load_base(model), LoraConfig(rank=16, dropout=0.0), ["all-linear"])
    return RewardModel(ValueHeadModel(adapted), load_tokenizer(model), model)


def answered(prompt: Conversation, text: str) -> Conversation:
    """The conversation with the answer."""
    return [*prompt, Message(role="assistant", content=text)]


def loop_generate(policy: Any, tokenizer: Any, prompt: Conversation, sampling: SamplingConfig) -> list[str]:
    """n completions of one prompt by `model.generate`."""
    import torch

    from alignkit.data.chat import encode_prompt

    ids = torch.tensor([encode_prompt(tokenizer, prompt)])
    rows = policy.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        temperature=sampling.temperature[0],
        top_p=sampling.top_p[0],
        top_k=0,
        num_return_sequences=sampling.n,
        max_new_tokens=sampling.max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
    )
    return list(tokenizer.batch_decode(rows[:, ids.shape[1] :], skip_special_tokens=True))


def loop_score(reward_model: Any, conversation: Conversation) -> float:
    """The score of one completion: the value head on the last hidden state at its last token."""
    import torch

    from alignkit.data.chat import encode_conversation

    ids = torch.tensor([encode_conversation(reward_model.tokenizer, conversation)])
    module = reward_model.module
    with torch.inference_mode():
        output = module.policy(input_ids=ids, output_hidden_states=True, logits_to_keep=1)
        raw = module.value_head(output.hidden_states[-1][0, -1].float())
    return float((raw.reshape(-1)[0] - reward_model.offset) / reward_model.scale)


if __name__ == "__main__":
    main()
