"""Where an op may write over what it reads.

Kernels work in ascending order: rows of an output are written one after another, and once a row is written the first
rows of the input are never read again. So an output may lie over its own input if it starts some bytes below it: the
``lead``. What follows from the shapes is computed here, for the memory planner to use.
"""

from collections.abc import Iterator, Mapping

from efftrain.ondevice.constants import ConvConstants, ConvShape, Layers, MaxPoolConstants, layer_of
from efftrain.ondevice.ir import (
    AddForward,
    ChannelTiles,
    ConvForward,
    ConvInputGrad,
    GradientSum,
    MaxPoolForward,
    Move,
    MultiplyForward,
    MultiplyGrad,
    RowOp,
    RowStream,
    StepGraph,
    StepOp,
    TableForward,
    TableGrad,
    TensorType,
)

Leads = Mapping[tuple[str, str], int]
"""For (written, read): the written tensor may overlap the read one if it starts at least so many bytes below it. Minus
the read one's size: it may lie anywhere."""


def leads(graph: StepGraph, layers: Layers) -> dict[tuple[str, str], int]:
    """All pairs of a step. They hold during the op that writes the one and reads the other for the last time."""
    return {pair: lead for op in graph.ops for pair, lead in _of(op, graph.tensors, layers)}


def _of(op: StepOp, tensors: Mapping[str, TensorType], layers: Layers) -> Iterator[tuple[tuple[str, str], int]]:
    match op:
        case ConvForward() | MaxPoolForward():
            read, written = _row_bytes(tensors[op.x]), _row_bytes(tensors[op.y])
            rows = range(tensors[op.y].shape[0])
            yield (op.y, op.x), max((row + 1) * written - first_row(op, row, layers) * read for row in rows)
        case AddForward():
            yield (op.y, op.x), 0
            yield (op.y, op.z), 0
        case TableForward() | MultiplyForward():
            yield (op.y, op.x), 0
        case RowStream():
            yield (op.y, op.x), _stream_lead(op, tensors, layers)
        case ConvInputGrad():
            shape = layer_of(layers, op.layer, ConvConstants).shape
            read, written = _row_bytes(tensors[op.g]), _row_bytes(tensors[op.gx])
            rows = range(shape.in_h)
            lead = max((row + 1) * written - min(shape.first_gradient_row(row), shape.out_h) * read for row in rows)
            yield (op.gx, op.g), lead
        case ChannelTiles():
            yield from _tiles(op, tensors)
        case TableGrad():
            yield (op.gx, op.g), 0
        case MultiplyGrad() if op.scratch is None:
            yield (op.gx, op.g), 0
        case Move():
            yield (op.y, op.x), -tensors[op.x].num_bytes
        case GradientSum():
            yield (op.g, op.a), 0
            if op.b is not None:
                yield (op.g, op.b), 0
        case _:
            pass


def first_row(op: RowOp, row: int, layers: Layers) -> int:
    """First row of an input that is read for output row ``row``; no later row reads one before it."""
    if isinstance(op, AddForward):
        return row
    return min(_shape(op, layers).first_row(row), _shape(op, layers).in_h)


def rows_needed(op: RowOp, row: int, layers: Layers) -> int:
    """How many rows of an input must be there before output row ``row`` can be computed."""
    return row + 1 if isinstance(op, AddForward) else _shape(op, layers).rows_needed(row)


def _shape(op: ConvForward | MaxPoolForward, layers: Layers) -> ConvShape:
    layer = layers[op.layer]
    assert isinstance(layer, ConvConstants | MaxPoolConstants), f"{op.layer} has no windows"
    return layer.shape


def _stream_lead(stream: RowStream, tensors: Mapping[str, TensorType], layers: Layers) -> int:
    """Walk the schedule: when the last op writes a row, which rows of the input are still wanted by any op?"""
    read, written = _row_bytes(tensors[stream.x]), _row_bytes(tensors[stream.y])
    readers = [index for index, op in enumerate(stream.ops) if stream.x in op.reads]
    counts = [stream.schedule.count(index) for index in range(len(stream.ops))]
    done = [0] * len(stream.ops)
    lead = 0
    for index in stream.schedule:
        if index == len(stream.ops) - 1:
            # A row that an op is computing right now is still reading.
            wanted = [
                first_row(stream.ops[reader], done[reader], layers)
                for reader in readers
                if done[reader] < counts[reader]
            ]
            lead = max(lead, (done[index] + 1) * written - min(wanted, default=tensors[stream.x].shape[0]) * read)
        done[index] += 1
    return lead


def _tiles(op: ChannelTiles, tensors: Mapping[str, TensorType]) -> Iterator[tuple[tuple[str, str], int]]:
    """The gradient that is left is written when nothing but its sums and its own mask is read any more."""
    last = op.gradients[-1]
    yield (last.gx, last.scratch), 0
    for name in (*op.reads, *op.writes):
        if name not in (last.gx, last.scratch, last.mask):
            yield (last.gx, name), -tensors[name].num_bytes


def _row_bytes(tensor: TensorType) -> int:
    """Bytes of one row; only of tensors whose elements are whole bytes."""
    return tensor.num_bytes // tensor.shape[0]
