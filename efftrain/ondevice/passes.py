"""Rewrites of a training step that keep every bit of its result and make it smaller.

Only trained slices in RAM is no rewrite of ops: ``state.StateLayout`` holds the trained slices alone, and every kernel
takes the weights of a layer in two runs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from efftrain.errors import ConfigError
from efftrain.ondevice.constants import Layers
from efftrain.ondevice.ir import (
    AddForward,
    BiasUpdate,
    ConvForward,
    ConvInputGrad,
    StepGraph,
    StepOp,
    TensorType,
    WeightUpdate,
)
from efftrain.ondevice.streams import stream_rows
from efftrain.ondevice.tiles import tile_channels
from efftrain.ondevice.verify import verify

Pass = Callable[[StepGraph, Layers, int | None], StepGraph]
"""From a step, the constants of its layers, and the bytes that a board has for the arena, if it matters."""


def remove_dead_code(graph: StepGraph, layers: Layers, arena_bytes: int | None = None) -> StepGraph:
    """Drop gradients that no update needs and masks that no gradient needs."""
    needed = {graph.logits}
    kept: list[StepOp] = []
    for op in reversed(graph.ops):
        if not isinstance(op, WeightUpdate | BiasUpdate) and needed.isdisjoint(op.writes):
            continue
        if isinstance(op, ConvForward | AddForward) and op.mask not in needed:
            op = replace(op, mask=None)
        needed.update(op.reads)
        kept.append(op)
    kept.reverse()
    return _with_ops(graph, kept)


def update_at_once(graph: StepGraph, layers: Layers, arena_bytes: int | None = None) -> StepGraph:
    """Run an update as soon as nothing needs the old weights any more, so that its gradient and input die early."""
    updates = {op.name: op for op in graph.ops if isinstance(op, WeightUpdate | BiasUpdate)}
    others = [op for op in graph.ops if op.name not in updates]
    readers = {op.layer: op for op in others if isinstance(op, ConvInputGrad)}
    ordered: list[StepOp] = []
    for op in others:
        ordered.append(op)
        for update in list(updates.values()):
            reader = readers.get(update.layer) if isinstance(update, WeightUpdate) else None
            if (update.g in op.writes and reader is None) or op is reader:
                ordered.append(updates.pop(update.name))
    assert not updates, f"no place was found for {list(updates)}"
    return _with_ops(graph, ordered)


PASSES: Mapping[str, Pass] = {
    "remove_dead_code": remove_dead_code,
    "update_at_once": update_at_once,
    # The peak that it leaves is what rows are streamed for.
    "tile_channels": tile_channels,
    "stream_rows": stream_rows,
}


OVERLAP = "overlap"
"""No rewrite: the memory planner lets an output lie over an input that dies with it."""


def run_passes(
    graph: StepGraph, layers: Layers, switched_off: Sequence[str] = (), arena_bytes: int | None = None
) -> StepGraph:
    """Run every pass that is not switched off, and the verifier after each.

    Args:
        graph: The step as it was differentiated.
        layers: Constants by layer.
        switched_off: Names of passes.
        arena_bytes: What a board has for the arena, for passes that save RAM for time; ``None``: they do nothing.

    Raises:
        ConfigError: There is no pass of that name.
    """
    for name in switched_off:
        if name not in (*PASSES, OVERLAP):
            raise ConfigError(f"pass {name!r} is not known; known are {', '.join((*PASSES, OVERLAP))}")
    for name, rewrite in PASSES.items():
        if name not in switched_off:
            graph = rewrite(graph, layers, arena_bytes)
            verify(graph)
    return graph


def _with_ops(graph: StepGraph, ops: Sequence[StepOp]) -> StepGraph:
    used = {name for op in ops for name in (*op.reads, *op.writes)} | {graph.input, graph.logits}
    tensors: dict[str, TensorType] = {name: tensor for name, tensor in graph.tensors.items() if name in used}
    return replace(graph, tensors=tensors, ops=tuple(ops))
