"""Configuration dataclasses that stages share.

Hydra fills them from `conf/`; below `core.app` there are only these, never a `DictConfig`. The line under a field says
what it means. Fields are `str`, numbers and enums, so that every value survives a trip through YAML.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar, Optional

from alignkit.core.errors import UserError

MISSING: Any = "???"
"""A value that must be given. The mark is omegaconf's, which is not imported here: that takes a tenth of a second."""

# All configurations write Optional[...]; omegaconf takes `... | None` just as well.
# ruff: noqa: UP045


class Quantization(Enum):
    """How the base model's weights are held: as they are, or in 4 bits (NF4, double quantisation)."""

    none = "none"
    nf4 = "nf4"


class Strategy(Enum):
    """What several GPUs divide among themselves besides the rows.

    `none`: nothing, and one process may train alone. `ddp`: nothing, and there must be several processes. `zero2`: the
    optimizer's state and gradients (DeepSpeed). `zero3`: the weights as well (DeepSpeed). `fsdp`: likewise (PyTorch).
    """

    none = "none"
    ddp = "ddp"
    zero2 = "zero2"
    zero3 = "zero3"
    fsdp = "fsdp"

    @property
    def divides_weights(self) -> bool:
        """Whether no process holds a whole weight while it trains."""
        return self in (Strategy.zero3, Strategy.fsdp)


class LoraInit(Enum):
    """Where a new adapter starts: B = 0 (adds nothing), or the base's largest singular directions (PiSSA)."""

    default = "default"
    pissa = "pissa"


class Tracker(Enum):
    """Where the figures of a training go besides loss.jsonl."""

    none = "none"
    tensorboard = "tensorboard"
    wandb = "wandb"
    trackio = "trackio"
    mlflow = "mlflow"


class Keep(Enum):
    """Which weights a training ends with: those of its last step, or those with the lowest held-out loss."""

    last = "last"
    best = "best"


class Score(Enum):
    """What tells models apart on held-out questions: exact match, word F1, or the teacher's grade."""

    exact_match = "exact_match"
    token_f1 = "token_f1"
    judge = "judge"


class TeacherMode(Enum):
    """Who answers: the embedded rule-based teacher of the closed world, or an OpenAI-compatible server.

    A server is asked request by request, or through its Batch API, which takes hours and costs less.
    """

    scripted = "scripted"
    openai = "openai"
    batch = "batch"


class TeacherApi(Enum):
    """What a server is sent: chat messages, or one prompt text for models without a chat template."""

    chat = "chat"
    completions = "completions"


class Structured(Enum):
    """How a server is held to the JSON that is wanted.

    By its schema, by asking for some JSON object, or by the words of the prompt alone. `auto` begins with the first and
    goes down for a server that refuses or ignores it.
    """

    auto = "auto"
    json_schema = "json_schema"
    json_object = "json_object"
    text = "text"


@dataclass
class StageConfig:
    """What every stage's configuration has."""

    inputs: ClassVar[tuple[str, ...]] = ()
    """Keys (dotted) that hold input paths: they must exist, are hashed, and decide what "up to date" means."""
    incidental: ClassVar[tuple[str, ...]] = (
        "run",
        "name",
        "output_dir",
        "force",
        "resume",
        "hardware",
        "teacher.store",
        "teacher.concurrency",
        "teacher.timeout_seconds",
        "teacher.requests_per_minute",
        "teacher.tokens_per_minute",
        "teacher.structured",
        "teacher.allow_http",
        "teacher.prices",
        "teacher.max_cost",
        "teacher.retry_failed",
        "retrieval.batch_size",
        "train.tracker",
        "train.divergence",
        "dry_run",
    )
    """Keys (dotted) that say where and how fast, but not what: finished work stays up to date when they change."""

    run: str = "default"
    """Name of the run: outputs go to runs/<run>/<name>/."""
    name: str = MISSING
    """Name of the output folder: the stage's own name, unless a pipeline runs the stage twice."""
    output_dir: str = "runs/${run}/${name}"
    """Where the outputs, manifest.json, config.yaml and log.txt go."""
    seed: int = 1
    force: bool = False
    """Do the work again although the output is up to date."""


@dataclass
class RowsConfig:
    """Which rows to read."""

    path: str = MISSING
    """A file (JSONL, JSON array, Parquet, Arrow) or a `datasets` name."""
    skip: int = 0
    """Leave out this many rows at the beginning (two stages can share one file)."""
    limit: Optional[int] = None
    """Read at most this many rows."""


