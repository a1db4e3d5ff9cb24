"""Generation: the sampling arithmetic by hand, equality with `model.generate`, and resumption without loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_random import random_model, tokenizer, user

from alignkit.core.config import LoraConfig, SamplingConfig
from alignkit.core.errors import UserError
from alignkit.core.journal import Journal
from alignkit.core.records import Completion, CompletionSet, Message
from alignkit.data.chat import encode_prompt
from alignkit.generation.base import check_sampling
from alignkit.generation.hf import HFGenerator, draw, merge_adapter, sample_tokens
from alignkit.generation.resumable import BATCHES_PER_CHUNK, chunk_seed, chunk_size, generate_all
from alignkit.models.loading import new_adapter

PROMPTS = [
    user(text) for text in ("Who leads Ferro?", "Notes: Anna lives in Oslo. Where does Anna live?", "Hello", "A b c")
]
GREEDY = SamplingConfig(n=1, temperature=[0, 0], max_new_tokens=12)
VARIED = SamplingConfig(n=3, temperature=[0.5, 1.5], top_p=[0.5, 1.0], max_new_tokens=12)


# -- one step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("temperature", "top_p", "noise", "token"),
    [
        # Probabilities .5 .3 .15 .05. A nucleus of 0.8 is the first two tokens, with mass .8:
        (1.0, 0.8, 0.60, 0),  # .60 * .8 = .48 < .5
        (1.0, 0.8, 0.65, 1),  # .65 * .8 = .52
        (1.0, 0.8, 0.999, 1),
        # A nucleus of 0.81 needs the third, mass .95:
        (1.0, 0.81, 0.80, 1),  # .76 < .8
        (1.0, 0.81, 0.90, 2),  # .855
        (1.0, 1.0, 0.96, 3),
        (1.0, 0.1, 0.999, 0),  # the nucleus always holds the most likely token
        # Temperature 0.5 squares: .25 .09 .0225 .0025 over .365 = .6849 .2466 .0616 .0068
        (0.5, 1.0, 0.68, 0),
        (0.5, 1.0, 0.69, 1),
        (0.5, 1.0, 0.94, 2),
        (0.0, 1.0, 0.999, 0),
    ],
)
def test_a_token_is_drawn_from_the_nucleus(temperature: float, top_p: float, noise: float, token: int) -> None:
    shuffled = [2, 0, 3, 1]  # the order of the vocabulary must not matter
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()[torch.tensor(shuffled)]
    drawn = sample_tokens(logits[None], torch.tensor([temperature]), torch.tensor([top_p]), torch.tensor([noise]))
    assert shuffled[int(drawn)] == token


def test_rows_have_their_own_temperature_and_top_p() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(3, 4)
    noise = torch.full((3,), 0.96)
    drawn = sample_tokens(logits, torch.tensor([1.0, 0.0, 1.0]), torch.tensor([1.0, 1.0, 0.8]), noise)
    assert drawn.tolist() == [3, 0, 1]


def test_a_nucleus_wider_than_the_candidates_reaches_the_whole_vocabulary() -> None:
    size = 1000
    noise = (torch.arange(size) + 0.5) / size
    logits = torch.zeros(size, size)
    drawn = sample_tokens(logits, torch.ones(size), torch.ones(size), noise)
    assert sorted(drawn.tolist()) == list(range(size))  # a uniform distribution under a uniform grid


def test_temperatures_fill_their_range_and_are_recorded() -> None:
    draws = draw(2000, VARIED, seed=3)
    assert 0.5 <= draws.temperature.min() < 0.51
    assert 1.49 < draws.temperature.max() <= 1.5
    assert abs(float(draws.top_p.mean()) - 0.75) < 0.01
    completion = HFGenerator(random_model(), tokenizer(), "random").generate(PROMPTS[:1], VARIED, seed=3)[0][0]
    expected = draw(3, VARIED, seed=3)
    assert completion.sampling["temperature"] == pytest.approx(float(expected.temperature[0]), abs=1e-3)
    assert completion.sampling["top_p"] == pytest.approx(float(expected.top_p[0]), abs=1e-3)
    assert completion.model == "random"


# -- whole completions -----------------------------------------------------------------------------------------------


def test_greedy_completions_equal_model_generate() -> None:
    model = random_model()
    written = HFGenerator(model, tokenizer(), "random").generate(PROMPTS, GREEDY, seed=1)
    for prompt, (completion,) in zip(PROMPTS, written, strict=True):
        ids = torch.tensor([encode_prompt(tokenizer(), prompt)])
        output = model.generate(ids, do_sample=False, max_new_tokens=12)[0, ids.shape[1] :]
        assert completion.text == tokenizer().decode(output, skip_special_tokens=True)
        assert len(output) == 12
        assert not completion.finished


def test_completions_do_not_depend_on_batches_and_neighbours() -> None:
    generator = HFGenerator(random_model(), tokenizer(), "random")
    together = generator.generate(PROMPTS, VARIED, seed=5)
    assert together == generator.generate(PROMPTS, replace(VARIED, batch_size=1), seed=5)
    assert together == generator.generate(PROMPTS, replace(VARIED, batch_size=6), seed=5)
    assert together[:2] == generator.generate(PROMPTS[:2], VARIED, seed=5)
    assert together != generator.generate(PROMPTS, VARIED, seed=6)
    assert len({completion.text for completion in together[0]}) == 3


def test_a_completion_ends_at_the_end_of_turn() -> None:
    generator = HFGenerator(random_model(), tokenizer(), "random")
    generator.tokenizer = _KeepsSpecials()
    full = generator.generate(PROMPTS, VARIED, seed=5)
    texts = [[int(token) for token in completion.text.split()] for row in full for completion in row]
    generator.end_id = texts[0][4]  # now the fifth token of the first completion ends it
    cut = generator.generate(PROMPTS, VARIED, seed=5)
    for whole, completion in zip(texts, (completion for row in cut for completion in row), strict=True):
        tokens = [int(token) for token in completion.text.split()]
        end = whole.index(generator.end_id) + 1 if generator.end_id in whole else None
        assert tokens == whole[:end]
        assert completion.finished == (end is not None)
    assert cut[0][0].finished


class _KeepsSpecials:
    """The tokenizer, but decoding to numbers, so that a test sees every token."""

    def __getattr__(self, name: str) -> object:
        return getattr(tokenizer(), name)

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        return " ".join(map(str, tokens))


def test_rows_that_agree_so_far_are_read_once() -> None:
    model = random_model()
    forward, rows = model.forward, []

    def counts(*arguments: object, **keywords: object) -> object:
        rows.append(len(keywords["input_ids"]))  # type: ignore[arg-type]
        return forward(*arguments, **keywords)

    model.forward = counts
    generator = HFGenerator(model, tokenizer(), "random")
    alike = generator.generate(PROMPTS, SamplingConfig(n=8, temperature=[1e-3, 1e-3], max_new_tokens=6), seed=1)
    assert rows == [4] * 6  # one row a prompt, not one a completion
    assert all(len({completion.text for completion in completions}) == 1 for completions in alike)
    rows.clear()
    generator.generate(PROMPTS, SamplingConfig(n=8, temperature=[5.0, 5.0], max_new_tokens=6), seed=1)
    assert rows[0] == 4
    assert rows[-1] > 28  # nearly all of 32 have parted


def test_a_merged_adapter_generates_the_same() -> None:
    policy = new_adapter(random_model(), LoraConfig(rank=4, dropout=0.0), ["all-linear"])
    torch.manual_seed(1)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    policy.eval()
    ids = torch.tensor([encode_prompt(tokenizer(), PROMPTS[1])])
    with torch.inference_mode():
        before = policy(input_ids=ids).logits
        base = policy.get_base_model()
        with policy.disable_adapter():
            assert (base(input_ids=ids).logits - before).abs().max() > 0.1  # the adapter does something
    separate = HFGenerator(policy, tokenizer(), "sft").generate(PROMPTS, VARIED, seed=2)
    merged = merge_adapter(policy)
    with torch.inference_mode():
        assert (merged(input_ids=ids).logits - before).abs().max() < 1e-4
    assert HFGenerator(merged, tokenizer(), "sft").generate(PROMPTS, VARIED, seed=2) == separate


def test_a_16_bit_policy_is_not_merged() -> None:
    policy = new_adapter(random_model(dtype=torch.bfloat16), LoraConfig(rank=4), ["all-linear"])
    assert merge_adapter(policy) is policy
    plain = random_model()
    assert merge_adapter(plain) is plain


# -- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": [1.0, 0.5]}, "sampling.temperature"),
        ({"temperature": [1.0]}, "sampling.temperature"),
        ({"top_p": [0.5, 1.2]}, "sampling.top_p"),
        ({"top_p": [0.0, 1.0]}, "sampling.top_p"),
        ({"n": 0}, "sampling.n=0"),
        ({"max_new_tokens": 0}, "sampling.max_new_tokens"),
        ({"temperature": [0.0, 0.0]}, "greedy"),
    ],
)
def test_settings_without_sense_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_sampling(replace(VARIED, **change))  # type: ignore[arg-type]
    check_sampling(VARIED)
    check_sampling(GREEDY)


# -- resumption ------------------------------------------------------------------------------------------------------


class _Fake:
    """Writes seed and prompt; stops with KeyboardInterrupt after `chunks` calls, as a kill would."""

    label = "fake"

    def __init__(self, chunks: int = 1000) -> None:
        self.chunks = chunks
        self.seeds: list[int] = []

    def generate(self, prompts: Sequence[list[Message]], sampling: SamplingConfig, seed: int) -> list[list[Completion]]:
        if len(self.seeds) == self.chunks:
            raise KeyboardInterrupt
        self.seeds.append(seed)
        return [
            [Completion(text=f"{seed} {prompt[0].content} {sample}", model="fake") for sample in range(sampling.n)]
            for prompt in prompts
        ]


def _rows(count: int) -> list[CompletionSet]:
    return [
        CompletionSet(id=f"row-{number}", prompt=user(f"question {number}"), completions=[]) for number in range(count)
    ]


def test_an_interrupted_generation_resumes_to_the_same_completions(tmp_path: Path) -> None:
    sampling = SamplingConfig(n=2, batch_size=4)
    rows = _rows(50)
    assert chunk_size(sampling) == 2 * BATCHES_PER_CHUNK
    with Journal(tmp_path / "whole.jsonl", "same") as journal:
        expected = generate_all(_Fake(), rows, sampling, 7, journal)

    with pytest.raises(KeyboardInterrupt), Journal(tmp_path / "cut.jsonl", "same") as journal:
        generate_all(_Fake(chunks=3), rows, sampling, 7, journal)
    lines = (tmp_path / "cut.jsonl").read_text().splitlines()
    (tmp_path / "cut.jsonl").write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:20])  # the kill tore the last line
    generator = _Fake()
    with Journal(tmp_path / "cut.jsonl", "same") as journal:
        resumed = generate_all(generator, rows, sampling, 7, journal)

    assert resumed == expected
    assert list(resumed) == [row.id for row in rows]
    assert generator.seeds == [chunk_seed(7, index) for index in range(2, 7)]  # the torn chunk and those never begun


def test_only_what_is_left_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(KeyboardInterrupt), Journal(tmp_path / "journal.jsonl", "same") as journal:
        generate_all(_Fake(chunks=3), _rows(50), GREEDY, 7, journal, rows_a_chunk=10)
    caplog.clear()
    with caplog.at_level("INFO", logger="alignkit"), Journal(tmp_path / "journal.jsonl", "same") as journal:
        for _ in range(2):
            generate_all(_Fake(), _rows(50), GREEDY, 7, journal, rows_a_chunk=10)
    first, second, third, *rest = [record.getMessage() for record in caplog.records]
    assert first == "resuming generation: 3 of 5 chunks are in the journal"
    assert second == "generating with fake: 2 to do"
    assert third.startswith("generating with fake: 2 done in ")
    assert rest == ["resuming generation: 5 of 5 chunks are in the journal"]  # and no bar for nothing


def test_chunk_seeds_differ_and_fit_torch() -> None:
    seeds = {chunk_seed(seed, index) for seed in range(20) for index in range(50)}
    assert len(seeds) == 1000
    torch.Generator().manual_seed(max(seeds))
