"""Where every buffer of a training step lies, and what a board must have.

The lower bound is the largest sum of bytes that are alive at once: no plan can be smaller. The search stops when it is
met, so a plan that equals it is proven to be optimal; otherwise the gap is part of the result.
"""

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from efftrain.ondevice.constants import Layers
from efftrain.ondevice.ir import StepGraph
from efftrain.ondevice.overlap import leads

ALIGNMENT = 4
"""Widest element of any buffer, in bytes; sizes are rounded up to it."""

Over = Mapping[tuple[int, int], int]
"""For items (a, b): a may overlap b if a starts at least so many bytes below b."""


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


def plan_arena(graph: StepGraph, layers: Layers, *, overlap: bool = True, outside: Collection[str] = ()) -> Arena:
    """Place every tensor of a step.

    Args:
        graph: The step.
        layers: Constants by layer.
        overlap: An output may lie over an input that dies with it, as ``overlap.leads`` says.
        outside: Tensors that are not in the arena: an input that is read where the caller has it.
    """
    items, names, over = _items(graph, layers, overlap=overlap, outside=outside)
    offsets = place(items, over)
    buffers = tuple(
        Buffer(name, graph.tensors[name].role, offset, graph.tensors[name].num_bytes, item.first_op, item.last_op)
        for name, item, offset in zip(names, items, offsets, strict=True)
    )
    return Arena(buffers, _height(items, offsets), lower_bound(items, over))


def _items(
    graph: StepGraph, layers: Layers, *, overlap: bool, outside: Collection[str]
) -> tuple[list[Item], list[str], dict[tuple[int, int], int]]:
    first: dict[str, int] = {graph.input: 0}
    last: dict[str, int] = {graph.input: 0}
    for index, op in enumerate(graph.ops):
        for name in op.writes:
            first.setdefault(name, index)
        for name in (*op.reads, *op.writes):
            last[name] = index
    order = {name: index for index, name in enumerate(graph.tensors)}
    names = sorted((n for n in first if n not in outside), key=lambda name: (first[name], order[name]))
    items = [Item(_aligned(graph.tensors[name].num_bytes), first[name], last[name]) for name in names]
    number = {name: index for index, name in enumerate(names)}
    over = {
        (number[written], number[read]): _aligned(lead)
        for (written, read), lead in (leads(graph, layers) if overlap else {}).items()
        if written in number and read in number and first[written] == last[read]
    }
    return items, names, over


def step_bytes(graph: StepGraph, layers: Layers, ops: Collection[int] | None = None) -> list[int]:
    """The least number of bytes that must be there while each op runs, or while those of the given numbers do."""
    items, _, over = _items(graph, layers, overlap=True, outside=())
    saved = _savings(items, over)
    return [
        sum(
            item.num_bytes - (saved.get(index, 0) if item.first_op == at else 0)
            for index, item in enumerate(items)
            if item.first_op <= at <= item.last_op
        )
        for at in (range(len(graph.ops)) if ops is None else ops)
    ]


def lower_bound(items: Sequence[Item], over: Over | None = None) -> int:
    """Largest number of bytes alive during one op, less what may lie over each other."""
    saved = _savings(items, over or {})
    return max(
        (
            sum(
                item.num_bytes - (saved.get(index, 0) if item.first_op == at.first_op else 0)
                for index, item in enumerate(items)
                if item.first_op <= at.first_op <= item.last_op
            )
            for at in items
        ),
        default=0,
    )


def _savings(items: Sequence[Item], over: Over) -> dict[int, int]:
    """For each item how much of it can lie over what dies while it is written."""
    saved: dict[int, int] = {}
    for (written, read), lead in over.items():
        together = items[written].num_bytes + items[read].num_bytes
        saving = together - max(items[read].num_bytes + lead, items[written].num_bytes)
        saved[written] = min(saved.get(written, 0) + max(saving, 0), items[written].num_bytes)
    return saved


