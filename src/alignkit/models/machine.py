"""The machine that a model has to fit: memory, and how fast its vendor says it is."""

from __future__ import annotations

from dataclasses import dataclass

from alignkit.core.config import HardwareConfig
from alignkit.core.ranks import local_rank, local_world_size
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
    """What this process can use: the GPU that the configuration describes, else what is free on its own, else RAM.

    Processes that torchrun has started here have a GPU each, and share the RAM.
    """
    name, memory = hardware.name, None if hardware.memory_gib is None else round(hardware.memory_gib * GIB)
    if memory is None:
        free = free_gpu_memory()
        if free is None:
            import psutil

            memory = int(psutil.virtual_memory().total) // local_world_size()
            return Machine("this machine, without a GPU", memory, is_gpu=False)
        name, memory = free
    return Machine(name, memory, True, hardware.bf16_tflops, hardware.bandwidth_gb_per_s, hardware.gpus)


def free_gpu_memory() -> tuple[str, int] | None:
    """Name of this process's GPU and its free bytes, with those of the context that asking has just made; or None."""
    import torch

    if not torch.cuda.is_available():
        return None
    free, _ = torch.cuda.mem_get_info(local_rank())
    return torch.cuda.get_device_name(local_rank()), int(free) + CONTEXT_BYTES
