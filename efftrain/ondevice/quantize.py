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

from efftrain.errors import CompileError, ConfigError
from efftrain.ondevice.ir import (
    AverageForward,
    Conv,
    ConvForward,
    FloatGraph,
    GlobalAverage,
    HeadForward,
    StepGraph,
    StepOp,
    TensorType,
    verify,
)
from efftrain.ondevice.reference import run_float

Ints = npt.NDArray[np.int64]
Reals = npt.NDArray[np.float64]

BIAS_LIMIT = 1 << 30
MASTER_LOW, MASTER_HIGH = -32640, 32639
LOGIT_UNIT = 256 * math.log2(math.e)
"""Logits are counted in ln(2) / 256, so that a power of two is a table of 256 entries and a shift."""
_WEIGHT_TOP, _HEAD_TOP = 127, 64
_MAX_PIXELS, _MAX_GRADIENT_TERMS = 1 << 22, 1 << 23


@dataclass(frozen=True, slots=True)
class ConvShape:
    """The fields of ``eft_conv_shape``, in its order."""

    in_h: int
    in_w: int
    in_c: int
    out_h: int
    out_w: int
    out_c: int
    kernel_h: int
    kernel_w: int
    stride_h: int
    stride_w: int
    pad_h: int
    pad_w: int

    @property
    def pixels(self) -> int:
        """Output positions."""
        return self.out_h * self.out_w

    @property
    def taps(self) -> int:
        """Positions of the kernel."""
        return self.kernel_h * self.kernel_w

    @property
    def macs(self) -> int:
        """Products of one forward pass; those that fall on padding are counted."""
        return self.pixels * self.taps * self.in_c * self.out_c


@dataclass(frozen=True, slots=True)
class Factors:
    """``multiplier * 2^-shift`` per channel, ``eft_factors``."""

    multiplier: Ints
    shift: Ints


@dataclass(frozen=True, slots=True, eq=False)
class ConvConstants:
    """One layer with weights. Shapes: O output channels, H x W kernel, I input channels."""

    name: str
    shape: ConvShape
    is_head: bool
    has_bias: bool
    master: Ints
    """Initial weights times 256, ``(O, H, W, I)``, in [MASTER_LOW, MASTER_HIGH]."""
    bias: Ints
    """Initial biases, ``(O,)``."""
    out: Factors
    x_zero_point: int
    y_zero_point: int
    channel_scale: Ints
    operand_bits: int
    grad_shift: int
    weight_rate: Factors
    bias_rate: Factors
    first_index: int
    """Position of the first weight among all weights of the model."""
    x_scale: float
    weight_scale: Reals
    sigma: float
    """Real value of one unit of the gradient of this layer's output at exponent 0."""

    @property
    def weight(self) -> Ints:
        """Initial int8 weights, ``(O, H, W, I)``."""
        return (self.master + 128) >> 8


@dataclass(frozen=True, slots=True)
class PoolConstants:
    """One global average."""

    name: str
    pixels: int
    channels: int
    zero_point: int
    multiplier: int
    shift: int


Layers = Mapping[str, ConvConstants | PoolConstants]


@dataclass(frozen=True, slots=True)
class Quantized:
    """The forward pass in integers and the constants of every layer."""

    graph: StepGraph
    layers: Layers
    input_scale: float