def place(items: Sequence[Item], over: Over | None = None, *, tries: int = 400, seed: int = 0) -> list[int]:
    """Offsets so that no two items that are alive together overlap, but for pairs that may; as low as the search finds.

    Greedy orders first, then random swaps, then, for at most 10 items that may not overlap, every order that matters.
    Stops at the lower bound.

    Args:
        items: What to place.
        over: For (a, b): a may overlap b if a starts at least so many bytes below b.
        tries: Random swaps.
        seed: Of the swaps.
    """
    bound = lower_bound(items, over)
    conflicts = _conflicts(items, over or {})
    everything = range(len(items))
    length = [item.last_op - item.first_op for item in items]
    pressure = _pressure(items)
    orders = [
        sorted(everything, key=lambda i: -items[i].num_bytes),
        sorted(everything, key=lambda i: (-length[i], -items[i].num_bytes)),
        sorted(everything, key=lambda i: -items[i].num_bytes * (length[i] + 1)),
        sorted(everything, key=lambda i: (items[i].first_op, -items[i].num_bytes)),
        sorted(everything, key=lambda i: (-items[i].last_op, -items[i].num_bytes)),
        sorted(everything, key=lambda i: (-pressure[i], -items[i].num_bytes)),
        sorted(everything, key=lambda i: (-pressure[i], -items[i].last_op)),
        sorted(everything, key=lambda i: (-pressure[i], -items[i].first_op)),
    ]
    best_order, best, height = list(everything), [0] * len(items), sum(item.num_bytes for item in items) + 1
    for order in orders:
        offsets = _first_fit(conflicts, order)
        if _height(items, offsets) < height:
            best_order, best, height = order, offsets, _height(items, offsets)
    rng = random.Random(seed)
    for _ in range(tries if len(items) > 1 else 0):
        if height == bound:
            return best
        # What reaches the top is what must go elsewhere: try it earlier, or swap it with something.
        tops = [i for i in everything if best[i] + items[i].num_bytes == height]
        order = list(best_order)
        if rng.random() < 0.5:
            order.remove(moved := rng.choice(tops))
            order.insert(rng.randrange(len(items)), moved)
        for _ in range(rng.randint(0, 2)):
            a, b = rng.randrange(len(order)), rng.randrange(len(order))
            order[a], order[b] = order[b], order[a]
        offsets = _first_fit(conflicts, order)
        if _height(items, offsets) <= height:
            best_order, best, height = order, offsets, _height(items, offsets)
    if height > bound and len(items) <= 10 and not over:
        best = _exact(items, conflicts, best, height, bound)
    return best


_Conflicts = Sequence[Mapping[int, tuple[int, int]]]
"""For each item and each other: the offsets, relative to the other's, that lie strictly between are forbidden."""


def _conflicts(items: Sequence[Item], over: Over) -> _Conflicts:
    conflicts: list[dict[int, tuple[int, int]]] = [{} for _ in items]
    for i, a in enumerate(items):
        for j, b in enumerate(items):
            if i != j and a.overlaps(b):
                low = -over[i, j] if (i, j) in over else -a.num_bytes
                high = over.get((j, i), b.num_bytes)
                conflicts[i][j] = (low, high)
    return conflicts


def _pressure(items: Sequence[Item]) -> list[int]:
    """For each item the most bytes that are alive while it is."""
    end = max((item.last_op for item in items), default=-1) + 1
    alive = [sum(item.num_bytes for item in items if item.first_op <= t <= item.last_op) for t in range(end)]
    return [max(alive[item.first_op : item.last_op + 1], default=0) for item in items]


def _first_fit(conflicts: _Conflicts, order: Sequence[int]) -> list[int]:
    offsets = [-1] * len(conflicts)
    for i in order:
        offsets[i] = _lowest(conflicts, offsets, i)
    return offsets


def _lowest(conflicts: _Conflicts, offsets: Sequence[int], i: int, start: int = 0) -> int:
    """The lowest place from ``start`` on; items with an offset below 0 are not placed yet."""
    taken = sorted((offsets[j] + low, offsets[j] + high) for j, (low, high) in conflicts[i].items() if offsets[j] >= 0)
    at = start
    for low, high in taken:
        if low < at < high:
            at = high
    return at


def _exact(items: Sequence[Item], conflicts: _Conflicts, best: list[int], height: int, bound: int) -> list[int]:
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
            at = _lowest(conflicts, offsets, i, floor)
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
