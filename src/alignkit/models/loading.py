"""Loading: tokenizer, base model (plain or 4-bit), adapter.

Everything that decides how weights come into memory is here, so that training, sampling and scoring hold them alike:
no remote code, no pickled weights, trainable weights in float32, and an adapter only on the base it was trained on.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import torch

from alignkit.core.config import LoraConfig, LoraInit, ModelConfig, Quantization
from alignkit.core.errors import UserError, first_line
from alignkit.core.ranks import local_rank
from alignkit.models import qwen_v1

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
BASE_RECORD = "base.json"
"""Beside an adapter: which base it was trained on, how that base was held, and a fingerprint of its weights."""

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of a missing kernel that nothing here needs
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


# -- where and how -----------------------------------------------------------------------------------------------------


def embedded_model_dir() -> Path:
    """The folder of the tiny model that ships with the package."""
    return Path(__file__).resolve().parent / "tiny" / "weights"


def model_source(model: ModelConfig) -> str:
    """What `from_pretrained` is given: the embedded model's folder, a local folder, or a hub name.

    For a first-Qwen checkpoint that is its conversion in the cache, made now if it is not there yet. Raises `UserError`
    when there is no model there.
    """
    found = _find(model)
    return str(qwen_v1.cached_conversion(found.source, model.revision)) if found.is_first_qwen else found.source


class _Found(NamedTuple):
    """A model's folder or hub name, and what its config.json says of it."""

    source: str
    is_first_qwen: bool
    """Whether it is of the first Qwen architecture (`model_type: qwen`)."""
    embedding_rows: int | None


def _find(model: ModelConfig) -> _Found:
    """Where the model is. Raises `UserError` when there is none, or none of that context length."""
    from transformers import PreTrainedConfig

    source = str(embedded_model_dir()) if model.path == "embedded" else model.path
    try:
        config, _ = PreTrainedConfig.get_config_dict(source, revision=model.revision)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.path={model.path}: no model could be read there ({first_line(error)}). "
            "Give 'embedded', a folder with config.json and safetensors weights, or a hub name."
        ) from error
    is_first_qwen = config.get("model_type") == "qwen"
    if is_first_qwen and model.max_length > (config.get("seq_length") or math.inf):
        raise UserError(
            f"model.max_length={model.max_length}: the context of {model.path} ends at {config['seq_length']} tokens."
        )
    return _Found(source, is_first_qwen, config.get("vocab_size"))


def resolve_dtype(name: str) -> torch.dtype:
    """The dtype of `model.dtype`; `auto` is bfloat16 on a GPU that has it, else float32."""
    if name == "auto":
        return torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32
    if name not in _DTYPES:
        raise UserError(f"model.dtype={name}: choose auto, {', '.join(_DTYPES)}")
    return _DTYPES[name]


def resolve_storage(name: str) -> torch.dtype:
    """The dtype of `model.quant_storage`."""
    dtypes = {"uint8": torch.uint8, **_DTYPES}
    if name not in dtypes:
        raise UserError(f"model.quant_storage={name}: choose {', '.join(dtypes)}")
    return dtypes[name]


# -- loading -----------------------------------------------------------------------------------------------------------


def load_tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer with the chat template, end-of-turn and padding token that the configuration names.

    Raises `UserError` when one of them is missing, and when the model has no embedding for one of the tokenizer's ids.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    found = _find(model)
    if found.is_first_qwen:
        folder = qwen_v1.local_checkpoint(found.source, model.revision, vocabulary_only=True)
        tokenizer: Any = qwen_v1.load_tokenizer(folder)
    else:
        tokenizer = AutoTokenizer.from_pretrained(found.source, revision=model.revision, trust_remote_code=False)
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    vocabulary = tokenizer.get_vocab()
    if found.embedding_rows is not None and found.embedding_rows <= max(vocabulary.values()):
        raise UserError(
            f"model.path={model.path}: its tokenizer has ids up to {max(vocabulary.values())}, but the model has "
            f"embeddings for {found.embedding_rows} ids only. They do not belong together: give the model its own "
            "tokenizer files, or resize its embeddings and train them first."
        )
    for key in ("eos_token", "pad_token", "document_end"):
        token = getattr(model, key)
        if token is None:
            continue
        if token not in vocabulary:
            raise UserError(f"model.{key}={token}: not in the vocabulary of {model.path}")
        if key != "document_end":
            setattr(tokenizer, key, token)
    if model.chat_template is not None:
        tokenizer.chat_template = _read_template(model.chat_template)
    if tokenizer.chat_template is None:
        raise UserError(f"model.chat_template: {model.path} has no chat template; name a .jinja file with one")
    if tokenizer.pad_token is None:
        raise UserError(f"model.pad_token: {model.path} has no padding token; name one of its unused special tokens")
    return tokenizer


