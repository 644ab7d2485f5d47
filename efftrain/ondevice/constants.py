"""What the compiler ships instead of real numbers: the integers of every layer, and what they stand for."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Reals = npt.NDArray[np.float64]

_Array = TypeVar("_Array", Ints, Reals)
Loss = Literal["cross_entropy", "squared_error"]
LOSSES: tuple[Loss, ...] = get_args(Loss)

BIAS_LIMIT = 1 << 30
MASTER_LOW, MASTER_HIGH = -32640, 32639
KEPT_WEIGHT_DROP, KEPT_BIAS_DROP = 0, 8
"""Fractional bits that optimizers leave out: a bias moves by thousands of its small units, a weight by few."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimizer:
    """How steps become moves. Anything but plain SGD keeps 4 bytes a trained parameter."""

    momentum: float = 0.0
    """``v = momentum * v + step``, the weight moves by ``v``; in [0, 1). 0: none."""

    batch: int = 1
    """Steps that are summed, and applied as their mean: a power of two, at most 65,536. 1: every step is applied."""

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1 or (self.momentum > 0 and self.decay == 0):
            raise ValueError(f"momentum is {self.momentum}; it must be 0 or in [2^-15, 1)")
        if not 1 <= self.batch <= 1 << 16 or self.batch & (self.batch - 1):
            raise ValueError(f"batch is {self.batch}; it must be a power of two, at most 65536")
        if self.momentum and self.batch > 1:
            raise ValueError("momentum and accumulation each keep a value a parameter; choose one")

    @property
    def keeps(self) -> bool:
        """Needs memory of its own."""
        return self.momentum > 0 or self.batch > 1

    @property
    def decay(self) -> int:
        """``momentum`` with 15 fractional bits."""
        return min(32767, round(self.momentum * 32768))

    @property
    def batch_shift(self) -> int:
        """log2 of ``batch``."""
        return ceil_log2(self.batch)


@dataclass(frozen=True, slots=True)
class Number:
    """How a tensor of int8 stores real values: ``(stored - zero_point) * scale``."""

    scale: float
    zero_point: int
    """-128 if no value is negative, else 0."""

    @property
    def top(self) -> int:
        """Largest quantized value."""
        return 127 - self.zero_point


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

    def first_row(self, out_row: int) -> int:
        """First input row that an output row reads; no later output row reads one before it."""
        return max(0, out_row * self.stride_h - self.pad_h)

    def rows_needed(self, out_row: int) -> int:
        """How many input rows must exist before an output row can be computed."""
        return max(0, min(self.in_h, out_row * self.stride_h - self.pad_h + self.kernel_h))

    def first_gradient_row(self, in_row: int) -> int:
        """First row of the output gradient that an input row's gradient reads."""
        return max(0, -((self.kernel_h - 1 - in_row - self.pad_h) // self.stride_h))


@dataclass(frozen=True, slots=True)
class Factors:
    """``multiplier * 2^-shift`` per channel, ``eft_factors``."""

    multiplier: Ints
    shift: Ints


@dataclass(frozen=True, slots=True, eq=False)
class ConvConstants:
    """One layer with weights. O output channels, H x W kernel, I input channels that an output sees; a depthwise layer
    has O = 1 in the shape of its weights, and I channels in and out."""

    name: str
    shape: ConvShape
    depthwise: bool
    groups: int
    """Of a layer in groups; 1 if it is dense or depthwise."""
    is_head: bool
    has_bias: bool
    trainable: bool
    """False for an average pool, which is a depthwise layer of equal weights."""
    master: Ints
    """Initial weights times 256, ``(O, H, W, I)``, in [MASTER_LOW, MASTER_HIGH]."""
    bias: Ints
    """Initial biases, one an output channel."""
    out: Factors
    x_zero_point: int
    y_zero_point: int
    minimum: int
    """Smallest value of the output as stored."""
    masked: bool
    """After a ReLU, a gradient passes only where the output is above ``minimum``."""
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
    def kind(self) -> Literal["conv", "grouped", "depthwise"]:
        """Which of the kernels."""
        return "depthwise" if self.depthwise else "grouped" if self.groups > 1 else "conv"

    @property
    def weight(self) -> Ints:
        """Initial int8 weights, ``(O, H, W, I)``."""
        return (self.master + 128) >> 8

    @property
    def bias_unit(self) -> Ints:
        """log2 of what the moves of biases count in, where the trained state holds moves."""
        return np.clip(self.out.shift - 39, 0, 15)

    @property
    def macs(self) -> int:
        """Products of one forward pass; those that fall on padding are counted."""
        return self.shape.pixels * self.master.size

    def per_channel(self, values: _Array) -> _Array:
        """One value an output channel, shaped to meet the weights."""
        return values if self.depthwise else values[:, None, None, None]


@dataclass(frozen=True, slots=True)
class AddConstants:
    """``eft_sum``."""

    name: str
    x_zero_point: int
    x_multiplier: int
    z_zero_point: int
    z_multiplier: int
    shift: int
    zero_point: int
    minimum: int
    masked: bool


@dataclass(frozen=True, slots=True)
class PoolConstants:
    """One global average."""

    name: str
    pixels: int
    channels: int
    zero_point: int
    multiplier: int
    shift: int


@dataclass(frozen=True, slots=True)
class MaxPoolConstants:
    """One max pool; ``grad_shift`` makes room for a position that wins in several windows."""

    name: str
    shape: ConvShape
    grad_shift: int
    zero_point: int


@dataclass(frozen=True, slots=True, eq=False)
class TableConstants:
    """A function of one variable: 256 results as stored, and 256 slopes with 14 fractional bits."""

    name: str
    x_zero_point: int
    zero_point: int
    table: Ints
    slope: Ints


@dataclass(frozen=True, slots=True)
class ProductConstants:
    """``eft_product``."""

    name: str
    pixels: int
    channels: int
    z_pixels: int
    x_zero_point: int
    z_zero_point: int
    multiplier: int
    shift: int
    zero_point: int


@dataclass(frozen=True, slots=True)
class ConcatConstants:
    """Tensors of one scale side by side: how many channels each has."""

    name: str
    pixels: int
    channels: tuple[int, ...]


LayerConstants = (
    ConvConstants
    | AddConstants
    | PoolConstants
    | MaxPoolConstants
    | TableConstants
    | ProductConstants
    | ConcatConstants
)
Layers = Mapping[str, LayerConstants]
_Kind = TypeVar("_Kind", bound=LayerConstants)


def layer_of(layers: Layers, name: str, kind: type[_Kind]) -> _Kind:
    """The constants of a layer that must be of one kind."""
    layer = layers[name]
    assert isinstance(layer, kind), f"{name} is no {kind.__name__}"
    return layer


def ceil_log2(value: int) -> int:
    """Smallest k with 2^k >= value >= 1."""
    return (value - 1).bit_length()
