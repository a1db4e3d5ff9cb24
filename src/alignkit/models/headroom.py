"""The check that every training stage makes before it loads weights: is this known to fail, and will it fit?"""

from __future__ import annotations

import logging

from alignkit.core.artifact import Artifact
from alignkit.core.config import HardwareConfig
from alignkit.core.errors import UserError
from alignkit.models.jobs import Job
from alignkit.models.machine import GIB, Machine, find_machine
from alignkit.models.memory import Memory
from alignkit.models.refusals import refuse_known_problems
from alignkit.models.remedies import find_remedies

LOG = logging.getLogger("alignkit")


def require_memory(job: Job, hardware: HardwareConfig, artifact: Artifact) -> None:
    """Before weights are loaded: record the predicted peak, and stop when it will not fit.

    What is recorded is what torch's allocator would count, without allowances, so that it can be compared with the peak
    that is measured. A model whose shape is not known is not estimated, nor are weights that several processes divide,
    and the log says so. Raises `UserError` with the settings that would fit; with hardware.enforce=false that is only
    logged.
    """
    refuse_known_problems(job)
    if job.strategy.divides_weights:
        LOG.info("%s: no estimate of memory: %s divides the weights among processes", job.name, job.strategy.name)
        return
    try:
        memory = job.memory()
    except UserError as error:
        LOG.info("%s: no estimate of memory: %s", job.name, error)
        return
    artifact.metrics["predicted_memory_bytes"] = memory.peak
    machine = find_machine(hardware)
    if machine.spare(memory) >= 0:
        return
    remedies = find_remedies(job, machine)
    advice = f"Estimated to fit: {' '.join(remedies)}" if remedies else "No setting that is known here makes it fit"
    message = f"{verdict(job, machine, memory)} {advice}. hardware.enforce=false tries it all the same."
    if hardware.enforce:
        raise UserError(message)
    LOG.warning("%s", message)


def verdict(job: Job, machine: Machine, memory: Memory) -> str:
    """That a job does not fit, in one sentence."""
    return (
        f"{job.name}: {job.model.name} with {job.sequences} sequences of {job.longest} tokens needs about "
        f"{machine.needed(memory) / GIB:.1f} GiB by estimate, and {machine.name} has {machine.memory_bytes / GIB:.1f}."
    )
