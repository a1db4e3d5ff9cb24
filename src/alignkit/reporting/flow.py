"""The pipeline as a picture: its steps as boxes in layers, an arrow from each step to those that read from it.

Layers as of Sugiyama et al. (1981): a step stands one layer below the last of those it read from, an arrow over several
layers gets a place in each of them, and the order within a layer is settled by barycentres.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from alignkit.reporting.runs import Run, Step

BOX, HIGH, GAP, THREAD, BETWEEN = 148.0, 50.0, 18.0, 12.0, 34.0
"""Width and height of a box, the gap between two, the width that a passing arrow takes, the room between layers."""
LINE = 15.0
"""What a replicate adds to the height of a box."""
_SWEEPS = 12


@dataclass
class Place:
    """A box, or a point of an arrow that passes through a layer; `x` and `y` are its middle and its top."""

    step: Step | None
    x: float = 0.0
    y: float = 0.0
    above: list[Place] = field(default_factory=list)
    below: list[Place] = field(default_factory=list)

    @property
    def width(self) -> float:
        """How much room it takes in its layer."""
        return BOX if self.step else THREAD


@dataclass(frozen=True)
class Flow:
    """The picture in numbers: its size, its boxes, and the arrows as SVG paths."""

    width: float
    height: float
    high: float
    """Height of a box."""
    boxes: list[Place]
    arrows: list[str]
    parents: dict[str, list[str]]
    """Step -> the steps that it read from."""


def layout(run: Run, replicates: int = 0) -> Flow:
    """The steps of a run, placed; boxes leave room for a line on each of so many replicates."""
    parents = {step.name: [parent.name for parent in run.parents(step)] for step in run.steps}
    depth: dict[str, int] = {}
    for step in run.steps:  # in order: whatever a step read from stands before it
        depth[step.name] = 1 + max((depth.get(name, 0) for name in parents[step.name]), default=0)
    boxes = {step.name: Place(step) for step in run.steps}
    layers: list[list[Place]] = [[] for _ in range(max(depth.values(), default=0))]
    for step in run.steps:
        layers[depth[step.name] - 1].append(boxes[step.name])
    chains = [
        _chain(boxes[name], boxes[step.name], layers[depth[name] : depth[step.name] - 1])
        for step in run.steps
        for name in parents[step.name]
        if depth[name] < depth[step.name]
    ]
    _order(layers)
    width = _spread_out(layers)
    high = HIGH + LINE * replicates
    for number, layer in enumerate(layers):
        for place in layer:
            place.y = number * (high + BETWEEN) + 1
    height = len(layers) * (high + BETWEEN) - BETWEEN + 2
    return Flow(width, height, high, list(boxes.values()), [_arrow(chain, high) for chain in chains], parents)


def _chain(start: Place, end: Place, between: Sequence[list[Place]]) -> list[Place]:
    """An arrow's way: its start, a point in each layer that it passes, its end."""
    chain = [start]
    for layer in between:
        point = Place(None)
        layer.append(point)
        chain.append(point)
    chain.append(end)
    for upper, lower in pairwise(chain):
        upper.below.append(lower)
        lower.above.append(upper)
    return chain


def _order(layers: Sequence[list[Place]]) -> None:
    """Sort each layer by the mean place of what its members are connected with, downwards and upwards in turn."""
    for sweep in range(_SWEEPS):
        downwards = sweep % 2 == 0
        for number in range(1, len(layers)) if downwards else range(len(layers) - 2, -1, -1):
            other = layers[number - 1 if downwards else number + 1]
            rank = {id(place): position for position, place in enumerate(other)}
            layers[number].sort(key=_barycentre(rank, downwards))


def _barycentre(rank: Mapping[int, int], downwards: bool) -> Callable[[Place], float]:
    def key(place: Place) -> float:
        near = place.above if downwards else place.below
        return sum(rank[id(each)] for each in near) / len(near) if near else len(rank) / 2

    return key


def _spread_out(layers: Sequence[list[Place]]) -> float:
    """Give every place its x: near what it is connected with, in order, without touching; returns the whole width."""
    for layer in layers:
        _pack(layer, [0.0] * len(layer))
    for sweep in range(_SWEEPS):
        for layer in layers if sweep % 2 == 0 else list(reversed(layers)):
            near = [(each.above + each.below) for each in layer]
            wanted = [sum(n.x for n in ns) / len(ns) if ns else each.x for each, ns in zip(layer, near, strict=True)]
            _pack(layer, wanted)
    left = min((place.x - place.width / 2 for layer in layers for place in layer), default=0.0) - 1
    for layer in layers:
        for place in layer:
            place.x -= left
    return max((place.x + place.width / 2 for layer in layers for place in layer), default=0.0) + 1


def _pack(layer: Sequence[Place], wanted: Sequence[float]) -> None:
    """Put a layer's places as near as can be to where they want to be, in their order, without touching.

    Places that would touch are moved together as one block (pool adjacent violators), which is least squares.
    """
    blocks: list[tuple[float, list[int]]] = []
    offsets: list[float] = []
    for number, place in enumerate(layer):
        before = layer[number - 1] if number else None
        gap = GAP if before is not None and (before.step or place.step) else 0.0
        offsets.append(offsets[-1] + (before.width + place.width) / 2 + gap if before else 0.0)
        blocks.append((wanted[number] - offsets[number], [number]))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (second, others), (first, members) = blocks.pop(), blocks.pop()
            together = [*members, *others]
            blocks.append(((first * len(members) + second * len(others)) / len(together), together))
    for shift, members in blocks:
        for number in members:
            layer[number].x = shift + offsets[number]


def _arrow(chain: Sequence[Place], high: float) -> str:
    """A smooth path from the foot of the first box to the head of the last."""
    start, end = chain[0], chain[-1]
    x, y = start.x, start.y + high
    path = [f"M{x:.1f},{y:.1f}"]
    for place in chain[1:]:
        middle = (y + place.y) / 2
        path.append(f"C{x:.1f},{middle:.1f} {place.x:.1f},{middle:.1f} {place.x:.1f},{place.y:.1f}")
        x, y = place.x, place.y
        if place is not end:
            y += high
            path.append(f"V{y:.1f}")
    return "".join(path)