def calibrate(graph: FloatGraph, samples: npt.NDArray[np.float32]) -> dict[str, float]:
    """Range of every tensor: the 99.95th percentile of |x| for the input, the largest |value| for the others.

    Args:
        graph: A canonical graph.
        samples: ``(N, C, L)`` or ``(N, C, H, W)``, N >= 1, from the data that the model was trained on.

    Raises:
        ConfigError: The samples do not fit the model or hold inf or NaN.
    """
    height, width, channels = graph.tensors[graph.input].shape
    samples, given = np.asarray(samples, np.float32), np.shape(samples)
    if samples.ndim == 3:
        samples = samples[:, :, None, :]
    if samples.ndim != 4 or samples.shape[1:] != (channels, height, width) or not len(samples):
        raise ConfigError(
            f"calibration data has shape {given}; expected (N, {channels}, "
            + (f"{width})" if height == 1 else f"{height}, {width})")
        )
    if not np.isfinite(samples).all():
        raise ConfigError("calibration data holds inf or NaN")
    ranges = {graph.input: max(float(np.quantile(np.abs(samples), 0.9995)), 1e-8)}
    for batch in np.array_split(samples, max(1, len(samples) // 256)):
        for name, value in run_float(graph, batch).items():
            if name != graph.input:
                ranges[name] = max(ranges.get(name, 1e-8), float(value.abs().max()))
    return ranges


def quantize(graph: FloatGraph, ranges: Mapping[str, float], learning_rate: float) -> Quantized:
    """Choose scales and compute every constant of the forward pass, the backward pass and the update.

    Args:
        graph: A canonical graph.
        ranges: From ``calibrate``.
        learning_rate: Of plain SGD on the real weights, batch 1; the same number that one would use in fp32.

    Raises:
        CompileError: A layer is outside what the integer arithmetic can hold.
        ConfigError: The learning rate is not positive and finite.
    """
    if not (math.isfinite(learning_rate) and learning_rate > 0):
        raise ConfigError(f"the learning rate is {learning_rate}; it must be positive")
    tensors = {graph.input: TensorType(graph.tensors[graph.input].shape, "s8", "input")}
    scales, zero_points = {graph.input: ranges[graph.input] / 127}, {graph.input: 0}
    ops: list[StepOp] = []
    for op in graph.ops:
        shape = graph.tensors[op.y].shape
        if isinstance(op, Conv) and op.y == graph.output:
            tensors[op.y] = TensorType(shape, "s16", "logits")
            ops.append(HeadForward(name=op.name, layer=op.name, x=op.x, logits=op.y))
            continue
        tensors[op.y] = TensorType(shape, "s8")
        if isinstance(op, Conv):
            zero_points[op.y] = -128 if op.relu else 0
            ops.append(ConvForward(name=op.name, layer=op.name, x=op.x, y=op.y, mask=None))
        else:
            zero_points[op.y] = zero_points[op.x]
            ops.append(AverageForward(name=op.name, layer=op.name, x=op.x, y=op.y))
        scales[op.y] = ranges[op.y] / (255 if zero_points[op.y] else 127)
    layers: dict[str, ConvConstants | PoolConstants] = {}
    sigma = 1.0
    first_index = sum(graph.constants[op.weight].size for op in graph.ops if isinstance(op, Conv))
    for op in reversed(graph.ops):
        if isinstance(op, Conv):
            first_index -= graph.constants[op.weight].size
            layer = _conv(graph, op, scales, zero_points, sigma, learning_rate, first_index)
            layers[op.name] = layer
            sigma *= float(layer.weight_scale.max())
        else:
            in_h, in_w, channels = graph.tensors[op.x].shape
            pixels = in_h * in_w
            if pixels > _MAX_PIXELS:
                raise CompileError(
                    f"{op.name} at {op.source} averages {pixels} positions; at most {_MAX_PIXELS} are supported"
                )
            factors = _forward_factors(np.array([scales[op.x] / (pixels * scales[op.y])]), op.name)
            layers[op.name] = PoolConstants(
                op.name, pixels, channels, zero_points[op.x], int(factors.multiplier[0]), int(factors.shift[0])
            )
            sigma /= pixels
    result = StepGraph(graph.input, graph.output, tensors, tuple(ops))
    verify(result)
    return Quantized(result, dict(reversed(layers.items())), scales[graph.input])


def _conv(
    graph: FloatGraph,
    op: Conv,
    scales: Mapping[str, float],
    zero_points: Mapping[str, int],
    sigma: float,
    learning_rate: float,
    first_index: int,
) -> ConvConstants:
    is_head = op.y == graph.output
    weight = graph.constants[op.weight].astype(np.float64)
    bias = np.zeros(len(weight)) if op.bias is None else graph.constants[op.bias].astype(np.float64)
    in_shape, out_shape = graph.tensors[op.x].shape, graph.tensors[op.y].shape
    shape = ConvShape(*in_shape, *out_shape, weight.shape[1], weight.shape[2], *op.stride, *op.padding)
    if shape.pixels > _MAX_PIXELS or shape.out_c * shape.taps > _MAX_GRADIENT_TERMS:
        raise CompileError(
            f"layer {op.name} at {op.source} has {shape.pixels} output positions and {shape.out_c * shape.taps} "
            f"gradient "
            f"terms an input; at most {_MAX_PIXELS} and {_MAX_GRADIENT_TERMS} are supported"
        )
    x_scale = scales[op.x]
    largest = np.abs(weight).reshape(len(weight), -1).max(1)
    # A dead channel would have a scale of zero: its bias would not fit and its learning rate would be infinite.
    floor = np.maximum(max(largest.max() / 127 * 2.0**-14, 1e-12), np.abs(bias) / (x_scale * (BIAS_LIMIT >> 2)))
    scale = np.maximum(largest / (_HEAD_TOP if is_head else _WEIGHT_TOP), floor)
    master = np.clip(_round(256 * weight / scale[:, None, None, None]), MASTER_LOW, MASTER_HIGH)
    bias_scale = x_scale * scale
    channel_scale = _round(32767 * scale / scale.max())
    initial = np.abs((master + 128) >> 8)
    bound = (initial * (channel_scale / 32767)[:, None, None, None]).sum((0, 1, 2)).max()
    operand_bits = min(15, 24 - ceil_log2(shape.out_c * shape.taps))
    ratio = LOGIT_UNIT * bias_scale if is_head else bias_scale / scales[op.y]
    return ConvConstants(
        name=op.name,
        shape=shape,
        is_head=is_head,
        has_bias=op.bias is not None,
        master=master,
        bias=np.clip(_round(bias / bias_scale), -BIAS_LIMIT, BIAS_LIMIT),
        out=_forward_factors(ratio, op.name),
        x_zero_point=zero_points[op.x],
        y_zero_point=0 if is_head else zero_points[op.y],
        channel_scale=channel_scale,
        operand_bits=operand_bits,
        grad_shift=math.ceil(math.log2(max(float(bound), 1.0))) + operand_bits - 15,
        weight_rate=fix(learning_rate * sigma * x_scale / scale),
        bias_rate=fix(learning_rate * sigma / bias_scale),
        first_index=first_index,
        x_scale=x_scale,
        weight_scale=scale,
        sigma=sigma,
    )


def fix(ratios: Reals) -> Factors:
    """``ratio = multiplier * 2^-shift`` with a multiplier in [2^30, 2^31), to the nearest; 0 for a ratio of 0."""
    fraction, exponent = np.frexp(ratios)
    multiplier = np.floor(fraction * 2.0**31 + 0.5).astype(np.int64)
    carry = multiplier == 1 << 31
    multiplier = np.where(carry, multiplier >> 1, multiplier)
    shift = np.where(multiplier == 0, 0, 31 - exponent.astype(np.int64) - carry)
    return Factors(multiplier, shift)


def ceil_log2(value: int) -> int:
    """Smallest k with 2^k >= value >= 1."""
    return (value - 1).bit_length()


def _forward_factors(ratios: Reals, name: str) -> Factors:
    factors = fix(ratios)
    tiny = factors.shift > 62
    if (factors.shift[factors.multiplier > 0] < 1).any():
        raise CompileError(
            f"layer {name}: a scale of {ratios.max():.3g} cannot be a shift; check its weights and the calibration"
        )
    return Factors(np.where(tiny, 0, factors.multiplier), np.where(tiny | (factors.multiplier == 0), 62, factors.shift))


def _round(values: Reals) -> Ints:
    """To the nearest, halves away from zero."""
    return (np.sign(values) * np.floor(np.abs(values) + 0.5)).astype(np.int64)
