"""Where every buffer of a training step lies, and what a board must have.

The lower bound is the largest sum of bytes that are alive at once: no plan can be smaller. The search stops when it is
met, so a plan that equals it is proven to be optimal; otherwise the gap is part of the result.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from efftrain.ondevice.ir import StepGraph

ALIGNMENT = 4
"""Widest element of any buffer, in bytes; sizes are rounded up to it."""


@dataclass(frozen=True, slots=True)
class Buffer:
    """One tensor in the arena, alive from the op that writes it to the last that reads it, both included."""

    name: str
    kind: str
    offset: int
    num_bytes: int
    first_op: int
    last_op: int


@dataclass(frozen=True, slots=True)
class Arena:
    """Offsets of all buffers of a step."""

    buffers: tuple[Buffer, ...]
    num_bytes: int
    lower_bound_bytes: int

    @property
    def proven_optimal(self) -> bool:
        """No plan with the same ops in the same order is smaller."""
        return self.num_bytes == self.lower_bound_bytes


@dataclass(frozen=True, slots=True)
class Item:
    """A buffer to place: a size, and the closed interval of ops during which it is alive."""

    num_bytes: int
    first_op: int
    last_op: int

    def overlaps(self, other: "Item") -> bool:
        """Both are alive during some op."""
        return self.first_op <= other.last_op and other.first_op <= self.last_op


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Every byte of RAM and flash that a program takes, before anything is compiled.

    ``total_ram_bytes`` is arena + trained state + scratch + stack + static data: everything that is linked, and the
    stack.
    """

    board: str
    board_ram_bytes: int
    board_flash_bytes: int
    arena_bytes: int
    arena_lower_bound_bytes: int
    trained_state_bytes: int
    scratch_bytes: int
    """Kernel scratch outside the arena. None: it is planned inside, as buffers of kind ``scratch``."""
    stack_bytes: int
    """Reserved and enforced by the linker script. The build compares it with the bound from the compiler's stack usage
    along the deepest chain of calls, and the emulator measures what was touched."""
    static_bytes: int
    """The context's own words: seed and learning-rate shift."""
    flash_bytes: int
    """Constants to the byte, and an allowance for code that the build checks."""
    macs_forward: int
    macs_backward: int
    buffers: tuple[Buffer, ...]
    ops: tuple[str, ...]

    @property
    def total_ram_bytes(self) -> int:
        """What the board must have."""
        return self.arena_bytes + self.trained_state_bytes + self.scratch_bytes + self.stack_bytes + self.static_bytes

    @property
    def arena_gap_bytes(self) -> int:
        """What an ideal placement might still save."""
        return self.arena_bytes - self.arena_lower_bound_bytes

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: every field, the totals, and the buffers for a map of address against time."""
        return {
            **asdict(self),
            "total_ram_bytes": self.total_ram_bytes,
            "arena_gap_bytes": self.arena_gap_bytes,
            "buffers": [asdict(buffer) for buffer in self.buffers],
            "ops": list(self.ops),
        }

    def table(self) -> str:
        """RAM by part, one line each."""
        parts = {
            "arena": self.arena_bytes,
            "trained state": self.trained_state_bytes,
            "scratch outside the arena": self.scratch_bytes,
            "stack": self.stack_bytes,
            "static": self.static_bytes,
            "total RAM": self.total_ram_bytes,
            "flash": self.flash_bytes,
        }
        return "\n".join(f"{name:<26}{num_bytes:>9,} B" for name, num_bytes in parts.items())


def plan_arena(graph: StepGraph) -> Arena:
    """Place every tensor of a step."""
    first: dict[str, int] = {graph.input: 0}
    last: dict[str, int] = {graph.input: 0}
    for index, op in enumerate(graph.ops):
        for name in op.writes:
            first.setdefault(name, index)
        for name in (*op.reads, *op.writes):
            last[name] = index
    order = {name: index for index, name in enumerate(graph.tensors)}
    names = sorted(first, key=lambda name: (first[name], order[name]))
    items = [Item(_aligned(graph.tensors[name].num_bytes), first[name], last[name]) for name in names]
    offsets = place(items)
    buffers = tuple(
        Buffer(name, graph.tensors[name].role, offset, graph.tensors[name].num_bytes, item.first_op, item.last_op)
        for name, item, offset in zip(names, items, offsets, strict=True)
    )
    return Arena(buffers, _height(items, offsets), lower_bound(items))


def lower_bound(items: Sequence[Item]) -> int:
    """Largest number of bytes alive during one op."""
    return max(
        (sum(i.num_bytes for i in items if i.first_op <= at.first_op <= i.last_op) for at in items),
        default=0,
    )


def place(items: Sequence[Item], *, tries: int = 400, seed: int = 0) -> list[int]:
    """Offsets so that no two items that are alive together overlap, as low as the search finds.

    Greedy orders first, then random swaps, then, for at most 10 items, every order that matters. Stops at the lower
    bound.
    """
    bound = lower_bound(items)
    everything = range(len(items))
    length = [item.last_op - item.first_op for item in items]
    orders = [
        sorted(everything, key=lambda i: -items[i].num_bytes),
        sorted(everything, key=lambda i: (-length[i], -items[i].num_bytes)),
        sorted(everything, key=lambda i: -items[i].num_bytes * (length[i] + 1)),
        sorted(everything, key=lambda i: (items[i].first_op, -items[i].num_bytes)),
        sorted(everything, key=lambda i: (-items[i].last_op, -items[i].num_bytes)),
    ]
    best_order, best, height = list(everything), [0] * len(items), sum(item.num_bytes for item in items) + 1
    for order in orders:
        offsets = _first_fit(items, order)
        if _height(items, offsets) < height:
            best_order, best, height = order, offsets, _height(items, offsets)
    rng = random.Random(seed)
    for _ in range(tries if len(items) > 1 else 0):
        if height == bound:
            return best
        order = list(best_order)
        for _ in range(rng.randint(1, 3)):
            a, b = rng.randrange(len(order)), rng.randrange(len(order))
            order[a], order[b] = order[b], order[a]
        offsets = _first_fit(items, order)
        if _height(items, offsets) <= height:
            best_order, best, height = order, offsets, _height(items, offsets)
    if height > bound and len(items) <= 10:
        best = _exact(items, best, height, bound)
    return best


def _first_fit(items: Sequence[Item], order: Sequence[int]) -> list[int]:
    offsets = [-1] * len(items)
    placed: list[int] = []
    for i in order:
        offsets[i] = _lowest(items, offsets, placed, i)
        placed.append(i)
    return offsets


def _lowest(items: Sequence[Item], offsets: Sequence[int], placed: Sequence[int], i: int, start: int = 0) -> int:
    taken = sorted((offsets[j], offsets[j] + items[j].num_bytes) for j in placed if items[j].overlaps(items[i]))
    at = start
    for low, high in taken:
        if low >= at + items[i].num_bytes:
            break
        at = max(at, high)
    return at


def _exact(items: Sequence[Item], best: list[int], height: int, bound: int) -> list[int]:
    """Branch and bound. Any plan can be built bottom to top, each item at the lowest place not below the one before."""

    def extend(offsets: list[int], placed: tuple[int, ...], floor: int) -> None:
        nonlocal best, height
        if height == bound:
            return
        if len(placed) == len(items):
            best, height = list(offsets), _height(items, offsets)
            return
        for i in range(len(items)):
            if i in placed:
                continue
            at = _lowest(items, offsets, placed, i, floor)
            if at + items[i].num_bytes < height:
                offsets[i] = at
                extend(offsets, (*placed, i), at)
                offsets[i] = -1

    extend([-1] * len(items), (), 0)
    return best


def _height(items: Sequence[Item], offsets: Sequence[int]) -> int:
    return max((offset + item.num_bytes for item, offset in zip(items, offsets, strict=True)), default=0)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def largest(parts: Mapping[str, int], count: int = 3) -> str:
    """The largest parts, for the message of a plan that does not fit."""
    ranked = sorted(parts.items(), key=lambda part: -part[1])[:count]
    return ", ".join(f"{name} {num_bytes} B" for name, num_bytes in ranked)
