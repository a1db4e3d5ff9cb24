"""Memory and speed of training a 7B model on one GPU, beside what preflight predicts: unattended, under ten minutes.

    python benchmarks/gpu/measure.py                 # needs one GPU and nothing else: no download, no data
    python benchmarks/gpu/measure.py --cpu-smoke     # the same code on a toy shape, to see that it runs

Random weights of Qwen-7B's shape with 4, 8 and all 32 layers are made and quantised (NF4) on the GPU, layer by layer.
Adapters are trained on random tokens by the very functions that the stages call. For each case the peak that torch
allocated and reserved stands beside the prediction, and tokens a second beside the estimated range. A last case runs in
a process that may allocate as much as a 24 GB card has: a length that is predicted to fit must run, one that is
predicted to need a third more must not. That emulates the capacity of such a card, not its speed or its kernels.

Nobody has run this on a GPU yet; results go to benchmarks/results/<date>-<device>.json and are to be committed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from alignkit.core.app import load_config
from alignkit.core.artifact import Artifact
from alignkit.core.config import HardwareConfig, LoraConfig, ModelConfig, Quantization, Tracker, TrainConfig
from alignkit.models.jobs import DPO, REWARD, SFT, Job
from alignkit.models.loading import load_tokenizer, new_adapter
from alignkit.models.machine import Machine, find_machine
from alignkit.models.remedies import largest_length
from alignkit.models.shapes import ALL_LINEAR, KNOWN, Shape
from alignkit.models.speed import training_speed

BUDGET_SECONDS = 500
"""No case begins later than this."""

CAPACITY = (24564 - 600) * 2**20
"""What torch may allocate on a 24 GB card: all of it but the context."""

OPTIONS = {"4090": "rtx4090_24gb", "3090": "rtx3090_24gb", "H200": "h200", "H100": "h100_80gb", "A100": "a100_80gb"}
"""Part of a device's name -> its option of conf/hardware, for the estimate of speed."""

SHORT, LONG = 2, 5
"""Optimizer steps of the two runs of a case: their difference has no start in it."""

TOY = Shape(2368, 64, 2, 4, 2, 128, 16, context=512)


@dataclass(frozen=True)
class Case:
    """A stage on a base of so many layers, with rows of one length."""

    stage: str
    layers: int
    length: int


def main(arguments: list[str] | None = None) -> int:
    """Measure everything, print the table, write the file."""
    parser = argparse.ArgumentParser(description="measured beside predicted: memory and speed on one GPU")
    parser.add_argument("--cpu-smoke", action="store_true", help="run on a toy shape without a GPU")
    parser.add_argument("--capped", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parents[1] / "results")
    options = parser.parse_args(arguments)
    if not options.cpu_smoke and not torch.cuda.is_available():
        print("there is no GPU here; --cpu-smoke runs the same code on a toy shape", file=sys.stderr)
        return 2
    shape = TOY if options.cpu_smoke else KNOWN["Qwen/Qwen-7B-Chat"]
    if options.capped:
        print(json.dumps(measure_capped(shape)))
        return 0
    began = time.monotonic()
    machine = describe_machine()
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name(),
        "torch": torch.__version__,
        "shape": dataclasses.asdict(shape),
        "context_bytes": context_bytes(),
        "cases": measure_all(cases(shape), shape, machine, began),
        "capped": capped(shape),
        "seconds": round(time.monotonic() - began, 1),
    }
    options.output.mkdir(parents=True, exist_ok=True)
    name = f"{report['date'][:10]}-{device_name().replace(' ', '-').lower()}.json"
    path = options.output / name
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print_table(report)
    print(f"-> {path}")
    return 0


def cases(shape: Shape) -> list[Case]:
    """Few layers first, so that something is known early; every stage at two lengths."""
    if shape is TOY:
        return [Case(stage, shape.layers, 64) for stage in (SFT, REWARD, DPO)]
    depths = [(layers, length) for layers in (4, 8) for length in (1024, 4096)]
    depths += [(shape.layers, length) for length in (1024, 2048, 4096)]
    return [Case(stage, layers, length) for layers, length in depths for stage in (SFT, REWARD, DPO)]


def measure_all(todo: list[Case], shape: Shape, machine: Machine | None, began: float) -> list[dict[str, Any]]:
    """Every case; those that would begin too late are told as left out."""
    found: list[dict[str, Any]] = []
    base: Any = None
    folder: tempfile.TemporaryDirectory[str] | None = None
    for case in todo:
        if time.monotonic() - began > BUDGET_SECONDS:
            found.append({**dataclasses.asdict(case), "left_out": "no time left"})
            continue
        if base is None or base.config.num_hidden_layers != case.layers:
            base = None
            _empty_cache()
            base = random_base(replace(shape, layers=case.layers))
            folder = folder or tempfile.TemporaryDirectory()
            base.config.save_pretrained(folder.name)
        assert folder is not None
        found.append(measure(case, base, Path(folder.name), machine))
        print(json.dumps(found[-1]), flush=True)
    return found


