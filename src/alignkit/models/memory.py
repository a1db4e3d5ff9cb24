"""How much memory training and sampling take, in bytes, by a closed form; nothing is loaded and torch is not imported.

H is the hidden size, I the MLP's, Q and K the widths of queries and keys, L the layers, V the vocabulary, P the
adapter's weights, T = sequences x padded length the tokens of a micro-batch, and b the bytes of a number of the base
(2 for bfloat16). What is resident (weights, adapters, optimizer) adds to the largest of the moments of a step:

    peak = resident + max(end of the forward pass, backward through the first layer, optimizer step)

The coefficients of `layer_bytes` and of the full logits were fitted to 40 traces of optimizer steps of 7B Qwen2 models
with fake tensors, and are above each of those by at most 3.5 %. The traces have never met a GPU, and neither has this.
What a function derives from code instead of traces, it says.
docs/preflight.md has the whole story.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from alignkit.models.shapes import Shape

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""A 4-bit weight: half a byte, one byte of scale for 64 weights, four bytes for 256 scales (bitsandbytes 0.50,
double quantisation; Dettmers et al., 2023, arXiv 2305.14314, section 3)."""

HEAD_TOKENS, HEAD_VOCABULARY = 4096, 32768
"""A tile of TRL 1.16's output layer, which never holds the logits of a whole batch (`trl/kernels`)."""

FULL_LOGITS_BYTES = 12.15
"""For each token and word of the vocabulary: 16-bit logits, their softmax and gradient in 32 bits. Fitted."""

FRAGMENTATION_SHARE = 0.06
"""Of the allocated memory: what torch's allocator holds besides. Assumed, never measured."""

CONTEXT_BYTES = 600_000_000
"""What the CUDA context takes outside torch's allocator. Assumed, never measured."""

PROCESS_BYTES = 1_000_000_000
"""What Python and the libraries take on a machine without GPU. Assumed."""

_OPTIMIZERS = {
    "adamw_torch": (8.0, 4.0),
    "adamw_torch_fused": (8.0, 0.0),
    "adamw_bnb_8bit": (2 + 8 / 256, 0.0),
    "adamw_8bit": (2 + 8 / 256, 0.0),
    "paged_adamw_8bit": (2 + 8 / 256, 0.0),
    "paged_adamw": (8.0, 0.0),
    "paged_adamw_32bit": (8.0, 0.0),
    "sgd": (0.0, 0.0),
}
"""Bytes of state for each trained number, and what a step needs for a moment. torch's default AdamW works on all
matrices at once and holds a second moment's square root (torch docs, AdamW, `foreach`); bitsandbytes' 8-bit states have
a scale for 256 numbers. Paged states take as much, but may move to the host's memory when the card is full."""

UNKNOWN_OPTIMIZER = (8.0, 4.0)
"""For any other: as torch's AdamW."""


@dataclass(frozen=True)
class Memory:
    """Bytes by part at the moment of the peak; what torch's allocator counts (`max_memory_allocated`)."""

    parts: dict[str, int] = field(default_factory=dict)
    moment: str = ""
    """When the peak is reached."""

    @property
    def peak(self) -> int:
        """All parts together."""
        return sum(self.parts.values())

    @property
    def on_gpu(self) -> int:
        """What the card must have: the peak with the two allowances."""
        return round(self.peak * (1 + FRAGMENTATION_SHARE)) + CONTEXT_BYTES

    @property
    def on_cpu(self) -> int:
        """What the machine must have without a GPU."""
        return self.peak + PROCESS_BYTES


@dataclass(frozen=True)
class Base:
    """A frozen base in memory: its shape, whether its linear layers are held in 4 bits, and b of everything else."""

    shape: Shape
    quantized: bool
    number_bytes: int = 2

    @property
    def parts(self) -> dict[str, int]:
        """The weights: linear layers, and embeddings with the output layer."""
        return {"base weights": linear_bytes(self), "embeddings and head": vocabulary_bytes(self)}


@dataclass(frozen=True)
class Adapters:
    """Low-rank adapters on `targets`. Ours are float32 (`number_bytes` 4) over any base; TRL's own are bfloat16."""

    rank: int
    targets: tuple[str, ...] = ("all-linear",)
    dropout: float = 0.0
    number_bytes: int = 4


