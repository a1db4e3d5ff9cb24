"""Is an exported model the model that was exported? It is read back by other code, and has to say the same.

What makes exports turn to gibberish is checked one by one: the weights (a tensor under another's name, q and k in the
wrong order, too coarse a rounding), the tokens (another split, lost merges, special tokens read as text), the chat
template, and the token at which a turn ends.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alignkit.core.config import SamplingConfig
from alignkit.core.errors import first_line
from alignkit.core.records import ChatExample, Message
from alignkit.data.chat import (
    IGNORED,
    EncodedExample,
    encode_example,
    encode_prompt,
    end_of_turn_id,
)
from alignkit.evaluation.divergence import divergence, learned_logits, within
from alignkit.generation.hf import decode, draw
from alignkit.models.gguf_types import GGUFType

NEW_TOKENS = 24
"""Length of the continuations that are compared."""

KL_BOUNDS = {GGUFType.f32: 1e-8, GGUFType.f16: 1e-4, GGUFType.bf16: 1e-2, GGUFType.q8_0: 2e-2}
"""Most that a file may diverge from the merged model: mean KL a token, in nats. f32 is equal but for rounding."""
OTHER_KERNELS = 1e-2
"""More is allowed where another program computes: llama.cpp holds keys and values in f16, torch a 7B in bf16."""
SAME_CONTINUATION = (GGUFType.f32, GGUFType.f16)
"""Types with which the most likely tokens must be the same, but where two were as good as equal; others only report."""

CONVERSATIONS = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("用一句话介绍一下长城。", "长城是中国古代修建的一道雄伟的防御工程。"),
    ("Write a Python function that squares a number.", "def square(x):\n    return x ** 2  # 3.0 -> 9.0\n"),
    ("Notes: Bakoco makes clocks.\n\nWhat does Bakoco make?", "The product of Bakoco is clocks."),
)
"""Where no rows are given."""

TEXTS = (
    "Hello, the cat sat on the mat; the other cat didn't.  Two spaces, 1234567 and 3.14!\n\n\n   indented\r\n",
    "你好！很高兴为你提供帮助。１２３，naïve café Ångström 🙂👩‍👩‍👧",
    "def f(x: int) -> dict[str, int]:\n\treturn {'a': x ** 2, \"b\": x // 3}  # TODO(me): <|not a token|>\n",
)


class Finding(NamedTuple):
    """The outcome of one comparison, as `artifact.check` takes it."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Questions:
    """What a model is asked: rows whose every token it predicts, prompts that it continues, texts to tokenise."""

    rows: list[EncodedExample]
    prompts: list[list[int]]
    texts: list[str]


@dataclass(frozen=True)
class Reading:
    """What a model says: `logits` [tokens, vocabulary] on the rows, and its greedy continuations of the prompts.

    `margins` are, for each token of each continuation, how far its logit stood above the next one's.
    """

    logits: Tensor
    continuations: list[list[int]]
    margins: list[list[float]]


# -- asking ------------------------------------------------------------------------------------------------------------


def conversations() -> list[ChatExample]:
    """The built-in prompts and answers."""
    return [
        ChatExample(
            id=f"conversation-{number}",
            prompt=[Message(role="user", content=question)],
            completion=[Message(role="assistant", content=answer)],
        )
        for number, (question, answer) in enumerate(CONVERSATIONS, start=1)
    ]


def questions(tokenizer: Any, examples: Sequence[ChatExample], max_length: int) -> Questions:
    """Fixed texts, every special token, and examples as the chat template renders them."""
    specials = "".join(str(token) for token in tokenizer.added_tokens_decoder.values())
    texts = [*TEXTS, f"a{specials}b {specials}"]
    encoded = [tokenizer.encode(text, add_special_tokens=False)[:max_length] for text in TEXTS]
    prompts = []
    for example in examples:
        row = encode_example(tokenizer, example.prompt, example.completion, max_length, tools=example.tools)
        if isinstance(row, EncodedExample):
            encoded.append(row.input_ids)
            prompts.append(encode_prompt(tokenizer, example.prompt, example.tools))
            texts.append(tokenizer.decode(row.input_ids))
    return Questions(within([EncodedExample(ids, ids) for ids in encoded]), prompts, texts)


def read(model: Any, asked: Questions, tokenizer: Any) -> Reading:
    """Have a model predict and continue."""
    greedy = SamplingConfig(n=1, temperature=[0.0, 0.0], top_p=[1.0, 1.0], max_new_tokens=NEW_TOKENS)
    draws = draw(len(asked.prompts), greedy, seed=0)
    ends = {"end_id": end_of_turn_id(tokenizer), "pad_id": tokenizer.pad_token_id}
    continuations = decode(model, asked.prompts, draws, **ends)
    margins = []
    for prompt, written in zip(asked.prompts, continuations, strict=True):
        row = EncodedExample([*prompt, *written], [IGNORED] * len(prompt) + written)
        best, second = learned_logits(model, [row]).topk(2).values.T
        margins.append((best - second).tolist())
    return Reading(learned_logits(model, asked.rows), continuations, margins)


# -- comparing ---------------------------------------------------------------------------------------------------------