@dataclass
class ModelConfig:
    """A base model and how to hold it."""

    name: str = MISSING
    path: str = MISSING
    """`embedded`, a local folder or a hub name."""
    revision: Optional[str] = None
    chat_template: Optional[str] = None
    """A .jinja file that replaces the tokenizer's own template."""
    quantization: Quantization = Quantization.none
    quant_storage: str = "uint8"
    """Dtype that 4-bit weights are packed in; zero3 and fsdp divide weights only if it is model.dtype."""
    dtype: str = "auto"
    """float32, bfloat16, float16, or auto: bfloat16 on a GPU that has it, else float32."""
    attn: str = "sdpa"
    lora_targets: list[str] = field(default_factory=lambda: ["all-linear"])
    eos_token: Optional[str] = None
    """End-of-turn token, when it is not the tokenizer's eos token."""
    pad_token: Optional[str] = None
    document_end: Optional[str] = None
    """End-of-document token, which closes documents that are learned whole; none: the tokenizer's eos token."""
    max_length: int = 1024
    """Longest row, in tokens; longer ones are dropped with a reason, never cut (documents: see `overlong` of sft)."""


@dataclass
class LoraConfig:
    """Low-rank adapters (Hu et al., 2021, arXiv 2106.09685): W + (alpha / rank) B A."""

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.05
    rslora: bool = False
    """Scale by alpha / sqrt(rank), so that a larger rank does not learn more slowly (arXiv 2312.03732)."""
    dora: bool = False
    """Learn each output's magnitude apart from its direction (arXiv 2402.09353)."""
    init: LoraInit = LoraInit.default
    """Where a new adapter starts; pissa (arXiv 2404.02948) learns faster, and is saved as a plain adapter of twice the
    rank."""

    def __post_init__(self) -> None:
        """Raise `UserError` for numbers that mean nothing."""
        _require(f"lora.rank={self.rank}", self.rank >= 1, "at least 1")
        _require(f"lora.alpha={self.alpha}", self.alpha >= 1, "at least 1")
        _require(f"lora.dropout={self.dropout}", 0 <= self.dropout < 1, "from 0 up to, but not, 1")


@dataclass
class TrainConfig:
    """How to train. Batch sizes count rows; one optimizer step sees batch_size * gradient_accumulation rows.

    Several processes share these rows, and none reads more than batch_size at once.
    """

    learning_rate: float = 2e-4
    epochs: float = 3.0
    max_steps: int = -1
    """Stop after this many optimizer steps; -1: as many as `epochs` says."""
    batch_size: int = 8
    gradient_accumulation: int = 1
    max_batch_tokens: int = 2048
    """Tokens, padding included, that go through the model at once (sft): a larger batch goes in parts, and learns the
    same."""
    warmup_share: float = 0.05
    scheduler: str = "cosine"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    optimizer: str = "adamw_torch"
    gradient_checkpointing: bool = False
    logging_steps: int = 5
    save_steps: int = 50
    """Write a checkpoint to resume from every so many optimizer steps."""
    neftune_alpha: Optional[float] = None
    """Add noise of this size to the input embeddings while training, 5 to 15 (arXiv 2310.05914); none: no noise."""
    divergence: Optional[float] = None
    """Stop when the loss is more than this many times the first one logged; none: only when it is no number."""
    eval_steps: int = 0
    """Measure the held-out loss every so many steps, rounded up to a log line; 0: only after the last step."""
    keep: Keep = Keep.last
    """Which weights the training ends with."""
    patience: int = 0
    """Stop after so many measurements in a row without a lower held-out loss; 0: never."""
    sample_prompts: int = 0
    """At each measurement let the model answer so many of the held-out prompts, greedily, into samples.jsonl."""
    packing: bool = False
    """Put several rows into one sequence of at most model.max_length tokens; a batch then counts such sequences."""
    padding_free: bool = False
    """Lay the rows of a batch end to end instead of padding them to the longest."""
    tracker: Tracker = Tracker.tensorboard
    """Where figures go besides loss.jsonl; tensorboard writes event files into the run folder, nothing leaves the
    machine."""

    def __post_init__(self) -> None:
        """Raise `UserError` for numbers that mean nothing."""
        _require(f"train.max_steps={self.max_steps}", self.max_steps >= 1 or self.max_steps == -1, "at least 1, or -1")
        for name in ("batch_size", "gradient_accumulation", "max_batch_tokens", "logging_steps", "save_steps"):
            value = getattr(self, name)
            _require(f"train.{name}={value}", value >= 1, "at least 1")
        for name in ("epochs", "divergence"):
            value = getattr(self, name)
            _require(f"train.{name}={value}", value is None or value > 0, "above 0")
        counts = ("eval_steps", "patience", "sample_prompts")
        for name in ("learning_rate", "weight_decay", "max_grad_norm", "neftune_alpha", *counts):
            value = getattr(self, name)
            _require(f"train.{name}={value}", value is None or value >= 0, "0 or more")
        _require(f"train.warmup_share={self.warmup_share}", 0 <= self.warmup_share <= 1, "from 0 to 1")


