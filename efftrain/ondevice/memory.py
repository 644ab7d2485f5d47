"""Where every buffer of a training step lies, and what a board must have.

The lower bound is the largest sum of bytes that are alive at once: no plan can be smaller. The search stops when it is
met, so a plan that equals it is proven to be optimal; otherwise the gap is part of the result.
"""

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from efftrain.ondevice.constants import Layers
from efftrain.ondevice.ir import StepGraph
from efftrain.ondevice.overlap import leads
from efftrain.ondevice.placement import Item, height, lower_bound, place, savings

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
class TiledBlock:
    """Gradients that are taken some channels at a time, so that a board without the RAM for all of them suffices."""

    name: str
    tile_channels: int
    channels: int
    repeated_macs: int
    """Multiply-adds of the backward pass that it makes twice or more; ``macs_backward`` counts them."""


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
    tiled_blocks: tuple[TiledBlock, ...] = ()

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
            "tiled_blocks": [asdict(block) for block in self.tiled_blocks],
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


def plan_arena(graph: StepGraph, layers: Layers, *, overlap: bool = True) -> Arena:
    """Place every tensor of a step.

    Args:
        graph: The step.
        layers: Constants by layer.
        overlap: An output may lie over an input that dies with it, as ``overlap.leads`` says.
    """
    items, names, over = _items(graph, layers, overlap=overlap)
    offsets = place(items, over)
    buffers = tuple(
        Buffer(name, graph.tensors[name].role, offset, graph.tensors[name].num_bytes, item.first_op, item.last_op)
        for name, item, offset in zip(names, items, offsets, strict=True)
    )
    return Arena(buffers, height(items, offsets), lower_bound(items, over))


def _items(
    graph: StepGraph, layers: Layers, *, overlap: bool
) -> tuple[list[Item], list[str], dict[tuple[int, int], int]]:
    first: dict[str, int] = {graph.input: 0}
    last: dict[str, int] = {graph.input: 0}
    for index, op in enumerate(graph.ops):
        for name in op.writes:
            first.setdefault(name, index)
        for name in (*op.reads, *op.writes):
            last[name] = index
    order = {name: index for index, name in enumerate(graph.tensors)}
    names = sorted(
        (n for n in first if n != graph.input or graph.copies_input), key=lambda name: (first[name], order[name])
    )
    items = [Item(_aligned(graph.tensors[name].num_bytes), first[name], last[name]) for name in names]
    number = {name: index for index, name in enumerate(names)}
    over = {
        (number[written], number[read]): _aligned(lead)
        for (written, read), lead in (leads(graph, layers) if overlap else {}).items()
        if written in number and read in number and first[written] == last[read]
    }
    return items, names, over


def step_bytes(
    graph: StepGraph, layers: Layers, ops: Collection[int] | None = None, *, overlap: bool = True
) -> list[int]:
    """The least number of bytes that must be there while each op runs, or while those of the given numbers do.

    ``overlap`` is that of ``plan_arena``.
    """
    items, _, over = _items(graph, layers, overlap=overlap)
    saved = savings(items, over)
    return [
        sum(
            item.num_bytes - (saved.get(index, 0) if item.first_op == at else 0)
            for index, item in enumerate(items)
            if item.first_op <= at <= item.last_op
        )
        for at in (range(len(graph.ops)) if ops is None else ops)
    ]


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def largest(parts: Mapping[str, int], count: int = 3) -> str:
    """The largest parts, for the message of a plan that does not fit."""
    ranked = sorted(parts.items(), key=lambda part: -part[1])[:count]
    return ", ".join(f"{name} {num_bytes} B" for name, num_bytes in ranked)