def compare_file(
    path: Path, kind: GGUFType, tokenizer: Any, asked: Questions, reference: Reading, dtype: torch.dtype
) -> tuple[list[Finding], dict[str, float]]:
    """Read a GGUF file back with transformers, and with llama.cpp where it is installed; findings and figures.

    transformers computes in `dtype`, like the reference.
    """
    from alignkit.evaluation import llama_cpp

    label = f"gguf_{kind.name}"
    try:
        other_tokenizer, model = load_gguf(path, dtype)
    except Exception as error:  # of a reader that is not ours, and may not know the architecture
        return [Finding(f"{label}_readable", False, f"transformers cannot read it ({first_line(error)})")], {}
    findings = compare_tokenizers(label, tokenizer, other_tokenizer, asked)
    found, figures = compare_readings(label, kind, reference, read(model, asked, tokenizer), asked)
    findings += found
    if llama_cpp.is_installed():
        reading, more = llama_cpp.ask(path, asked, tokenizer, f"{label}_llama_cpp")
        findings += more
        if reading is not None:
            found, others = compare_readings(f"{label}_llama_cpp", kind, reference, reading, asked, same_program=False)
            findings += found
            figures |= {f"llama_cpp_{name}": value for name, value in others.items()}
    return findings, figures


def compare_tokenizers(label: str, tokenizer: Any, other: Any, asked: Questions) -> list[Finding]:
    """Same ids, same template, same end of turn."""
    wrong = [text for text in asked.texts if tokenizer.encode(text) != other.encode(text)]
    same_template = other.chat_template == tokenizer.chat_template
    return [
        texts_finding(label, asked, wrong),
        Finding(f"{label}_chat_template", same_template, "the same text" if same_template else "another, or none"),
        end_finding(label, end_of_turn_id(tokenizer), other.eos_token_id),
    ]


def texts_finding(label: str, asked: Questions, wrong: Sequence[str]) -> Finding:
    """Whether all texts get the same ids; `wrong` are those that do not."""
    detail = f"{len(asked.texts)} texts get the same ids"
    if wrong:
        first = wrong[0][:40]
        detail = (
            f"{len(wrong)} of {len(asked.texts)} texts get other ids, {first!r} first: another split, merges or types"
        )
    return Finding(f"{label}_token_ids", not wrong, detail)


def end_finding(label: str, end_id: int, other: int | None) -> Finding:
    """Whether a turn ends at the same token."""
    detail = f"token {end_id}" if other == end_id else f"token {other} instead of {end_id}: it would not stop"
    return Finding(f"{label}_end_of_turn", other == end_id, detail)


def compare_readings(
    label: str, kind: GGUFType, reference: Reading, found: Reading, asked: Questions, *, same_program: bool = True
) -> tuple[list[Finding], dict[str, float]]:
    """Distributions within the bound of the type, and the same continuations where they have to be; figures beside."""
    apart = divergence(reference.logits, found.logits, asked.rows)
    bound = KL_BOUNDS[kind] + (0 if same_program else OTHER_KERNELS)
    close = apart.mean_kl <= bound  # False for NaN, too
    cause = "" if close else ": a tensor in the wrong place or order, or weights that the type cannot hold"
    share, margin = same_tokens(reference, found)
    tie = close and margin <= 2 * apart.max_logit_difference  # what moves each of two logits by that turns them round
    remark = "" if share == 1 else f"; where they part, the two best logits were {margin:.2g} apart"
    must = same_program and kind in SAME_CONTINUATION
    findings = [
        Finding(f"{label}_logits", close, f"{apart}; bound {bound:g}{cause}"),
        Finding(
            f"{label}_greedy",
            share == 1 or tie or not must,
            f"{share:.1%} of the tokens of {len(asked.prompts)} greedy continuations are the same{remark}",
        ),
    ]
    return findings, {**vars(apart), "greedy_tokens_equal": share}


def same_tokens(reference: Reading, found: Reading) -> tuple[float, float]:
    """Share of the reference's tokens up to which the other continues alike, and its widest margin where they part."""
    same, total, widest = 0, 0, 0.0
    for mine, other, margins in zip(reference.continuations, found.continuations, reference.margins, strict=True):
        alike = next(
            (step for step, pair in enumerate(zip(mine, other, strict=False)) if pair[0] != pair[1]), len(mine)
        )
        same, total = same + alike, total + len(mine)
        if alike < len(mine):
            widest = max(widest, margins[alike])
    return (same / total if total else 1.0), widest


def load_gguf(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """Tokenizer and model as transformers' own GGUF reader makes them, on the GPU if there is one.

    The file is read from a folder of its own: tokenizer files beside it would be believed in its place.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Its progress bar cannot be turned off.
    with tempfile.TemporaryDirectory() as folder, redirect_stderr(io.StringIO()):
        (Path(folder) / "model.gguf").symlink_to(path.resolve())
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")
        model: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=dtype)
    return tokenizer, model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


@torch.inference_mode()
def classifier_scores(folder: Path, dialogues: Sequence[Sequence[Message]], side: str) -> tuple[list[float], str]:
    """Logits of a classifier with one label and the dtype that it was saved in.

    Loaded and asked as anybody would: rendered by its own chat template, in one batch padded on the given `side`.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype="auto").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side=side)
    plain = [[turn.model_dump() for turn in dialogue] for dialogue in dialogues]
    texts = tokenizer.apply_chat_template(plain, tokenize=False)
    batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    return model(**batch).logits[:, 0].float().tolist(), str(model.dtype)


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text alone, its special tokens read as such."""
    return list(tokenizer.encode(text, add_special_tokens=False))