def measure(case: Case, base: Any, folder: Path, machine: Machine | None) -> dict[str, Any]:
    """Peak memory and speed of one case, beside what was predicted."""
    job = make_job(case, folder)
    estimate = training_speed(job, machine, case.length) if machine else None
    line = {
        **dataclasses.asdict(case),
        "predicted_bytes": job.memory().peak,
        "parts": job.memory().parts,
        "estimated_tokens_per_second": [estimate.low, estimate.high] if estimate else None,
    }
    try:
        short = train(job, base, SHORT)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        long = train(job, base, LONG)
    except torch.OutOfMemoryError as error:
        return {**line, "out_of_memory": str(error).splitlines()[0]}
    finally:
        _empty_cache()
    tokens = job.sequences * case.length * (LONG - SHORT)
    line["tokens_per_second"] = round(tokens / max(long - short, 1e-3), 1)
    if torch.cuda.is_available():
        line["allocated_bytes"] = torch.cuda.max_memory_allocated()
        line["reserved_bytes"] = torch.cuda.max_memory_reserved()
        line["ratio"] = round(line["predicted_bytes"] / line["allocated_bytes"], 4)
    return line


def make_job(case: Case, folder: Path) -> Job:
    """What a case does, in preflight's terms. `folder` has the base's config.json, which is where its shape is read."""
    model = ModelConfig(
        name="random",
        path=str(folder),
        quantization=Quantization.nf4,
        dtype="bfloat16" if torch.cuda.is_available() else "float32",
        lora_targets=list(ALL_LINEAR),
        max_length=case.length,
    )
    training = TrainConfig(
        learning_rate=1e-4,
        batch_size=1,
        warmup_share=0.0,
        optimizer="adamw_torch_fused" if torch.cuda.is_available() else "adamw_torch",
        gradient_checkpointing=True,
        logging_steps=1,
        save_steps=1000,
        tracker=Tracker.none,
    )
    pairs = 1 if case.stage == SFT else 2
    lora = LoraConfig(rank=64 if torch.cuda.is_available() else 4, dropout=0.0)
    return Job(case.stage, model, case.length, lora, training, sequences_per_row=pairs)


def train(job: Job, base: Any, steps: int) -> float:
    """Train a new adapter for so many steps on random tokens, as the stage would; returns the seconds."""
    from alignkit.models.reward_model import RewardModel
    from alignkit.models.value_head import ValueHeadModel
    from alignkit.training.preference import train_preference
    from alignkit.training.preference_losses import Objective as PreferenceObjective
    from alignkit.training.reward import Objective, train_reward_model
    from alignkit.training.supervised import train_supervised

    rows = steps * job.train.batch_size
    settings = replace(job.train, max_steps=steps)
    tokenizer = load_tokenizer(ModelConfig(name="tiny", path="embedded"))
    torch.manual_seed(1)
    policy = new_adapter(base, job.lora, job.model.lora_targets)
    try:
        with tempfile.TemporaryDirectory() as folder:
            config = {"force": False, "model": {"path": job.model.path}}
            artifact = Artifact(job.stage, Path(folder), config, [], "", "")
            if job.stage == SFT:
                train_supervised(policy, tokenizer, examples(job, rows), settings, 1, artifact)
            elif job.stage == DPO:
                objective = PreferenceObjective("sft_adapter", beta=0.1)
                train_preference(policy, tokenizer, pairs(job, rows), objective, settings, 1, artifact)
            else:
                reward_model = RewardModel(ValueHeadModel(policy), tokenizer, job.model)
                train_reward_model(reward_model, groups(job, rows), Objective(), settings, 1, artifact)
    finally:
        policy.unload()
    return float(artifact.metrics["training_seconds"])


# -- random rows -------------------------------------------------------------------------------------------------------


def tokens(count: int) -> list[int]:
    """Random ids that every vocabulary here has."""
    return [random.randrange(1000) for _ in range(count)]


def examples(job: Job, rows: int) -> list[Any]:
    """Rows for sft of the job's length; half of each is learned."""
    from alignkit.data.chat import IGNORED, EncodedExample

    learned = job.longest // 2
    drawn = [tokens(job.longest) for _ in range(rows)]
    return [EncodedExample(ids, [IGNORED] * (job.longest - learned) + ids[-learned:]) for ids in drawn]


def pairs(job: Job, rows: int) -> list[Any]:
    """Pairs for dpo, each side of the job's length."""
    from alignkit.training.preference import EncodedPair

    half = job.longest // 2
    return [EncodedPair(tokens(job.longest - half), tokens(half), tokens(half)) for _ in range(rows)]


def groups(job: Job, rows: int) -> list[Any]:
    """Prompts with two answers for the reward model, too long to share a sequence: two of the job's length."""
    from alignkit.models.value_head import PromptGroup
    from alignkit.training.reward import EncodedGroup
    from alignkit.training.reward_data import Comparison

    half = job.longest // 2
    found = []
    for place in range(rows):
        row = PromptGroup(tuple(tokens(job.longest - half)), (tuple(tokens(half)), tuple(tokens(half))))
        found.append(EncodedGroup("random", str(place), row, (Comparison(0, 1, 1.0),), (1.0, 0.0)))
    return found


