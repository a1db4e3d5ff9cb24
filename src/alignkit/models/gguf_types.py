"""The types of GGUF files that can be written here. Importing this loads no torch."""

from __future__ import annotations

from enum import Enum
from importlib.util import find_spec

from alignkit.core.errors import UserError


class GGUFType(Enum):
    """How matrices are stored, by ggml's name; vectors are always F32."""

    f32 = "F32"
    f16 = "F16"
    bf16 = "BF16"
    q8_0 = "Q8_0"


def gguf_type(name: str) -> GGUFType:
    """The type of that name in any case. Raises `UserError` that says how to get the others."""
    try:
        return GGUFType[name.lower()]
    except KeyError:
        known = ", ".join(each.name for each in GGUFType)
        hint = ""
        if name.upper().startswith(("Q", "IQ")):
            hint = (
                ". The gguf package does not quantise to it: write f16 or bf16, then run llama.cpp's own tool, "
                f"llama-quantize model-f16.gguf model-{name.lower()}.gguf {name.upper()}"
            )
        raise UserError(f"gguf_types: {name!r} is none of {known}{hint}") from None


def require_gguf() -> None:
    """Raise `UserError` where the package that writes the files is missing."""
    if find_spec("gguf") is None:
        raise UserError("formats: gguf needs the package of that name: pip install 'alignkit[gguf]'")
