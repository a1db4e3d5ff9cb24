"""The shape `task` of self_instruct: the road of Wang et al., 2022 (arXiv 2212.10560), step by step.

  instructions  shown six seeds' instructions and up to two of its own, the teacher writes several new ones
  kinds         of each that passes the filters it says whether it is a classification
  instances     and writes inputs and outputs for it: the outputs first for a classification, else the inputs first

Each instance becomes a row. The original numbers texts and parses them with patterns; here the teacher returns JSON,
and what order it writes in is the order of the fields.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field

from alignkit.core.errors import UserError
from alignkit.core.records import Dropped, Message, QAExample
from alignkit.data.wording import language_problem
from alignkit.teacher.client import Answer, Request
from alignkit.teacher.prompts import render
from alignkit.teacher.recipes.asking import LEFT_OVER, Asker, left_open, left_over, set_aside
from alignkit.teacher.recipes.self_instruct_pool import (
    HOPELESS_REQUESTS,
    Blacklist,
    Novelty,
    length_problem,
    mix,
)

if TYPE_CHECKING:
    from alignkit.teacher.recipes.self_instruct import SelfInstructConfig

INSTRUCTION_WORDS = (4, 150)
"""Fewest and most words of an instruction; a Chinese character counts as one."""
KIND_EXAMPLES = 4
"""Seeds of each kind shown when a kind is asked for."""
INSTANCE_EXAMPLES = 3
"""Seeds of the task's kind shown when instances are asked for."""


class NewInstructions(BaseModel):
    """What a teacher is to write in the first step."""

    instructions: list[str] = Field(min_length=1)


class Kind(BaseModel):
    """What it is to say in the second."""

    classification: bool = Field(strict=True)


class Instance(BaseModel):
    """An input, empty where the instruction needs none, and the output for it."""

    input: str
    output: str


class NewInstances(BaseModel):
    """What a teacher is to write in the third step for a task that is no classification."""

    instances: list[Instance] = Field(min_length=1)


class LabelledInstance(BaseModel):
    """The label of a class, and an input for which it is right."""

    output: str
    input: str


class NewLabelledInstances(BaseModel):
    """What a teacher is to write in the third step for a classification."""

    instances: list[LabelledInstance] = Field(min_length=1)


@dataclass(frozen=True)
class Draft:
    """A request for instructions by its id, and the seeds that it shows."""

    id: str
    parents: list[str]
    shown: list[str]
    request: Request


@dataclass(frozen=True)
class Task:
    """A new instruction, and the seeds that its request showed."""

    id: str
    instruction: str
    parents: list[str]
    classification: bool = False

    def dropped(self, reason: str, detail: str = "", **more: Any) -> Dropped:
        """The task, set aside."""
        row = {"id": self.id, "instruction": self.instruction, "parents": self.parents}
        return Dropped(reason=reason, row={**row, **more}, detail=detail)


def rows(
    seeds: Sequence[QAExample],
    count: int,
    config: SelfInstructConfig,
    ask: Asker,
    pool: Novelty,
    blacklist: Blacklist,
    *,
    read_verdict: Callable[[str], str | None],
    name: str,
    seed: int,
    source: str,
) -> Iterator[QAExample | Dropped]:
    """Ask for tasks, round by round, until they give `count` rows. Ids are `<name>-<number>`."""
    usable = yield from set_aside(_usable_seeds(seeds))
    if not usable:
        raise UserError("data.path: no row has an instruction")
    for example in usable:
        pool.add(example.instruction, example.id)
    kept: list[QAExample] = []
    waiting: list[Task] = []
    asked, pending, most = 0, 0, config.max_requests or 3 * count
    while len(kept) + pending < count and (waiting or asked < most) and (kept or pending or asked < HOPELESS_REQUESTS):
        missing = count - len(kept) - pending
        shown = list({example.instruction: example for example in kept}.values())
        # As many rows a task as so far; before there are any, as many as there can be.
        needed = math.ceil(missing / (len(kept) / len(shown) if shown else config.instances_per_task))
        more = math.ceil(max(0, needed - len(waiting)) / config.instructions_per_request)
        size = min(config.round_size, more, most - asked)
        drafts = [_draw(config, usable, shown, name, seed, number) for number in range(asked + 1, asked + size + 1)]
        answers = ask("instructions", [draft.request for draft in drafts])
        asked, pending = asked + size, pending + config.instructions_per_request * left_open(answers)
        waiting += yield from set_aside(_new_tasks(drafts, answers, pool, blacklist))
        tasks = yield from set_aside(_classified(waiting[:needed], usable, ask, seed))
        waiting = waiting[needed:]
        examples = yield from set_aside(_with_instances(tasks, usable, config, ask, seed, source))
        if len(examples) >= missing:  # before the last row, after which nobody listens
            yield from (task.dropped(LEFT_OVER) for task in waiting)
            waiting = []
        yield from left_over(examples[missing:])
        for example in examples[:missing]:
            judgmental = example.classification and read_verdict(example.output) is not None
            kind = "judgmental" if judgmental else None if example.classification else "non_judgmental"
            kept.append(example.model_copy(update={"id": f"{name}-{len(kept) + 1:05d}", "kind": kind}))
            yield kept[-1]
    yield from (task.dropped(LEFT_OVER) for task in waiting)


