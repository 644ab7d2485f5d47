"""What must hold for a graph at all times: the rules that passes rely on, and are checked by."""

import itertools

from efftrain.ondevice.ir import (
    AverageGrad,
    BiasUpdate,
    ChannelTiles,
    ConcatGrad,
    ConvForward,
    ConvInputGrad,
    FloatGraph,
    GradientSum,
    HeadForward,
    MaxPoolGrad,
    MultiplyGrad,
    RowStream,
    StepGraph,
    TableGrad,
    WeightUpdate,
    inner_ops,
)


def verify(graph: FloatGraph | StepGraph) -> None:
    """Check the rules that passes rely on.

    Raises:
        AssertionError: The graph breaks one: a bug of this compiler, never of a user.
    """
    names = [op.name for op in graph.ops]
    assert len(set(names)) == len(names), f"ops share a name: {names}"
    written = {graph.input}
    for op in graph.ops:
        for name in op.reads:
            assert name in written, f"{op.name} reads {name} before it is written"
        for name in op.writes:
            assert name not in written, f"{op.name} writes {name} a second time"
            written.add(name)
    assert written == set(graph.tensors), f"tensors that no op writes: {sorted(set(graph.tensors) - written)}"
    if isinstance(graph, StepGraph):
        assert graph.logits in written, "no op writes the logits"
        _verify_step(graph)


def _verify_step(graph: StepGraph) -> None:
    updated_weights: set[str] = set()
    updated_biases: set[str] = set()
    for op in (
        inner for each in graph.ops for inner in (inner_ops(each) if isinstance(each, ChannelTiles) else (each,))
    ):
        match op:
            case ConvForward() | HeadForward():
                late = updated_weights | updated_biases
                assert op.layer not in late, f"{op.name} would see parameters of the next step"
            case RowStream():
                assert not updated_weights | updated_biases, f"{op.name} would see parameters of the next step"
                _verify_stream(graph, op)
            case ConvInputGrad():
                assert op.layer not in updated_weights, f"{op.name} would see weights of the next step"
                _same_shape(graph, op.gx, op.mask)
            case AverageGrad() | MaxPoolGrad() | TableGrad() | MultiplyGrad() | ConcatGrad():
                _same_shape(graph, op.gx, op.mask)
            case GradientSum():
                _same_shape(graph, op.g, op.mask)
                _same_shape(graph, op.g, op.a)
                _same_shape(graph, op.g, op.b)
            case WeightUpdate():
                assert op.layer not in updated_weights, f"{op.name} updates weights a second time"
                updated_weights.add(op.layer)
            case BiasUpdate():
                assert op.layer not in updated_biases, f"{op.name} updates biases a second time"
                updated_biases.add(op.layer)
            case _:
                pass
    for tiles in (op for op in graph.ops if isinstance(op, ChannelTiles)):
        _verify_tiles(graph, tiles)
    for name, tensor in graph.tensors.items():
        wanted = {"mask": "bit", "gradient": "s16", "logits": "s16", "tile": "s16", "scratch": "s32"}.get(
            tensor.role, "s8"
        )
        assert tensor.dtype == wanted, f"{name} is a {tensor.role} of type {tensor.dtype}, not {wanted}"


def _verify_stream(graph: StepGraph, stream: RowStream) -> None:
    """Nothing but the last tensor leaves the stream, and the ops inside read what is there."""
    inside = {stream.x}
    for op in stream.ops:
        assert set(op.reads) <= inside, f"{op.name} reads what {stream.name} does not have"
        inside.add(op.y)
    assert set(stream.rings) == {op.y for op in stream.ops[:-1]}, f"{stream.name} does not name its rings"
    assert stream.y == stream.ops[-1].y, f"{stream.name} does not name its result"
    readers = {op.name for op in graph.ops if not set(op.reads).isdisjoint(stream.rings)}
    assert not readers, f"{readers} read rows inside {stream.name} that are gone"


def _verify_tiles(graph: StepGraph, tiles: ChannelTiles) -> None:
    """Each op reads what the one before makes, tiles are of one width and stay inside, and the sums have room."""
    channels = {graph.tensors[tile].shape[2] for tile in tiles.tiles}
    assert len(channels) == 1, f"{tiles.name} has tiles of {channels} channels"
    for op, after in itertools.pairwise(tiles.gradients):
        assert after.g == op.gx, f"{after.name} does not read what {op.name} makes"
    assert {op.g for op in tiles.updates} <= set(tiles.tiles), f"{tiles.name} updates from what is no tile"
    last = tiles.gradients[-1]
    assert graph.tensors[last.scratch].shape == graph.tensors[last.gx].shape, f"{last.name} has no room for its sums"
    readers = {op.name for op in graph.ops if not set(op.reads).isdisjoint(tiles.tiles)}
    assert not readers, f"{readers} read tiles inside {tiles.name} that are gone"


def _same_shape(graph: StepGraph, gradient: str, other: str | None) -> None:
    """The same shape; of a tile there are as many channels as there happen to be."""
    if other is not None:
        a, b = (graph.tensors[name].shape for name in (gradient, other))
        tiled = graph.tensors[gradient].role == "tile"
        assert a == b or (tiled and a[:2] == b[:2]), f"{other} does not fit {gradient}"
