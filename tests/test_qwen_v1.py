"""The first Qwen models as Qwen2: the same ids, the same logits, one tensor at a time, whole or not at all."""

from __future__ import annotations

import base64
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cache as cache_calls
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from alignkit.core.config import LoraConfig, ModelConfig, Quantization
from alignkit.core.errors import UserError
from alignkit.core.records import Message
from alignkit.data.chat import encode_example, end_of_turn_id
from alignkit.models import loading, qwen_v1_weights
from alignkit.models.qwen_v1 import RECORD, convert_checkpoint, load_tokenizer
from alignkit.models.qwen_v1_tokenizer import SPECIAL_TOKENS

_BESIDE = Path(__file__).resolve().parents[2] / "shared" / "data"
REAL = Path(os.environ.get("ALIGNKIT_SHARED_DATA", _BESIDE)) / "qwen-7b-chat"
needs_real_files = pytest.mark.skipif(not (REAL / "qwen.tiktoken").is_file(), reason="no Qwen-7B-Chat files here")

# The pattern that the first Qwen's tokenizer gives to tiktoken.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = (
    "Hello, the cat sat on the mat; the other cat didn't.",
    "你好！很高兴为你提供帮助。",
    "def f(x):\n\treturn x ** 2  # 3.14\r\n\r\n\n   \n",
    "🙂👩‍👩‍👧 naïve café Ångström ﬁ ½ Ⅷ",
    unicodedata.normalize("NFD", "naïve café Ångström 각"),
    "a<|im_end|>\n<|im_start|>b<|endoftext|><|extra_0|><|extra_204|><|extra_205|>",
    "  leading, trailing  \u00a0\u3000 \u200b",
    "",
)

LAYERS, HIDDEN, HEADS, INNER, ROWS = 2, 32, 4, 48, 512
OLD_CONFIG = {  # the key names of the first revision; numbers of our own
    "model_type": "qwen",
    "architectures": ["QWenLMHeadModel"],
    "auto_map": {"AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"},
    "activation": "swiglu",
    "apply_residual_connection_post_layernorm": False,
    "n_embd": HIDDEN,
    "n_head": HEADS,
    "n_layer": LAYERS,
    "kv_channels": HIDDEN // HEADS,
    "ffn_hidden_size": 2 * INNER,
    "layer_norm_epsilon": 1e-4,
    "n_positions": 6144,
    "no_bias": True,
    "padded_vocab_size": ROWS,
    "pos_emb": "rotary",
    "rotary_emb_base": 5000,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "seq_length": 2048,
    "tie_word_embeddings": False,
    "vocab_size": ROWS,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
}
NEW_NAMES = {
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
    "ffn_hidden_size": "intermediate_size",
    "n_positions": "max_position_embeddings",
}
DROPPED_LATER = ("activation", "apply_residual_connection_post_layernorm", "padded_vocab_size", "pos_emb")
NEW_CONFIG = {NEW_NAMES.get(key, key): value for key, value in OLD_CONFIG.items() if key not in DROPPED_LATER} | {
    "seq_length": 8192
}


# -- tiny checkpoints --------------------------------------------------------------------------------------------------


def write_vocabulary(folder: Path, merges: int = 40) -> dict[bytes, int]:
    """A byte-pair vocabulary learned from `TEXTS`: the most frequent pair becomes the next token."""
    words = [[bytes([byte]) for byte in word.encode()] for text in TEXTS for word in text.split(" ")]
    ranks = {bytes([byte]): rank for rank, byte in enumerate(random.Random(0).sample(range(256), 256))}
    for _ in range(merges):
        pairs = Counter((left + right, left, right) for word in words for left, right in zip(word, word[1:]))  # noqa: B905, RUF007
        token, left, right = max(pairs, key=lambda pair: (pair[0] not in ranks, pairs[pair], pair))
        ranks[token] = len(ranks)
        for word in words:
            for index in range(len(word) - 2, -1, -1):
                if word[index : index + 2] == [left, right]:
                    word[index : index + 2] = [token]
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "qwen.tiktoken").write_text("".join(lines))
    return ranks