@dataclass(frozen=True)
class Step:
    """One optimizer step: micro-batches of `sequences`, each padded to `length` tokens."""

    sequences: int
    length: int
    optimizer: str = "adamw_torch"
    checkpointing: bool = True
    """Gradient checkpointing: keep each layer's input alone, and compute the layer again on the way back."""
    accumulating: bool = False
    """Several micro-batches a step: gradients of the ones before are there all the time."""
    full_logits: bool = False
    free_mask: bool = False
    """Attention masked by a matrix (the reward model: answers do not see each other) rather than by position."""
    eager: bool = False
    reference_copies: int = 0
    """Frozen copies of the adapter (DPO's reference, when it is an adapter)."""
    value_head: bool = False
    """No output layer is computed: one number a sequence is read off the last hidden state."""

    @property
    def tokens(self) -> int:
        """T."""
        return self.sequences * self.length


# -- what stays --------------------------------------------------------------------------------------------------------


def linear_bytes(base: Base) -> int:
    """Linear layers: 0.516 bytes a weight in 4 bits, else b."""
    return round(base.shape.linear_parameters * (NF4_BYTES if base.quantized else base.number_bytes))


def vocabulary_bytes(base: Base) -> int:
    """Embedding and output layer, b V H each, never quantised; one of them when they are tied."""
    return base.shape.vocabulary_parameters * base.number_bytes * (1 if base.shape.tied else 2)


def optimizer_bytes(parameters: int, optimizer: str) -> tuple[int, int]:
    """State of the optimizer for so many trained numbers, and what a step needs besides for a moment."""
    state, moment = _OPTIMIZERS.get(optimizer, UNKNOWN_OPTIMIZER)
    return round(parameters * state), round(parameters * moment)


# -- what comes and goes -----------------------------------------------------------------------------------------------


def checkpoint_bytes(base: Base, tokens: int) -> int:
    """With gradient checkpointing: the input of every layer, b L T H."""
    return base.number_bytes * base.shape.layers * tokens * base.shape.hidden


def layer_bytes(base: Base, tokens: int) -> int:
    """One layer computed again and differentiated: T (28.7 H + 12.8 I) at b = 2, and the weight that is dequantised.

    Fitted to traces of 4-bit layers with adapters, flash attention and no dropout.
    """
    shape = base.shape
    activations = tokens * (28.7 * shape.hidden + 12.8 * shape.intermediate) * base.number_bytes / 2
    return round(activations) + _dequantized(base)


def kept_layer_bytes(base: Base, tokens: int) -> int:
    """What one layer keeps for the way back without checkpointing: T (12 H + 10 Q + 8 I) at b = 2.

    Derived from the tensors that autograd saves: the norms' inputs in 32 bits (8 H) and their outputs (4 H); queries,
    and keys and values repeated for every head (6 Q); attention's output and its copy (4 Q); the MLP's four (8 I).
    Agrees with the one trace there is within 1.5 %.
    """
    shape = base.shape
    width = 12 * shape.hidden + 10 * shape.query_width + 8 * shape.intermediate
    return round(tokens * width * base.number_bytes / 2)


def dropout_bytes(base: Base, adapters: Adapters, tokens: int) -> int:
    """Adapter dropout in one layer: a dropped copy (b) and a mask (1) of every adapted layer's input. Derived."""
    if not adapters.dropout:
        return 0
    return tokens * (base.number_bytes + 1) * sum(inputs for inputs, _ in base.shape.targeted(adapters.targets))


def attention_bytes(base: Base, step: Step) -> int:
    """What attention takes beyond flash attention: a free mask as matrix, and eager attention's scores. Derived.

    A mask is 1 byte and b as it is added, for each pair of places; eager scores are b twice and 4 for each head.
    """
    pairs = step.sequences * step.length**2
    mask = pairs * (1 + base.number_bytes) if step.free_mask else 0
    return mask + (pairs * base.shape.heads * (2 * base.number_bytes + 4) if step.eager else 0)


def head_bytes(base: Base, step: Step) -> int:
    """The output layer and the loss: tiles of the vocabulary (TRL 1.16), or all logits at once.

    Tiles: min(T, 4096) x 32768 x 2 + 8 T H. All at once: 12.15 V T + 4 T H.
    """
    shape, tokens = base.shape, step.tokens
    if step.value_head:
        return 0
    if step.full_logits:
        return round(FULL_LOGITS_BYTES * shape.vocabulary * tokens + 4 * tokens * shape.hidden)
    tile = min(tokens, HEAD_TOKENS) * min(HEAD_VOCABULARY, shape.vocabulary) * base.number_bytes
    return tile + 4 * base.number_bytes * tokens * shape.hidden


