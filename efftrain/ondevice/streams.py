"""The pass that runs layers row by row: of what lies between them only a few rows exist.

Nothing is computed twice, unlike with patches, and no bit changes. Ring sizes are not guessed: the schedule is walked,
and a ring is as high as the most rows that are wanted at once.

Source: the idea of not holding a whole high-resolution map is MCUNetV2's (arXiv:2110.15352). Differs: rows instead of
patches, so there is no halo to compute again.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeGuard

from efftrain.ondevice.constants import Layers
from efftrain.ondevice.ir import (
    AddForward,
    ConvForward,
    MaxPoolForward,
    RowOp,
    RowStream,
    StepGraph,
    StepOp,
    TensorType,
)
from efftrain.ondevice.memory import step_bytes
from efftrain.ondevice.overlap import first_row, rows_needed
from efftrain.ondevice.verify import verify

_MAX_OPS = 255


def stream_rows(graph: StepGraph, layers: Layers, arena_bytes: int | None = None) -> StepGraph:
    """Stream the runs of layers that set the peak of the forward pass, and no others.

    Among all ways to cut the forward pass into runs it takes one whose peak is the lowest, or below the peak of the
    backward pass; of those, one that streams the fewest layers.
    """
    forward = graph.ops[: graph.num_predict]
    pieces = _pieces(graph, layers)
    backward = max(step_bytes(graph, layers)[graph.num_predict :], default=0)
    target = max(_lowest_peak(len(forward), pieces), backward)
    ops: list[StepOp] = []
    tensors = dict(graph.tensors)
    at = 0
    for end in _cuts(len(forward), pieces, target):
        piece = pieces[at, end]
        if piece.stream is None:
            ops.append(forward[at])
        else:
            ops.append(piece.stream)
            tensors |= piece.rings
        at = end
    result = replace(graph, tensors=tensors, ops=(*ops, *graph.ops[graph.num_predict :]))
    verify(result)
    return result


@dataclass(frozen=True, slots=True)
class _Piece:
    """The ops [start, end) of the forward pass, run as one."""

    peak: int
    stream: RowStream | None
    rings: Mapping[str, TensorType]

    @property
    def num_streamed(self) -> int:
        return 0 if self.stream is None else len(self.stream.ops)


def _pieces(graph: StepGraph, layers: Layers) -> dict[tuple[int, int], _Piece]:
    forward = graph.ops[: graph.num_predict]
    alone = step_bytes(graph, layers)
    pieces = {(i, i + 1): _Piece(alone[i], None, {}) for i in range(len(forward))}
    readers: dict[str, list[int]] = {}
    for index, op in enumerate(graph.ops):
        for name in op.reads:
            readers.setdefault(name, []).append(index)
    for start in range(len(forward)):
        for end in range(start + 2, len(forward) + 1):
            ops = [op for op in forward[start:end] if _streams(op)]
            if len(ops) < end - start or len(ops) > _MAX_OPS:
                break
            inside = {op.y for op in ops}
            outside = {name for op in ops for name in op.reads} - inside
            if len(outside) > 1:
                break
            if any(not start <= reader < end for op in ops[:-1] for reader in readers[op.y]):
                continue
            stream, rings = _stream(ops, outside.pop(), graph.tensors, layers)
            streamed = replace(
                graph, tensors={**graph.tensors, **rings}, ops=(*forward[:start], stream, *graph.ops[end:])
            )
            pieces[start, end] = _Piece(step_bytes(streamed, layers, [start])[0], stream, rings)
    return pieces


def _streams(op: StepOp) -> TypeGuard[RowOp]:
    """Can compute one row at a time; the mask of an addition starts at its first byte."""
    return isinstance(op, ConvForward | MaxPoolForward) or (isinstance(op, AddForward) and op.mask is None)


def _lowest_peak(count: int, pieces: Mapping[tuple[int, int], _Piece]) -> int:
    best = [0] + [1 << 62] * count
    for end in range(1, count + 1):
        best[end] = min(max(best[a], piece.peak) for (a, b), piece in pieces.items() if b == end)
    return best[count]


def _cuts(count: int, pieces: Mapping[tuple[int, int], _Piece], target: int) -> list[int]:
    """Ends of the pieces of the way that streams the fewest ops with no peak above the target."""
    best: list[tuple[float, int]] = [(0, 0)] + [(math.inf, 0)] * count
    for end in range(1, count + 1):
        ways = (
            (best[a][0] + piece.num_streamed, a)
            for (a, b), piece in pieces.items()
            if b == end and piece.peak <= target
        )
        best[end] = min(ways, default=(math.inf, 0))
    ends = [count]
    while best[ends[-1]][1] > 0:
        ends.append(best[ends[-1]][1])
    return ends[::-1]


def _stream(
    ops: Sequence[RowOp], x: str, tensors: Mapping[str, TensorType], layers: Layers
) -> tuple[RowStream, dict[str, TensorType]]:
    maker = {op.y: index for index, op in enumerate(ops)}
    sources = [[maker[name] for name in op.reads if name in maker] for op in ops]
    readers = [[number for number, reader in enumerate(ops) if op.y in reader.reads] for op in ops]
    heights = [tensors[op.y].shape[0] for op in ops]
    schedule: list[int] = []
    done = [0] * len(ops)
    wanted = {op.y: 1 for op in ops}

    def make(index: int) -> None:
        """Compute the next row of an op, and before it the rows that it needs."""
        op = ops[index]
        for source in sources[index]:
            while done[source] < rows_needed(op, done[index], layers):
                make(source)
        oldest = min(
            (first_row(ops[i], done[i], layers) for i in readers[index] if done[i] < heights[i]), default=done[index]
        )
        wanted[op.y] = max(wanted[op.y], done[index] + 1 - oldest)
        schedule.append(index)
        done[index] += 1

    for _ in range(heights[-1]):
        make(len(ops) - 1)
    rings = {op.y: replace(tensors[op.y], shape=(wanted[op.y], *tensors[op.y].shape[1:])) for op in ops[:-1]}
    stream = RowStream(
        name=f"{ops[0].name}..{ops[-1].name}",
        x=x,
        y=ops[-1].y,
        rings=tuple(rings),
        masks=tuple(op.mask for op in ops if isinstance(op, ConvForward | AddForward) and op.mask is not None),
        biases=tuple(op.bias for op in ops if isinstance(op, ConvForward) and op.bias is not None),
        ops=tuple(ops),
        schedule=tuple(schedule),
    )
    return stream, rings