def random_weights(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Every tensor of a first-Qwen checkpoint, under its names, nothing at its initial value."""
    torch.manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape) * 0.3 + (1.0 if len(shape) == 1 else 0.0)).to(dtype)

    weights = {"transformer.wte.weight": drawn(ROWS, HIDDEN), "transformer.ln_f.weight": drawn(HIDDEN)}
    for layer in range(LAYERS):
        start = f"transformer.h.{layer}."
        weights |= {
            f"{start}ln_1.weight": drawn(HIDDEN),
            f"{start}attn.c_attn.weight": drawn(3 * HIDDEN, HIDDEN),
            f"{start}attn.c_attn.bias": drawn(3 * HIDDEN),
            f"{start}attn.c_proj.weight": drawn(HIDDEN, HIDDEN),
            f"{start}ln_2.weight": drawn(HIDDEN),
            f"{start}mlp.w1.weight": drawn(INNER, HIDDEN),
            f"{start}mlp.w2.weight": drawn(INNER, HIDDEN),
            f"{start}mlp.c_proj.weight": drawn(HIDDEN, INNER),
        }
    return weights | {"lm_head.weight": drawn(ROWS, HIDDEN)}


def write_checkpoint(
    folder: Path, weights: dict[str, torch.Tensor], config: dict[str, Any] = OLD_CONFIG, form: str = "safetensors"
) -> Path:
    """A first-Qwen checkpoint in three shards, as safetensors or as `.bin`."""
    write_vocabulary(folder)
    (folder / "config.json").write_text(json.dumps(config))
    weight_map: dict[str, str] = {}
    stem, suffix = ("model", "safetensors") if form == "safetensors" else ("pytorch_model", "bin")
    for number in range(3):
        part = dict(list(weights.items())[number::3])
        name = f"{stem}-{number + 1:05d}-of-00003.{suffix}"
        if form == "safetensors":
            save_file(part, folder / name)
        else:
            torch.save(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def reference_logits(weights: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """The published first-Qwen forward pass in plain torch, for one sequence of at most `seq_length` tokens."""

    def normed(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-4) * weights[name]

    size, length = HIDDEN // HEADS, len(ids)
    angles = torch.outer(torch.arange(length).float(), 5000.0 ** (-torch.arange(0, size, 2).float() / size))
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]  # feature i turns with feature i + size / 2

    def turned(x: torch.Tensor) -> torch.Tensor:
        rotated = torch.complex(x[..., : size // 2], x[..., size // 2 :]) * turn
        return torch.cat((rotated.real, rotated.imag), dim=-1)

    x = weights["transformer.wte.weight"][ids]
    for layer in range(LAYERS):
        own = {name.split(".", 3)[3]: name for name in weights if name.startswith(f"transformer.h.{layer}.")}
        mixed = normed(x, own["ln_1.weight"]) @ weights[own["attn.c_attn.weight"]].T + weights[own["attn.c_attn.bias"]]
        query, key, value = (part.view(length, HEADS, size) for part in mixed.split(HIDDEN, dim=-1))
        scores = torch.einsum("qhd,khd->hqk", turned(query), turned(key)) / size**0.5
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
        attended = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value).reshape(length, HIDDEN)
        x = x + attended @ weights[own["attn.c_proj.weight"]].T
        inner = normed(x, own["ln_2.weight"])
        up, gate = inner @ weights[own["mlp.w1.weight"]].T, inner @ weights[own["mlp.w2.weight"]].T
        x = x + (up * F.silu(gate)) @ weights[own["mlp.c_proj.weight"]].T
    return normed(x, "transformer.ln_f.weight") @ weights["lm_head.weight"].T


IDS = torch.tensor([5, 40, 300, 7, 12, 9, 511, 0, 40])


def native_logits(folder: Path | str) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        found: torch.Tensor = model(IDS[None]).logits[0]
    return found


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source", random_weights())


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ALIGNKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "qwen_v1"


# -- tokenizer ---------------------------------------------------------------------------------------------------------


tokenizer_of = cache_calls(load_tokenizer)  # the real vocabulary takes seconds


@cache_calls
def tiktoken_encoding(folder: Path) -> Any:
    import tiktoken
    from tiktoken.load import load_tiktoken_bpe

    ranks = load_tiktoken_bpe(str(folder / "qwen.tiktoken"))
    specials = {token: len(ranks) + number for number, token in enumerate(SPECIAL_TOKENS)}
    return tiktoken.Encoding("qwen", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=specials)


def assert_same_ids(folder: Path, texts: list[str]) -> int:
    """The native tokenizer and tiktoken agree on every text, with special tokens and without; the number of ids."""
    tokenizer, encoding, total = tokenizer_of(folder), tiktoken_encoding(folder), 0
    for text in texts:
        composed = unicodedata.normalize("NFC", text)
        plain = encoding.encode(composed, disallowed_special=())
        assert tokenizer.encode(text, split_special_tokens=True) == plain
        assert tokenizer.encode(text) == encoding.encode(composed, allowed_special="all")
        assert tokenizer.decode(plain) == composed
        total += len(plain)
    return total


def fuzz(number: int) -> Iterator[str]:
    """Random strings, each from one block of Unicode, composed and decomposed."""
    blocks = ((1, 127), (0x4E00, 0x9FFF), (0x1F300, 0x1FAFF), (0xA0, 0x17F), (0x300, 0x36F), (0xAC00, 0xD7A3))
    draw = random.Random(7)
    for _ in range(number):
        start, end = draw.choice(blocks)
        text = "".join(
            chr(draw.randint(start, end)) if draw.random() < 0.8 else " \n'a1"[draw.randrange(5)] for _ in range(50)
        )
        yield text
        yield unicodedata.normalize("NFD", text)


def test_ids_are_those_of_tiktoken(tmp_path: Path) -> None:
    write_vocabulary(tmp_path)
    assert assert_same_ids(tmp_path, [*TEXTS, *fuzz(100)]) > 5000


def test_the_special_tokens_follow_the_vocabulary_in_order(tmp_path: Path) -> None:
    ranks = write_vocabulary(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert len(SPECIAL_TOKENS) == 208
    assert SPECIAL_TOKENS[:4] == ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|extra_0|>")
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [len(ranks) + number for number in range(208)]
    assert len(tokenizer) == len(ranks) + 208


def test_a_turn_ends_with_im_end_which_is_not_padding(tmp_path: Path) -> None:
    ranks = write_vocabulary(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == ("<|im_end|>", "<|endoftext|>", None)
    assert end_of_turn_id(tokenizer) == tokenizer.eos_token_id == len(ranks) + 2


def model_context(encoding: Any, history: list[tuple[str, str]], query: str, system: str) -> list[int]:
    """The ids that the model's own `make_context` builds: each part encoded on its own, newlines between turns."""
    start, end = encoding.encode_single_token("<|im_start|>"), encoding.encode_single_token("<|im_end|>")
    newline = encoding.encode("\n")

    def turn(role: str, content: str) -> list[int]:
        text = encoding.encode_ordinary(unicodedata.normalize("NFC", content))
        return [start, *encoding.encode_ordinary(role), *newline, *text, end]

    ids = turn("system", system)
    for question, answer in history:
        ids += newline + turn("user", question) + newline + turn("assistant", answer)
    return [*ids, *newline, *turn("user", query), *newline, start, *encoding.encode_ordinary("assistant"), *newline]


@pytest.mark.parametrize("folder", ["tiny", pytest.param("real", marks=needs_real_files)])
def test_a_conversation_is_rendered_as_the_model_renders_it(tmp_path: Path, folder: str) -> None:
    write_vocabulary(tmp_path)
    where = REAL if folder == "real" else tmp_path
    tokenizer, encoding = tokenizer_of(where), tiktoken_encoding(where)
    chats = [[("你好", "你好！"), ("How are you? ", " Fine.")], [("a  \n", "b\n\n"), ("c", "d")]]
    if folder == "real":
        rows = json.loads((REAL / "test_sampled_qwen.json").read_text(encoding="utf-8"))
        chats += [[(row["conversations"][0]["value"], row["conversations"][1]["value"])] for row in rows]
    for chat in chats:
        turns = [
            ("user", text) if side == 0 else ("assistant", text) for pair in chat for side, text in enumerate(pair)
        ]
        messages = [{"role": role, "content": text} for role, text in turns]
        for system in (None, "Be brief.", ""):
            first = [] if system is None else [{"role": "system", "content": system}]
            found = tokenizer.apply_chat_template(
                first + messages[:-1], tokenize=True, add_generation_prompt=True, return_dict=False
            )
            asked = "You are a helpful assistant." if system is None else system
            assert found == model_context(encoding, chat[:-1], chat[-1][0], asked)


def test_a_row_learns_its_answer_and_the_end_of_turn(tmp_path: Path) -> None:
    write_vocabulary(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    question, answer = Message(role="user", content="the cat?"), Message(role="assistant", content="the mat")
    row = encode_example(tokenizer, [question], [answer], max_length=200)
    assert not isinstance(row, str)
    learned = [label for label in row.labels if label != -100]
    assert tokenizer.decode(learned) == "the mat<|im_end|>"
    assert row.input_ids[-1] == tokenizer.eos_token_id


def test_the_tokenizer_comes_back_from_the_converted_folder(source: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    first, again = (
        load_tokenizer(source),
        AutoTokenizer.from_pretrained(convert_checkpoint(source, tmp_path / "target")),
    )
    assert [first.encode(text) for text in TEXTS] == [again.encode(text) for text in TEXTS]
    assert again.get_vocab() == first.get_vocab()
    assert (again.eos_token, again.pad_token, again.chat_template) == (
        "<|im_end|>",
        "<|endoftext|>",
        first.chat_template,
    )
    assert {str(token) for token in again.added_tokens_decoder.values() if token.special} == set(SPECIAL_TOKENS)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda lines: [*lines[:99], "no-base64! 99", *lines[100:]], r"qwen.tiktoken:100: expected a new base64 token"),
        (lambda lines: lines[:99] + lines[100:], r"qwen.tiktoken:100: expected .* rank 99"),
        (lambda lines: lines[:100], r"qwen.tiktoken: 156 of the 256 single bytes have no rank"),
        (lambda lines: [*lines, f"IyMjIyMjIyM= {len(lines)}"], r"b'########' cannot be merged from two earlier tokens"),
    ],
)
def test_a_damaged_vocabulary_is_refused(tmp_path: Path, damage: Any, message: str) -> None:
    write_vocabulary(tmp_path)
    file = tmp_path / "qwen.tiktoken"
    file.write_text("\n".join(damage(file.read_text().splitlines())))
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path)


