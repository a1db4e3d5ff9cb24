"""What to change so that a job fits: tried in order of what it costs, and verified by the same estimate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from alignkit.core.config import Quantization
from alignkit.models.jobs import SAMPLING, Job
from alignkit.models.machine import Machine
from alignkit.models.refusals import known_problems

LENGTH_STEP = 64
"""Lengths are tried in multiples of this."""

SHORTEST = 128
"""No shorter rows are proposed."""

Change = Callable[[Job], Job | None]
"""The job with one setting changed, or None when there is nothing to change."""


def find_remedies(job: Job, machine: Machine) -> list[str]:
    """Overrides with which the job fits; empty when it fits as it is, or when nothing known here makes it fit.

    First what costs time alone (checkpointing, smaller micro-batches with the same rows an optimizer step), then what
    changes numbers a little (8-bit optimizer, 4-bit base), last what loses rows (max_length). Nothing is proposed that
    is not needed: a change is taken back when the job fits without it.
    """
    if machine.spare(job.memory()) >= 0:
        return []
    changed = job
    for change in _changes(job):
        while machine.spare(changed.memory()) < 0:
            following = change(changed)
            if following is None or known_problems(following):
                break
            changed = following
    if machine.spare(changed.memory()) < 0:
        longest = largest_length(changed, machine)
        if longest is None:
            return []
        changed = _shortened(changed, longest)
    return overrides(job, _without_needless(job, changed, machine))


def largest_length(job: Job, machine: Machine) -> int | None:
    """The largest multiple of 64 for model.max_length with which the job fits, at most the model's context.

    None when not even `SHORTEST` tokens fit.
    """
    context = job.base.shape.context or 1 << 20
    lowest, highest = 0, context // LENGTH_STEP
    while lowest < highest:  # memory grows with the length
        middle = (lowest + highest + 1) // 2
        if machine.spare(replace(job, longest=middle * LENGTH_STEP).memory()) >= 0:
            lowest = middle
        else:
            highest = middle - 1
    return lowest * LENGTH_STEP if lowest * LENGTH_STEP >= SHORTEST else None


def overrides(before: Job, after: Job) -> list[str]:
    """The settings that differ, as overrides."""
    values = (
        ("train.gradient_checkpointing", *(job.train.gradient_checkpointing for job in (before, after))),
        ("train.max_batch_tokens", *(job.train.max_batch_tokens for job in (before, after))),
        ("train.batch_size", *(job.train.batch_size for job in (before, after))),
        ("train.gradient_accumulation", *(job.train.gradient_accumulation for job in (before, after))),
        (before.at_once_key, *(job.sampling.batch_size for job in (before, after))),
        ("train.optimizer", *(job.train.optimizer for job in (before, after))),
        ("model.quantization", *(job.model.quantization.name for job in (before, after))),
        ("model.max_length", *(job.model.max_length for job in (before, after))),
    )
    return [f"{key}={str(new).lower() if isinstance(new, bool) else new}" for key, old, new in values if old != new]


def _changes(job: Job) -> Iterator[Change]:
    if job.stage == SAMPLING:
        yield _fewer_at_once
    else:
        yield _checkpointing
        yield _smaller_parts
        yield _smaller_batch
        yield _small_optimizer
    yield _four_bits


def _checkpointing(job: Job) -> Job | None:
    if job.train.gradient_checkpointing:
        return None
    return replace(job, train=replace(job.train, gradient_checkpointing=True))


def _smaller_parts(job: Job) -> Job | None:
    """Half the rows that go through the model at once; the batch stays."""
    if not job.in_parts or job.sequences == 1:
        return None
    return replace(job, train=replace(job.train, max_batch_tokens=job.sequences // 2 * job.longest))


def _smaller_batch(job: Job) -> Job | None:
    """Half the micro-batch and twice as many: the rows of an optimizer step stay."""
    if job.train.batch_size % 2:
        return None
    halved = replace(
        job.train,
        batch_size=job.train.batch_size // 2,
        gradient_accumulation=job.train.gradient_accumulation * 2,
    )
    return replace(job, train=halved)


def _fewer_at_once(job: Job) -> Job | None:
    size = max(job.sampling.n, job.sequences // 2)
    return (
        None
        if job.at_once_key is None or size >= job.sequences
        else replace(job, sampling=replace(job.sampling, batch_size=size))
    )


def _small_optimizer(job: Job) -> Job | None:
    if job.train.optimizer == "paged_adamw_8bit":
        return None
    return replace(job, train=replace(job.train, optimizer="paged_adamw_8bit"))


def _four_bits(job: Job) -> Job | None:
    if job.model.quantization is Quantization.nf4:
        return None
    return replace(job, model=replace(job.model, quantization=Quantization.nf4))


def _shortened(job: Job, longest: int) -> Job:
    return replace(job, longest=min(job.longest, longest), model=replace(job.model, max_length=longest))


def _without_needless(job: Job, changed: Job, machine: Machine) -> Job:
    """Take back what a later change has made needless: the 8-bit optimizer, smaller parts, halvings of the batch."""
    if job.stage == SAMPLING:
        return changed
    as_before = replace(changed, train=replace(changed.train, optimizer=job.train.optimizer))
    if machine.spare(as_before.memory()) >= 0:
        changed = as_before
    whole = replace(changed, train=replace(changed.train, max_batch_tokens=job.train.max_batch_tokens))
    if machine.spare(whole.memory()) >= 0:
        changed = whole
    size, rows = job.train.batch_size, job.train.batch_size * job.train.gradient_accumulation
    while size > changed.train.batch_size:
        larger = replace(changed.train, batch_size=size, gradient_accumulation=rows // size)
        if machine.spare(replace(changed, train=larger).memory()) >= 0:
            return replace(changed, train=larger)
        size //= 2
    return changed