def load_base(model: ModelConfig) -> PreTrainedModel:
    """The base model, frozen, in evaluation mode, on the GPU if there is one.

    Only safetensors weights are read (`.bin` files are pickles) and remote code is never run.
    """
    from transformers import AutoModelForCausalLM, PreTrainedModel
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    # peft still reads a property that transformers is renaming; a user can do nothing about it
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
    source, dtype = model_source(model), resolve_dtype(model.dtype)
    keywords: dict[str, Any] = {"dtype": dtype, "attn_implementation": model.attn, "revision": model.revision}
    if torch.cuda.is_available():
        keywords["device_map"] = {"": local_rank()}
    if model.quantization is Quantization.nf4:
        keywords["quantization_config"] = _nf4(dtype, resolve_storage(model.quant_storage))
    try:
        base = AutoModelForCausalLM.from_pretrained(source, use_safetensors=True, trust_remote_code=False, **keywords)
    except (OSError, ValueError) as error:
        raise UserError(f"model.path={model.path}: the model could not be loaded ({first_line(error)})") from error
    assert isinstance(base, PreTrainedModel)
    if model.quantization is Quantization.nf4:
        _keep_4bit_weights_trainable(base)
    base.requires_grad_(False)
    base.eval()
    return base


@overload
def load_policy(model: ModelConfig, adapter: None, *, trainable: bool = False) -> PreTrainedModel: ...
@overload
def load_policy(model: ModelConfig, adapter: str, *, trainable: bool = False) -> PeftModel: ...
@overload
def load_policy(model: ModelConfig, adapter: str | None, *, trainable: bool = False) -> PreTrainedModel | PeftModel: ...
def load_policy(model: ModelConfig, adapter: str | None, *, trainable: bool = False) -> PreTrainedModel | PeftModel:
    """The base with an adapter named "default", or the base alone when `adapter` is None.

    Adapter weights are float32 whatever the base's dtype. Raises `UserError` for a missing adapter and for one that was
    trained on another base.
    """
    if adapter is None:
        return load_base(model)
    check_adapter(adapter, model)
    folder, base = Path(adapter), load_base(model)
    _refuse_changed_base(folder, model, base)

    from peft import PeftModel

    try:
        policy = PeftModel.from_pretrained(base, str(folder), is_trainable=trainable)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"adapter {folder} does not fit {model.path} ({first_line(error)})") from error
    _refuse_partial_adapter(folder, policy)
    policy.peft_config["default"].base_model_name_or_path = base.name_or_path
    return policy


def add_adapter(policy: PeftModel, adapter: str, model: ModelConfig, name: str) -> None:
    """Load one more adapter onto the base of a policy, under a name; the one that is active stays so.

    Raises `UserError` as `load_policy` does.
    """
    check_adapter(adapter, model)
    _refuse_changed_base(Path(adapter), model, policy.get_base_model())
    try:
        policy.load_adapter(adapter, adapter_name=name)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"adapter {adapter} does not fit {model.path} ({first_line(error)})") from error


def check_adapter(adapter: str, model: ModelConfig) -> None:
    """Raise `UserError` when there is no adapter, or one that names another base, before anything big is loaded."""
    folder = Path(adapter)
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / name).exists():
            raise UserError(f"adapter {folder}: there is no {name}. Give the adapter/ folder of a training stage.")
    _refuse_damaged(folder)
    config = _read_json(folder / ADAPTER_CONFIG)
    if str(config.get("init_lora_weights")).startswith("pissa"):
        raise UserError(f"adapter {folder} holds PiSSA's directions, which are no longer in the base that it names.")
    trained_on = config.get("base_model_name_or_path")
    if trained_on != model.path:
        raise UserError(
            f"adapter {folder} was trained on the base '{trained_on}', not on '{model.path}'. "
            "Choose that base with model=... or model.path=..., or give another adapter."
        )