def test_a_missing_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"qwen.tiktoken: not there"):
        load_tokenizer(tmp_path)


@needs_real_files
def test_real_ids_are_those_of_tiktoken() -> None:
    code = [path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("*.py"))]
    assert assert_same_ids(REAL, [*TEXTS, *code, *fuzz(1500)]) > 400_000


@needs_real_files
def test_real_special_ids_are_the_published_ones() -> None:
    tokenizer = tokenizer_of(REAL)
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [151643, 151644, 151645]
    assert len(tokenizer) == 151851
    assert tokenizer.encode("你好") == [108386]


# -- weights -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("config", [OLD_CONFIG, NEW_CONFIG])
def test_the_converted_model_gives_the_same_logits(tmp_path: Path, form: str, config: dict[str, Any]) -> None:
    weights = random_weights()
    target = convert_checkpoint(write_checkpoint(tmp_path / "source", weights, config, form), tmp_path / "target")
    expected = reference_logits(weights, IDS)
    assert expected.abs().max() > 1
    assert (native_logits(target) - expected).abs().max() <= 1e-5
    written = json.loads((target / "config.json").read_text())
    assert written["max_position_embeddings"] == config["seq_length"]
    assert written["intermediate_size"] == INNER
    assert not {"auto_map", "use_logn_attn"} & written.keys()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_keep_their_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = random_weights(dtype=dtype)
    weights["transformer.ln_f.weight"] = weights["transformer.ln_f.weight"].float()  # mixed types in one file
    target = convert_checkpoint(write_checkpoint(tmp_path / "source", weights), tmp_path / "target")
    index = json.loads((target / "model.safetensors.index.json").read_text())
    found = {
        name: tensor for file in set(index["weight_map"].values()) for name, tensor in load_file(target / file).items()
    }
    assert set(index["weight_map"]) == set(found)
    assert index["metadata"]["total_size"] == sum(each.numel() * each.element_size() for each in weights.values())
    assert torch.equal(found["model.norm.weight"], weights["transformer.ln_f.weight"])
    joined = torch.cat([found[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkv"])
    assert torch.equal(joined, weights["transformer.h.1.attn.c_attn.weight"])
    assert torch.equal(found["model.layers.0.mlp.gate_proj.weight"], weights["transformer.h.0.mlp.w2.weight"])
    assert json.loads((target / "config.json").read_text())["torch_dtype"] == str(dtype).removeprefix("torch.")


def test_one_file_of_weights_and_saved_tables_are_taken(tmp_path: Path) -> None:
    weights = random_weights()
    source = write_checkpoint(tmp_path / "source", weights)
    for file in source.glob("model*"):
        file.unlink()
    tables = {f"transformer.h.{layer}.attn.rotary_emb.inv_freq": torch.ones(4) for layer in range(LAYERS)}
    torch.save(
        weights | tables | {"transformer.h.0.attn.masked_bias": torch.tensor(-1e4)}, source / "pytorch_model.bin"
    )
    target = convert_checkpoint(source, tmp_path / "target")
    assert (native_logits(target) - reference_logits(weights, IDS)).abs().max() <= 1e-5


def test_generation_stops_at_the_end_of_turn(source: Path, tmp_path: Path) -> None:
    target, tokenizer = convert_checkpoint(source, tmp_path / "target"), load_tokenizer(source)
    generation = json.loads((target / "generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])


class Pickled:
    def __reduce__(self) -> Any:
        return (os.mkdir, ("ran-by-pickle",))


def test_pickled_code_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = write_checkpoint(tmp_path / "source", random_weights(), form="bin")
    torch.save({"transformer.wte.weight": Pickled()}, source / "pytorch_model-00001-of-00003.bin")
    with pytest.raises(UserError, match=r"00001-of-00003.bin: holds more than tensors"):
        convert_checkpoint(source, tmp_path / "target")
    assert not (tmp_path / "ran-by-pickle").exists()


def refused(source: Path, message: str) -> None:
    """The conversion raises one clear sentence and leaves nothing that loads."""
    target = source.parent / "target"
    with pytest.raises(UserError, match=message):
        convert_checkpoint(source, target)
    assert not target.exists()
    assert not (source.parent / ".target.partial").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen2"}, "model_type is 'qwen2'"),
        ({"no_bias": False}, "no_bias=False has no counterpart"),
        ({"rotary_pct": 0.25}, "rotary_pct=0.25"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        ({"seq_length": None}, "seq_length is missing"),
        ({"kv_channels": 16}, "kv_channels times the number of heads"),
        ({"padded_vocab_size": 500}, r"weight is torch.float32 \[512, 32\], which does not fit config.json"),
        ({"n_layer": 1}, r"8 tensors have no place in Qwen2: transformer.h.1"),
        ({"n_layer": 3}, r"12 tensors that Qwen2 needs are missing: model.layers.2"),
    ],
)
def test_a_configuration_that_does_not_map_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    refused(write_checkpoint(tmp_path / "source", random_weights(), OLD_CONFIG | change), message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transformer.visual.proj": torch.ones(2)}, r"1 tensors have no place in Qwen2: transformer.visual.proj"),
        ({"transformer.h.0.attn.c_proj.bias": torch.ones(HIDDEN)}, "have no place"),
        ({"lm_head.weight": torch.ones(ROWS, HIDDEN, dtype=torch.int8)}, r"lm_head.weight is torch.int8"),
        ({"transformer.h.0.attn.c_attn.bias": torch.ones(3 * HIDDEN + 1)}, r"c_attn.bias is torch.float32 \[97\]"),
    ],
)
def test_tensors_that_do_not_map_are_refused(tmp_path: Path, change: dict[str, torch.Tensor], message: str) -> None:
    refused(write_checkpoint(tmp_path / "source", random_weights() | change), message)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_shard_that_is_cut_short_is_refused(tmp_path: Path, form: str) -> None:
    source = write_checkpoint(tmp_path / "source", random_weights(), form=form)
    shard = next(source.glob("*-00002-of-00003.*"))
    shard.write_bytes(shard.read_bytes()[:-1000])
    refused(source, r"00002-of-00003\.\w+: damaged")


def test_a_missing_or_foreign_file_is_refused(source: Path) -> None:
    (source / "model-00002-of-00003.safetensors").unlink()
    refused(source, r"names the file 'model-00002-of-00003.safetensors', which is not there")
    index = source / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "../config.json"}}))
    refused(source, r"names the file '../config.json'")
    index.unlink()
    refused(source, "no weights there")


