"""PiSSA (Meng et al., 2024, arXiv 2404.02948): an adapter that starts as the base's largest singular directions.

They are taken out of the base while training: W = W_rest + s B0 A0. What was learned, s (B A - B0 A0), is saved as a
plain adapter of twice the rank, [B, -B0] [A; A0], that goes onto the base as it was; nobody who loads it has to know.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from alignkit.core.config import LoraConfig, LoraInit, ModelConfig, Quantization
from alignkit.core.errors import UserError

if TYPE_CHECKING:
    from peft import PeftModel

FOLDER = "pissa_initial"
"""PEFT names the adapter that it loads for the conversion after its folder, and knows PiSSA by this beginning."""


def check_init(lora: LoraConfig, model: ModelConfig) -> None:
    """Raise `UserError` where PiSSA cannot be saved as a plain adapter of the base."""
    if lora.init is not LoraInit.pissa:
        return
    if model.quantization is not Quantization.none:
        raise UserError(
            f"lora.init=pissa changes the base's weights, which model.quantization={model.quantization.name} holds "
            "rounded: give model.quantization=none or lora.init=default"
        )
    if lora.dora:
        raise UserError("lora.init=pissa is saved as a plain adapter, which lora.dora=true is not: give one of them")


def keep_initial(policy: PeftModel, folder: Path) -> None:
    """Write the adapter as it is before training; `save_adapter` needs it afterwards.

    A continued run finds what the interrupted one wrote, and must have split the base the same way. Raises `UserError`
    when it has not.
    """
    import torch
    from peft import get_peft_model_state_dict, load_peft_weights

    if (folder / "adapter_model.safetensors").exists():
        now = get_peft_model_state_dict(policy, save_embedding_layers=False)
        then = load_peft_weights(str(folder), device="cpu")
        if now.keys() != then.keys() or any(not torch.equal(then[name], now[name].cpu()) for name in then):
            raise UserError(
                f"lora.init=pissa: this machine splits the base differently than the one on which {folder} was "
                "written. Continue there, or begin anew with force=true."
            )
        return
    partial = folder.with_name(f".{folder.name}.partial")
    policy.save_pretrained(str(partial), selected_adapters=["default"], save_embedding_layers=False)
    partial.rename(folder)
