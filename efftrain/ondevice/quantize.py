"""Real numbers -> the integers of docs/formats/arithmetic.md, all of them computed here and shipped as constants.

Source: Jacob et al. (arXiv:1712.05877) for scales and requantization; Lin et al. (arXiv:2206.15472) for
quantization-aware scaling (QAS). Differs: QAS is folded into the constants of the update, so a device never sees a
real scale.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from efftrain.errors import CompileError, ConfigError
from efftrain.ondevice.constants import (
    BIAS_LIMIT,
    MASTER_HIGH,
    MASTER_LOW,
    AddConstants,
    ConcatConstants,
    ConvConstants,
    ConvShape,
    Factors,
    Ints,
    LayerConstants,
    Layers,
    Loss,
    MaxPoolConstants,
    Number,
    PoolConstants,
    ProductConstants,
    Reals,
    TableConstants,
    ceil_log2,
)
from efftrain.ondevice.ir import (
    Add,
    AddForward,
    Apply,
    AverageForward,
    Concat,
    ConcatForward,
    Conv,
    ConvForward,
    FloatGraph,
    FloatOp,
    ForwardOp,
    GlobalAverage,
    HeadForward,
    MaxPoolForward,
    Multiply,
    MultiplyForward,
    Padding,
    Pool,
    StepGraph,
    TableForward,
    TensorType,
    not_negative,
)
from efftrain.ondevice.reference import apply_function
from efftrain.ondevice.verify import verify

LOGIT_UNIT = 256 * math.log2(math.e)
"""Logits are counted in ln(2) / 256, so that a power of two is a table of 256 entries and a shift."""
_WEIGHT_TOP, _HEAD_TOP = 127, 64
_DEAD, _TYPICAL = 2.0**-14, 32
_MAX_PIXELS, _MAX_GRADIENT_TERMS, _MAX_OUTPUTS = 1 << 22, 1 << 23, 8192


@dataclass(frozen=True, slots=True)
class Quantized:
    """The forward pass in integers and the constants of every layer."""

    graph: StepGraph
    layers: Layers
    numbers: Mapping[str, Number]
    """How every tensor stores real values; of the output, only its range would mean something."""
    gradient_units: Mapping[str, tuple[float, ...]]
    """For every tensor what one unit of each gradient that reaches it stands for at exponent 0, in the order of its
    readers from the last op to the first."""
    loss: Loss = "cross_entropy"


def quantize(
    graph: FloatGraph,
    ranges: Mapping[str, float],
    learning_rate: float,
    loss: Loss = "cross_entropy",
    *,
    qas: bool = True,
) -> Quantized:
    """Choose scales and compute every constant of the forward pass, the backward pass and the update.

    Args:
        graph: A canonical graph.
        ranges: From ``calibrate``.
        learning_rate: Of plain SGD on the real weights, batch 1; the same number that one would use in fp32.
        loss: Softmax cross-entropy of logits and a label, or the mean squared error of an autoencoder, whose target
            is its input.
        qas: False leaves out quantization-aware scaling, to see what it does: the steps are then those of SGD on the
            integers themselves, smaller by the square of each scale.

    Raises:
        CompileError: A layer is outside what the integer arithmetic can hold.
        ConfigError: The learning rate is not positive and finite.
    """
    if not (math.isfinite(learning_rate) and learning_rate > 0):
        raise ConfigError(f"the learning rate is {learning_rate}; it must be positive")
    numbers = _numbers(graph, ranges)
    count = graph.tensors[graph.output].num_elements
    output_unit, sigma = 1 / LOGIT_UNIT, 1.0
    if loss == "squared_error":
        if count != graph.tensors[graph.input].num_elements or count > _MAX_OUTPUTS:
            raise CompileError(
                f"the squared error compares {count} outputs with {graph.tensors[graph.input].num_elements} inputs; an "
                f"autoencoder has as many of both, at most {_MAX_OUTPUTS}"
            )
        output_unit = numbers[graph.input].scale / 64
        sigma = 2 * output_unit / count
    tensors = {graph.input: TensorType(graph.tensors[graph.input].shape, "s8", "input")}
    for op in graph.ops:
        shape = graph.tensors[op.y].shape
        tensors[op.y] = TensorType(shape, "s16", "logits") if op.y == graph.output else TensorType(shape, "s8")
    result = StepGraph(graph.input, graph.output, tensors, tuple(_forward(graph, op, loss) for op in graph.ops))
    verify(result)
    layers, units = _constants(graph, numbers, learning_rate, output_unit, sigma, qas)
    return Quantized(result, layers, numbers, units, loss)


def fix(ratios: Reals) -> Factors:
    """``ratio = multiplier * 2^-shift`` with a multiplier in [2^30, 2^31), to the nearest; 0 for a ratio of 0."""
    fraction, exponent = np.frexp(ratios)
    multiplier = np.floor(fraction * 2.0**31 + 0.5).astype(np.int64)
    carry = multiplier == 1 << 31
    multiplier = np.where(carry, multiplier >> 1, multiplier)
    shift = np.where(multiplier == 0, 0, 31 - exponent.astype(np.int64) - carry)
    return Factors(multiplier, shift)


# --- formats ----------------------------------------------------------------------------------------------------------


def _numbers(graph: FloatGraph, ranges: Mapping[str, float]) -> dict[str, Number]:
    """A kernel that only moves values needs one scale, one that only averages them one zero point, on both sides."""
    positive = {graph.input: False}
    one_scale = {name: {name} for name in graph.tensors}
    one_zero_point = {name: {name} for name in graph.tensors}
    for op in graph.ops:
        positive[op.y] = not_negative(op, positive)
        if isinstance(op, Concat) or (isinstance(op, Pool) and op.kind == "max"):
            _join(one_scale, (op.y, *op.reads))
        if isinstance(op, Concat | Pool | GlobalAverage):
            _join(one_zero_point, (op.y, *op.reads))
    numbers: dict[str, Number] = {}
    for name in graph.tensors:
        zero_point = -128 if all(positive[other] for other in one_zero_point[name]) else 0
        largest = max(ranges[other] for other in one_scale[name])
        numbers[name] = Number(largest / (127 - zero_point), zero_point)
    return numbers


def _join(groups: dict[str, set[str]], names: tuple[str, ...]) -> None:
    together = set().union(*(groups[name] for name in names))
    for name in together:
        groups[name] = together


def _forward(graph: FloatGraph, op: FloatOp, loss: Loss) -> ForwardOp:
    match op:
        case Conv() if op.y == graph.output:
            target = graph.input if loss == "squared_error" else None
            return HeadForward(name=op.name, layer=op.name, x=op.x, logits=op.y, target=target)
        case Conv() | Pool(kind="average"):
            return ConvForward(name=op.name, layer=op.name, x=op.x, y=op.y)
        case Add():
            return AddForward(name=op.name, layer=op.name, x=op.x, z=op.z, y=op.y)
        case Pool():
            return MaxPoolForward(name=op.name, layer=op.name, x=op.x, y=op.y)
        case Apply():
            return TableForward(name=op.name, layer=op.name, x=op.x, y=op.y)
        case Multiply():
            return MultiplyForward(name=op.name, layer=op.name, x=op.x, z=op.z, y=op.y)
        case Concat():
            return ConcatForward(name=op.name, layer=op.name, xs=op.reads, y=op.y)
        case GlobalAverage():
            return AverageForward(name=op.name, layer=op.name, x=op.x, y=op.y)
        case _:
            raise AssertionError(f"{op.name} is not canonical")


# --- constants --------------------------------------------------------------------------------------------------------


def _constants(
    graph: FloatGraph,
    numbers: Mapping[str, Number],
    learning_rate: float,
    output_unit: float,
    output_sigma: float,
    qas: bool,
) -> tuple[Layers, dict[str, tuple[float, ...]]]:
    layers: dict[str, LayerConstants] = {}
    units: dict[str, list[float]] = {name: [] for name in graph.tensors}
    units[graph.output] = [output_sigma]
    first_index = sum(graph.constants[op.weight].size for op in graph.ops if isinstance(op, Conv))
    for op in reversed(graph.ops):
        # Gradients that nothing needs have no unit; any will do.
        sigma = units[op.y][0] if units[op.y] else 1.0
        x, y = numbers[op.x], numbers[op.y]
        match op:
            case Conv():
                first_index -= graph.constants[op.weight].size
                target = Number(output_unit, 0) if op.y == graph.output else y
                conv = _conv(graph, op, x, target, sigma, learning_rate, first_index, qas)
                layers[op.name] = conv
                units[op.x].append(sigma * float(conv.weight_scale.max()))
            case Pool(kind="average"):
                conv = _average_pool(graph, op, x, y, sigma)
                layers[op.name] = conv
                units[op.x].append(sigma * float(conv.weight_scale.max()))
            case Pool():
                shape = _shape(graph, op, op.kernel, op.stride, op.padding)
                windows = math.prod(-(-k // s) for k, s in zip(op.kernel, op.stride, strict=True))
                layers[op.name] = MaxPoolConstants(op.name, shape, ceil_log2(windows), x.zero_point)
                units[op.x].append(sigma)
            case Add():
                layers[op.name] = _add(op, x, numbers[op.z], y)
                units[op.x].append(sigma)
                units[op.z].append(sigma)
            case Multiply():
                z = numbers[op.z]
                layers[op.name] = _product(graph, op, x, z, y)
                units[op.x].append(sigma * z.scale)
                units[op.z].append(sigma * x.scale)
            case Concat():
                height, width, _ = graph.tensors[op.y].shape
                channels = tuple(graph.tensors[name].shape[2] for name in op.reads)
                layers[op.name] = ConcatConstants(op.name, height * width, channels)
                for name in op.reads:
                    units[name].append(sigma)
            case Apply():
                layers[op.name] = _table(op, x, y)
                units[op.x].append(2 * sigma)
            case GlobalAverage():
                layers[op.name] = _global_average(graph, op, x, y)
                units[op.x].append(sigma / (graph.tensors[op.x].num_elements // graph.tensors[op.x].shape[2]))
            case _:
                raise AssertionError(f"{op.name} passed _forward")
    return dict(reversed(layers.items())), {name: tuple(values) for name, values in units.items()}


def _conv(
    graph: FloatGraph, op: Conv, x: Number, y: Number, sigma: float, learning_rate: float, first_index: int, qas: bool
) -> ConvConstants:
    weight = graph.constants[op.weight].astype(np.float64)
    bias = np.zeros(len(weight)) if op.bias is None else graph.constants[op.bias].astype(np.float64)
    return _layer(
        graph,
        op,
        weight,
        bias,
        op.stride,
        op.padding,
        x,
        y,
        sigma,
        learning_rate,
        first_index,
        depthwise=1 < op.groups == graph.tensors[op.x].shape[2] == len(weight),
        groups=op.groups,
        has_bias=op.bias is not None,
        masked=op.activation != "none",
        qas=qas,
    )


def _average_pool(graph: FloatGraph, op: Pool, x: Number, y: Number, sigma: float) -> ConvConstants:
    """Equal weights are exact in int8: all are 127."""
    channels = graph.tensors[op.x].shape[2]
    weight = np.full((channels, *op.kernel, 1), 1 / math.prod(op.kernel))
    bias = np.zeros(channels)
    return _layer(graph, op, weight, bias, op.stride, op.padding, x, y, sigma, 1.0, 0, depthwise=True, has_bias=False)


def _layer(
    graph: FloatGraph,
    op: FloatOp,
    weight: Reals,
    bias: Reals,
    stride: tuple[int, int],
    padding: Padding,
    x: Number,
    y: Number,
    sigma: float,
    learning_rate: float,
    first_index: int,
    *,
    depthwise: bool,
    groups: int = 1,
    has_bias: bool,
    masked: bool = False,
    qas: bool = True,
) -> ConvConstants:
    is_head = op.y == graph.output
    groups = 1 if depthwise else groups
    shape = _shape(graph, op, (weight.shape[1], weight.shape[2]), stride, padding)
    terms = shape.taps * (1 if depthwise else shape.out_c // groups)
    if shape.pixels > _MAX_PIXELS or terms > _MAX_GRADIENT_TERMS:
        raise CompileError(
            f"layer {op.name} at {op.source} has {shape.pixels} output positions and {terms} gradient terms an input; "
            f"at most {_MAX_PIXELS} and {_MAX_GRADIENT_TERMS} are supported"
        )
    largest, dead = _ranges(weight, x, y)
    scale = np.maximum(
        largest / (_HEAD_TOP if is_head else _WEIGHT_TOP),
        # The least that lets a bias fit.
        np.abs(bias) / (x.scale * (BIAS_LIMIT >> 2)),
    )
    master = np.clip(_round(256 * weight / scale[:, None, None, None]), MASTER_LOW, MASTER_HIGH)
    bias_scale = x.scale * scale
    channel_scale = _round(32767 * scale / scale.max())
    # Weights of dead channels will grow to what others are.
    size = np.where(dead[:, None, None, None], _TYPICAL, np.abs((master + 128) >> 8))
    initial = size * (channel_scale / 32767)[:, None, None, None]
    # Of the products that meet in one input channel.
    bound = initial.sum((1, 2, 3)) if depthwise else initial.reshape(groups, -1, initial.shape[3]).sum(1)
    operand_bits = min(15, 24 - ceil_log2(terms))
    ratio = bias_scale / y.scale
    return ConvConstants(
        name=op.name,
        shape=shape,
        depthwise=depthwise,
        groups=groups,
        is_head=is_head,
        has_bias=has_bias,
        trainable=isinstance(op, Conv),
        master=np.ascontiguousarray(master.transpose(3, 1, 2, 0)) if depthwise else master,
        bias=np.clip(_round(bias / bias_scale), -BIAS_LIMIT, BIAS_LIMIT),
        out=_forward_factors(ratio, op.name),
        x_zero_point=x.zero_point,
        y_zero_point=y.zero_point,
        minimum=y.zero_point if masked else -128,
        masked=masked,
        channel_scale=channel_scale,
        operand_bits=operand_bits,
        grad_shift=math.ceil(math.log2(max(float(bound.max()), 1.0))) + operand_bits - 15,
        # A gradient with respect to an integer carries its scale; QAS divides by the scale's square.
        weight_rate=_rates(learning_rate * sigma * x.scale * (1 / scale if qas else scale)),
        bias_rate=_rates(learning_rate * sigma * (1 / bias_scale if qas else bias_scale)),
        first_index=first_index,
        x_scale=x.scale,
        weight_scale=scale,
        sigma=sigma,
    )


def _ranges(weight: Reals, x: Number, y: Number) -> tuple[Reals, npt.NDArray[np.bool_]]:
    """The largest weight that each output channel must be able to hold, and which channels are dead.

    A scale from the weights of a dead channel would leave it no room to learn, and a learning rate without bound. It
    takes the range of the layer's other channels; in a layer of nothing else, what PyTorch begins with.
    """
    largest = np.abs(weight).reshape(len(weight), -1).max(1)
    terms = weight[0].size
    top = largest.max()
    if top * terms * x.scale * x.top < y.scale / 2:  # no input moves an output by a unit
        top = 1 / math.sqrt(terms)
    dead = largest <= top * _DEAD
    return np.where(dead, top, largest), dead


def _add(op: Add, x: Number, z: Number, y: Number) -> AddConstants:
    ratios = np.array([x.scale / y.scale, z.scale / y.scale])
    shift = 20 - math.floor(math.log2(ratios.max()))
    if not 1 <= shift <= 30:
        raise CompileError(f"addition {op.name} at {op.source}: its inputs and its output differ in scale by {ratios}")
    multipliers = np.minimum(_round(ratios * 2.0**shift), (1 << 21) - 1)
    return AddConstants(
        name=op.name,
        x_zero_point=x.zero_point,
        x_multiplier=int(multipliers[0]),
        z_zero_point=z.zero_point,
        z_multiplier=int(multipliers[1]),
        shift=shift,
        zero_point=y.zero_point,
        minimum=-128 if op.activation == "none" else y.zero_point,
        masked=op.activation != "none",
    )


def _global_average(graph: FloatGraph, op: GlobalAverage, x: Number, y: Number) -> PoolConstants:
    in_h, in_w, channels = graph.tensors[op.x].shape
    pixels = in_h * in_w
    if pixels > _MAX_PIXELS:
        raise CompileError(f"{op.name} at {op.source} averages {pixels} positions; at most {_MAX_PIXELS} are supported")
    factors = _forward_factors(np.array([x.scale / (pixels * y.scale)]), op.name)
    return PoolConstants(op.name, pixels, channels, x.zero_point, int(factors.multiplier[0]), int(factors.shift[0]))


def _product(graph: FloatGraph, op: Multiply, x: Number, z: Number, y: Number) -> ProductConstants:
    (height, width, channels), (z_height, z_width, _) = graph.tensors[op.x].shape, graph.tensors[op.z].shape
    factors = _forward_factors(np.array([x.scale * z.scale / y.scale]), op.name)
    return ProductConstants(
        op.name,
        height * width,
        channels,
        z_height * z_width,
        x.zero_point,
        z.zero_point,
        int(factors.multiplier[0]),
        int(factors.shift[0]),
        y.zero_point,
    )


def _table(op: Apply, x: Number, y: Number) -> TableConstants:
    real = torch.from_numpy((np.arange(-128, 128) - x.zero_point) * x.scale).requires_grad_()
    value = apply_function(op.function, real)
    (slope,) = torch.autograd.grad(value.sum(), real)
    table = _round(value.detach().numpy() / y.scale) + y.zero_point
    return TableConstants(
        op.name,
        x.zero_point,
        y.zero_point,
        np.clip(table, -128, 127),
        np.clip(_round(slope.numpy() * 2.0**14), -32767, 32767),
    )


def _shape(
    graph: FloatGraph, op: FloatOp, kernel: tuple[int, int], stride: tuple[int, int], padding: Padding
) -> ConvShape:
    return ConvShape(*graph.tensors[op.x].shape, *graph.tensors[op.y].shape, *kernel, *stride, *padding[:2])


def _forward_factors(ratios: Reals, name: str) -> Factors:
    factors = fix(ratios)
    tiny = factors.shift > 62
    if (factors.shift[factors.multiplier > 0] < 1).any():
        raise CompileError(
            f"layer {name}: a scale of {ratios.max():.3g} cannot be a shift; check its weights and the calibration"
        )
    return Factors(np.where(tiny, 0, factors.multiplier), np.where(tiny | (factors.multiplier == 0), 62, factors.shift))


def _rates(ratios: Reals) -> Factors:
    """Shifts are kept in a byte: what is below ``2^-97`` moves no weight and is 0."""
    factors = fix(ratios)
    if (factors.shift < -128).any():
        raise CompileError(f"the learning rate is too large: a step would be {ratios.max():.3g} units of a parameter")
    tiny = factors.shift > 127
    return Factors(np.where(tiny, 0, factors.multiplier), np.where(tiny, 0, factors.shift))


def _round(values: Reals) -> Ints:
    """To the nearest, halves away from zero."""
    return (np.sign(values) * np.floor(np.abs(values) + 0.5)).astype(np.int64)
