"""The graph as it was read -> fewer kinds of ops, and none that a device would not have to run.

Each function is one rewriting. What must hold afterwards: Flatten, Linear, BatchNorm and Pad are gone, shapes are those
of the maps that ops really read, every op leads to the output, and the last one is a Conv of one position.

Note [flat maps]: a vector made by flattening a map of height x width x channels stays that map here, and a linear layer
on it becomes a convolution that covers it. Torch counts channels first, we count them last, so only ops to which the
order of the elements does not matter may stand between the two; the others are refused.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from efftrain.errors import CompileError
from efftrain.ondevice.frontend.operators import Pad
from efftrain.ondevice.ir import (
    Activation,
    Add,
    Apply,
    BatchNorm,
    Concat,
    Conv,
    Flatten,
    FloatGraph,
    FloatOp,
    GlobalAverage,
    Linear,
    Multiply,
    Padding,
    Pool,
    Shape,
    TensorType,
    not_negative,
)

Reals = npt.NDArray[np.float32]

MAX_TERMS = 33_155
"""Most products one output may sum: with |bias| <= 2^30 the int32 accumulator then cannot overflow."""


def canonicalize(graph: FloatGraph) -> FloatGraph:
    """Bring a graph as it was read into the form that the compiler takes.

    Raises:
        CompileError: An op stands where it has no meaning on the device, or the graph does not end in a layer.
    """
    graph = remove_dead(graph)
    graph = _Lowering(graph).run()
    graph = fold_batch_norms(graph)
    graph = fold_activations(graph)
    _check(graph)
    return graph


def remove_dead(graph: FloatGraph) -> FloatGraph:
    """Leave out ops that do not lead to the output, with their tensors."""
    needed = {graph.output}
    ops: list[FloatOp] = []
    for op in reversed(graph.ops):
        if op.y in needed:
            needed.update(op.reads)
            ops.append(op)
    tensors = {name: tensor for name, tensor in graph.tensors.items() if name in needed | {graph.input}}
    return replace(graph, tensors=tensors, ops=tuple(reversed(ops)))


@dataclass
class _Lowering:
    """Linear -> Conv; Flatten, Pad and pools of one position disappear."""

    graph: FloatGraph
    ops: list[FloatOp] = field(default_factory=list)
    shapes: dict[str, Shape] = field(default_factory=dict)
    same: dict[str, str] = field(default_factory=dict)
    flat: set[str] = field(default_factory=set)
    """Vectors that are maps of more than one position. See Note [flat maps]."""
    padded: dict[str, Pad] = field(default_factory=dict)
    positive: dict[str, bool] = field(default_factory=dict)
    scaled: dict[str, BatchNorm] = field(default_factory=dict)
    """Flat maps with a factor for every element, which only a linear layer can take up."""

    def run(self) -> FloatGraph:
        self.constants = dict(self.graph.constants)
        self.shapes[self.graph.input] = self.graph.tensors[self.graph.input].shape
        self.positive[self.graph.input] = False
        for op in self.graph.ops:
            self._check_operands(op)
            self.positive[op.y] = not_negative(op, self.positive)
            x = self.same.get(op.x, op.x)
            match op:
                case Flatten():
                    self._alias(op, flat=self.shapes[x][:2] != (1, 1))
                case Pad():
                    self._pad(op)
                case Linear():
                    self._emit(self._covering(op, x), op.y)
                case Conv() if op.x in self.flat:
                    if op.groups != 1 or self.constants[op.weight].shape[1:3] != (1, 1) or any(op.padding):
                        raise self._refuse_flat(op)
                    self._emit(self._covering(op, x), op.y)
                case Conv():
                    self._emit(replace(op, x=x, padding=self._around(op)), op.y)
                case Pool() if op.x in self.padded:
                    self._emit(replace(op, x=x, padding=self._around(op)), op.y)
                case BatchNorm() if op.x in self.flat:
                    self._alias(op, flat=True)
                    self.scaled[op.y] = op
                case Pool() | GlobalAverage() if self._one_position(op.x) and self._one_position(op.y):
                    if isinstance(op, Pool) and op.kind == "average" and op.kernel != (1, 1):
                        raise CompileError(
                            f"average pooling at {op.source} acts on one position and its padding; leave it out"
                        )
                    self._alias(op, flat=op.x in self.flat)
                case Pool() if op.x in self.flat:
                    raise self._refuse_flat(op)
                case Pool(kernel=(1, 1), stride=(1, 1), padding=(0, 0, 0, 0)):
                    self._alias(op, flat=False)
                case Pool(padding=(0, 0, 0, 0)) if op.kernel == self.shapes[x][:2] and op.kind == "average":
                    self._emit(GlobalAverage(name=op.name, x=x, y=op.y, source=op.source), op.y)
                case Add() | Multiply():
                    self._emit(replace(op, x=x, z=self.same.get(op.z, op.z)), op.y, like=op)
                case Concat():
                    others = tuple(self.same.get(name, name) for name in op.others)
                    self._emit(replace(op, x=x, others=others), op.y, like=op)
                case Apply():
                    self._emit(replace(op, x=x), op.y, like=op)
                case _:
                    self._emit(replace(op, x=x), op.y)
        output = self.same.get(self.graph.output, self.graph.output)
        tensors = {
            name: TensorType(shape, "f32", "input" if name == self.graph.input else "activation")
            for name, shape in self.shapes.items()
        }
        return remove_dead(FloatGraph(self.graph.input, output, tensors, tuple(self.ops), self.constants))

    def _one_position(self, name: str) -> bool:
        return self.graph.tensors[name].shape[:2] == (1, 1)

    def _emit(self, op: FloatOp, y: str, like: FloatOp | None = None) -> None:
        """Add an op; ``like`` is the op it was, if it keeps flat maps as they are."""
        self.shapes[y] = self.graph.tensors[y].shape
        if like is not None and like.x in self.flat:
            self.flat.add(y)
            height, width, channels = self.shapes[op.x]
            if isinstance(op, Concat):
                channels = sum(self.shapes[name][2] for name in op.reads)
            self.shapes[y] = (height, width, channels)
        self.ops.append(op)

    def _alias(self, op: FloatOp, flat: bool) -> None:
        self.same[op.y] = self.same.get(op.x, op.x)
        if flat:
            self.flat.add(op.y)

    def _check_operands(self, op: FloatOp) -> None:
        """Padded and scaled maps exist only for the layer that takes them up; flat ones must be alike."""
        for name in op.reads:
            if name in self.padded:
                self._check_padded(op, self.padded[name])
            if name in self.scaled and not isinstance(op, Linear):
                raise CompileError(
                    f"the batch norm at {self.scaled[name].source} acts on a flattened map and is read by {op.name} at "
                    f"{op.source}, not by a linear layer. Put it before flatten, one value a channel."
                )
        flat = [name for name in op.reads if name in self.flat]
        if flat and len(op.reads) > 1:
            shapes = {self.shapes[self.same.get(name, name)] for name in op.reads}
            alike = {shape[:2] for shape in shapes} if isinstance(op, Concat) else shapes
            if len(flat) < len(op.reads) or len(alike) > 1:
                raise self._refuse_flat(op)

    def _check_padded(self, op: FloatOp, pad: Pad) -> None:
        """A border is folded where it changes nothing: of zeros into a convolution, of what is never largest into a max
        pool whose every window has more than border."""
        place, reader = f"padding with {pad.value:g} at {pad.source}", f"{op.name} at {op.source}"
        match op:
            case Pad():
                if op.value != pad.value:
                    raise CompileError(f"{place} is padded with {op.value:g} at {op.source}. Pad with one value.")
            case Conv():
                if pad.value != 0:
                    raise CompileError(f"{place} is read by the convolution {reader}. Pad with zeros.")
            case Pool(kind="max"):
                if pad.value == 0 and not self.positive[op.x]:
                    raise CompileError(
                        f"{place} is read by the max pool {reader}, where values may be negative. Pad with -inf, use "
                        "the padding= argument of the pool, or put a ReLU before the padding."
                    )
                (top, left, _, _), (out_h, out_w, _) = self._around(op), self.graph.tensors[op.y].shape
                height, width, _ = self.shapes[self.same.get(op.x, op.x)]
                last = ((out_h - 1) * op.stride[0] - top, (out_w - 1) * op.stride[1] - left)
                if top >= op.kernel[0] or left >= op.kernel[1] or last[0] >= height or last[1] >= width:
                    raise CompileError(f"{place} fills whole windows of the max pool {reader}. Pad with less.")
            case _:
                raise CompileError(
                    f"{place} is read by {reader}, not by a convolution or a max pool. Pad right before one, or use "
                    "its padding= argument."
                )

    def _around(self, op: Conv | Pool) -> Padding:
        """The padding of an op with that which it reads."""
        if op.x not in self.padded:
            return op.padding
        return _together(op.padding, self.padded[op.x].padding)

    def _refuse_flat(self, op: FloatOp) -> CompileError:
        return CompileError(
            f"{op.name} at {op.source} reads a flattened map together with another shape or through a kernel. Apply it "
            "before flatten, or after a linear layer."
        )

    def _pad(self, op: Pad) -> None:
        before = self.padded.get(op.x)
        if before is not None:
            op = replace(op, padding=_together(op.padding, before.padding))
        if op.x in self.flat:
            raise self._refuse_flat(op)
        self._alias(op, flat=False)
        if any(op.padding):
            self.padded[op.y] = op

    def _covering(self, op: Linear | Conv, x: str) -> Conv:
        """A convolution whose kernel is the whole map. See Note [flat maps]."""
        height, width, channels = self.shapes[x]
        weight = self.constants[op.weight].astype(np.float64).reshape(-1, channels * height * width)
        bias = op.bias
        scale = self.scaled.get(op.x)
        if scale is not None:
            shift = weight @ self.constants[scale.offset].astype(np.float64)
            if bias is not None:
                shift += self.constants[bias]
            bias = bias or f"{op.name}.bias"
            self.constants[bias] = _f32(shift)
            weight = weight * self.constants[scale.factor]
        self.constants[op.weight] = _f32(weight.reshape(-1, channels, height, width).transpose(0, 2, 3, 1))
        return Conv(
            name=op.name,
            x=x,
            y=op.y,
            source=op.source,
            weight=op.weight,
            bias=bias,
            stride=(1, 1),
            padding=(0, 0, 0, 0),
        )


def _together(one: Padding, other: Padding) -> Padding:
    (top, left, bottom, right), (above, before, below, behind) = one, other
    return top + above, left + before, bottom + below, right + behind


def fold_batch_norms(graph: FloatGraph) -> FloatGraph:
    """Put BatchNorm into the Conv before it, or make it a depthwise Conv of width 1 if that one has another reader."""
    readers = Counter(name for op in graph.ops for name in op.reads)
    constants = dict(graph.constants)
    writer: dict[str, int] = {}
    same: dict[str, str] = {}
    ops: list[FloatOp] = []
    for raw in graph.ops:
        op = _renamed(raw, same)
        if isinstance(op, BatchNorm):
            factor, offset = (constants[name].astype(np.float64) for name in (op.factor, op.offset))
            previous = ops[writer[op.x]] if op.x in writer else None
            if isinstance(previous, Conv) and readers[raw.x] == 1:
                if previous.bias is not None:
                    offset = offset + factor * constants[previous.bias]
                bias = previous.bias or f"{previous.name}.bias"
                constants[previous.weight] = _f32(constants[previous.weight] * factor[:, None, None, None])
                constants[bias] = _f32(offset)
                ops[writer[op.x]] = replace(previous, bias=bias)
                same[op.y] = op.x
                continue
            constants[op.factor] = _f32(factor.reshape(-1, 1, 1, 1))
            channels = len(factor)
            op = Conv(
                name=op.name,
                x=op.x,
                y=op.y,
                source=op.source,
                weight=op.factor,
                bias=op.offset,
                stride=(1, 1),
                padding=(0, 0, 0, 0),
                groups=channels,
            )
        writer[op.y] = len(ops)
        ops.append(op)
    return _rebuilt(graph, ops, same, constants)


def fold_activations(graph: FloatGraph) -> FloatGraph:
    """Put ReLU and ReLU6 into the Conv or Add before them, if nothing else reads what that one writes.

    They may have come after a max pool: the largest of clamped values is the largest value clamped.
    """
    readers = Counter(name for op in graph.ops for name in op.reads)
    writer: dict[str, int] = {}
    same: dict[str, str] = {}
    ops: list[FloatOp] = []
    sole_reader: list[bool] = []  # of its x, which an op wrote
    for raw in graph.ops:
        op = _renamed(raw, same)
        if isinstance(op, Apply) and op.x in writer and readers[raw.x] == 1:
            i, function = writer[op.x], op.function
            previous = ops[i]
            while isinstance(previous, Pool) and previous.kind == "max" and sole_reader[i]:
                i = writer[previous.x]
                previous = ops[i]
            if isinstance(previous, Conv | Add) and (function == "relu" or function == "relu6"):
                six = "relu6" in (previous.activation, function)
                activation: Activation = "relu6" if six else "relu"
                ops[i] = replace(previous, activation=activation)
                same[op.y] = op.x
                continue
        sole_reader.append(op.x in writer and readers[raw.x] == 1)
        writer[op.y] = len(ops)
        ops.append(op)
    return _rebuilt(graph, ops, same, graph.constants)


def _renamed(op: FloatOp, same: Mapping[str, str]) -> FloatOp:
    """The op reading what its operands have become."""
    op = replace(op, x=same.get(op.x, op.x))
    match op:
        case Add() | Multiply():
            return replace(op, z=same.get(op.z, op.z))
        case Concat():
            return replace(op, others=tuple(same.get(name, name) for name in op.others))
        case _:
            return op


def _rebuilt(
    graph: FloatGraph, ops: list[FloatOp], same: Mapping[str, str], constants: Mapping[str, Reals]
) -> FloatGraph:
    output = same.get(graph.output, graph.output)
    written = {graph.input, *(op.y for op in ops)}
    tensors = {name: tensor for name, tensor in graph.tensors.items() if name in written}
    used = {name for op in ops if isinstance(op, Conv) for name in (op.weight, op.bias)}
    used |= {name for op in ops if isinstance(op, BatchNorm) for name in (op.factor, op.offset)}
    kept = {name: value for name, value in constants.items() if name in used}
    return FloatGraph(graph.input, output, tensors, tuple(ops), kept)


def channel_last_outputs(graph: FloatGraph) -> FloatGraph:
    """The outputs of an autoencoder in the order of its input, with which the device compares them: channel last.

    Args:
        graph: A canonical graph, whose outputs are in torch's order, channel first.
    """
    head, (height, width, channels) = graph.ops[-1], graph.tensors[graph.input].shape
    assert isinstance(head, Conv), "a canonical graph ends in a layer"
    if len(graph.constants[head.weight]) != height * width * channels:
        return graph  # ``quantize`` says that this is no autoencoder
    order = np.arange(height * width * channels).reshape(channels, height, width).transpose(1, 2, 0).ravel()
    moved = {name: graph.constants[name][order] for name in (head.weight, head.bias) if name is not None}
    return replace(graph, constants={**graph.constants, **moved})


def _f32(values: npt.NDArray[np.float64]) -> Reals:
    return np.ascontiguousarray(values, np.float32)


def _check(graph: FloatGraph) -> None:
    for op in graph.ops:
        if not isinstance(op, Conv):
            continue
        terms = math.prod(graph.constants[op.weight].shape[1:])
        if terms > MAX_TERMS:
            raise CompileError(
                f"layer {op.name} at {op.source} sums {terms} products an output; at most {MAX_TERMS} fit an int32 sum "
                "for certain. Put a pooling or a narrower layer before it."
            )
        for name in (op.weight, op.bias):
            if name is not None and not np.isfinite(graph.constants[name]).all():
                raise CompileError(
                    f"layer {op.name} at {op.source} holds inf or NaN after its batch norm was folded into it; train "
                    "it again before compiling"
                )
    last = graph.ops[-1] if graph.ops else None
    is_layer = isinstance(last, Conv) and last.activation == "none" and last.groups == 1
    if last is None or not is_layer or graph.tensors[last.y].shape[:2] != (1, 1):
        found = "" if last is None else f"; it ends in {_described(last, graph.tensors[last.y].shape)} at {last.source}"
        raise CompileError(
            "the model must end in a linear layer without ReLU or softmax, whose outputs are the logits of the "
            f"classes, or an autoencoder's reconstruction{found}"
        )
    if graph.tensors[last.y].shape[2] < 2:
        raise CompileError("the last layer has one output; softmax cross-entropy needs at least 2 classes")


def _described(op: FloatOp, shape: Shape) -> str:
    kind = op.function if isinstance(op, Apply) else type(op).__name__.lower()
    if isinstance(op, Conv | Add) and op.activation != "none":
        return f"{kind} with {op.activation}"
    if isinstance(op, Conv) and op.groups != 1:
        per_channel = op.groups == shape[2]
        return "a value a channel (depthwise convolution or batch norm)" if per_channel else f"{op.groups} groups"
    return f"{kind} of {' x '.join(map(str, shape))}"