def test_a_vocabulary_larger_than_the_embedding_is_refused(source: Path) -> None:
    write_vocabulary(source, merges=60)
    refused(source, r"524 tokens with the special ones, more than the 512 rows")


@pytest.mark.slow
def test_a_conversion_holds_one_tensor_in_memory(tmp_path: Path) -> None:
    """One file of 80 tensors of 4 MB: the peak of a fresh process grows by a few of them, not by the file."""
    hidden, layers = 1024, 16
    config = OLD_CONFIG | {"n_embd": hidden, "kv_channels": hidden // HEADS, "n_layer": layers}
    source = write_checkpoint(tmp_path / "source", {}, config | {"ffn_hidden_size": 2 * hidden})
    shapes = {
        "ln_1.weight": (hidden,),
        "ln_2.weight": (hidden,),
        "attn.c_attn.bias": (3 * hidden,),
        "attn.c_attn.weight": (3 * hidden, hidden),
        **dict.fromkeys(
            ("attn.c_proj.weight", "mlp.w1.weight", "mlp.w2.weight", "mlp.c_proj.weight"), (hidden, hidden)
        ),
    }
    weights = {f"transformer.h.{n}.{name}": torch.ones(shape) for n in range(layers) for name, shape in shapes.items()}
    ends = {
        "transformer.wte.weight": (ROWS, hidden),
        "transformer.ln_f.weight": (hidden,),
        "lm_head.weight": (ROWS, hidden),
    }
    (source / "model.safetensors.index.json").unlink()
    torch.save(weights | {name: torch.ones(shape) for name, shape in ends.items()}, source / "pytorch_model.bin")
    measured = (
        "import resource, sys\n"
        "from alignkit.models.qwen_v1 import convert_checkpoint, load_tokenizer\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
        "load_tokenizer(sys.argv[1])\n"
        "before = peak()\n"
        "convert_checkpoint(sys.argv[1], sys.argv[2])\n"
        "print(peak() - before)\n"
    )
    command = [sys.executable, "-c", measured, str(source), str(tmp_path / "target")]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert (source / "pytorch_model.bin").stat().st_size > 450e6
    assert grown < 100  # MB


# -- whole, or not at all ----------------------------------------------------------------------------------------------


def test_a_finished_conversion_is_kept_and_a_changed_source_is_not(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", random_weights())
    target = convert_checkpoint(source, tmp_path / "target")
    before = {file.name: file.stat().st_mtime_ns for file in target.iterdir()}
    convert_checkpoint(source, target)
    assert {file.name: file.stat().st_mtime_ns for file in target.iterdir()} == before
    other = random_weights(seed=1)
    write_checkpoint(source, other)
    convert_checkpoint(source, target)
    assert (native_logits(target) - reference_logits(other, IDS)).abs().max() <= 1e-5
    assert sorted(path.name for path in tmp_path.iterdir()) == [".target.lock", "source", "target"]


@pytest.mark.parametrize("file", ["config.json", "model-00002-of-00003.safetensors", "tokenizer.json"])
def test_a_damaged_conversion_is_made_again(source: Path, tmp_path: Path, file: str) -> None:
    target = convert_checkpoint(source, tmp_path / "target")
    whole = (target / file).read_bytes()
    (target / file).write_bytes(whole[:-9])
    assert (convert_checkpoint(source, target) / file).read_bytes() == whole


def test_a_folder_of_something_else_is_not_replaced(source: Path, tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"target: is there and no conversion of ours"):
        convert_checkpoint(source, tmp_path / "target")
    assert (tmp_path / "target" / "thesis.txt").read_text() == "mine"


def test_an_interrupted_conversion_goes_on_where_it_stopped(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from alignkit.models import qwen_v1

    read: list[str] = []
    interrupts: list[BaseException] = [KeyboardInterrupt()]

    def failing(file: Path, name: str) -> torch.Tensor:
        read.append(file.name)
        if interrupts and file.name.startswith("model-00002") and read.count(file.name) == 2:
            raise interrupts.pop()
        return qwen_v1_weights.read_tensor(file, name)

    target, partial = tmp_path / "target", tmp_path / ".target.partial"
    monkeypatch.setattr(qwen_v1, "read_tensor", failing)
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(source, target)
    assert not target.exists()
    assert sorted(file.suffix for file in partial.iterdir()) == [".json", ".safetensors", ".unfinished"]
    with pytest.raises((OSError, ValueError)):
        native_logits(partial)
    read.clear()
    convert_checkpoint(source, target)
    assert set(read) == {"model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors"}
    assert (native_logits(target) - reference_logits(random_weights(), IDS)).abs().max() <= 1e-5
    assert not list(target.glob("*.unfinished"))
    # what a conversion of another source left is not continued
    shutil.copytree(target, partial)
    (partial / RECORD).write_text(json.dumps({"source": "of another"}))
    shutil.rmtree(target)
    read.clear()
    convert_checkpoint(source, target)
    assert len(set(read)) == 3


def convert_and_report(source: Path, target: Path, results: Any) -> None:
    results.put((convert_checkpoint(source, target) / "config.json").is_file())


def test_a_killed_conversion_leaves_nothing_that_loads_and_two_processes_share_one(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from alignkit.models import qwen_v1

    def stuck(file: Path, name: str) -> torch.Tensor:
        if file.name.startswith("model-00002"):
            time.sleep(60)
        return qwen_v1_weights.read_tensor(file, name)

    context = multiprocessing.get_context("fork")
    results, target, partial = context.Queue(), tmp_path / "target", tmp_path / ".target.partial"
    load_tokenizer(source)  # imports are paid before the fork
    monkeypatch.setattr(qwen_v1, "read_tensor", stuck)
    killed = context.Process(target=convert_and_report, args=(source, target, results))
    killed.start()
    deadline = time.monotonic() + 30
    while not any(partial.glob("*.unfinished")) or not any(partial.glob("*.safetensors")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    killed.kill()
    killed.join()
    assert not target.exists()
    with pytest.raises((OSError, ValueError)):
        native_logits(partial)
    monkeypatch.undo()
    both = [context.Process(target=convert_and_report, args=(source, target, results)) for _ in range(2)]
    for process in both:
        process.start()
    assert [results.get(timeout=30) for _ in both] == [True, True]
    for process in both:
        process.join()
    assert (native_logits(target) - reference_logits(random_weights(), IDS)).abs().max() <= 1e-5


# -- in the kit --------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(source: Path, cache: Path) -> ModelConfig:
    return ModelConfig(name="qwen7b", path=str(source), dtype="float32", eos_token="<|im_end|>", max_length=256)


def test_a_first_qwen_checkpoint_is_loaded_from_the_cache(model: ModelConfig, cache: Path) -> None:
    tokenizer = loading.load_tokenizer(model)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert not cache.exists()  # the tokenizer alone converts nothing
    base = loading.load_base(model)
    assert type(base).__name__ == "Qwen2ForCausalLM"
    with torch.no_grad():
        found = base(IDS[None].to(base.device)).logits[0].cpu()
    assert (found - reference_logits(random_weights(), IDS)).abs().max() <= 1e-4  # sdpa adds up in another order
    (converted,) = (folder for folder in cache.iterdir() if not folder.name.startswith("."))
    before = (converted / RECORD).stat().st_mtime_ns
    loading.load_base(model)
    assert (converted / RECORD).stat().st_mtime_ns == before


def test_a_first_qwen_checkpoint_takes_4_bits_and_an_adapter(model: ModelConfig, tmp_path: Path) -> None:
    from bitsandbytes.nn.modules import Linear4bit

    model = replace(model, quantization=Quantization.nf4)
    base = loading.load_base(model)
    assert sum(isinstance(module, Linear4bit) for module in base.modules()) == 7 * LAYERS
    policy = loading.new_adapter(base, LoraConfig(rank=4), ["q_proj", "v_proj", "down_proj"])
    loading.save_adapter(policy, tmp_path / "adapter", model)
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == model.path  # the original, not the cache
    loading.load_policy(model, str(tmp_path / "adapter"))


def test_rows_longer_than_the_revision_allows_are_refused(model: ModelConfig) -> None:
    for load in (loading.load_base, loading.load_tokenizer):
        with pytest.raises(UserError, match=r"model.max_length=2049: .* ends at 2048 tokens"):
            load(replace(model, max_length=2049))


def test_a_hub_name_is_downloaded_without_code(
    source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, model: ModelConfig
) -> None:
    import huggingface_hub
    from transformers import PreTrainedConfig

    asked: list[str] = []

    def snapshot_download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        assert (name, revision) == ("Some/Qwen-Chat", "v1")
        asked.extend(allow_patterns)
        return str(source)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    read_config = PreTrainedConfig.get_config_dict

    def get_config_dict(name: str, **keywords: Any) -> Any:
        return (OLD_CONFIG, {}) if name == "Some/Qwen-Chat" else read_config(name, **keywords)

    monkeypatch.setattr(PreTrainedConfig, "get_config_dict", get_config_dict)
    model = replace(model, path="Some/Qwen-Chat", revision="v1")
    assert loading.load_tokenizer(model).eos_token == "<|im_end|>"
    assert asked == ["qwen.tiktoken"]
    assert type(loading.load_base(model)).__name__ == "Qwen2ForCausalLM"
    assert not any(pattern.endswith((".py", "*")) for pattern in asked)
