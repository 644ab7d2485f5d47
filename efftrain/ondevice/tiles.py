"""The pass that runs the backward pass of blocks some channels at a time, where they take more than the arena has.

In a block of pointwise, depthwise and pointwise convolution the wide gradients between the three are the peak of the
backward pass. Their channels do not depend on each other, so they need never exist whole, and what is updated from them
is updated tile by tile. It costs time: before a gradient is used its bits must be known, those of the whole tensor, so
with three convolutions the gradient of the first is taken three times and that of the second twice.

Source: tiles of a backward pass with updates inside are our own; that a gradient need not outlive its update is
MCUNetV3's (arXiv:2206.15472, operator reordering).
"""

from dataclasses import replace

from efftrain.ondevice.constants import ConvConstants, Layers, layer_of
from efftrain.ondevice.ir import (
    BiasUpdate,
    ChannelTiles,
    ConvInputGrad,
    StepGraph,
    StepOp,
    TensorType,
    WeightUpdate,
    inner_ops,
    runs,
)
from efftrain.ondevice.memory import step_bytes
from efftrain.ondevice.verify import verify

_LANES = 4
"""Tiles have a multiple of so many channels: what kernels take at a time."""

_OVERHEAD = 8
"""What a tile takes besides its multiply-adds, in channels more."""

Chain = tuple[str, ...]
"""Names of input gradients, each of which alone reads what the one before makes."""


def tile_channels(graph: StepGraph, layers: Layers, arena_bytes: int | None) -> StepGraph:
    """Tile the blocks whose backward pass takes more than the arena has, and no others.

    Of the ways to do it the cheapest that fits is taken; if none fits, the smallest.

    Args:
        graph: The step.
        layers: Constants by layer.
        arena_bytes: What the board has for the arena; ``None``: all that it takes.
    """
    if arena_bytes is None:
        return graph
    for chain in sorted(_chains(graph, layers), key=lambda chain: -_peak(graph, layers, chain)):
        if _peak(graph, layers, chain) > arena_bytes:
            graph = _smaller(graph, layers, chain, arena_bytes)
            verify(graph)
    return graph


def _smaller(graph: StepGraph, layers: Layers, chain: Chain, arena_bytes: int) -> StepGraph:
    """Of all ends of a chain and all widths of tiles the cheapest that fits, or else the smallest."""
    plain = {op.name for op in graph.ops}
    attempts = [
        _with_tiles(graph, layers, chain[start:], channels)
        for start in range(len(chain) - 1)
        if plain.issuperset(chain[start:])
        for channels in _widths(graph, chain[start])
    ]

    def rank(attempt: StepGraph) -> tuple[int, float]:
        return max(_peak(attempt, layers, chain) - arena_bytes, 0), _cost(attempt, layers, chain)

    return min((graph, *attempts), key=rank)


def _cost(graph: StepGraph, layers: Layers, chain: Chain) -> float:
    """Multiply-adds of a chain; what kernels do once a tile takes as long as so many channels more."""
    cost = 0.0
    for op in graph.ops:
        macs = sum(
            layer_of(layers, each.layer, ConvConstants).macs
            for each in runs(op)
            if isinstance(each, ConvInputGrad) and each.name in chain
        )
        more = _OVERHEAD / graph.tensors[op.tiles[0]].shape[2] if isinstance(op, ChannelTiles) else 0
        cost += macs * (1 + more)
    return cost


def _peak(graph: StepGraph, layers: Layers, chain: Chain) -> int:
    """Most bytes alive while any of these gradients is taken, or something is updated from them."""
    between = {op.gx for op in _gradients(graph) if op.name in chain[:-1]}
    indices = [
        index
        for index, op in enumerate(graph.ops)
        if any(inner.name in chain or not between.isdisjoint(inner.reads) for inner in inner_ops(op))
    ]
    return max(step_bytes(graph, layers, indices))


def _gradients(graph: StepGraph) -> list[ConvInputGrad]:
    return [inner for op in graph.ops for inner in inner_ops(op) if isinstance(inner, ConvInputGrad)]


def _widths(graph: StepGraph, first: str) -> list[int]:
    """Channels of a tile, from two tiles down to the narrowest; the last tile is hardly narrower than the others."""
    gx = next(op.gx for op in _gradients(graph) if op.name == first)
    lanes = -(-graph.tensors[gx].shape[2] // _LANES)
    return sorted({_LANES * -(-lanes // count) for count in range(2, lanes + 1)}, reverse=True)


def _chains(graph: StepGraph, layers: Layers) -> list[Chain]:
    """The longest ones that end with a dense convolution; between its ends each has depthwise ones, or none."""
    readers: dict[str, list[StepOp]] = {}
    for op in graph.ops:
        for name in op.reads:
            readers.setdefault(name, []).append(op)
    before: dict[str, ConvInputGrad] = {}
    for gradient in _gradients(graph):
        others = [op for op in readers.get(gradient.gx, ()) if not isinstance(op, BiasUpdate | WeightUpdate)]
        if len(others) == 1 and isinstance(others[0], ConvInputGrad):
            before[others[0].name] = gradient
    chains: list[Chain] = []
    for last in _gradients(graph):
        if _kind(last, layers) != "conv":
            continue
        chain, first = [last.name], before.get(last.name)
        while first is not None and _kind(first, layers) != "grouped":
            chain.insert(0, first.name)
            first = before.get(first.name) if _kind(first, layers) == "depthwise" else None
        if len(chain) > 1:
            chains.append(tuple(chain))
    return chains


def _kind(op: ConvInputGrad, layers: Layers) -> str:
    return layer_of(layers, op.layer, ConvConstants).kind


def _with_tiles(graph: StepGraph, layers: Layers, chain: Chain, channels: int) -> StepGraph:
    """One op for a chain and the updates from what lies between; an update of its first weights follows it."""
    first, *others = (next(op for op in _gradients(graph) if op.name == name) for name in chain)
    shared, last = first.scratch, others[-1]
    gradients = (first, *(replace(op, scratch=shared) for op in others[:-1]), last)
    tiles = {op.gx for op in gradients[:-1]}
    updates: list[BiasUpdate | WeightUpdate] = []
    after: list[StepOp] = []
    ordered: list[StepOp] = []
    for op in graph.ops:
        if isinstance(op, BiasUpdate | WeightUpdate) and op.g in tiles:
            updates.append(replace(op, scratch=shared) if isinstance(op, WeightUpdate) and op.scratch else op)
        elif isinstance(op, WeightUpdate) and op.layer == first.layer:
            after.append(op)
        elif op.name not in chain or op.name == last.name:
            ordered.append(op)
    group = ChannelTiles(name=f"{first.name}..{last.name}", gradients=gradients, updates=tuple(updates))
    at = next(index for index, op in enumerate(ordered) if op.name == last.name)
    ops = (*ordered[:at], group, *after, *ordered[at + 1 :])
    tensors = dict(graph.tensors)
    for tile in tiles:
        height, width, _ = tensors[tile].shape
        tensors[tile] = TensorType((height, width, channels), "s16", "tile")
    # A dense convolution takes two columns at a time.
    columns = 2 if _kind(first, layers) == "conv" else 1
    tensors[shared] = TensorType((1, 1, columns * channels), "s32", "scratch")
    tensors[last.scratch] = TensorType(tensors[last.gx].shape, "s32", "scratch")
    used = {name for op in ops for name in (*op.reads, *op.writes)} | {graph.input}
    return replace(graph, tensors={name: tensor for name, tensor in tensors.items() if name in used}, ops=ops)