def _require(setting: str, holds: bool, wanted: str) -> None:
    if not holds:
        raise UserError(f"{setting}: must be {wanted}")


@dataclass
class HardwareConfig:
    """The GPU that the work is meant for: what `hardware=` chooses. Without one, the machine's own memory counts."""

    name: str = "here"
    memory_gib: Optional[float] = None
    """Memory of one GPU as torch sees it; none: what is free on the GPU that is here, or the RAM without one."""
    bf16_tflops: Optional[float] = None
    """Dense bfloat16 peak that its vendor states, in 10^12 operations a second; none: no estimate of speed."""
    bandwidth_gb_per_s: Optional[float] = None
    """Memory bandwidth that its vendor states."""
    gpus: int = 1
    """How many train side by side, for preflight's estimates; a training counts the processes that torchrun starts."""
    enforce: bool = True
    """Stop before loading a model that is estimated not to fit; false only warns."""

    def __post_init__(self) -> None:
        """Raise `UserError` for numbers that mean nothing."""
        _require(f"hardware.gpus={self.gpus}", self.gpus >= 1, "at least 1")
        for name in ("memory_gib", "bf16_tflops", "bandwidth_gb_per_s"):
            value = getattr(self, name)
            _require(f"hardware.{name}={value}", value is None or value > 0, "above 0")


@dataclass
class DistributedConfig:
    """How the processes that torchrun starts, one a GPU, share the work of training. See docs/several_gpus.md."""

    strategy: Strategy = Strategy.none
    offload: bool = False
    """Keep in main memory what zero2, zero3 and fsdp divide among the GPUs: slower, for what does not fit otherwise."""


@dataclass
class SamplingConfig:
    """How completions are drawn. For each completion temperature and top_p are drawn uniformly from their range."""

    n: int = 4
    """Completions a prompt."""
    temperature: list[float] = field(default_factory=lambda: [0.7, 1.0])
    """[lowest, highest]; [0, 0] decodes greedily."""
    top_p: list[float] = field(default_factory=lambda: [0.8, 1.0])
    max_new_tokens: int = 256
    batch_size: int = 64
    """Sequences generated at once."""


@dataclass
class PricesConfig:
    """What a million tokens cost. A price without a value is not known: costs are then "n/a"."""

    input_per_million: Optional[float] = None
    output_per_million: Optional[float] = None
    as_of: Optional[str] = None
    """The day on which the server's owner asked for these prices, like 2026-11-20."""
    currency: str = "USD"


@dataclass
class TeacherConfig:
    """Who expands, answers and grades."""

    mode: TeacherMode = TeacherMode.scripted
    base_url: Optional[str] = None
    """Of an OpenAI-compatible server, like https://host/v1; none: OpenAI's own."""
    model: str = MISSING
    api_key_env: str = "OPENAI_API_KEY"
    """NAME of the environment variable that holds the key, never the key itself; empty when the server needs none."""
    api: TeacherApi = TeacherApi.chat
    """Chat messages, or one prompt text."""
    structured: Structured = Structured.auto
    """How the server is held to the JSON that is wanted."""
    temperature: float = 0.7
    max_tokens: int = 1024
    concurrency: int = 8
    """Most requests under way at once; fewer when the server says that it is too much."""
    requests_per_minute: Optional[float] = None
    """Send no more than this, evenly spaced; none: no limit but the server's."""
    tokens_per_minute: Optional[float] = None
    """Of prompts and answers together."""
    timeout_seconds: float = 60.0
    """Deadline of one attempt at a request as a whole; after it the attempt is repeated."""
    store: str = "runs/${run}/teacher.sqlite"
    """Response store: a request that was answered once is never sent again."""
    allow_http: bool = False
    """Send key and documents over plain http to another machine."""
    prices: PricesConfig = field(default_factory=PricesConfig)
    max_cost: Optional[float] = None
    """Send nothing more once this much is spent, in the currency of the prices; none: no limit."""
    retry_failed: bool = False
    """Ask again what the response store holds as failed."""
    mistake_rate: float = 0.15
    """Of the scripted teacher only: the share of the answers it writes that is wrong on purpose."""


@dataclass
class TeacherStageConfig(StageConfig):
    """What the configuration of every stage that asks a teacher has besides."""

    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    max_failure_rate: float = 0.2
    """Share of the requests that may end without a usable answer; above it the stage fails, after writing."""
    dry_run: bool = False
    """Only say what would be asked: requests, tokens, what the response store already holds, and the price."""
