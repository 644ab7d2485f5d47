"""The pass that moves gradients in memory where that makes the arena smaller.

Kernels write upward over what they read, so a chain of tensors that lie over each other creeps down, and what is freed
below a tensor stays out of its reach. A move costs one load and one store a word.
"""

from dataclasses import replace
from typing import Any

from efftrain.ondevice.constants import Layers
from efftrain.ondevice.ir import ChannelTiles, Move, StepGraph, StepOp
from efftrain.ondevice.memory import Arena, plan_arena
from efftrain.ondevice.verify import verify


def plan_with_moves(graph: StepGraph, layers: Layers) -> tuple[StepGraph, Arena]:
    """A plan of the step, with as many moves as it takes to reach the lower bound, or none if they do not help."""
    arena = plan_arena(graph, layers)
    if arena.proven_optimal:
        return graph, arena
    movable = _with_moves(graph)
    moved = plan_arena(movable, layers)
    if moved.num_bytes >= arena.num_bytes:
        return graph, arena
    return _without_idle_moves(movable, moved)


def _with_moves(graph: StepGraph) -> StepGraph:
    """A move behind every gradient."""
    tensors, ops, moved = dict(graph.tensors), list[StepOp](), dict[str, str]()
    for op in graph.ops:
        ops.append(_reading(op, moved))
        for name in op.writes:
            if graph.tensors[name].role == "gradient":
                moved[name] = f"{name}.moved"
                tensors[moved[name]] = tensors[name]
                ops.append(Move(name=f"{name}.move", x=name, y=moved[name]))
    return _checked(replace(graph, tensors=tensors, ops=tuple(ops)))


def _without_idle_moves(graph: StepGraph, arena: Arena) -> tuple[StepGraph, Arena]:
    """Without the moves whose two ends the plan put at one place. The others keep their offsets."""
    at = {buffer.name: buffer.offset for buffer in arena.buffers}
    idle = {op.y: op.x for op in graph.ops if isinstance(op, Move) and at[op.y] == at[op.x]}
    kept = [op for op in graph.ops if not (isinstance(op, Move) and op.y in idle)]
    ops = tuple(_reading(op, idle) for op in kept)
    tensors = {name: tensor for name, tensor in graph.tensors.items() if name not in idle}
    result = _checked(replace(graph, tensors=tensors, ops=ops))
    last = {name: index for index, op in enumerate(ops) for name in (*op.reads, *op.writes)}
    first = {name: index for index, op in reversed(list(enumerate(ops))) for name in op.writes} | {graph.input: 0}
    buffers = tuple(
        replace(buffer, first_op=first[buffer.name], last_op=last[buffer.name])
        for buffer in arena.buffers
        if buffer.name not in idle
    )
    return result, Arena(buffers, arena.num_bytes, arena.lower_bound_bytes)


def _reading(op: StepOp, names: dict[str, str]) -> StepOp:
    """The op with other names for what it reads."""
    if isinstance(op, ChannelTiles):
        first, *others = op.gradients
        return replace(op, gradients=(replace(first, g=names.get(first.g, first.g)), *others))
    fields: dict[str, Any] = {}
    for field in op.READS:
        if isinstance(name := getattr(op, field), str) and name in names:
            fields[field] = names[name]
    return replace(op, **fields)


def _checked(graph: StepGraph) -> StepGraph:
    verify(graph)
    return graph