def new_adapter(base: PreTrainedModel, lora: LoraConfig, targets: list[str]) -> PeftModel:
    """A new low-rank adapter on a base, trainable, float32: A random (seed torch before), B zero.

    With `lora.init=pissa` A and B are instead the largest singular directions of each weight, which are taken out of
    the base (Meng et al., 2024, arXiv 2404.02948): see `models.pissa` for how such an adapter is saved. `targets` are
    the names of linear layers, or `["all-linear"]`: all but the output layer.
    """
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    config = PeftLoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        init_lora_weights="pissa" if lora.init is LoraInit.pissa else True,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        base_model_name_or_path=base.name_or_path,
    )
    try:
        policy = get_peft_model(base, config)
    except ValueError as error:
        raise UserError(f"model.lora_targets={targets}: {first_line(error)}") from error
    return policy


def save_adapter(policy: PeftModel, folder: Path, model: ModelConfig, initial: Path | None = None) -> None:
    """Write the "default" adapter: adapter_config.json, adapter_model.safetensors and the record of its base.

    The same weights give the same bytes: target modules, a set in memory, are written in order. `initial` is where
    `models.pissa` keeps the adapter that training began with; what is written is then the difference to it.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="PiSSA changes the base weights")  # the conversion mends just that
        policy.save_pretrained(
            str(folder),
            selected_adapters=["default"],
            save_embedding_layers=False,
            path_initial_model_for_weight_conversion=None if initial is None else str(initial),
        )
    (folder / "README.md").unlink(missing_ok=True)  # an unfilled template
    config = _read_json(folder / ADAPTER_CONFIG)
    config["base_model_name_or_path"] = model.path
    config["revision"] = model.revision
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()
    _write_json(folder / ADAPTER_CONFIG, config)
    record = {
        "path": model.path,
        "revision": model.revision,
        "quantization": model.quantization.name,
        "fingerprint": base_fingerprint(policy.get_base_model()),
    }
    _write_json(folder / BASE_RECORD, record)


def base_fingerprint(base: torch.nn.Module) -> str:
    """A hash that tells two bases apart: 64 rows of the input embedding, rounded to bfloat16.

    Embeddings are never quantised, and bfloat16 is the coarsest dtype that a base is held in, so the fingerprint is the
    same however the base was loaded. Adapters do not touch it.
    """
    rows = base.get_input_embeddings().weight[:64]  # type: ignore[operator]
    return hashlib.sha256(rows.detach().to("cpu", torch.bfloat16).view(torch.uint8).numpy().tobytes()).hexdigest()


# -- inside ------------------------------------------------------------------------------------------------------------


def _nf4(dtype: torch.dtype, storage: torch.dtype) -> BitsAndBytesConfig:
    """4-bit NormalFloat with double quantisation (Dettmers et al., 2023, arXiv 2305.14314)."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=storage,
    )


def _keep_4bit_weights_trainable(base: torch.nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights on CPUs with AVX512-BF16.

    There the first forward pass in evaluation mode repacks them for inference for good, and later training passes give
    wrong adapter gradients without an error.
    """
    from bitsandbytes.nn.modules import Linear4bit

    for module in base.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _refuse_damaged(folder: Path) -> None:
    """Raise `UserError` for weights that are cut short or no safetensors file at all."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{folder / ADAPTER_WEIGHTS}: damaged ({first_line(error)}). Copy or train it again."
        ) from error


def _refuse_changed_base(folder: Path, model: ModelConfig, base: torch.nn.Module) -> None:
    """Raise `UserError` when the base has the right name but other weights than the adapter was trained on."""
    if not (folder / BASE_RECORD).exists():
        return  # not written by alignkit: the name is all there is
    if _read_json(folder / BASE_RECORD)["fingerprint"] != base_fingerprint(base):
        raise UserError(
            f"adapter {folder} was trained on other weights than '{model.path}' has now. Train the adapter again."
        )


def _refuse_partial_adapter(folder: Path, policy: PeftModel) -> None:
    """Raise `UserError` when the file lacks matrices that the base needs; PEFT only warns and leaves them random."""
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
        saved = set(file.keys())
    needed = set(get_peft_model_state_dict(policy, save_embedding_layers=False))
    if saved != needed:
        raise UserError(
            f"adapter {folder} does not fit the base: {len(needed - saved)} of its matrices are missing and "
            f"{len(saved - needed)} have no place. It was trained on a base of another shape."
        )


def _read_template(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"model.chat_template={path}: {error.strerror}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    return value


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")
