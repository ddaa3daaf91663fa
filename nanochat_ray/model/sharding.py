"""Which worker owns which matrix, and where it lies in the buffers the workers exchange. Plain arithmetic.

All matrices of a model share one buffer [world, size]: row r holds what worker r owns, matrices of one shape side by
side so that they can be updated as a stack without a copy. Any world size works; rows are padded to the longest.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from nanochat_ray.model.updates import POLAR_EXPRESS, second_moment_shape

Shape = tuple[int, int]


@dataclass(frozen=True)
class Stack:
    """Equally shaped matrices of one owner, side by side in its row."""

    names: tuple[str, ...]
    shape: Shape
    offset: int  # of the first matrix, in elements
    second_offset: int  # of its second moment, in the row of second moments

    @property
    def second_shape(self) -> Shape:
        return second_moment_shape(*self.shape)

    @property
    def elements(self) -> int:
        return len(self.names) * self.shape[0] * self.shape[1]

    @property
    def second_elements(self) -> int:
        return len(self.names) * max(self.second_shape)


@dataclass(frozen=True)
class Layout:
    """Every owner's stacks, and the sizes of the rows of the two buffers."""

    stacks: tuple[tuple[Stack, ...], ...]  # by owner
    size: int
    second_size: int


def muon_cost(shape: Shape) -> int:
    """FLOPs of Polar Express on one matrix: per step XXᵀ, its square, and its product with X."""
    short, long = sorted(shape)
    return len(POLAR_EXPRESS) * (4 * short * short * long + 2 * short**3)


def lay_out(shapes: Mapping[str, Shape], world: int) -> Layout:
    """Give each matrix an owner, costly ones first, always to the least loaded worker (so within 4/3 of the optimum).

    Depends on nothing but its arguments: every worker computes the same layout.
    """
    loads = [0] * world
    owned: list[dict[Shape, list[str]]] = [{} for _ in range(world)]
    for name in sorted(shapes, key=lambda name: (-muon_cost(shapes[name]), name)):
        owner = loads.index(min(loads))
        loads[owner] += muon_cost(shapes[name])
        owned[owner].setdefault(shapes[name], []).append(name)
    stacks, size, second_size = [], 0, 0
    for by_shape in owned:
        row, offset, second_offset = [], 0, 0
        for shape, names in by_shape.items():
            stack = Stack(tuple(names), shape, offset, second_offset)
            row.append(stack)
            offset += stack.elements
            second_offset += stack.second_elements
        stacks.append(tuple(row))
        size, second_size = max(size, offset), max(second_size, second_offset)
    return Layout(tuple(stacks), size, second_size)


def shard_bounds(elements: int, rank: int, world: int) -> tuple[int, int]:
    """The part [start, stop) of a flat tensor that worker `rank` owns; the last parts may be shorter or empty."""
    size = -(-elements // world)
    return min(rank * size, elements), min((rank + 1) * size, elements)
