"""The machine that a model has to fit: memory, and how fast its vendor says it is."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from alignkit.core.config import HardwareConfig
from alignkit.models.memory import CONTEXT_BYTES, Memory

GIB = 2**30


@dataclass(frozen=True)
class Machine:
    """One GPU, or a machine without."""

    name: str
    memory_bytes: int
    is_gpu: bool
    bf16_tflops: float | None = None
    bandwidth_gb_per_s: float | None = None
    gpus: int = 1

    def needed(self, memory: Memory) -> int:
        """What a peak takes here, allowances included."""
        return memory.on_gpu if self.is_gpu else memory.on_cpu

    def spare(self, memory: Memory) -> int:
        """Bytes to spare; negative when it does not fit."""
        return self.memory_bytes - self.needed(memory)


def find_machine(hardware: HardwareConfig) -> Machine:
    """The GPU that the configuration describes, else what is free on the one that is here, else this machine's RAM."""
    name, memory = hardware.name, None if hardware.memory_gib is None else round(hardware.memory_gib * GIB)
    if memory is None:
        free = free_gpu_memory()
        if free is None:
            import psutil

            return Machine("this machine, without a GPU", int(psutil.virtual_memory().total), is_gpu=False)
        name, memory = free
    return Machine(name, memory, True, hardware.bf16_tflops, hardware.bandwidth_gb_per_s, hardware.gpus)


def free_gpu_memory() -> tuple[str, int] | None:
    """Name of the current GPU and its free bytes, with those of the context that asking has just made; None without."""
    import torch

    if not torch.cuda.is_available():
        return None
    free, _ = torch.cuda.mem_get_info()
    return torch.cuda.get_device_name(), int(free) + CONTEXT_BYTES


def visible_gpus() -> int:
    """GPUs that this process would use. Torch is asked only where it has been loaded: it takes a second to load."""
    torch = sys.modules.get("torch")
    return int(torch.cuda.device_count()) if torch is not None else 0