# -- the base ----------------------------------------------------------------------------------------------------------


def random_base(shape: Shape) -> Any:
    """A frozen Qwen2 of random weights with its linear layers in NF4; one layer at a time is held unquantised."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = Qwen2Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=1 << 16,
        tie_word_embeddings=False,
        use_cache=False,
    )
    config._attn_implementation, config.name_or_path = "sdpa", "random"
    with torch.device("meta"):
        model: Any = Qwen2ForCausalLM(config).to(dtype)
    for module in (model.model.embed_tokens, model.lm_head, model.model.norm):
        _fill(module, device)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    for layer in model.model.layers:
        _fill(layer, device)
        for name, linear in [(name, each) for name, each in layer.named_modules() if isinstance(each, torch.nn.Linear)]:
            owner, _, last = name.rpartition(".")
            setattr(layer.get_submodule(owner), last, _quantized(linear, device, dtype))
    model.is_loaded_in_4bit = True
    model.requires_grad_(False)
    return model.eval()


@torch.no_grad()
def _fill(module: torch.nn.Module, device: torch.device) -> None:
    module.to_empty(device=device)
    for name, parameter in module.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            parameter.normal_(std=0.02)


def _quantized(linear: torch.nn.Linear, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    nf4: dict[str, Any] = {"compress_statistics": True, "quant_type": "nf4"}
    sizes = linear.in_features, linear.out_features, linear.bias is not None
    layer = Linear4bit(*sizes, compute_dtype=dtype, device="meta", **nf4)
    weight = Params4bit(linear.weight.data, requires_grad=False, **nf4)
    layer.weight = weight.to(device)
    layer.bias = linear.bias
    layer.support_avx512bf16_for_cpu = False  # it would repack weights for inference, for good
    return layer


# -- as on a 24 GB card ------------------------------------------------------------------------------------------------


def capped(shape: Shape) -> dict[str, Any]:
    """`measure_capped` in a process of its own, since the cap must stand before the first allocation."""
    if not torch.cuda.is_available():
        return measure_capped(shape)
    _empty_cache()
    done = subprocess.run([sys.executable, __file__, "--capped"], capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1:]}
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def measure_capped(shape: Shape) -> dict[str, Any]:
    """Sft at nine tenths of the longest rows that are predicted to fit, and at a third more than all of them."""
    card = Machine("24 GB card", CAPACITY, True)
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, CAPACITY / total))
    base = random_base(shape)
    with tempfile.TemporaryDirectory() as folder:
        base.config.save_pretrained(folder)
        job = make_job(Case(SFT, shape.layers, 1024), Path(folder))
        longest = largest_length(job, card) or 128
        if not torch.cuda.is_available():
            longest = 128  # a toy fits any card
        short, long = 9 * longest // 10, 4 * longest // 3
        fits, not_fits = (measure(Case(SFT, shape.layers, each), base, Path(folder), None) for each in (short, long))
    return {"capacity_bytes": CAPACITY, "longest_predicted": longest, "must_run": fits, "must_not_run": not_fits}


# -- the machine -------------------------------------------------------------------------------------------------------


def device_name() -> str:
    """The GPU's name, or that there is none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def describe_machine() -> Machine | None:
    """The card with its stated speed, where conf/hardware knows it."""
    option = next((option for part, option in OPTIONS.items() if part in device_name()), None)
    if option is None:
        return None
    hardware: HardwareConfig = load_config("sft", [f"hardware={option}"]).hardware
    return find_machine(hardware)


def context_bytes() -> int | None:
    """What is taken on the GPU outside torch's allocator: the context, and other processes."""
    if not torch.cuda.is_available():
        return None
    torch.ones(1, device="cuda")
    free, total = torch.cuda.mem_get_info()
    return int(total - free - torch.cuda.memory_reserved())


def _empty_cache() -> None:
    import gc

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def print_table(report: dict[str, Any]) -> None:
    """Measured beside predicted, in GiB and tokens a second."""
    gib = 2**30
    print(f"{report['device']}, torch {report['torch']}, context {report['context_bytes']}")
    print(
        f"{'stage':8s} {'layers':>6s} {'length':>6s} {'predicted':>9s} {'measured':>9s} {'ratio':>6s} {'tokens/s':>9s}"
    )
    for each in report["cases"]:
        measured, estimate = each.get("allocated_bytes"), each.get("estimated_tokens_per_second")
        print(
            f"{each['stage']:8s} {each['layers']:6d} {each['length']:6d} "
            f"{each.get('predicted_bytes', 0) / gib:9.2f} {f'{measured / gib:.2f}' if measured else '-':>9s} "
            f"{each.get('ratio', '-'):>6} {each.get('tokens_per_second', '-'):>9} "
            f"{f'estimated {estimate[0]:.0f} - {estimate[1]:.0f}' if estimate else ''}"
        )


if __name__ == "__main__":
    sys.exit(main())