def _usable_seeds(seeds: Sequence[QAExample]) -> Iterator[QAExample | Dropped]:
    for example in seeds:
        if example.instruction.strip():
            yield example
        else:
            yield Dropped(reason="seed without instruction", row=example.model_dump())


# -- instructions ------------------------------------------------------------------------------------------------------


def instructions_request(instructions: Sequence[str], wanted: int, sample: int = 0) -> Request:
    """Show instructions, and ask for `wanted` new ones."""
    shown = [" ".join(instruction.split()) for instruction in instructions]
    prompt = render("self_instruct_instructions", instructions=shown, wanted=wanted)
    return Request(_messages(prompt), sample=sample, shape=NewInstructions)


def _draw(
    config: SelfInstructConfig,
    seeds: Sequence[QAExample],
    accepted: Sequence[QAExample],
    name: str,
    seed: int,
    number: int,
) -> Draft:
    """Make up request `number` from the random seed, the number and the rows accepted so far, and from nothing else."""
    rng = Random(f"{seed}-instructions-{number}")
    shown, parents = mix(seeds, accepted, config.seeds_per_prompt, config.machine_per_prompt, rng)
    instructions = [example.instruction for example in shown]
    request = instructions_request(instructions, config.instructions_per_request, sample=number)
    return Draft(f"{name}-request-{number}", parents, instructions, request)


def _new_tasks(
    drafts: Sequence[Draft], answers: Sequence[Answer], pool: Novelty, blacklist: Blacklist
) -> Iterator[Task | Dropped]:
    """Every instruction that was written; those that pass the filters join the pool at once."""
    for draft, answer in zip(drafts, answers, strict=True):
        if not answer.usable:
            row = {"id": draft.id, "parents": draft.parents, "answer": answer.text}
            yield Dropped(reason=str(answer.reason), row=row, detail=answer.detail)
            continue
        for number, instruction in enumerate(answer.value.instructions, start=1):
            task = Task(f"{draft.id}-{number}", instruction.strip(), draft.parents)
            if problem := _problem(task.instruction, draft.shown, pool, blacklist):
                reason, _, detail = problem.partition(": ")
                yield task.dropped(reason, detail)
                continue
            pool.add(task.instruction, task.id)
            yield task


def _problem(instruction: str, shown: Sequence[str], pool: Novelty, blacklist: Blacklist) -> str | None:
    """What is wrong with an instruction made after those `shown`, as "reason: detail"; None when nothing is."""
    if problem := length_problem("instruction", instruction, *INSTRUCTION_WORDS):
        return problem
    if not instruction[0].isalnum():
        return f"instruction begins with a sign: {instruction[0]}"
    if problem := language_problem(instruction, *shown):
        return problem
    if forbidden := blacklist.find(instruction):
        return f"word of the blacklist: {', '.join(sorted(forbidden))}"
    if match := pool.most_similar(instruction):
        return f"too similar: ROUGE-L {match.similarity:.3f} with {match.label}"
    return None


# -- kinds -------------------------------------------------------------------------------------------------------------


def kind_request(instruction: str, examples: Sequence[QAExample]) -> Request:
    """Ask whether a task is a classification, after `examples` of both kinds. Temperature 0: there is one answer."""
    shown = [
        {"instruction": example.instruction, "classification": _is_classification(example)} for example in examples
    ]
    prompt = render("self_instruct_kind", examples=shown, instruction=instruction)
    return Request(_messages(prompt), temperature=0.0, shape=Kind)