def kv_cache_bytes(base: Base, sequences: int, length: int) -> int:
    """Keys and values of every layer while text is generated: 2 b L K for each token of each sequence."""
    return 2 * base.number_bytes * base.shape.layers * base.shape.kv_width * sequences * length


def _dequantized(base: Base) -> int:
    """The largest weight of a layer, as it is multiplied: b H max(I, H)."""
    return base.number_bytes * base.shape.hidden * max(base.shape.intermediate, base.shape.hidden) * base.quantized


# -- together ----------------------------------------------------------------------------------------------------------


def training_memory(base: Base, adapters: Adapters, step: Step) -> Memory:
    """The peak of training adapters over a frozen base."""
    parameters = base.shape.adapter_parameters(adapters.rank, adapters.targets)
    weights, gradients = parameters * adapters.number_bytes, parameters * adapters.number_bytes
    state, moment = optimizer_bytes(parameters, step.optimizer)
    resident = {
        **base.parts,
        "adapters": weights * (1 + step.reference_copies),
        "optimizer": state,
    }
    if step.accumulating:
        resident["gradients"] = gradients
    # Autocast keeps a copy of each 32-bit adapter in the base's dtype until the forward pass ends.
    casts = parameters * base.number_bytes if adapters.number_bytes > base.number_bytes else 0
    one_layer = layer_bytes(base, step.tokens) + dropout_bytes(base, adapters, step.tokens)
    kept = _kept(base, adapters, step)
    last = {} if step.accumulating else {"gradients": gradients}
    moments = {
        "end of the forward pass": {"activations": kept + attention_bytes(base, step), "logits": head_bytes(base, step)}
        | ({"16-bit adapters": casts} if casts else {}),
        "backward pass": {"activations": kept + attention_bytes(base, step), "one layer": one_layer},
        "end of the backward pass": {"one layer": one_layer, **last},
        "optimizer step": {"optimizer's own": moment, **last},
    }
    if not step.checkpointing:
        moments["backward pass"]["one layer"] = _dequantized(base)
    name = max(moments, key=lambda each: sum(moments[each].values()))
    return Memory({**resident, **moments[name]}, name)


def _kept(base: Base, adapters: Adapters, step: Step) -> int:
    """What the forward pass leaves for the backward pass."""
    if step.checkpointing:
        return checkpoint_bytes(base, step.tokens)
    one = kept_layer_bytes(base, step.tokens) + dropout_bytes(base, adapters, step.tokens)
    return base.shape.layers * one


def sampling_memory(
    base: Base, adapters: Adapters, *, count: int, sequences: int, length: int, prompt_tokens: int, score_tokens: int
) -> Memory:
    """The peak of generating with one of `count` adapters on one base, and of scoring what was generated.

    `sequences` of at most `length` tokens grow at once, after reading `prompt_tokens` of prompts; the reward model
    reads `score_tokens` at once. Derived from `generation.hf`, not traced: the cache, a layer of it copied where
    sequences part; 30 bytes a word of the vocabulary for drawing a token; and forward passes without gradients, whose
    widest layer holds T (16 H + 12 I) while adapters compute in 32 bits.
    """
    shape = base.shape
    cache = kv_cache_bytes(base, sequences, length)
    cache += 2 * cache // shape.layers
    weights = count * shape.adapter_parameters(adapters.rank, adapters.targets) * adapters.number_bytes

    def forward(tokens: int) -> int:
        return tokens * (16 * shape.hidden + 12 * shape.intermediate) * base.number_bytes // 2 + _dequantized(base)

    moments = {
        "generating": {"keys and values": cache, "logits": 30 * shape.vocabulary * sequences, "one layer": forward(0)},
        "reading prompts": {
            "keys and values": kv_cache_bytes(base, 1, prompt_tokens),
            "one layer": forward(prompt_tokens),
        },
        "scoring": {"one layer": forward(score_tokens), "activations": score_tokens * length * (1 + base.number_bytes)},
    }
    name = max(moments, key=lambda each: sum(moments[each].values()))
    return Memory({**base.parts, "adapters": weights, **moments[name]}, name)