def _classified(tasks: Sequence[Task], seeds: Sequence[QAExample], ask: Asker, seed: int) -> Iterator[Task | Dropped]:
    rng = Random(f"{seed}-kinds")
    shown = [*_some(seeds, True, KIND_EXAMPLES, rng), *_some(seeds, False, KIND_EXAMPLES, rng)]
    rng.shuffle(shown)
    answers = ask("kinds", [kind_request(task.instruction, shown) for task in tasks])
    for task, answer in zip(tasks, answers, strict=True):
        if answer.usable:
            yield replace(task, classification=answer.value.classification)
        else:
            yield task.dropped(str(answer.reason), answer.detail, answer=answer.text)


def _is_classification(example: QAExample) -> bool | None:
    """As the row says; where it does not, a judgmental question is one. None when neither is known."""
    if example.classification is None and example.kind is not None:
        return example.kind == "judgmental"
    return example.classification


def _some(seeds: Sequence[QAExample], classification: bool, most: int, rng: Random) -> list[QAExample]:
    of_the_kind = [example for example in seeds if _is_classification(example) is classification]
    return rng.sample(of_the_kind, min(most, len(of_the_kind)))


# -- instances ---------------------------------------------------------------------------------------------------------


def instances_request(task: Task, examples: Sequence[QAExample], most: int) -> Request:
    """Ask for at most `most` instances, after examples of the task's kind. Temperature 0, as in the original."""
    order = ("output", "input") if task.classification else ("input", "output")
    shown = [
        {"instruction": example.instruction, "instances": [{field: getattr(example, field) for field in order}]}
        for example in examples
    ]
    prompt = render(
        "self_instruct_instances",
        examples=shown,
        instruction=task.instruction,
        classification=task.classification,
        most=most,
    )
    shape = NewLabelledInstances if task.classification else NewInstances
    return Request(_messages(prompt), temperature=0.0, shape=shape)


def _with_instances(
    tasks: Sequence[Task],
    seeds: Sequence[QAExample],
    config: SelfInstructConfig,
    ask: Asker,
    seed: int,
    source: str,
) -> Iterator[QAExample | Dropped]:
    answered = [example for example in seeds if example.output.strip()]
    shown = {
        classification: _some(answered, classification, INSTANCE_EXAMPLES, Random(f"{seed}-instances-{kind}"))
        for kind, classification in (("judgmental", True), ("non_judgmental", False))
    }
    requests = [instances_request(task, shown[task.classification], config.instances_per_task) for task in tasks]
    for task, answer in zip(tasks, ask("instances", requests), strict=True):
        if answer.usable:
            yield from _examples(task, answer.value.instances, config.instances_per_task, source)
        else:
            yield task.dropped(str(answer.reason), answer.detail, answer=answer.text)


def _examples(
    task: Task, instances: Sequence[Instance | LabelledInstance], most: int, source: str
) -> Iterator[QAExample | Dropped]:
    """The usable instances of a task; none at all when one input has several outputs, for one of them is wrong."""
    outputs: dict[str, str] = {}
    usable: list[QAExample] = []
    for number, instance in enumerate(instances, start=1):
        example = QAExample(
            id=f"{task.id}-{number}",
            instruction=task.instruction,
            input=instance.input.strip(),
            output=instance.output.strip(),
            classification=task.classification,
            source=source,
            parents=task.parents,
        )
        if reason := _instance_problem(example, usable):
            yield Dropped(reason=reason, row=example.model_dump())
            continue
        usable.append(example)
        if example.input and outputs.setdefault(example.input, example.output) != example.output:
            told = [{"input": each.input, "output": each.output} for each in usable]
            yield task.dropped("contradicting instances", f"input with two outputs: {example.input}", instances=told)
            return
    yield from usable[:most]
    yield from (Dropped(reason="more instances than asked for", row=each.model_dump()) for each in usable[most:])


def _instance_problem(example: QAExample, usable: Sequence[QAExample]) -> str | None:
    if not example.output:
        return "instance without output"
    if example.input == example.output:
        return "output repeats the input"
    if example.input.endswith((":", "：")) or example.output.endswith((":", "：")):
        return "instance ends with a colon"
    if any((each.input, each.output) == (example.input, example.output) for each in usable):
        return "repeated instance"
    return None


def _messages(prompt: str) -> list[Message]:
    return [
        Message(role="system", content=render("self_instruct_tasks_system")),
        Message(role="user", content=prompt),
    ]
